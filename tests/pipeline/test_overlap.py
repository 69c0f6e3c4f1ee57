"""Tests that stages overlap without changing a result: validation beside distillation, evaluation beside both."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datm_ray import pipeline as pipeline_module
from datm_ray.config import RunConfig
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline, preview, tasks
from datm_ray.runtime.executor import Event, Finished, More, SerialExecutor, Started, Task
from datm_ray.stages.distill.task import DistillWorker
from datm_ray.stages.distill.validation import CANDIDATES, is_apart
from datm_ray.stages.experts.progress import read_stacks
from datm_ray.store.files.filesystem import open_location
from datm_ray.store.tensors import read_tensors
from tests.conftest import run_here, tiny_config

QUIET = Reporter(quiet=True)


class Interleaved(SerialExecutor):
    """Several workers in this process, which take turns after every event."""

    def __init__(self, workers: int = 2, *, waits: bool = False, stop_after: int = -1) -> None:
        """Start workers.

        Args:
            waits: True if validations start when nothing else runs or waits, the last one first.
            stop_after: number of events after which the command ends as if killed; -1 for never.
        """
        super().__init__(tiny_config().cluster)
        self.workers = self.light_workers = workers
        self._waits, self._left = waits, stop_after
        self.seen: list[tuple[Task, Event]] = []
        self.shared = 0
        self.stages: list[str] = []
        """Method of the tasks of each stage that had any."""

    def share(self, value: Any) -> Any:
        """Count the values that are shared."""
        self.shared += 1
        return value

    def run(self, worker: Any, setup: Any, method: str, tasks: list[Task]) -> Iterator[tuple[Task, Event]]:
        """Run tasks, one step of each at a time."""
        self.stages.append(method)
        running: list[tuple[Task, Iterator[Event]]] = []
        taken: list[Task] = []
        while running or len(taken) < len(tasks):
            waiting = [task for task in tasks if task not in taken]
            if self._waits:
                others = [task for task in waiting if task.method != "validate"]
                waiting = others if others or running else waiting[::-1]
            for task in waiting[: self.workers - len(running)]:
                taken.append(task)
                running.append((task, getattr(worker(*setup), task.method or method)(*task.arguments)))
                yield from self._pass(task, Started())
            for each in running[:]:
                event = next(each[1])
                if isinstance(event, Finished):
                    running.remove(each)
                yield from self._pass(each[0], event)

    def _pass(self, task: Task, event: Event) -> Iterator[tuple[Task, Event]]:
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        self.seen.append((task, event))
        yield task, event


def run_all(executor: Interleaved, out: Path, *configs: RunConfig, reporter: Reporter = QUIET) -> Pipeline:
    pipeline = Pipeline(configs, str(out))
    pipeline.run_all(lambda: executor, reporter)
    return pipeline


def assert_same(out: Path, reference: Path, name: str = "tiny") -> None:
    """Assert that two runs have the same set, chosen at the same iteration, curves, and accuracies."""
    for file, kind in (("synthetic.arrow", "synthetic-set"), ("checkpoint.arrow", "checkpoint")):
        one, other = (read_tensors(open_location(str(each / name / file)), kind=kind) for each in (out, reference))
        for metadata in (one.metadata, other.metadata):
            metadata.pop("parts", None)  # named after their attempts
        assert one.metadata == other.metadata
        assert one.arrays.keys() == other.arrays.keys()
        for key, array in one.arrays.items():
            assert np.array_equal(array, other.arrays[key], equal_nan=array.dtype.kind == "f"), key
    summaries = (
        pipeline_module.summaries(pipeline.out, pipeline.configs)
        for pipeline in (Pipeline([tiny_config()], str(each)) for each in (out, reference))
    )
    (one,), (other,) = summaries
    assert {score.row: score.accuracies for score in one.scores} == {s.row: s.accuracies for s in other.scores}
    assert not (out / name / CANDIDATES).exists()


def starts_of(executor: Interleaved, method: str) -> list[int]:
    """Places of the starts of a method's tasks among all events."""
    return [
        at for at, (task, event) in enumerate(executor.seen) if isinstance(event, Started) and task.method == method
    ]


def with_experts(finished_run: Path, out: Path) -> Path:
    """Copy the experts of a finished run."""
    shutil.copytree(finished_run / "experts", out / "experts")
    return out


