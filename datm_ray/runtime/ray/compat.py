"""Private parts of Ray, which may change with any version. Only `dashboard` uses another one.

They were tested with the versions in docs/versions.md, Ray 2.40 to 2.60. A version without one of them loses a
convenience, not a function.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from contextlib import suppress
from functools import cache

import ray


def use_token() -> None:
    """Use the user's Ray token, if there is one and the environment neither requires nor forbids it.

    New versions of Ray require a token by default, and old ones have none. Only job commands call this: a driver with a
    token cannot start actors on a cluster without one.
    """
    with suppress(ImportError):
        from ray._private.authentication import authentication_token_setup as setup

        hush()
        setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def hush() -> None:
    """Silence Ray's log lines about the token and each uploaded file. Some of its loggers set their own level."""
    for name in list(logging.root.manager.loggerDict):
        if name == "ray" or name.startswith("ray."):
            logging.getLogger(name).setLevel(logging.ERROR)


NOT_A_NODE = "No node info found"
"""Words of Ray's error for a driver that finds no node of its cluster on its machine."""


def runs_a_node() -> bool:
    """True if this machine runs a node of some Ray cluster, which a driver needs, or if Ray cannot tell."""
    find = getattr(ray._private.services, "find_gcs_addresses", None)
    return find is None or bool(find())


def limit_node_search(seconds: float) -> None:
    """Limit the time for which a driver searches for its cluster's node on this machine. Ray's own limit is 60 s."""
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

    A raylet that dies prints thirty lines of statistics, and no setting of Ray's prevents it. The executor logs the
    loss in one line; Ray's log files keep the rest.

    Args:
        shown: True to print the messages to standard error, False to drop them.
    """
    worker = ray._private.worker
    if not shown and hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None
    elif shown and hasattr(worker, "print_worker_logs"):
        show = worker.print_worker_logs
        worker.print_worker_logs = lambda data, _stream, *more: show(data, sys.stderr, *more)


def autoscaled_resources() -> dict[str, float]:
    """Most of each resource that the cluster's autoscaler may provide; empty without an autoscaler."""
    with suppress(AttributeError, RuntimeError, ray.exceptions.RayError):
        return dict(ray._private.state.state.get_max_resources_from_cluster_config() or {})
    return {}


def draining_nodes() -> set[str]:
    """Nodes that end soon, by a notice to Ray, such as spot machines that are taken back."""
    with suppress(AttributeError, RuntimeError, ray.exceptions.RayError):
        return set(ray._private.state.state.get_draining_nodes())
    return set()
