"""Work one iteration ahead: prepare the inputs of the next iteration in a thread while the current one computes.

    ahead = Ahead(prepare, end=100)
    for iteration in range(first, 100):
        compute(ahead.get(iteration))

Tests: tests/runtime/test_ahead.py.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Ahead(Generic[Value]):
    """Computes a value for each of consecutive numbers. While the caller uses one value, a thread computes the next."""

    def __init__(self, compute: Callable[[int], Value], end: int, *, in_thread: bool = True) -> None:
        """Make the object; nothing is computed yet.

        Args:
            compute: makes the value of a number, from the number alone.
            end: exclusive upper bound of the numbers that are computed ahead.
            in_thread: False to compute each value when it is asked for.
        """
        self._compute, self._end = compute, end
        self._thread = ThreadPoolExecutor(1, "ahead") if in_thread else None
        self._following: tuple[int, Future[Value]] | None = None

    def get(self, number: int) -> Value:
        """Return the value of `number`, and start to compute that of `number` + 1, if below `end`, in the thread.

        If the last call was for `number` - 1, the thread has computed the value, or is still at work; otherwise it is
        computed now. An error of `compute` is raised by the call for its number; without such a call it is lost.
        """
        following, self._following = self._following, None
        value = following[1].result() if following and following[0] == number else self._compute(number)
        if self._thread is not None and number + 1 < self._end:
            self._following = number + 1, self._thread.submit(self._compute, number + 1)
        return value

    def close(self) -> None:
        """Drop the value computed ahead, and wait for the thread's end. Later values are computed when asked for."""
        self._following = None
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
