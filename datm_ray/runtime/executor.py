"""Where tasks run: the contract, and the serial executor that is its reference.

A worker is a plain class. Its methods are generators: they yield `Progress` while they work and end with `Finished`.
An executor decides where workers live and what happens when one dies; the numbers are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from datm_ray.errors import ClusterError

if TYPE_CHECKING:  # a mesh of processes takes its seats from here, and needs no pydantic
    from datm_ray.config import ClusterConfig


@dataclass(frozen=True)
class Progress:
    """A task has come this far."""

    done: int
    total: int
    values: Mapping[str, float] = field(default_factory=dict)
    """What to show beside the bar, e.g. {"loss": 0.41}."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Everything that was measured, by the names of `metrics.CATALOGUE`. Counters grow from 0 in every attempt."""
    saved: bool = False
    """Whether all until here is kept, so that other workers could go on at no loss."""


@dataclass(frozen=True)
class Finished:
    """A task is done."""

    result: Any = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """As those of `Progress`, for what came after the last of it."""


@dataclass(frozen=True)
class Lost:
    """The worker of a task died; the task is given to another one."""

    reason: str
    attempt: int
    """Of the attempt that failed, counted from 1."""


@dataclass(frozen=True)
class Failed:
    """A task cannot be done; what runs beside it is finished before the stage ends with the error."""

    reason: str
    others: int
    """Tasks that go on."""


@dataclass(frozen=True)
class Resized:
    """A task goes on with fewer workers than it had, or with more."""

    size: int
    """Workers now."""
    wanted: int
    """Workers that it would like to have."""


@dataclass(frozen=True)
class Note:
    """Something the user should know."""

    text: str


Event = Progress | Finished | Lost | Failed | Resized | Note


@dataclass(frozen=True)
class Task:
    """One call of a worker's method."""

    name: str
    """Shown to the user and unique within its stage."""
    arguments: tuple[Any, ...]
    size: int = 1
    """Workers that do it together. Above 1 the method gets `seat=Seat(...)` wherever there are several processes; an
    executor of one process does the whole task alone, without a seat."""
    fewer: tuple[int, ...] = ()
    """Smaller numbers of workers that could do it too, where machines are lost on the way."""
    run: str = ""
    """Of which it is a part."""
    stage: str = ""
    """As the user knows it: experts, distillation, evaluation."""


@dataclass(frozen=True)
class Seat:
    """The place of one worker among those that do a task together."""

    rank: int
    """0 ... size - 1; the events of rank 0 are the task's."""
    size: int
    """Workers of the task."""
    meeting: str
    """host:port at which rank 0 waits for the others."""


class Executor(Protocol):
    """Runs tasks on workers."""

    description: str
    """Where tasks run, in words."""
    workers: int
    """At work at the same time, at most."""
    workers_per_machine: int
    """Of those, the most that one machine has."""

    def require_room(self, name: str, size: int) -> None:
        """Raise a `ClusterError` if a task of so many workers could never run."""
        ...

    def share(self, value: Any) -> Any:
        """Make a large read-only value cheap to hand to every worker; pass the result on as a setup argument."""
        ...

    def run(
        self, worker: Callable[..., Any], setup: tuple[Any, ...], method: str, tasks: Sequence[Task]
    ) -> Iterator[tuple[Task, Event]]:
        """Run every task once to its `Finished`, in any order and possibly in parallel.

        Where one fails, none is begun any more; those that run beside it are finished before the error is raised.

        Args:
            worker: class, instantiated as worker(*setup) wherever it will live.
            method: name of the worker's generator method; called with each task's arguments.

        Raises:
            DatmError: as raised by the worker.
            WorkerLostError: a task's workers died too often.
        """
        ...

    def close(self) -> None:
        """Release what the executor holds."""
        ...


class SerialExecutor:
    """One worker in this process, one task after the other."""

    def __init__(self, cluster: ClusterConfig) -> None:
        # Here, as it needs torch, which a process that waits for workers elsewhere need not import.
        from datm_ray.runtime.devices import prepare_device

        device = prepare_device(cluster)  # so that a missing GPU is told before anything starts
        self.description = f"this process, {cluster.threads_per_worker} thread(s){', a GPU' * (device.type == 'cuda')}"
        self.workers = self.workers_per_machine = 1

    def require_room(self, name: str, size: int) -> None:
        """One worker does the whole of any task."""

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def run(
        self, worker: Callable[..., Any], setup: tuple[Any, ...], method: str, tasks: Sequence[Task]
    ) -> Iterator[tuple[Task, Event]]:
        """See `Executor.run`."""
        instance = worker(*setup) if tasks else None
        for task in tasks:
            with explaining_memory():
                for event in getattr(instance, method)(*task.arguments):
                    yield task, event

    def close(self) -> None:
        """Nothing is held."""


@contextmanager
def explaining_memory() -> Iterator[None]:
    """Raise a `ClusterError` where a GPU's memory does not suffice."""
    try:
        yield
    except RuntimeError as failure:
        if type(failure).__name__ != "OutOfMemoryError":  # torch's, which not every worker has imported
            raise
        raise ClusterError(
            f"a worker's GPU is out of memory: {' '.join(str(failure).split())[:200]}",
            "others use it too, or the recipe takes more than was predicted",
            "give a distilling worker less with --memory, lower cluster.experts_at_a_time, or let fewer workers share "
            "a GPU with cluster.gpus_per_worker; the same command again goes on",
        ) from None


def require_precision(cluster: ClusterConfig, has_gpu: bool) -> None:
    """Raise a `ClusterError` for a precision that processors have not."""
    if cluster.precision != "float32" and not has_gpu:
        raise ClusterError(
            f"cluster.precision is {cluster.precision!r}, but there is no GPU to compute it",
            "processors compute it far more slowly than float32, or not at all",
            "use --set cluster.precision=float32",
        )
