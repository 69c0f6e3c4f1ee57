"""Stopping without loss: on Ctrl-C or SIGTERM, work in progress is saved before the command ends.

Work that can save itself checks between two steps whether it was asked to stop (`saving`). What runs outside of such
work ends at once, because nothing would be lost. Drivers and workers use the same functions, each in its own process.
Tests: tests/runtime/test_stopping.py.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SAVE_TIMEOUT = 60.0
"""Seconds that a driver waits for its workers to save their work."""


class Interrupted(KeyboardInterrupt):
    """End of a command by Ctrl-C or SIGTERM. Its text is what was saved, such as "birds: iteration 21 of 60", or ""."""

    exit_code = 128 + signal.SIGINT


SAVES = "Stopping after the present iteration or epoch, which is saved"

_savers: list[str] = []
"""Messages of the nested pieces of work that will save themselves when asked."""
_is_asked = False


@contextmanager
def saving(message: str = SAVES) -> Iterator[Callable[[], bool]]:
    """Have requests to stop wait for the work within the context.

    Args:
        message: tells the user what happens after the request.

    Yields:
        A function that returns True once the work is to save itself and to raise `Interrupted`.

    Raises:
        Interrupted: the work has come to its end after it was asked to stop.
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
    """Ask the work of this process to save itself. Returns False if none will, or if it was asked before."""
    global _is_asked
    is_new = bool(_savers) and not _is_asked
    _is_asked = _is_asked or is_new
    return is_new


@contextmanager
def by_signals(tell: Callable[[str], object]) -> Iterator[None]:
    """Have the first SIGINT or SIGTERM ask the work of this process to save itself, and the second one end it.

    Signals that the process ignores stay ignored. Does nothing outside of the main thread.

    Args:
        tell: shows a message to the user.

    Raises:
        Interrupted: a signal came. `exit_code` is a shell's for that signal.
    """
    last = signal.SIGINT

    def handle(number: int, _: Any) -> None:
        nonlocal last
        last = signal.Signals(number)
        if not ask():
            raise Interrupted
        with suppress(RuntimeError):  # the signal came while the same stream was written
            tell(f"{_savers[-1]}. Ctrl-C again stops at once.")

    wanted = [signal.SIGINT, signal.SIGTERM] if threading.current_thread() is threading.main_thread() else []
    before = {each: signal.getsignal(each) for each in wanted}
    ours = [each for each in wanted if before[each] is not signal.SIG_IGN]
    for each in ours:
        signal.signal(each, handle)
    try:
        yield
    except Interrupted as end:
        end.exit_code = 128 + last
        raise
    finally:
        for each in ours:
            signal.signal(each, before[each] or signal.SIG_DFL)
