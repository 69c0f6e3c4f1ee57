"""Tasks on Ray actors. The only module that imports ray.

Every actor holds one worker. A task is done by a crew: one actor, or as many as the task wants at once. Events stream
back through Ray's generators, so a dead actor shows at once; its task goes to a new crew and the reason to the user,
at most `cluster.retries` times.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from datm_ray.config import ClusterConfig
from datm_ray.errors import ClusterError, DatmError, PeerLostError, WorkerLostError
from datm_ray.runtime.executor import Event, Finished, Lost, Seat, Task

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# The driver holds no accelerator; without this Ray hides GPUs from actors that ask for none and warns about it.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a cluster's head node to answer."""
PLACEMENT_TIMEOUT = 60.0
"""Seconds to wait for room for a crew, or cluster.peer_timeout where that is longer: dismissed workers take moments to
give theirs back, and a cluster that grows on demand needs minutes."""
CAUSE_TIMEOUT = 3.0
"""Seconds to wait for the reason why a worker lost its peers."""

LOSSES = (ActorDiedError, ActorUnavailableError, PeerLostError)
"""What makes a task worth another attempt."""


class _Host:
    """An actor: a worker, and what it needs to work with others."""

    def __init__(self, worker: Callable[..., Any], *setup: Any) -> None:
        self._worker = worker(*setup)

    def ready(self) -> None:
        """Ends when the worker is there."""

    def meeting(self, *_others: None) -> str:
        """An address at which the others can find this actor; asked for when all of them are ready."""
        with socket.create_server(("", 0)) as server:
            # Someone may take the port before rank 0 does. Then the attempt fails, and the next has another port.
            host = ray.util.get_node_ip_address()
            return f"{f'[{host}]' if ':' in host else host}:{server.getsockname()[1]}"

    def work(self, method: str, rank: int, size: int, meeting: str, *arguments: Any) -> Iterator[Event]:
        """Do a task, or this actor's part of it."""
        seat = {"seat": Seat(rank, size, meeting)} if size > 1 else {}
        yield from getattr(self._worker, method)(*arguments, **seat)


@dataclass(eq=False)
class _Crew:
    """The actors of one task; they stay together for the next."""

    group: Any = None
    """Ray's placement group, or None for an actor by itself."""
    actors: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class _Running:
    """A task on its crew."""

    task: Task
    attempt: int
    crew: _Crew
    working: dict[int, Any] = field(default_factory=dict)
    """For every rank that has not finished, Ray's generator of references to its events."""
    result: Finished = field(default_factory=Finished)
    """Of rank 0."""


