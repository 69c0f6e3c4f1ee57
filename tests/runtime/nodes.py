"""A Ray cluster of several nodes on this machine, whose nodes are added and lost as a test demands.

The cluster lives in a process of its own, so that it does not meet the cluster that other tests share.
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

STARTS = 8
"""Largest number of attempts to start the cluster, and to add a node. Ray gives a node 15 to 30 seconds to start."""
SCRIPT = f"""
STARTS = {STARTS}
import json, sys
from ray.cluster_utils import Cluster

# A node that does not answer counts as lost after two seconds instead of twenty.
health = {{"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 4}}
head = {{"num_cpus": 0, "include_dashboard": False, "_system_config": health}}
# What the tests do not use does not start, because Ray waits only 15 seconds for the rest.
head |= {{"include_log_monitor": False, "no_monitor": True}}
cluster = Cluster(initialize_head=True, head_node_args=head)
nodes = {{}}
print(json.dumps(cluster.address), flush=True)
for line in sys.stdin:
    verb, name = line.split()
    if verb == "add":
        # Ray gives up a node that has not started within some seconds, as on a busy machine.
        for left in reversed(range(STARTS)):
            try:
                nodes[name] = cluster.add_node(num_cpus=1)
                break
            except Exception:
                if not left:
                    raise
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
        for _ in range(STARTS):
            self._start()
            if (answer := self._next_line()) is not None:
                self.address: str = answer
                return self
            self._process.communicate(timeout=60)
        raise AssertionError("the cluster did not start")

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

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
        answer = self._next_line()
        assert answer is not None, "the cluster has ended"
        return answer

    def _next_line(self) -> Any:
        """Next answer of the cluster's process; `None` if the process has ended."""
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith(("[", '"')):
                return json.loads(line)
        return None
