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
    """Work in steps to iterate over, once: an item for each pause. Afterwards `result` is the work's result."""

    result: Result

    def __init__(self, steps: Steps[Result]) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[None]:
        """Do the work, step by step."""
        self.result = yield from self._steps


def result_of(steps: Steps[Result]) -> Result:
    """Do all steps at once and return the result."""
    work = Work(steps)
    for _ in work:
        pass
    return work.result


def all_of(works: Iterable[Steps[Result]]) -> Steps[list[Result]]:
    """Do several works one after another, and return the list of their results."""
    found: list[Result] = []
    for work in works:
        found += [(yield from work)]
    return found


def finished(result: Result) -> Steps[Result]:
    """Work that has its result already. Pauses once."""
    yield
    return result
