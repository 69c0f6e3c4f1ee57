"""Tests metrics: names that Prometheus recommends, and samples that follow from events."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from datm_ray.config import ClusterConfig
from datm_ray.monitor.metrics import CATALOGUE, REASONS, Readings, Sample, reason_kind
from datm_ray.monitor.progress import Reporter
from datm_ray.monitor.spent import Account
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.create import create_executor
from datm_ray.runtime.executor import (
    Event,
    Failed,
    Finished,
    Lost,
    Note,
    Phase,
    Progress,
    SerialExecutor,
    Started,
    Task,
)
from datm_ray.store.files.filesystem import open_location
from tests.conftest import tiny_config

BYTES = "datm_ray_store_read_bytes_total"
TASK = Task("digits", (), size=2, run="a run", stage="distillation")


def values(samples: Sequence[Sample], name: str) -> list[float]:
    return [sample.value for sample in samples if sample.name == f"datm_ray_{name}"]


def total(readings: Readings, events: Sequence[tuple[Event, int]], name: str) -> float:
    """Sum of a counter over the events of the task."""
    return sum(sum(values(readings.take(TASK, event, rank), name)) for event, rank in events)


def read(count: float, done: int = 1) -> Progress:
    return Progress(done, 10, metrics={BYTES: count})


@pytest.mark.parametrize("name", CATALOGUE)
def test_names_are_as_prometheus_recommends(name: str) -> None:
    """Names are lower case, end in a spelled-out unit, and in `_total` for counters only."""
    metric = CATALOGUE[name]
    assert re.fullmatch(r"datm_ray(_[a-z]+)+", name)
    assert name.endswith("_total") == (metric.kind == "counter")
    if unit := {"1/second": "per_second"}.get(metric.unit, metric.unit):
        assert name.removesuffix("_total").endswith(unit)
    assert metric.description
    assert bool(metric.boundaries) == (metric.kind == "histogram")
    assert metric.kind == "gauge" or "task" not in metric.tags, "a series for ever, for every task of a large run"


def test_a_worker_sums_are_counted_once() -> None:
    """Sums reported by a worker are exported by their growth, also at the end of the task."""
    readings = Readings()
    readings.begin([TASK], workers=2)
    events: list[tuple[Event, int]] = [(read(10.0), 0), (read(10.0), 0), (read(25.0), 0)]
    events += [(Finished(metrics={BYTES: 30.0}), 0)]
    assert total(readings, events, "store_read_bytes_total") == 30.0


def test_every_worker_of_a_task_counts_and_one_is_shown() -> None:
    """Sums count every worker of a task; gauges and finished tasks are the first worker's."""
    readings = Readings()
    readings.begin([TASK], workers=2)
    events: list[tuple[Event, int]] = [(read(10.0), 0), (read(7.0), 1), (read(12.0), 0), (read(9.0), 1)]
    assert total(readings, events, "store_read_bytes_total") == 21.0
    assert readings.take(TASK, Finished(metrics={BYTES: 11.0}), 1) == [
        Sample(BYTES, 2.0, {"run": "a run", "stage": "distillation"})
    ]
    assert total(readings, [(Finished(), 0)], "tasks_finished_total") == 1.0


@pytest.mark.parametrize("first", [5.0, 50.0])
def test_a_new_worker_begins_from_nothing(first: float) -> None:
    """After a loss the next worker's sums count in full, smaller or larger than before."""
    readings = Readings()
    readings.begin([TASK], workers=2)
    events: list[tuple[Event, int]] = [(read(20.0), 0), (Lost("node died", 1), 0), (read(first), 0)]
    assert total(readings, events, "store_read_bytes_total") == 20.0 + first


def test_sums_that_shrink_without_a_word_are_a_new_worker_too() -> None:
    """Shrinking sums mean an unreported new worker, so nothing counts twice or negatively."""
    readings = Readings()
    assert total(readings, [(read(20.0), 0), (read(5.0), 0), (read(6.0), 0)], "store_read_bytes_total") == 26.0


def test_a_loss_is_exported_with_its_reason() -> None:
    """A loss is exported as one lost worker, with its reason as a label, and one retry."""
    readings = Readings()
    readings.begin([TASK], workers=2)
    lost = readings.take(TASK, Lost("The actor's node has died: preempted", 1))
    tags = {"run": "a run", "stage": "distillation"}
    assert Sample("datm_ray_workers_lost_total", 1.0, {**tags, "reason": "node"}) in lost
    assert Sample("datm_ray_task_retries_total", 1.0, tags) in lost
    final = readings.take(TASK, Lost("killed", 2, is_retried=False))
    assert values(final, "workers_lost_total") == [1]
    assert values(final, "task_retries_total") == []


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("Worker unexpectedly exits with a connection error code 2. End of file.", "process"),
        ("The actor died because its node has died. Node Id: 3f", "node"),
        ("Task was killed due to the node running low on memory.", "memory"),
        ("worker 1 of 2 lost its peers: Connection closed by peer", "peer"),
        ("no heartbeat for 300 s", "timeout"),
        ("something else", "other"),
    ],
)
def test_reasons_have_few_values(reason: str, kind: str) -> None:
    """Reasons of losses have few values, because each is a time series."""
    assert reason_kind(reason) == kind
    assert kind in {*REASONS, "other"}


