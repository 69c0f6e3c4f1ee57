"""Tests validation as a task of its own: in any order and after any kill, the result is that of a run that waits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from datm_ray.artifact import load
from datm_ray.config import ClusterConfig, RunConfig
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.core.training.loop import PROTOCOLS
from datm_ray.data.dataset import Dataset
from datm_ray.errors import DivergenceError
from datm_ray.methods.trajectory.iteration import IterationRecord, MatchingState
from datm_ray.monitor.spent import Spent
from datm_ray.pipeline.runs import Runs
from datm_ray.runtime.executor import Event, Finished, More, Progress, Task
from datm_ray.runtime.stopping import Interrupted, ask
from datm_ray.stages.distill import task as distill, validation
from datm_ray.stages.distill.checkpoint import PARTS, read_curves
from datm_ray.stages.distill.task import COST, LAST_GOOD, SYNTHETIC, DistillWorker, read_cost
from datm_ray.stages.distill.validation import CANDIDATES, Candidates
from datm_ray.stages.methods.base import Method
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.files.local import LocalDraft
from datm_ray.store.tensors import read_tensors
from tests.conftest import tiny_config

SETTINGS = (
    *("distill.initial=random", "distill.labels=hard", "distill.validate_every=2", "distill.checkpoint_every=3"),
    *("distill.iterations=9", "distill.learning_rate_images=1.0"),
)
DUE = (2, 4, 6, 8, 9)


class Killed(BaseException):
    """End of a worker at any moment."""


class Drifting(Method):
    """Method without experts, whose set changes a little in every iteration."""

    state = MatchingState
    facts: ClassVar = {"precision": "float32"}

    def step(self, state: MatchingState, meta: Any) -> None:
        """Move the images."""
        state.history.append(IterationRecord(state.iteration, 0, 0, 0, 0.5, 0.01, False))
        state.synthetic = state.synthetic.clone()
        state.synthetic.images.mul_(1 - 0.1 * (state.iteration % 3)).add_(0.01)


class Worker(DistillWorker):
    """Worker of `Drifting`."""

    method = Drifting


def scored(config: Any, dataset: Any, whole: SyntheticSet, *_: Any) -> Iterator[Progress]:
    """Yield an accuracy that follows from the bits of the images, and differs much between iterations."""
    yield Progress(0, 1)
    yield Progress(1, 1, {"validation": float(whole.images.double().abs().sum() * 1e4) % 1.0})


@pytest.fixture(autouse=True)
def no_training_of_validation_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the training of validation networks, which takes most of the time."""
    monkeypatch.setattr(distill, "validating", scored)


@cache
def dataset() -> Dataset:
    """Return the images of all runs."""
    config = tiny_config()
    return Runs([config], "unused").dataset(config.dataset)


class Run:
    """One set that is distilled into a folder, by a worker that may be killed and started again."""

    def __init__(self, out: Path, *changes: str) -> None:
        self.config: RunConfig = tiny_config(*SETTINGS, *changes)
        self.worker = Worker(dataset(), self.config.cluster)
        self.folder = open_location(str(out / "tiny"))
        self.arguments = (self.config, str(out / "experts"), self.folder.uri)
        self.template = Task("validation", self.arguments, method="validate")

    def events(self, apart: bool = True) -> Iterator[Event]:
        """Distil, from the last checkpoint."""
        return self.worker.distill(*self.arguments, 1, self.template if apart else None)

    def validate(self, task: Task) -> None:
        """Run a validation task."""
        assert isinstance(list(self.worker.validate(*task.arguments))[-1], Finished)

    def finish(self, now: Callable[[int], bool], order: Callable[[list[Task]], Any] = lambda tasks: None) -> None:
        """Run to the end: validations whose iteration is `now` at once, the others afterwards, in any order."""
        left: list[Task] = []
        for event in self.events():
            if isinstance(event, More):
                if now(event.task.arguments[-1]):
                    self.validate(event.task)
                else:
                    left.append(event.task)
        order(left)
        for task in left:
            self.validate(task)

    def result(self) -> dict[str, Any]:
        """All that the run leaves, but for its cost."""
        assert not self.candidates, self.candidates
        files = {"synthetic": (SYNTHETIC, "synthetic-set"), "checkpoint": ("checkpoint.arrow", "checkpoint")}
        found: dict[str, Any] = {}
        for name, (file, kind) in files.items():
            content = read_tensors(self.folder / file, kind=kind)
            found[name] = {key: array.tobytes() for key, array in content.arrays.items()}
            found[f"{name} metadata"] = {key: value for key, value in content.metadata.items() if key != "parts"}
        for name in content.metadata["parts"]:  # of the checkpoint; a killed attempt may have left others
            arrays = read_tensors(self.folder / PARTS / name, kind="checkpoint").arrays
            found[name.rpartition("-")[0]] = {key: array.tobytes() for key, array in arrays.items()}
        assert len(found) == 5
        return found

    @property
    def candidates(self) -> list[str]:
        """Files of candidates and their results."""
        return list((self.folder / CANDIDATES).list())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a distillation leaves that waits for each validation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distill, "validating", scored)
        run = Run(tmp_path_factory.mktemp("reference"))
        events = list(run.events(apart=False))
        assert not any(isinstance(event, More) for event in events)
        curves = read_curves(run.folder)
        assert curves["validation.iteration"].tolist() == list(DUE)
        assert 0 < int(curves["validation.chosen_at"]) < 9  # so that the rule is seen at work
        assert curves["validation.chosen_at"] not in DUE[:1]
        yield run.result()


