"""Tests scoring: choices on validation data, reported rows, and results that runs share."""

from __future__ import annotations

import dataclasses
import os
import signal
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from datm_ray.artifact import SCORING, save_artifact
from datm_ray.config import NetworkConfig, RunConfig, override, run_identity, scored_on
from datm_ray.core import steps
from datm_ray.core.networks import stack_trial
from datm_ray.core.networks.parameters import flatten
from datm_ray.core.steps import Steps, finished
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.core.training import loop
from datm_ray.core.training.experts import ExpertState
from datm_ray.core.training.loop import OPTIMISERS, Optimiser, Schedule, Trainer, Training, TrainingState
from datm_ray.core.training.teacher import Lessons
from datm_ray.monitor.spent import Account, Spent
from datm_ray.pipeline import Pipeline
from datm_ray.planning.work import Row
from datm_ray.recipes import get_recipe
from datm_ray.report.page import write_report
from datm_ray.report.results import RunSummary, column_name, fair_table, networks_table, write_summary
from datm_ray.runtime import stopping
from datm_ray.runtime.executor import Finished, Progress, SerialExecutor, Task
from datm_ray.runtime.machine.devices import images_on
from datm_ray.runtime.stopping import Interrupted
from datm_ray.shape import KNOWN_SHAPES
from datm_ray.stages.distill.task import SYNTHETIC
from datm_ray.stages.evaluate import progress
from datm_ray.stages.evaluate.progress import remove_progress
from datm_ray.stages.evaluate.rows import (
    ALL_ROWS,
    FAIR_ROWS,
    FIXED_ROWS,
    ON_OTHERS,
    ROWS,
    SOFT,
    EvaluateWorker,
    has_learned_step_size,
    networks_alike,
    result_location,
    row_schedule,
    scored_rows,
    training_of,
)
from datm_ray.stages.evaluate.scores import (
    FAIR_PARTS,
    NetworkScores,
    note_scoring,
    read_fair_rows,
    read_fair_scores,
    read_network_scores,
)
from datm_ray.stages.experts import progress as expert_progress
from datm_ray.stages.experts.progress import TrainingProgress
from datm_ray.store.files.filesystem import Location, open_location
from tests.conftest import run_here, stacks_of_any_work, tiny_config
from tests.processes import side_by_side
from tests.tapes import Tape

LEARNED = 0.5
VALIDATION = {LEARNED: 0.6, 0.01: 0.2, 0.03: 0.9, 0.1: 0.3}
TEST = {LEARNED: 0.7, 0.01: 0.99, 0.03: 0.4, 0.1: 0.98}
WITH_ADAMW = {3e-4: 0.1, 1e-3: 0.8, 3e-3: 0.95}
"""Accuracy by step size; the test set's best is not the validation set's."""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluateWorker:
    """An evaluation worker whose trainings end with the accuracies above."""
    config = tiny_config()
    dataset = Pipeline([config], str(tmp_path)).runs.dataset(config.dataset)
    worker = EvaluateWorker(dataset, config.cluster)
    validated: list[float] = []

    class Untrained(Trainer):
        def train_steps(self, stack: Sequence[Training], *_: Any) -> Iterator[TrainingState | None]:
            (schedule,) = (each.schedule for each in stack)
            accuracies = VALIDATION if schedule.optimiser == "sgd" else WITH_ADAMW
            validated.append(accuracies[schedule.learning_rate])
            return iter(())

    monkeypatch.setattr("datm_ray.stages.evaluate.rows.trainer_of", lambda *_: Untrained(compile_=False))
    monkeypatch.setattr(worker, "_validation_accuracy", lambda _: finished(validated[-1]))
    tested = {**TEST, **WITH_ADAMW}
    monkeypatch.setattr(worker, "_test_accuracy", lambda trial: finished(tested[trial.training.schedule.learning_rate]))
    images = torch.zeros(1, 1, 8, 8)
    monkeypatch.setattr(worker, "_training_sets", lambda *_: finished([(images, images, LEARNED)]))
    return worker


def result_of(worker: EvaluateWorker, tmp_path: Path, network: NetworkConfig | None, *changes: str) -> dict[str, Any]:
    """Result of the distilled set."""
    place = str(tmp_path / "result.json")
    events = list(worker.evaluate(tiny_config(*changes), "", str(tmp_path), [place], "distilled", [0], network))
    assert isinstance(events[-1], Finished)
    assert [open_location(place).read_json()] == events[-1].result
    return dict(events[-1].result[0])


def test_the_backbone_has_the_step_size_that_was_learned(worker: EvaluateWorker, tmp_path: Path) -> None:
    """The backbone is trained at the learned step size, whatever others would reach."""
    result = result_of(worker, tmp_path, None)
    assert (result["step_size"], result["test_accuracy"]) == (LEARNED, TEST[LEARNED])


