"""Connection to a Ray cluster, and the number of workers that its nodes can hold."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from datm_ray.config import ClusterConfig
from datm_ray.errors import ClusterError, NoFreeWorkersError
from datm_ray.monitor.logs import is_raw
from datm_ray.runtime.executor import require_precision
from datm_ray.runtime.ray.compat import (
    NOT_A_NODE,
    idle_resources,
    keep_off_standard_output,
    keep_token_private,
    knows_labels,
    limit_node_search,
    runs_a_node,
)
from datm_ray.runtime.ray.pool import PoolWorker
from datm_ray.runtime.variables import variables
from datm_ray.words import counted, data_size

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray warns that it will stop hiding GPUs from actors that request none. Our actors hide the GPUs themselves.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

_log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a cluster's head node to answer."""
PROBE_TIMEOUT = 2.0
"""Seconds to wait for an answer to a test request by HTTP. A dashboard answers it, and Ray's own port never does."""
CHECK_INTERVAL = 1.0
"""Shortest time in seconds between two readings of the cluster's nodes from Ray."""
SHORT_WAIT = 60.0
"""Seconds to wait for resources that other commands hold. After that, a task of several workers tries fewer, and a
stage without a running task ends with an error if `cluster.wait_for_nodes` is null. An idle worker is kept for later
tasks at most as long. The resources of workers that are being stopped become free sooner."""
FIRST_WAIT = 1800.0
"""Seconds to wait for nodes if `cluster.wait_for_nodes` is null and no node has a CPU: nodes then start on demand."""
LEAST_WAIT = 3.0
"""Shortest wait for free resources in seconds. Ray needs about one second to say that it has given them to a worker."""
MODEL_SHARE = 0.001
"""Amount of Ray's resource "accelerator_type:<GPU model>" that one worker takes. A node with this model has 1, so
1000 workers can share it. Ray itself takes the same amount for an actor."""
_NO_START, _SLOW_START = "Ray does not start on this machine", "timed out during startup"
_MEMORY_REMEDY = "lower cluster.shards, or add nodes or memory"
_LABEL_REMEDY = "correct the labels, or start nodes that have them, such as by `ray start --labels`"


def connect(address: str | None) -> str:
    """Connect to a running Ray cluster, or start one on this machine.

    Args:
        address: address of the cluster's head, such as "10.0.0.5:6379". If it is `None`, "" or "auto", RAY_ADDRESS
            decides. Without that too, "auto" is the cluster that runs on this machine; `None` and "" start a new one.

    Returns:
        The dashboard's "host:port", or "" if there is no dashboard.

    Raises:
        ClusterError: no cluster answers; or the address is not one to connect to, such as that of a dashboard, which
            takes jobs only; or this machine does not belong to the cluster; or Ray does not start here.
    """
    variable = os.environ.get("RAY_ADDRESS")
    given = "RAY_ADDRESS" if variable and address in (None, "", "auto") else "--address"  # as in ray.init
    address = variable if given == "RAY_ADDRESS" else address
    # Without "local", Ray would join the cluster that was last started on this machine.
    where: dict[str, Any] = {"address": address} if address else {"address": "local", "dashboard_host": "127.0.0.1"}
    try:
        if address:
            _require_listener(address, given)
            limit_node_search(CONNECT_TIMEOUT)
            if address != "auto" and not runs_a_node():
                raise _outside(address)
        else:
            keep_token_private()
        level = logging.INFO if is_raw() else logging.CRITICAL
        keep_off_standard_output(shown=is_raw())
        # The driver's C++ log prints a line for every attempt to connect to a cluster.
        with variables({"RAY_BACKEND_LOG_LEVEL": "fatal"} if address else {}):
            context = ray.init(**where, logging_level=level, log_to_driver=is_raw())
    except Exception as failure:
        expected = isinstance(failure, OSError | ValueError | RuntimeError | RayError)
        if not expected and _SLOW_START not in str(failure):  # Ray raises a plain Exception for a slow start
            raise
        raise _connection_error(address, given, failure) from None
    return str(context.dashboard_url or "")


