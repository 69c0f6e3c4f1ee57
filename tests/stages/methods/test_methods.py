"""Tests the seam between pipeline and methods: DM and a method of a user's, from recipe to report."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datm_ray.artifact import Artifact, load
from datm_ray.config import DistillConfig, RunConfig, override, run_identity, to_yaml
from datm_ray.core.images.augment import augment
from datm_ray.core.synthetic import SyntheticSet, hard_logits
from datm_ray.core.training.loop import OPTIMISERS
from datm_ray.data.transform import fit_transform
from datm_ray.errors import ConfigError, DivergenceError
from datm_ray.methods import state as state_module
from datm_ray.methods.distribution import draw_shared
from datm_ray.methods.state import Descent
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline, preview, report, summaries
from datm_ray.pipeline.tasks import expert_recipes
from datm_ray.planning.plan import plan_run
from datm_ray.recipes import get_recipe, recipe_names
from datm_ray.runtime.executor import Note, Progress, SerialExecutor
from datm_ray.stages.distill.checkpoint import read_curves
from datm_ray.stages.distill.task import DistillWorker
from datm_ray.stages.evaluate.rows import training_of
from datm_ray.stages.methods.base import Method
from datm_ray.stages.methods.distribution import SLOW_READING, DistributionMatching
from datm_ray.stages.methods.registry import METHODS, method_of
from datm_ray.stages.methods.trajectory import TrajectoryMatching
from datm_ray.store.files.filesystem import open_location
from tests.conftest import CommandLine, load_config_text, set_of, tiny_config
from tests.pipeline.test_pipeline import photos
from tests.stages.distill.test_task import METADD, assert_equal_but_for_rounding, distil

DM = ("method=dm", "distill.ipc=2", "distill.learning_rate_images=5", "distill.initial_step_size=0.03")
SCORED = ("evaluate.networks=[lenet]", "evaluate.seeds=1")
PAGE = Path(__file__).parents[3] / "docs/methods/own.md"


class Shown(Reporter):
    """Reporter that keeps its messages."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        """Keep a message."""
        self.lines.append(text)


def run(config: RunConfig, out: Path) -> tuple[Pipeline, list[str]]:
    """Run everything in this process. Returns the pipeline and what was shown."""
    pipeline, shown = Pipeline([config], str(out)), Shown()
    pipeline.run_all(lambda: SerialExecutor(config.cluster), shown)
    return pipeline, shown.lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run of DM, and what it has shown."""
    out = tmp_path_factory.mktemp("dm")
    return out, run(tiny_config(*DM, *SCORED), out)[1]


def test_dm_trains_no_experts_and_is_scored_against_hard_labels(finished: tuple[Path, list[str]]) -> None:
    """DM's run says that it trains no experts, changes the images alone, and has the rows that need no experts."""
    out, shown = finished
    assert "Experts: none, method dm needs no trained networks" in shown
    assert not (out / "experts").exists()
    first, last = load(str(out / "tiny/initial.arrow")), set_of(out)
    assert float((first.images - last.images).norm() / first.images.norm()) > 0.001
    assert torch.equal(first.soft_labels, last.soft_labels)
    assert torch.equal(last.soft_labels, hard_logits(last.labels, 10))
    assert first.step_size == last.step_size == pytest.approx(0.03)
    pipeline = Pipeline([tiny_config(*DM, *SCORED)], str(out))
    assert preview.remaining_lines(pipeline.runs) == [
        "0 experts to train",
        "0 sets to distil",
        "0 networks to train for evaluation",
    ]
    (summary,) = summaries(pipeline.out, pipeline.configs)
    assert {score.row for score in summary.scores} == {"random-hard", "distilled", "full"}
    assert [each.control.row for each in summary.networks if each.control] == ["random-hard"] * 2
    table = pipeline.table()
    assert "random real images, hard labels, tuned" in table
    assert "soft labels" not in table