def test_other_architectures_have_both_and_choose_on_validation_data(worker: EvaluateWorker, tmp_path: Path) -> None:
    """Other architectures report the learned step size and the one best on validation data, not on test data."""
    assert set(VALIDATION) == {LEARNED, *OPTIMISERS["sgd"].step_sizes}
    result = result_of(worker, tmp_path, NetworkConfig(architecture="lenet"))
    assert (result["step_size"], result["test_accuracy"], result["validation_accuracy"]) == (0.03, TEST[0.03], 0.9)
    assert (result["learned_step_size"], result["test_accuracy_with_learned_step_size"]) == (LEARNED, TEST[LEARNED])


@pytest.mark.parametrize(
    ("optimiser", "given", "tried", "chosen"),
    [("sgd", LEARNED, 4, 0.03), ("sgd", 0.1, 3, 0.03), ("adamw", 1e-3, 3, 3e-3)],
)
def test_a_given_rate_is_that_of_the_backbone_and_one_of_several_of_other_architectures(
    worker: EvaluateWorker, tmp_path: Path, optimiser: str, given: float, tried: int, chosen: float
) -> None:
    """Other architectures try the given rate and the usual ones, each once, with results apart from earlier ones."""
    changes = (f"evaluate.optimiser={optimiser}", f"evaluate.learning_rate={given}", "evaluate.labels=teacher")
    config, other = tiny_config(*changes), NetworkConfig(architecture="lenet")
    for row in ON_OTHERS:
        networks = (None, config.network, other)
        assert [training_of(config, row, network)[0] for network in networks] == [1, 1, tried]
        assert Path(place(config, row)).parent not in Path(place(config, row, other)).parents
    (tmp_path / "backbone").mkdir()
    untaught = changes[:2]
    assert result_of(worker, tmp_path / "backbone", None, *untaught)["step_size"] == given
    result = result_of(worker, tmp_path, other, *untaught)
    assert (result["step_size"], result["test_accuracy_with_learned_step_size"]) == (chosen, None)


def content_of(accuracy: float, learned: float | None = None, step_size: float = 0.01) -> dict[str, Any]:
    """Content of a result file."""
    accuracies = {"test_accuracy": accuracy, "test_accuracy_with_learned_step_size": learned}
    return {**accuracies, "step_size": step_size, "cost": Spent(1.0).to_json()}


def test_a_run_notes_the_step_size_that_most_of_its_networks_chose(tmp_path: Path) -> None:
    """The note has the row's schedule with the most frequent step size, and waits for the last seed."""
    config, out = tiny_config("evaluate.seeds=4", "evaluate.optimiser=adamw"), open_location(str(tmp_path))
    for number, step_size in enumerate((1e-3, 3e-3, 3e-3, 3e-4)):
        assert not (out / "tiny" / SCORING).exists()
        result_location(out, config, "d" * 16, "distilled", number).write_json(content_of(0.5, step_size=step_size))
        note_scoring(out, config, "d" * 16)
    noted = Schedule.from_json((out / "tiny" / SCORING).read_json())
    assert noted == dataclasses.replace(row_schedule(config, "distilled"), learning_rate=3e-3)
    assert noted.optimiser == "adamw"


def place(config: RunConfig, row: str, network: NetworkConfig | None = None) -> str:
    """Place of the first result."""
    return result_location(open_location("/runs"), config, "d" * 16, row, 0, network).path


@pytest.mark.parametrize("network", [None, NetworkConfig(architecture="lenet")])
def test_runs_share_what_does_not_depend_on_their_distillation(network: NetworkConfig | None) -> None:
    """Runs share controls by images per class and experts, and all real data; a distilled set belongs to its run."""
    base = tiny_config("name=base")
    shared = {
        "name=other": {"random-hard", "random-soft", "full"},
        "distill.iterations=7": {"random-hard", "random-soft", "full"},
        "metadd={auxiliaries: [{architecture: lenet}]}": {"random-hard", "random-soft", "full"},
        "distill.ipc=2": {"full"},
        "experts.learning_rate=0.5": {"full"},
        "evaluate.protocol=published": set(),
        "seed=5": set(),
    }
    for change, expected in shared.items():
        other = override(base, [change, *(["name=other"] if not change.startswith("name") else [])])
        rows = ("random-hard", "random-soft", "full", "distilled")
        same = {row for row in rows if place(base, row, network) == place(other, row, network)}
        assert same == expected, change
    assert place(base, "distilled", network) == place(override(base, ["distill.ipc=2"]), "distilled", network)


def test_networks_are_grouped_by_their_part_in_the_distillation(tmp_path: Path) -> None:
    """Networks are grouped as same, seen or unseen; one without all seeds is left out."""
    changes = ["backbones=[{network: {width: 8, depth: 2}}]", "metadd={auxiliaries: [{architecture: lenet}]}"]
    config = scored_on(tiny_config(*changes, "evaluate.seeds=1"), ["convnet", "lenet", "mlp", "vgg11"])
    out = open_location(str(tmp_path))
    for number, network in enumerate(config.scored_networks[:-1]):
        for row in ON_OTHERS:
            result_location(out, config, "d", row, 0, network).write_json(content_of(number / 10, 0.0))
    scores = read_network_scores(out, config, "d")
    assert [(each.network.architecture, each.kind) for each in scores] == [
        ("convnet", "same"),
        ("convnet", "seen"),
        ("lenet", "seen"),
        ("mlp", "unseen"),
    ]
    assert [each.tuned.mean for each in scores] == [0.0, 0.1, 0.2, 0.3]
    assert all(each.learned.mean == 0.0 and each.control is not None for each in scores)


