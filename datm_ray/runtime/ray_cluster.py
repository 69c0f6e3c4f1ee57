"""The Ray cluster: connecting to it, or starting one, and what it has room for."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from datm_ray.config import ClusterConfig
from datm_ray.errors import ClusterError
from datm_ray.runtime.executor import require_precision
from datm_ray.runtime.ray_compat import silence_raylets

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray warns that it will no longer hide GPUs from actors that ask for none; ours hide them themselves.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

CONNECT_TIMEOUT = 10.0
"""Seconds to wait for a cluster's head node to answer."""
PROBE_TIMEOUT = 2.0
"""Seconds to wait for a web server to show itself; Ray's own port says nothing that a web server would."""
LOOK_INTERVAL = 1.0
"""Seconds between looks at the machines of a cluster."""
_NO_START = "Ray does not start on this machine"


def connect(address: str | None) -> str:
    """Connect to, or start, a cluster. Returns the dashboard's host and port, or ""."""
    given = "--address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS")
    # "local", for without an address Ray would join whatever cluster was last started on this machine.
    where: dict[str, Any] = {"address": address} if address else {"address": "local", "dashboard_host": "127.0.0.1"}
    try:
        if address:
            _require_listener(address, given)
        silence_raylets()
        with _quiet_library() if address else nullcontext():
            context = ray.init(**where, logging_level=logging.CRITICAL, log_to_driver=False)
    except (OSError, ValueError, RuntimeError, RayError) as failure:
        raise _not_connected(address, given, failure) from None
    return str(context.dashboard_url or "")


def _not_connected(address: str | None, given: str, failure: Exception) -> ClusterError:
    if isinstance(failure, OSError) and failure.filename:
        return _not_written(failure, f"cannot connect to Ray at {address}" if address else _NO_START)
    if address is None:
        too_long = "AF_UNIX path" in str(failure)  # of Ray's sockets, 107 bytes at most
        remedy = "set RAY_TMPDIR to a folder with a shorter path, or " if too_long else ""
        return ClusterError(f"{_NO_START}: {first_line(failure)}", remedy=f"{remedy}use --executor serial")
    if "version mismatch" in str(failure).lower():
        return ClusterError(
            f"the cluster at {address} has other versions than this machine: {' '.join(str(failure).split())}",
            remedy="install the cluster's versions here, or hand the run in as a job: `datm-ray job submit`",
        )
    token = "" if isinstance(failure, OSError) else "; set RAY_AUTH_MODE=token if the cluster asks for one"
    return ClusterError(
        f"cannot connect to Ray at {address}: {first_line(failure)}",
        remedy=f"check {given}{token}; or use --executor serial",
    )


def _not_written(failure: OSError, what: str) -> ClusterError:
    """Ray keeps files in the home folder and in one for temporary files; one of them does not take them."""
    place = os.path.abspath(os.fsdecode(failure.filename))
    home = os.path.expanduser("~")
    fact = f"{what}: cannot write {place} ({failure.strerror or type(failure).__name__})"
    at_home = place.startswith(os.path.join(home, ".ray"))
    if not at_home and "ray" not in Path(place).parts:  # a program that Ray would start, say
        return ClusterError(f"{what}: {place}: {failure.strerror}", remedy="use --executor serial")
    remedy = (
        "set HOME to a folder of yours, such as HOME=$(mktemp -d)"
        if at_home
        else "set RAY_TMPDIR to a folder of yours with a short path, such as RAY_TMPDIR=$(mktemp -d)"
    )
    if failure.errno in (errno.EACCES, errno.EPERM):
        nearest = next(str(folder) for folder in Path(place).parents if folder.exists())
        whose = f"{nearest} belongs to {_owner(nearest)}, and this process is of user id {os.geteuid()}"
        return ClusterError(fact, f"HOME is {home}; {whose}" if at_home else whose, remedy)
    if failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return ClusterError(fact, "the disk or the quota is full", f"make room, or {remedy}")
    return ClusterError(fact, remedy=remedy)


def _owner(folder: str) -> str:
    try:
        return Path(folder).owner()
    except (KeyError, OSError):
        return "somebody else"


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Keep Ray's compiled part from printing a line for every attempt; workers are not touched by it."""
    name = "RAY_BACKEND_LOG_LEVEL"
    ours = name not in os.environ
    if ours:
        os.environ[name] = "fatal"
    try:
        yield
    finally:
        if ours:
            os.environ.pop(name, None)


def _require_listener(address: str, given: str) -> None:
    """Fail at once where nothing listens, or a dashboard does: Ray itself would try for minutes."""
    if address.startswith("ray://"):
        raise ClusterError(
            f"{given} {address!r} is one of Ray Client, which cannot hand data sets to workers",
            remedy="give HOST:6379 from a machine of the cluster, or hand the run in with `datm-ray job submit`",
        )
    if address.startswith(("http://", "https://")):
        raise _of_web_server(address, given)
    host, colon, port = address.rpartition("://")[2].rstrip("/").rpartition(":")
    if colon and port.isdigit():
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT) as line:
            line.settimeout(PROBE_TIMEOUT)
            line.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with suppress(OSError):
                if line.recv(5) == b"HTTP/":
                    raise _of_web_server(address, given)


def _of_web_server(address: str, given: str) -> ClusterError:
    return ClusterError(
        f"{given} {address!r} is that of a dashboard or another web server",
        "Ray's own commands for jobs take RAY_ADDRESS so" if given == "RAY_ADDRESS" else "",
        "give the port of `ray start`, 6379 if it was not chosen, with --address, or use `datm-ray job submit`",
    )


