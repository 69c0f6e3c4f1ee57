"""Export of a run's metrics through Ray. Every node's agent offers them to Prometheus, see cluster/monitoring.

The driver sets the metrics from the events it receives; one call of Ray takes about three microseconds. Ray drops a
gauge that is not set for two of its report intervals (20 s), and an iteration may take longer. So a thread sets all
gauges of running tasks again every few seconds. Gauges of finished tasks expire.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from datm_ray.monitor.metrics import CATALOGUE, Readings, Sample
from datm_ray.runtime.executor import Event, Task

Exporter = Callable[[float, dict[str, str]], None]
REFRESH_INTERVAL = 5.0
"""Seconds between two times at which a thread sets all gauges again, so that Ray does not drop them."""


class RayMetrics:
    """Exporter of metrics from one executor's events. The executor must be connected to Ray."""

    def __init__(self) -> None:
        self._readings = Readings()
        self._exporters: dict[str, Exporter] = {}
        """Name in `CATALOGUE` -> function that exports a value of this metric with its tags."""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._refresh_regularly, name="metrics", daemon=True)
        self._thread.start()

    def begin(self, tasks: Sequence[Task], workers: int) -> None:
        """Start the metrics of a stage with these tasks. At most `workers` workers run them at the same time."""
        self._export(lambda: self._readings.begin(tasks, workers))

    def add(self, tasks: Sequence[Task]) -> None:
        """Count further tasks of the current stage."""
        self._export(lambda: self._readings.add(tasks))

    def record(self, task: Task, event: Event, rank: int = 0) -> None:
        """Export the measurements of an event.

        Args:
            task: task of the event.
            event: event of one of the task's workers.
            rank: rank of that worker within the task's group. For ranks above 0 only counters are exported.
        """
        self._export(lambda: self._readings.take(task, event, rank))

    def release(self, task: Task) -> None:
        """Count a task as waiting again, because its workers are stopped."""
        self._export(lambda: self._readings.release(task))

    def close(self) -> None:
        """Stop the thread that refreshes the gauges. Must be called before Ray disconnects."""
        self._closed.set()
        self._thread.join()

    def refresh(self) -> None:
        """Set every gauge again to its current value, so that Ray does not drop it."""
        self._export(self._readings.gauges)

    def _refresh_regularly(self) -> None:
        while not self._closed.wait(REFRESH_INTERVAL):
            self.refresh()

    def _export(self, read: Callable[[], Iterable[Sample]]) -> None:
        """Export the samples that `read` returns. One thread at a time reads and exports."""
        with self._lock:
            for sample in read():
                if sample.name not in self._exporters:
                    self._exporters[sample.name] = _exporter(sample.name)
                self._exporters[sample.name](sample.value, dict(sample.tags))


def _exporter(name: str) -> Exporter:
    """Create Ray's metric for the entry `name` of `CATALOGUE`. Returns its method that takes a value and tags."""
    ours = CATALOGUE[name]
    text = f"{ours.description} ({ours.unit})" if ours.unit else ours.description
    if ours.kind == "histogram":
        return Histogram(name, text, boundaries=list(ours.boundaries), tag_keys=ours.tags).observe
    if ours.kind == "gauge":
        return Gauge(name, text, tag_keys=ours.tags).set
    return Counter(name, text, tag_keys=ours.tags).inc