@pytest.mark.parametrize(("stored", "second"), [([0.125, 0.25], 0.25), ([0.125], 0.125)])
def test_a_network_that_was_matched_too_has_a_step_size_of_its_own(
    tmp_path: Path, stored: list[float], second: float
) -> None:
    """Each matched network has its own step size; the others use the first network's, as earlier versions do."""
    config = tiny_config("backbones=[{network: {width: 8, depth: 2}}]")
    dataset = Pipeline([config], str(tmp_path)).runs.dataset(config.dataset)
    synthetic = SyntheticSet(torch.zeros(10, 1, 8, 8), torch.zeros(10, 10), torch.tensor(stored), torch.arange(10))
    folder = open_location(str(tmp_path / "tiny"))
    context = (dataset.transform, dataset.class_names, run_identity(config), {})
    save_artifact(folder / SYNTHETIC, synthetic, *context, has_step_size=True)
    worker = EvaluateWorker(dataset, config.cluster)

    def learned(network: NetworkConfig | None) -> float | None:
        return steps.result_of(worker._training_sets(config, "", folder, "distilled", [0], network))[0][2]

    assert learned(config.backbones[0].network) == second
    assert [learned(network) for network in (None, config.network, NetworkConfig(architecture="mlp"))] == [0.125] * 3


@pytest.mark.parametrize("network", [None, NetworkConfig(architecture="vit-small")])
def test_with_adamw_no_step_size_was_learned(
    worker: EvaluateWorker, tmp_path: Path, network: NetworkConfig | None
) -> None:
    """AdamW's step sizes are all chosen on validation data, among its usual ones."""
    assert set(WITH_ADAMW) == set(OPTIMISERS["adamw"].step_sizes)
    result = result_of(worker, tmp_path, network, "evaluate.optimiser=adamw")
    assert (result["step_size"], result["validation_accuracy"]) == (3e-3, 0.95)
    assert result["learned_step_size"] is result["test_accuracy_with_learned_step_size"] is None


def test_a_row_of_the_table_is_all_that_an_optimiser_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimiser that is only in `OPTIMISERS` is built, has its candidates and weight decay, and is named."""
    row = Optimiser("RMSprop", torch.optim.RMSprop, ("weight_decay",), ("square_avg",), (1e-3, 2e-3), 0.25)
    monkeypatch.setitem(OPTIMISERS, "another", row)
    config = tiny_config()
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"optimiser": "another"})})
    for name, _ in scored_rows(config):
        count, schedule = training_of(config, name, None)
        assert (count, schedule.weight_decay) == (2, 0.25)
        assert isinstance(schedule.optimizer(torch.nn.Linear(1, 1)), torch.optim.RMSprop)
    summary = RunSummary(config, open_location(str(tmp_path)), [])
    assert column_name(summary) == "tiny (RMSprop)"


@pytest.mark.parametrize("network", [None, NetworkConfig(architecture="lenet")])
@pytest.mark.parametrize("row", ROWS)
def test_results_of_each_optimiser_have_places_of_their_own(row: str, network: NetworkConfig | None) -> None:
    """Results of each optimiser have places of their own, also in a finished run; those of SGD do not move."""
    sgd, adamw = tiny_config(), tiny_config("evaluate.optimiser=adamw")
    assert run_identity(sgd) == run_identity(adamw)
    assert "optimiser" not in run_identity(sgd)["evaluate"]
    assert place(sgd, row, network) != place(adamw, row, network)


def test_results_under_other_trainings_have_places_of_their_own() -> None:
    """A row moves with the keys that it reads and with no other, so nothing is mixed up and nothing is done twice."""
    base, soft, short = tiny_config(), {"random-soft", "distilled"}, {"random-hard", "random-soft", "distilled"}
    teacher = "evaluate.labels=teacher"
    moved = {
        (teacher,): soft,
        ("evaluate.learning_rate=0.1",): soft,
        ("evaluate.temperature=4",): set(),
        ("evaluate.schedule=cosine",): short,
        ("evaluate.warmup_epochs=2",): short,
        ("evaluate.epochs=3",): short,
        ("evaluate.batch_size=3",): short,
    }
    for changes, expected in moved.items():
        other = tiny_config(*changes)
        assert run_identity(other) == run_identity(base)
        assert {row for row in ROWS if place(other, row) != place(base, row)} == expected, changes
    taught = [(teacher, *more) for more in ((), ("evaluate.temperature=4",), ("evaluate.cutmix=1",))]
    taught += [(teacher, "experts.learning_rate=0.5"), (teacher, "evaluate.epochs=3")]
    places = [place(tiny_config(*changes), "distilled") for changes in taught]
    assert len(set(places)) == len(places)


def scores_without_learned_ones(out: Location, config: RunConfig) -> list[NetworkScores]:
    """Write results that have no learned step size, one for each network, and read their scores."""
    for network in config.scored_networks:
        result_location(out, config, "d", "distilled", 0, network).write_json(content_of(0.5))
    scores = read_network_scores(out, config, "d")
    assert [(each.learned, each.tuned.mean) for each in scores] == [(None, 0.5)] * 2
    return scores


@pytest.mark.parametrize(("method", "trains_with_it"), [("dm", True), ("select", False), ("sre2l", False)])
def test_the_first_step_size_trains_scored_networks_of_dm_alone(method: str, trains_with_it: bool) -> None:
    """Networks train on sets of dm with the given step size; on those of select and sre2l with a chosen one."""
    config = override(get_recipe(f"digits-{method}-ipc10"), ["distill.initial_step_size=0.05"])
    assert has_learned_step_size(config, "distilled") is trains_with_it


def test_the_learned_step_size_is_not_reported_under_a_teacher(tmp_path: Path) -> None:
    """No step size was learned for a teacher's labels, which the heading names, nor counts where one is given."""
    given = (["evaluate.labels=teacher"], ["evaluate.learning_rate=0.1"])
    assert [has_learned_step_size(tiny_config(*each), "distilled") for each in ([], *given)] == [True, False, False]
    assert [has_learned_step_size(tiny_config(*each), "distilled-hard") for each in given] == [True, True]
    config = scored_on(tiny_config("evaluate.labels=teacher", "evaluate.seeds=1"), ["lenet"])
    out = open_location(str(tmp_path))
    scores = scores_without_learned_ones(out, config)
    head, *_ = networks_table(RunSummary(config, out / config.name, [], networks=scores)).splitlines()
    assert head.startswith("tiny (a teacher's labels):")


