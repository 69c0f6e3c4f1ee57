"""Decisions about lost workers, without a cluster."""

from __future__ import annotations

import pytest

from datm_ray.runtime.recovery import History, grown, is_silent, size_for


def test_a_task_that_gets_no_further_is_given_up() -> None:
    """Four losses at one place are too many where three retries are allowed."""
    history = History()
    for losses in range(1, 5):
        history = history.after_loss(7)
        assert history.losses == losses
        assert history.gives_up(retries=3) == (losses == 4)


def test_losses_between_which_a_task_gets_on_are_no_reason_to_give_up() -> None:
    """Machines that are taken away now and then are the normal case."""
    history = History()
    for done in range(10, 400, 10):
        history = history.after_loss(done)
        assert not history.gives_up(retries=1)
    assert history.losses == 39
    assert not history.after_loss(400).gives_up(retries=1)
    assert history.after_loss(5).gives_up(retries=1)


def test_without_retries_the_first_loss_is_the_last() -> None:
    """However far the attempt has come."""
    assert History().after_loss(100).gives_up(retries=0)


@pytest.mark.parametrize(
    ("sizes", "room", "size"),
    [((4, 3, 2, 1), 9, 4), ((4, 3, 2, 1), 3, 3), ((6, 3), 5, 3), ((6, 3), 2, None), ((2,), 1, None), ((), 8, None)],
)
def test_a_crew_is_as_large_as_there_is_room(sizes: tuple[int, ...], room: int, size: int | None) -> None:
    """But only of a size that can do the task."""
    assert size_for(sizes, room) == size


@pytest.mark.parametrize(
    ("capacity", "busy", "free", "better"),
    [
        (4, 1, 3, 4),  # all machines are back
        (3, 1, 2, 2),  # some are; three workers cannot do this task
        (4, 1, 0, None),  # they are back, but somebody else has them
        (4, 3, 3, 2),  # two are at another task
        (1, 1, 0, None),
        (4, 4, 0, None),
    ],
)
def test_a_task_grows_into_what_is_free(capacity: int, busy: int, free: int, better: int | None) -> None:
    """From one worker, where four or two could do it."""
    assert grown((4, 2, 1), 1, capacity, busy, free) == better


def test_a_task_never_shrinks_to_grow() -> None:
    """Where machines went, the loss of its workers will tell."""
    assert grown((4, 2, 1), 2, 1, 2, 0) is None


def test_silence_is_counted_from_the_question() -> None:
    """A worker that was not asked is not silent."""
    assert not is_silent(None, 1000.0, 30.0)
    assert not is_silent(980.0, 1000.0, 30.0)
    assert is_silent(960.0, 1000.0, 30.0)
