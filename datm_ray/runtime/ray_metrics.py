"""A run's metrics on Ray: every node's agent offers them to Prometheus, see cluster/monitoring.

They are set in the driver, from the events that arrive there anyway: a call of Ray's takes some three microseconds. Ray
forgets a gauge that was not set for two of its report intervals (20 s), and an iteration may take longer, so a thread
sets all of them again now and then; those of finished tasks are left to be forgotten.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from weakref import ref

from ray.util.metrics import Counter, Gauge, Histogram

from datm_ray.runtime.executor import Event, Task
from datm_ray.runtime.metrics import CATALOGUE, Readings, Sample

REPEAT = 5.0
"""Seconds after which gauges are set again."""


class RayMetrics:
    """Exports what the events of one executor say. The executor must be connected."""

    def __init__(self) -> None:
        self._readings = Readings()
        self._ours: dict[str, Gauge | Counter | Histogram] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=_repeat, args=(ref(self), self._closed), name="metrics", daemon=True)
        self._thread.start()

    def begin(self, tasks: Sequence[Task], workers: int) -> None:
        """These tasks will be done, by at most so many workers at a time."""
        with self._lock:
            self._export(self._readings.begin(tasks, workers))

    def record(self, task: Task, event: Event, rank: int = 0) -> None:
        """Export what an event says; `rank` is the worker's among those of the task."""
        with self._lock:
            self._export(self._readings.take(task, event, rank))

    def close(self) -> None:
        """End the thread. Call it before Ray is left."""
        self._closed.set()
        self._thread.join()

    def set_again(self) -> None:
        """Set every gauge to the value it has."""
        with self._lock:
            self._export(self._readings.gauges())

    def _export(self, samples: Iterable[Sample]) -> None:
        for sample in samples:
            metric = self._ours.get(sample.name) or self._make(sample.name)
            tags = dict(sample.tags)
            if isinstance(metric, Gauge):
                metric.set(sample.value, tags)
            elif isinstance(metric, Counter):
                metric.inc(sample.value, tags)
            else:
                metric.observe(sample.value, tags)

    def _make(self, name: str) -> Gauge | Counter | Histogram:
        """A metric of Ray's for one of the catalogue."""
        ours = CATALOGUE[name]
        text = f"{ours.description} ({ours.unit})" if ours.unit else ours.description
        made: Gauge | Counter | Histogram
        if ours.kind == "histogram":
            made = Histogram(name, text, boundaries=list(ours.boundaries), tag_keys=ours.tags)
        else:
            made = (Gauge if ours.kind == "gauge" else Counter)(name, text, tag_keys=ours.tags)
        self._ours[name] = made
        return made


def _repeat(of: ref[RayMetrics], closed: threading.Event) -> None:
    """Until it is closed or forgotten."""
    while not closed.wait(REPEAT):
        metrics = of()
        if metrics is None:
            return
        metrics.set_again()
        del metrics
