"""A simulated cluster: nodes that hold workers, and Ray's answers to requests for them, on a clock that tests turn.

The stage of the executor is the real one. Workers do nothing; a test ends them or has them fail.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any
from unittest import mock

import pytest
import ray
from ray.exceptions import RayError

from datm_ray.config import ClusterConfig
from datm_ray.runtime.executor import Event, Finished, Lost, Note, Task
from datm_ray.runtime.ray import cluster as ray_cluster, executor as ray_executor
from datm_ray.runtime.ray.pool import PoolWorker, StageSetup


class Clock:
    """Stand-in for the module `time`, whose seconds pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Worker:
    """An actor that was requested, and has a node once it is placed."""

    suits = PoolWorker.suits

    def __init__(self, options: Mapping[str, Any], clock: Clock, node: str = "") -> None:
        self.options, self.actor, self.node, self.is_stopped = options, mock.Mock(), node, False
        self.starting: Any = None if node else object()
        self.is_placed, self.reserved = False, ""
        """`is_placed`: True once Ray has given it resources, of them the GPU `reserved`."""
        self.free_since, self.stream, self.process = clock.now, None, 7
        self.gpu, self.used, self.asked, self.has_ended = "", "", 0, False
        """`gpu`: the GPU that Ray has given; `used`: the one that its task uses. `asked`: number of requests to save.
        `has_ended`: True if its process was killed."""

    def run(self, stage: StageSetup, *_: Any) -> None:
        self.stream, self.used = object(), stage.instead.get(self.gpu) or self.gpu

    def stop(self) -> None:
        self.is_stopped = True

    def has_started(self, place: tuple[str, int, str]) -> None:
        (self.node, self.process, self.gpu), self.starting = place, None

    def find_node(self) -> None:
        """Nothing: the node of a worker at work is known."""

    def take_news(self) -> bool:
        return not self.is_stopped

    def end_process(self) -> None:
        self.has_ended = True

    def save(self) -> None:
        self.asked += 1


class Group:
    """A group of ranks that was requested, and has nodes once it is placed."""

    def __init__(self, size: int, options: Mapping[str, Any], clock: Clock) -> None:
        self.size, self.options, self._clock = size, options, clock
        self.nodes, self.workers, self.gpus = list[str](), list[Worker](), list[str]()
        self.is_placed, self.is_stopped, self.checks = False, False, 0
        self.larger: Collection[int] = ()
        self.possible = size

    def is_reserved(self) -> bool:
        self.checks += 1
        self.is_placed = bool(self.nodes)
        return self.is_placed

    def start(self, larger: Collection[int] = ()) -> None:
        self.larger = larger
        self.workers = [Worker(self.options, self._clock, node) for node in self.nodes[: self.size]]
        for worker, gpu in zip(self.workers, self.gpus, strict=True):
            worker.gpu = gpu

    def give_back(self) -> None:
        self.larger = ()

    def stop(self) -> None:
        self.is_stopped = True


def refused(options: Mapping[str, Any]) -> set[str]:
    """Nodes that a request excludes by their identifiers."""
    condition = options.get("label_selector", {}).get("ray.io/node-id", "")
    found = re.fullmatch(r"!in\((.*)\)", condition)
    return set(found[1].split(",")) if found else set()


def wanted(options: Mapping[str, Any]) -> str:
    """Node that a request asks for by its identifier; "" without one."""
    condition: str = options.get("label_selector", {}).get("ray.io/node-id", "!")
    return "" if condition.startswith("!") else condition


