"""Interface of executors, which run tasks on workers, and the serial executor as its reference.

A worker is a plain class. Its methods are generators: they yield `Progress` while they work and end with `Finished`. An
executor decides where workers run and what happens when one is lost; results are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from datm_ray.errors import ClusterError, WorkerLostError
from datm_ray.runtime.stopping import Interrupted

if TYPE_CHECKING:  # mesh imports this module, and needs no pydantic
    from datm_ray.config import ClusterConfig


@dataclass(frozen=True)
class Started:
    """Start of a task, and its start again after a loss."""

    workers: int = 1


@dataclass(frozen=True)
class Progress:
    """Progress of a task: `done` of `total` steps. The first one of an attempt is where its speed is measured from."""

    done: int
    total: int
    values: Mapping[str, float] = field(default_factory=dict)
    """Values to show beside the progress bar, such as {"loss": 0.41}."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Measurements, by the names in `monitor/metrics.py`. Counters start from 0 in every attempt."""
    saved: bool = False
    """True if the work so far is saved, so that other workers can resume without loss."""


@dataclass(frozen=True)
class Phase:
    """What a task does before its first step or between two steps, until its next `Progress`."""

    text: str
    """Text after the task's name, such as "compiling student steps"."""


@dataclass(frozen=True)
class Stopped:
    """End of a task that was asked to stop and has saved its work."""

    saved: str
    """What is saved, such as "iteration 21 of 60"."""


@dataclass(frozen=True)
class Finished:
    """End of a task, with its result."""

    result: Any = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Measurements since the last `Progress`, by the names in `monitor/metrics.py`."""


@dataclass(frozen=True)
class Lost:
    """Loss of a task's worker. The executor starts the task again on another one."""

    reason: str
    attempt: int
    """Number of the attempt that failed, counted from 1."""


@dataclass(frozen=True)
class Failed:
    """Failure of a task that is not retried. Running tasks finish before the stage raises the error."""

    reason: str
    others: int
    """Number of other tasks still running."""


@dataclass(frozen=True)
class Resized:
    """Change of a task's number of workers, at its start or after a loss."""

    size: int
    """Number of workers from now on."""
    wanted: int
    """Number of workers that the task can use at most."""


@dataclass(frozen=True)
class Note:
    """Message to the user about a task."""

    text: str


@dataclass(frozen=True)
class More:
    """Further task that a task has made, which any free worker may run at the same time."""

    task: Task


Event = Started | Phase | Progress | Stopped | Finished | Lost | Failed | Resized | Note | More


@dataclass(frozen=True)
class Task:
    """One call of a worker's method."""

    name: str
    """Name shown to the user, unique within its stage."""
    arguments: tuple[Any, ...]
    size: int = 1
    """Number of workers that run the task together. Above 1 each gets `worker_rank=WorkerRank(...)`, except in an
    executor of one process, whose worker runs the whole task."""
    fewer: tuple[int, ...] = ()
    """Smaller group sizes that can run the task too, used when nodes are lost."""
    run: str = ""
    """Name of the run that the task belongs to."""
    stage: str = ""
    """Name of the stage: "experts", "distillation", "labels" or "evaluation"."""
    weight: float = 1.0
    """Expected work, above 0, in a unit that the tasks of a stage share."""
    method: str = ""
    """Method of the worker to call; "" for the method that the stage calls."""
    memory: int = 0
    """Memory to reserve for each worker, in bytes; 0 reserves none."""
    is_light: bool = False
    """True for a task that may run on the smaller workers of `cluster.light`."""


@dataclass(frozen=True)
class WorkerRank:
    """Rank of one worker in its group, and the rendezvous address of the group."""

    rank: int
    """Rank from 0 to `world_size` - 1, inclusive. The events of rank 0 are the task's."""
    world_size: int
    """Number of workers in the group."""
    rendezvous: str
    """Rendezvous address, host:port, at which rank 0 waits for the other ranks."""


