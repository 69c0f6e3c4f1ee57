"""Tests priors in distillations: trained in the store, exact in shards, resumed with the same bits."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datm_ray.artifact import load
from datm_ray.config import DistillConfig, RunConfig, override, run_identity
from datm_ray.core.prior import Prior, build_autoencoder
from datm_ray.core.synthetic import SyntheticSet, hard_logits
from datm_ray.data.transform import Transform
from datm_ray.errors import ConfigError, MissingExpertsError
from datm_ray.methods.state import Descent
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline, preview, report
from datm_ray.planning.memory import prior_memory
from datm_ray.planning.plan import plan_run
from datm_ray.recipes import get_recipe
from datm_ray.runtime.executor import Event, Progress
from datm_ray.shape import KNOWN_SHAPES
from datm_ray.stages.distill.pieces import PieceWorker
from datm_ray.stages.distill.task import DistillWorker
from datm_ray.stages.methods.memory import plans_of
from datm_ray.stages.prior import KIND, PriorWorker, read_autoencoder
from datm_ray.store.files.filesystem import open_location
from datm_ray.store.tensors import read_tensors
from datm_ray.store.trajectories import PRIOR_FILE, PRIOR_PROGRESS
from datm_ray.words import data_size
from tests.conftest import CommandLine, run_here, set_of, tiny_config
from tests.stages.distill.test_pieces import SRE2L
from tests.stages.distill.test_task import TWO_NETWORKS, assert_equal_but_for_rounding, distil

SMALL = "prior={channels: 4, width: 8, epochs: 3, inversion_steps: 20"
TRAINED, UNTRAINED = SMALL + "}", SMALL + ", kind: untrained}"
FOUND = "distill.learning_rate_images=null"
DM = ("method=dm", "distill.ipc=2", "distill.initial_step_size=0.03", "evaluate.full=false", FOUND)
DATM = ("distill.ipc=2", FOUND, "evaluate.full=false")
PAGE = Path(__file__).parents[2] / "docs/methods/prior.md"


def with_store_of(other: Path, out: Path) -> Path:
    (out / "experts").symlink_to(other / "experts")
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of DM with a trained prior."""
    out = tmp_path_factory.mktemp("prior")
    run_here(out, tiny_config(*DM, TRAINED))
    return out


