"""Tests the connection to a cluster, also from outside and with wrong addresses, and the choice of its nodes."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ray
from ray._raylet import node_labels_match_selector

from datm_ray.config import ClusterConfig, WorkerShape
from datm_ray.errors import ClusterError
from datm_ray.runtime.executor import Task
from datm_ray.runtime.machine.versions import versions_here
from datm_ray.runtime.ray import cluster as ray_cluster, executor as ray_executor
from datm_ray.runtime.ray.cluster import bundle_of, fitting, matches, with_gpus, worker_options
from datm_ray.runtime.ray.compat import NOT_A_NODE, limit_node_search
from datm_ray.runtime.ray.pool import PoolWorker, StageSetup


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address at which something listens that closes every connection, as Ray does for a probe over HTTP."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_cluster, "PROBE_TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def refusal(address: str | None) -> str:
    """Error of a connection, which is one line."""
    with pytest.raises(ClusterError) as caught:
        ray_cluster.connect(address)
    assert (caught.value.exit_code, len(str(caught.value).splitlines())) == (2, 1)
    return str(caught.value)


def test_a_driver_outside_the_cluster_is_sent_to_job_submit(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any node is refused before Ray tries for a minute, and one with another cluster's node after
    Ray's search, which is limited to seconds."""
    asked: list[object] = []

    def search_in_vain(**options: Any) -> None:
        asked.append(options["address"])
        raise ConnectionError("Failed to connect to Ray cluster") from RuntimeError(f"{NOT_A_NODE} matching ''")

    services = ray._private.services
    monkeypatch.setattr(services, "get_node_to_connect_for_driver", services.get_node_to_connect_for_driver)
    monkeypatch.setattr(ray, "init", search_in_vain)
    monkeypatch.setattr(ray_cluster, "runs_a_node", lambda: False)
    line = refusal(address)
    assert line.startswith(f"this machine is not a node of the Ray cluster at {address}. A run must start on a node")
    assert "`datm-ray job submit` and the dashboard's address, such as --address http://127.0.0.1:8265" in line
    assert refusal("head").endswith("such as --address http://head:8265.")
    assert asked == []
    monkeypatch.setattr(ray_cluster, "runs_a_node", lambda: True)
    assert refusal(address) == line
    assert asked == [address]
    search = inspect.signature(services.get_node_to_connect_for_driver).parameters["timeout_seconds"]
    assert search.default == ray_cluster.CONNECT_TIMEOUT
    limit_node_search(0)
    with pytest.raises(RuntimeError, match=NOT_A_NODE):  # Ray's own words
        services.get_node_to_connect_for_driver(None)


def test_a_dashboard_in_the_variable_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dashboard in RAY_ADDRESS, which `ray job` takes, is refused as by Ray; another address wins over it."""
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was asked"))
    for given in (None, "", "auto"):
        line = refusal(given)
        assert line.startswith("RAY_ADDRESS 'http://head:8265' is the address of a dashboard")
        assert "datm-ray job submit" in line
        assert "unset RAY_ADDRESS to start Ray on this machine" in line
    assert "unset" not in refusal("http://other:8265")
    assert refusal("127.0.0.1:1").startswith("cannot connect to Ray at 127.0.0.1:1: ")


def test_a_missing_token_is_a_likely_cause(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is named where Ray gives no reason, and not where it found no cluster at all."""
    monkeypatch.setattr(ray_cluster, "runs_a_node", lambda: True)

    def refuse(address: str, **_: Any) -> None:
        known = f"Failed to connect to Ray cluster at {address}"
        raise ConnectionError("Could not find any running Ray instance" if address == "auto" else known)

    monkeypatch.setattr(ray, "init", refuse)
    assert "set RAY_AUTH_MODE=token" in refusal(address)
    assert "RAY_AUTH_MODE" not in refusal("auto")