def test_the_column_of_the_learned_step_size_is_empty_with_adamw(tmp_path: Path) -> None:
    """The column of the learned step size shows a dash for AdamW."""
    config = scored_on(tiny_config("evaluate.optimiser=adamw", "evaluate.seeds=1"), ["lenet"])
    out = open_location(str(tmp_path))
    scores = scores_without_learned_ones(out, config)
    summary = RunSummary(config, out / config.name, [], networks=scores)
    head, _, first, *_ = networks_table(summary).splitlines()
    assert head.startswith("tiny (AdamW):")
    assert first.split()[-4:] == ["–", "50.0", "not", "yet"]
    page = write_report(out, [summary]).read_bytes().decode()
    assert "<td>–</td>" in page
    assert "trained with AdamW" in page


def test_fixed_labels_add_the_rows_that_a_set_can_have() -> None:
    """A run has rows with hard labels, and under a teacher one soft label each if its labels are soft; results stay."""

    def added(*changes: str) -> set[str]:
        plain, fixed = tiny_config(*changes), tiny_config(*changes, "evaluate.fixed_labels=true")
        assert run_identity(plain) == run_identity(fixed)
        assert all(place(plain, row) == place(fixed, row) for row in ROWS)
        assert [row for row in scored_rows(fixed) if row in scored_rows(plain)] == scored_rows(plain)
        rows = [row for row, _ in scored_rows(fixed)]
        assert len(set(rows)) == len(rows)
        return {row for row, _ in {*scored_rows(fixed)} - {*scored_rows(plain)}}

    taught = "evaluate.labels=teacher"
    shared = (taught, "evaluate.teacher={network: lenet}")
    assert added("evaluate.full=false") == {"distilled-hard"}
    assert added(taught) == {"distilled-hard", "distilled-fixed", "random-fixed"}
    assert added(taught, "evaluate.fair=true") == {"distilled-fixed", "random-fixed"}
    assert added(taught, "distill.labels=hard") == {"distilled-hard"}
    assert added(*shared, "method=dm") == {"distilled-hard"}
    assert added(*shared, "method=select") == {"distilled-hard", "distilled-fixed", "random-fixed"}


def test_fixed_labels_do_not_depend_on_the_teacher() -> None:
    """Results with fixed labels are those of any teacher, and have places of their own."""
    base, taught = tiny_config(), tiny_config("evaluate.labels=teacher", "evaluate.learning_rate=0.1")
    assert all(place(base, row) == place(taught, row) for row in FIXED_ROWS)
    assert len({place(base, row) for row in ALL_ROWS}) == len(ALL_ROWS)


# --- DD-Ranking's scores ------------------------------------------------------------------------------------------


def test_the_fair_rows_are_asked_for_without_changing_the_run() -> None:
    """Fair rows can be added to a finished run; existing results keep their places."""
    plain, fair = tiny_config(), tiny_config("evaluate.fair=true")
    assert run_identity(plain) == run_identity(fair)
    assert "fair" not in run_identity(plain)["evaluate"]
    assert all(place(plain, row) == place(fair, row) for row in ROWS)
    places = [place(fair, row) for row in (*ROWS, *FAIR_ROWS)]
    assert len(set(places)) == len(places)
    controls = [row for row in (*ROWS, *FAIR_ROWS) if "/controls/" in place(fair, row)]
    assert controls == ["random-hard", "random-soft", "full", "random-plain"]


