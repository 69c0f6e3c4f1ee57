"""Tasks on Ray actors.

Events stream back through Ray's generators, so a dead actor shows at once; one that hangs shows because it answers no
more. Its task goes to a new crew, of as many workers as the cluster then has room for, and grows back when it has room
again. See `recovery` for what is decided and why, `ray_crews` for the actors.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, RayError, RaySystemError

from datm_ray.config import ClusterConfig
from datm_ray.errors import ClusterError, ConfigError, DatmError, WorkerLostError
from datm_ray.runtime.executor import Event, Failed, Finished, Lost, Note, Progress, Resized, Task
from datm_ray.runtime.ray_cluster import Machines, connect, first_line, with_gpus
from datm_ray.runtime.ray_crews import LOSSES, Crew, reason, root_cause, unwrapped
from datm_ray.runtime.ray_metrics import RayMetrics
from datm_ray.runtime.recovery import History, grown, size_for

PLACEMENT_TIMEOUT = 60.0
"""Seconds to wait for room for a crew, or cluster.peer_timeout or cluster.wait_for_nodes where that is longer:
dismissed workers take moments to give theirs back, and a cluster that grows on demand needs minutes."""
PATIENCE_UNTOLD = 15.0
"""Seconds to wait for that room before the user is told."""
POLL_INTERVAL = 0.2
"""Seconds between looks at crews that wait for their places."""
GROWTH_PAUSE = 600.0
"""Seconds for which a task does not try to grow again after room for it did not come free."""
HEALTH_INTERVAL = 5.0
"""Seconds between questions to workers whether they are alive."""


class RayExecutor:
    """Workers as Ray actors on a running cluster, or on one started on this machine for the run."""

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
            self._machines = Machines(cluster)
            self.workers, self.workers_per_machine = self._machines.require()
        except BaseException:
            self._leave()
            raise
        self._metrics = RayMetrics()
        where = f", dashboard http://{dashboard}" if dashboard else ""
        gpus = f" and {cluster.gpus_per_worker:g} GPU(s)" if cluster.gpus_per_worker else ""
        each = f"{cluster.threads_per_worker} thread(s){gpus}"
        self.description = f"Ray, up to {self.workers} worker(s) of {each}{where}"

    def share(self, value: Any) -> Any:
        """Put the value into the object store; actors of one node share its arrays without copies."""
        return ray.put(value)

    def run(
        self, worker: Callable[..., Any], setup: tuple[Any, ...], method: str, tasks: Sequence[Task]
    ) -> Iterator[tuple[Task, Event]]:
        """See `Executor.run`."""
        for task in tasks:
            self.require_room(task.name, min((task.size, *task.fewer)))
        self._machines.use(sum(task.size for task in tasks))
        self._metrics.begin(tasks, self.workers)
        stage = _Stage(self._cluster, self._machines, self._metrics, worker, setup, method, tasks)
        try:
            for task, event in stage.events():
                self._metrics.record(task, event)
                yield task, event
        finally:
            stage.close()

    def close(self) -> None:
        """Disconnect; a cluster that was started for the run ends with it."""
        self._metrics.close()
        self._machines.ask_no_more()
        self._leave()

    def _leave(self) -> None:
        if self._owns_cluster:
            ray.shutdown()

    def require_room(self, name: str, size: int) -> None:
        """See `Executor.require_room`. Machines that come on demand are waited for."""
        if size > self.workers and self._cluster.workers is None:
            self.workers, self.workers_per_machine = self._machines.wait_for(size)
        if size > self.workers:
            raise ClusterError(
                f"{name} wants {size} workers at once, but there is room for {self.workers}",
                "cluster.shards asks for so many, times the networks that cluster.backbones_apart and "
                "auxiliaries_apart set apart",
                "lower them, raise cluster.workers if it is set, or add nodes",
            )


@dataclass(eq=False)
class _Turn:
    """A task that waits for a crew."""

    task: Task
    history: History = field(default_factory=History)
    size: int = 0
    """Of the crew that had it last; 0 before the first."""
    limit: int = 2**31
    """The largest crew to try, since there was no room for a larger one."""
    too_few: int = 0
    """Workers that found the task too large for them."""
    no_growth_before: float = 0.0
    """In seconds of the monotonic clock; others have the room that the machines seem to have."""

    @property
    def sizes(self) -> list[int]:
        """Of crews that may do it."""
        return [size for size in (self.task.size, *self.task.fewer) if self.too_few < size <= self.limit]


@dataclass(eq=False)
class _Running:
    """A task with its crew."""

    turn: _Turn
    crew: Crew
    streams: dict[int, Any] = field(default_factory=dict)
    """For every rank that has not finished, Ray's generator of references to its events; none before the start."""
    result: Finished = field(default_factory=Finished)
    """Of rank 0."""
    done: int = 0
    """Of the last progress."""
    told: bool = False
    """Whether the user knows that it waits for its places."""