@pytest.fixture(scope="module")
def matched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of DATM with a trained prior, two networks and a validation."""
    out = tmp_path_factory.mktemp("datm")
    run_here(out, tiny_config(*DATM, TRAINED, TWO_NETWORKS))
    return out


def stored(out: Path) -> Path:
    (place,) = (out / "experts").glob(f"*/prior/*/{PRIOR_FILE}")
    return place


def test_images_are_those_of_the_decoder_in_the_store(finished: Path) -> None:
    """The last images are what the stored decoder makes of the latents in the checkpoint, which have moved."""
    pipeline = Pipeline([tiny_config(*DM, TRAINED)], str(finished))
    (config,) = pipeline.configs
    assert config.prior is not None
    network = build_autoencoder(config.prior, (1, 8, 8), config.seed)
    assert read_autoencoder(pipeline.runs.prior(config) / PRIOR_FILE, network)["squared_error"] < 0.2
    (part,) = (finished / "tiny/checkpoint").glob("*.arrow")
    arrays = read_tensors(pipeline.out / "tiny/checkpoint" / part.name, kind="checkpoint").arrays
    latents = torch.tensor(arrays["synthetic.latents"])
    assert latents.shape == (20, 4, 2, 2)
    assert arrays["momentum.images"].shape == latents.shape
    with torch.no_grad():
        pixels = network.decoder(latents)
    last = set_of(finished)
    torch.testing.assert_close(last.denormalise(torch.tensor(arrays["synthetic.images"])), pixels)
    first = load(str(finished / "tiny/initial.arrow"))
    assert float((first.images - last.images).norm() / first.images.norm()) > 0.01
    assert last.provenance["prior"] == first.provenance["prior"]
    with torch.no_grad():
        again = network.decoder(network.encode(first.denormalise(first.images)))
    assert float((again - first.denormalise(first.images)).square().mean()) < 0.2


def test_first_move_is_that_of_the_images(finished: Path, tmp_path: Path) -> None:
    """Without a given learning rate, the first update moves images by 5 % of their root mean square, to first order."""
    config = tiny_config(*DM, TRAINED, "distill.iterations=1")
    pipeline = Pipeline([config], str(with_store_of(finished, tmp_path)))
    worker = DistillWorker(pipeline.runs.dataset(config.dataset), config.cluster)
    list(worker.distill(config, pipeline.store_uri, str(tmp_path / "tiny")))
    first = load(str(tmp_path / "tiny/initial.arrow")).images
    assert float((set_of(tmp_path).images - first).norm() / first.norm()) == pytest.approx(0.05, rel=0.1)


def test_a_run_with_a_prior_is_finished_and_reported(finished: Path) -> None:
    """A finished run has nothing left to do, its report has the prior's cost, and its identity the prior's settings."""
    config = tiny_config(*DM, TRAINED)
    pipeline = Pipeline([config], str(finished))
    assert preview.remaining_lines(pipeline.runs) == [
        "0 experts to train",
        "0 sets to distil",
        "0 networks to train for evaluation",
    ]
    report(str(finished))
    (summary,) = json.loads((finished / "summary.json").read_text())
    assert [cost["what"] for cost in summary["cost"]][:2] == ["prior", "distillation"]
    assert "prior" in run_identity(config)
    assert "prior" not in run_identity(tiny_config(*DM))
    assert "1 prior to train: tiny" in preview.remaining_lines(
        Pipeline([override(config, ["seed=1"])], str(finished / "other")).runs
    )


def stop_at(config: RunConfig, out: Path, iteration: int) -> None:
    """Distil up to an iteration, and then from the checkpoint to the end."""
    pipeline = Pipeline([config], str(out))
    worker = DistillWorker(pipeline.runs.dataset(config.dataset), config.cluster)
    arguments = (config, pipeline.store_uri, str(out / "tiny"))
    for event in worker.distill(*arguments):
        if isinstance(event, Progress) and event.done == iteration:
            break
    assert not (out / "tiny/synthetic.arrow").exists()
    list(worker.distill(*arguments))


@pytest.mark.parametrize("iteration", [1, 2, 5])
def test_a_resumed_run_has_the_same_bits(iteration: int, finished: Path, tmp_path: Path) -> None:
    """A run of DM with a prior that ends after any iteration and is started again learns the same bits."""
    stop_at(tiny_config(*DM, TRAINED), with_store_of(finished, tmp_path), iteration)
    assert torch.equal(set_of(tmp_path).images, set_of(finished).images)


@pytest.mark.parametrize("iteration", [3, pytest.param(5, marks=(pytest.mark.slow, pytest.mark.exhaustive))])
def test_a_resumed_run_of_datm_has_the_same_bits(iteration: int, matched: Path, tmp_path: Path) -> None:
    """The images, labels and step sizes of DATM with a prior and two networks do not depend on a stop."""
    stop_at(tiny_config(*DATM, TRAINED, TWO_NETWORKS), with_store_of(matched, tmp_path), iteration)
    one, other = set_of(tmp_path), set_of(matched)
    assert torch.equal(one.images, other.images)
    assert torch.equal(one.soft_labels, other.soft_labels)
    assert one.step_sizes == other.step_sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "size"),
    [(["cluster.shards=2"], 2), (["cluster.backbones_apart=true"], 2), (["cluster.shards=3"], 3)],
)
def test_several_workers_learn_what_one_process_learns(
    changes: list[str], size: int, matched: Path, tmp_path: Path
) -> None:
    """Shards of the classes and workers of other networks learn what one process learns, but for rounding."""
    distil(tiny_config(*DATM, TRAINED, TWO_NETWORKS, *changes), with_store_of(matched, tmp_path), size)
    assert_equal_but_for_rounding(set_of(tmp_path), set_of(matched))


@pytest.mark.slow
def test_shards_invert_what_one_process_inverts(tmp_path: Path) -> None:
    """Shards find the first latents of an untrained decoder, and learn from them, as one process does."""
    for size, name in ((1, "one"), (2, "two")):
        (tmp_path / name).mkdir()
        distil(tiny_config(*DM, UNTRAINED, f"cluster.shards={size}"), tmp_path / name, size)
    assert_equal_but_for_rounding(set_of(tmp_path / "two"), set_of(tmp_path / "one"))


@pytest.mark.exhaustive
@pytest.mark.ray
@pytest.mark.slow
def test_ray_has_the_bits_of_one_process(ray_cluster: Any, finished: Path, tmp_path: Path) -> None:
    """Ray's workers train the prior and learn the set as this process does, bit by bit."""
    from datm_ray.runtime.ray.executor import RayExecutor

    config = tiny_config(*DM, TRAINED)
    Pipeline([config], str(tmp_path)).run_all(lambda: RayExecutor(config.cluster), Reporter(quiet=True))
    assert torch.equal(set_of(tmp_path).images, set_of(finished).images)
    one, other = (read_bits(stored(out)) for out in (tmp_path, finished))
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def read_bits(place: Path) -> dict[str, Any]:
    return read_tensors(open_location(str(place)), kind="prior").arrays