def test_places_of_results_have_not_moved() -> None:
    """Results that earlier versions have written are found at their places."""
    assert (
        place(tiny_config("evaluate.protocol=short", "evaluate.epochs=null"), "random-soft")
        == "/runs/controls/3a29616d194fe605/random-soft-00.json"
    )
    given = tiny_config("evaluate.protocol=short", "evaluate.epochs=null", "evaluate.learning_rate=0.1")
    assert place(given, "random-soft") == "/runs/controls/3a29616d194fe605/trained-4cd86ac2712f3b68/random-soft-00.json"


def test_hard_labels_choose_a_step_size_on_validation_data(worker: EvaluateWorker, tmp_path: Path) -> None:
    """Hard labels choose a step size on validation data; without augmentation the learned one stays."""
    chosen = {}
    for row in ("distilled-hard", "distilled-plain"):
        uri = str(tmp_path / f"{row}.json")
        list(worker.evaluate(tiny_config("evaluate.fair=true"), "", str(tmp_path), [uri], row, [0]))
        chosen[row] = open_location(uri).read_json()["step_size"]
    assert chosen == {"distilled-hard": 0.03, "distilled-plain": LEARNED}


def trained_rows(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """Rows -> images, true for soft labels, the schedules, and the teacher, of networks that are not really trained."""
    pipeline = run_here(tmp_path, config, stage="train_experts")
    dataset = pipeline.runs.dataset(config.dataset)
    synthetic = SyntheticSet(torch.zeros(10, 1, 8, 8), torch.randn(10, 10), torch.tensor([0.1]), torch.arange(10))
    folder = open_location(str(tmp_path / "tiny"))
    context = (dataset.transform, dataset.class_names, run_identity(config), {})
    save_artifact(folder / SYNTHETIC, synthetic, *context, has_step_size=True)
    worker, seen = EvaluateWorker(dataset, config.cluster), dict[str, tuple[Any, ...]]()

    class Untrained(Trainer):
        def train_steps(
            self, stack: Sequence[Training], lessons: Lessons | None = None, *_: Any
        ) -> Iterator[TrainingState | None]:
            (own,) = stack
            earlier = seen[row][2] if row in seen else []
            seen[row] = (len(own.images), own.targets.is_floating_point(), [*earlier, own.schedule], lessons)
            return iter(())

    monkeypatch.setattr("datm_ray.stages.evaluate.rows.trainer_of", lambda *_: Untrained(compile_=False))
    monkeypatch.setattr(worker, "_test_accuracy", lambda _: finished(0.5))
    for row in ALL_ROWS:
        list(worker.evaluate(config, pipeline.store_uri, folder.uri, [str(tmp_path / f"{row}.json")], row, [0]))
    return seen


def test_scored_images_are_copied_to_the_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation and test images are copied to the device once, not again for every network."""
    config, copied = tiny_config(), list[int]()
    dataset = Pipeline([config], str(tmp_path)).runs.dataset(config.dataset)

    def copy(images: Any, device: torch.device, beside: int) -> Any:
        copied.append(len(images))
        return images_on(images, device, beside)

    monkeypatch.setattr("datm_ray.stages.evaluate.rows.images_on", copy)
    worker = EvaluateWorker(dataset, config.cluster)
    uris = [str(tmp_path / f"random-hard-{number}.json") for number in range(2)]
    list(worker.evaluate(config, "", str(tmp_path), uris, "random-hard", (0, 1)))
    assert sorted(copied) == sorted([len(dataset.validation_images), len(dataset.test_images)])


def test_rows_are_trained_as_their_names_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hard rows train on classes, plain rows without augmentation, all others as in the recipe."""
    config = tiny_config("evaluate.fair=true")
    seen = trained_rows(config, tmp_path, monkeypatch)
    real, augmentation = len(Pipeline([config], str(tmp_path)).runs.raw(config).train), config.evaluate.augmentation
    assert augmentation
    assert {row: (images, soft, schedules[0].augmentation) for row, (images, soft, schedules, _) in seen.items()} == {
        "random-hard": (10, False, augmentation),
        "random-soft": (10, True, augmentation),
        "distilled": (10, True, augmentation),
        "full": (real, False, augmentation),
        "distilled-hard": (10, False, augmentation),
        "distilled-fixed": (10, True, augmentation),
        "random-fixed": (10, True, augmentation),
        "distilled-plain": (10, True, ""),
        "random-plain": (10, True, ""),
    }
    assert all(teacher is None for *_, teacher in seen.values())


def test_rows_with_soft_labels_have_the_teacher_and_the_given_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soft rows alone have the teacher and the given rate; all but the full data have the epochs and the schedule."""
    changes = ["labels=teacher", "temperature=4", "cutmix=1", "learning_rate=0.2", "schedule=cosine", "epochs=7"]
    config = tiny_config("evaluate.fair=true", *(f"evaluate.{change}" for change in changes), "evaluate.batch_size=5")
    seen = trained_rows(config, tmp_path, monkeypatch)
    taught = {row: (each.temperature, each.cutmix) for row, (*_, each) in seen.items() if each}
    assert taught == {"random-soft": (4, 1), "distilled": (4, 1), "distilled-plain": (4, 0), "random-plain": (4, 0)}
    rates = {row: tuple(schedule.learning_rate for schedule in schedules) for row, (_, _, schedules, _) in seen.items()}
    assert {row for row, found in rates.items() if found == (0.2,)} == set(SOFT)
    chosen = {row for row, found in rates.items() if found == OPTIMISERS["sgd"].step_sizes}
    assert chosen == {"random-hard", "random-fixed", "full"}
    assert rates["distilled-hard"] == rates["distilled-fixed"] == (pytest.approx(0.1), *OPTIMISERS["sgd"].step_sizes)
    for row, (_, _, schedules, _) in seen.items():
        count, schedule = training_of(config, row, None)
        assert (count, {dataclasses.replace(each, learning_rate=0.0) for each in schedules}) == (
            len(schedules),
            {schedule},
        )
        shape = (schedule.epochs, schedule.batch_size, schedule.cosine, schedule.decay_epoch)
        assert shape == ((config.evaluate.real_epochs, 128, False, 1) if row == "full" else (7, 5, True, None))


ACCURACIES = {
    "full": (0.9, 0.8),
    "random-soft": (0.7, 0.6),
    "distilled": (0.8, 0.8),
    "distilled-hard": (0.6, 0.8),
    "distilled-plain": (0.7, 0.5),
    "random-plain": (0.3, 0.5),
}
"""Accuracies of two seeds."""


def write_accuracies(out: Location, config: RunConfig, rows: Sequence[str]) -> None:
    for row in rows:
        for number, value in enumerate(ACCURACIES[row]):
            result_location(out, config, "d", row, number).write_json(content_of(value))


def test_the_scores_are_made_of_the_rows_seed_by_seed(tmp_path: Path) -> None:
    """Scores are computed seed by seed: HLR 0.3, IOR 0.1, beta 0.25; then HLR 0, IOR 0.2, beta 0.1."""
    config, out = tiny_config("evaluate.fair=true"), open_location(str(tmp_path))
    write_accuracies(out, config, list(ACCURACIES)[:-1])
    assert read_fair_scores(out, config, "d") is None, "a row is missing"
    write_accuracies(out, config, list(ACCURACIES))
    assert read_fair_scores(out, tiny_config(), "d") is None, "not asked for"
    parts = read_fair_scores(out, config, "d")
    assert parts is not None
    assert list(parts) == list(FAIR_PARTS)
    assert parts["HLR"] == pytest.approx((0.3, 0.0))
    assert parts["IOR"] == pytest.approx((0.1, 0.2))
    assert parts["beta"] == pytest.approx((0.25, 0.1))
    assert parts["LRS"] == pytest.approx((0.228454, 0.313687), abs=1e-6)
    assert parts["ARS"] == pytest.approx((0.389783, 0.313687), abs=1e-6)


def test_the_scores_are_reported_with_their_parts_and_n(tmp_path: Path) -> None:
    """Text, page and summary report the scores with their parts and n."""
    config, out = tiny_config("evaluate.fair=true"), open_location(str(tmp_path))
    write_accuracies(out, config, list(ACCURACIES))
    where = (out, config, "d")
    summary = RunSummary(config, out / config.name, [], fair=read_fair_scores(*where), fair_rows=read_fair_rows(*where))
    lines = {line.split(",")[0]: line.split() for line in fair_table([summary, summary]).splitlines()}
    assert lines["LRS"][-6:] == ["0.271", "±", "0.060"] * 2
    assert lines["HLR"][-3:] == ["0.150", "±", "0.212"]
    page = write_report(out, [summary]).read_bytes().decode()
    assert "0.271 ± 0.060" in page
    assert "distilled, hard labels 70.0 ± 14.1 (2)" in page
    (written,) = write_summary(out, [summary]).read_json()
    assert written["fair"]["beta"]["n"] == 2
    assert written["test_accuracy"]["random-plain"]["seeds"] == [0.3, 0.5]
    without = RunSummary(config, out / config.name, [])
    assert "Fair scores" not in write_report(out, [without]).read_bytes().decode()


# --- stacks, and tasks that end early ------------------------------------------------------------------------------


Scored = tuple[list[Progress], list[dict[str, Any]], list[bytes]]


def scored(folder: str, is_stacked: bool, at: int | None = None, end: Callable[[], object] = lambda: None) -> Scored:
    """Score a row with two seeds and three step sizes in the serial executor.

    Args:
        folder: folder of the results.
        is_stacked: True to train the networks together.
        at: number of epochs, over all networks, after which `end` is called; `None` for never.

    Returns:
        Progress; results without what differs from run to run; parameters of each network after its training.
    """
    config = tiny_config(f"cluster.compile={is_stacked}".lower(), "evaluate.epochs=20")
    dataset = Pipeline([config], folder).runs.dataset(config.dataset)
    places, seen, networks = (
        [f"{folder}/random-hard-0{seed}.json" for seed in range(2)],
        list[Progress](),
        list[bytes](),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_progress, "WRITE_SHARE", 1e9)
        accuracy = EvaluateWorker._validation_accuracy
        if is_stacked:
            stacks_of_any_work(patch)

        def noting(worker: EvaluateWorker, network: nn.Module) -> Steps[float]:
            networks.append(flatten(network).numpy().tobytes())
            return accuracy(worker, network)

        patch.setattr(EvaluateWorker, "_validation_accuracy", noting)
        task = Task("random-hard 0-1", (config, "", folder, places, "random-hard", (0, 1)))
        executor = SerialExecutor(config.cluster)
        for _, event in executor.run(EvaluateWorker, (dataset, config.cluster), "evaluate", [task]):
            if isinstance(event, Progress):
                seen.append(event)
                if at is not None and event.done >= at:
                    end()
    assert isinstance(event, Finished)
    left_out = ("seconds", "cost", "provenance")
    results = [{key: value for key, value in each.items() if key not in left_out} for each in event.result]
    return seen, results, networks


def killed(folder: str, is_stacked: bool, at: int) -> None:
    """Score a row in a process that is killed when so many epochs are saved."""
    progress.SAVE_INTERVAL = 0.0
    scored(folder, is_stacked, at, lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("is_stacked", [False, True])
def test_a_killed_task_resumes_with_the_same_bits(is_stacked: bool, tmp_path: Path) -> None:
    """Killed twice, a task trains no saved epoch again and ends with the networks of an undisturbed one."""
    whole, folder = scored(str(tmp_path / "whole"), is_stacked), tmp_path / "killed"
    for at in (15, 66):
        (call,) = side_by_side(killed, [(str(folder), is_stacked, at)])
        assert isinstance(call.exception(), BrokenProcessPool)
    files = list(folder.glob("progress-random-hard-00-*/*.arrow"))
    assert len(files) <= (2 if is_stacked else 6), "a file replaces the one before it; a stack has one of each process"
    seen, *rest = scored(str(folder), is_stacked)
    assert seen[0].done >= 66
    assert rest == [*whole[1:]]
    assert [path.name for path in folder.iterdir() if path.name.startswith("progress")] == []


@pytest.mark.parametrize("is_stacked", [False, True])
def test_a_task_that_is_stopped_saves_its_epoch_and_names_it(
    is_stacked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that would write seldom writes when it stops, says from where it resumes, and adds up its cost."""
    monkeypatch.setattr(progress, "REPORT_INTERVAL", 0.0)
    laps = list[int]()

    def lap(_: Account) -> Spent:
        laps.append(1)
        return Spent(cpu_seconds=100.0)

    monkeypatch.setattr(Account, "lap", lap)
    monkeypatch.setattr(Account, "spent", lambda _: Spent(cpu_seconds=2.0))
    where = r"networks 1-6 of 6, epoch 8 of 20" if is_stacked else r"network 3 of 6, epoch 5 of 20"
    with pytest.raises(Interrupted, match=f"^random-hard 0-1: {where}$"):
        scored(str(tmp_path / "parts"), is_stacked, 45, stopping.ask)
    seen, results, networks = scored(str(tmp_path / "parts"), is_stacked)
    assert seen[0].done == (48 if is_stacked else 45)
    assert [event.done for event in seen if event.saved][-1] == 120
    found = open_location(str(tmp_path / "parts/random-hard-01.json")).read_json()
    assert found["cost"]["cpu_seconds"] == (100 * len(laps) + 2) / 2
    assert (results, networks) == scored(str(tmp_path / "whole"), is_stacked)[1:]


def test_a_trial_on_a_gpu_decides_how_networks_are_computed_until_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tapes: list[Tape]
) -> None:
    """A trial chooses once; whoever resumes the task computes its networks alike, with equal bits, without a trial."""
    monkeypatch.setattr(progress, "REPORT_INTERVAL", 0.0)
    monkeypatch.setattr(loop, "is_tried", lambda device: True)
    monkeypatch.setattr(loop, "COMPILED_STEPS", 0)
    monkeypatch.setattr(stack_trial, "free_gpu_memory", lambda: 2**40)
    asked, taken = list[list[int]](), [1]

    def fastest(ways: Mapping[int, object], now: object) -> int:
        asked.append(list(ways))
        return taken[0]

    monkeypatch.setattr(stack_trial, "fastest", fastest)
    whole = scored(str(tmp_path / "whole"), True)
    assert asked == [[6, 1]]
    assert tapes[-1].replays == 6 * 20, "every step of every network"
    with pytest.raises(Interrupted, match=r"networks 1-6 of 6, epoch 8 of 20"):
        scored(str(tmp_path / "parts"), True, 45, stopping.ask)
    taken[0] = 6  # the stack would be faster now
    assert scored(str(tmp_path / "parts"), True)[1:] == whole[1:]
    assert len(asked) == 2, "the resumed attempt had no trial"


