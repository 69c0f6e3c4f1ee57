"""Worker groups: Ray actors that run one task together, and then the next one.

A single worker is a group of size 1. The resources of a group are reserved all at once: two groups that each hold half
of theirs would wait for each other for ever.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from datm_ray.config import ClusterConfig
from datm_ray.errors import DatmError, PeerLostError, WorkerLostError
from datm_ray.monitor.logs import Collector, accept
from datm_ray.runtime import stopping
from datm_ray.runtime.executor import Stopped, Task, WorkerRank, explaining_memory
from datm_ray.runtime.ray.cluster import first_line, worker_resources
from datm_ray.runtime.recovery import is_silent

ROOT_CAUSE_TIMEOUT = 3.0
"""Seconds to wait for the original error, after a worker reports that it lost its peers."""
LONGEST_START = 900.0
"""Seconds within which a worker must start, or `cluster.peer_timeout` if that is longer. Ray may have to install
packages first."""
SHORTEST_SILENCE = 30.0
"""Seconds without a heartbeat during which no worker is declared lost, however short `cluster.peer_timeout` is."""
ANSWER_TIMEOUT = 5.0
"""Seconds to wait for workers to say whether they save their work. Workers that are starting say nothing."""
HEARTBEAT = "heartbeat"
"""Name of the concurrency group of an actor whose thread answers heartbeats while the worker is busy."""

LOSSES: tuple[type[BaseException], ...] = (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    PeerLostError,
    WorkerCrashedError,
)
"""Errors after which a task is tried again."""


class _Host:
    """Ray actor that holds one worker and runs its part of a task."""

    def __init__(self, rank: int, log_level: int, worker: Callable[..., Any], *setup: Any) -> None:
        if not ray.get_gpu_ids():
            # Some versions of Ray do not hide GPUs that were not requested. All workers of a node would use its first
            # GPU.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._log = Collector(f"{type(self).__name__}/{rank}/{os.getpid()}", log_level)
        self._worker = worker(*setup)

    def __repr__(self) -> str:
        """Name of the actor in Ray's dashboard and logs."""
        return type(self).__name__

    def ready(self) -> None:
        """Return once the worker is constructed."""

    def heartbeat(self) -> list[logging.LogRecord]:
        """Return new log records at once. No answer means that the process hangs or its node is unreachable."""
        return self._log.take()

    def stop(self) -> bool:
        """Ask the worker to save its work and to stop. Returns False if it is at nothing that it can save."""
        return stopping.ask()

    def rendezvous(self, *_others: None) -> str:
        """Return a free "host:port" for rank 0. The unused arguments make Ray wait until every worker is ready."""
        with socket.create_server(("", 0)) as server:
            # Another process may take the port before rank 0 does. The attempt then fails, and the next one gets
            # another port.
            host = ray.util.get_node_ip_address()
            return f"{f'[{host}]' if ':' in host else host}:{server.getsockname()[1]}"

    def work(self, method: str, rank: int, size: int, rendezvous: str, *arguments: Any) -> Iterator[Any]:
        """Run this actor's part of a task and yield its events, each after the log records before it."""
        worker_rank = {"worker_rank": WorkerRank(rank, size, rendezvous)} if size > 1 else {}
        try:
            with explaining_memory():
                for event in getattr(self._worker, method)(*arguments, **worker_rank):
                    yield from self._records()
                    yield event
        except stopping.Interrupted as end:
            yield from self._records()
            yield Stopped(str(end))
        except Exception:
            yield from self._records()
            raise

    def _records(self) -> Iterator[list[logging.LogRecord]]:
        records = self._log.take()
        if records:
            yield records