def trained(config: RunConfig, out: Path, *, until: int | None = None) -> list[Event]:
    """Train a prior, up to an epoch. Every epoch is saved."""
    config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"checkpoint_seconds": 1e-9})})
    pipeline = Pipeline([config], str(out))
    events = []
    for event in PriorWorker(pipeline.runs.dataset(config.dataset), config.cluster).train(config, pipeline.store_uri):
        events.append(event)
        if isinstance(event, Progress) and event.done == until:
            break
    return events


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_stopped_training_resumes_with_the_same_bits(
    is_damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prior stopped after two of three epochs, its progress damaged or not, ends with the bits of one not stopped."""
    monkeypatch.setattr("datm_ray.stages.prior.WRITE_SHARE", 1e9)
    config = tiny_config(*DM, TRAINED)
    trained(config, tmp_path / "whole")
    trained(config, tmp_path / "parts", until=2)
    (progress,) = (tmp_path / "parts").rglob(PRIOR_PROGRESS)
    if is_damaged:
        progress.write_bytes(progress.read_bytes()[:-50])
    again = [event.done for event in trained(config, tmp_path / "parts") if isinstance(event, Progress)]
    assert again == ([1, 2, 3] if is_damaged else [3])
    assert not progress.exists()
    one, other = (read_bits(stored(tmp_path / name)) for name in ("parts", "whole"))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    before = stored(tmp_path / "parts").read_bytes()
    assert not any(isinstance(event, Progress) for event in trained(config, tmp_path / "parts"))
    assert stored(tmp_path / "parts").read_bytes() == before
    files = [open_location(str(stored(tmp_path / name))) for name in ("parts", "whole")]
    costs = [read_tensors(file, kind=KIND).metadata["spent"] for file in files]
    assert ["is_partial" in cost for cost in costs] == [is_damaged, False], "the cost is lost with its file"


def test_whitened_pixels_are_turned_back_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prior inverts the whitening of each training image once, not in each of its epochs, and sees the same pixels;
    the memory of its worker counts them."""
    config = tiny_config(*DM, TRAINED, "dataset.normalisation=zca")
    dataset = Pipeline([config], str(tmp_path)).runs.dataset(config.dataset)
    inverted, invert = [], Transform.denormalise

    def noting(self: Transform, images: torch.Tensor) -> torch.Tensor:
        inverted.append(len(images))
        return invert(self, images)

    rows = np.array([5, 0, len(dataset.train_labels) - 1])
    pixels = PriorWorker(dataset, config.cluster)._pixels(32)(rows)
    torch.testing.assert_close(pixels, invert(dataset.transform, torch.tensor(dataset.train_images[rows])))
    monkeypatch.setattr(Transform, "denormalise", noting)
    trained(config, tmp_path)
    assert sum(inverted) == len(dataset.train_labels)
    shape = KNOWN_SHAPES["digits"]
    plain = prior_memory(tiny_config(*DM, TRAINED, "dataset.normalisation=standard"), shape)
    assert prior_memory(config, shape) - plain >= shape.bytes


def test_an_average_is_made_by_the_decoder(finished: Path, tmp_path: Path) -> None:
    """With a moving average, the kept images are those that the decoder makes of the averaged latents, also in a run
    that is resumed: no average of images that no latents give."""
    config = tiny_config(*DM, TRAINED, "distill.average_decay=0.5")
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        with_store_of(finished, tmp_path / name)
    pipeline = Pipeline([config], str(tmp_path / "whole"))
    worker = DistillWorker(pipeline.runs.dataset(config.dataset), config.cluster)
    list(worker.distill(config, pipeline.store_uri, str(tmp_path / "whole/tiny")))
    stop_at(config, tmp_path / "parts", 3)
    assert torch.equal(set_of(tmp_path / "parts").images, set_of(tmp_path / "whole").images)
    (part,) = (tmp_path / "whole/tiny/checkpoint").glob("*.arrow")
    arrays = read_bits_of_checkpoint(part)
    assert config.prior is not None
    network = build_autoencoder(config.prior, (1, 8, 8), config.seed)
    read_autoencoder(pipeline.runs.prior(pipeline.configs[0]) / PRIOR_FILE, network)
    kept = set_of(tmp_path / "whole")
    with torch.no_grad():
        made = network.decoder(torch.tensor(arrays["averaged.latents"]))
    torch.testing.assert_close(kept.denormalise(kept.images), made)
    assert not np.array_equal(arrays["averaged.latents"], arrays["synthetic.latents"])


def read_bits_of_checkpoint(place: Path) -> dict[str, Any]:
    return read_tensors(open_location(str(place)), kind="checkpoint").arrays


def test_a_set_needs_its_trained_prior(finished: Path, tmp_path: Path) -> None:
    """Distilling without the prior in the store names the command that trains it; a prior of other settings is none."""
    config = tiny_config(*DM, TRAINED)
    command = "`datm-ray experts tiny` with the same --set, --out and --store"
    with pytest.raises(MissingExpertsError, match=f"no trained prior, which tiny needs.*{command}"):
        run_here(tmp_path, config, stage="distill")
    changed = override(config, ["prior.width=9"])
    with_store_of(finished, tmp_path)
    with pytest.raises(MissingExpertsError):
        run_here(tmp_path, changed, stage="distill")


def test_an_untrained_prior_starts_near_the_real_images(tmp_path: Path) -> None:
    """An inversion finds latents whose images correlate with the real ones, and no prior is trained or stored."""
    config = tiny_config(
        *DM, UNTRAINED, "prior.inversion_steps=150", "prior.channels=16", "prior.width=32", "distill.iterations=1"
    )
    out = tmp_path / "untrained"
    run_here(out, config)
    run_here(tmp_path / "pixels", tiny_config(*DM, "distill.iterations=1"))
    assert not (out / "experts").exists()
    mine, real = (load(str(each / "tiny/initial.arrow")).images for each in (out, tmp_path / "pixels"))
    assert float((mine - real).square().mean() / real.square().mean()) < 0.5


@pytest.mark.slow
def test_sre2l_recovers_latents(tmp_path: Path) -> None:
    """SRe2L's blocks learn latents by Adam, with several rounds, and a block that is stopped has the same bits."""
    config = tiny_config(*SRE2L, TRAINED, "recover.rounds=2", "distill.initial=random")
    run_here(tmp_path / "whole", config)
    parts = with_store_of(tmp_path / "whole", tmp_path)
    pipeline = Pipeline([config], str(parts))
    worker = PieceWorker(pipeline.runs.dataset(config.dataset), config.cluster)
    for event in worker.make_piece(config, pipeline.store_uri, str(parts / "tiny"), 0):
        if isinstance(event, Progress) and event.done == 3:
            break
    run_here(parts, config)
    assert torch.equal(set_of(parts).images, set_of(tmp_path / "whole").images)
    first = load(str(parts / "tiny/initial.arrow")).images
    assert float((first - set_of(parts).images).norm() / first.norm()) > 0.001


def test_a_prior_counts_in_the_plan() -> None:
    """A plan counts the decoder's micro-batch, latents, training and passes; a wider decoder takes more of each."""
    plain, small, large = (
        plans_of(override(get_recipe("cifar10-ipc1"), [each]).resolved((32, 32)), KNOWN_SHAPES["cifar10"])[0].parts
        for each in ("seed=0", "prior={width: 16}", "prior={width: 512}")
    )
    assert plain["prior"] == 0 < small["prior"] < large["prior"]
    cluster = "cpus=2,memory=24GiB,gflops=50"
    hours = [
        plan_run(override(get_recipe("cifar10-ipc1"), [each]), cluster).stages
        for each in ("seed=0", "prior={width: 16}", "prior={width: 32}", "prior={width: 32, kind: untrained}")
    ]
    trained = [each["experts"][0] for each in hours]
    assert trained[0] == trained[3] < trained[1] < trained[2]
    assert hours[0]["distillation"] < hours[1]["distillation"] < hours[2]["distillation"] == hours[3]["distillation"]
    assert plain["synthetic"] < small["synthetic"] == large["synthetic"]
    assert plain["network"] < small["network"] < large["network"]


def test_a_plan_names_a_trained_prior() -> None:
    """A plan has a line on a prior that the run trains, and none on an untrained one."""
    cluster = "cpus=1,memory=24GiB,gflops=50"
    plain, trained, untrained = (plan_run(tiny_config(*DM, *more), cluster) for more in ((), (TRAINED,), (UNTRAINED,)))
    assert any("a decoder, trained for 3 epochs" in line for line in trained.lines())
    assert not any("decoder" in line for found in (plain, untrained) for line in found.lines())


def test_priors_are_listed_verified_and_deleted(finished: Path, tmp_path: Path, datm_ray: CommandLine) -> None:
    """`store ls` names a prior in a store without experts, `verify` finds its damage, and `rm` deletes it."""
    shutil.copytree(finished / "experts", "experts")
    name = str(stored(Path()).parent.relative_to("experts"))
    size = stored(Path()).stat().st_size
    code, out, _ = datm_ray("store", "ls", "experts")
    assert (code, out) == (0, f"{name}  a trained prior, {data_size(size)}\n")
    assert datm_ray("store", "verify", "experts")[1].startswith("whole: 0 experts and 1 other file, ")
    content = bytearray(stored(Path()).read_bytes())
    content[len(content) // 2] ^= 1
    stored(Path()).write_bytes(content)
    code, out, err = datm_ray("store", "verify", "experts")
    assert (code, "prior.arrow is damaged" in out, len(err.splitlines())) == (2, True, 1)
    (stored(Path()).parent / PRIOR_PROGRESS).touch()
    assert datm_ray("store", "rm", "experts", name)[1].startswith("Would delete the prior ")
    code, out, _ = datm_ray("store", "rm", "experts", name, "--yes")
    assert (code, out) == (0, f"Deleted the prior {Path('experts', name).absolute()}, {data_size(size)}.\n")
    assert [path for path in Path("experts").rglob("*") if path.is_file()] == []


def test_priors_that_cannot_work_are_refused() -> None:
    """A method that learns no images refuses a prior, and an unknown kind is an error that lists the kinds."""
    config = tiny_config("method=select", "select.by=random", TRAINED)
    with pytest.raises(ConfigError, match="prior is set, and method select learns no images"):
        preview.remaining_lines(Pipeline([config], "memory://priors-refused").runs)
    with pytest.raises(ConfigError, match=r"prior\.kind is 'gan': it must be trained, untrained or package"):
        tiny_config("prior={kind: gan}")


class Halved(torch.nn.Module):
    """Decoder with two latents that halve each other's sum."""

    latent_shape = (2,)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.sum(dim=1)[:, None, None, None].expand(-1, 1, 2, 2) / 2


def test_updates_move_latents_with_momentum() -> None:
    """An update changes the latents by SGD with momentum 0.5 along the pulled-back gradient, and renders the images."""
    settings = DistillConfig(learning_rate_images=1.0)
    first = SyntheticSet(torch.zeros(1, 1, 2, 2), hard_logits(torch.tensor([0]), 2), torch.ones(1), torch.tensor([0]))
    first.latents = torch.zeros(1, 2)
    state = Descent(first, settings)
    state.prior = Prior.of(Halved(), torch.nn.Identity(), chunk=1)
    for moved in (-2.0, -5.0):  # each latent's gradient is the sum of four pixels' over 2
        state.step(lambda: (torch.tensor(1.0), torch.ones(1, 1, 2, 2)))
        assert state.synthetic.variable("images").tolist() == [[moved, moved]]
        assert bool((state.synthetic.images == moved).all())
    copy = Descent.from_arrays(*state.to_arrays(), settings, torch.device("cpu"))
    assert torch.equal(copy.synthetic.variable("images"), state.synthetic.variable("images"))
    assert torch.equal(copy.momenta["images"], state.momenta["images"])
    before = state.synthetic.clone()
    state.step(lambda: (torch.tensor(1.0), torch.full((1, 1, 2, 2), 1e38) * 10))
    assert state.history[-1].skipped
    assert torch.equal(state.synthetic.images, before.images)


@pytest.fixture
def own_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the module of docs/methods/prior.md importable."""
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "my_decoders.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_decoders", None)


@pytest.mark.usefixtures("own_decoders")
def test_the_documented_decoder_of_a_users_runs(tmp_path: Path) -> None:
    """The example of docs/methods/prior.md makes a set with its recipe, from a decoder without an encoder."""
    recipes = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.S)
    (recipe,) = (each for each in recipes if "my_decoders" in each)
    (tmp_path / "tiny.yaml").write_text(recipe)
    quick = ("network.width=4", "distill.iterations=4", "distill.validate_every=4", "evaluate.protocol=quick")
    changes = [*quick, "name=tiny", "evaluate.seeds=1", "evaluate.full=false"]
    changes += ["cluster.compile=false", "prior.inversion_steps=10"]
    config = override(get_recipe(str(tmp_path / "tiny.yaml")), changes)
    assert config.prior is not None
    assert config.prior.kind == "my_decoders:smooth"
    pipeline = run_here(tmp_path / "out", config)
    assert "distilled" in pipeline.table()
    first, last = (load(str(tmp_path / "out/tiny" / name)) for name in ("initial.arrow", "synthetic.arrow"))
    assert float((first.images - last.images).norm() / first.images.norm()) > 0.001