def test_networks_are_compiled_where_all_rows_of_a_run_gain_from_it() -> None:
    """The demo's rows share a compiled step, and one small row does not compile. Rows of a teacher do not count."""
    for recipe in ("digits-ipc1", "digits-ipc10"):
        config = get_recipe(recipe)
        assert networks_alike(config, "distilled", None) == 5 * (3 + 3 + 1)
        assert networks_alike(config, "full", None) == 5 * 3
        found = {
            row: Row(config, row, None, KNOWN_SHAPES["digits"]).largest_stack(5) for row in ("random-hard", "distilled")
        }
        assert found == {"random-hard": 5, "distilled": 5}
    few = override(get_recipe("digits-ipc1"), ["evaluate.seeds=2"])
    assert networks_alike(few, "distilled", None) == 14
    assert Row(few, "random-hard", None, KNOWN_SHAPES["digits"]).largest_stack(2) == 1
    others = override(get_recipe("digits-ipc1"), ["evaluate.networks=[{architecture: lenet}]"])
    lenet = others.evaluate.networks[0]
    assert networks_alike(others, "distilled", lenet) == 5 * (3 + 4)
    assert networks_alike(others, "distilled", None) == 5 * (3 + 3 + 1)
    taught = override(get_recipe("digits-ipc1"), ["evaluate.labels=teacher"])
    assert networks_alike(taught, "random-hard", None) == 5 * 3


