"""Executor that runs tasks on Ray actors.

Events stream back through Ray's generators, so a dead actor is noticed at once. A hung one is noticed because its
heartbeats stop. The task of a lost worker goes to a new worker group, as large as the remaining nodes allow, and grows
back when nodes are added. Module `recovery` holds the decisions and their reasons, `worker_groups` the actors.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from logging import LogRecord
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, RayError, RaySystemError

from datm_ray.config import ClusterConfig
from datm_ray.errors import ClusterError, ConfigError, DatmError, WorkerLostError
from datm_ray.monitor.logs import accept
from datm_ray.runtime.executor import (
    Event,
    Failed,
    Finished,
    Lost,
    Note,
    Phase,
    Progress,
    Resized,
    Started,
    Stopped,
    Task,
    counted,
)
from datm_ray.runtime.ray.cluster import ClusterNodes, connect, first_line, with_gpus
from datm_ray.runtime.ray.metrics import RayMetrics
from datm_ray.runtime.ray.worker_groups import LOSSES, WorkerGroup, reason, root_cause, unwrapped
from datm_ray.runtime.recovery import History, grown, size_for
from datm_ray.runtime.stopping import SAVE_TIMEOUT, SAVES, Interrupted, saving

PLACEMENT_TIMEOUT = 60.0
"""Seconds to wait for a group's resources, or `cluster.peer_timeout` or `cluster.wait_for_nodes` if longer. Stopped
workers free theirs after moments; an autoscaler needs minutes."""
WAIT_LOG_DELAY = 15.0
"""Seconds to wait for a group's resources before the wait is logged."""
POLL_INTERVAL, EVENT_INTERVAL = 0.2, 1.0
"""Seconds to wait for an event, while groups wait for their resources and otherwise."""
GROWTH_PAUSE = 600.0
"""Seconds for which a task does not try to grow again, after resources for it did not become free."""
HEARTBEAT_INTERVAL = 5.0
"""Seconds between two checks of the workers' heartbeats."""


class RayExecutor:
    """Executor whose workers are Ray actors, on a running cluster or on one started on this machine for the run."""

    def __init__(self, cluster: ClusterConfig, address: str | None = None) -> None:
        if cluster.device == "cuda" and cluster.gpus_per_worker == 0:
            raise ClusterError(
                "cluster.device is 'cuda', but cluster.gpus_per_worker is 0",
                remedy="set cluster.gpus_per_worker=1, or cluster.device=auto",
            )
        self._owns_cluster = address is not None or not ray.is_initialized()
        dashboard = connect(address) if self._owns_cluster else ""
        try:
            self._cluster = cluster = with_gpus(cluster)
            self._nodes = ClusterNodes(cluster)
            self.workers, self.workers_per_machine = self._nodes.require()
        except BaseException:
            self._leave()
            raise
        self._metrics = RayMetrics()
        where = f", dashboard http://{dashboard}" if dashboard else ""
        gpus = f" and {cluster.gpus_per_worker:g} GPU(s)" if cluster.gpus_per_worker else ""
        each = f"{counted(cluster.threads_per_worker, 'thread')}{gpus}"
        self.description = f"Ray, up to {counted(self.workers, 'worker')} with {each} each{where}"

    def share(self, value: Any) -> Any:
        """Put a value into Ray's object store. Actors of one node share its arrays without copies."""
        return ray.put(value)

    def run(
        self, worker: Callable[..., Any], setup: tuple[Any, ...], method: str, tasks: Sequence[Task]
    ) -> Iterator[tuple[Task, Event]]:
        """Run every task on Ray actors and yield its events, see `Executor.run`."""
        for task in tasks:
            self.require_workers(task.name, min((task.size, *task.fewer)))
        self._nodes.limit_to(sum(task.size for task in tasks))
        self._metrics.begin(tasks, self.workers)
        stage = _Stage(self._cluster, self._nodes, self._metrics, worker, setup, method, tasks)
        try:
            for task, event in stage.events():
                self._metrics.record(task, event)
                yield task, event
        finally:
            stage.close()

    def close(self) -> None:
        """Disconnect, and stop a cluster that was started for the run."""
        self._metrics.close()
        self._nodes.release()
        self._leave()

    def _leave(self) -> None:
        if self._owns_cluster:
            ray.shutdown()

    def require_workers(self, name: str, size: int) -> None:
        """Raise a `ClusterError` if `size` workers never fit, after waiting `cluster.wait_for_nodes` seconds for
        nodes."""
        if size > self.workers and self._cluster.workers is None:
            self.workers, self.workers_per_machine = self._nodes.wait_for(size)
        if size > self.workers:
            raise ClusterError(
                f"{name} needs {size} workers at the same time, but the cluster can hold {self.workers}",
                "the number is cluster.shards times the networks that cluster.backbones_apart and auxiliaries_apart "
                "put on workers of their own",
                "lower them, raise cluster.workers if it is set, or add nodes",
            )