def _connection_error(address: str | None, given: str, failure: Exception) -> ClusterError:
    if isinstance(failure, OSError) and {"ray", ".ray"} & set(Path(os.fsdecode(failure.filename or "")).parts):
        what = f"cannot connect to Ray at {address}" if address else _NO_START
        return ClusterError(
            f"{what}: cannot use {os.path.abspath(os.fsdecode(failure.filename))} ({failure.strerror})",
            f"Ray writes to RAY_TMPDIR (else /tmp/ray) and to .ray in HOME ({os.path.expanduser('~')})",
            "free some space, or set these variables to folders of yours with short paths, such as "
            "RAY_TMPDIR=$(mktemp -d); or use --executor serial",
        )
    if address is None:
        too_long = "AF_UNIX path" in str(failure)  # Ray's socket paths are limited to 107 bytes
        remedy = "set RAY_TMPDIR to a folder with a shorter path, or " if too_long else ""
        if _SLOW_START in str(failure):
            return ClusterError(
                f"{_NO_START}: its processes did not answer in time",
                "the machine is busy with other work, or short of memory",
                "run the same command again when it is less busy; or use --executor serial",
            )
        return ClusterError(f"{_NO_START}: {first_line(failure)}", remedy=f"{remedy}use --executor serial")
    if "version mismatch" in str(failure).lower():
        return ClusterError(
            f"the cluster at {address} has other versions than this machine: {' '.join(str(failure).split())}",
            remedy="install the cluster's versions here, or submit the run as a job: `datm-ray job submit`",
        )
    if NOT_A_NODE in str(failure.__cause__):
        return _outside(address)
    found_none = isinstance(failure, OSError) and "to Ray cluster" not in str(failure)
    token = "" if found_none else "; set RAY_AUTH_MODE=token if the cluster asks for one"
    return ClusterError(
        f"cannot connect to Ray at {address}: {first_line(failure)}",
        remedy=f"check {given}{token}; or use --executor serial, or `datm-ray job submit` from outside the cluster",
    )


def _outside(address: str) -> ClusterError:
    place = address.rpartition("://")[2]
    host = place.rpartition(":")[0] or place
    return ClusterError(
        f"this machine is not a node of the Ray cluster at {address}",
        "a run must start on a node of its cluster",
        f"submit it with `datm-ray job submit` and the dashboard's address, such as --address http://{host}:8265",
    )


def _require_listener(address: str, given: str) -> None:
    """Raise an error for an address where no Ray cluster can be. Ray itself would try to connect for minutes.

    Args:
        given: option or variable that gave the address, for the message.

    Raises:
        ClusterError: a web server listens there, or it is an address of Ray Client (ray://).
        OSError: nothing listens there.
    """
    if address.startswith("ray://"):
        raise ClusterError(
            f"{given} {address!r} is a Ray Client address, and Ray Client cannot send data sets to workers",
            remedy="give HOST:6379 on a node of the cluster, or submit the run with `datm-ray job submit`",
        )
    if address.startswith(("http://", "https://")):
        raise _web_server_error(address, given)
    host, colon, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    if colon and port.isdigit():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT) as line:
            line.settimeout(PROBE_TIMEOUT)
            line.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with suppress(OSError):
                if line.recv(5) == b"HTTP/":
                    raise _web_server_error(address, given)


def _web_server_error(address: str, given: str) -> ClusterError:
    return ClusterError(
        f"{given} {address!r} is the address of a dashboard or another web server",
        "Ray's own job commands expect the dashboard in RAY_ADDRESS" if given == "RAY_ADDRESS" else "",
        "use `datm-ray job submit`, or, on a node, give the port of `ray start` (default 6379) with --address"
        + (", or unset RAY_ADDRESS to start Ray on this machine" if given == "RAY_ADDRESS" else ""),
    )


def first_line(message: BaseException | str) -> str:
    """First non-empty line of a message, at most 200 characters, without final full stops.

    The result is the class name of an error without a message, and "" for an empty text.
    """
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    if lines:
        return lines[0][:200].rstrip(".")  # Ray may put a whole page on one line
    return "" if isinstance(message, str) else type(message).__name__