class Executor(Protocol):
    """Runs tasks on workers."""

    description: str
    """Description of where tasks run, for the user."""
    workers: int
    """Highest number of workers that run at the same time."""
    workers_per_machine: int
    """Highest number of workers on one node."""
    gpus_per_worker: float | None
    """GPUs of a worker whose settings leave them open; `None` for those of this machine."""

    @property
    def light_workers(self) -> int:
        """Highest number of workers that run tasks with `Task.is_light` at the same time."""
        ...

    def require_workers(self, name: str, size: int) -> None:
        """Raise a `ClusterError` if a task of `size` workers can never run."""
        ...

    def share(self, value: Any) -> Any:
        """Share a large read-only value with all workers. Pass the returned value as a setup argument."""
        ...

    def run(
        self, worker: Callable[..., Any], setup: tuple[Any, ...], method: str, tasks: list[Task]
    ) -> Iterator[tuple[Task, Event]]:
        """Run every task to its `Finished`, in any order and possibly in parallel.

        Tasks that the caller appends to the list meanwhile are run too. After an error of the input, no new task
        starts, and running tasks finish before the error is raised.

        Args:
            worker: class, constructed as worker(*setup) in the process where it runs.
            setup: arguments of the constructor.
            method: name of the worker's generator method, called with each task's arguments.
            tasks: tasks to run, which may grow.

        Raises:
            DatmError: the worker raised it.
            WorkerLostError: a task's workers were lost too often.
        """
        ...

    def close(self) -> None:
        """Release the executor's resources."""
        ...


class SerialExecutor:
    """One worker in this process, which runs one task after another."""

    def __init__(self, cluster: ClusterConfig) -> None:
        # Imported here because it needs torch, which the process that drives remote workers does not import.
        from datm_ray.runtime.devices import prepare_device

        device = prepare_device(cluster)  # reports a missing GPU before anything starts
        self.description = (
            f"this process, {counted(cluster.threads_per_worker, 'thread')}{', a GPU' * (device.type == 'cuda')}"
        )
        self.workers = self.workers_per_machine = 1
        self.gpus_per_worker: float | None = None

    @property
    def light_workers(self) -> int:
        """Highest number of workers that run light tasks at the same time."""
        return self.workers

    def require_workers(self, name: str, size: int) -> None:
        """Accept any size: one worker runs the whole task."""

    def share(self, value: Any) -> Any:
        """Return the value itself: the worker lives in this process."""
        return value

    def run(
        self, worker: Callable[..., Any], setup: tuple[Any, ...], method: str, tasks: list[Task]
    ) -> Iterator[tuple[Task, Event]]:
        """Run the tasks one after another in this process, see `Executor.run`."""
        instance = worker(*setup) if tasks else None
        for task in tasks:
            yield task, Started()
            with explaining_memory(), _naming(task):
                for event in getattr(instance, task.method or method)(*task.arguments):
                    yield task, event

    def close(self) -> None:
        """Do nothing: this executor holds no resources."""


@contextmanager
def _naming(task: Task) -> Iterator[None]:
    """Name the task in what its worker says it has saved."""
    try:
        yield
    except Interrupted as end:
        raise Interrupted(f"{task.name}: {end}" if str(end) else "") from None


@contextmanager
def explaining_memory() -> Iterator[None]:
    """Turn torch's error for exhausted GPU memory into a `WorkerLostError`: another GPU may have more that is free."""
    try:
        yield
    except RuntimeError as failure:
        if type(failure).__name__ != "OutOfMemoryError":  # by name: not every worker imports torch
            raise
        raise WorkerLostError(
            f"a worker's GPU is out of memory: {' '.join(str(failure).split())[:200]}",
            "other processes use the GPU too, or the recipe needs more memory than predicted",
            "limit a distilling worker with --memory, lower cluster.experts_at_a_time, or raise "
            "cluster.gpus_per_worker; then run the same command again: it resumes",
        ) from None


def require_precision(cluster: ClusterConfig, has_gpu: bool) -> None:
    """Raise a `ClusterError` for a precision that workers without a GPU do not have."""
    if cluster.precision in ("tf32", "bfloat16") and not has_gpu:
        raise ClusterError(
            f"cluster.precision is {cluster.precision!r}, but there is no GPU to compute it",
            "CPUs compute it far more slowly than float32, or not at all",
            "use --set cluster.precision=auto",
        )


def counted(count: int, noun: str) -> str:
    """Count and noun, such as "1 worker" or "2 workers"."""
    return f"{count} {noun}{'s' * (count != 1)}"
