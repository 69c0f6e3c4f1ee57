"""Tests method given: sets of other programs and runs in every layout, from recipe to report."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from datm_ray import publish
from datm_ray.artifact import Artifact, load, without_transform
from datm_ray.config import RunConfig, run_identity
from datm_ray.core.synthetic import hard_logits
from datm_ray.errors import DatmError, StoreError
from datm_ray.interop.exports import EXPORTS, class_folders, export
from datm_ray.interop.sets import read_set
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline, preview, report
from datm_ray.planning.plan import plan_run
from datm_ray.recipes import get_recipe
from datm_ray.runtime.executor import SerialExecutor
from datm_ray.shape import network_cost
from datm_ray.stages.methods.registry import method_of, trained_networks
from datm_ray.store.files.filesystem import open_location
from tests.conftest import run_here, set_of, tiny_config

DM = ("method=dm", "distill.ipc=2", "distill.iterations=2", "distill.learning_rate_images=5", "distill.real_batch=16")
SCORED = ("evaluate.seeds=1", "evaluate.full=false")
DIGITS = tuple(map(str, range(10)))
PAGE = Path(__file__).parents[1] / "docs/methods/given.md"


def given(path: Path, *settings: str) -> RunConfig:
    return tiny_config("method=given", "distill.ipc=2", f"given.path={path}", *SCORED, *settings)


def scores(out: Path) -> dict[str, tuple[float, float]]:
    """Row of the finished run -> accuracy of its network, and the network's step size."""
    files = [*out.glob("tiny/evaluation/**/*.json"), *out.glob("controls/**/*.json")]
    found = [json.loads(file.read_text()) for file in files]
    return {each["row"]: (each["test_accuracy"], each["step_size"]) for each in found}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run of DM and its set in every export: runs, pt, png, arrow, safetensors."""
    out = tmp_path_factory.mktemp("made")
    run_here(out / "runs", tiny_config(*DM, *SCORED, "distill.initial_step_size=0.02"))
    for kind in ("pt", "png", "arrow", "safetensors"):
        export(load(str(out / "runs/tiny/synthetic.arrow")), kind, open_location(str(out / kind)))
    return out


def source(made: Path) -> Artifact:
    return load(str(made / "runs/tiny/synthetic.arrow"))


@pytest.mark.parametrize(
    "place", ["pt", "pt/images_best.pt", "arrow", "safetensors/synthetic.safetensors", "runs/tiny/synthetic.arrow"]
)
def test_a_given_set_is_scored_like_the_run_that_made_it(made: Path, tmp_path: Path, place: str) -> None:
    """Images, labels, step size and accuracies are those of the run that made the set, with the same controls."""
    run_here(tmp_path, given(made / place))
    ours, theirs = set_of(tmp_path), source(made)
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.soft_labels, theirs.soft_labels)
    assert ours.step_size == theirs.step_size == pytest.approx(0.02)
    assert scores(tmp_path) == scores(made / "runs")
    assert scores(tmp_path).keys() == {"random-hard", "distilled"}


def test_a_folder_of_images_has_hard_labels_and_a_chosen_step_size(made: Path, tmp_path: Path) -> None:
    """Image files are normalised by the run's transform; one of the candidate step sizes trains on them."""
    run_here(tmp_path, given(made / "png"))
    theirs, ours = source(made), set_of(tmp_path)
    expected = theirs.transform.apply(theirs.pixels().transpose(0, 3, 1, 2).astype(np.float32) / 255)
    assert np.array_equal(ours.images.numpy(), expected)
    assert torch.equal(ours.soft_labels, hard_logits(theirs.labels, 10))
    assert scores(tmp_path)["distilled"][1] in (0.01, 0.03, 0.1)
    assert "found" not in ours.provenance


