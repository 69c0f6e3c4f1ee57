"""Crews: Ray actors that do one task together, and stay together for the next.

A crew of one is a crew too. Its places are reserved all at once, or not at all: two crews that have half of theirs
would wait for each other for ever.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
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
from datm_ray.runtime.executor import Event, Seat, Task, explaining_memory
from datm_ray.runtime.ray_cluster import first_line, place
from datm_ray.runtime.recovery import is_silent

CAUSE_TIMEOUT = 3.0
"""Seconds to wait for the reason why a worker lost its peers."""
LONGEST_START = 900.0
"""Seconds after which a worker counts as lost that is not set up, or cluster.peer_timeout where that is longer. The
cluster may have to install packages first."""
SHORTEST_SILENCE = 30.0
"""Seconds for which no worker counts as lost because it does not answer, however short cluster.peer_timeout is."""
HEALTH = "health"
"""Name of the thread of an actor that answers while another one works."""

LOSSES: tuple[type[BaseException], ...] = (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    PeerLostError,
    WorkerCrashedError,
)
"""What makes a task worth another attempt."""


class _Host:
    """An actor: a worker, and what it needs to work with others."""

    def __init__(self, worker: Callable[..., Any], *setup: Any) -> None:
        if not ray.get_gpu_ids():
            # Not every version of Ray hides what was not asked for; all workers of a machine would take its first GPU.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._worker = worker(*setup)

    def __repr__(self) -> str:
        """What Ray's dashboard and logs call the actor."""
        return type(self).__name__

    def ready(self) -> None:
        """Ends when the worker is there."""

    def answer(self) -> None:
        """Ends at once, unless the process hangs or its machine cannot be reached."""

    def meeting(self, *_others: None) -> str:
        """An address at which the others can find this actor; asked for when all of them are ready."""
        with socket.create_server(("", 0)) as server:
            # Someone may take the port before rank 0 does. Then the attempt fails, and the next has another port.
            host = ray.util.get_node_ip_address()
            return f"{f'[{host}]' if ':' in host else host}:{server.getsockname()[1]}"

    def work(self, method: str, rank: int, size: int, meeting: str, *arguments: Any) -> Iterator[Event]:
        """Do a task, or this actor's part of it."""
        seat = {"seat": Seat(rank, size, meeting)} if size > 1 else {}
        with explaining_memory():
            yield from getattr(self._worker, method)(*arguments, **seat)


@dataclass(eq=False)
class Crew:
    """Some actors, or the places that are reserved for them."""

    size: int
    group: Any
    """Ray's placement group."""
    hired: float
    """When the places were asked for, in seconds of the monotonic clock."""
    actors: list[Any] = field(default_factory=list)
    """None before the places are there."""
    ready: list[Any] = field(default_factory=list)
    """Of every actor, a reference that is there when its worker is; none when all were seen ready."""
    started: float = 0.0
    """When the actors were started, in seconds of the monotonic clock."""
    asked: dict[int, tuple[Any, float]] = field(default_factory=dict)
    """By rank: the question that has no answer yet, and when it was asked."""

    @classmethod
    def hire(cls, size: int, cluster: ClusterConfig) -> Crew:
        """Ask for places."""
        return cls(size, placement_group([place(cluster)] * size), time.monotonic())

    def has_places(self) -> bool:
        """Whether all places are there."""
        # Not group.wait(0), which says no whenever the answer is not there at once, be the places there or not.
        return bool(self.actors) or placement_group_table(self.group).get("state") == "CREATED"

    def start(self, worker: Callable[..., Any], setup: tuple[Any, ...], cluster: ClusterConfig) -> None:
        """Let the workers take their places, each under a name that the dashboard shows."""
        title, mark = getattr(worker, "__name__", "Worker"), secrets.token_hex(3)
        host = type(title, (_Host,), {})
        options: dict[str, Any] = {"concurrency_groups": {HEALTH: 1}}  # which Ray's annotations leave out
        remote: Any = ray.remote(**options)(host)
        for rank in range(self.size):
            actor = remote.options(
                num_cpus=cluster.threads_per_worker,
                num_gpus=cluster.gpus_per_worker or 0.0,
                name=f"{title} {rank + 1} of {self.size}, {mark}",
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank),
            )
            self.actors.append(actor.remote(worker, *setup))
        self.ready = [actor.ready.remote() for actor in self.actors]
        self.started = time.monotonic()

    def begin(self, task: Task, method: str) -> dict[int, Any]:
        """Give the crew a task: for every rank, Ray's generator of references to its events."""
        # References, which Ray follows before it makes a call: nobody waits here until the workers are set up. There
        # are none where all were seen ready, and nothing is to be waited for.
        meeting = self.actors[0].meeting.remote(*self.ready[1:]) if self.size > 1 else ""
        return {
            rank: actor.work.options(num_returns="streaming").remote(method, rank, self.size, meeting, *task.arguments)
            for rank, actor in enumerate(self.actors)
        }

    def silent(self, limit: float) -> int | None:
        """The rank of an actor that has not answered for so many seconds; None where all do. Asks them again."""
        now = time.monotonic()
        if self.ready:  # a worker that is being set up may be too busy to answer
            arrived, _ = ray.wait(self.ready, num_returns=len(self.ready), timeout=0, fetch_local=False)
            late = next((rank for rank, ready in enumerate(self.ready) if ready not in arrived), None)
            self.ready = [] if late is None else self.ready
            return late if is_silent(self.started, now, max(limit, LONGEST_START)) else None
        limit = max(limit, SHORTEST_SILENCE)
        for rank, actor in enumerate(self.actors):
            question = self.asked.get(rank)
            # An answer that is an error will do: what ends an actor shows in its stream of events.
            if question is not None and ray.wait([question[0]], timeout=0, fetch_local=False)[0]:
                question = None
            if is_silent(question and question[1], now, limit):
                return rank
            if question is None:
                question = actor.answer.options(concurrency_group=HEALTH).remote(), now
            self.asked[rank] = question
        return None

    def dismiss(self) -> None:
        """End the actors and give the places back."""
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.group)


def root_cause(streams: dict[int, Any], rank: int, failure: BaseException) -> BaseException:
    """Why a task failed. That a worker lost its peers is a symptom, if one of those tells what happened to itself.

    Args:
        streams: of the events of every rank at work.
        rank: the one that failed.
    """
    end = time.monotonic() + CAUSE_TIMEOUT
    others = {other: stream for other, stream in streams.items() if other != rank}
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
        return unwrapped(end) if isinstance(end, RayError) else end
    return None


def unwrapped(failure: BaseException) -> BaseException:
    """The error that an actor raised or died of; one that nobody expects keeps what Ray says about it."""
    inner = failure.cause if isinstance(failure, RayTaskError) else next(iter(failure.args), None)
    if isinstance(failure, RayTaskError):
        return unwrapped(inner) if isinstance(inner, DatmError | RayActorError) else failure
    # The worker's constructor raised it.
    return unwrapped(inner) if isinstance(inner, RayTaskError) else failure


def reason(failure: BaseException) -> str:
    """Why a worker was lost, without Ray's identifiers."""
    if isinstance(failure, WorkerLostError):  # lost peers, too
        return failure.fact
    if isinstance(failure, ActorUnavailableError):
        return "its process or its machine cannot be reached"
    text = " ".join(str(failure).split())
    for mark in ("Worker exit detail: ", "The actor is dead because "):
        if mark in text:
            return text.partition(mark)[2].partition(" Some common causes")[0]
    return first_line(failure)
