"""Stopping without loss: on Ctrl-C or SIGTERM, a command saves its work in progress before it ends.

Work that can save itself checks between two steps whether it was asked to stop (`saving`). A command outside of such
work ends at once, because nothing would be lost. Drivers and workers use the same functions, each in its own process.
Tests: tests/runtime/test_stopping.py.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

SAVE_TIMEOUT = 60.0
"""Longest time in seconds that a driver waits, after a request to stop, for its workers to save their work."""
LONGEST_EPOCH = 45.0
"""Seconds after a request to stop within which an epoch may end and be saved. A longer epoch is given up.

Less than `SAVE_TIMEOUT`, so that a worker can say from where its task resumes before its driver ends it."""


class Interrupted(KeyboardInterrupt):
    """Error that ends a command, or a worker's task, after a request to stop such as Ctrl-C or SIGTERM.

    The text describes the saved work, such as "birds: iteration 21 of 60"; "" if nothing was saved.
    """

    exit_code = 128 + signal.SIGINT
    is_at_once = False
    """True if the process should end without its exit handlers and threads, which may take seconds."""


SAVES = "Stopping after the present iteration or epoch, which is saved if it ends soon"

_savers: list[str] = []
"""Messages to show on a request to stop, one for each block of `saving` in progress, outermost first."""
_is_asked = False
_asked_at = 0.0
"""Time of the last request to stop, in seconds of the monotonic clock."""
_closing = threading.Lock()
"""Lock that the thread of `close_unless_interrupted` holds while it runs `close`."""


@contextmanager
def saving(message: str = SAVES) -> Iterator[Callable[[], bool]]:
    """Context of work that, on a request to stop, saves itself before it ends, instead of ending at once.

    Args:
        message: text that the user is shown when a request to stop comes.

    Yields:
        A function that returns True once a request has come. The work must then save itself and raise `Interrupted`.

    Raises:
        Interrupted: the work was asked to stop, and has ended without raising an `Interrupted` itself.
    """
    global _is_asked
    _savers.append(message)
    try:
        yield lambda: _is_asked
        if _is_asked:
            raise Interrupted
    finally:
        _savers.pop()
        _is_asked = _is_asked and bool(_savers)


def ask() -> bool:
    """Ask the work of this process to save itself and then end. Does not wait: the work checks between two steps.

    Returns True if it was asked now; False if no work can save itself (none is in `saving`), or it was asked before.
    """
    global _is_asked, _asked_at
    is_new = bool(_savers) and not _is_asked
    _is_asked, _asked_at = _is_asked or is_new, time.monotonic() if is_new else _asked_at
    return is_new


def is_overdue() -> bool:
    """True if the work was asked to stop more than `LONGEST_EPOCH` seconds ago, so must end before its epoch does."""
    return _is_asked and time.monotonic() - _asked_at > LONGEST_EPOCH


def given_up(saved: str) -> Interrupted:
    """Make the error that ends work in the middle of an epoch, because waiting for the epoch's end would take too long.

    Args:
        saved: describes the last saved state, such as "epoch 3 of 90".
    """
    return Interrupted(f"{saved}, without the part of the next epoch")


@contextmanager
def by_signals(tell: Callable[[str], object]) -> Iterator[None]:
    """Handle SIGINT and SIGTERM in a block: the first asks this process's work to save itself and then end (`ask`).

    A second signal ends the block at once, and so does the first if no work can save itself. Signals that the process
    ignores stay ignored. Outside of the main thread this context does nothing.

    Args:
        tell: shows a message to the user.

    Raises:
        Interrupted: a signal came. `exit_code` is 128 + its number, as in a shell.
    """
    last = signal.SIGINT

    def handle(number: int, _: Any) -> None:
        nonlocal last
        last = signal.Signals(number)
        if not ask():
            raise Interrupted
        with suppress(RuntimeError):  # the signal interrupted a write to the same stream
            tell(f"{_savers[-1]}. Ctrl-C again stops at once.")

    try:
        with _handling(handle):
            yield
    except Interrupted as end:
        end.exit_code = 128 + last
        raise


def close_unless_interrupted(close: Callable[[], object]) -> None:
    """Call `close` in a thread of its own and wait for its end. SIGINT or SIGTERM ends the wait.

    This suits calls that take seconds, such as closing Ray. After a signal the thread continues, unless the process
    ends. `wait_for_close` waits for the thread. Without a signal, an error of `close` is raised.

    Raises:
        Interrupted: a signal came. `is_at_once` is True, and `exit_code` is 128 + its number, as in a shell.
    """

    def handle(number: int, _: Any) -> None:
        end = Interrupted()
        end.exit_code, end.is_at_once = 128 + number, True
        raise end

    def work() -> None:
        with _closing:
            close()

    with _handling(handle):
        ThreadPoolExecutor(1, "close").submit(work).result()


def wait_for_close() -> None:
    """Wait for the thread that `close_unless_interrupted` has left behind after a signal. SIGINT ends this wait too.

    If closing fails in the thread, the error is not raised here.
    """
    with _closing:
        pass


@contextmanager
def _handling(handle: Callable[[int, Any], object]) -> Iterator[None]:
    """Call `handle` on SIGINT and SIGTERM while the block runs. No effect on ignored signals or in other threads than
    the main one.
    """
    wanted = [signal.SIGINT, signal.SIGTERM] if threading.current_thread() is threading.main_thread() else []
    before = {each: signal.getsignal(each) for each in wanted}
    ours = [each for each in wanted if before[each] is not signal.SIG_IGN]
    for each in ours:
        signal.signal(each, handle)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, before[each] or signal.SIG_DFL)
