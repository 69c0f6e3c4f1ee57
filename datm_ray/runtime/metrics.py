"""What can be watched of a run: the catalogue of metrics, and the translation of events into it.

Workers measure and put what they have measured into `Progress.metrics`, under names of the catalogue; they know no
monitoring system. `Readings` turns the events of an executor into samples, which `ray_metrics` exports. What runs where
is known from the events too, so a lost worker, a smaller mesh and the workers at work are metrics like the others.

Gauges belong to a task that is at work. Counters and histograms do not, for a run may have thousands of tasks, each of
which would be a time series for ever; what they count is summed over all workers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from datm_ray.runtime.executor import Event, Finished, Lost, Progress, Task

Kind = Literal["gauge", "counter", "histogram"]

TASK, STAGE = ("run", "stage", "task"), ("run", "stage")
"""What tells the series of a gauge apart, and those of a counter."""


@dataclass(frozen=True)
class Metric:
    """One thing that can be watched."""

    kind: Kind
    unit: str
    """Base units, as Prometheus wants them: seconds, bytes, ratios; "" for what is counted or has none."""
    description: str
    tags: tuple[str, ...] = TASK
    boundaries: tuple[float, ...] = ()
    """Upper ends of a histogram's buckets."""


def _gauge(unit: str, description: str, tags: tuple[str, ...] = TASK) -> Metric:
    return Metric("gauge", unit, description, tags)


def _counter(unit: str, description: str, *more_tags: str) -> Metric:
    return Metric("counter", unit, description, (*STAGE, *more_tags))


CATALOGUE: dict[str, Metric] = {
    # --- every stage ---
    "datm_ray_task_done_ratio": _gauge("ratio", "How much of a task is done, from 0 to 1"),
    "datm_ray_tasks_finished_total": _counter("", "Tasks that were finished"),
    "datm_ray_workers_wanted": _gauge(
        "", "Workers that the open tasks could use, at most those there is room for", ("stage",)
    ),
    "datm_ray_workers_at_work": _gauge(
        "", "Workers at a task that has been heard of since it was given out", ("stage",)
    ),
    "datm_ray_worker_memory_bytes": _gauge(
        "bytes", "Peak memory of the worker since its task began: of its GPU where it has one, else of its process"
    ),
    # --- experts ---
    "datm_ray_expert_epoch": _gauge("", "Epochs done of a stack of experts"),
    "datm_ray_expert_loss": _gauge("", "Training loss, mean over the stack"),
    "datm_ray_expert_accuracy_ratio": _gauge(
        "ratio", "Accuracy on the test set where experts.test_every asks for it, mean over the stack"
    ),
    "datm_ray_expert_images_per_second": _gauge("1/second", "Training images, summed over the stack"),
    "datm_ray_expert_epochs_total": _counter("", "Epochs of single experts"),
    # --- distillation ---
    "datm_ray_distill_iteration": _gauge("", "Iterations done"),
    "datm_ray_distill_matching_loss": _gauge("", "Normalised matching loss of the first backbone"),
    "datm_ray_distill_step_size": _gauge("", "The student's learned step size, for the first backbone"),
    "datm_ray_distill_skipped_steps": _gauge(
        "", "Updates skipped so far: loss above the threshold, or value not finite"
    ),
    "datm_ray_distill_shortened_steps": _gauge("", "Gradients shortened so far because they promised too much"),
    "datm_ray_distill_start_epoch": _gauge("", "Expert epoch at which the student has started"),
    "datm_ray_distill_upper_bound": _gauge("", "First start epoch that may not be drawn yet"),
    "datm_ray_distill_images_per_second": _gauge("1/second", "Synthetic images through the student, all workers"),
    "datm_ray_distill_validation_accuracy_ratio": _gauge("ratio", "Of networks trained on the set, on validation data"),
    "datm_ray_distill_iterations_total": _counter("", "Iterations computed, those repeated after a fault included"),
    "datm_ray_distill_iteration_seconds": Metric(
        "histogram",
        "seconds",
        "Duration of an iteration, without validation and checkpoints",
        STAGE,
        (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0),
    ),
    # --- MetaDD ---
    "datm_ray_metadd_loss": _gauge("", "MetaDD's loss, weighted sum"),
    "datm_ray_metadd_variance": _gauge("", "Its variance of the maps, before its weight"),
    "datm_ray_metadd_invariance": _gauge("", "Its cross-entropy and divergence of the auxiliaries, before its weight"),
    "datm_ray_metadd_position": _gauge("", "Its evidence against the class, before its weight"),
    "datm_ray_metadd_feature_ratio": _gauge("ratio", "Pixels that all networks look at, of those that any looks at"),
    # --- evaluation ---
    "datm_ray_evaluate_validation_accuracy_ratio": _gauge("ratio", "Of the last network trained, on validation data"),
    # --- store ---
    "datm_ray_store_reads_total": _counter("", "Requests for content of files"),
    "datm_ray_store_read_bytes_total": _counter("bytes", "Content read"),
    "datm_ray_store_read_seconds_total": _counter("seconds", "Time that reads took"),
    "datm_ray_store_writes_total": _counter("", "Files written"),
    "datm_ray_store_write_bytes_total": _counter("bytes", "Content written"),
    "datm_ray_store_write_seconds_total": _counter("seconds", "Time that writes took"),
    "datm_ray_store_looks_total": _counter("", "Requests without content: does it exist, what is there, delete"),
    "datm_ray_store_look_seconds_total": _counter("seconds", "Time that those took"),
    "datm_ray_store_retries_total": _counter("", "Messages to S3 that had to be sent again"),
    # --- faults ---
    "datm_ray_workers_lost_total": _counter("", "Workers lost, by what they were lost to", "reason"),
    "datm_ray_task_retries_total": _counter("", "Times that a task was given to another worker"),
    "datm_ray_mesh_workers": _gauge("", "Workers that do a task together"),
    "datm_ray_mesh_rebuilt_total": _counter("", "Times that a task went on with fewer or more workers", "change"),
}
"""Every metric by its name; Ray puts `ray_` before it."""


