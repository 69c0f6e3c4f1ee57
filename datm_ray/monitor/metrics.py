"""Catalogue of a run's metrics, and the translation of events into samples.

Workers put measurements into `Progress.metrics`, under names of the catalogue. They know no monitoring system.
`Readings` turns an executor's events into samples, and `runtime/ray/metrics.py` exports these. Events also show which
tasks run, so lost workers, smaller groups and busy workers are metrics too.

A gauge belongs to a running task. Counters and histograms are sums over all workers and not split by task: a run may
have thousands of tasks, and each one would stay a time series for ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from datm_ray.runtime.executor import Event, Failed, Finished, Lost, Progress, Started, Task

Kind = Literal["gauge", "counter", "histogram"]

TASK, STAGE = ("run", "stage", "task"), ("run", "stage")
"""TASK: tags of a gauge's time series. STAGE: tags of a counter's or histogram's time series."""


@dataclass(frozen=True)
class Metric:
    """Definition of one metric: kind, unit, description and tags."""

    kind: Kind
    unit: str
    """Base unit as in Prometheus, such as "seconds", "bytes" or "ratio"; "" for counts and numbers without a unit."""
    description: str
    tags: tuple[str, ...] = TASK
    boundaries: tuple[float, ...] = ()
    """Inclusive upper bounds of a histogram's buckets."""


def _gauge(unit: str, description: str, tags: tuple[str, ...] = TASK) -> Metric:
    return Metric("gauge", unit, description, tags)


def _counter(unit: str, description: str, *more_tags: str) -> Metric:
    return Metric("counter", unit, description, (*STAGE, *more_tags))


