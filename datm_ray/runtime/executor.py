"""Interface of executors, which run tasks on workers, and the serial executor as its reference.

A worker is a plain class. Its methods are generators: they yield `Progress` while they work and end with `Finished`. An
executor decides where workers run and what happens if a worker is lost. Results do not depend on the executor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from datm_ray.errors import ClusterError, WorkerLostError
from datm_ray.runtime.stopping import Interrupted
from datm_ray.words import counted

if TYPE_CHECKING:  # mesh imports this module, and needs no pydantic
    from datm_ray.config import ClusterConfig


@dataclass(frozen=True)
class Started:
    """Event: a task starts on `workers` workers, or starts again, such as after a lost worker."""

    workers: int = 1


@dataclass(frozen=True)
class Progress:
    """Event: a task has done `done` of `total` steps.

    The task's speed is measured from the first `Progress` after its start, or after its last restart.
    """

    done: int
    total: int
    values: Mapping[str, float] = field(default_factory=dict)
    """Values to show beside the progress bar, such as {"loss": 0.41}."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Measurements of this worker, by the names in `monitor/metrics.py`. Counters count from the task's last start."""
    saved: bool = False
    """True if the work so far is saved, so that other workers can resume without loss."""


@dataclass(frozen=True)
class Phase:
    """Event: what a task does before its first step or between two steps, until its next `Progress`."""

    text: str
    """Text after the task's name, such as "compiling student steps"."""


@dataclass(frozen=True)
class Stopped:
    """Event: a task that was asked to stop has saved its work and ended."""

    saved: str
    """Description of the saved work, such as "iteration 21 of 60"."""


@dataclass(frozen=True)
class Finished:
    """Event: a task has ended, with its result (`None` if the task has written its result to files)."""

    result: Any = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Last measurements of this worker, as in `Progress.metrics`."""


@dataclass(frozen=True)
class Lost:
    """Event: a task's worker was lost. If `is_retried`, the executor starts the task again on another worker."""

    reason: str
    attempt: int
    """Number of lost attempts of the task so far, with this one."""
    is_retried: bool = True
    """False if no task of the stage starts any more: the command was asked to stop, or another task found an error in
    the user's input."""


@dataclass(frozen=True)
class Failed:
    """Event: a task failed and is not retried, but others run or wait. The executor raises an error after those."""

    reason: str
    running: int
    """Number of other tasks that run, and are finished before the error is raised."""
    queued: int = 0
    """Number of waiting tasks that still start and finish before the error is raised; 0 after an error in the user's
    input."""


@dataclass(frozen=True)
class Resized:
    """Event: a task starts with fewer workers than it can use, or starts again with another number than before."""

    size: int
    """Number of workers that now run the task."""
    wanted: int
    """Largest number of workers that the task can use."""


@dataclass(frozen=True)
class Note:
    """Event: a message to the user about a task."""

    text: str


@dataclass(frozen=True)
class More:
    """Event: a running task has made a new task, which any free worker may run at the same time."""

    task: Task


Event = Started | Phase | Progress | Stopped | Finished | Lost | Failed | Resized | Note | More


@dataclass(frozen=True)
class Task:
    """Task of an executor: one call of a worker's method."""

    name: str
    """Name shown to the user, unique within its stage."""
    arguments: tuple[Any, ...]
    size: int = 1
    """Largest number of workers that run the task together. If several do, the method of each gets the further argument
    `worker_rank`, a `WorkerRank`. A worker that runs the whole task alone gets none, nor does the serial executor's."""
    fewer: tuple[int, ...] = ()
    """Smaller numbers of workers that can run the task too, the largest first; used while too few workers are free."""
    run: str = ""
    """Name of the run that the task belongs to."""
    stage: str = ""
    """Name of the stage: "experts", "distillation", "labels" or "evaluation"."""
    weight: float = 1.0
    """Expected work, above 0, relative to the other tasks of its stage."""
    method: str = ""
    """Name of the worker's method to call; "" for the method given to `Executor.run`."""
    memory: int = 0
    """Main memory to reserve for each worker, in bytes; 0 reserves none."""
    is_light: bool = False
    """True for a task whose workers take the resources of `cluster.light`. If False, or if the recipe has no such
    section, they take those of `cluster`."""


@dataclass(frozen=True)
class WorkerRank:
    """Rank of one worker in its group, and the rendezvous address of the group."""

    rank: int
    """Rank from 0 to `world_size` - 1, inclusive. The task's events are those of rank 0."""
    world_size: int
    """Number of workers in the group."""
    rendezvous: str
    """Rendezvous address, host:port, at which rank 0 waits for the other ranks."""


