"""Tests decisions about lost workers, without a cluster."""

from __future__ import annotations

import pytest

from datm_ray.runtime.recovery import History, grown, is_silent, size_for


def test_a_task_that_gets_no_further_is_given_up() -> None:
    """Four losses without progress end a task with three retries."""
    history = History()
    for losses in range(1, 5):
        history = history.after_loss(7)
        assert history.losses == losses
        assert history.gives_up(retries=3) == (losses == 4)


def test_losses_between_which_a_task_gets_on_are_no_reason_to_give_up() -> None:
    """Losses with progress between them do not end a task."""
    history = History()
    for done in range(10, 400, 10):
        history = history.after_loss(done)
        assert not history.gives_up(retries=1)
    assert history.losses == 39
    assert not history.after_loss(400).gives_up(retries=1)
    assert history.after_loss(5).gives_up(retries=1)


def test_without_retries_the_first_loss_is_the_last() -> None:
    """Without retries the first loss ends a task, whatever its progress."""
    assert History().after_loss(100).gives_up(retries=0)


@pytest.mark.parametrize(
    ("sizes", "room", "size"),
    [((4, 3, 2, 1), 9, 4), ((4, 3, 2, 1), 3, 3), ((6, 3), 5, 3), ((6, 3), 2, None), ((2,), 1, None), ((), 8, None)],
)
def test_a_worker_group_is_as_large_as_resources_allow(sizes: tuple[int, ...], room: int, size: int | None) -> None:
    """A worker group takes all free resources, in sizes that can do the task."""
    assert size_for(sizes, room) == size


@pytest.mark.parametrize(
    ("capacity", "busy", "free", "better"),
    [
        (4, 1, 3, 4),  # all nodes are back
        (3, 1, 2, 2),  # some nodes are back; three workers cannot do this task
        (4, 1, 0, None),  # nodes are back, but in use by others
        (4, 3, 3, 2),  # two are at another task
        (1, 1, 0, None),
        (4, 4, 0, None),
    ],
)
def test_a_task_grows_into_what_is_free(capacity: int, busy: int, free: int, better: int | None) -> None:
    """A task grows from one worker to a possible size of four or two."""
    assert grown((4, 2, 1), 1, capacity, busy, free) == better


def test_a_task_never_shrinks_to_grow() -> None:
    """Lost nodes do not shrink a task, whose lost workers are reported anyway."""
    assert grown((4, 2, 1), 2, 1, 2, 0) is None


def test_silence_is_counted_from_the_request() -> None:
    """A worker is silent only from a request for its heartbeat on."""
    assert not is_silent(None, 1000.0, 30.0)
    assert not is_silent(980.0, 1000.0, 30.0)
    assert is_silent(960.0, 1000.0, 30.0)