@dataclass(eq=False)
class _Queued:
    """Task that waits for a worker group, with its past attempts."""

    task: Task
    history: History = field(default_factory=History)
    size: int = 0
    """Size of the last group that ran the task; 0 before the first."""
    limit: int = 2**31
    """Largest group size to try, inclusive. Larger ones did not get their resources."""
    insufficient: int = 0
    """Largest group size that was too small for the task; 0 if none was."""
    no_growth_before: float = 0.0
    """Time before which the task does not try to grow, in seconds of the monotonic clock."""

    @property
    def sizes(self) -> list[int]:
        """Group sizes to try: above `insufficient` and up to `limit`."""
        return [size for size in (self.task.size, *self.task.fewer) if self.insufficient < size <= self.limit]


@dataclass(eq=False)
class _Running:
    """Task assigned to a worker group."""

    queued: _Queued
    group: WorkerGroup
    streams: dict[int, Any] = field(default_factory=dict)
    """Rank -> Ray's generator of references to events, for ranks that have not finished. Empty before the start."""
    result: Finished = field(default_factory=Finished)
    """Result of rank 0."""
    done: int = 0
    """`Progress.done` of the last event."""
    logged: bool = False
    """True if the wait for resources has been reported to the user."""


class _Stage:
    """One stage, which runs tasks of one worker class from the first to the last."""

    def __init__(
        self,
        cluster: ClusterConfig,
        nodes: ClusterNodes,
        metrics: RayMetrics,
        worker: Callable[..., Any],
        setup: tuple[Any, ...],
        method: str,
        tasks: Sequence[Task],
    ) -> None:
        self._cluster, self._nodes, self._metrics = cluster, nodes, metrics
        self._worker, self._setup, self._method = worker, setup, method
        self._queue = deque(_Queued(task) for task in tasks)
        self._idle: list[WorkerGroup] = []
        self._running: list[_Running] = []
        self._last_check = time.monotonic()
        self._failure: DatmError | None = None
        """Error of the first task that failed. Running tasks finish, and none starts."""
        self._blocked_since = float("inf")
        """Time since which no task runs and none can start, in seconds of the monotonic clock; infinite otherwise."""

    def events(self) -> Iterator[tuple[Task, Event]]:
        """Events of all tasks, until all are finished, or one failed and the running ones are finished."""
        with saving("Stopping") as is_asked:  # workers report first what they save
            while self._running or (self._queue and not self._failure):
                if is_asked():
                    yield from self._save_and_stop()
                yield from self._assign_groups()
                yield from self._start_groups()
                yield from self._next_events()
                yield from self._check_heartbeats()
            if self._failure:
                raise self._failure

    def _save_and_stop(self) -> Iterator[tuple[Task, Event]]:
        """Have the workers save their work, wait for those that can, and raise `Interrupted`."""
        saved, at_work = [], [current for current in self._running if current.streams and current.group.saves()]
        for current in [each for each in self._running if each not in at_work]:
            self._running.remove(current)
            current.group.stop()
        for current in at_work:
            yield current.queued.task, Note(f"{SAVES}, within {SAVE_TIMEOUT:.0f} s")
        end = time.monotonic() + SAVE_TIMEOUT
        while self._running and time.monotonic() < end:
            for task, event in self._next_events():
                saved += [f"{task.name}: {event.saved}"] if isinstance(event, Stopped) else []
                yield task, event
        raise Interrupted("; ".join(saved))

    def close(self) -> None:
        """Stop all groups."""
        for group in [*self._idle, *(current.group for current in self._running)]:
            group.stop()

    # --- from queued to running -----------------------------------------------------------------------------------

    def _busy(self) -> int:
        return sum(current.group.size for current in self._running)

    def _assign_groups(self) -> Iterator[tuple[Task, Event]]:
        """Assign groups to queued tasks, in order, so that small tasks do not overtake a large one for ever."""
        while self._queue and not self._failure:
            queued, capacity = self._queue[0], self._nodes.capacity()
            # The size that the nodes can hold, used or not: tasks of other sizes wait until this one has started.
            size = size_for(queued.sizes, capacity)
            if size is None or self._busy() + size > capacity:
                yield from self._wait_for_nodes(queued, size)
                return
            self._blocked_since = float("inf")
            self._running.append(_Running(self._queue.popleft(), self._group(size, capacity - self._busy())))
            if size != (queued.size or queued.task.size):
                yield queued.task, Resized(size, queued.task.size)
            queued.size = size

    def _group(self, size: int, free: int) -> WorkerGroup:
        """Idle or new group of `size` workers. Idle groups are stopped if a new one needs their resources."""
        for group in self._idle:
            if group.size == size:
                self._idle.remove(group)
                return group
        while self._idle and sum(group.size for group in self._idle) + size > free:
            self._idle.pop(0).stop()
        return WorkerGroup.reserve(size, self._cluster)

    def _wait_for_nodes(self, queued: _Queued, size: int | None) -> Iterator[tuple[Task, Event]]:
        """Log once that no task runs and none can start. Raises a `ClusterError` after the timeout."""
        if self._running or size is not None:
            return
        now = time.monotonic()
        if self._blocked_since > now:
            self._blocked_since = now
            self._nodes.request(queued.task.size)
            needed, fits = counted(queued.task.size, "worker"), sum(self._nodes.fits())
            yield queued.task, Note(f"waiting for nodes: needs {needed}, the cluster can hold {fits}")
        if now - self._blocked_since > self._placement_timeout():
            raise self._not_enough_resources(queued.task.size)
        time.sleep(POLL_INTERVAL)

    def _start_groups(self) -> Iterator[tuple[Task, Event]]:
        """Start the groups whose resources are reserved. Give up on those that wait too long."""
        for current in [each for each in self._running if not each.streams]:
            if current not in self._running:
                continue  # another task failed meanwhile, so nothing starts any more
            group = current.group
            same = next((idle for idle in self._idle if idle.size == group.size), None)
            if same is not None and not group.is_placed():
                self._idle.remove(same)  # another task finished first
                group.stop()
                current.group = group = same
            if group.is_placed():
                yield from self._submit(current)
            elif group.size > sum(self._nodes.fits()):
                self._requeue(current)  # a node was lost while the group waited for it
            elif time.monotonic() - group.reserved_at > self._placement_timeout():
                yield from self._reduce_or_wait(current)
            elif not current.logged and time.monotonic() - group.reserved_at > WAIT_LOG_DELAY:
                current.logged = True
                wait, free = f"{self._placement_timeout():.0f} s", counted(group.size, "free worker")
                yield current.queued.task, Note(f"waiting up to {wait} for {free} (in use by other jobs)")

    def _reduce_or_wait(self, current: _Running) -> Iterator[tuple[Task, Event]]:
        """Handle resources in use by other jobs: try a smaller group, wait for tasks of this run, or raise."""
        group, queued = current.group, current.queued
        fewer = [size for size in queued.sizes if size < group.size]
        if fewer:
            self._requeue(current)
            queued.limit, queued.no_growth_before = group.size - 1, time.monotonic() + GROWTH_PAUSE
            yield queued.task, Note(f"{counted(group.size, 'worker')} did not become free; trying with fewer")
        elif any(each.streams for each in self._running):
            group.reserved_at = time.monotonic()
        else:
            raise self._not_enough_resources(group.size)

    def _submit(self, current: _Running) -> Iterator[tuple[Task, Event]]:
        """Start a group's actors and submit its task. Yields `Started`, or `Lost` if Ray cannot start the actors."""
        try:
            if not current.group.actors:
                yield current.queued.task, Phase(f"starting {counted(current.group.size, 'worker')}")
                current.group.start(self._worker, self._setup, self._cluster)
            current.streams = current.group.submit(current.queued.task, self._method)
            yield current.queued.task, Started(current.group.size)
        except (ActorUnschedulableError, RaySystemError) as failure:
            event = self._lost(current, WorkerLostError(f"it could not be started: {first_line(failure)}"))
            yield current.queued.task, event
            yield from self._handle(current, event)

    def _requeue(self, current: _Running) -> None:
        """Stop the group of a task, and put the task first in the queue."""
        self._running.remove(current)
        current.group.stop()
        self._queue.appendleft(current.queued)

    def _placement_timeout(self) -> float:
        return max(PLACEMENT_TIMEOUT, self._cluster.peer_timeout, self._cluster.wait_for_nodes)

    def _not_enough_resources(self, size: int) -> ClusterError:
        fits = self._nodes.fits()
        fewer = sum(fits) < size
        return ClusterError(
            f"{counted(size, 'worker')} did not become free within {self._placement_timeout():g} s; "
            f"the cluster has {counted(len(fits), 'node')} that can hold {counted(sum(fits), 'worker')}",
            "nodes were lost" if fewer else "other jobs use its CPUs or GPUs",
            "run the same command again when nodes are back, it resumes; or raise cluster.wait_for_nodes"
            if fewer
            else "stop the other jobs, or raise cluster.wait_for_nodes",
        )

    # --- while they run -------------------------------------------------------------------------------------------

    def _next_events(self) -> Iterator[tuple[Task, Event]]:
        """Wait briefly for the next events and handle them."""
        streams = [(current, rank, stream) for current in self._running for rank, stream in current.streams.items()]
        wait = EVENT_INTERVAL if all(current.streams for current in self._running) else POLL_INTERVAL
        if not streams:
            time.sleep(wait if self._running else 0)
            return
        arrived, _ = ray.wait([stream for *_, stream in streams], num_returns=1, timeout=wait, fetch_local=False)
        for current, rank in [(current, rank) for current, rank, stream in streams if stream in arrived]:
            self._running.remove(current)
            self._running.append(current)  # events of other tasks come first next time
            event = self._event(current, rank)
            if event is not None:
                yield current.queued.task, event
                yield from self._handle(current, event)

    def _event(self, current: _Running, rank: int) -> Event | None:
        """Next event of a rank, or `None` if the user need not see the event."""
        try:
            event: Event | list[LogRecord] = ray.get(next(current.streams[rank]))
        except StopIteration:
            event = Finished()
        except RayError as failure:
            return self._lost(current, root_cause(current.streams, rank, unwrapped(failure)))
        if isinstance(event, list):
            accept(event)
            return None
        if rank:
            self._metrics.record(current.queued.task, event, rank)
        if not isinstance(event, Finished):
            return event if rank == 0 else None
        del current.streams[rank]
        current.result = event if rank == 0 else current.result
        return None if current.streams else current.result

    def _handle(self, current: _Running, event: Event) -> Iterator[tuple[Task, Event]]:
        """Update the group and the queue after an event of a task."""
        if isinstance(event, Failed):
            for ended in [each for each in self._running if not each.streams]:  # a failed task's streams are cleared
                self._running.remove(ended)
                ended.group.stop()
        elif isinstance(event, Lost):
            self._requeue(current)
            while self._idle:  # they may have been on the lost node, and replacing them is cheap
                self._idle.pop().stop()
        elif isinstance(event, Finished | Stopped):
            self._running.remove(current)
            self._idle.append(current.group)
        elif isinstance(event, Progress):
            current.done = event.done
            if event.saved and self._grows(current):
                self._requeue(current)
                yield current.queued.task, Note("checkpoint saved; restarting with more workers")

    def _grows(self, current: _Running) -> bool:
        size, queued = current.group.size, current.queued
        if size >= queued.task.size or time.monotonic() < queued.no_growth_before:
            return False
        sizes = (queued.task.size, *queued.task.fewer)
        free = self._nodes.free() + sum(group.size for group in self._idle)
        better = grown(sizes, size, self._nodes.capacity(), self._busy(), free)
        queued.limit = max(queued.limit, better or 0)  # resources are free now
        return better is not None

    def _check_heartbeats(self) -> Iterator[tuple[Task, Event]]:
        """Find workers whose process exists but does not respond."""
        if time.monotonic() - self._last_check < HEARTBEAT_INTERVAL:
            return
        self._last_check = time.monotonic()
        for current in [each for each in self._running if each.streams]:
            rank = current.group.silent_rank(self._cluster.peer_timeout)
            if rank is not None:
                since = (
                    current.group.unanswered[rank][1] if rank in current.group.unanswered else current.group.started_at
                )
                silence = time.monotonic() - since
                event = self._lost(current, WorkerLostError(f"no heartbeat for {silence:.0f} s"))
                yield current.queued.task, event
                yield from self._handle(current, event)

    def _lost(self, current: _Running, cause: BaseException) -> Lost | Failed | Note:
        """Event of a task that ended with an error: `Lost` if retried, `Failed` if not, `Note` if nodes are missing."""
        if isinstance(cause, ConfigError) and current.group.size < current.queued.task.size:
            # The error did not occur with all workers, and nodes may come back.
            current.queued.insufficient = current.group.size
            self._requeue(current)
            return Note(f"waiting for nodes: {counted(current.group.size, 'worker')} cannot run it: {cause}")
        if isinstance(cause, DatmError) and not isinstance(cause, WorkerLostError):
            return self._failed(current, cause)
        if not isinstance(cause, (*LOSSES, WorkerLostError)):
            raise cause from None
        queued = current.queued
        queued.history = queued.history.after_loss(current.done)
        if queued.history.gives_up(self._cluster.retries):
            lost = WorkerLostError(
                f"{queued.task.name} lost its worker {queued.history.without_progress} times without progress; "
                f"last reason: {reason(cause)}",
                "the node may be out of memory, or nodes are preempted faster than a task can save its work",
                "check the worker's log in the Ray dashboard, then run the same command again: it resumes",
            )
            return self._failed(current, lost)
        return Lost(reason(cause), queued.history.losses)

    def _failed(self, current: _Running, failure: DatmError) -> Failed:
        """Record the first failure. Raises the failure if no other task runs."""
        self._failure = self._failure or failure
        current.streams.clear()
        others = sum(bool(each.streams) for each in self._running)
        if not others:
            raise self._failure from None
        return Failed(str(failure), others)