@dataclass(eq=False)
class WorkerGroup:
    """Actors that run a task together, or the resources reserved for them."""

    size: int
    placement: Any
    """Ray's placement group, with one bundle per worker."""
    reserved_at: float
    """Time at which the resources were requested, in seconds of the monotonic clock."""
    actors: list[Any] = field(default_factory=list)
    """Actor handles by rank; empty until the group is started."""
    ready: list[Any] = field(default_factory=list)
    """References to each actor's `ready`, by rank; empty once all are ready."""
    started_at: float = 0.0
    """Time at which the actors were started, in seconds of the monotonic clock."""
    unanswered: dict[int, tuple[Any, float]] = field(default_factory=dict)
    """Heartbeat requests without an answer: rank -> (reference, time of the request)."""

    @classmethod
    def reserve(cls, size: int, cluster: ClusterConfig) -> WorkerGroup:
        """Request the resources of a group from Ray, without waiting for them."""
        return cls(size, placement_group([worker_resources(cluster)] * size), time.monotonic())

    def is_placed(self) -> bool:
        """True if Ray has reserved the resources of all workers."""
        # group.wait(0) would return False whenever the answer takes time, even if the resources are reserved.
        return bool(self.actors) or placement_group_table(self.placement).get("state") == "CREATED"

    def start(self, worker: Callable[..., Any], setup: tuple[Any, ...], cluster: ClusterConfig) -> None:
        """Start the actors on the reserved resources, each with a name for the dashboard."""
        title, mark = getattr(worker, "__name__", "Worker"), secrets.token_hex(3)
        host = type(title, (_Host,), {})
        options: dict[str, Any] = {"concurrency_groups": {HEARTBEAT: 1}}  # missing in Ray's annotations
        remote: Any = ray.remote(**options)(host)
        for rank in range(self.size):
            actor = remote.options(
                num_cpus=cluster.threads_per_worker,
                num_gpus=cluster.gpus_per_worker or 0.0,
                name=f"{title} {rank + 1} of {self.size}, {mark}",
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=rank),
            )
            self.actors.append(actor.remote(rank, logging.getLogger("datm_ray").getEffectiveLevel(), worker, *setup))
        self.ready = [actor.ready.remote() for actor in self.actors]
        self.started_at = time.monotonic()

    def submit(self, task: Task, method: str) -> dict[int, Any]:
        """Submit a task to the group.

        Returns:
            Rank -> Ray's generator of references to the events of that rank.
        """
        # Ray resolves these references before the call, so the driver does not wait until the workers are ready. Once
        # all are ready there are none.
        rendezvous = self.actors[0].rendezvous.remote(*self.ready[1:]) if self.size > 1 else ""
        return {
            rank: actor.work.options(num_returns="streaming").remote(
                method, rank, self.size, rendezvous, *task.arguments
            )
            for rank, actor in enumerate(self.actors)
        }

    def silent_rank(self, limit: float) -> int | None:
        """Rank of an actor without a heartbeat for more than `limit` seconds, or `None`. Sends the next requests."""
        now = time.monotonic()
        if self.ready:  # a worker that is still starting may be too busy to answer
            arrived, _ = ray.wait(self.ready, num_returns=len(self.ready), timeout=0, fetch_local=False)
            late = next((rank for rank, ready in enumerate(self.ready) if ready not in arrived), None)
            self.ready = [] if late is None else self.ready
            return late if is_silent(self.started_at, now, max(limit, LONGEST_START)) else None
        limit = max(limit, SHORTEST_SILENCE)
        for rank, actor in enumerate(self.actors):
            request = self.unanswered.get(rank)
            # An error counts as an answer: the stream of events reports why an actor ended.
            if request is not None and ray.wait([request[0]], timeout=0, fetch_local=False)[0]:
                with suppress(RayError):
                    accept(ray.get(request[0]))
                request = None
            if is_silent(request and request[1], now, limit):
                return rank
            if request is None:
                request = actor.heartbeat.options(concurrency_group=HEARTBEAT).remote(), now
            self.unanswered[rank] = request
        return None

    def saves(self) -> bool:
        """Ask all workers to save their work and to stop. Returns True if any will."""
        asked = [actor.stop.options(concurrency_group=HEARTBEAT).remote() for actor in self.actors]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_TIMEOUT) if asked else ([], [])
        try:
            return any(ray.get(answered))
        except RayError:  # one has died, and the others lose their peer
            return False

    def stop(self) -> None:
        """Kill the actors and free their resources."""
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.placement)


def root_cause(streams: dict[int, Any], rank: int, failure: BaseException) -> BaseException:
    """Error that made a task fail. If a worker lost its peers, the error of the peer that ended first.

    Args:
        streams: rank -> generator of references to events, for every rank that has not finished.
        rank: rank that failed.
        failure: error of that rank.
    """
    end = time.monotonic() + ROOT_CAUSE_TIMEOUT
    others = {other: stream for other, stream in streams.items() if other != rank}
    while isinstance(failure, PeerLostError) and others and time.monotonic() < end:
        arrived, _ = ray.wait(list(others.values()), num_returns=1, timeout=end - time.monotonic(), fetch_local=False)
        for other in [other for other, stream in others.items() if any(stream is one for one in arrived)]:
            end_state = _end_of(others[other])
            if end_state is not None:
                del others[other]
                failure = failure if isinstance(end_state, PeerLostError | StopIteration) else end_state
    return failure


def _end_of(stream: Any) -> BaseException | None:
    """Error or `StopIteration` that ended a stream of events, or `None` if its next reference is an event."""
    try:
        ray.get(next(stream))
    except (RayError, StopIteration) as end:
        return unwrapped(end) if isinstance(end, RayError) else end
    return None


def unwrapped(failure: BaseException) -> BaseException:
    """Error that an actor raised or died of. An unexpected error keeps Ray's wrapper with its traceback."""
    inner = failure.cause if isinstance(failure, RayTaskError) else next(iter(failure.args), None)
    if isinstance(failure, RayTaskError):
        return unwrapped(inner) if isinstance(inner, DatmError | RayActorError) else failure
    # The worker's constructor raised it.
    return unwrapped(inner) if isinstance(inner, RayTaskError) else failure


def reason(failure: BaseException) -> str:
    """Reason why a worker was lost, in one line without Ray's identifiers."""
    if isinstance(failure, WorkerLostError):  # includes PeerLostError
        return failure.fact
    if isinstance(failure, ActorUnavailableError):
        return "its process or its node is unreachable"
    text = " ".join(str(failure).split())
    for mark in ("Worker exit detail: ", "The actor is dead because "):
        if mark in text:
            return text.partition(mark)[2].partition(" Some common causes")[0]
    return first_line(failure)
