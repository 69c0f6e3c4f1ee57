"""Uses of Ray's private interfaces, which may change with any version. Module `dashboard` overrides one more.

Tested with the versions in docs/versions.md, Ray 2.40 to 2.60. If a version lacks one of these interfaces, a
convenience is lost, but runs still work.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import ray


def use_token() -> None:
    """Use the user's Ray token if there is one. Where RAY_AUTH_MODE is set, it alone decides if tokens are used.

    New versions of Ray require a token by default; old versions know no tokens. Only job commands call this, because a
    driver with a token cannot start actors on a cluster without tokens.
    """
    with suppress(ImportError):
        from ray._private.authentication import authentication_token_setup as setup

        hush()
        setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def keep_token_private() -> None:
    """Let only this user read the token in `~/.ray`, which a new cluster writes. Ray itself lets everyone read it."""
    home = Path.home() / ".ray"
    for made in (home, home / "auth_token"):
        with suppress(OSError):  # not there, or another user's
            made.chmod(made.stat().st_mode & ~0o077)
    with suppress(ImportError, AttributeError):
        from ray._private.authentication import authentication_token_setup as setup

        setup.generate_and_save_token = _privately(setup.generate_and_save_token)


def _privately(write: Callable[[], None]) -> Callable[[], None]:
    """Wrap the function `write`, so that other users cannot read the files and folders that it creates."""

    @functools.wraps(write)
    def privately() -> None:
        before = os.umask(0o077)
        try:
            write()
        finally:
            os.umask(before)

    return write if hasattr(write, "__wrapped__") else privately


def hush() -> None:
    """Silence Ray's log lines below errors, such as those about the token and each uploaded file.

    Every logger is set by itself, because some of Ray's loggers do not follow their parent's level.
    """
    for name in list(logging.root.manager.loggerDict):
        if name == "ray" or name.startswith("ray."):
            logging.getLogger(name).setLevel(logging.ERROR)


NOT_A_NODE = "No node info found"
"""Words in Ray's error message when the driver's machine is no node of the cluster."""


def runs_a_node() -> bool:
    """True if this machine runs a node of any Ray cluster, or if this version of Ray cannot tell.

    A driver needs a node of its cluster on its own machine.
    """
    find = getattr(ray._private.services, "find_gcs_addresses", None)
    return find is None or bool(find())


def limit_node_search(seconds: float) -> None:
    """Limit the seconds for which a driver searches for its cluster's node on this machine. Ray's limit is 60 s."""
    services = ray._private.services
    search = getattr(services, "get_node_to_connect_for_driver", None)
    if search is not None and "timeout_seconds" in inspect.signature(search).parameters:
        services.get_node_to_connect_for_driver = functools.partial(search, timeout_seconds=seconds)


@cache
def knows_labels() -> bool:
    """True if this version of Ray can choose nodes by their labels."""
    return "bundle_label_selector" in inspect.signature(ray.util.placement_group).parameters


def keep_off_standard_output(*, shown: bool) -> None:
    """Keep messages of raylets and workers out of standard output, which carries results.

    A dying raylet prints thirty lines of statistics, and no setting of Ray prevents this. The executor logs the loss in
    one line; Ray's log files keep everything.

    Args:
        shown: True to print the messages to standard error, False to drop them.
    """
    worker = ray._private.worker
    if not shown and hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None
    elif shown and hasattr(worker, "print_worker_logs"):
        show = worker.print_worker_logs
        worker.print_worker_logs = lambda data, _stream, *more: show(data, sys.stderr, *more)


def draining_nodes() -> set[str]:
    """Identifiers of the nodes that Ray knows will end soon, such as reclaimed spot machines; empty if unknown."""
    with suppress(AttributeError, RuntimeError, ray.exceptions.RayError):
        return set(ray._private.state.state.get_draining_nodes())
    return set()


def mark() -> dict[str, float]:
    """Extra resource (name -> amount) that this command's actors request, to be counted by `requests_without_place`.

    Its name has a prefix by which Ray assumes an amount of 1 on every node, also one that an autoscaler may start. So
    the request delays no actor. Empty if this version of Ray has no such prefix.
    """
    prefix = getattr(ray._raylet, "IMPLICIT_RESOURCE_PREFIX", "")
    return {f"{prefix}{ray.get_runtime_context().get_job_id()}": 0.0001} if prefix else {}


def requests_without_place() -> float:
    """Number of this command's actors with `mark` that wait for resources; infinite if unknown.

    Ray reports it about a second late. Without marks, waiting actors of all commands on the cluster count.
    """
    with suppress(Exception):  # whatever it is, only the length of a wait depends on the answer
        from ray.autoscaler.v2.sdk import get_cluster_status

        demands = get_cluster_status(ray.get_runtime_context().gcs_address).resource_demands.ray_task_actor_demand
        found, wanted = [each for demand in demands for each in demand.bundles_by_count], mark().keys()
        return sum(each.count for each in found if wanted <= each.bundle.keys())
    return math.inf


def idle_resources() -> dict[str, dict[str, float]]:
    """Resources that no actor or task holds: identifier of a live node -> resource -> amount, as of up to 1 s ago.

    Empty if they are unknown.
    """
    with suppress(AttributeError, RuntimeError, ray.exceptions.RayError):
        return dict(ray._private.state.available_resources_per_node())
    return {}
