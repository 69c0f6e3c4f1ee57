"""Private parts of Ray, which may change with any version; of other modules only ray_dashboard uses one.

Their behaviour was observed with the versions in docs/versions.md, from Ray 2.40 to 2.60. A version that lacks one of
them loses a convenience, not a function.
"""

from __future__ import annotations

import logging
from contextlib import suppress

import ray


def use_token() -> None:
    """Use the token that this user has, where the environment neither requires nor forbids it.

    New versions of Ray require a token by default, and old ones have none. For jobs only: a driver with a token cannot
    start actors on a cluster without.
    """
    with suppress(ImportError):
        from ray._private.authentication import authentication_token_setup as setup

        hush()
        setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def hush() -> None:
    """Silence Ray's reports of every file it packs and of the token; some of its loggers have levels of their own."""
    for name in list(logging.root.manager.loggerDict):
        if name == "ray" or name.startswith("ray."):
            logging.getLogger(name).setLevel(logging.ERROR)


def silence_raylets() -> None:
    """Keep what raylets publish out of standard output, where results belong.

    A raylet that dies writes thirty lines of statistics, whatever `log_to_driver` is, and no setting turns them off.
    The executor reports the loss in one line; the rest is in Ray's logs.
    """
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda *_, **__: None
