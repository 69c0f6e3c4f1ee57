"""Decisions about lost workers and about nodes added or lost. Pure functions; the executor acts on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class History:
    """Attempts of one task so far."""

    losses: int = 0
    """Number of attempts that ended because a worker was lost."""
    without_progress: int = 0
    """Number of losses since the last attempt that got further than all before it, including its own."""
    furthest: int = 0
    """Highest `Progress.done` of all attempts."""

    def after_loss(self, done: int) -> History:
        """History with one more lost attempt, whose last `Progress.done` is `done`."""
        further = done > self.furthest
        return dataclasses.replace(
            self,
            losses=self.losses + 1,
            without_progress=1 if further else self.without_progress + 1,
            furthest=max(done, self.furthest),
        )

    def gives_up(self, retries: int) -> bool:
        """True if to stop retrying. A task that progresses between losses is never given up."""
        return self.without_progress > retries


def size_for(sizes: Sequence[int], free: int) -> int | None:
    """Largest group size, at most `free`, that can run the task; `None` if no size fits.

    Args:
        sizes: group sizes that can run the task.
        free: workers for which there are free resources.
    """
    return max((size for size in sizes if size <= free), default=None)


def grown(sizes: Sequence[int], size: int, capacity: int, busy: int, free: int) -> int | None:
    """Larger group size that a task should resume with, or `None` if it should keep its workers.

    Args:
        sizes: group sizes that can run the task.
        size: workers that run the task now.
        capacity: workers that the cluster can hold in all.
        busy: workers that run any task, including this one.
        free: further workers for which there are free resources.
    """
    better = size_for(sizes, min(capacity - (busy - size), size + free))
    return better if better is not None and better > size else None


def is_silent(sent: float | None, now: float, limit: float) -> bool:
    """True if a heartbeat requested at `sent` is late by more than `limit`, in seconds; `sent=None` never is."""
    return sent is not None and now - sent > limit