def test_a_teacher_labels_a_given_set_where_the_recipe_asks_for_one(made: Path, tmp_path: Path) -> None:
    """With `evaluate.labels: teacher`, as SRe2L's and RDED's sets are scored, the run trains one network before."""
    teacher = ("evaluate.labels=teacher", "experts.count=1", "experts.epochs=2")
    pipeline = run_here(tmp_path, given(made / "png", *teacher))
    assert preview.remaining_lines(pipeline.runs)[0] == "0 experts to train"
    assert scores(tmp_path).keys() == {"random-hard", "random-soft", "distilled"}
    assert scores(tmp_path)["distilled"][1] in (0.01, 0.03, 0.1)
    assert torch.equal(set_of(tmp_path).labels, source(made).labels)
    own = given(made / "png", "evaluate.labels=teacher", "evaluate.teacher={network: lenet}")
    assert [each.network.architecture for each in trained_networks(own)] == ["lenet"]


def test_a_set_of_a_run_with_another_transform_is_brought_into_this_ones(made: Path, tmp_path: Path) -> None:
    """Pixels stay the same if the run normalises otherwise than the run of the set."""
    run_here(tmp_path, given(made / "arrow", "dataset.normalisation=zca", "dataset.validation=0.3"))
    ours = set_of(tmp_path)
    assert ours.transform.kind == "zca" != source(made).transform.kind
    assert np.abs(ours.pixels().astype(int) - source(made).pixels()).max() <= 1


def test_a_set_without_its_transform_is_scored_in_the_runs(made: Path, tmp_path: Path) -> None:
    """Images keep their bits; a line says so if the run's transform was fitted on other images than the set's."""
    settings = ("dataset.normalisation=zca", "evaluate.seeds=1")
    run_here(tmp_path / "whole", given(made / "arrow", *settings))
    small = tmp_path / "small.safetensors"
    with mock.patch("datm_ray.artifact.INLINE_BYTES", 64):
        set_ = without_transform(load(str(tmp_path / "whole/tiny/synthetic.arrow")))
    small.write_bytes(EXPORTS["safetensors"](set_)["synthetic.safetensors"])
    for name, validation, warned in (("same", (), False), ("other", ("dataset.validation=0.3",), True)):
        config = given(small, *settings, *validation)
        pipeline, messages = Pipeline([config], str(tmp_path / name)), list[str]()
        reporter = Reporter(quiet=True)
        with mock.patch.object(reporter, "show", messages.append):
            pipeline.run_all(partial(SerialExecutor, config.cluster), reporter)
        assert torch.equal(load(str(tmp_path / name / "tiny/synthetic.arrow")).images, set_.images)
        assert any("fitted on other images than this run's" in line for line in messages) == warned, messages


def test_other_architectures_report_and_plan_take_a_given_set(made: Path, tmp_path: Path) -> None:
    """The set is scored on a second network, has a page, a plan without experts, and a card that names no path."""
    config = given(made / "pt", "evaluate.networks=[lenet]", "name=theirs")
    pipeline = run_here(tmp_path / "runs", config)
    assert preview.remaining_lines(pipeline.runs)[0] == "0 experts to train"
    page = report(str(tmp_path / "runs")).read_bytes().decode()
    assert "20 synthetic images" in page
    assert "made elsewhere, stand for" in page
    assert "lenet" in pipeline.table()
    publish(str(tmp_path / "runs/theirs"), str(tmp_path / "card"))
    card = (tmp_path / "card/README.md").read_text()
    assert "method is given" in card
    assert str(made) not in card
    text = "\n".join(plan_run(given(tmp_path, "distill.ipc=1"), "cpus=2").lines())
    assert "10 images of a finished set, without iterations" in text


def written(folder: Path, **tensors: torch.Tensor | list[int]) -> Path:
    folder.mkdir()
    for name, tensor in tensors.items():
        torch.save(tensor, folder / f"{name}.pt")
    return folder