def _live_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _is_chosen(node: Mapping[str, Any], cluster: ClusterConfig) -> bool:
    """True if a node satisfies the label selector `cluster.labels`; an empty selector accepts every node."""
    return matches(node.get("Labels", {}), cluster.labels)


class Nodes:
    """Number of workers of one shape that the cluster's nodes can hold, and how long to wait for more.

    The shape is what each worker takes: CPUs, GPUs and other resources, and its node's labels. The argument `memory`
    of the methods is the main memory in bytes that each worker needs; 0 reserves none. Nodes are given by Ray's
    identifiers.
    """

    def __init__(self, cluster: ClusterConfig, *, light: bool = False) -> None:
        """Choose the shape of the workers to count. Nodes are read from Ray at the first call of another method.

        Args:
            cluster: section `cluster` of the recipe.
            light: True for workers with the resources of `cluster.light`, if the recipe has that section. False for
                workers with the resources of `cluster` itself, which distil.
        """
        self._cluster, self._is_light = cluster.shaped(light=light), light
        self._nodes: dict[str, Any] = {}
        """Live nodes by identifier, as Ray describes them."""
        self._fits: dict[int, dict[str, int]] = {}
        """Bytes that Ray reserves for a worker -> result of `fits` for the live nodes."""
        self._checked = float("-inf")

    def fits(self, memory: int = 0) -> dict[str, int]:
        """Identifier of a live node -> number of workers that it could hold if all its resources were free.

        A node without the labels that the workers ask for holds none.
        """
        nodes, memory = self._alive(), self.reserved(memory)
        if memory not in self._fits:
            chosen = self._chosen()
            self._fits[memory] = {
                name: fitting(each["Resources"], self._cluster, memory) if name in chosen else 0
                for name, each in nodes.items()
            }
        return self._fits[memory]

    def reserved(self, memory: int) -> int:
        """Bytes that Ray reserves for a worker that needs `memory` bytes.

        This is `memory`, but at most the memory of the largest node, because a larger request would wait for ever.
        Only nodes that can hold a worker by their other resources count; if there is none yet, all nodes do.
        """
        if not memory:
            return 0
        fits = self.fits()
        sizes = {name: int(node["Resources"].get("memory", 0)) for name, node in self._alive().items()}
        held = [size for node, size in sizes.items() if fits.get(node)]
        return min(memory, max(held or sizes.values(), default=memory))

    def _alive(self) -> dict[str, Any]:
        """Live nodes by identifier, read from Ray at most once per `CHECK_INTERVAL`."""
        if time.monotonic() - self._checked > CHECK_INTERVAL:
            self._nodes = {node["NodeID"]: node for node in _live_nodes()}
            self._fits.clear()
            self._checked = time.monotonic()
        return self._nodes

    def _chosen(self) -> dict[str, Any]:
        """Identifier -> Ray's description of each live node, as last read, whose labels satisfy `cluster.labels`."""
        return {name: node for name, node in self._nodes.items() if _is_chosen(node, self._cluster)}

    def _lacking(self) -> str:
        """Text about the workers' label selector if no live node satisfies it, else ""."""
        selector = self._cluster.labels
        if not selector or (self._alive() and self._chosen()):
            return ""
        key = "cluster.light.labels" if self._is_light and self._cluster.light else "cluster.labels"
        wanted = ", ".join(f"{name}: {condition}" for name, condition in selector.items())
        return f"no node has the labels of {key} ({wanted})"

    def _held(self, memory: int) -> str:
        """Text about how many workers the running nodes can hold, such as "2 nodes can hold 4"."""
        held, more = self.capacity(memory), self.capacity()
        short = f" with {self._size(memory)} of memory each ({more} by CPUs and GPUs alone)" if held < more else ""
        return f"{counted(sum(map(bool, self.fits(memory).values())), 'node')} can hold {held}{short}"

    def _size(self, memory: int) -> str:
        return data_size(self.reserved(memory))

    def capacity(self, memory: int = 0) -> int:
        """Number of workers that all nodes together can hold if all their resources are free."""
        return sum(self.fits(memory).values())

    def short_of_memory(self, workers: int, memory: int) -> str:
        """Text for the user if memory alone limits how many of `workers` workers run at a time; otherwise ""."""
        held, wanted = self.capacity(memory), min(workers, self.capacity())
        if held >= wanted:
            return ""
        return f"the nodes have memory for {held} of {counted(wanted, 'worker')} at a time, {self._size(memory)} each"

    def elsewhere(self, nodes: Collection[str], memory: int = 0) -> int:
        """Number of workers that the running nodes outside of `nodes` can hold if all their resources are free."""
        return self.capacity(memory) - sum(self.fits(memory).get(node, 0) for node in nodes)

    def idle(self, nodes: Collection[str], memory: int = 0) -> int:
        """Number of workers for which the nodes outside of `nodes` have free resources now; 0 also if it is unknown."""
        there, reserved = idle_resources(), self.reserved(memory)
        good = [name for name, held in self.fits(memory).items() if held and name not in nodes]
        return sum(fitting(there.get(name, {}), self._cluster, reserved) for name in good)

    def patience(self) -> float:
        """Seconds to wait for free resources: `cluster.wait_for_nodes`, but at least 3; 60 if it is null."""
        return SHORT_WAIT if self._cluster.wait_for_nodes is None else max(LEAST_WAIT, self._cluster.wait_for_nodes)

    def planned(self) -> tuple[int, int]:
        """Largest number of workers at the same time, and how many of them the largest node holds; at least 1 each.

        The first number is `cluster.workers`, else the number of workers that the running nodes can hold.
        """
        workers = self._cluster.workers or max(1, self.capacity())
        return workers, min(workers, max([1, *self.fits().values()]))

    def require(self, workers: int, what: str = "", memory: int = 0) -> None:
        """Raise a `ClusterError` if the running nodes cannot hold `workers` workers at the same time.

        Does nothing if `cluster.wait_for_nodes` is above 0, because nodes may then start on demand. Ray's autoscalers
        do not say which nodes they can start.

        Args:
            what: beginning of the error's message, such as "birds: ".
        """
        if not self._cluster.wait_for_nodes and self.capacity(memory) < workers:
            raise self._too_few(workers, what, memory)

    def _too_few(self, workers: int, what: str, memory: int) -> ClusterError:
        wait = "set cluster.wait_for_nodes to wait for nodes started on demand"
        if lacking := self._lacking():
            return ClusterError(f"{what}{lacking}", remedy=f"{_LABEL_REMEDY}; {wait}")
        chosen, is_short = self._chosen().values(), bool(memory) and self.capacity() >= workers
        needed = bundle_of(worker_options(self._cluster, memory=self.reserved(memory) if is_short else 0))
        there = {name: sum(each["Resources"].get(name, 0.0) for each in chosen) for name in {"CPU", "GPU", *needed}}

        def words(amounts: Mapping[str, float]) -> str:
            others = "".join(f", {amounts.get(name, 0):g} {name}" for name in needed.keys() - {"CPU", "GPU", "memory"})
            others += f", {data_size(amounts['memory'])} of memory" if is_short else ""
            return f"{counted(amounts.get('CPU', 0), 'CPU')} and {counted(amounts.get('GPU', 0), 'GPU')}{others}"

        has = "the cluster has" if len(chosen) == len(self._nodes) else "nodes with the chosen labels have"
        kind = "worker of cluster.light" if self._is_light else "worker"
        fewer = "lower cluster.workers, threads_per_worker or gpus_per_worker, or add nodes"
        return ClusterError(
            f"{what}{counted(workers, kind)} with {words(needed)} each do not fit: {has} {words(there)}",
            remedy=f"{_MEMORY_REMEDY if is_short else fewer}; {wait}",
        )

    def waiting(self, size: int, seconds: float, memory: int = 0) -> str:
        """Message for the user that a task has waited `seconds` for `size` free workers."""
        found = self._lacking() or f"{self._held(memory)}, if nobody else uses them"
        return f"waiting for {counted(size, 'worker')} for {seconds:.0f} s: {found}"

    def not_enough(self, size: int, memory: int = 0) -> NoFreeWorkersError:
        """Error for a task whose `size` workers did not become free in time."""
        waited = f"{counted(size, 'worker')} did not become free within {self.patience():g} s"
        if lacking := self._lacking():
            return NoFreeWorkersError(waited, lacking, _LABEL_REMEDY)
        waited = f"{waited}; {self._held(memory)}"
        if self.capacity(memory) < size <= self.capacity():
            return NoFreeWorkersError(waited, "the nodes have too little memory for more", _MEMORY_REMEDY)
        is_lost = self.capacity() < size
        return NoFreeWorkersError(
            waited,
            "nodes were lost or have not started" if is_lost else "other jobs use their CPUs, GPUs or memory",
            "stop other jobs, or raise cluster.wait_for_nodes; the same command again resumes",
        )


