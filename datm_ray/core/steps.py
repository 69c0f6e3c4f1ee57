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
    """Iterable that does a work in steps: one item, `None`, for each pause. It can be iterated over once.

    Attributes:
        result: the work's result; exists only after the last item.
    """

    result: Result

    def __init__(self, steps: Steps[Result]) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[None]:
        """Do the work, and yield `None` at each of its pauses."""
        self.result = yield from self._steps


def result_of(steps: Steps[Result]) -> Result:
    """Do a work in steps without pausing, and return its result."""
    work = Work(steps)
    for _ in work:
        pass
    return work.result


def all_of(works: Iterable[Steps[Result]]) -> Steps[list[Result]]:
    """Join several works into one that does them in turn, with all their pauses. Its result is the list of results."""
    found: list[Result] = []
    for work in works:
        found += [(yield from work)]
    return found


def finished(result: Result) -> Steps[Result]:
    """Make a work in steps whose result is already known. It pauses once, before it returns `result`."""
    yield
    return result
