"""Tests what one of Ray's actors does with the GPUs that Ray has assigned to it, without a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import ray
import torch

from datm_ray.config import ClusterConfig
from datm_ray.errors import ClusterError
from datm_ray.runtime.executor import Stopped
from datm_ray.runtime.machine import assigned
from datm_ray.runtime.machine.devices import prepare_device
from datm_ray.runtime.machine.versions import Versions, versions_here
from datm_ray.runtime.ray import pool
from datm_ray.runtime.ray.losses import may_be_the_nodes
from datm_ray.runtime.retries import Patience
from datm_ray.runtime.stopping import Interrupted
from tests.runtime.workers import Looker


class Records:
    """Stand-in for the collector of log records, which changes no logger."""

    def take(self) -> list[object]:
        """Return no records."""
        return []


Start = Callable[[list[int]], pool.Worker]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Function that starts an actor in this process, with the given GPUs. All GPUs were visible before."""

    def worker(gpus: list[int]) -> pool.Worker:
        monkeypatch.setattr(ray, "get_gpu_ids", lambda: gpus)
        return pool.Worker(0)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all")
    monkeypatch.delenv(pool.SHOW_ALL_GPUS, raising=False)
    monkeypatch.setattr(pool, "Collector", lambda *_: Records())
    monkeypatch.setattr(pool, "_node_here", lambda: "here")
    monkeypatch.setattr(assigned, "gpus", ())
    monkeypatch.setattr(assigned, "cpus", None)
    monkeypatch.setattr(assigned, "share", 1.0)
    return worker


@pytest.mark.parametrize(
    ("given", "shows_all", "visible"),
    [([3], "1", "3"), ([2, 5], "true", "2,5"), ([], "1", ""), ([], "", ""), ([3], "", "all")],
)
def test_a_worker_sees_its_own_gpus(
    start: Start, monkeypatch: pytest.MonkeyPatch, given: list[int], shows_all: str, visible: str
) -> None:
    """A worker sees its own GPUs only, also on nodes where Ray shows all; elsewhere Ray's choice stays."""
    monkeypatch.setenv(pool.SHOW_ALL_GPUS, shows_all)
    start(given)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
    assert assigned.gpus == [str(gpu) for gpu in given]


@pytest.mark.parametrize(("gpus", "cpus", "share"), [(1.0, 12, 1.0), (0.5, 6, 0.5), (0.25, 3, 0.25), (0.0, 0, 1.0)])
def test_a_worker_has_its_share_of_its_node(
    gpus: float, cpus: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPUs of the node are divided by GPUs, so that workers of one node do not read images in too many threads.

    Workers that share a GPU know their shares of its memory.
    """
    nodes = [{"NodeID": "a", "Resources": {"CPU": 4.0}}, {"NodeID": "b", "Resources": {"CPU": 96.0, "GPU": 8.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "b"))
    monkeypatch.setattr(ray, "get_gpu_ids", list)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all")  # the worker hides all, and later tests may start nodes with GPUs
    monkeypatch.setattr(pool, "Collector", lambda *_: Records())
    monkeypatch.setattr(assigned, "gpus", ())
    monkeypatch.setattr(assigned, "cpus", None)
    monkeypatch.setattr(assigned, "share", 1.0)
    pool.Worker(0, gpus)
    assert (assigned.cpus, assigned.share) == (cpus, share)


class DeviceWorker:
    """Worker whose only task finds the device that it computes on."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self.device = prepare_device(cluster)

    def name(self) -> Iterator[str]:
        """Yield the device's name."""
        yield str(self.device)


def names(worker: pool.Worker, cluster: ClusterConfig, versions: Versions | None = None) -> list[str]:
    """Events of a task of `DeviceWorker` on this actor, which must have the versions."""
    stage = pool.StageSetup(0, DeviceWorker, (cluster,), "name", versions)
    return [event for _, event in worker.work(stage, Patience(300.0, 300.0), "name", (0, 1), "")]


@pytest.mark.parametrize(("cuda", "cause"), [("13.0", "older than torch's CUDA 13.0"), (None, "built without CUDA")])
def test_a_gpu_that_torch_cannot_use_is_an_error(
    start: Start, monkeypatch: pytest.MonkeyPatch, cuda: str | None, cause: str
) -> None:
    """A worker with a GPU that torch cannot use runs no task, and another node may be tried."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ClusterError, match=cause) as caught:
        names(start([0]), ClusterConfig())
    assert may_be_the_nodes(caught.value)
    assert names(start([0]), ClusterConfig(device="cpu")) == ["cpu"]
    assert names(start([]), ClusterConfig()) == ["cpu"]


class EndingWorker:
    """Worker whose only task makes one step, and ends with an exception."""

    def name(self, end: BaseException) -> Iterator[str]:
        """Yield a step, then raise the exception."""
        yield "step"
        raise end


@pytest.mark.parametrize(("end", "last"), [(ValueError("x"), None), (Interrupted("at step 1"), Stopped("at step 1"))])
def test_the_records_before_an_end_come_before_it(
    start: Start, monkeypatch: pytest.MonkeyPatch, end: BaseException, last: Stopped | None
) -> None:
    """Log records come with the event that follows them, those before an error with no event."""
    lines = iter(["before the step", "before the end"])
    monkeypatch.setattr(Records, "take", lambda _: [next(lines)])
    stage = pool.StageSetup(0, EndingWorker, (), "name")
    events = start([]).work(stage, Patience(300.0, 300.0), "name", (0, 1), "", end)
    assert [next(events), next(events)] == [(["before the step"], "step"), (["before the end"], last)]
    with pytest.raises(StopIteration if last else ValueError):
        next(events)


def test_an_actor_of_another_version_runs_no_task(start: Start) -> None:
    """An actor whose package differs from the command's constructs no worker, for a set must be computed alike."""
    here = versions_here()
    old = Versions("head-1", {**here.packages, "datm_ray": "another"})
    assert names(start([]), ClusterConfig(), here) == ["cpu"]
    with pytest.raises(ClusterError, match="has another"):
        names(start([]), ClusterConfig(), old)


def test_a_worker_uses_a_gpu_in_place_of_a_broken_one(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor to which Ray gives a broken GPU shows its worker the substitute only; others keep their own.

    A GPU with the same number on another node is another one, although the nodes have the same host name.
    """
    monkeypatch.setattr(pool.socket, "gethostname", lambda: "host")
    monkeypatch.setattr(pool, "_node_here", lambda: "a")
    broken = pool.Gpus("a", "3", "host"), pool.Gpus("b", "4", "host")
    stage = pool.StageSetup(0, Looker, (), "look", instead={gpu: gpu._replace(numbers="5") for gpu in broken})
    assert str(broken[0]) == "GPU 3 of host"
    for given, used in ((3, "5"), (4, "4")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", str(given))
        worker = start([given])
        for _ in range(2):
            events = worker.work(stage, Patience(300.0, 300.0), "look", (0, 1), "")
            assert [event.result for _, event in events] == [used]
        assert assigned.gpus == [used]