def default_gpus(cluster: ClusterConfig) -> float:
    """GPUs per worker if `cluster.gpus_per_worker` is null: 1 if the connected cluster has GPUs, else 0.

    Only nodes with the labels of `cluster.labels` count. If `cluster.device` is "cpu", the result is 0.
    """
    has_gpus = any(node["Resources"].get("GPU", 0) > 0 for node in _live_nodes() if _is_chosen(node, cluster))
    return 1.0 if has_gpus and cluster.device != "cpu" else 0.0


def _open_key(cluster: ClusterConfig) -> str:
    """Name of the first key for a worker's GPUs that is null: of `cluster` itself, else of `cluster.light`."""
    return "cluster.gpus_per_worker" if cluster.gpus_per_worker is None else "cluster.light.gpus_per_worker"


def _wait_for_first_node(cluster: ClusterConfig) -> bool:
    """Ask Ray for a worker, and wait for the first node that can hold it, for up to `cluster.wait_for_nodes` seconds.

    There is no wait if `cluster.wait_for_nodes` is null or 0, or if a node can hold a worker already.

    Returns:
        True after a wait, False without one.

    Raises:
        ClusterError: no node has started in time.
    """
    shape, seconds = cluster.given_gpus(0.0), cluster.wait_for_nodes or 0.0
    nodes, remedy = Nodes(shape), f"set {_open_key(cluster)} to 1, or to 0 for CPUs"
    if not seconds or nodes.capacity():
        return False
    _log.warning(
        "waiting up to %.0f s for the first node: workers get a GPU each if it has one. Else %s", seconds, remedy
    )
    end, probe = time.monotonic() + seconds, PoolWorker.start(worker_options(shape))  # nodes start for what waits
    try:
        while not nodes.capacity() and time.monotonic() < end:
            time.sleep(min(CHECK_INTERVAL, seconds))
    finally:
        probe.stop()  # else the cluster would start a node for it, also after Ctrl-C
    if not nodes.capacity():
        raise ClusterError(
            f"no node that can hold a worker has started within {seconds:g} s",
            "without one it is unknown if workers get a GPU",
            remedy,
        )
    return True


