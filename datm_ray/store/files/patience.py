"""Time limit for repeating a failed request, in this process.

A worker on its own has 300 seconds. A worker whose peers wait for it in a sum has a third of `cluster.peer_timeout`, so
that it reports its own error before the peers report a lost worker. The last attempt starts within that third. A write
is at most three requests (who may write, the upload, whose upload is stored). A silent server delays each of them by 65
seconds (5 to connect, 60 for the answer). With the default timeout of 300 seconds this gives 100 + 3 x 65 = 295
seconds. A server that answers "busy" causes no such delay, so the limit holds for any `cluster.peer_timeout`. For a
silent server the timeout must be 293 or more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 300.0
"""Longest time for which a failed request is repeated, in seconds."""
SHARE_OF_PEERS = 1 / 3
"""Share of `cluster.peer_timeout` for which a failed request is repeated in a worker whose peers wait for it."""

_limit = LONGEST
_rights_are_there = False


def expect_rights() -> None:
    """Say that the command has had credentials for its storage, so that ones that this process lacks are waited for."""
    global _rights_are_there
    _rights_are_there = True


def rights_expected() -> bool:
    """True if credentials that this process lacks are waited for, see `expect_rights`."""
    return _rights_are_there


def patience() -> float:
    """Seconds for which this process repeats a failed request."""
    return _limit


@contextmanager
def while_peers_wait(timeout: float) -> Iterator[None]:
    """Limit the time for repeating requests to a share of `timeout` while the block runs, in all threads.

    Args:
        timeout: seconds after which the waiting workers count this one as lost.
    """
    global _limit
    before, _limit = _limit, min(_limit, timeout * SHARE_OF_PEERS)
    try:
        yield
    finally:
        _limit = before