def noise(count: int = 20) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_labels_may_be_classes_probabilities_or_logits(tmp_path: Path) -> None:
    """Integer labels are classes; probabilities become logits; logits stay; images are sorted by class."""
    shuffled = torch.arange(20) % 10
    found = read_set(str(written(tmp_path / "mtt", images_best=noise(), labels_best=shuffled)), DIGITS)
    assert found.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert found.soft_labels is None
    assert found.step_size is None
    assert np.array_equal(found.images[1], noise()[10].numpy())
    logits = hard_logits(torch.arange(10).repeat_interleave(2), 10) / 8
    logits[3] = logits[3].roll(1)  # learned labels may be highest at another class
    for folder, labels in (("logits", logits), ("probabilities", logits.softmax(1))):
        tensors = {"images_9": noise().requires_grad_(), "labels_9": labels, "lr_9": torch.tensor([0.5])}
        found = read_set(str(written(tmp_path / folder, **tensors) / "images_9.pt"), DIGITS)
        assert found.labels.tolist() == [label for label in range(10) for _ in range(2)]
        assert found.step_size == 0.5
        assert found.soft_labels is not None
        both = torch.from_numpy(found.soft_labels).softmax(1), logits.softmax(1)
        assert torch.allclose(*both, atol=1e-6)


@pytest.mark.parametrize("k", [2, 3, 10])
def test_soft_labels_in_any_order_keep_their_classes(tmp_path: Path, k: int) -> None:
    """Few classes agree with the order class after class by chance; learned labels in this order may be wrong."""
    ordered = torch.arange(k).repeat_interleave(6)
    names = DIGITS[:k]
    shuffled = (ordered[torch.randperm(6 * k, generator=torch.Generator().manual_seed(seed))] for seed in range(20))
    for number, labels in enumerate([torch.arange(6 * k) % k, ordered.flip(0), *shuffled]):
        tensors = {"images_best": noise(6 * k), "labels_best": hard_logits(labels, k)}
        found = read_set(str(written(tmp_path / str(number), **tensors)), names)
        assert found.soft_labels is not None
        assert found.labels.tolist() == found.soft_labels.argmax(1).tolist() == ordered.tolist()
    learned = hard_logits(ordered, k)
    learned[2] = learned[2].roll(1)
    found = read_set(str(written(tmp_path / "learned", images_best=noise(6 * k), labels_best=learned)), names)
    assert found.labels.tolist() == ordered.tolist()
    assert np.array_equal(found.images, noise(6 * k).numpy())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.float16, torch.bool])
def test_labels_may_be_of_any_type(tmp_path: Path, dtype: torch.dtype) -> None:
    """Classes may be whole numbers of any type, and soft labels 0 and 1 in integers or Booleans."""
    classes, names = torch.arange(20) % 10, DIGITS
    one_hot = torch.nn.functional.one_hot(classes, 10)
    if dtype != torch.bool:
        found = read_set(str(written(tmp_path / "1", images_best=noise(), labels_best=classes.to(dtype))), names)
        assert found.labels.tolist() == sorted(classes.tolist())
    found = read_set(str(written(tmp_path / "2", images_best=noise(), labels_best=one_hot.to(dtype))), names)
    assert found.labels.tolist() == sorted(classes.tolist())
    assert found.soft_labels is not None
    assert found.soft_labels.max() == 0