def _has_only_a_head() -> bool:
    """True if no node of the cluster runs but its head."""
    return all("node:__internal_head__" in node["Resources"] for node in _live_nodes())


def with_gpus(cluster: ClusterConfig) -> ClusterConfig:
    """Copy of the section `cluster` in which `gpus_per_worker`, also in `light`, is `default_gpus` if it was `None`.

    A `wait_for_nodes` of `None` becomes `FIRST_WAIT` if no node has a CPU. If it is above 0 and no node can hold a
    worker yet, the function waits for the first one, to see if it has GPUs.

    Raises:
        ClusterError: the precision or device needs a GPU and workers have none; or the settings name labels, which this
            version of Ray does not know; or no node has started within `wait_for_nodes` seconds.
    """
    if (cluster.labels or cluster.shaped(light=True).labels) and not knows_labels():  # before any request with labels
        raise ClusterError(
            f"cluster.labels needs a newer Ray than {ray.__version__}",
            remedy="update Ray on all nodes, or use cluster.resources",
        )
    if cluster.wait_for_nodes is None and not any(node["Resources"].get("CPU") for node in _live_nodes()):
        cluster = cluster.model_copy(update={"wait_for_nodes": FIRST_WAIT})
    is_open, key = cluster.device != "cpu" and cluster != cluster.given_gpus(0.0), _open_key(cluster)
    has_waited = is_open and _wait_for_first_node(cluster)
    gpus = default_gpus(cluster)
    cluster = cluster.given_gpus(gpus)
    if is_open and cluster.wait_for_nodes and not gpus and (has_waited or _has_only_a_head()):
        first = "the first node that started has none (Ray was asked for CPUs only)"
        why = first if has_waited else "the head has none and no other node runs yet"
        remedy = f"If nodes that start on demand have GPUs, stop this run and set {key}=1"
        _log.warning("workers get no GPU, because %s. %s", why, remedy)
    if cluster.device == "cuda" and not cluster.gpus_per_worker:
        raise ClusterError(
            "cluster.device is 'cuda', but no node of the cluster has a GPU",
            "nodes with GPUs start on demand, or Ray was started without its GPUs",
            "set the GPUs of a worker with --set cluster.gpus_per_worker=1, or set cluster.device=auto",
        )
    if cluster.device == "cuda" and not cluster.shaped(light=True).gpus_per_worker:
        raise ClusterError(
            "cluster.device is 'cuda', but cluster.light.gpus_per_worker is 0",
            remedy="set cluster.light.gpus_per_worker, such as to 0.25, or cluster.device=auto",
        )
    has_gpu = bool(cluster.gpus_per_worker) and cluster.device != "cpu"
    require_precision(cluster, has_gpu, elsewhere=True)
    return cluster


