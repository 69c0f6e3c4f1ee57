"""Tests method select from recipe to report: each choice against a plain one, in any order of pieces."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from datm_ray.artifact import load
from datm_ray.config import RunConfig
from datm_ray.core.networks.registry import embedding
from datm_ray.core.training.loop import predict_logits
from datm_ray.data.dataset import Dataset
from datm_ray.errors import DatmError
from datm_ray.methods.selection import crop_for_tile, draw_boxes, drawn_order, padded
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline, preview, report, summaries
from datm_ray.planning.plan import plan_run
from datm_ray.recipes import get_recipe
from datm_ray.runtime.executor import Event, Finished, Phase, SerialExecutor
from datm_ray.stages.distill.pieces import PIECES, PieceWorker, unfinished_pieces
from datm_ray.stages.distill.task import DistillWorker
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.methods import selection
from datm_ray.stages.methods.base import Method
from datm_ray.stages.methods.registry import METHODS, iterations_of
from datm_ray.stages.methods.selection import MOST_PIECES, Selection
from datm_ray.store.files.filesystem import open_location
from tests.conftest import run_here, set_of, tiny_config

SELECT = (
    "method=select",
    "experts.count=2",
    "experts.epochs=5",
    "experts.keep_epochs=4",
    "distill.ipc=3",
    "distill.initial_step_size=0.05",
    "select.pool=20",
    "select.crops=3",
    "evaluate.full=false",
    "evaluate.seeds=1",
)
"""Overrides that choose 30 images of digits in ten pieces."""
IPC = 3


def config_of(*settings: str) -> RunConfig:
    return tiny_config(*SELECT, *settings)


def distil(config: RunConfig, out: Path, store: Path) -> Pipeline:
    """Choose the set by experts that are in the store."""
    return run_here(out, config, stage="distill", store=store / "experts")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a finished run by rded."""
    out, config = tmp_path_factory.mktemp("select"), config_of()
    run_here(out, config)
    return out


class Plain:
    """Choice of one image after the other, with networks that see one image at a time."""

    def __init__(self, pipeline: Pipeline) -> None:
        (self.config,) = pipeline.configs
        self.dataset: Dataset = pipeline.runs.dataset(self.config.dataset)
        self.experts = ExpertNetworks(self.config, self.dataset, pipeline.store_uri, torch.device("cpu"))

    def rows(self, label: int) -> list[int]:
        of_class = np.flatnonzero(self.dataset.train_labels == label)
        return drawn_order(of_class, self.config.seed, label).tolist()

    def image(self, row: int) -> Tensor:
        return torch.from_numpy(self.dataset.train_images[row : row + 1])

    def network(self, expert: int, epoch: int | None = None) -> nn.Module:
        return self.experts.restored(expert, epoch).eval()

    def moderate(self, label: int) -> list[float]:
        network = self.network(0)
        features = [embedding(network, self.image(row))[0].double() for row in self.rows(label)]
        centre = torch.stack(features).numpy()
        distances = [float((each - torch.from_numpy(np.median(centre, axis=0))).norm()) for each in features]
        return [abs(distance - float(np.median(distances))) for distance in distances]

    def el2n(self, label: int) -> list[float]:
        found = []
        for row in self.rows(label):
            errors = []
            for expert in (0, 1):
                probabilities = self.network(expert, self.config.select.epoch)(self.image(row)).double().softmax(1)[0]
                probabilities[label] -= 1
                errors.append(float(probabilities.norm()))
            found.append(sum(errors) / 2)
        return found

    def forgetting(self, label: int) -> list[float]:
        found = [0.0] * len(self.rows(label))
        for expert in (0, 1):
            right = [
                [int(self.network(expert, epoch)(self.image(row)).argmax()) == label for row in self.rows(label)]
                for epoch in (1, 2, 3, 4, 5)
            ]
            for number, course in enumerate(zip(*right, strict=True)):
                lost = sum(now and not later for now, later in itertools.pairwise(course))
                found[number] += (lost if any(course) else 5) / 2
        return found


def lowest(scores: list[float], count: int, sign: float = 1.0) -> list[int]:
    """Positions of the lowest scores; rounding makes no difference to which are equal."""
    return sorted(range(len(scores)), key=lambda place: (sign * round(scores[place], 6), place))[:count]


