"""Work in steps: generators that pause between steps and return a result, so that callers can report meanwhile.

Tests: tests/core/test_steps.py.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Generic, TypeAlias, TypeVar

Result = TypeVar("Result")
Steps: TypeAlias = Generator[None, None, Result]
"""Generator that yields `None` between steps of its work, and returns the work's result."""


class Work(Generic[Result]):
    """Iterable over a `Steps` generator that keeps what the generator returns. It can be iterated over once.

    Attributes:
        result: value that the generator returned; exists only after the last item.
    """

    result: Result

    def __init__(self, steps: Steps[Result]) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[None]:
        """Run the generator to its end, and yield `None` at each of its pauses."""
        self.result = yield from self._steps


def result_of(steps: Steps[Result]) -> Result:
    """Run a `Steps` generator to its end without pausing, and return its result."""
    work = Work(steps)
    for _ in work:
        pass
    return work.result


def all_of(works: Iterable[Steps[Result]]) -> Steps[list[Result]]:
    """Join `Steps` generators into one that runs them in turn, with all their pauses, and returns their results."""
    found: list[Result] = []
    for work in works:
        found += [(yield from work)]
    return found


def finished(result: Result) -> Steps[Result]:
    """Make a `Steps` generator whose result is already known. It pauses once, then returns `result`."""
    yield
    return result
