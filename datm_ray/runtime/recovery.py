"""What to do when workers are lost and machines come and go: decisions, and nothing that acts on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class History:
    """How a task has fared so far."""

    losses: int = 0
    """Attempts that ended because a worker was lost."""
    in_vain: int = 0
    """Of these the last ones, since one got further than all before it."""
    furthest: int = 0
    """`Progress.done` of the attempt that got furthest."""

    def after_loss(self, done: int) -> History:
        """The history with one more attempt, which was lost when it had come this far."""
        further = done > self.furthest
        return dataclasses.replace(
            self,
            losses=self.losses + 1,
            in_vain=1 if further else self.in_vain + 1,
            furthest=max(done, self.furthest),
        )

    def gives_up(self, retries: int) -> bool:
        """Whether to stop. Machines that are taken away now and then never end a task that gets on between."""
        return self.in_vain > retries


def size_for(sizes: Sequence[int], room: int) -> int | None:
    """The most workers that a task can use where there is room for so many; None where it can use none.

    Args:
        sizes: numbers of workers that can do the task.
    """
    return max((size for size in sizes if size <= room), default=None)


def grown(sizes: Sequence[int], size: int, capacity: int, busy: int, free: int) -> int | None:
    """The size to which a task of fewer workers than it could use should grow; None where it should go on as it is.

    Args:
        sizes: numbers of workers that can do the task.
        size: of those that do it now.
        capacity: workers for which the cluster has room in all.
        busy: workers at work, these ones too.
        free: further workers for whom nobody holds the room.
    """
    better = size_for(sizes, min(capacity - (busy - size), size + free))
    return better if better is not None and better > size else None


def is_silent(sent: float | None, now: float, limit: float) -> bool:
    """Whether a worker counts as lost that was asked at `sent` and has not answered yet; times in seconds."""
    return sent is not None and now - sent > limit