def test_validations_that_end_at_any_time_choose_the_same_set(reference: dict[str, Any], tmp_path: Path) -> None:
    """Results that come at once, late, backwards, in parts or in a random order leave what a waiting run leaves."""
    cases: dict[str, tuple[Callable[[int], bool], Callable[[list[Task]], Any]]] = {
        "at once": (lambda iteration: True, lambda tasks: None),
        "late": (lambda iteration: False, lambda tasks: None),
        "backwards": (lambda iteration: False, lambda tasks: tasks.reverse()),
        "every other one": (lambda iteration: iteration in (4, 8), lambda tasks: tasks.reverse()),
        "all but the first": (lambda iteration: iteration > 2, lambda tasks: None),
        "all but the last": (lambda iteration: iteration < 9, lambda tasks: None),
        "shuffled": (lambda iteration: iteration == 6, random.Random(0).shuffle),
        "twice": (lambda iteration: iteration == 2, lambda tasks: tasks.extend(reversed(tasks[:]))),
    }
    for name, (now, order) in cases.items():
        run = Run(tmp_path / name)
        run.finish(now, order)
        assert run.result() == reference, name


def test_a_distillation_does_not_wait_and_shows_the_last_result_that_joined(tmp_path: Path) -> None:
    """Iterations go on without results; one that is there joins with the next checkpoint, and its files go."""
    run, shown = Run(tmp_path), {}
    for event in run.events():
        if isinstance(event, More) and event.task.arguments[-1] == 2:
            run.validate(event.task)
        if isinstance(event, Progress):
            shown[event.done] = event.values.get("validation")
            if event.done == 3:  # a checkpoint
                assert run.candidates == []
    assert [iteration for iteration, value in shown.items() if value is not None] == [3, 4, 5, 6, 7, 8, 9]
    assert len({value for value in shown.values() if value is not None}) == 1
    assert run.candidates == [f"0000000{iteration}.arrow" for iteration in (4, 6, 8, 9)]
    assert not (run.folder / SYNTHETIC).exists()
    assert read_curves(run.folder)["validation.iteration"].tolist() == [2]