CATALOGUE: dict[str, Metric] = {
    # --- every stage ---
    "datm_ray_task_done_ratio": _gauge("ratio", "Completed share of a task, from 0 to 1"),
    "datm_ray_tasks_finished_total": _counter("", "Finished tasks"),
    "datm_ray_workers_wanted": _gauge(
        "", "Workers that the unfinished tasks can use, at most those that the cluster can hold", ("stage",)
    ),
    "datm_ray_workers_at_work": _gauge(
        "", "Workers of tasks that have sent an event since their last start", ("stage",)
    ),
    "datm_ray_worker_memory_bytes": _gauge(
        "bytes", "Peak memory since the task started, of the worker's GPU if it has one, else of its process"
    ),
    # --- experts ---
    "datm_ray_expert_epoch": _gauge("", "Finished epochs of a stack of experts"),
    "datm_ray_expert_loss": _gauge("", "Training loss, mean over the stack"),
    "datm_ray_expert_accuracy_ratio": _gauge(
        "ratio", "Test accuracy in epochs chosen by experts.test_every, mean over the stack"
    ),
    "datm_ray_expert_images_per_second": _gauge("1/second", "Training images per second, summed over the stack"),
    "datm_ray_expert_epochs_total": _counter("", "Finished epochs, summed over single experts"),
    # --- distillation ---
    "datm_ray_distill_iteration": _gauge("", "Finished iterations"),
    "datm_ray_distill_matching_loss": _gauge(
        "", "Loss of the method; for trajectories, the normalised loss of the first backbone"
    ),
    "datm_ray_distill_step_size": _gauge("", "The student's learned step size, for the first backbone"),
    "datm_ray_distill_skipped_steps": _gauge(
        "", "Updates skipped so far: loss above the threshold, or value not finite"
    ),
    "datm_ray_distill_shortened_steps": _gauge("", "Gradients shortened by the gradient limit so far"),
    "datm_ray_distill_start_epoch": _gauge("", "Expert epoch from which the student starts"),
    "datm_ray_distill_upper_bound": _gauge("", "Exclusive upper bound of the start epoch at this iteration"),
    "datm_ray_distill_images_per_second": _gauge(
        "1/second", "Synthetic images per second through the student, summed over workers"
    ),
    "datm_ray_distill_validation_accuracy_ratio": _gauge("ratio", "Validation accuracy of networks trained on the set"),
    "datm_ray_distill_iterations_total": _counter("", "Computed iterations, including those repeated after a fault"),
    "datm_ray_distill_iteration_seconds": Metric(
        "histogram",
        "seconds",
        "Duration of an iteration, without validation and checkpoints",
        STAGE,
        (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
    ),
    # --- MetaDD ---
    "datm_ray_metadd_loss": _gauge("", "MetaDD's loss, weighted sum"),
    "datm_ray_metadd_variance": _gauge("", "Unweighted MetaDD term: variance of the maps"),
    "datm_ray_metadd_invariance": _gauge("", "Unweighted MetaDD term: cross-entropy and divergence of the auxiliaries"),
    "datm_ray_metadd_position": _gauge("", "Unweighted MetaDD term: evidence against the class"),
    "datm_ray_metadd_feature_ratio": _gauge(
        "ratio", "Pixels that all MetaDD networks attend to, divided by those that any attends to"
    ),
    # --- evaluation ---
    "datm_ray_evaluate_validation_accuracy_ratio": _gauge("ratio", "Validation accuracy of the last network trained"),
    # --- store ---
    "datm_ray_store_reads_total": _counter("", "Requests that read file content"),
    "datm_ray_store_read_bytes_total": _counter("bytes", "Bytes read"),
    "datm_ray_store_read_seconds_total": _counter("seconds", "Duration of reads"),
    "datm_ray_store_writes_total": _counter("", "Files written"),
    "datm_ray_store_write_bytes_total": _counter("bytes", "Bytes written"),
    "datm_ray_store_write_seconds_total": _counter("seconds", "Duration of writes"),
    "datm_ray_store_looks_total": _counter("", "Requests without content: exists, size, list, delete"),
    "datm_ray_store_look_seconds_total": _counter("seconds", "Duration of requests without content"),
    "datm_ray_store_retries_total": _counter("", "S3 requests sent again after an error"),
    # --- faults ---
    "datm_ray_workers_lost_total": _counter("", "Lost workers, by reason", "reason"),
    "datm_ray_task_retries_total": _counter("", "Tasks started again after a lost worker"),
    "datm_ray_mesh_workers": _gauge("", "Workers that run the task together"),
    "datm_ray_mesh_rebuilt_total": _counter("", "Tasks resumed with fewer or more workers", "change"),
}
"""Every metric by its name. Ray prefixes the name with `ray_`."""


REASONS: dict[str, tuple[str, ...]] = {
    "memory": ("running low on memory", "out of memory", "oom"),
    "node": ("node has died", "node was", "node died", "node failure", "preempt", "drain", "unreachable"),
    "timeout": ("timed out", "timeout", "heartbeat"),
    "peer": ("lost its peers",),
    "process": ("exit", "died", "dead", "killed", "connection error"),
}
"""Words in the text of a lost worker's reason, by kind of reason. The first kind with a matching word counts."""


def reason_kind(reason: str) -> str:
    """Kind of reason why a worker was lost: a key of `REASONS`, or "other"."""
    text = reason.lower()
    return next((kind for kind, words in REASONS.items() if any(word in text for word in words)), "other")


@dataclass(frozen=True)
class Sample:
    """One value of a metric: a gauge's value, a counter's increase, or a histogram's observation."""

    name: str
    value: float
    tags: Mapping[str, str]


@dataclass
class _Observed:
    """State of a task that has sent an event, and has neither finished nor failed."""

    task: Task
    workers: int = 0
    """Size of the task's worker group at its last `Progress`; 0 before the first `Progress`."""
    has_started: bool = False
    """True if the task has workers, which have started. Without them, its events come from the driver."""
    at_work: bool = False
    sums: dict[tuple[int, str], float] = field(default_factory=dict)
    """(rank of a worker, name of a counter) -> last value that the worker sent."""
    gauges: dict[str, float] = field(default_factory=dict)


class Readings:
    """Translation of one executor's events into samples, without a clock and without Ray.

    The time for one event does not depend on the number of tasks that wait or have finished.
    """

    def __init__(self) -> None:
        self._stage = ""
        self._workers = 0
        self._open = 0
        """Number of workers that all unfinished tasks together can use."""
        self._observed: dict[str, _Observed] = {}

    def begin(self, tasks: Sequence[Task], workers: int) -> list[Sample]:
        """Start a call of `Executor.run`. Returns samples of the numbers of wanted and of busy workers.

        Tasks of earlier calls that have not finished are forgotten.

        Args:
            tasks: tasks of the call, all of one stage.
            workers: highest number of workers that run at the same time.
        """
        self._stage = tasks[0].stage if tasks else self._stage
        self._workers, self._open = workers, 0
        self._observed = {}
        return self.add(tasks)

    def add(self, tasks: Sequence[Task]) -> list[Sample]:
        """Add tasks to the current stage. Returns samples of the numbers of wanted and of busy workers."""
        self._open += sum(task.size for task in tasks)
        return list(self._worker_counts())

    def take(self, task: Task, event: Event, rank: int = 0) -> list[Sample]:
        """Translate a task's event into samples of metrics.

        Args:
            task: task of the event.
            event: event of one worker.
            rank: rank of that worker, its number in the task's group. From ranks above 0 only counters are taken. The
                caller passes all events of these ranks before the `Finished` of rank 0.
        """
        self._stage = task.stage
        observed = self._observed.setdefault(task.name, _Observed(task))
        if isinstance(event, Started):  # not at work yet: the worker may install packages first
            observed.has_started = True
            return []
        measured = event.metrics if isinstance(event, Progress | Finished) else {}
        known = {name: value for name, value in measured.items() if name in CATALOGUE and math.isfinite(value)}
        samples = list(_increases(observed, known, rank))
        if rank:
            return samples
        if isinstance(event, Progress):
            samples += _progress(observed, event, known)
        observed.at_work = observed.has_started or isinstance(event, Progress)
        if isinstance(event, Lost):
            self._observed[task.name] = _Observed(task, observed.workers)
            samples.append(_sample("datm_ray_workers_lost_total", 1.0, task, reason=reason_kind(event.reason)))
            if event.is_retried:
                samples.append(_sample("datm_ray_task_retries_total", 1.0, task))
        elif isinstance(event, Finished | Failed):
            del self._observed[task.name]
            self._open -= task.size
            if isinstance(event, Finished):
                samples.append(_sample("datm_ray_tasks_finished_total", 1.0, task))
        return [*samples, *self._worker_counts()]

    def release(self, task: Task) -> list[Sample]:
        """Count a task as waiting again, because its workers are stopped. Returns samples of the numbers of workers."""
        if task.name in self._observed:
            observed = self._observed[task.name]
            observed.has_started = observed.at_work = False
        return list(self._worker_counts())

    def gauges(self) -> list[Sample]:
        """Current values of all gauges of unfinished tasks, and numbers of wanted and of busy workers."""
        of_tasks = [
            _sample(name, value, observed.task)
            for observed in self._observed.values()
            for name, value in observed.gauges.items()
        ]
        return [*of_tasks, *self._worker_counts()]

    def _worker_counts(self) -> Iterator[Sample]:
        """Yield the numbers of workers that unfinished tasks can use (at most all workers), and of those at work."""
        working = sum(observed.workers or 1 for observed in self._observed.values() if observed.at_work)
        tags = {"stage": self._stage}
        yield Sample("datm_ray_workers_wanted", float(max(0, min(self._workers, self._open))), tags)
        yield Sample("datm_ray_workers_at_work", float(working), tags)


def _increases(observed: _Observed, known: Mapping[str, float], rank: int) -> Iterator[Sample]:
    """Yield a sample for each counter in `known` that the worker of this rank has increased since its last event.

    A worker counts from 0. A smaller value than before comes from a new worker, so the whole value is the increase.
    """
    for name, value in known.items():
        if CATALOGUE[name].kind == "counter":
            before = observed.sums.get((rank, name), 0.0)
            observed.sums[rank, name] = value
            if increase := value - before if value >= before else value:
                yield _sample(name, increase, observed.task)


def _progress(observed: _Observed, event: Progress, known: Mapping[str, float]) -> Iterator[Sample]:
    """Yield samples of gauges and histograms from a progress event, and keep its gauges in `observed`.

    If the task's number of workers has changed, the last sample counts this change.

    Args:
        known: the event's measurements that are in the catalogue and finite.
    """
    for name, value in known.items():
        if CATALOGUE[name].kind == "gauge":
            observed.gauges[name] = value
        elif CATALOGUE[name].kind == "histogram":
            yield _sample(name, value, observed.task)
    observed.gauges["datm_ray_task_done_ratio"] = event.done / max(1, event.total)
    for name, value in observed.gauges.items():
        yield _sample(name, value, observed.task)
    workers = round(observed.gauges.get("datm_ray_mesh_workers", 1))
    if observed.workers not in (0, workers):
        change = "smaller" if workers < observed.workers else "grown"
        yield _sample("datm_ray_mesh_rebuilt_total", 1.0, observed.task, change=change)
    observed.workers = workers


def _sample(name: str, value: float, task: Task, **more: str) -> Sample:
    tags = {"run": task.run, "stage": task.stage, "task": task.name, **more}
    return Sample(name, float(value), {tag: tags[tag] for tag in CATALOGUE[name].tags})
