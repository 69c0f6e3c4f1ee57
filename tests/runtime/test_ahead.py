"""Tests work one iteration ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from datm_ray.runtime.ahead import Ahead

calls: list[tuple[int, bool]] = []
"""Numbers whose values were computed, each with whether the thread computed it."""


def threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("ahead")]


def square(number: int) -> int:
    if number < 0:
        raise ArithmeticError(f"{number} has no value")
    calls.append((number, threading.current_thread() in threads()))
    return number * number


@pytest.fixture
def ahead() -> Iterator[Ahead[int]]:
    calls.clear()
    made = Ahead(square, 6)
    yield made
    made.close()
    assert not threads()


def test_each_value_is_computed_once_while_the_one_before_is_in_use(ahead: Ahead[int]) -> None:
    """All values but the first come from the thread, and none is computed at or beyond the end."""
    assert [ahead.get(number) for number in range(2, 6)] == [4, 9, 16, 25]
    ahead.close()
    assert calls == [(2, False), (3, True), (4, True), (5, True)]


def test_no_more_than_one_value_is_computed_ahead() -> None:
    """The thread computes nothing beyond the next number, however long the caller takes."""
    started, computed = threading.Semaphore(0), []

    def compute(number: int) -> int:
        computed.append(number)
        started.release()
        return number

    ahead = Ahead(compute, 100)
    for number in range(5):
        ahead.get(number)
        assert started.acquire(timeout=60)
    assert started.acquire(timeout=60)
    ahead.close()
    assert computed == list(range(6))


def test_another_number_is_computed_when_it_is_asked_for(ahead: Ahead[int]) -> None:
    """After a resumption or a repetition, the value is that of the number, and later ones are ahead again."""
    assert [ahead.get(number) for number in (0, 3, 3, 4, 1)] == [0, 9, 9, 16, 1]
    assert [number for number, is_ahead in calls if not is_ahead] == [0, 3, 3, 1]


def test_an_error_is_raised_where_its_value_is_asked_for() -> None:
    """An error in the thread does not disturb the value before, and one that nobody asks for is lost."""

    def compute(number: int) -> int:
        return square(number if number != 2 else -2)

    ahead = Ahead(compute, 6)
    assert [ahead.get(number) for number in (0, 1)] == [0, 1]
    with pytest.raises(ArithmeticError, match="-2 has no value"):
        ahead.get(2)
    assert ahead.get(3) == 9
    assert [ahead.get(1), ahead.get(5)] == [1, 25]
    ahead.close()
    assert not threads()


def test_a_closed_one_computes_on_demand_and_ends_its_thread(ahead: Ahead[int]) -> None:
    """Closing, even twice and with work outstanding, ends the thread; later values are computed by the caller."""
    ahead.get(0)
    ahead.close()
    ahead.close()
    assert not threads()
    assert ahead.get(1) == 1
    assert calls[-1] == (1, False)


def test_without_a_thread_values_are_computed_when_asked_for() -> None:
    """Without a thread nothing is computed ahead."""
    calls.clear()
    ahead = Ahead(square, 6, in_thread=False)
    assert [ahead.get(number) for number in range(3)] == [0, 1, 4]
    assert calls == [(0, False), (1, False), (2, False)]
    assert not threads()
