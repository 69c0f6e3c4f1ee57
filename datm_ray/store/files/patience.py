"""How long a server that fails for the moment is asked again, in this process.

Alone, a worker has 300 seconds. One whose peers wait for it in a sum has a third of `cluster.peer_timeout`, so that it
reports its own error before they report a lost peer. The arithmetic: the last attempt starts within that third. A write
is at most three requests (who may write, the upload, whose upload is stored), and a silent server holds each for 65
seconds (5 to connect, 60 for the answer). With the default of 300 that is 100 + 3 x 65 = 295 seconds. A server that
answers "busy" holds none, so then any `cluster.peer_timeout` is kept; against a silent one it must be 293 or more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 300.0
"""Seconds for which a request is asked again."""
SHARE_OF_PEERS = 1 / 3
"""Share of the peers' timeout for which a request is asked again."""

_limit = LONGEST


def patience() -> float:
    """Seconds for which this process asks again."""
    return _limit


@contextmanager
def while_peers_wait(timeout: float) -> Iterator[None]:
    """Ask again for a share of `timeout` in the block. The time is that of all threads of this process.

    Args:
        timeout: seconds after which waiting workers give this one up.
    """
    global _limit
    before, _limit = _limit, min(_limit, timeout * SHARE_OF_PEERS)
    try:
        yield
    finally:
        _limit = before
