"""Executors by name. The packages that an executor needs are imported only when it is chosen."""

from __future__ import annotations

from datm_ray.config import ClusterConfig
from datm_ray.errors import ClusterError
from datm_ray.runtime.executor import Executor, SerialExecutor

EXECUTORS = ("ray", "serial")


def create_executor(name: str, cluster: ClusterConfig, address: str | None = None) -> Executor:
    """Create an executor, connected and ready to run tasks.

    Args:
        name: "ray" for workers on a Ray cluster, "serial" for one worker in this process.
        cluster: section `cluster` of the recipe.
        address: address of a running Ray cluster. `None` takes the cluster to which this process is connected, else
            that in RAY_ADDRESS, else it starts one on this machine. "serial" does not read it.

    Raises:
        ClusterError: unknown name, Ray not installed or not reachable, too few resources, or a required GPU is missing.
    """
    if name == "serial":
        return SerialExecutor(cluster)
    if name != "ray":
        raise ClusterError(f"unknown executor {name!r}", remedy=f"choose one of: {', '.join(EXECUTORS)}")
    try:
        from datm_ray.runtime.ray.executor import RayExecutor
    except ImportError:
        raise ClusterError(
            "ray is not installed", remedy="`pip install 'ray[default]'`, or use --executor serial"
        ) from None
    return RayExecutor(cluster, address)