def test_the_token_of_a_new_cluster_is_its_user_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A token that Ray makes for a cluster of this command, or has made before, is read by its user alone."""
    setup = pytest.importorskip("ray._private.authentication.authentication_token_setup")
    monkeypatch.setattr(setup, "generate_and_save_token", setup.generate_and_save_token)
    monkeypatch.setattr(ray, "init", lambda **_: setup.generate_and_save_token() or mock.Mock(dashboard_url=""))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0o022)
    try:
        for mended in (False, True):
            ray_cluster.connect(None)
            modes = [each.stat().st_mode & 0o777 for each in (tmp_path / ".ray", tmp_path / ".ray" / "auth_token")]
            assert modes == [0o700, 0o600], mended
            (tmp_path / ".ray").chmod(0o755)
            (tmp_path / ".ray" / "auth_token").chmod(0o644)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


SMALL = WorkerShape(gpus_per_worker=0.25, labels={"tier": "!large"})
CHOSEN = ClusterConfig(
    threads_per_worker=2,
    gpus_per_worker=1.0,
    resources={"fast_disk": 1, "zero": 0},
    labels={"zone": "in(a,b)"},
    accelerator_type="A100",
    light=SMALL,
)


def test_options_and_resources_of_a_worker() -> None:
    """Options of actors and bundles of placement groups follow the settings, without zeros and without what is free."""
    assert worker_options(ClusterConfig(), light=False) == {"num_cpus": 1.0}
    assert worker_options(CHOSEN, light=False, memory=5) == {
        "num_cpus": 2.0,
        "num_gpus": 1.0,
        "memory": 5,
        "resources": {"fast_disk": 1.0},
        "label_selector": {"zone": "in(a,b)"},
        "accelerator_type": "A100",
    }
    light = {"num_cpus": 1.0, "num_gpus": 0.25, "label_selector": {"tier": "!large"}}
    assert worker_options(CHOSEN, light=True) == light
    without = CHOSEN.model_copy(update={"light": None})
    assert worker_options(without, light=True) == worker_options(without, light=False)
    assert bundle_of(worker_options(ClusterConfig())) == {"CPU": 1.0}
    assert bundle_of(worker_options(CHOSEN)) == {
        "CPU": 2.0,
        "GPU": 1.0,
        "fast_disk": 1.0,
        "accelerator_type:A100": 0.001,
    }
    assert bundle_of(worker_options(CHOSEN, light=True)) == {"CPU": 1.0, "GPU": 0.25}
    node = {"CPU": 8.0, "GPU": 4.0, "fast_disk": 3.0}
    assert (fitting(node, CHOSEN), fitting(node | {"accelerator_type:A100": 1.0}, CHOSEN)) == (0, 3)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[mock.Mock]:
    """Actors that were requested, by their options. None ever starts."""
    made = list[mock.Mock]()
    monkeypatch.setattr(PoolWorker, "start", lambda options: made.append(mock.Mock(options=options)) or made[-1])
    return made


@pytest.mark.parametrize("settings", [{}, {"wait_for_nodes": 99.0}], ids=["defaults", "wait"])
@pytest.mark.parametrize(("gpus", "expected"), [(2.0, 1.0), (0.0, 0.0)])
def test_the_first_node_decides_if_workers_get_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    requests: list[mock.Mock],
    gpus: float,
    expected: float,
    settings: dict[str, float],
) -> None:
    """On a head without CPUs, a node starts because a worker is asked for; this first node decides.

    If it has no GPU, a warning says how to ask for GPUs, because the cluster may start nodes with GPUs too.
    """
    found = [node("head", {}, CPU=0.0)]
    clock = mock.Mock(**{"monotonic.side_effect": itertools.count().__next__})
    clock.sleep.side_effect = lambda _: found.append(node("a", {}, CPU=4.0, GPU=gpus)) if requests else None
    monkeypatch.setattr(ray_cluster, "time", clock)
    monkeypatch.setattr(ray_cluster, "CHECK_INTERVAL", 0.0)
    monkeypatch.setattr(ray, "nodes", lambda: found)
    cluster = with_gpus(ClusterConfig(**settings))
    assert (cluster.gpus_per_worker, cluster.wait_for_nodes) == (expected, settings.get("wait_for_nodes", 1800.0))
    assert clock.sleep.call_count == 1
    (probe,) = requests
    assert probe.options == {"num_cpus": 1.0}
    assert probe.stop.called
    assert ("set cluster.gpus_per_worker=1" in caplog.text) == (not gpus)


def test_a_cluster_that_starts_from_zero_nodes_needs_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without CPUs is waited on for half an hour; a cluster with CPUs refuses what it cannot hold at once."""
    found = [node("head", {}, CPU=0.0)]
    monkeypatch.setattr(ray, "nodes", lambda: found)
    monkeypatch.setattr(ray_executor, "connect", lambda _: "")
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for settings in ({"gpus_per_worker": 1.0}, {"gpus_per_worker": 0.0, "workers": 4}):
        found[0] = node("head", {}, CPU=0.0)
        executor = ray_executor.RayExecutor(ClusterConfig(**settings), "head:6379")
        executor.require_workers("birds", 4)
        assert executor.nodes.patience() == 1800.0
        found[0] = node("head", {}, CPU=1.0)
        with pytest.raises(ClusterError, match="do not fit"):
            ray_executor.RayExecutor(ClusterConfig(**settings), "head:6379")
    found[0] = node("head", {}, CPU=0.0)
    with pytest.raises(ClusterError, match="do not fit"):
        ray_executor.RayExecutor(ClusterConfig(wait_for_nodes=0.0), "head:6379")


