"""Tasks on Ray actors. The only module that imports ray.

Every actor holds one worker and runs one task at a time. Events stream back through Ray's generators, so a dead
actor shows at once; its task goes to a new actor and the reason to the user, at most `cluster.retries` times.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from datm_ray.config import ClusterConfig
from datm_ray.errors import ClusterError, DatmError, WorkerLostError
from datm_ray.runtime.executor import Event, Finished, Lost, Task

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# The driver holds no accelerator; without this Ray hides GPUs from actors that ask for none and warns about it.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a cluster's head node to answer."""


@dataclass
class _Running:
    """A task on its actor."""

    task: Task
    attempt: int
    actor: Any
    events: Any
    """Ray's generator of object references."""


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
        self.workers = self._worker_count()
        where = f", dashboard http://{dashboard}" if dashboard else ""
        self.description = f"Ray, up to {self.workers} worker(s) of {cluster.threads_per_worker} thread(s){where}"

    def share(self, value: Any) -> Any:
        """Put the value into the object store; actors of one node share its arrays without copies."""
        return ray.put(value)

    def run(
        self, worker: Callable[..., Any], setup: tuple[Any, ...], method: str, tasks: Sequence[Task]
    ) -> Iterator[tuple[Task, Event]]:
        """See `Executor.run`."""
        waiting = deque((task, 1) for task in tasks)
        idle: list[Any] = []
        running: list[_Running] = []
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    actor = idle.pop() if idle else self._start(worker, setup)
                    task, attempt = waiting.popleft()
                    events = getattr(actor, method).options(num_returns="streaming").remote(*task.arguments)
                    running.append(_Running(task, attempt, actor, events))
                for current in _ready(running):
                    event = self._next_event(current)
                    if not isinstance(event, Lost | Finished):
                        yield current.task, event
                        continue
                    running.remove(current)
                    if isinstance(event, Finished):
                        idle.append(current.actor)
                    else:
                        waiting.appendleft((current.task, current.attempt + 1))
                    yield current.task, event
        finally:
            for actor in [*idle, *(current.actor for current in running)]:
                ray.kill(actor)

    def close(self) -> None:
        """Disconnect; a cluster that was started for the run ends with it."""
        if self._owns_cluster:
            ray.shutdown()

    def _start(self, worker: Callable[..., Any], setup: tuple[Any, ...]) -> Any:
        remote = ray.remote(num_cpus=self._cluster.threads_per_worker, num_gpus=self._cluster.gpus_per_worker)
        return remote(worker).remote(*setup)

    def _next_event(self, current: _Running) -> Event:
        try:
            event: Event = ray.get(next(current.events))
        except (ActorDiedError, ActorUnavailableError) as failure:
            _raise_expected(failure.args[0] if failure.args else None)  # the worker's constructor raised it
            return self._lost(current, failure)
        except RayTaskError as failure:
            _raise_expected(failure)
            raise
        return event

    def _lost(self, current: _Running, failure: RayError) -> Lost:
        reason = _reason(failure)
        if current.attempt > self._cluster.retries:
            raise WorkerLostError(
                f"{current.task.name} lost its worker {current.attempt} times, the last time because: {reason}",
                "the machine may be out of memory, or the nodes are preempted faster than a task can finish",
                "look at the worker's log in the Ray dashboard, then give the same command again: it resumes",
            ) from None
        return Lost(reason, current.attempt)

    def _worker_count(self) -> int:
        resources = ray.cluster_resources()
        cluster = self._cluster
        fits = int(resources.get("CPU", 0) // cluster.threads_per_worker)
        if cluster.gpus_per_worker:
            fits = min(fits, int(resources.get("GPU", 0) / cluster.gpus_per_worker + 1e-9))
        if fits < (cluster.workers or 1):
            raise ClusterError(
                f"{cluster.workers or 1} worker(s) of {cluster.threads_per_worker} CPU(s) and "
                f"{cluster.gpus_per_worker:g} GPU(s) are asked for, but the cluster has "
                f"{resources.get('CPU', 0):g} CPU(s) and {resources.get('GPU', 0):g} GPU(s)",
                remedy="lower cluster.workers, threads_per_worker or gpus_per_worker, or add nodes",
            )
        return cluster.workers or fits


def _ready(running: list[_Running]) -> list[_Running]:
    """Those whose next event has arrived; waits for at least one."""
    streams = [current.events for current in running]
    arrived, _ = ray.wait(streams, num_returns=1, fetch_local=False)
    return [current for current in running if any(current.events is stream for stream in arrived)]


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


def _raise_expected(failure: object) -> None:
    """Raise the worker's own error as it was, if it is one that a user may meet; otherwise return."""
    if isinstance(failure, RayTaskError):
        if isinstance(failure.cause, DatmError):
            raise failure.cause from None
        raise failure


def _first_line(failure: BaseException) -> str:
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return lines[0] if lines else type(failure).__name__


def _reason(failure: RayError) -> str:
    """Why an actor died, without Ray's identifiers."""
    text = " ".join(str(failure).split())
    for mark in ("Worker exit detail: ", "The actor is dead because "):
        if mark in text:
            return text.partition(mark)[2].partition(" Some common causes")[0]
    return _first_line(failure)
