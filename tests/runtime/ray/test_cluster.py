"""Tests the connection to a cluster: from a machine outside it, and with addresses that are not for drivers."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from datm_ray.errors import ClusterError
from datm_ray.runtime.ray import cluster as ray_cluster
from datm_ray.runtime.ray.compat import NOT_A_NODE, limit_node_search


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
