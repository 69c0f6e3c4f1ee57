"""Time for which this process repeats a failed request.

A worker on its own repeats a request for 300 seconds. A worker whose peers wait for it in a sum has only a third of
`cluster.peer_timeout`: it then reports its own error before its peers report a lost worker.

The last attempt starts within this third. An attempt to write is at most three requests: who may write, the upload, and
whose upload is stored. A silent server delays each request by 65 seconds (5 to connect, 60 for the answer). So with the
default timeout of 300 seconds, the error comes after at most 100 + 3 x 65 = 295 seconds. With a silent server this is
in time for timeouts of 293 seconds and more. A server that answers "busy" causes no such delay, so any timeout will do.
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
    """Note that credentials for the storage should exist, because the command has them.

    If this process gets no credentials, it then repeats requests instead of failing at once.
    """
    global _rights_are_there
    _rights_are_there = True


def rights_expected() -> bool:
    """True if this process waits for credentials that it lacks, see `expect_rights`."""
    return _rights_are_there


def patience() -> float:
    """Seconds for which this process repeats a failed request, from its first attempt on."""
    return _limit


@contextmanager
def while_peers_wait(timeout: float) -> Iterator[None]:
    """Limit the time for repeating requests to a third of `timeout` while the block runs, in all threads.

    Args:
        timeout: seconds after which the waiting workers count this one as lost.
    """
    global _limit
    before, _limit = _limit, min(_limit, timeout * SHARE_OF_PEERS)
    try:
        yield
    finally:
        _limit = before
