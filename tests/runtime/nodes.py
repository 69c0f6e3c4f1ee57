"""A Ray cluster of several nodes on this machine, whose nodes are added and lost as a test demands.

It lives in a process of its own, so that it does not meet the cluster that other tests share.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tests.conftest import actor_processes

SCRIPT = """
import json, sys
from ray.cluster_utils import Cluster

# A node that does not answer counts as lost after two seconds instead of twenty.
health = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
head = {"num_cpus": 0, "include_dashboard": False, "_system_config": health}
cluster = Cluster(initialize_head=True, head_node_args=head)
nodes = {}
print(json.dumps(cluster.address), flush=True)
for line in sys.stdin:
    verb, name = line.split()
    if verb == "add":
        nodes[name] = cluster.add_node(num_cpus=1)
    else:
        cluster.remove_node(nodes.pop(name), allow_graceful=False)
    print(json.dumps(sorted(nodes)), flush=True)
cluster.shutdown()
"""


class Nodes:
    """A head without CPUs, and nodes of one CPU each, by name."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> Nodes:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.address: str = self._answer()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, at: TracebackType | None
    ) -> None:
        self._process.communicate("", timeout=60)

    def add(self, name: str) -> None:
        """Start a node."""
        self._tell("add", name)

    def kill(self, name: str) -> None:
        """Kill a node's raylet and, with it, its workers."""
        self._tell("kill", name)

    def worker_processes(self) -> list[int]:
        """Process ids of this package's workers on the nodes."""
        return actor_processes(self._process.pid)

    def _tell(self, verb: str, name: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{verb} {name}\n")
        self._process.stdin.flush()
        self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        while not (line := self._process.stdout.readline()).startswith(("[", '"')):
            assert line, "the cluster did not start"
        return json.loads(line)