SCORES: dict[str, tuple[Callable[[Plain, int], list[float]], float, tuple[str, ...]]] = {
    "moderate": (Plain.moderate, 1.0, ()),
    "el2n": (Plain.el2n, 1.0, ("select.epoch=2",)),
    "el2n, hardest": (Plain.el2n, -1.0, ("select.hardest=true",)),
    "forgetting": (Plain.forgetting, 1.0, ()),
    "forgetting, hardest": (Plain.forgetting, -1.0, ("select.hardest=true",)),
    "random": (lambda plain, label: [0.0] * len(plain.rows(label)), 1.0, ("select.hardest=true",)),
}


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=(pytest.mark.slow, pytest.mark.exhaustive) if name == "forgetting, hardest" else ())
        for name in SCORES
    ],
)
def test_whole_images_are_those_of_a_plain_choice(name: str, finished: Path, tmp_path: Path) -> None:
    """Scores in batches, over several classes, keep the images that scoring them one by one keeps."""
    score, sign, settings = SCORES[name]
    pipeline = distil(config_of(f"select.by={name.split(',')[0]}", *settings), tmp_path, finished)
    plain, artifact = Plain(pipeline), set_of(tmp_path)
    assert artifact.labels.tolist() == [label for label in range(10) for _ in range(IPC)]
    for label in (0, 7):
        rows = plain.rows(label)
        expected = [rows[place] for place in lowest(score(plain, label), IPC, sign)]
        images = artifact.images[label * IPC : (label + 1) * IPC]
        assert torch.equal(images, torch.from_numpy(plain.dataset.train_images[expected])), label


@torch.no_grad()
@pytest.mark.parametrize("tiles", [1, 2])
def test_crops_are_those_of_a_plain_choice(tiles: int, finished: Path, tmp_path: Path) -> None:
    """Rded keeps the crops that cropping and scoring one after the other keeps, at most one of an image."""
    plain, artifact = Plain(distil(config_of(f"select.tiles={tiles}"), tmp_path, finished)), set_of(tmp_path)
    network, wanted = plain.network(0), IPC * tiles**2
    for label in (0, 7):
        boxes, best = draw_boxes(20, 3, 0.08, plain.config.seed, label), []
        for number, row in enumerate(plain.rows(label)[:20]):
            crops = [crop_for_tile(plain.image(row), box[None], tiles) for box in boxes[number]]
            losses = [float(cross_entropy(network(padded(crop, 8, 8)), torch.tensor([label]))) for crop in crops]
            best.append((min(losses), crops[losses.index(min(losses))][0]))
        kept = [crop for _, crop in sorted(best, key=lambda each: each[0])[:wanted]]
        for number in range(IPC):
            quarters = [kept[place * IPC + number] for place in range(tiles**2)]
            rows = [torch.cat(quarters[k : k + tiles], dim=2) for k in range(0, tiles**2, tiles)]
            torch.testing.assert_close(artifact.images[label * IPC + number], torch.cat(rows, dim=1))


def test_a_run_leaves_a_labelled_set_and_a_report_without_iterations(finished: Path) -> None:
    """The set has the teacher's labels and the recipe's step size; page and table need no course."""
    pipeline, artifact = Pipeline([config_of()], str(finished)), set_of(finished)
    assert preview.remaining_lines(pipeline.runs) == [
        "0 experts to train",
        "0 sets to distil",
        "0 networks to train for evaluation",
    ]
    logits = predict_logits(Plain(pipeline).experts.restored(0), artifact.images)
    torch.testing.assert_close(artifact.soft_labels, logits, rtol=1e-5, atol=1e-5)
    assert artifact.step_sizes == pytest.approx([0.05])
    assert artifact.stated_has_step_size is False
    assert not (finished / "tiny" / PIECES).exists()
    (summary,) = summaries(pipeline.out, pipeline.configs)
    assert {score.row for score in summary.scores} == {"random-hard", "random-soft", "distilled"}
    page = report(str(finished)).read_bytes().decode()
    assert "by choice, without iterations" in page
    assert "The images are chosen; the method has no iterations." in page
    assert "Chosen images" in page
    assert "Before: real images" not in page
    assert "Step size" not in page
    assert "course of the distillation" not in page