@pytest.mark.parametrize("streamed", [True, False])
def test_dm_on_images_that_stay_in_their_files_says_what_helps(streamed: bool, tmp_path: Path) -> None:
    """A run of DM says before its first iteration that every iteration reads files, if images are streamed."""
    config = photos(tmp_path / "data", 12)
    settings = (f"dataset.streamed={str(streamed).lower()}", "dataset.resize=8", "dataset.normalisation=standard")
    config = override(config, [*DM, *settings, "distill.iterations=1", "distill.real_batch=5"])
    worker = DistillWorker(Pipeline([config], str(tmp_path)).runs.dataset(config.dataset), config.cluster)
    events = worker.distill(config, str(tmp_path / "experts"), str(tmp_path / "tiny"))
    notes = [event.text for event in events if isinstance(event, Note)]
    text = f"every iteration reads up to 10 images from their files for each network; {SLOW_READING}"
    assert (text in notes) == streamed


def test_report_tells_of_no_experts(finished: tuple[Path, list[str]]) -> None:
    """The report of a run without experts has a loss and no trajectories, start epochs, thresholds or learned steps."""
    page = re.sub(r"<pre.*?</pre>", "", report(str(finished[0])).read_bytes().decode(), flags=re.S)
    assert "<h4>Loss</h4>" in page
    for absent in ("trajectories", "from 2 experts", "Start epoch", "threshold of", "learned step size<", "Step size"):
        assert absent not in page


@pytest.mark.parametrize("stop_at", [1, 5])
def test_dm_that_is_resumed_has_the_same_bits(stop_at: int, finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    """A run of DM that ends after any iteration and is started again learns the bits of one that was not stopped."""
    config = tiny_config(*DM)
    pipeline = Pipeline([config], str(tmp_path))
    worker = DistillWorker(pipeline.runs.dataset(config.dataset), config.cluster)
    arguments = (config, pipeline.store_uri, str(tmp_path / "tiny"))
    for event in worker.distill(*arguments):
        if isinstance(event, Progress) and event.done == stop_at:
            break
    assert not (tmp_path / "tiny/synthetic.arrow").exists()
    list(worker.distill(*arguments))
    assert torch.equal(set_of(tmp_path).images, set_of(finished[0]).images)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [2, 3])