def test_workers_wanted_and_at_work_follow_the_tasks() -> None:
    """Wanted workers are those that open tasks could use; working ones have reported and are not lost."""
    other = Task("more digits", (), size=2, run="another", stage="distillation")
    readings = Readings()
    seen = [readings.begin([TASK, other], workers=3)]
    assert readings.take(TASK, Started()) == []  # its worker may not be there yet
    seen += [readings.take(TASK, event) for event in (Note("compiled"), Progress(1, 2, metrics=_mesh(2)))]
    seen += [readings.take(other, Progress(1, 2, metrics=_mesh(2))), readings.take(TASK, Lost("died", 1))]
    seen += [readings.take(TASK, Progress(1, 2, metrics=_mesh(1))), readings.take(TASK, Finished())]
    seen += [readings.take(other, Finished()), readings.add([Task("added", ())])]
    assert [values(samples, "workers_wanted") for samples in seen] == [[3], [3], [3], [3], [3], [3], [2], [0], [1]]
    assert [values(samples, "workers_at_work") for samples in seen] == [[0], [1], [2], [4], [2], [3], [2], [0], [0]]


def test_a_task_that_waits_or_has_failed_has_no_workers_at_work() -> None:
    """A waiting task, not started or started before a loss, has no worker at work, whatever the driver reports."""
    readings = Readings()
    seen = [readings.begin([TASK], workers=3), readings.take(TASK, Phase("starting workers"))]
    readings.take(TASK, Started())
    seen += [readings.take(TASK, event) for event in (Phase("compiling"), Lost("died", 1), Note("no worker is free"))]
    readings.take(TASK, Started())
    seen += [readings.take(TASK, event) for event in (Progress(1, 2), Failed("it cannot work", running=1))]
    assert [values(samples, "workers_at_work") for samples in seen] == [[0], [0], [1], [0], [0], [1], [0]]
    assert values(seen[-1], "workers_wanted") == [0]
    readings.take(TASK, Started())
    readings.take(TASK, Progress(1, 2))
    assert values(readings.release(TASK), "workers_at_work") == [0]
    assert values(readings.take(TASK, Note("waiting for nodes")), "workers_at_work") == [0]


def _mesh(workers: int) -> dict[str, float]:
    return {"datm_ray_mesh_workers": float(workers)}


def test_a_mesh_that_changes_its_size_is_counted() -> None:
    """A mesh that shrinks from two workers and grows again counts once each; an equal size counts nothing."""
    readings, found = Readings(), Counter[str]()
    readings.begin([TASK], workers=2)
    for workers in (2, 2, 1, 1, 2):
        for event in (Progress(1, 2, metrics=_mesh(workers)), Lost("died", 1)):
            samples = readings.take(TASK, event)
            found.update(one.tags["change"] for one in samples if one.name == "datm_ray_mesh_rebuilt_total")
    assert found == {"smaller": 1, "grown": 1}


def test_gauges_are_repeated_until_their_task_is_finished() -> None:
    """Gauges are repeated until their task ends, because Ray drops those that are not set again."""
    readings = Readings()
    readings.begin([TASK], workers=2)
    metrics = {"datm_ray_distill_matching_loss": 0.5, "datm_ray_distill_step_size": math.nan, "of tomorrow": 1.0}
    readings.take(TASK, Progress(1, 4, metrics=metrics))
    readings.take(TASK, Progress(2, 4))
    tags = {"run": "a run", "stage": "distillation", "task": "digits"}
    assert [sample for sample in readings.gauges() if "task" in sample.tags] == [
        Sample("datm_ray_distill_matching_loss", 0.5, tags),
        Sample("datm_ray_task_done_ratio", 0.5, tags),
    ]
    readings.take(TASK, Finished())
    assert [sample for sample in readings.gauges() if "task" in sample.tags] == []


