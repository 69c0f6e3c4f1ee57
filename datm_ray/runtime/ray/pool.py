"""Pool of Ray actors that each run one task after another.

Ray places the actors, and its autoscaler starts nodes for actors that wait. An actor keeps its worker, with data set
and compiled code, while its tasks need the same worker.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from datm_ray.monitor.logs import Collector, accept
from datm_ray.runtime import stopping
from datm_ray.runtime.executor import Stopped, Task, WorkerRank, explaining_memory
from datm_ray.runtime.machine import assigned
from datm_ray.runtime.machine.versions import Versions, require_same
from datm_ray.runtime.ray.compat import mark
from datm_ray.runtime.retries import Patience, watched

CONTROL = "control"
"""Name of an actor's second concurrency group. Its thread answers calls while the worker is busy."""
SHOW_ALL_GPUS = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
"""Environment variable with which Ray lets every worker see all GPUs of its node. A node's administrator may set it."""


class Gpus(NamedTuple):
    """GPUs that Ray has given to an actor."""

    node: str
    """Ray's identifier of the node. Nodes on one machine, and containers, may share a host name."""
    numbers: str
    """Numbers of the GPUs on the node, such as "3" or "2,5"; "" for an actor without any."""
    host: str
    """Name of the node's host, for messages."""

    def __str__(self) -> str:
        """GPUs in words, such as "GPU 3 of node-7"."""
        return f"GPU {self.numbers} of {self.host}"


class StageSetup(NamedTuple):
    """Worker class, setup and method that the tasks of a stage share."""

    number: int
    """Number that identifies this pair of worker class and setup. An actor keeps its worker while it stays the same."""
    worker: Callable[..., Any]
    setup: tuple[Any, ...]
    """Arguments of the worker's constructor. The actor resolves Ray's references among them."""
    method: str
    versions: Versions | None = None
    """Versions that the actor's process must have; `None` accepts all."""
    instead: Mapping[Gpus, Gpus] = {}
    """Broken GPU -> GPU of its node to use in its place."""


class Worker:
    """Ray actor that holds one of this package's workers and runs its tasks."""

    def __init__(self, log_level: int, gpus: float = 0.0) -> None:
        """Take the actor's GPUs, and collect log records from now on.

        Args:
            log_level: lowest level of the records to collect.
            gpus: number of GPUs that Ray has assigned to the actor, such as 0.5.
        """
        _take_gpus(ray.get_gpu_ids())
        assigned.cpus, assigned.share = _cpus_beside(gpus), gpus or 1.0
        self._log = Collector(f"Worker/{os.getpid()}", log_level)
        self._worker: Any = None
        self._stage = -1

    def __repr__(self) -> str:
        """Name of the actor for Ray's dashboard and logs."""
        return type(self).__name__

    def place(self) -> tuple[str, int, Gpus]:
        """Return the identifier of the actor's node, the actor's process id, and its GPUs."""
        return _node_here(), os.getpid(), _gpus_here()

    def news(self) -> list[logging.LogRecord]:
        """Return the log records since the last call."""
        return self._log.take()

    def stop(self) -> bool:
        """Ask the worker to save its work and then end. Does not wait for it.

        Returns False if the worker has no work that can be saved, or was already asked.
        """
        return stopping.ask()

    def rendezvous(self, *_others: str) -> str:
        """Return a free "host:port" for rank 0. The unused arguments make Ray wait until every rank has started."""
        with socket.create_server(("", 0)) as server:
            # Another process may take the port before rank 0 does. The attempt then fails, and the next one gets
            # another port.
            host = ray.util.get_node_ip_address()
            return f"{f'[{host}]' if ':' in host else host}:{server.getsockname()[1]}"

    def work(
        self, stage: StageSetup, patience: Patience, method: str, rank: tuple[int, int], address: str, *arguments: Any
    ) -> Iterator[tuple[list[logging.LogRecord], Any]]:
        """Run this actor's part of a task. Yields the log records since the last event, and the event.

        Before an error is raised, the event is `None`.

        Args:
            stage: worker to construct, unless the actor already has it.
            patience: time limit for each event.
            method: name of the worker's method.
            rank: rank of this actor, and number of ranks.
            address: return value of `rendezvous` on rank 0; "" for a task of one worker.
            arguments: arguments of the method.
        """
        more = {"worker_rank": WorkerRank(*rank, address)} if address else {}

        def events() -> Iterator[Any]:
            if self._worker is None and (gpu := stage.instead.get(_gpus_here())):
                os.environ["CUDA_VISIBLE_DEVICES"] = gpu.numbers  # CUDA has not started here yet
                assigned.gpus = gpu.numbers.split(",")
            if self._stage != stage.number:
                if stage.versions is not None:
                    require_same(stage.versions)
                self._worker = None  # frees the old worker's memory before the new one takes more
                setup = [ray.get(each) if isinstance(each, ray.ObjectRef) else each for each in stage.setup]
                self._worker, self._stage = stage.worker(*setup), stage.number
            yield from getattr(self._worker, method)(*arguments, **more)

        try:
            with explaining_memory():
                for event in watched(events(), patience, has_peers=bool(address)):
                    yield self._log.take(), event
        except stopping.Interrupted as end:
            yield self._log.take(), Stopped(str(end))
        except Exception:
            yield self._log.take(), None
            raise