def test_dm_in_shards_learns_what_one_process_learns(
    shards: int, finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Shards of the classes in processes of their own learn what one process learns."""
    distil(tiny_config(*DM, f"cluster.shards={shards}"), tmp_path, shards)
    assert_equal_but_for_rounding(set_of(tmp_path), set_of(finished[0]))


@pytest.mark.exhaustive
@pytest.mark.ray
@pytest.mark.slow
def test_dm_on_ray_has_the_bits_of_one_process(
    ray_cluster: Any, finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Ray's workers learn and score what this process does, bit by bit."""
    from datm_ray.runtime.ray.executor import RayExecutor

    config = tiny_config(*DM, *SCORED)
    pipeline = Pipeline([config], str(tmp_path))
    pipeline.run_all(lambda: RayExecutor(config.cluster), Reporter(quiet=True))
    assert torch.equal(set_of(tmp_path).images, set_of(finished[0]).images)
    (mine,), (theirs,) = (summaries(Pipeline([config], str(out)).out, [config]) for out in (tmp_path, finished[0]))
    assert [each.accuracies for each in mine.scores] == [each.accuracies for each in theirs.scores]


@pytest.mark.slow
def test_metadd_works_in_dm(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    """With MetaDD, DM's first network and the auxiliaries are trained, and its term changes the set."""
    pipeline, _ = run(tiny_config(*DM, METADD), tmp_path)
    assert len(pipeline.runs.networks()) == 3
    assert (tmp_path / "tiny/maps.arrow").exists()
    difference = set_of(tmp_path).images - set_of(finished[0]).images
    assert float(difference.norm() / set_of(tmp_path).images.norm()) > 1e-5
    assert "random real images, soft labels" in pipeline.table()  # the first network's experts label them


@pytest.mark.slow
def test_metadd_in_dm_is_the_same_on_any_workers(tmp_path: Path) -> None:
    """With augmented images, workers with some classes or some MetaDD networks learn what one process learns.

    Raw images give another set.
    """
    settings = (*DM, METADD, "distill.augmentation=color_crop_scale", "distill.iterations=3", "cluster.compile=false")
    first = Pipeline([tiny_config(*settings)], str(tmp_path / "experts"))
    first.train_experts(lambda: SerialExecutor(first.configs[0].cluster), Shown())
    shards, apart, raw = "cluster.shards=2", "cluster.auxiliaries_apart=true", "metadd.augmented=false"
    found = {}
    for name, changes in {"one": [], "shards": [shards], "apart": [apart], "raw": [raw]}.items():
        config = tiny_config(*settings, *changes)
        shutil.copytree(tmp_path / "experts", tmp_path / name)
        distil(config, tmp_path / name, config.workers_per_set)
        found[name] = set_of(tmp_path / name)
    assert_equal_but_for_rounding(found["shards"], found["one"])
    assert_equal_but_for_rounding(found["apart"], found["one"])
    assert not torch.allclose(found["raw"].images, found["one"].images, rtol=1e-5)


@pytest.mark.slow
def test_dm_of_several_networks_may_be_apart(tmp_path: Path) -> None:
    """Two networks, each with workers of its own, learn what one process learns with both; from noise too."""
    changes = (*DM, "backbones=[{network: {width: 3, depth: 1}, weight: 0.5}]", "distill.initial=noise")
    for name, size, more in (("one", 1, ()), ("apart", 2, ("cluster.backbones_apart=true",))):
        (tmp_path / name).mkdir()
        distil(tiny_config(*changes, *more), tmp_path / name, size)
    assert_equal_but_for_rounding(set_of(tmp_path / "apart"), set_of(tmp_path / "one"))


def test_the_learning_rate_of_images_may_be_found(tmp_path: Path) -> None:
    """A learning rate that is left open moves pixels by 5 % of their root mean square in the first update."""
    config = tiny_config(*DM, "distill.learning_rate_images=null", "distill.iterations=1")
    list(DistillWorker(Pipeline([config], str(tmp_path)).runs.dataset(config.dataset), config.cluster).distill(
        config, str(tmp_path / "experts"), str(tmp_path / "tiny")
    ))  # fmt: skip
    first = load(str(tmp_path / "tiny/initial.arrow")).images
    assert float((set_of(tmp_path).images - first).norm() / first.norm()) == pytest.approx(0.05, rel=1e-3)


def module_of_the_page() -> str:
    """Source of the example in docs/methods/own.md."""
    source, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    return str(source)


@pytest.fixture
def own_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the example's module importable."""
    (tmp_path / "my_methods.py").write_text(module_of_the_page() + "\n\nnothing = 1\n")
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_methods", None)


@pytest.mark.usefixtures("own_methods")
def test_the_documented_method_of_a_users_runs(tmp_path: Path) -> None:
    """The example of docs/methods/own.md makes a set from its recipe, in about 30 lines, and lowers its loss."""
    assert len(module_of_the_page().splitlines()) <= 34
    recipe, *_ = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "digits-dc.yaml").write_text(recipe)
    quick = ("network.width=4", "distill.iterations=8", "distill.validate_every=8", "evaluate.protocol=quick")
    config = override(get_recipe(str(tmp_path / "digits-dc.yaml")), [*quick, "evaluate.seeds=1", "evaluate.full=false"])
    assert config.distill.options == {"real": 64, "augment": True}
    pipeline, shown = run(config, tmp_path / "out")
    assert "Experts: none, method my_methods:GradientMatching needs no trained networks" in shown
    assert "distilled" in pipeline.table()
    first, last = (load(str(tmp_path / "out/digits-dc" / name)) for name in ("initial.arrow", "synthetic.arrow"))
    assert float((first.images - last.images).norm() / first.images.norm()) > 0.01
    (scored,) = (tmp_path / "out/digits-dc/evaluation").glob("distilled-*.json")
    result = json.loads(scored.read_text())
    assert result["learned_step_size"] is None
    assert result["step_size"] in OPTIMISERS["sgd"].step_sizes
    assert last.training().learning_rate == result["step_size"]


def distilled_here(out: Path, *changes: str) -> Artifact:
    """Set of a tiny recipe, distilled in this process without evaluation; its experts must be in the store."""
    config = tiny_config(*changes)
    pipeline = Pipeline([config], str(out))
    worker = DistillWorker(pipeline.runs.dataset(config.dataset), config.cluster)
    list(worker.distill(config, pipeline.store_uri, str(out / "tiny")))
    return set_of(out)


@pytest.fixture
def own_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the page's module with another term importable, and one that does as the page says of DATM."""
    (source,) = (each for each in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "Smooth" in each)
    (tmp_path / "my_terms.py").write_text(f"{source}\n{OF_DATM}")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_terms", None)


OF_DATM = """
from datm_ray.stages.methods.trajectory import TrajectoryMatching


class Fading(TrajectoryMatching):
    options = {"fade": 0.0}

    def step(self, state, meta):
        super().step(state, meta)
        with torch.no_grad():
            state.synthetic.images.mul_(1 - self.option("fade"))
"""


@pytest.mark.usefixtures("own_terms")
def test_the_documented_term_is_added_to_dms_loss(tmp_path: Path) -> None:
    """With weight 0 the subclass makes DM's set, bit by bit; with another one, a smoother set with a larger loss."""
    short = (*DM, "distill.validate_every=0", "distill.iterations=2", "cluster.compile=false")
    quick = (*short, "method=my_terms:SmoothMatching")
    plain = distilled_here(tmp_path / "plain", *short)
    none = distilled_here(tmp_path / "none", *quick, "distill.options.smooth=0")
    some = distilled_here(tmp_path / "some", *quick, "distill.options.smooth=0.01")
    roughness = [float(each.images.diff(dim=3).square().sum()) for each in (plain, none, some)]
    assert torch.equal(none.images, plain.images)
    assert roughness[2] < roughness[1]
    first = [read_curves(open_location(str(tmp_path / name / "tiny")))["history.loss"][0] for name in ("none", "some")]
    rough = load(str(tmp_path / "some/tiny/initial.arrow")).images.double()
    term = 0.01 * sum(rough.diff(dim=side).square().sum() for side in (2, 3))
    assert first[1] - first[0] == pytest.approx(float(term), rel=1e-3)


@pytest.mark.usefixtures("own_terms")
def test_datm_takes_another_term_as_documented(tmp_path: Path, finished_run: Path) -> None:
    """A subclass of DATM whose step moves the images once more makes DATM's set if it moves them by nothing."""
    quick = ("distill.iterations=2", "distill.validate_every=0", "cluster.compile=false")
    found = []
    for number, changes in enumerate(
        ((), ("method=my_terms:Fading",), ("method=my_terms:Fading", "distill.options.fade=0.5"))
    ):
        (out := tmp_path / str(number)).mkdir()
        (out / "experts").symlink_to(finished_run / "experts")
        found.append(distilled_here(out, *quick, *changes).images)
    assert torch.equal(found[0], found[1])
    assert float(found[2].norm()) < 0.5 * float(found[1].norm())


@pytest.mark.parametrize(
    ("method", "candidates"),
    [("datm", 1), ("mtt", 1), ("dm", 1), ("sre2l", 3), ("select", 3), ("own", 3), ("learning", 1)],
)
def test_a_set_without_a_learned_step_size_is_scored_as_its_controls_are(
    method: str, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set trains with its own step size if its method gives one; otherwise with as many candidates as controls."""
    monkeypatch.setitem(METHODS, "own", "datm_ray.stages.methods.base:Method")
    monkeypatch.setitem(METHODS, "learning", f"{__name__}:Giving")
    config = RunConfig(method=method)
    assert training_of(config, "distilled", None)[0] == candidates
    assert training_of(config, "random-hard", None)[0] == len(OPTIMISERS["sgd"].step_sizes) == 3


class Giving(Method):
    """Method of a user's own that learns the set's step size."""

    gives_step_size = True


class Silent(DistributionMatching):
    """Method with gradients, and with a step size that nobody learned."""

    gives_step_size = False


class Outspoken(DistributionMatching):
    """Method with gradients, whose paper publishes the step size that others have as a default."""

    gives_step_size = True


@pytest.mark.parametrize(("kind", "is_given"), [(Silent, False), (Outspoken, True)])
@pytest.mark.parametrize("is_packaged", [True, False])
def test_a_sets_file_has_its_methods_answer_on_the_step_size(
    is_packaged: bool, kind: type[Method], is_given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set's file states whether its method gives the step size, so no other place must know a method's name."""
    place = f"{__name__}:{kind.__name__}"
    monkeypatch.setitem(METHODS, "new", place)
    settings = ("distill.iterations=1", "distill.initial_step_size=0.01")
    made = distilled_here(tmp_path, *DM, *settings, f"method={'new' if is_packaged else place}")
    assert made.step_size == pytest.approx(0.01)
    assert (made.stated_has_step_size, made.has_step_size) == (is_given, is_given)
    assert load(str(tmp_path / "tiny/initial.arrow")).has_step_size == is_given


def test_a_pages_snippets_of_augmentation_and_pixels_run() -> None:
    """The documented draws augment two batches alike, and pixels lead back to the images, with gradients."""
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    images = torch.rand(3, 3, 8, 8)
    names: dict[str, Any] = {"seed": 1, "iteration": 2, "label": 3, "images": images, "others": images.clone()}
    (drawing,) = (each for each in snippets if "draw_augmentation" in each)
    exec(drawing, names)
    assert torch.equal(names["augmented"], names["again"])
    assert not torch.equal(names["augmented"], images)
    pixels = torch.randint(0, 255, (20, 3, 8, 8), dtype=torch.uint8).numpy()
    for kind in ("zca", "standard"):
        transform = fit_transform(kind, pixels, 255)
        start = transform.normalise(pixels).requires_grad_()
        names = {"transform": transform, "images": start}
        (snippet,) = (each for each in snippets if "denormalise" in each)
        exec(snippet, names)
        assert torch.allclose(names["images"], start, atol=1e-3)
        assert names["images"].grad_fn is not None


def test_augmented_batches_of_a_class_share_one_draw() -> None:
    """Every image of every batch gets the operation and parameters of the first, as DM's images do."""
    config = tiny_config("method=dm", "distill.augmentation=scale_rotate_crop")
    method = Method.__new__(Method)
    method.part = SimpleNamespace(config=config)  # type: ignore[assignment]
    one, several = torch.rand(1, 1, 8, 8), torch.rand(4, 1, 8, 8)
    first, second = method.augmented(7, 5, one.expand(2, -1, -1, -1), torch.cat([several, one]))
    alone = augment(one, draw_shared("scale_rotate_crop", config.seed, 5, 7))
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[:1], alone)
    assert torch.equal(second[-1:], alone)
    assert not torch.equal(method.augmented(7, 6, one)[0], alone)


def test_metadd_sees_the_draws_by_which_a_method_augments() -> None:
    """MetaDD's augmentations of images are those of `augmented` for their classes; without augmentation there are none.

    A method that does not augment by `augmented` gives none either.
    """
    config = tiny_config("method=dm", "distill.augmentation=scale_rotate_crop")
    method = Method.__new__(Method)
    method.part = SimpleNamespace(config=config)  # type: ignore[assignment]
    images, labels = torch.rand(4, 1, 8, 8), np.array([7, 7, 2, 9])
    drawn = method.augmentations(np.array([1, 3, 4, 6]), labels, 5)
    for image, label, one in zip(images.split(1), labels.tolist(), drawn, strict=True):
        assert torch.equal(augment(image, one), method.augmented(label, 5, image)[0])
    method.augments = False
    assert method.augmentations(np.arange(4), labels, 5) == ()
    method.augments, method.part = True, SimpleNamespace(config=tiny_config("distill.augmentation=''"))  # type: ignore
    assert method.augmentations(np.arange(4), labels, 5) == ()


def test_options_may_be_texts_and_truths_and_numbers_stay_numbers() -> None:
    """Values keep their kind from YAML and the command line, and the identity of numbers is that of before."""
    given = ["distill.options.a=2", "distill.options.b=2.5", "distill.options.c=fast", "distill.options.d=true"]
    config = override(RunConfig(method="own:Method"), given)
    found = config.distill.options
    assert [(type(value), value) for value in found.values()] == [(int, 2), (float, 2.5), (str, "fast"), (bool, True)]
    assert load_config_text(to_yaml(config), "again") == config
    numbers = override(RunConfig(method="own:Method"), ["distill.options={real: 64}"])
    assert run_identity(numbers)["distill"]["options"] == {"real": 64}
    with pytest.raises(ConfigError):
        override(config, ["distill.options.a=.nan"])


WRONG = {
    "method=mtd": "method is 'mtd', which does not exist. Choose one of datm, mtt, dm, sre2l, select, given, or give",
    "method=no_package:Class": "method 'no_package:Class' cannot be imported: No module named 'no_package'",
    "method=my_methods:Absent": "method 'my_methods:Absent' cannot be imported",
    "method=my_methods:nothing": "method 'my_methods:nothing' is no subclass of datm_ray.Method",
    "method=a b": "method is 'a b', which does not exist. Choose one of datm, mtt",
    "method=:": "method ':' cannot be imported: Empty module name",
    "method=broken:Class": "method 'broken:Class' cannot be imported: division by zero",
    "method=dm distill.options.real=3": "distill.options has 'real', which method dm does not read. Leave it out",
    "method=my_methods:GradientMatching distill.options.real=many": "distill.options.real is 'many'. Give a number",
    "method=my_methods:GradientMatching distill.options.augment=1": "distill.options.augment is 1. Give true or false",
    "distill.options.real=3": "distill.options has 'real', which method datm does not read. Leave it out",
    "method=my_methods:GradientMatching backbones=[{network: lenet}]": "method my_methods:GradientMatching computes",
    "method=mtt distill.start_epochs=[2,9]": "distill.start_epochs begins at 2, and method mtt has a fixed range from",
    "method=mtt distill.start_epochs={bound: 3, final_bound: 9, expand_iterations: 5}": "distill.start_epochs grows "
    "from 3 to 9, and method mtt has a fixed range from epoch 0 on. Ranges by difficulty are what DATM adds. Use --set "
    "'distill.start_epochs=[0, 9]', or --set method=datm",
    "method=mtt network.norm=batch": "network.norm is 'batch', which cannot be matched",
    "method=dm evaluate.fair=true": "evaluate.fair compares with random images under the labels of experts",
    "method=dm network.norm=batch": "network.norm is 'batch', which cannot be matched",
}
"""Settings, divided by blanks before a key -> part of the one line that refuses them."""


@pytest.mark.usefixtures("own_methods")
def test_a_method_that_cannot_be_used_is_one_line(tmp_path: Path, datm_ray: CommandLine) -> None:
    """A method that cannot be used, or refuses the recipe, ends a run with one line before anything is written."""
    for settings, expected in WRONG.items():
        changes = [word for each in re.split(r" (?=[\w.]+=)", settings) for word in ("--set", each)]
        code, _, errors = datm_ray("run", "digits-ipc1", "--executor", "serial", "--out", "out", *changes)
        assert (code, errors.count("\n")) == (2, 1), f"{settings}: {errors}"
        assert expected in errors, settings
        assert not (tmp_path / "out").exists(), settings


def test_epochs_are_checked_for_methods_that_match_them() -> None:
    """Experts that lack an epoch are refused when a recipe is read, and only where trajectories are matched."""
    for matching in ("datm", "mtt"):
        with pytest.raises(ConfigError, match=r"needs epoch 12, but experts\.epochs is 3"):
            override(get_recipe("digits-ipc1"), [f"method={matching}", "experts.epochs=3"])
    override(get_recipe("digits-ipc1"), ["method=dm", "experts.epochs=3", "experts.keep_epochs=1"])
    own = RunConfig(method=METHODS["datm"]).model_copy(
        update={"experts": RunConfig().experts.model_copy(update={"epochs": 3})}
    )
    with pytest.raises(ConfigError, match=r"but experts\.epochs is 3"):
        method_of(own).check(own)


def test_experts_keep_what_their_method_may_read() -> None:
    """Without keep_epochs, experts of methods that read the last epoch keep it alone; the others keep more, as before.

    A given keep_epochs is followed by all, and no identity depends on it.
    """
    starts, whole = ["distill.start_epochs=[0,4]", "distill.expert_epochs=2"], (0, 1, 2, 3, 4, 5, 100)
    base = override(RunConfig(), [*starts, "experts.keep_epochs=null"])
    for method in (*METHODS, METHODS["datm"]):
        config = base.model_copy(update={"method": method})
        reads_last = set(method_of(config).epochs_read(config)) == {100}
        assert config.kept_epochs == ((100,) if method in ("dm", "sre2l", "given") else whole), method
        assert reads_last or config.kept_epochs == whole
        kept = config.model_copy(update={"experts": config.experts.model_copy(update={"keep_epochs": 5})})
        assert kept.kept_epochs == whole
        assert run_identity(kept) == run_identity(config)


def test_experts_that_two_methods_share_keep_the_epochs_of_both(tmp_path: Path) -> None:
    """In one command, experts of a method that reads the last epoch and of one that matches keep the matched ones."""
    meta = ("metadd={auxiliaries: [lenet], experts: {count: 1, epochs: 1}}", "experts.keep_epochs=null")
    dm, datm = tiny_config("name=last", "method=dm", *meta), tiny_config(*meta)
    for configs in ([dm, datm], [datm, dm]):
        shared, _ = expert_recipes(Pipeline(configs, str(tmp_path)).runs)
        assert shared.kept_epochs == datm.kept_epochs
    assert dm.kept_epochs == (datm.experts.epochs,)
    alone, _ = expert_recipes(Pipeline([dm], str(tmp_path)).runs)
    assert alone.kept_epochs == dm.kept_epochs


@pytest.mark.parametrize("name", [name for name in recipe_names() if "-dm-" in name])
def test_packaged_recipes_of_dm_are_planned(name: str) -> None:
    """Recipes of DM are planned: without experts or a store, with hours of distillation."""
    found = plan_run(get_recipe(name), "cpus=2,memory=24GiB,gflops=140")
    text = "\n".join(found.lines())
    assert "experts          none needed" in text
    assert "real images through a fresh network" in text
    assert found.stages["experts"] == (0.0, 0.0)
    assert found.stages["distillation"][0] > 0
    assert found.to_json()["storage_bytes"]["store"] == 0
    assert found.to_json()["distance"] is None


def descending(rate: float = 1.0) -> Descent:
    """State of two images."""
    synthetic = SyntheticSet(torch.ones(2, 1, 2, 2), torch.zeros(2, 2), torch.ones(1), torch.arange(2))
    return Descent(synthetic, DistillConfig(learning_rate_images=rate, labels="hard"))


def test_an_update_that_is_not_finite_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss, a gradient or an updated value that is not finite changes nothing; too many in a row are an error."""
    monkeypatch.setattr(state_module, "MOST_DIVERGED", 3)
    state, fine = descending(), torch.full((2, 1, 2, 2), 0.5)
    state.step(lambda: (torch.tensor(1.0), fine.clone()))
    assert float(state.synthetic.images.mean()) == 0.5
    for loss, gradient in ((float("nan"), fine), (1.0, fine * float("inf"))):
        state.step(lambda loss=loss, gradient=gradient: (torch.tensor(loss), gradient.clone()))
    assert [record.skipped for record in state.history] == [False, True, True]
    assert float(state.synthetic.images.mean()) == 0.5
    with pytest.raises(DivergenceError, match="diverged 3 times in a row up to iteration 4"):
        state.step(lambda: (torch.tensor(1.0), fine * 3e38 * 3e38))
    state.step(lambda: (torch.tensor(1.0), fine.clone()))
    assert float(state.synthetic.images.mean()) == pytest.approx(0.5 - 0.5 - 0.25)  # momentum 0.5


@pytest.mark.parametrize("method", [Method, TrajectoryMatching])
@pytest.mark.parametrize(("skipped", "was"), [(1, "1 of 2 updates was"), (3, "3 of 4 updates were")])
def test_every_method_warns_of_skipped_updates_in_the_same_words(method: type[Method], skipped: int, was: str) -> None:
    """A line after the last iteration counts the skipped updates, and names what to lower."""
    history = [None] * (skipped + 1)
    state = SimpleNamespace(skipped=skipped, diverged=skipped, shortened=0, history=history, iteration=skipped + 1,
                            rate_key="some.rate")  # fmt: skip
    part = SimpleNamespace(config=tiny_config())
    (line,) = method.warnings(SimpleNamespace(part=part), state)  # type: ignore[arg-type]
    assert line.startswith(f"{was} skipped because a value was not finite")
    assert ": lower " in line


def test_a_shard_that_diverges_has_all_skip() -> None:
    """If one shard's loss is not finite, the others change nothing either."""
    state = descending()
    others = torch.tensor([float("nan"), 1.0], dtype=torch.float64)
    state.step(lambda: (torch.tensor(1.0), torch.ones(2, 1, 2, 2)), all_sum=lambda mine: mine + others)
    assert state.history[0].skipped
    assert bool((state.synthetic.images == 1).all())