class Simulation:
    """A stage on simulated nodes. Requests are served in their order, each by the first node that can."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, nodes: dict[str, int], tasks: list[Task], **settings: Any
    ) -> None:
        """Start nothing yet.

        Args:
            nodes: name of each node -> number of workers that it can hold, and of its GPUs.
            tasks: tasks of the stage.
            settings: settings of the section `cluster`. A worker has a GPU unless they say otherwise.
        """
        self.clock, self.nodes, self.taken = Clock(), nodes, dict[str, int]()
        """`taken`: workers of other commands on each node."""
        self.draining = set[str]()
        """Nodes that end soon: nothing new is placed on them."""
        self.start_seconds = 0.0
        """Time that an actor's process takes to start once it has a node."""
        self.memory: dict[str, float] = {}
        """Memory in bytes of each node that has a limit."""
        self.requests = list[Worker | Group]()
        self.log = list[tuple[str, Event]]()
        monkeypatch.setattr(ray_executor, "time", self.clock)
        monkeypatch.setattr(ray_cluster, "time", self.clock)
        monkeypatch.setattr(ray_cluster, "CHECK_INTERVAL", -1.0)
        monkeypatch.setattr(ray, "nodes", self._ray_nodes)
        monkeypatch.setattr(ray_executor, "draining_nodes", lambda: self.draining)
        monkeypatch.setattr(ray_cluster, "idle_resources", self._idle)
        monkeypatch.setattr(ray_executor, "requests_without_place", self._without_place)
        monkeypatch.setattr(PoolWorker, "start", self._request(Worker))
        monkeypatch.setattr(ray_executor, "RankGroup", self._request(Group))
        monkeypatch.setattr(ray, "get", lambda answer: answer)
        cluster = ClusterConfig(**{"gpus_per_worker": 1.0, **settings})
        executor = mock.Mock(cluster=cluster, nodes=ray_cluster.Nodes(cluster), pool=[])
        executor.light_nodes = ray_cluster.Nodes(cluster, light=True)
        executor.faults, executor.set_aside = ray_executor.Counter(), {}
        self.stage: Any = ray_executor._Stage(executor, StageSetup(0, object, (), ""), tasks)
        self.stage._take_tasks()

    def _ray_nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": name,
                "Alive": True,
                "Labels": {},
                "Resources": {"CPU": float(held), "GPU": float(held), "memory": self.memory.get(name, 0.0)},
            }
            for name, held in self.nodes.items()
        ]

    def _request(self, kind: Callable[..., Any]) -> Callable[..., Any]:
        def request(*arguments: Any) -> Any:
            self.requests.append(kind(*arguments, self.clock))
            return self.requests[-1]

        return request

    def _idle(self) -> dict[str, dict[str, float]]:
        free = {node: float(self.free(node)) for node in self.nodes}
        return {node: {"CPU": held, "GPU": held, "memory": math.inf} for node, held in free.items()}

    def _without_place(self) -> int:
        return sum(isinstance(each, Worker) and not each.is_placed for each in self.waiting)

    @property
    def waiting(self) -> list[Worker | Group]:
        """Requests that Ray has not served."""
        live = [each for each in self.requests if not each.is_stopped]
        return [each for each in live if (each.starting if isinstance(each, Worker) else not each.nodes)]

    def free(self, node: str, memory: int = 0) -> int:
        """Number of workers that a node has free resources for. `memory`: bytes that each of them reserves."""
        live = [each for each in self.requests if not each.is_stopped]
        placed = [each for each in live if isinstance(each, Group) or each.is_placed]
        held = [(each, each.nodes if isinstance(each, Group) else [each.node]) for each in placed]
        there = [each.options.get("memory", 0) for each, nodes in held for name in nodes if name == node]
        slots = self.nodes[node] - self.taken.get(node, 0) - len(there)
        return min(slots, int((self.memory.get(node, 0.0) - sum(there)) / memory)) if memory else slots

    def _place(self) -> None:
        for each in self.waiting:
            memory, bad = each.options.get("memory", 0), refused(each.options) | self.draining
            if isinstance(each, Worker) and each.is_placed:
                if self.clock.now - each.free_since > self.start_seconds:
                    self._begin(each)
                continue
            good = [node for node in self.nodes if node not in bad and wanted(each.options) in ("", node)]
            slots = [node for node in good for _ in range(self.free(node, memory))]
            if isinstance(each, Group):
                each.nodes = slots[: each.size] if len(slots) >= each.size else []
                for node in each.nodes:
                    each.gpus.append(self._gpu(node))
            elif slots:
                each.node, each.is_placed, each.free_since = slots[0], True, self.clock.now
                each.reserved = self._gpu(each.node)
                if not self.start_seconds:
                    self._begin(each)

    def _begin(self, worker: Worker) -> None:
        worker.starting = (worker.node, 7, worker.reserved)
        if worker in self.stage._pool:
            self.stage._note_start(worker)
        else:
            worker.has_started(worker.starting)

    def _gpu(self, node: str) -> str:
        """First GPU of a node that no live actor or group has."""
        live = [each for each in self.requests if not each.is_stopped]
        used = {gpu for each in live for gpu in (each.gpus if isinstance(each, Group) else [each.reserved])}
        return next(gpu for gpu in (f"GPU {number} of {node}" for number in itertools.count()) if gpu not in used)

    def turn(self, seconds: float = 1.0, turns: int = 1) -> list[tuple[str, Event]]:
        """Let time pass, then let the stage act, `turns` times. Returns the stage's events, with the names of tasks."""
        found = list[tuple[str, Event]]()
        for _ in range(turns):
            self.clock.now += seconds
            for step in (self.stage._start, self.stage._check):
                self._place()
                found += self._take(step())
        return found

    def job(self, name: str) -> Any:
        """State of a task that has not ended."""
        (found,) = (job for job in self.stage._jobs if job.task.name == name)
        return found

    def places(self, name: str) -> list[str]:
        """Nodes on which a task runs, by rank; empty while it waits."""
        return [worker.node for worker in self.job(name).workers]

    def end(self, name: str) -> None:
        """Let all workers of a task end."""
        self._take(self.stage._end(self.job(name)))

    def lose(self, name: str, cause: BaseException | None = None, rank: int = 0) -> list[Event]:
        """Let a rank of a task end with an error. Returns the stage's events."""
        job = self.job(name)
        stream = next(each for each, number in job.streams.items() if number == rank)
        return [event for _, event in self._take(self.stage._lose(job, cause or RayError("lost"), stream))]

    def read(self, name: str, event: Event | None, rank: int = 0) -> None:
        """Let the next item of a rank's stream arrive: log records and an event, or records alone."""
        job = self.job(name)
        job.streams = {
            iter([([], event)] * 9) if number == rank else each: number for each, number in job.streams.items()
        }
        self._take(self.stage._read(job, next(each for each, number in job.streams.items() if number == rank)))

    def grow(self, name: str) -> None:
        """Let a task of several workers report a checkpoint."""
        self._take(self.stage._grow(self.job(name)))

    def _take(self, events: Iterator[tuple[Task, Event]]) -> list[tuple[str, Event]]:
        before = len(self.log)
        for task, event in events:
            self.log.append((task.name, event))
        return self.log[before:]

    def notes(self) -> list[str]:
        """Messages to the user so far, with the names of their tasks."""
        return [f"{name}: {event.text}" for name, event in self.log if isinstance(event, Note)]

    def ended(self) -> list[str]:
        """Names of tasks that have finished."""
        return [name for name, event in self.log if isinstance(event, Finished)]

    def losses(self, name: str) -> int:
        """Number of losses of a task that were reported."""
        return sum(isinstance(event, Lost) for each, event in self.log if each == name)