REASONS: dict[str, tuple[str, ...]] = {
    "memory": ("running low on memory", "out of memory", "oom"),
    "node": ("node has died", "node was", "node died", "node failure", "preempt", "drain", "be reached"),
    "timeout": ("timed out", "timeout", "not answered"),
    "peer": ("lost its peers",),
    "process": ("exit", "died", "dead", "killed", "connection error"),
}
"""What a worker is lost to -> words by which that is told from the reason given, the first that fits."""


def reason_kind(reason: str) -> str:
    """What a worker was lost to, in one of the words of `REASONS`, or "other"."""
    text = reason.lower()
    return next((kind for kind, words in REASONS.items() if any(word in text for word in words)), "other")


@dataclass(frozen=True)
class Sample:
    """One value of a metric: the present one of a gauge, the increase of a counter, an observation of a histogram."""

    name: str
    value: float
    tags: Mapping[str, str]


@dataclass
class _Watched:
    """A task of which something was heard, and that is not finished."""

    task: Task
    workers: int = 0
    """As many as did it together when last heard of; 0 before that was told."""
    at_work: bool = True
    sums: dict[tuple[int, str], float] = field(default_factory=dict)
    """The counters as each of its workers last told them."""
    gauges: dict[str, float] = field(default_factory=dict)