class _Stage:
    """Tasks of one kind, from the first to the last."""

    def __init__(
        self,
        cluster: ClusterConfig,
        machines: Machines,
        metrics: RayMetrics,
        worker: Callable[..., Any],
        setup: tuple[Any, ...],
        method: str,
        tasks: Sequence[Task],
    ) -> None:
        self._cluster, self._machines, self._metrics = cluster, machines, metrics
        self._worker, self._setup, self._method = worker, setup, method
        self._waiting = deque(_Turn(task) for task in tasks)
        self._idle: list[Crew] = []
        self._running: list[_Running] = []
        self._asked = time.monotonic()
        self._failure: DatmError | None = None
        """Of the first task that failed; others that run are finished, and none is begun."""
        self._without_room = float("inf")
        """Since when nothing runs and there is room for nothing, in seconds of the monotonic clock."""

    def events(self) -> Iterator[tuple[Task, Event]]:
        """Of all tasks, until every one is finished, or one has failed and those beside it are finished."""
        while self._running or (self._waiting and not self._failure):
            yield from self._take_crews()
            yield from self._take_places()
            yield from self._listen()
            yield from self._ask_after_health()
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """Dismiss everybody."""
        for crew in [*self._idle, *(current.crew for current in self._running)]:
            crew.dismiss()

    # --- from waiting to running ----------------------------------------------------------------------------------

    def _busy(self) -> int:
        return sum(current.crew.size for current in self._running)

    def _take_crews(self) -> Iterator[tuple[Task, Event]]:
        """Give crews to waiting tasks, in order, so that one of many workers is not passed by for ever."""
        while self._waiting and not self._failure:
            turn, capacity = self._waiting[0], self._machines.capacity()
            # As large as the machines allow, whoever works on them now: it is the others' turn that is waited for.
            size = size_for(turn.sizes, capacity)
            if size is None or self._busy() + size > capacity:
                yield from self._wait_for_machines(turn, size)
                return
            self._without_room = float("inf")
            self._running.append(_Running(self._waiting.popleft(), self._crew(size, capacity - self._busy())))
            if size != (turn.size or turn.task.size):
                yield turn.task, Resized(size, turn.task.size)
            turn.size = size

    def _crew(self, size: int, room: int) -> Crew:
        """One that is idle, or else a new one in the place of those that would leave no room for it."""
        for crew in self._idle:
            if crew.size == size:
                self._idle.remove(crew)
                return crew
        while self._idle and sum(crew.size for crew in self._idle) + size > room:
            self._idle.pop(0).dismiss()
        return Crew.hire(size, self._cluster)

    def _wait_for_machines(self, turn: _Turn, size: int | None) -> Iterator[tuple[Task, Event]]:
        """Where nothing runs and nothing can: say so once, and not for ever."""
        if self._running or size is not None:
            return
        now = time.monotonic()
        if self._without_room > now:
            self._without_room = now
            self._machines.ask_for(turn.task.size)
            fits = sum(self._machines.fits())
            yield turn.task, Note(f"waits for machines: it wants {turn.task.size} worker(s), there is room for {fits}")
        if now - self._without_room > self._patience():
            raise self._no_room(turn.task.size)
        time.sleep(POLL_INTERVAL)

    def _take_places(self) -> Iterator[tuple[Task, Event]]:
        """Start the crews whose places have come, and give up on those whose places will not."""
        for current in [each for each in self._running if not each.streams]:
            if current not in self._running:
                continue  # another one has failed meanwhile, and nothing is begun any more
            crew = current.crew
            same = next((idle for idle in self._idle if idle.size == crew.size), None)
            if same is not None and not crew.has_places():
                self._idle.remove(same)  # another task has ended first
                crew.dismiss()
                current.crew = crew = same
            if crew.has_places():
                yield from self._begin(current)
            elif crew.size > sum(self._machines.fits()):
                self._give_back(current)  # a machine went while the crew waited for it
            elif time.monotonic() - crew.hired > self._patience():
                yield from self._make_do(current)
            elif not current.told and time.monotonic() - crew.hired > PATIENCE_UNTOLD:
                current.told = True
                room = f"room for {crew.size} worker(s), which others hold; up to {self._patience():.0f} s"
                yield current.turn.task, Note(f"waits for {room}")

    def _make_do(self, current: _Running) -> Iterator[tuple[Task, Event]]:
        """Where others hold the room that a crew waits for: try with fewer, or wait for tasks of this run to end."""
        crew, turn = current.crew, current.turn
        fewer = [size for size in turn.sizes if size < crew.size]
        if fewer:
            self._give_back(current)
            turn.limit, turn.no_growth_before = crew.size - 1, time.monotonic() + GROWTH_PAUSE
            yield turn.task, Note(f"no room for {crew.size} workers came free, although the machines have it")
        elif any(each.streams for each in self._running):
            crew.hired = time.monotonic()
        else:
            raise self._no_room(crew.size)

    def _begin(self, current: _Running) -> Iterator[tuple[Task, Event]]:
        """Start a crew that has its places, if they are not lost in that moment."""
        try:
            if not current.crew.actors:
                current.crew.start(self._worker, self._setup, self._cluster)
            current.streams = current.crew.begin(current.turn.task, self._method)
        except (ActorUnschedulableError, RaySystemError) as failure:
            event = self._lost(current, WorkerLostError(f"it could not start: {first_line(failure)}"))
            yield current.turn.task, event
            yield from self._act_upon(current, event)

    def _give_back(self, current: _Running) -> None:
        """Take a task from its crew; it waits for another, before all others."""
        self._running.remove(current)
        current.crew.dismiss()
        self._waiting.appendleft(current.turn)

    def _patience(self) -> float:
        return max(PLACEMENT_TIMEOUT, self._cluster.peer_timeout, self._cluster.wait_for_nodes)

    def _no_room(self, size: int) -> ClusterError:
        fits = self._machines.fits()
        fewer = sum(fits) < size
        return ClusterError(
            f"no room for {size} workers at once came free in {self._patience():g} s; "
            f"the cluster has {len(fits)} node(s) with room for {sum(fits)}",
            "nodes were lost" if fewer else "other jobs hold its CPUs or GPUs",
            "give the same command again when there are nodes, it resumes; or raise cluster.wait_for_nodes"
            if fewer
            else "stop what holds them, or raise cluster.wait_for_nodes",
        )

    # --- while they run -------------------------------------------------------------------------------------------

    def _listen(self) -> Iterator[tuple[Task, Event]]:
        """Wait for what happens next; not long, for there is more to look after."""
        streams = [(current, rank, stream) for current in self._running for rank, stream in current.streams.items()]
        wait = HEALTH_INTERVAL if all(current.streams for current in self._running) else POLL_INTERVAL
        if not streams:
            time.sleep(wait if self._running else 0)
            return
        arrived, _ = ray.wait([stream for *_, stream in streams], num_returns=1, timeout=wait, fetch_local=False)
        for current, rank in [(current, rank) for current, rank, stream in streams if stream in arrived]:
            self._running.remove(current)
            self._running.append(current)  # the others' events come first next time
            event = self._event(current, rank)
            if event is not None:
                yield current.turn.task, event
                yield from self._act_upon(current, event)

    def _event(self, current: _Running, rank: int) -> Event | None:
        """What a worker says; None where it is not for the user."""
        try:
            event: Event = ray.get(next(current.streams[rank]))
        except StopIteration:
            event = Finished()
        except RayError as failure:
            return self._lost(current, root_cause(current.streams, rank, unwrapped(failure)))
        if rank:
            self._metrics.record(current.turn.task, event, rank)
        if not isinstance(event, Finished):
            return event if rank == 0 else None
        del current.streams[rank]
        current.result = event if rank == 0 else current.result
        return None if current.streams else current.result

    def _act_upon(self, current: _Running, event: Event) -> Iterator[tuple[Task, Event]]:
        """See to the crew of a task of which something was heard."""
        if isinstance(event, Failed):
            for ended in [each for each in self._running if not each.streams]:  # of the failed one they were cleared
                self._running.remove(ended)
                ended.crew.dismiss()
        elif isinstance(event, Lost):
            self._give_back(current)
            while self._idle:  # they may have been on the same machine, and cost nothing to replace
                self._idle.pop().dismiss()
        elif isinstance(event, Finished):
            self._running.remove(current)
            self._idle.append(current.crew)
        elif isinstance(event, Progress):
            current.done = event.done
            if event.saved and self._grows(current):
                self._give_back(current)
                yield current.turn.task, Note("has saved its work, to go on with more workers")

    def _grows(self, current: _Running) -> bool:
        size, turn = current.crew.size, current.turn
        if size >= turn.task.size or time.monotonic() < turn.no_growth_before:
            return False
        sizes = (turn.task.size, *turn.task.fewer)
        free = self._machines.free() + sum(crew.size for crew in self._idle)
        better = grown(sizes, size, self._machines.capacity(), self._busy(), free)
        turn.limit = max(turn.limit, better or 0)  # there is room now
        return better is not None

    def _ask_after_health(self) -> Iterator[tuple[Task, Event]]:
        """Find those that are there, and do not live."""
        if time.monotonic() - self._asked < HEALTH_INTERVAL:
            return
        self._asked = time.monotonic()
        for current in [each for each in self._running if each.streams]:
            rank = current.crew.silent(self._cluster.peer_timeout)
            if rank is not None:
                since = current.crew.asked[rank][1] if rank in current.crew.asked else current.crew.started
                silence = time.monotonic() - since
                event = self._lost(current, WorkerLostError(f"it has not answered for {silence:.0f} s"))
                yield current.turn.task, event
                yield from self._act_upon(current, event)

    def _lost(self, current: _Running, cause: BaseException) -> Lost | Failed | Note:
        """What becomes of a task whose worker is gone; one that failed by itself is not tried again."""
        if isinstance(cause, ConfigError) and current.crew.size < current.turn.task.size:
            # With all its workers it had no such complaint, and machines may come back.
            current.turn.too_few = current.crew.size
            self._give_back(current)
            return Note(f"waits for machines, as {current.crew.size} worker(s) will not do: {cause}")
        if isinstance(cause, DatmError) and not isinstance(cause, WorkerLostError):
            return self._failed(current, cause)
        if not isinstance(cause, (*LOSSES, WorkerLostError)):
            raise cause from None
        turn = current.turn
        turn.history = turn.history.after_loss(current.done)
        if turn.history.gives_up(self._cluster.retries):
            lost = WorkerLostError(
                f"{turn.task.name} lost its worker {turn.history.in_vain} times without getting further, the last time "
                f"because: {reason(cause)}",
                "the machine may be out of memory, or the nodes are preempted faster than a task can save its work",
                "look at the worker's log in the Ray dashboard, then give the same command again: it resumes",
            )
            return self._failed(current, lost)
        return Lost(reason(cause), turn.history.losses)

    def _failed(self, current: _Running, failure: DatmError) -> Failed:
        """Where nothing else runs there is nothing to wait for. Raises the failure then."""
        self._failure = self._failure or failure
        current.streams.clear()
        others = sum(bool(each.streams) for each in self._running)
        if not others:
            raise self._failure from None
        return Failed(str(failure), others)