@pytest.mark.parametrize("is_stacked", [False, True])
def test_saved_states_are_read_when_they_are_needed(
    is_stacked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed task holds no saved state but that of the stack in training, and no gradient of a trained network."""
    monkeypatch.setattr(progress, "REPORT_INTERVAL", 0.0)
    with pytest.raises(Interrupted):
        scored(str(tmp_path), is_stacked, 110, stopping.ask)
    resume, train, after = TrainingProgress.resume, Trainer.train_steps, list[tuple[int, int]]()
    vectors, networks = list[weakref.ref[torch.Tensor]](), list[nn.Module]()

    def noting(progress: TrainingProgress, device: torch.device) -> ExpertState | None:
        if (state := resume(progress, device)) is not None:
            assert state.velocity is not None
            vectors.extend([weakref.ref(state.parameters), weakref.ref(state.velocity)])
        return state

    def counting(trainer: Trainer, stack: Sequence[Training], *arguments: Any) -> Iterator[TrainingState | None]:
        held = sum(each.grad is not None for network in networks for each in network.parameters())
        networks.extend(each.network for each in stack)
        states = train(trainer, stack, *arguments)
        del arguments
        for state in states:
            after.append((sum(vector() is not None for vector in vectors), held))
            yield state

    monkeypatch.setattr(TrainingProgress, "resume", noting)
    monkeypatch.setattr(Trainer, "train_steps", counting)
    scored(str(tmp_path), is_stacked)
    assert len(vectors) == (2 if is_stacked else 12)
    networks.clear()
    scored(str(tmp_path / "anew"), is_stacked)
    assert set(after) == {(0, 0)}


def test_damaged_files_of_a_later_network_are_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that proves damaged when its network is resumed takes its epochs back; the networks are the same."""
    whole, folder = scored(str(tmp_path / "whole"), False), tmp_path / "parts"
    monkeypatch.setattr(progress, "REPORT_INTERVAL", 0.0)
    with pytest.raises(Interrupted):
        scored(str(folder), False, 45, stopping.ask)
    (file,) = folder.glob("progress-random-hard-00-*-2/*.arrow")
    file.write_bytes(file.read_bytes()[:-100])
    seen, *rest = scored(str(folder), False)
    assert (seen[0].done, seen[-1].done) == (45, 120)
    assert rest == [*whole[1:]]


@pytest.mark.slow
@pytest.mark.ray
def test_a_task_on_ray_that_is_stopped_is_saved(ray_cluster: Any, tmp_path: Path) -> None:
    """A driver that is asked to stop names the place from which the task resumes, on another executor too."""
    from datm_ray.runtime.ray.executor import RayExecutor

    config = tiny_config("evaluate.epochs=20000")
    dataset = Pipeline([config], str(tmp_path)).runs.dataset(config.dataset)
    row, place = "random-hard", str(tmp_path / "random-hard-00.json")
    task = Task("random-hard 0", (config, "", str(tmp_path), [place], row, (0,)))
    executor = RayExecutor(config.cluster)
    setup = (executor.share(dataset), config.cluster)
    where = "random-hard 0: network 1 of 3, epoch "

    def stop_at_once() -> None:
        for _, event in executor.run(EvaluateWorker, setup, "evaluate", [task]):
            if isinstance(event, Progress) and event.done:
                stopping.ask()

    with pytest.raises(Interrupted, match=rf"^{where}\d+ of 20000$") as end:
        stop_at_once()
    executor.close()
    epoch = int(str(end.value).removeprefix(where).split()[0])
    local = SerialExecutor(config.cluster).run(EvaluateWorker, (dataset, config.cluster), "evaluate", [task])
    assert next(event.done for _, event in local if isinstance(event, Progress)) == epoch > 0


def test_progress_of_tasks_with_results_is_removed(tmp_path: Path) -> None:
    """Folders that a worker left, which died after writing its results, are removed; those of open tasks stay."""
    for name in ("distilled-hard-00", "distilled-00"):
        file = tmp_path / f"progress-{name}-0123456789abcdef-0/00000-00001-00.arrow"
        file.parent.mkdir()
        file.touch()
    (tmp_path / "distilled-00.json").touch()
    remove_progress(open_location(str(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "distilled-00.json",
        "progress-distilled-hard-00-0123456789abcdef-0",
    ]