def bundle_of(options: Mapping[str, Any]) -> dict[str, float]:
    """Bundle of a placement group: resource -> amount that an actor with these options takes.

    Labels of nodes are not part of a bundle. A placement group takes them as `bundle_label_selector`.
    """
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    model = {f"accelerator_type:{options['accelerator_type']}": MODEL_SHARE} if "accelerator_type" in options else {}
    named: dict[str, float] = {names[name]: amount for name, amount in options.items() if name in names}
    return {**named, **options.get("resources", {}), **model}


def worker_options(cluster: ClusterConfig, light: bool = False, memory: int = 0) -> dict[str, Any]:
    """Options of a Ray actor or task for one worker. Amounts of zero and empty restrictions are left out.

    Args:
        light: True for a worker with the resources of `cluster.light`.
        memory: bytes of main memory that Ray reserves; 0 reserves none.
    """
    shape = cluster.shaped(light=light)
    options = {
        "num_cpus": float(shape.threads_per_worker),
        "num_gpus": shape.gpus_per_worker,
        "memory": memory,
        "resources": {name: amount for name, amount in shape.resources.items() if amount},
        # Ray would take the space in "in(a, b)" for a part of the second value.
        "label_selector": {name: condition.replace(" ", "") for name, condition in shape.labels.items()},
        "accelerator_type": shape.accelerator_type,
    }
    return {name: value for name, value in options.items() if value}


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """True if a node with these labels satisfies every condition of a label selector.

    Args:
        selector: name of a label -> value, !value, in(a,b) or !in(a,b). A node that lacks the label
            satisfies only conditions with "!".
    """
    for name, condition in selector.items():
        values = re.sub(r"^!?(in\((.*)\))?", r"\2", condition).replace(" ", "").split(",")
        if (labels.get(name) in values) == condition.startswith("!"):
            return False
    return True


def fitting(resources: dict[str, float], cluster: ClusterConfig, memory: int = 0) -> int:
    """Number of workers that a node with these resources can hold. A fraction of a GPU must lie on one GPU.

    Args:
        resources: the node's resources as Ray names them, such as {"CPU": 8.0, "GPU": 1.0}.
        cluster: settings with the resources that one worker takes.
        memory: bytes of main memory that Ray reserves for each worker; 0 reserves none.
    """
    wanted = bundle_of(worker_options(cluster, memory=memory))
    per_worker, gpus = wanted.pop("GPU", 0.0), int(resources.get("GPU", 0))
    fits = [int(resources.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items()]
    if per_worker:
        fits.append(gpus * int(1 / per_worker + 1e-9))
    return min(fits)