class Readings:
    """Events in, samples out. One for each executor; knows no clock and no Ray.

    Takes the same time for an event however many tasks there are.
    """

    def __init__(self) -> None:
        self._stage = ""
        self._workers = 0
        self._open = 0
        """Workers that all unfinished tasks could use."""
        self._watched: dict[str, _Watched] = {}

    def begin(self, tasks: Sequence[Task], workers: int) -> list[Sample]:
        """A stage, or a part of one, begins.

        Args:
            workers: that may be at work at the same time.
        """
        self._stage = tasks[0].stage if tasks else self._stage
        self._workers, self._open = workers, sum(task.size for task in tasks)
        self._watched = {}
        return list(self._crews())

    def take(self, task: Task, event: Event, rank: int = 0) -> list[Sample]:
        """What an event says.

        Args:
            rank: of the worker, among those that do the task together. Of those above 0 only the counters are taken;
                all of theirs come before the `Finished` of rank 0.
        """
        self._stage = task.stage
        watched = self._watched.setdefault(task.name, _Watched(task))
        measured = event.metrics if isinstance(event, Progress | Finished) else {}
        known = {name: value for name, value in measured.items() if name in CATALOGUE and math.isfinite(value)}
        samples = list(_increases(watched, known, rank))
        if rank:
            return samples
        if isinstance(event, Progress):
            samples += _progress(watched, event, known)
        watched.at_work = True
        if isinstance(event, Lost):
            self._watched[task.name] = _Watched(task, watched.workers, at_work=False)
            samples += [
                _sample("datm_ray_workers_lost_total", 1.0, task, reason=reason_kind(event.reason)),
                _sample("datm_ray_task_retries_total", 1.0, task),
            ]
        elif isinstance(event, Finished):
            del self._watched[task.name]
            self._open -= task.size
            samples.append(_sample("datm_ray_tasks_finished_total", 1.0, task))
        return [*samples, *self._crews()]

    def gauges(self) -> list[Sample]:
        """The present value of every gauge; those of finished tasks are no more."""
        of_tasks = [
            _sample(name, value, watched.task)
            for watched in self._watched.values()
            for name, value in watched.gauges.items()
        ]
        return [*of_tasks, *self._crews()]

    def _crews(self) -> Iterator[Sample]:
        """Workers wanted and at work."""
        working = sum(watched.workers or 1 for watched in self._watched.values() if watched.at_work)
        tags = {"stage": self._stage}
        yield Sample("datm_ray_workers_wanted", float(max(0, min(self._workers, self._open))), tags)
        yield Sample("datm_ray_workers_at_work", float(working), tags)


def _increases(watched: _Watched, known: Mapping[str, float], rank: int) -> Iterator[Sample]:
    """By how much counters have grown. Workers tell sums from 0, so one smaller than before is told by a new worker."""
    for name, value in known.items():
        if CATALOGUE[name].kind == "counter":
            before = watched.sums.get((rank, name), 0.0)
            watched.sums[rank, name] = value
            if increase := value - before if value >= before else value:
                yield _sample(name, increase, watched.task)


def _progress(watched: _Watched, event: Progress, known: Mapping[str, float]) -> Iterator[Sample]:
    """Gauges and histograms, and whether the task's workers have become fewer or more."""
    for name, value in known.items():
        if CATALOGUE[name].kind == "gauge":
            watched.gauges[name] = value
        elif CATALOGUE[name].kind == "histogram":
            yield _sample(name, value, watched.task)
    watched.gauges["datm_ray_task_done_ratio"] = event.done / max(1, event.total)
    for name, value in watched.gauges.items():
        yield _sample(name, value, watched.task)
    workers = round(watched.gauges.get("datm_ray_mesh_workers", 1))
    if watched.workers not in (0, workers):
        change = "smaller" if workers < watched.workers else "grown"
        yield _sample("datm_ray_mesh_rebuilt_total", 1.0, watched.task, change=change)
    watched.workers = workers


def _sample(name: str, value: float, task: Task, **more: str) -> Sample:
    tags = {"run": task.run, "stage": task.stage, "task": task.name, **more}
    return Sample(name, float(value), {tag: tags[tag] for tag in CATALOGUE[name].tags})