FAULTS = {
    "size": ({"images_best": torch.randn(20, 3, 8, 8)}, "are 3x8x8, and those of the data set 1x8x8"),
    "classes": ({"labels_best": torch.zeros(20, 100) - 1}, "are for 100 classes, and the data set has 10"),
    "class": ({"labels_best": torch.arange(20)}, "images of class 19, and the data set has 10 classes"),
    "ipc": ({"images_best": noise(30), "labels_best": torch.arange(30) % 10}, "Use --set distill.ipc=3"),
    "uneven": ({"labels_best": torch.arange(20).clamp(max=9)}, "has 1 images of class '0' and 11 of '9'"),
    "pixels": ({"images_best": noise().abs()}, "which do not look normalised"),
    "not finite": ({"images_best": noise() * float("inf")}, "not finite"),
    "lengths": ({"labels_best": torch.arange(10)}, "are no set"),
    "negative": ({"labels_best": torch.arange(20) % 10 - 1}, "has the class -1"),
    "no whole number": ({"labels_best": torch.arange(20) % 10 + 0.7}, "has the class 0.7"),
    "huge": ({"labels_best": torch.full((20,), 2**40)}, "images of class 1099511627776, and the data set has 10"),
    "dimensions": ({"labels_best": torch.rand(20, 10, 2)}, "are no set: [20, 1, 8, 8] and [20, 10, 2]"),
    "several": ({"labels_best": [1, 2]}, "It holds several values"),
    "step size": ({"lr_best": torch.tensor(-1.0)}, "is not a step size"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_set_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, fault: str) -> None:
    """Shapes, classes, numbers of images and values are checked before anything is written."""
    changes, message = FAULTS[fault]
    tensors = {"images_best": noise(), "labels_best": torch.arange(20) % 10} | changes
    config = given(written(tmp_path / "set", **tensors))
    with pytest.raises(DatmError, match=re.escape(message)) as raised:
        Pipeline([config], str(tmp_path / "runs"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "runs").exists()


def test_a_path_without_a_set_is_refused(tmp_path: Path, made: Path) -> None:
    """A missing path, an empty folder, other tensors, unknown class folders and sets of other classes are named."""
    with pytest.raises(DatmError, match="does not exist"):
        read_set(str(tmp_path / "absent"), DIGITS)
    with pytest.raises(DatmError, match="holds no set"):
        read_set(str(tmp_path), DIGITS)
    with pytest.raises(DatmError, match=r"such as .*/images_3\.pt"):
        read_set(str(written(tmp_path / "steps", images_3=noise())), DIGITS)
    (tmp_path / "bad.pt").write_bytes(b"no")
    with pytest.raises(DatmError, match="holds no images"):
        read_set(str(tmp_path / "bad.pt"), DIGITS)
    (tmp_path / "images.pt").write_bytes(b"no")
    with pytest.raises(DatmError, match="is not a tensor"):
        read_set(str(tmp_path / "images.pt"), DIGITS)
    (tmp_path / "images.pt").unlink()
    (tmp_path / "bad.pt").unlink()
    with pytest.raises(DatmError, match=r"folder '0' in .* is no class"):
        read_set(str(made / "png"), ("cat", "dog"))
    with pytest.raises(DatmError, match="the class '0' in the place of 'cat'"):
        read_set(str(made / "arrow"), ("cat", *DIGITS[1:]))
    with pytest.raises(DatmError, match=r"given\.path is missing"):
        method_of(tiny_config("method=given")).check(tiny_config("method=given"))


def test_errors_about_a_given_set_name_no_setting_of_the_data_set(tmp_path: Path) -> None:
    """Files of other kinds and images of unequal size are refused in words about the set."""
    for name in ("set.npz", "set.pth", "set.parquet"):
        torch.save(noise(), tmp_path / name)
        with pytest.raises(DatmError, match=r"given\.path .* is a file of no known kind") as raised:
            read_set(str(tmp_path / name), DIGITS)
        assert "dataset." not in str(raised.value)
    (tmp_path / "set.zip").write_bytes(b"PK\x03\x04")
    for height, name in enumerate(("cat", "dog"), 8):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((height, 8), np.uint8)).save(tmp_path / "images" / name / "x.png")
    for place, words in (("set.zip", r"given\.path .* is a zip archive"), ("images", "the images differ in size")):
        with pytest.raises(DatmError, match=words) as raised:
            read_set(str(tmp_path / place), ("cat", "dog"))
        assert "dataset." not in str(raised.value)


def test_class_folders_may_have_numbers(tmp_path: Path) -> None:
    """Folders named as SRe2L (new000) and RDED (00000) name them count classes from 0; names of classes come first."""
    for folder, value in (("new001", 9), ("new000", 5)):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / folder / f"class_{folder}.png")
    found = read_set(str(tmp_path), ("cat", "dog"))
    assert (found.labels.tolist(), found.images[:, 0, 0, 0].tolist()) == ([0, 1], [5, 9])
    found = read_set(str(tmp_path), ("new001", "new000"))
    assert found.images[:, 0, 0, 0].tolist() == [9, 5]
    assert class_folders(("a/b", "c")) == ["a_b", "c"]