@pytest.mark.parametrize(
    ("others", "settings", "logged"),
    [
        ((), {"wait_for_nodes": 99.0}, "set cluster.gpus_per_worker=1"),
        (
            (),
            {"wait_for_nodes": 99.0, "gpus_per_worker": 0.0, "light": WorkerShape()},
            "set cluster.light.gpus_per_worker=1",
        ),
        ((), {}, ""),
        ((), {"wait_for_nodes": 99.0, "gpus_per_worker": 0.0}, ""),
        ((), {"wait_for_nodes": 99.0, "device": "cpu"}, ""),
        (({"CPU": 4.0},), {"wait_for_nodes": 99.0}, ""),
        (({"CPU": 4.0, "GPU": 1.0},), {"wait_for_nodes": 99.0}, ""),
    ],
)
def test_a_head_that_takes_the_work_of_gpus_on_demand_is_logged(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    others: tuple[dict[str, float], ...],
    settings: dict[str, Any],
    logged: str,
) -> None:
    """A head with CPUs that runs alone takes all work; a warning says how to ask for GPUs that start on demand."""
    head = node("head", {}, **{"CPU": 4.0, "node:__internal_head__": 1.0})
    monkeypatch.setattr(ray, "nodes", lambda: [head, *(node("other", {}, **each) for each in others)])
    with_gpus(ClusterConfig(**settings))
    assert logged in caplog.text
    assert bool(logged) == ("gpus_per_worker=1" in caplog.text)


def test_workers_of_a_cluster_without_nodes_are_not_put_on_cpus_unasked(
    monkeypatch: pytest.MonkeyPatch, requests: list[mock.Mock]
) -> None:
    """If no node starts in time, one line says which key decides about GPUs; with that key there is no wait."""
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray_cluster, "CHECK_INTERVAL", 0.01)
    with pytest.raises(ClusterError, match=r"within 0\.05 s\. .* Set cluster\.gpus_per_worker to 1, or to 0 for CPUs"):
        with_gpus(ClusterConfig(wait_for_nodes=0.05))
    with pytest.raises(ClusterError, match=r"Set cluster\.light\.gpus_per_worker to 1"):
        with_gpus(ClusterConfig(wait_for_nodes=0.05, gpus_per_worker=1.0, light=WorkerShape()))
    assert [probe.options.get("num_gpus") for probe in requests if probe.stop.called] == [None, 1.0]
    monkeypatch.setattr(ray_cluster.time, "sleep", lambda _: pytest.fail("it waits"))
    for settings in ({"gpus_per_worker": 1.0}, {"gpus_per_worker": 0.0}, {"device": "cpu"}):
        with_gpus(ClusterConfig(wait_for_nodes=0.05, **settings))