class RayExecutor:
    """Workers as Ray actors on a running cluster, or on one started on this machine for the run."""

    def __init__(self, cluster: ClusterConfig, address: str | None = None) -> None:
        if cluster.device == "cuda" and not cluster.gpus_per_worker:
            raise ClusterError(
                "cluster.device is 'cuda', but cluster.gpus_per_worker is 0, so that Ray hides the GPUs from workers",
                remedy="set cluster.gpus_per_worker=1, or cluster.device=auto",
            )
        self._cluster = cluster
        self._owns_cluster = address is not None or not ray.is_initialized()
        dashboard = _connect(address) if self._owns_cluster else ""
        self.workers, self.workers_per_machine = self._room()
        where = f", dashboard http://{dashboard}" if dashboard else ""
        self.description = f"Ray, up to {self.workers} worker(s) of {cluster.threads_per_worker} thread(s){where}"

    def share(self, value: Any) -> Any:
        """Put the value into the object store; actors of one node share its arrays without copies."""
        return ray.put(value)

    def run(
        self, worker: Callable[..., Any], setup: tuple[Any, ...], method: str, tasks: Sequence[Task]
    ) -> Iterator[tuple[Task, Event]]:
        """See `Executor.run`."""
        for task in tasks:
            self.require_room(task.name, task.size)
        waiting = deque((task, 1) for task in tasks)
        idle: list[_Crew] = []
        running: list[_Running] = []
        try:
            while waiting or running:
                # In order, so that a task of many workers is not passed by for ever.
                while waiting and _busy(running) + waiting[0][0].size <= self.workers:
                    task, attempt = waiting.popleft()
                    crew = self._crew(task.size, idle, self.workers - _busy(running), worker, setup)
                    running.append(_Running(task, attempt, crew))
                    _begin(running[-1], method)
                current, event = self._next_event(running)
                if isinstance(event, Lost):
                    running.remove(current)
                    _dismiss(current.crew)
                    waiting.appendleft((current.task, current.attempt + 1))
                elif isinstance(event, Finished):
                    running.remove(current)
                    idle.append(current.crew)
                if event is not None:
                    yield current.task, event
        finally:
            for crew in [*idle, *(current.crew for current in running)]:
                _dismiss(crew)

    def close(self) -> None:
        """Disconnect; a cluster that was started for the run ends with it."""
        if self._owns_cluster:
            ray.shutdown()

    def require_room(self, name: str, size: int) -> None:
        """See `Executor.require_room`."""
        if size > self.workers:
            raise ClusterError(
                f"{name} wants {size} workers at once, but there is room for {self.workers}",
                "cluster.shards asks for so many, times the networks that cluster.backbones_apart and "
                "auxiliaries_apart set apart",
                "lower them, raise cluster.workers if it is set, or add nodes",
            )

    def _crew(
        self, size: int, idle: list[_Crew], room: int, worker: Callable[..., Any], setup: tuple[Any, ...]
    ) -> _Crew:
        """One that is idle, or else a new one in the place of those that would leave no room for it."""
        for crew in idle:
            if len(crew.actors) == size:
                idle.remove(crew)
                return crew
        while sum(len(crew.actors) for crew in idle) + size > room:
            _dismiss(idle.pop(0))
        return self._hire(size, worker, setup)

    def _hire(self, size: int, worker: Callable[..., Any], setup: tuple[Any, ...]) -> _Crew:
        cluster, crew = self._cluster, _Crew()
        # Named after the worker, for Ray shows this name wherever it lists actors.
        host = type(getattr(worker, "__name__", "Worker"), (_Host,), {})
        remote: Any = ray.remote(num_cpus=cluster.threads_per_worker, num_gpus=cluster.gpus_per_worker)(host)
        if size == 1:
            crew.actors.append(remote.remote(worker, *setup))
            return crew
        # All places or none: two crews that have half of theirs would wait for each other for ever.
        place = {"CPU": float(cluster.threads_per_worker), "GPU": cluster.gpus_per_worker}
        crew.group = placement_group([{name: count for name, count in place.items() if count}] * size)
        self._require_place(crew, size)
        for rank in range(size):
            where = PlacementGroupSchedulingStrategy(crew.group, placement_group_bundle_index=rank)
            crew.actors.append(remote.options(scheduling_strategy=where).remote(worker, *setup))
        return crew

    def _require_place(self, crew: _Crew, size: int) -> None:
        """Wait for the cluster to have room for a crew; what was just dismissed takes moments to be given back."""
        patience = max(PLACEMENT_TIMEOUT, self._cluster.peer_timeout)
        if crew.group.wait(timeout_seconds=patience):
            return
        _dismiss(crew)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        fits = sum(_fitting(node["Resources"], self._cluster) for node in nodes)
        raise ClusterError(
            f"no room for {size} workers at once came free in {patience:g} s; "
            f"the cluster has {len(nodes)} node(s) with room for {fits}",
            "nodes were lost" if fits < size else "other jobs hold its CPUs or GPUs",
            f"give the same command again when there are nodes, it resumes; or with --set cluster.shards={max(1, fits)}"
            if fits < size
            else "stop what holds them, or raise cluster.peer_timeout",
        )

    def _next_event(self, running: list[_Running]) -> tuple[_Running, Event | None]:
        """Wait for what happens next; None where it is not for the user."""
        current, rank = _arrived(running)
        try:
            event: Event = ray.get(next(current.working[rank]))
        except StopIteration:
            event = Finished()
        except RayError as failure:
            return current, self._lost(current, _root_cause(current, rank, _unwrapped(failure)))
        if not isinstance(event, Finished):
            return current, event if rank == 0 else None
        del current.working[rank]
        current.result = event if rank == 0 else current.result
        return current, None if current.working else current.result

    def _lost(self, current: _Running, cause: BaseException) -> Lost:
        if not isinstance(cause, LOSSES):
            raise cause from None
        reason = _reason(cause)
        if current.attempt > self._cluster.retries:
            raise WorkerLostError(
                f"{current.task.name} lost its worker {current.attempt} times, the last time because: {reason}",
                "the machine may be out of memory, or the nodes are preempted faster than a task can finish",
                "look at the worker's log in the Ray dashboard, then give the same command again: it resumes",
            ) from None
        return Lost(reason, current.attempt)

    def _room(self) -> tuple[int, int]:
        """Workers for which the cluster has room, at most as many as are asked for, and those of one node."""
        cluster = self._cluster
        fits = [_fitting(node["Resources"], cluster) for node in ray.nodes() if node["Alive"]]
        if sum(fits) < (cluster.workers or 1):
            resources = ray.cluster_resources()
            raise ClusterError(
                f"{cluster.workers or 1} worker(s) of {cluster.threads_per_worker} CPU(s) and "
                f"{cluster.gpus_per_worker:g} GPU(s) are asked for, but the cluster has "
                f"{resources.get('CPU', 0):g} CPU(s) and {resources.get('GPU', 0):g} GPU(s)",
                remedy="lower cluster.workers, threads_per_worker or gpus_per_worker, or add nodes",
            )
        workers = cluster.workers or sum(fits)
        return workers, min(workers, max(fits))