def _take_gpus(gpus: Sequence[object]) -> None:
    """Hide all GPUs from this process except its own, before CUDA starts. Workers use the first GPU that they see.

    Args:
        gpus: Ray's identifiers of the worker's GPUs.
    """
    assigned.gpus = [str(gpu) for gpu in gpus]
    if not gpus or os.environ.get(SHOW_ALL_GPUS):  # some versions of Ray show all GPUs to an actor without GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(assigned.gpus)


def _node_here() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _gpus_here() -> Gpus:
    return Gpus(_node_here(), ",".join(assigned.gpus), socket.gethostname())


def _cpus_beside(gpus: float) -> int:
    """Number of this node's CPUs that belong to `gpus` of its GPUs, rounded down; 0 without GPUs.

    The CPUs are divided evenly among the GPUs.
    """
    if not gpus:
        return 0
    found: dict[str, float] = next(each["Resources"] for each in ray.nodes() if each["NodeID"] == _node_here())
    return int(found.get("CPU", 0.0) * gpus / found["GPU"])


def avoiding(options: Mapping[str, Any], nodes: Collection[str]) -> dict[str, Any]:
    """Options of an actor, extended so that Ray places it on none of the nodes."""
    if not nodes:
        return {**options}
    labels = {**options.get("label_selector", {}), "ray.io/node-id": f"!in({','.join(sorted(nodes))})"}
    return {**options, "label_selector": labels}