def test_no_request_for_a_first_node_outlives_its_wait(
    monkeypatch: pytest.MonkeyPatch, requests: list[mock.Mock]
) -> None:
    """After Ctrl-C no actor asks for a node any more: the cluster would start one that nobody uses."""
    monkeypatch.setattr(ray, "nodes", list)
    monkeypatch.setattr(ray_cluster.time, "sleep", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        with_gpus(ClusterConfig(wait_for_nodes=99.0))
    assert [probe.stop.called for probe in requests] == [True]


def test_plans_count_the_nodes_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of workers follows nodes that start after the executor."""
    executor = object.__new__(ray_executor.RayExecutor)
    cluster, found = ClusterConfig(), list[Any]()
    executor.cluster, (executor.nodes, executor.light_nodes) = cluster, both(cluster)
    monkeypatch.setattr(ray_cluster, "CHECK_INTERVAL", -1.0)
    monkeypatch.setattr(ray, "nodes", lambda: found)

    def planned() -> tuple[int, int, int]:
        return executor.workers, executor.workers_per_machine, executor.light_workers

    assert planned() == (1, 1, 1)
    found += [node(name, {}, CPU=4.0) for name in "ab"]
    assert planned() == (8, 4, 8)


def test_gpus_of_nodes_without_the_labels_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are sent to nodes without GPUs by their labels get none by default, whatever other nodes have."""
    monkeypatch.setattr(ray, "nodes", lambda: [node("a", {"tier": "large"}, CPU=4.0, GPU=2.0), node("b", {}, CPU=4.0)])
    for labels, gpus in (({}, 1.0), ({"tier": "large"}, 1.0), ({"tier": "!large"}, 0.0)):
        found = with_gpus(ClusterConfig(labels=labels))
        assert found.gpus_per_worker == gpus
        ray_cluster.Nodes(found).require(2)


CONDITIONS = ["a", "b", "!a", "!b", "in(a)", "in(b,a)", "in(b, c)", "!in(a)", "!in(c, a)", "!in(b,c)", "in", "!in"]


@pytest.mark.parametrize("labels", [{}, {"zone": "a"}, {"zone": "in"}, {"zone": "a", "tier": "b"}], ids=str)
def test_a_selector_of_labels_chooses_the_nodes_that_ray_chooses(labels: dict[str, str]) -> None:
    """Conditions on one label and on two choose a node if and only if Ray's scheduler does."""
    chosen = []
    for zone, tier in itertools.product(CONDITIONS, ["", *CONDITIONS]):
        selector = {"zone": zone, **({"tier": tier} if tier else {})}
        chosen.append(matches(labels, selector))
        given = worker_options(ClusterConfig(labels=selector))["label_selector"]
        assert chosen[-1] == node_labels_match_selector(labels, given), selector
    assert {True, False} == set(chosen)


def node(name: str, labels: dict[str, str], **resources: float) -> dict[str, Any]:
    """Live node as Ray describes it."""
    return {"NodeID": name, "Alive": True, "Labels": labels, "Resources": resources}


def both(cluster: ClusterConfig) -> list[ray_cluster.Nodes]:
    """Nodes for workers that distil, and for light ones."""
    return [ray_cluster.Nodes(cluster), ray_cluster.Nodes(cluster, light=True)]


def test_only_nodes_with_the_labels_hold_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes without the labels count for nothing, for workers and light ones, and errors blame what is missing."""
    found = [node("large", {"tier": "large"}, CPU=8.0), node("small", {"tier": "small"}, CPU=2.0)]
    monkeypatch.setattr(ray, "nodes", lambda: found)
    nodes, light = both(ClusterConfig(labels={"tier": "small"}, light=WorkerShape(labels={"tier": "!small"})))
    assert [nodes.fits(), light.fits()] == [{"large": 0, "small": 2}, {"large": 8, "small": 0}]
    assert nodes.elsewhere({"small"}) == 0
    assert light.elsewhere({"small"}) > 0
    nodes.require(2)
    with pytest.raises(ClusterError, match=r"3 workers .* do not fit: nodes with the chosen labels have 2 CPU"):
        nodes.require(3)
    assert "1 node can hold 2. Other jobs use their CPUs" in str(nodes.not_enough(1))
    found[1] = node("small", {"tier": "tiny"}, CPU=2.0)
    nodes = ray_cluster.Nodes(ClusterConfig(labels={"tier": "small"}))
    lacking = "no node has the labels of cluster.labels (tier: small)"
    assert nodes.capacity() == 0
    assert lacking in nodes.waiting(1, 60.0)
    assert f"within 60 s. {lacking.capitalize()}" in str(nodes.not_enough(1))
    nodes, light = both(ClusterConfig(labels={"tier": "tiny"}, light=WorkerShape(labels={"tier": "small"})))
    assert "can hold 2, if nobody" in nodes.waiting(1, 60.0)
    assert "no node has the labels of cluster.light.labels" in light.waiting(1, 60.0)
    assert "can hold 2. Other jobs use" in str(nodes.not_enough(1))
    assert "1 node can hold 2. Nodes were lost or have not started" in str(nodes.not_enough(3))
    assert "No node has the labels of cluster.light.labels" in str(light.not_enough(1))
    assert (nodes.elsewhere({"large"}) > 0, light.elsewhere({"large"}) > 0) == (True, False)
    nodes, light = both(ClusterConfig(light=WorkerShape(labels={"tier": "small"})))
    with pytest.raises(ClusterError, match=r"birds: no node has the labels of cluster\.light\.labels"):
        light.require(1, "birds: ")
    nodes.require(2)


def test_the_largest_node_that_holds_workers_limits_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's memory is limited by the largest node that can hold it, and by any node before there is one."""
    head = node("head", {}, CPU=0.0, memory=64.0 * 2**30)
    small = node("small", {"tier": "small"}, CPU=8.0, memory=16.0 * 2**30)
    large = node("large", {}, CPU=1.0, memory=32.0 * 2**30)
    cluster = ClusterConfig(threads_per_worker=2, light=WorkerShape(labels={"tier": "!small"}))
    for found, sizes in (([], (None, None)), ([head], (64, 64)), ([head, small], (16, 64)), ([small, large], (16, 32))):
        monkeypatch.setattr(ray, "nodes", lambda found=found: found)
        expected = [sys.maxsize if size is None else size * 2**30 for size in sizes]
        assert [nodes.reserved(sys.maxsize) for nodes in both(cluster)] == expected


@pytest.mark.parametrize(
    ("memory", "fits", "elsewhere"), [(0, (8, 2), 2), (3, (2, 2), 2), (4, (2, 1), 1), (8, (1, 0), 0), (99, (1, 0), 0)]
)
def test_workers_are_counted_by_the_memory_that_they_reserve(
    memory: int, fits: tuple[int, int], elsewhere: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node holds no more workers than its memory does. More than any node has is not asked for."""
    found = [node("a", {}, CPU=8.0, memory=8.0), node("b", {}, CPU=2.0, memory=7.0), node("head", {}, memory=50.0)]
    monkeypatch.setattr(ray, "nodes", lambda: found)
    nodes = ray_cluster.Nodes(ClusterConfig())
    assert nodes.fits(memory) == {"a": fits[0], "b": fits[1], "head": 0}
    assert (nodes.capacity(memory), nodes.elsewhere({"a"}, memory)) == (sum(fits), elsewhere)
    assert nodes.reserved(memory) == min(memory, 8)
    assert nodes.fits() == {"a": 8, "b": 2, "head": 0}


def test_memory_is_named_where_it_keeps_workers_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors name memory only if CPUs and GPUs would be enough, and other jobs only if memory is enough too."""
    gib = 2**30
    monkeypatch.setattr(ray, "nodes", lambda: [node("a", {}, CPU=16.0, GPU=2.0, memory=9.0 * gib)])
    nodes = ray_cluster.Nodes(ClusterConfig(gpus_per_worker=0.25))
    nodes.require(2, memory=4 * gib)
    with pytest.raises(ClusterError) as caught:
        nodes.require(3, "birds: ", 4 * gib)
    assert str(caught.value) == (
        "birds: 3 workers with 1 CPU and 0.25 GPUs, 4 GiB of memory each do not fit: the cluster has 16 CPUs and "
        "2 GPUs, 9 GiB of memory. Lower cluster.shards, or add nodes or memory; set cluster.wait_for_nodes to wait for "
        "nodes started on demand."
    )
    with pytest.raises(ClusterError, match=r"^9 workers with 1 CPU and 0\.25 GPUs each do not fit: .* 2 GPUs\. "):
        nodes.require(9, memory=4 * gib)
    assert "can hold 8. Other jobs use their CPUs, GPUs or memory. Stop" in str(nodes.not_enough(8))
    assert "can hold 2 with 4 GiB of memory each (8 by CPUs and GPUs alone). Other" in str(nodes.not_enough(2, 4 * gib))
    assert "GPUs alone). The nodes have too little memory for more. Lower" in str(nodes.not_enough(3, 4 * gib))
    assert "GPUs alone). Nodes were lost or have not started. Stop" in str(nodes.not_enough(9, 4 * gib))


@pytest.mark.parametrize(
    ("tasks", "limit", "warning"),
    [
        ({4: 8}, None, "the nodes have memory for 2 of 8 workers at a time, 4 GiB each"),
        ({4: 3}, None, "the nodes have memory for 2 of 3 workers at a time, 4 GiB each"),
        ({4: 8}, 3, "the nodes have memory for 2 of 3 workers at a time, 4 GiB each"),
        ({2: 5, 3: 4}, None, "the nodes have memory for 3 of 4 workers at a time, 3 GiB each"),
        ({50: 2}, None, "the nodes have memory for 1 of 2 workers at a time, 9 GiB each"),
        ({4: 2}, None, ""),
        ({4: 8}, 2, ""),
        ({0: 99, 9: 1}, None, ""),
    ],
)
def test_idle_gpus_are_reported_where_memory_is_short(
    tasks: dict[int, int],
    limit: int | None,
    warning: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line says how many of a stage's workers run at a time, if the nodes' memory allows fewer than their GPUs.

    `tasks`: GiB of memory of a worker -> number of tasks.
    """
    monkeypatch.setattr(ray, "nodes", lambda: [node("a", {}, CPU=16.0, GPU=2.0, memory=9.0 * 2**30)])
    monkeypatch.setattr(ray_executor, "_Stage", mock.Mock(**{"return_value.events.return_value": ()}))
    executor = object.__new__(ray_executor.RayExecutor)
    executor.cluster = ClusterConfig(gpus_per_worker=0.25, workers=limit)
    (executor.nodes, executor.light_nodes), executor.pool = both(executor.cluster), []
    executor.metrics, executor._stage = mock.Mock(), StageSetup(0, object, (), "")
    own = [Task(f"{gib} {i}", (), memory=gib * 2**30) for gib, count in tasks.items() for i in range(count)]
    list(executor.run(object, (), "work", own))
    assert caplog.messages == [warning] * bool(warning)


def test_many_equal_tasks_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is asked once for its nodes, for any number of tasks; light workers count for light tasks.

    The tasks' actors must have the versions of this process.
    """
    monkeypatch.setattr(ray_cluster, "CHECK_INTERVAL", 60.0)
    monkeypatch.setattr(ray, "nodes", mock.Mock(return_value=[node("a", {}, CPU=2.0)]))
    monkeypatch.setattr(ray_executor, "_Stage", mock.Mock(**{"return_value.events.return_value": ()}))
    executor = object.__new__(ray_executor.RayExecutor)
    executor.cluster = ClusterConfig(light=WorkerShape(labels={"tier": "small"}))
    (executor.nodes, executor.light_nodes), executor.pool = both(executor.cluster), []
    executor.metrics, executor._stage = mock.Mock(), StageSetup(0, object, (), "")

    def run(size: int, *, is_light: bool = False) -> None:
        list(executor.run(object, (), "work", [Task(str(i), (), size, is_light=is_light) for i in range(100)]))

    run(2)
    assert executor._stage.versions == versions_here()
    with pytest.raises(ClusterError, match=r"0: 3 workers .* do not fit"):
        run(3)
    assert ray.nodes.call_count == 1
    with pytest.raises(ClusterError, match=r"0: no node has the labels of cluster\.light\.labels"):
        run(1, is_light=True)


@pytest.mark.ray
def test_a_label_that_no_node_has_is_named(ray_cluster: Any) -> None:
    """On real Ray, a run whose workers ask for a label that no node has is refused at once, and the label is named."""
    from datm_ray.runtime.ray.executor import RayExecutor

    del ray_cluster
    here = ray.get_runtime_context().get_node_id()
    RayExecutor(ClusterConfig(labels={"ray.io/node-id": here, "zone": "!nope"})).close()
    for settings in ({"labels": {"zone": "nope"}}, {"labels": {"ray.io/node-id": f"!in({here})"}}):
        with pytest.raises(ClusterError, match=r"no node has the labels of cluster\.labels .* `ray start --labels`"):
            RayExecutor(ClusterConfig(**settings))


def test_labels_are_refused_as_by_ray() -> None:
    """Every accepted label and expression is one that Ray accepts, and Ray's documented forms are accepted."""
    from ray._private.label_utils import validate_label_selector

    good = ["a", "!a", "in(a)", "in(a,b)", "in(a, b)", "!in(A-1,b_2.c)", "x" * 63]
    bad = ["", "-a", "a-", "!!a", "in()", "in(a", "in(a,)", "in(a;b)", "not(a)", "x" * 64, "a b", "ä", "a\n"]
    for text in (*good, *bad):
        for labels in ({"zone": text}, {"example.com/zone": text}, {text: "a"}):
            accepted = _accepts(labels)
            assert accepted == (text in good and (text not in labels or text in ("a", "x" * 63))), labels
            assert not accepted or validate_label_selector(labels) is None, labels


def _accepts(labels: dict[str, str]) -> bool:
    try:
        ClusterConfig(labels=labels)
    except ValueError:
        return False
    return True


def test_workers_without_a_gpu_and_labels_without_support_are_refused(
    monkeypatch: pytest.MonkeyPatch, requests: list[mock.Mock]
) -> None:
    """GPUs are chosen for both kinds of workers, and one line refuses what the cluster or its Ray does not have."""
    monkeypatch.setattr(ray, "nodes", lambda: [node("a", {}, CPU=4.0, GPU=2.0)])
    found = with_gpus(ClusterConfig(light=WorkerShape()))
    assert (found.gpus_per_worker, found.light and found.light.gpus_per_worker) == (1.0, 1.0)
    with pytest.raises(
        ClusterError, match=r"cluster\.light\.gpus_per_worker is 0\. Set cluster\.light\.gpus_per_worker"
    ):
        with_gpus(ClusterConfig(device="cuda", light=WorkerShape(gpus_per_worker=0.0)))
    assert with_gpus(CHOSEN) == CHOSEN
    monkeypatch.setattr(ray_cluster, "knows_labels", lambda: False)
    with pytest.raises(ClusterError, match=rf"cluster\.labels needs a newer Ray than {ray.__version__}"):
        with_gpus(ClusterConfig(light=SMALL))
    assert with_gpus(ClusterConfig(gpus_per_worker=0.0)) == ClusterConfig(gpus_per_worker=0.0)
    monkeypatch.setattr(ray, "nodes", list)
    with pytest.raises(ClusterError, match="needs a newer Ray"):
        with_gpus(ClusterConfig(labels={"zone": "a"}, wait_for_nodes=0.05))
    assert not requests, "this Ray does not know the labels in a request"


PLACED = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from datm_ray.config import ClusterConfig
from datm_ray.runtime.ray.cluster import bundle_of, connect, worker_options

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
a100 = {"fast_disk": 1, "accelerator_type:A100": 1}
names = {
    cluster.add_node(num_cpus=1, num_gpus=2, resources=a100, labels={"zone": "a", "tier": "large"}).node_id: "large",
    cluster.add_node(num_cpus=4, num_gpus=1, labels={"zone": "b", "tier": "small"}).node_id: "small",
}
connect(cluster.address)

class Where:
    def node(self):
        return ray.get_runtime_context().get_node_id()

for text in sys.stdin:
    settings, light = ClusterConfig.model_validate_json(text), bool(json.loads(text).get("light"))
    actor = ray.remote(Where).options(**worker_options(settings, light, memory=2**20)).remote()
    node = ray.get(actor.node.remote(), timeout=60)
    ray.kill(actor)
    group = ray.util.placement_group([bundle_of(worker_options(settings, light))])
    print(json.dumps([names.get(node, "head"), group.wait(60)]), flush=True)
    ray.util.remove_placement_group(group)
"""


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray
def test_ray_places_workers_on_the_chosen_nodes() -> None:
    """Real Ray places an actor with these options on the node that has the resource, label or GPU model."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"resources": {"fast_disk": 1}}, "large"),
        ({"labels": {"zone": "in(a,c)"}}, "large"),
        ({"labels": {"tier": "!large", "zone": "!in(c,d)"}, "gpus_per_worker": 1}, "small"),
        ({"accelerator_type": "A100", "gpus_per_worker": 1}, "large"),
        ({"accelerator_type": "A100", "light": {"labels": {"tier": "small"}, "gpus_per_worker": 0.25}}, "small"),
    ]
    given = "".join(f"{json.dumps(settings)}\n" for settings, _ in cases)
    done = subprocess.run([sys.executable, "-c", PLACED], input=given, capture_output=True, text=True, timeout=300)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert found == [[node, True] for _, node in cases], done.stderr[-3000:]