def test_identity_has_the_content_and_not_the_path(made: Path, tmp_path: Path) -> None:
    """A set that was moved is the same run; other content is another one; other methods' identities lack the key."""
    moved = shutil.copytree(made / "pt", tmp_path / "moved")
    first, second = (Pipeline([given(place)], str(tmp_path / "runs")).configs[0] for place in (made / "pt", moved))
    assert run_identity(first) == run_identity(second)
    assert "path" not in run_identity(first)["given"]
    torch.save(load(str(made / "arrow/synthetic.arrow")).images + 0.1, moved / "images_best.pt")
    other = Pipeline([given(moved)], str(tmp_path / "runs")).configs[0]
    assert run_identity(first) != run_identity(other)
    pinned = given(moved, f"given.digest={first.given.digest if first.given else ''}")
    with pytest.raises(DatmError, match=r"the content of .* has the digest"):
        Pipeline([pinned], str(tmp_path / "runs"))
    for method in ("datm", "my:Own"):
        assert "given" not in run_identity(get_recipe("digits-ipc1").model_copy(update={"method": method}))


def test_a_finished_run_does_not_need_the_files(made: Path, tmp_path: Path) -> None:
    """The recipe of a finished run states the digest, so that it is scored again after the files are gone."""
    files = shutil.copytree(made / "pt", tmp_path / "files")
    run_here(tmp_path / "runs", given(files))
    shutil.rmtree(files)
    saved = get_recipe(str(tmp_path / "runs/tiny/recipe.yaml"))
    assert preview.remaining_lines(Pipeline([saved], str(tmp_path / "runs")).runs)[1] == "0 sets to distil"


def test_a_recipe_that_states_the_digest_is_the_same_run_every_time(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The set's own step size and absolute path are filled in before and after the run, and without the files too."""
    files = shutil.copytree(made / "pt", tmp_path / "files")
    monkeypatch.chdir(tmp_path)
    digest = Pipeline([given(files)], "runs").configs[0].given
    assert digest is not None
    user = given(Path("files"), f"given.digest={digest.digest}")
    first = run_here(Path("runs"), user).configs[0]
    for name in ("files", "elsewhere"):
        again = Pipeline([user], "runs")
        assert run_identity(again.configs[0]) == run_identity(first)
        assert preview.remaining_lines(again.runs)[1:] == ["0 sets to distil", "0 networks to train for evaluation"]
        assert again.configs[0].given == first.given
        if name == "files":
            files.rename(tmp_path / "elsewhere")
    for setting, message in (
        ("step_size=0.5", "differs in given.step_size"),
        ("digest=0123456789abcdef", "the digest"),
    ):
        with pytest.raises(DatmError, match=message):
            Pipeline([given(Path("elsewhere"), f"given.digest={digest.digest}", f"given.{setting}")], "runs")


def test_a_plan_counts_the_networks_that_a_given_set_needs(made: Path) -> None:
    """A set that brings its step size needs one network for each seed, and one without it three, as the run counts."""
    for place, candidates in (("pt", 1), ("arrow", 1), ("png", 3)):
        plan = plan_run(given(made / place), "cpus=2,gflops=100")
        flop, tasks = network_cost(plan.config, plan.shape).flop, plan.tasks["evaluation"]
        passes = [sum(part.operations for part in task if part.kind == "training") / flop for task in tasks]
        assert sorted(passes) == pytest.approx([4 * 20 * candidates, 4 * 20 * 3])


def test_load_says_what_to_do_with_files_of_other_programs(made: Path) -> None:
    """`load` of DATM's files, or of their folder, names the method that reads them."""
    for place in (made / "pt/images_best.pt", made / "pt"):
        with pytest.raises(StoreError, match="method: given"):
            load(str(place))


def test_the_recipe_of_the_page_runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe that the page shows scores the set in the folder that it names."""
    text = re.findall(r"^```yaml\n(name: .*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "pt", tmp_path / "downloads/theirs")
    quick = "evaluate: {protocol: quick, seeds: 1, full: false}\n"
    (tmp_path / "theirs.yaml").write_text(text.replace("ipc: 10", "ipc: 2") + quick)
    run_here(tmp_path / "runs", get_recipe("theirs.yaml"))
    assert torch.equal(load("runs/theirs/synthetic.arrow").images, source(made).images)
    assert (tmp_path / "runs/theirs/evaluation/distilled-00.json").exists()
