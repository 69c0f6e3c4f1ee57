"""Work in steps: generators that pause between steps and return a result, so that callers can report meanwhile.

Tests: tests/core/test_steps.py.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TypeAlias, TypeVar

Result = TypeVar("Result")
Steps: TypeAlias = Generator[None, None, Result]
"""Generator that yields `None` between steps of its work, and returns the work's result."""


def result_of(steps: Steps[Result], between: Callable[[], object] = lambda: None) -> Result:
    """Do all steps at once and return the result.

    Args:
        steps: the work.
        between: called wherever the work pauses, such as a heartbeat.
    """
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: Result = end.value
            return result
        between()


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