@pytest.mark.parametrize("waits", [False, True])
def test_validation_beside_the_distillation_changes_no_result(
    waits: bool, tmp_path: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validations as tasks, early or last, leave the set and curves of a run that waits; the stage ends with them."""
    executor = Interleaved(waits=waits)
    run_all(executor, with_experts(finished_run, tmp_path), tiny_config(), reporter=Reporter())
    assert len(starts_of(executor, "validate")) == 2
    assert_same(tmp_path, finished_run)
    assert capsys.readouterr().err.count("Distillation: done in") == 1
    assert executor.shared == 1  # for all stages


@pytest.mark.slow
@pytest.mark.parametrize("waits", [False, True])
def test_a_command_killed_at_any_event_ends_with_the_same_set(waits: bool, tmp_path: Path, finished_run: Path) -> None:
    """A command with validations apart, killed again and again after a few events, ends with the same bits."""
    stops = 0
    while stops < 30:
        with suppress(KeyboardInterrupt):
            run_all(Interleaved(waits=waits, stop_after=13), tmp_path, tiny_config())
            break
        stops += 1
    assert 3 <= stops < 30
    assert_same(tmp_path, finished_run)


def test_one_process_finishes_what_several_workers_have_started(
    tmp_path: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The serial executor takes up open validations of a command on several workers when all iterations are done."""
    monkeypatch.setattr(DistillWorker, "validate", killed)
    with_experts(finished_run, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_all(Interleaved(waits=True), tmp_path, tiny_config())
    monkeypatch.undo()
    assert len(list((tmp_path / "tiny" / CANDIDATES).iterdir())) == 2
    run_here(tmp_path, tiny_config())
    assert_same(tmp_path, finished_run)


def killed(*_: Any) -> Iterator[Event]:
    raise KeyboardInterrupt


def test_a_finished_set_is_evaluated_while_others_are_distilled(tmp_path: Path, finished_run: Path) -> None:
    """With several workers, a set's rows are scored before another set is finished, each once, the longest first."""
    with_experts(finished_run, tmp_path)
    short, long = tiny_config(), tiny_config("name=long", "distill.iterations=60", "distill.validate_every=60")
    executor = Interleaved(workers=3)
    pipeline = run_all(executor, tmp_path, short, long)
    ends = [at for at, (task, event) in enumerate(executor.seen) if task.name == "long" and isinstance(event, Finished)]
    before = [executor.seen[at][0] for at in starts_of(executor, "evaluate") if at < ends[0]]
    assert {task.run for task in before} == {"tiny"}
    assert len(before) == 8
    assert [task.weight for task in before] == sorted((task.weight for task in before), reverse=True)
    results = [executor.seen[at][0].arguments[3] for at in starts_of(executor, "evaluate")]
    assert len(results) == len(set(results)) == 10  # all real data and both random rows are shared
    assert executor.stages == ["distill"]  # the last set's rows join those that are being scored
    assert_same(tmp_path, finished_run)
    assert preview.remaining(pipeline.runs) == {title: (0, []) for title in preview.remaining(pipeline.runs)}


def test_a_task_that_is_made_again_runs_once_on_the_worker_class_of_the_pipeline(
    tmp_path: Path, finished_run: Path
) -> None:
    """A task made again, as after a lost worker, runs once; a benchmark's own worker class distils and validates."""
    called = []

    class Repeating(Interleaved):
        def _pass(self, task: Task, event: Event) -> Iterator[tuple[Task, Event]]:
            yield from super()._pass(task, event)
            if isinstance(event, More):
                yield task, event

    class Other(DistillWorker):
        def distill(self, *arguments: Any, **options: Any) -> Iterator[Event]:
            called.append("distill")
            yield from super().distill(*arguments, **options)

        def validate(self, *arguments: Any) -> Iterator[Event]:
            called.append("validate")
            yield from super().validate(*arguments)

    class WithOther(Pipeline):
        distill_worker = Other

    config = tiny_config()
    WithOther([config], str(with_experts(finished_run, tmp_path))).distill(Repeating, QUIET)
    assert called == ["distill", "validate", "validate"]


def test_sets_are_validated_apart_where_workers_would_wait_or_are_free() -> None:
    """A set in several workers is validated apart; others if workers are left; never on one worker."""
    cases = {(1, 1, 1): False, (2, 2, 1): False, (1, 1, 2): True, (1, 2, 2): False, (2, 2, 2): True, (2, 8, 4): True}
    assert {case: is_apart(*case) for case in cases} == cases


def test_another_number_of_workers_resumes_the_same_stacks(tmp_path: Path) -> None:
    """Experts are divided among all workers; a resumed command keeps the stacks, and none is noted at the end."""
    config = tiny_config("experts.count=12")
    runs = Pipeline([config], str(tmp_path)).runs
    sizes = {workers: [len(task.arguments[2]) for task in tasks.expert_tasks(runs, workers)] for workers in (1, 5, 6)}
    assert sizes == {1: [8, 4], 5: [3, 3, 2, 2, 2], 6: [2] * 6}
    with pytest.raises(KeyboardInterrupt):
        run_all(Interleaved(workers=5, stop_after=14), tmp_path, config)
    group = runs.experts(config)
    assert [len(stack) for stack in read_stacks(group)] == sizes[5]
    missing = set(runs.missing_experts(config))
    resumed = [task.arguments[2] for task in tasks.expert_tasks(runs, 64)]
    assert resumed == [stack for stack in read_stacks(group) if missing & set(stack)]
    run_here(tmp_path, config, stage="train_experts")
    assert read_stacks(group) == []
    assert not group.progress.list()