def test_pieces_in_any_order_and_of_any_size_have_the_same_bits(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of several classes, made backwards and each after a start that broke off, give the same set."""
    monkeypatch.setattr(selection, "MOST_PIECES", 4)
    pipeline = Pipeline([config_of("distill.labels=hard")], str(tmp_path), str(finished / "experts"))
    (config,) = pipeline.configs
    worker, folder = PieceWorker(pipeline.runs.dataset(config.dataset), config.cluster), tmp_path / "tiny"
    left = unfinished_pieces(config, open_location(str(folder)), 10)
    assert [len(piece.classes) for piece in left] == [3, 3, 2, 2]
    for piece in reversed(left):
        arguments = (config, pipeline.store_uri, str(folder), piece.number)
        broken: Iterator[Event] = worker.make_piece(*arguments)
        assert [next(broken), next(broken)] == [Phase("preparing the networks"), Phase("choosing the first images")]
        del broken
        assert isinstance(list(worker.make_piece(*arguments))[-1], Finished)
    list(worker.join_pieces(config, pipeline.store_uri, str(folder)))
    assert torch.equal(set_of(tmp_path).images, set_of(finished).images)
    assert sorted(set(set_of(tmp_path).soft_labels.flatten().tolist())) == [0.0, 20.0]


def test_any_network_is_a_teacher(tmp_path: Path) -> None:
    """A network with batch normalisation chooses a set as one without."""
    settings = ("network={architecture: resnet18, width: 4, norm: batch}", "experts.count=1", "select.by=moderate")
    config = config_of(*settings)
    pipeline = Pipeline([config], str(tmp_path))
    start = lambda: SerialExecutor(config.cluster)  # noqa: E731
    pipeline.train_experts(start, Reporter(quiet=True))
    pipeline.distill(start, Reporter(quiet=True))
    images = pipeline.runs.dataset(config.dataset).train_images
    assert all((images == each).all(axis=(1, 2, 3)).any() for each in set_of(tmp_path).images.numpy())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("select.pool=5", "select.tiles=2"), r"select\.pool is 5, and 12 crops of each class are wanted.*pool=12"),
        (("select.by=el2n", "experts.epochs=9", "select.epoch=7"), r"epoch is 7, and experts store epochs 0-4, 9\."),
        (("select.by=forgetting", "experts.keep_epochs=1"), r"experts store epochs 1, 5 of their training"),
        (("metadd={auxiliaries: [lenet]}",), "method select leaves them as they are"),
        (("cluster.shards=2",), "Method select makes a set in pieces"),
        (("select.tiles=2", "distill.ipc=60", "select.pool=300"), r"needs 240 training images of each class"),
        (("select.tiles=2", "dataset.resize=9"), "images of 9x9 do not divide into 2 tiles"),
        (("select.tiles=3",), r"select\.tiles is 3"),
        (("select.by=best",), r"select\.by is 'best'"),
    ],
)
def test_recipes_that_cannot_be_chosen_are_refused(settings: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """Each impossible setting is one line before anything starts, with what to do."""
    with pytest.raises(DatmError, match=message) as refused:
        Pipeline([config_of(*settings)], str(tmp_path)).run_all(lambda: pytest.fail("started"), Reporter(quiet=True))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_parts_are_as_many_as_classes_up_to_a_limit() -> None:
    """The classes are divided evenly, each once, and the parts do not depend on workers."""
    for classes in (2, 10, 200, 1000):
        pieces = Selection.pieces(config_of("cluster.workers=3"), classes)
        assert len(pieces) == min(classes, MOST_PIECES)
        assert [label for piece in pieces for label in piece.classes] == list(range(classes))
        sizes = {len(piece.classes) for piece in pieces}
        assert max(sizes) - min(sizes) <= 1


def test_the_packaged_recipe_is_planned() -> None:
    """A plan has hours for choosing, which two workers halve, none for validation, and says what is chosen."""
    one, two = (plan_run(get_recipe("digits-select-ipc10"), f"cpus={n},gflops=50") for n in (1, 2))
    assert "100 images chosen by rded: 5 crops of up to 300 images of a class" in str(one)
    assert one.stages["distillation"][0] == pytest.approx(two.stages["distillation"][0])
    assert two.stages["distillation"][1] == pytest.approx(one.stages["distillation"][1] / 2)
    assert one.stages["distillation"][0] > 0
    assert one.stages["validation"] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "passes", "read"),
    [
        (("select.by=random", "distill.labels=hard"), 0, 30),
        (("select.by=random",), 60, 30),
        (("select.by=rded",), 660, 230),
        (("select.by=moderate",), 1060, 1030),
        (("select.by=el2n",), 2060, 2030),
        (("select.by=forgetting",), 10060, 10030),
    ],
)
def test_planned_work_counts_every_image_that_networks_score(settings: tuple[str, ...], passes: int, read: int) -> None:
    """Image passes are those of crops, networks and epochs, and two for the labels of each chosen image.

    Images are read once for all their crops, and chosen ones once more.
    """
    assert Selection.choosing(config_of(*settings), 10, 1000) == {"scoring": passes, "reading": read}


def test_memory_does_not_grow_with_the_images_that_are_scored() -> None:
    """A worker scores batches of fixed size, so its memory is that of one batch and its part of the set."""
    few, many = (
        plan_run(config_of(f"select.pool={pool}"), "cpus=2,gflops=50", f"1x8x8,10,{images}").plans[0]
        for pool, images in ((20, 500), (300, 500_000))
    )
    assert few.parts == many.parts


class FirstSet(Method):
    """Method whose first set is the result, made by workers together."""

    @classmethod
    def iterations(cls, config: RunConfig) -> int:
        return 0


def test_a_method_without_iterations_needs_no_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's method without iterations leaves its first set, whatever the recipe says of iterations."""
    monkeypatch.setitem(METHODS, "first", f"{__name__}:FirstSet")
    monkeypatch.setattr(DistillWorker, "method", FirstSet)
    monkeypatch.setattr("datm_ray.stages.methods.registry.method_of", lambda config: FirstSet)
    config = tiny_config("method=first", "distill.learning_rate_images=null", "distill.initial=random")
    pipeline = distil(config, tmp_path, tmp_path)
    assert iterations_of(config) == 0
    first, last = (load(str(tmp_path / "tiny" / name)) for name in ("initial.arrow", "synthetic.arrow"))
    assert torch.equal(first.images, last.images)
    assert preview.remaining_lines(pipeline.runs)[1] == "0 sets to distil"