@dataclass(eq=False)
class PoolWorker:
    """Handle of one actor for the driver."""

    options: Mapping[str, Any]
    """Ray's options of the actor: resources that it takes, and labels of the nodes where it may run."""
    actor: Any
    starting: Any
    """Reference to the result of `Worker.place`; `None` once the actor has started."""
    node: str = ""
    process: int = 0
    gpu: Gpus | None = None
    """GPUs of the actor; `None` until it has started."""
    stream: Any = None
    """Ray's generator of references to the events of the current or last task; `None` before the first."""
    free_since: float = field(default_factory=time.monotonic)
    """Time since which the actor is free or starting, in seconds of the monotonic clock."""
    unread: list[Any] = field(default_factory=list)
    """Ray's reference to the log records last requested from the actor, until they arrive; otherwise empty."""

    @classmethod
    def start(cls, options: Mapping[str, Any], bundle: tuple[PlacementGroup, int] | None = None) -> PoolWorker:
        """Request an actor from Ray, without waiting for its start.

        Args:
            options: Ray's options of the actor.
            bundle: placement group and index of the bundle whose resources the actor takes; `None` for free resources,
                where the actor also requests `mark()`, so that it is counted while it waits.
        """
        groups: dict[str, Any] = {"concurrency_groups": {CONTROL: 1}}  # missing in Ray's annotations
        remote: Any = ray.remote(**groups)(Worker)
        marked = {"resources": {**options.get("resources", {}), **mark()}}
        placed = {"scheduling_strategy": PlacementGroupSchedulingStrategy(*bundle)} if bundle else marked
        level, gpus = logging.getLogger("datm_ray").getEffectiveLevel(), options.get("num_gpus", 0.0)
        actor = remote.options(**{**options, **placed}).remote(level, gpus)
        return cls(options, actor, actor.place.remote())

    def suits(self, options: Mapping[str, Any]) -> bool:
        """True if the actor has the resources and label conditions in `options`; more memory or conditions are fine."""
        mine, theirs = ({**each, "memory": 0, "label_selector": 0} for each in (self.options, options))
        labels, wanted = (each.get("label_selector", {}) for each in (self.options, options))
        is_enough = self.options.get("memory", 0) >= options.get("memory", 0)
        return bool(mine == theirs and is_enough and wanted.items() <= labels.items())

    def run(
        self, stage: StageSetup, task: Task, patience: Patience, rank: tuple[int, int] = (0, 1), rendezvous: Any = ""
    ) -> None:
        """Submit a task, or one rank's part of a task, to the actor. The events then come from `stream`.

        Args:
            stage: worker to construct, unless the actor already has it.
            patience: time limit for each event.
            rank: rank of the actor, and number of ranks.
            rendezvous: reference to rank 0's `Worker.rendezvous`; "" for a task of one worker.
        """
        name = f"Worker of {task.name}" + (f", rank {rank[0]} of {rank[1]}" if rank[1] > 1 else "")
        self.stream = self.actor.work.options(num_returns="streaming", name=name).remote(
            stage, patience, task.method or stage.method, rank, rendezvous, *task.arguments
        )

    def find_node(self) -> None:
        """Record the actor's node, process and GPUs if the actor has started. Does not wait."""
        if self.starting is not None and ray.wait([self.starting], timeout=0, fetch_local=False)[0]:
            with suppress(RayError):
                self.has_started(ray.get(self.starting))

    def has_started(self, place: tuple[str, int, Gpus]) -> None:
        """Record the node, process and GPUs of an actor that has started."""
        (self.node, self.process, self.gpu), self.starting = place, None

    def take_news(self) -> bool:
        """Pass the worker's new log records to the driver's log, and request the next ones. Does not wait.

        Returns False if the actor has ended.
        """
        try:
            if self.unread and ray.wait(self.unread, timeout=0, fetch_local=False)[0]:
                accept(ray.get(self.unread.pop()))
        except RayError:  # if the actor was at work, its stream of events says why
            return False
        if not self.unread:
            self.unread = [self.actor.news.options(concurrency_group=CONTROL).remote()]
        return True

    def save(self) -> Any:
        """Ask the worker to save its work and then end. Returns a reference to the result of `Worker.stop`."""
        return self.actor.stop.options(concurrency_group=CONTROL).remote()

    def stop(self) -> None:
        """Kill the actor and free its resources."""
        ray.kill(self.actor)

    def end_process(self) -> None:
        """Kill the process of a started actor by a task on its node. Ray may wait for ever for a process that hangs."""
        if self.process:
            there = NodeAffinitySchedulingStrategy(self.node, soft=False)
            killer: Any = ray.remote(_kill)
            killer.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(self.process)


def _kill(process: int) -> None:
    with suppress(OSError):  # the process has ended
        if b"ray::Worker" in Path(f"/proc/{process}/cmdline").read_bytes():  # else its id was given to another process
            os.kill(process, signal.SIGKILL)