def first_line(said: BaseException | str) -> str:
    """Of a message, or of what an error says; an error that says nothing has a kind at least."""
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    if lines:
        return lines[0][:200].rstrip(".")  # Ray may put a whole page into a line
    return "" if isinstance(said, str) else type(said).__name__


class Machines:
    """The nodes that a cluster has at the moment, in workers."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster = cluster
        self._fits: list[int] = []
        self._asked_for = self._wanted = 0
        self._useful = sys.maxsize
        self._looked = float("-inf")

    def fits(self) -> list[int]:
        """Workers for which each node has room, whoever holds it; looked up once a second."""
        if time.monotonic() - self._looked > LOOK_INTERVAL:
            self._fits = [fitting(node["Resources"], self._cluster) for node in ray.nodes() if node["Alive"]]
            self._looked = time.monotonic()
        return self._fits

    def capacity(self) -> int:
        """Workers for which there is room, but no more than are asked for."""
        return min(self._cluster.workers or sum(self.fits()), sum(self.fits()))

    def free(self) -> int:
        """Workers for which nobody holds the room, about: resources of different nodes count as one here."""
        return fitting(ray.available_resources(), self._cluster)

    def require(self) -> tuple[int, int]:
        """Workers to plan with, and those of one machine.

        Raises:
            ClusterError: fewer than asked for; they are waited for as long as the recipe says.
        """
        wanted = self._cluster.workers or 1
        try:
            found = self.wait_for(wanted)
            if sum(self.fits()) < wanted:
                raise self._too_few(wanted)
        except BaseException:  # an interrupt too: a cluster that grows would grow for nobody
            self.ask_no_more()
            raise
        return found

    def wait_for(self, wanted: int) -> tuple[int, int]:
        """As `require`, but without complaint where too few come."""
        patience = self._cluster.wait_for_nodes
        end = time.monotonic() + patience
        if patience:  # so that machines which are lost are replaced
            self.ask_for(wanted)
        if patience and sum(self.fits()) < wanted:
            told = f"there is room for {sum(self.fits())} of {wanted} worker(s)"
            print(f"Waiting up to {patience:g} s for machines: {told}", file=sys.stderr, flush=True)
        while sum(self.fits()) < wanted and time.monotonic() < end:
            time.sleep(LOOK_INTERVAL)
        return self._cluster.workers or sum(self.fits()), min(self.capacity(), max(self.fits(), default=0))

    def _too_few(self, wanted: int) -> ClusterError:
        cluster, resources = self._cluster, ray.cluster_resources()
        gpus = f"{cluster.gpus_per_worker or 0:g} GPU(s)"
        return ClusterError(
            f"{wanted} worker(s) of {cluster.threads_per_worker} CPU(s) and {gpus} are asked for, but the cluster has "
            f"{resources.get('CPU', 0):g} CPU(s) and {resources.get('GPU', 0):g} GPU(s)",
            remedy="lower cluster.workers, threads_per_worker or gpus_per_worker, or add nodes; "
            "cluster.wait_for_nodes waits for those that come on demand",
        )

    def ask_for(self, workers: int) -> None:
        """Tell a cluster that grows on demand what is wanted, if it is more than before; others take no notice."""
        self._wanted = max(self._wanted, workers, self._cluster.workers or 0)
        if min(self._wanted, self._useful) > self._asked_for:
            self._request(min(self._wanted, self._useful))

    def use(self, workers: int) -> None:
        """Say how many a stage can use, so that nobody pays for the others; the next one may ask for them again."""
        self._useful = workers
        if self._asked_for:
            self._request(min(self._wanted, workers))

    def ask_no_more(self) -> None:
        """Let a cluster that grew on demand shrink again; what was asked for would stand for ever."""
        if self._asked_for:
            self._request(0)

    def _request(self, workers: int) -> None:
        if workers == self._asked_for:
            return
        self._asked_for = workers
        with suppress(Exception):  # whatever an autoscaler's trouble is, there may be room without it
            request_resources(bundles=[place(self._cluster)] * workers)


def with_gpus(cluster: ClusterConfig) -> ClusterConfig:
    """The settings, with the number of GPUs that a worker gets on the cluster we are connected to.

    Raises:
        ClusterError: a precision or device that there is no GPU for.
    """
    asked = cluster.gpus_per_worker
    if asked is None:
        has_some = cluster.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
        cluster = cluster.model_copy(update={"gpus_per_worker": 1.0 if has_some else 0.0})
    if cluster.device == "cuda" and not cluster.gpus_per_worker:
        raise ClusterError(
            "cluster.device is 'cuda', but no node of the cluster has a GPU",
            "they come on demand, or Ray was started without them",
            "say how many a worker gets with --set cluster.gpus_per_worker=1, or set cluster.device=auto",
        )
    require_precision(cluster, has_gpu=bool(cluster.gpus_per_worker) and cluster.device != "cpu")
    return cluster


def place(cluster: ClusterConfig) -> dict[str, float]:
    """Resources of one worker."""
    wanted = {"CPU": float(cluster.threads_per_worker), "GPU": cluster.gpus_per_worker or 0.0}
    return {name: count for name, count in wanted.items() if count}


def fitting(resources: dict[str, float], cluster: ClusterConfig) -> int:
    """Workers for which a node has room. No worker spans two nodes, and no share of a GPU spans two GPUs."""
    fits = int(resources.get("CPU", 0) // cluster.threads_per_worker)
    wanted, gpus = cluster.gpus_per_worker, resources.get("GPU", 0)
    if not wanted:
        return fits
    return min(fits, int(gpus) * int(1 / wanted + 1e-9) if wanted < 1 else int(gpus // wanted))
