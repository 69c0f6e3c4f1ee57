"""The executors' promise: every task once, in parallel or not, whatever happens to workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datm_ray.config import ClusterConfig
from datm_ray.errors import ClusterError, ConfigError, WorkerLostError
from datm_ray.runtime.create import create_executor
from datm_ray.runtime.executor import Executor, Finished, Lost, Progress, Task


class Squarer:
    """A worker that holds an array and squares its entries."""

    def __init__(self, values: np.ndarray, trap: str = "") -> None:
        if trap == "setup":
            raise ConfigError("the setup is wrong")
        self._values, self._trap = values, trap

    def square(self, index: int) -> Iterator[Progress | Finished]:
        yield Progress(1, 2, {"index": float(index)})
        if self._trap == "raise":
            raise ConfigError("the task is wrong", "a cause", "a remedy")
        if self._trap and Path(self._trap).is_dir():
            self._die_once_each(index)
        yield Progress(2, 2)
        yield Finished(int(self._values[index]) ** 2)

    def _die_once_each(self, index: int) -> None:
        mark = Path(self._trap) / str(index)
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def always_die(self, index: int) -> Iterator[Progress | Finished]:
        yield Progress(1, 2)
        os.kill(os.getpid(), signal.SIGKILL)
        yield Finished()


def results(executor: Executor, *setup: Any, method: str = "square", count: int = 5) -> dict[str, list[Any]]:
    """The events of every task, in the order in which they came."""
    shared = executor.share(np.arange(count))
    tasks = [Task(f"task {index}", (index,)) for index in range(count)]
    events: dict[str, list[Any]] = {task.name: [] for task in tasks}
    for task, event in executor.run(Squarer, (shared, *setup), method, tasks):
        events[task.name].append(event)
    return events


def test_every_task_finishes_once_with_its_progress_in_order(executor: Executor) -> None:
    """Serially and on Ray, each task yields its progress and one result."""
    for index, (_, events) in enumerate(results(executor).items()):
        assert [type(event) for event in events] == [Progress, Progress, Finished]
        assert events[0].values == {"index": float(index)}
        assert events[-1].result == index**2


def test_no_tasks_are_no_work(executor: Executor) -> None:
    """An empty stage starts no worker."""
    assert list(executor.run(Squarer, ("not even valid", "setup"), "square", [])) == []


@pytest.mark.parametrize("trap", ["raise", "setup"])
def test_expected_errors_reach_the_caller_as_they_were_raised(executor: Executor, trap: str) -> None:
    """A DatmError in a task or in a worker's setup keeps its class and its sentence."""
    with pytest.raises(ConfigError) as caught:
        results(executor, trap)
    assert str(caught.value).startswith("the task is wrong" if trap == "raise" else "the setup is wrong")


@pytest.mark.ray
def test_killed_workers_cost_one_attempt_each(ray_cluster: Any, tmp_path: Path) -> None:
    """Every task's first worker is killed with SIGKILL; every task still finishes, with the loss reported."""
    events = results(create_executor("ray", ClusterConfig()), str(tmp_path), count=3)
    for index, task_events in enumerate(events.values()):
        assert [event.attempt for event in task_events if isinstance(event, Lost)] == [1]
        assert task_events[-1] == Finished(index**2)


@pytest.mark.ray
def test_a_task_that_always_kills_its_worker_is_given_up(ray_cluster: Any) -> None:
    """After the retries of the policy there is one clear error, not an endless loop."""
    with pytest.raises(WorkerLostError, match="lost its worker 2 times"):
        results(create_executor("ray", ClusterConfig(retries=1)), method="always_die", count=1)


@pytest.mark.ray
@pytest.mark.parametrize("wish", [{"workers": 99}, {"gpus_per_worker": 1.0}, {"threads_per_worker": 64}])
def test_more_than_the_cluster_has_is_refused_before_anything_starts(ray_cluster: Any, wish: dict[str, Any]) -> None:
    """Workers that could never be placed are an error, not an endless wait."""
    with pytest.raises(ClusterError, match="the cluster has 2 CPU"):
        create_executor("ray", ClusterConfig(**wish))


def test_unknown_executor_is_named() -> None:
    """The error lists the executors there are."""
    with pytest.raises(ClusterError, match="ray, serial"):
        create_executor("dask", ClusterConfig())


def test_serial_executor_needs_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ray installed the serial executor works and the ray executor says what to install."""
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "datm_ray.runtime.ray_executor", raising=False)
    assert results(create_executor("serial", ClusterConfig()))["task 2"][-1] == Finished(4)
    with pytest.raises(ClusterError, match="pip install"):
        create_executor("ray", ClusterConfig())