def test_an_account_measures_from_where_it_began(tmp_path: Path) -> None:
    """An account's metrics leave out earlier reads, also after a lap, and its memory is this process's peak."""
    file = open_location(str(tmp_path / "file"))
    file.write_atomic(b"x" * 100)
    account = Account(torch.device("cpu"), ClusterConfig())
    file.read_bytes()
    account.lap()
    measured = account.metrics()
    assert (measured["datm_ray_store_reads_total"], measured[BYTES]) == (1, 100)
    assert measured["datm_ray_store_write_bytes_total"] == 0
    assert 2**20 < measured["datm_ray_worker_memory_bytes"] < 2**40
    assert set(measured) <= set(CATALOGUE)


class Recording(SerialExecutor):
    """A reporter that keeps all events."""

    def __init__(self, cluster: ClusterConfig) -> None:
        super().__init__(cluster)
        self.seen: list[tuple[Task, Event]] = []

    def run(self, *arguments: Any, **more: Any) -> Iterator[tuple[Task, Event]]:
        for event in super().run(*arguments, **more):
            self.seen.append(event)
            yield event


def test_a_run_exports_everything_in_the_catalogue(tmp_path: Path) -> None:
    """A real run with MetaDD exports every metric except faults, with run, stage and value."""
    auxiliary = "metadd={auxiliaries: [{architecture: lenet, width: 16}], experts: {epochs: 1, momentum: 0.0}}"
    config = tiny_config(auxiliary, "experts.test_every=1")
    executor = Recording(config.cluster)
    Pipeline([config], str(tmp_path)).run_all(lambda: executor, Reporter(quiet=True))
    readings, samples = Readings(), list[Sample]()
    for task, event in executor.seen:
        unknown = set(getattr(event, "metrics", {})) - set(CATALOGUE)
        assert unknown == set()
        samples += readings.take(task, event)
    of_faults = {"datm_ray_workers_lost_total", "datm_ray_task_retries_total", "datm_ray_mesh_rebuilt_total"}
    of_faults |= {"datm_ray_store_retries_total"}
    assert set(CATALOGUE) - {sample.name for sample in samples} == of_faults
    assert {sample.tags["stage"] for sample in samples} == {"experts", "distillation", "evaluation"}
    assert {sample.tags["run"] for sample in samples if "run" in sample.tags} == {"tiny"}
    assert not [tag for sample in samples for tag in sample.tags.values() if str(tmp_path) in tag], (
        "places stay private"
    )
    # Steps of two experts, and of an auxiliary with its companion.
    assert sum(values(samples, "expert_epochs_total")) == 5 * 2 + 1 * 2
    assert sum(values(samples, "distill_iterations_total")) == 6
    assert values(samples, "distill_iteration") == [1, 2, 3, 4, 5, 6]
    assert set(values(samples, "distill_upper_bound")) == {3}
    assert all(0 < rate < 1e9 for rate in values(samples, "distill_images_per_second"))
    assert sum(values(samples, "tasks_finished_total")) == len({task.name for task, _ in executor.seen})
    written = sum(values(samples, "store_write_bytes_total"))
    assert written >= sum(file.stat().st_size for file in tmp_path.rglob("expert-*.arrow"))


class Measurer:
    """A worker that reports the given measurements."""

    def work(self, name: str, value: float) -> Iterator[Event]:
        yield Progress(1, 2, metrics={name: value})
        yield Finished(metrics={name: 2 * value})


@pytest.mark.ray
def test_ray_gets_the_metrics_of_events(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gets gauges, counters and histograms with their tags; gauges are set again while idle."""
    exported: list[tuple[str, str, float, dict[str, str]]] = []
    for kind, method in (("Gauge", "set"), ("Counter", "inc"), ("Histogram", "observe")):
        monkeypatch.setattr(
            f"ray.util.metrics.{kind}.{method}",
            lambda self, value, tags, kind=kind: exported.append((kind, self._name, value, tags)),
        )
    metrics = ["datm_ray_distill_matching_loss", BYTES, "datm_ray_distill_iteration_seconds"]
    tasks = [Task(name, (name, 2.0), run="a run", stage="distillation") for name in metrics]
    executor = create_executor("ray", ClusterConfig(workers=1))
    events = executor.run(Measurer, (), "work", tasks)
    tags = {"run": "a run", "stage": "distillation"}
    assert [next(events)[1] for _ in range(2)] == [Phase("starting workers"), Started()]
    next(events)
    loss = ("Gauge", metrics[0], 2.0, {**tags, "task": metrics[0]})
    assert exported.count(loss) == 1
    executor.metrics.refresh()
    assert exported.count(loss) == 2
    list(events)
    assert exported.count(("Counter", BYTES, 2.0, tags)) == 2
    assert exported.count(("Histogram", metrics[2], 2.0, tags)) == 1
    assert ("Gauge", "datm_ray_workers_wanted", 1.0, {"stage": "distillation"}) in exported
    executor.metrics.close()
    assert not executor.metrics._thread.is_alive()