@pytest.mark.parametrize("every", [pytest.param(9, marks=pytest.mark.slow), 29])
def test_a_kill_at_any_write_changes_nothing(
    every: int, reference: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers killed before or after any file is written or removed, and started again, leave what others leave."""
    commit, remove, moments = LocalDraft.commit, Location.remove, 0
    for is_late, moment in itertools.product((False, True), range(0, 200, every)):
        passed, run = itertools.count(), Run(tmp_path / f"{is_late}-{moment}")

        def killing(work: Callable[..., Any], passed: Any = passed, moment: int = moment) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> None:
                if next(passed) == moment:
                    raise Killed
                work(*arguments, **options)
                if next(passed) == moment:
                    raise Killed

            return call

        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(LocalDraft, "commit", killing(commit))
            patch.setattr(Location, "remove", killing(remove))
            run.finish(lambda iteration, is_late=is_late: not is_late)
        if next(passed) <= moment:
            continue  # not so many writes
        moments += 1
        for _ in range(2):  # a resumed run may end with open validations
            if not (run.folder / SYNTHETIC).exists():
                run.finish(lambda iteration: True)
        Candidates(run.folder).remove()  # as the next command does
        assert run.result() == reference, (is_late, moment)
    assert moments > 100 / every


def test_open_validations_are_resumed_where_every_iteration_is_done(reference: dict[str, Any], tmp_path: Path) -> None:
    """A run whose iterations are all done makes tasks for the missing results alone, without its method."""
    run = Run(tmp_path)
    assert len([event for event in run.events() if isinstance(event, More)]) == len(DUE)
    run.worker.method = None  # type: ignore[assignment]
    *tasks, end = run.events()
    assert [event.task.arguments[-1] for event in tasks] == list(DUE)
    assert isinstance(end, Finished)
    run.worker.method = Drifting
    for event in tasks[1:]:
        run.validate(event.task)
    (first, _) = run.events()
    assert first == tasks[0]
    run.validate(first.task)
    assert run.result() == reference
    run.validate(first.task)  # a second worker that comes too late does no harm
    assert run.result() == reference


def test_two_workers_that_write_the_set_at_once_do_no_harm(
    reference: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that is overtaken by another before any of its writes leaves that one's files."""
    commit = LocalDraft.commit
    for moment in itertools.count():
        passed, run = itertools.count(), Run(tmp_path / str(moment))
        run.finish(lambda iteration: iteration != 6, lambda tasks: tasks.clear())
        (task,) = (event.task for event in run.events() if isinstance(event, More))

        def meanwhile(
            *arguments: Any,
            run: Run = run,
            task: Task = task,
            passed: Any = passed,
            moment: int = moment,
            **options: Any,
        ) -> None:
            if next(passed) == moment:
                run.validate(task)
            commit(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(LocalDraft, "commit", meanwhile)
            run.validate(task)
        Candidates(run.folder).remove()  # the one that was overtaken may have written its result again
        assert run.result() == reference, moment
        if next(passed) <= moment:
            break
    assert moment > 4


def test_a_result_that_nobody_used_is_used_by_the_next_command(reference: dict[str, Any], tmp_path: Path) -> None:
    """With all results there and no set, one more task for the last candidate writes the set."""
    run = Run(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillWorker, "_conclude", lambda *_: iter(()))
        run.finish(lambda iteration: True)
    assert not (run.folder / SYNTHETIC).exists()
    (only, _) = run.events()
    assert only.task.arguments[-1] == 9
    run.validate(only.task)
    assert run.result() == reference


def test_a_run_may_wait_for_validations_after_it_did_not(reference: dict[str, Any], tmp_path: Path) -> None:
    """A run resumed where no worker is free validates its open candidates itself, and the other way round."""
    for name, stop, apart in (("then waits", 5, True), ("then does not", 5, False), ("at its end", 9, True)):
        run = Run(tmp_path / name)
        for event in run.events(apart):
            if isinstance(event, Progress) and event.done == stop:
                break
        if apart:
            assert isinstance(list(run.events(apart=False))[-1], Finished)
        else:
            run.finish(lambda iteration: iteration == 6)
        assert run.result() == reference, name


def test_candidates_of_a_checkpoint_that_was_moved_away_are_forgotten(tmp_path: Path) -> None:
    """A set that starts anew uses no result of its earlier candidates."""
    run = Run(tmp_path)
    for event in run.events():
        if isinstance(event, More) and event.task.arguments[-1] == 2:
            Candidates(run.folder).write_result(2, 0.999, 0.0, Spent())
            break
    (run.folder / "checkpoint.arrow").remove()
    run.finish(lambda iteration: False)
    assert 0.999 not in read_curves(run.folder)["validation.accuracy"]


def test_a_stopped_run_resumes_with_its_open_validations(reference: dict[str, Any], tmp_path: Path) -> None:
    """A run that is asked to stop keeps its open candidates, and makes tasks for them when it is resumed."""
    run = Run(tmp_path)
    asked = (ask() for event in run.events() if isinstance(event, Progress) and event.done == 5)
    with pytest.raises(Interrupted, match="iteration 5 of 9"):
        list(asked)
    assert run.candidates == ["00000002.arrow", "00000004.arrow"]
    made = []
    for event in run.events():
        if isinstance(event, More):
            made.append(event.task.arguments[-1])
            run.validate(event.task)
    assert made == list(DUE)
    assert run.result() == reference


def test_a_diverged_run_keeps_its_open_validations(
    reference: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that diverges saves the set of its last update, joins what is there, and loses no candidate."""
    step, run = Drifting.step, Run(tmp_path)

    def diverging(method: Drifting, state: MatchingState, meta: Any) -> None:
        if state.iteration == 7:
            raise DivergenceError("diverged")
        step(method, state, meta)

    monkeypatch.setattr(Drifting, "step", diverging)
    with pytest.raises(DivergenceError):
        run.finish(lambda iteration: iteration == 2)
    assert (run.folder / LAST_GOOD).exists()
    assert run.candidates == ["00000004.arrow", "00000006.arrow"]
    monkeypatch.setattr(Drifting, "step", step)
    run.finish(lambda iteration: False)
    assert run.result() == reference


def test_the_cost_of_validations_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a run holds that of each validation once, whether it joined early or at the end."""
    write = Candidates.write_result
    cost = Spent(gpu_seconds=1000.0)
    monkeypatch.setattr(
        Candidates, "write_result", lambda self, iteration, found, error, _: write(self, iteration, found, error, cost)
    )
    run = Run(tmp_path)
    run.finish(lambda iteration: iteration < 6, lambda tasks: tasks.extend(tasks[:]))
    assert (run.folder / COST).exists()
    assert read_cost(run.folder).gpu_seconds == 1000 * len(DUE)


def test_a_candidate_is_a_set_like_any_other(tmp_path: Path) -> None:
    """A candidate can be loaded, and has the rows of the set at its iteration."""
    run = Run(tmp_path)
    for event in run.events():
        if isinstance(event, More):
            break
    whole = load(str(tmp_path / "tiny" / CANDIDATES / "00000002.arrow"))
    rows = Candidates(run.folder).read(2, distill.Rows(3, 5), torch.device("cpu"))
    assert torch.equal(rows.images, whole.images[3:5])
    assert torch.equal(rows.labels, whole.labels[3:5])
    assert whole.provenance["dataset"] == "digits"


def test_networks_of_a_validation_get_the_layout_of_scored_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that validate are moved to their device as other networks are, and keep the layout that they get."""
    placed, config = list[nn.Module](), tiny_config("distill.validation_seeds=2")

    def place(network: nn.Module, device: torch.device, cluster: ClusterConfig) -> nn.Module:
        assert (device.type, cluster) == ("cpu", config.cluster)
        placed.append(network.to(memory_format=torch.channels_last))
        return placed[-1]

    monkeypatch.setattr(validation, "network_on", place)
    monkeypatch.setattr(validation, "PROTOCOLS", {name: replace(each, epochs=1) for name, each in PROTOCOLS.items()})
    images, labels = torch.rand(10, 1, 8, 8), torch.arange(10)
    whole = SyntheticSet(images, torch.eye(10), torch.tensor([0.01]), labels)
    *_, last = validation.validating(config, dataset(), whole, torch.device("cpu"))
    assert 0 <= last.values["validation"] <= 1
    assert len(placed) == 2
    weights = [each for network in placed for each in network.parameters() if each.dim() == 4 and each.shape[1] > 1]
    assert weights
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in weights)


def test_a_request_to_stop_keeps_the_results_of_the_validations_before(
    reference: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a stop among several open validations, only those without a result are made again."""
    run, calls = Run(tmp_path), list[int]()
    for event in run.events():
        if isinstance(event, Progress) and event.done == 5:
            break

    def asked_in_the_second(*arguments: Any) -> Iterator[Progress]:
        calls.append(len(calls))
        if len(calls) == 2:
            assert ask()
        return scored(*arguments)

    monkeypatch.setattr(distill, "validating", asked_in_the_second)
    with pytest.raises(Interrupted, match=r"iteration \d of 9"):
        list(run.events(apart=False))
    assert len(calls) == 2
    list(run.events(apart=False))
    assert len(calls) == 1 + len(DUE)
    assert run.result() == reference