class Executor(Protocol):
    """Interface of an executor, which runs tasks on workers."""

    description: str
    """Text for the user about where tasks run."""
    gpus_per_worker: float | None
    """GPUs per worker where `cluster.gpus_per_worker` is null: 1 if nodes that workers may use have GPUs and
    `cluster.device` is not "cpu", else 0. `None` if the worker is this process, which takes a GPU if there is one."""

    @property
    def workers(self) -> int:
        """Highest number of workers at the same time: `cluster.workers`, else what the running nodes can hold."""

    @property
    def workers_per_machine(self) -> int:
        """Highest number of workers that run at the same time on one node."""

    @property
    def light_workers(self) -> int:
        """Highest number of workers that run tasks with `is_light` at the same time."""

    def require_workers(self, name: str, size: int, *, light: bool = False) -> None:
        """Raise a `ClusterError` if a task of `size` workers can never run.

        Args:
            name: name of the task or run, for the message.
            light: True for workers with the resources of `cluster.light`; False for those that distil.
        """

    def share(self, value: Any) -> Any:
        """Make a large read-only value available to all workers. Returns what to pass for it in `setup` of `run`."""

    def run(
        self, worker: Callable[..., Any], setup: tuple[Any, ...], method: str, tasks: list[Task]
    ) -> Iterator[tuple[Task, Event]]:
        """Run every task to its `Finished`, in any order and possibly in parallel. Yields each event with its task.

        The caller may append tasks to the list meanwhile; they are run too. After an error in the user's input no new
        task starts, and running tasks finish before the error is raised.

        Args:
            worker: worker class, constructed as worker(*setup) in the process where it runs.
            setup: arguments of the constructor.
            method: name of the worker's generator method, called with each task's arguments. It is for tasks without a
                `Task.method` of their own.
            tasks: tasks to run; the list may grow.

        Raises:
            DatmError: a worker raised this error.
            WorkerLostError: a task lost its workers too often, or no worker can be started.
            ClusterError: the cluster cannot hold a task's workers, or they did not become free in time.
            Interrupted: the command was asked to stop, and running tasks were first asked to save their work.
        """

    def close(self) -> None:
        """Release the executor's resources."""


class SerialExecutor:
    """Executor with one worker in this process, which runs one task after another."""

    def __init__(self, cluster: ClusterConfig) -> None:
        # Imported here because `devices` needs torch, which the driver of remote workers does not import.
        from datm_ray.runtime.machine.devices import prepare_device, restoring_settings

        with ExitStack() as settings:
            settings.enter_context(restoring_settings())
            device = prepare_device(cluster)  # reports a missing GPU before anything starts
            self._settings = settings.pop_all()
        self.description = (
            f"this process, {counted(cluster.threads_per_worker, 'thread')}{', a GPU' * (device.type == 'cuda')}"
        )
        self.workers = self.workers_per_machine = self.light_workers = 1
        self.gpus_per_worker: float | None = None

    def require_workers(self, name: str, size: int, *, light: bool = False) -> None:
        """Accept any size: one worker runs the whole task."""

    def share(self, value: Any) -> Any:
        """Return the value itself: the worker lives in this process."""
        return value

    def run(
        self, worker: Callable[..., Any], setup: tuple[Any, ...], method: str, tasks: list[Task]
    ) -> Iterator[tuple[Task, Event]]:
        """Run the tasks one after another in this process, see `Executor.run`. The first error is raised at once."""
        instance = worker(*setup) if tasks else None
        for task in tasks:
            yield task, Started()
            with explaining_memory(), _naming(task):
                for event in getattr(instance, task.method or method)(*task.arguments):
                    yield task, event

    def close(self) -> None:
        """Restore torch's settings of the process, such as threads, TF32 and deterministic algorithms."""
        self._settings.close()


@contextmanager
def _naming(task: Task) -> Iterator[None]:
    """Put the task's name before the text (what is saved) of an `Interrupted` that is raised in the block."""
    try:
        yield
    except Interrupted as end:
        raise Interrupted(f"{task.name}: {end}" if str(end) else "") from None


@contextmanager
def explaining_memory(
    remedy: str = "limit a distilling worker with --memory, lower cluster.experts_at_a_time",
) -> Iterator[None]:
    """Turn torch's error for exhausted GPU memory into a `WorkerLostError`, because another GPU may have more free.

    Args:
        remedy: what the user can do instead of raising `cluster.gpus_per_worker`.
    """
    try:
        yield
    except RuntimeError as failure:
        if type(failure).__name__ != "OutOfMemoryError":  # by name: not every worker imports torch
            raise
        raise WorkerLostError(
            f"a worker's GPU is out of memory: {' '.join(str(failure).split())[:200]}",
            "other processes use the GPU too, or the recipe needs more memory than predicted",
            f"{remedy}, or raise cluster.gpus_per_worker if it is below 1; then run the same command again: it resumes",
        ) from None


def require_precision(cluster: ClusterConfig, has_gpu: bool, *, elsewhere: bool = False) -> None:
    """Raise a `ClusterError` if workers cannot compute in `cluster.precision`, or only slowly.

    Args:
        has_gpu: True if workers compute on GPUs. Every precision is then accepted.
        elsewhere: True if workers may be on other machines, whose CPUs are not known here. bfloat16 is then accepted,
            and those workers check their own CPUs.
    """
    if has_gpu or cluster.precision in ("auto", "float32"):
        return
    if cluster.precision == "bfloat16" and (elsewhere or multiplies_bfloat16()):
        return
    raise ClusterError(
        f"cluster.precision is {cluster.precision!r}, but there is no GPU to compute it",
        "this machine's CPU computes it far more slowly than float32, or not at all",
        "use --set cluster.precision=auto",
    )


@functools.cache
def multiplies_bfloat16() -> bool:
    """True if this machine's CPU has instructions that multiply bfloat16 numbers. False on other systems than Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            abilities = next(line for line in file if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(abilities.split())
