"""Time limits of requests to storage: a request that fails ends before its worker counts as lost.

A worker counts as lost after a deadline: `cluster.peer_timeout` if peers wait for it, else the watchdog's limit (see
`runtime.retries.Patience`). The worker must report the storage's error earlier, or the user reads of a lost worker
instead. So `end_within` limits both parts of the time until this error, here for the default deadline of 300 seconds:

- The last attempt starts within `SHARE` of the deadline: 100 seconds.
- An attempt to write has at most `REQUESTS` requests: two to check who may write, one to check whose upload is stored,
  the upload, and one more to check whose upload is stored. Each takes at most the time limits to connect and for the
  answer: 5 x (5 + 22.5) = 137.5 seconds. Two uploads are not counted: one of more than 5 GiB, in parts, and the first
  one to a server that then refuses conditions, because it is made twice.

Together this is at most four fifths of the deadline, for deadlines of 60 seconds and more. The rest is for peers that
started to wait earlier. A process without a deadline, such as a command, repeats a request for `LONGEST` seconds.
"""

from __future__ import annotations

import math

LONGEST = 300.0
"""Largest number of seconds for which a process repeats a failed request to storage."""
SHARE = 1 / 3
"""Share of a worker's deadline within which the last attempt at a request starts. The deadline is the time after which
the worker counts as lost."""
REQUESTS = 5
"""Largest number of requests to an S3 server in one attempt to write a file."""
LONGEST_CONNECT, LONGEST_ANSWER = 5.0, 60.0
"""Largest time limits of one request in seconds: to connect, and to wait for the answer. The answer gets more time,
because a gateway may be silent while it passes a large file on."""
CONNECT_SHARE, ANSWER_SHARE = 1 / 60, 3 / 40
"""Time limits of one request, as shares of a worker's deadline: to connect, and to wait for the answer."""
SHORTEST_DEADLINE = 60.0
"""Smallest deadline in seconds from which the time limits of a request are computed. A worker with a shorter deadline
gets the limits for this one, because shorter limits would end requests to healthy servers."""

_deadline = _least = math.inf
_rights_are_there = False


def expect_rights() -> None:
    """Tell this process, a worker, that its machine should have credentials for the storage, as the command has them.

    Requests that fail because there are no credentials are then repeated. Otherwise they fail at once.
    """
    global _rights_are_there
    _rights_are_there = True


def rights_expected() -> bool:
    """True if requests that fail because there are no credentials are repeated: `expect_rights` was called."""
    return _rights_are_there


def end_within(deadline: float = math.inf, least: float | None = None) -> None:
    """Limit the time of requests to storage in all threads of this process, from now on.

    Args:
        deadline: seconds after which this worker counts as lost; infinite for a process that nobody waits for.
        least: shortest deadline of the worker's task, which sets the time limit of a single request; `None` if it is
            `deadline`. It should stay the same during a task, because each change costs a new connection.
    """
    global _deadline, _least
    _deadline, _least = deadline, deadline if least is None else least


def patience() -> float:
    """Seconds, from the first attempt on, for which this process repeats a failed request to storage."""
    return min(LONGEST, SHARE * _deadline)


def connect_timeout() -> float:
    """Time limit in seconds for connecting to a storage server."""
    return min(LONGEST_CONNECT, CONNECT_SHARE * max(_least, SHORTEST_DEADLINE))


def answer_timeout() -> float:
    """Time limit in seconds for a storage server's answer to one request."""
    return min(LONGEST_ANSWER, ANSWER_SHARE * max(_least, SHORTEST_DEADLINE))