def _fitting(resources: dict[str, float], cluster: ClusterConfig) -> int:
    """Workers for which a node has room. No worker spans two nodes, and no share of a GPU spans two GPUs."""
    fits = int(resources.get("CPU", 0) // cluster.threads_per_worker)
    wanted, gpus = cluster.gpus_per_worker, resources.get("GPU", 0)
    if not wanted:
        return fits
    return min(fits, int(gpus) * int(1 / wanted + 1e-9) if wanted < 1 else int(gpus // wanted))


def _busy(running: list[_Running]) -> int:
    return sum(current.task.size for current in running)


def _begin(current: _Running, method: str) -> None:
    """Give a task to its crew."""
    task, actors = current.task, current.crew.actors
    # References, which Ray follows before it makes a call: nobody waits here until the workers are set up.
    meeting = actors[0].meeting.remote(*(actor.ready.remote() for actor in actors[1:])) if task.size > 1 else ""
    for rank, actor in enumerate(actors):
        work = actor.work.options(num_returns="streaming")
        current.working[rank] = work.remote(method, rank, task.size, meeting, *task.arguments)


def _dismiss(crew: _Crew) -> None:
    for actor in crew.actors:
        ray.kill(actor)
    if crew.group is not None:
        remove_placement_group(crew.group)


def _arrived(running: list[_Running]) -> tuple[_Running, int]:
    """Wait for an event: of which task and rank it is."""
    streams = [(current, rank, stream) for current in running for rank, stream in current.working.items()]
    (first,), _ = ray.wait([stream for *_, stream in streams], num_returns=1, fetch_local=False)
    return next((current, rank) for current, rank, stream in streams if stream is first)


def _root_cause(current: _Running, rank: int, failure: BaseException) -> BaseException:
    """Why a task failed. That a worker lost its peers is a symptom, if one of those tells what happened to itself."""
    end = time.monotonic() + CAUSE_TIMEOUT
    others = {other: stream for other, stream in current.working.items() if other != rank}
    while isinstance(failure, PeerLostError) and others and time.monotonic() < end:
        arrived, _ = ray.wait(list(others.values()), num_returns=1, timeout=end - time.monotonic(), fetch_local=False)
        for other in [other for other, stream in others.items() if any(stream is one for one in arrived)]:
            told = _told(others[other])
            if told is not None:
                del others[other]
                failure = failure if isinstance(told, PeerLostError | StopIteration) else told
    return failure


def _told(stream: Any) -> BaseException | None:
    """How a stream of events ended, or None where it goes on."""
    try:
        ray.get(next(stream))
    except (RayError, StopIteration) as end:
        return _unwrapped(end) if isinstance(end, RayError) else end
    return None


def _unwrapped(failure: BaseException) -> BaseException:
    """The error that an actor raised or died of; one that nobody expects keeps what Ray says about it."""
    inner = failure.cause if isinstance(failure, RayTaskError) else next(iter(failure.args), None)
    if isinstance(failure, RayTaskError):
        return _unwrapped(inner) if isinstance(inner, DatmError | RayActorError) else failure
    # The worker's constructor raised it.
    return _unwrapped(inner) if isinstance(inner, RayTaskError) else failure


def _connect(address: str | None) -> str:
    """Connect to, or start, a cluster. Returns the dashboard's host and port, or ""."""
    address = address or os.environ.get("RAY_ADDRESS")
    # "local", for without an address Ray would join whatever cluster was last started on this machine.
    where: dict[str, Any] = {"address": address} if address else {"address": "local", "dashboard_host": "127.0.0.1"}
    try:
        if address:
            _require_listener(address)
        context = ray.init(**where, logging_level=logging.CRITICAL, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as failure:
        raise ClusterError(
            f"cannot connect to Ray at {address}: {_first_line(failure)}"
            if address
            else f"Ray does not start on this machine: {_first_line(failure)}",
            remedy="check the address, and the token if the cluster asks for one; or use --executor serial",
        ) from None
    return str(context.dashboard_url or "")


def _require_listener(address: str) -> None:
    """Fail at once where nothing listens: Ray itself would try for half a minute."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT).close()


def _first_line(failure: BaseException) -> str:
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[0] if lines else type(failure).__name__


def _reason(failure: BaseException) -> str:
    """Why a worker was lost, without Ray's identifiers."""
    if isinstance(failure, PeerLostError):
        return failure.fact
    text = " ".join(str(failure).split())
    for mark in ("Worker exit detail: ", "The actor is dead because "):
        if mark in text:
            return text.partition(mark)[2].partition(" Some common causes")[0]
    return _first_line(failure)
