"""Decisions about lost and stuck workers, and the timer that ends a stuck worker.

The decisions need no cluster; executors act on them.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from time import monotonic

from datm_ray.runtime.executor import Event, Phase, Progress
from datm_ray.store.files.patience import end_within

LONGEST_DELAY = 60.0
"""Longest wait in seconds before another attempt at a task."""
STEPS_OF_PATIENCE = 20
"""Time limit for a worker's next event, in multiples of its longest step, within the bounds of `Patience`."""
MARGIN = 30.0
"""Seconds that a stuck worker has to end itself before the driver ends its process."""


@dataclass(frozen=True)
class History:
    """Record of one task's lost attempts so far."""

    losses: int = 0
    """Number of attempts that ended because a worker was lost."""
    without_progress: int = 0
    """Number of lost attempts since new work was last saved, including the attempt that saved it and was then lost."""
    furthest: int = 0
    """Highest `Progress.done` that any attempt has saved."""
    nodes: frozenset[str] = frozenset()
    """Ids of the nodes on which the attempts counted in `without_progress` were lost; unknown nodes are left out."""

    def after_loss(self, saved: int, nodes: Iterable[str] = ()) -> History:
        """History with one more lost attempt.

        Args:
            saved: highest `Progress.done` that the attempt has saved; 0 if none.
            nodes: ids of the nodes on which the attempt was lost; empty if they are unknown.
        """
        further = saved > self.furthest
        return dataclasses.replace(
            self,
            losses=self.losses + 1,
            without_progress=1 if further else self.without_progress + 1,
            furthest=max(saved, self.furthest),
            nodes=frozenset(nodes).union(() if further else self.nodes),
        )

    def forgiving(self) -> History:
        """Copy with empty `nodes`, so that the task may use all nodes again. Losses stay counted."""
        return dataclasses.replace(self, nodes=frozenset())

    def gives_up(self, retries: int) -> bool:
        """True if the task has lost its worker more than `retries` times without saving new work in between."""
        return self.without_progress > retries

    @property
    def delay(self) -> float:
        """Seconds to wait before the next attempt: 0, 5 and 25 after the first three losses without progress, then 60.

        So retries outlast a short outage.
        """
        return min(LONGEST_DELAY, 5.0 ** (self.without_progress - 1)) if self.without_progress > 1 else 0.0


def size_for(sizes: Sequence[int], free: int) -> int | None:
    """Largest number of workers, at most `free`, that can run a task; `None` if no number fits.

    Args:
        sizes: numbers of workers that can run the task.
        free: number of workers for which there are resources.
    """
    return max((size for size in sizes if size <= free), default=None)


@dataclass
class Patience:
    """Time limit in seconds for a worker's next event.

    Until the end of the worker's third timed step the limit is `longest`. Later it is 20 times its longest step, but at
    least `shortest` + `for_peers` and at most `longest`. During a `Phase`, such as a validation in several workers, it
    is `longest` again.
    """

    shortest: float = 0.0
    longest: float = 0.0
    steps: int = 0
    """Number of the worker's timed steps so far. The first step after a `Phase` is not timed."""
    slowest: float = 0.0
    """Duration of the longest timed step so far, in seconds."""
    is_phase: bool = False
    """True from a `Phase` to the next `Progress`. Durations of steps say nothing about the duration of a phase."""
    for_peers: float = 0.0
    """Seconds added to `shortest` for a worker that may wait for peers, so that it can report that it lost them."""

    def take(self, event: Event, seconds: float) -> None:
        """Update the limit after an event that came `seconds` after the event before it."""
        if isinstance(event, Progress) and not self.is_phase:  # else the seconds are of the phase too
            self.steps, self.slowest = self.steps + 1, max(self.slowest, seconds)
        self.is_phase = isinstance(event, Phase) or (self.is_phase and not isinstance(event, Progress))

    @property
    def limit(self) -> float:
        """Seconds without an event after which the worker counts as stuck."""
        if self.steps < 3 or self.is_phase:
            return self.longest
        return min(self.longest, max(self.shortest + self.for_peers, STEPS_OF_PATIENCE * self.slowest))


def patience_of(size: int, peer_timeout: float, progress_timeout: float) -> Patience:
    """Time limit for each event of a task of `size` workers: from `peer_timeout` to `progress_timeout` seconds.

    If `size` is above 1, the lower bound is `2 * MARGIN` seconds more. A worker waits for a hung peer for
    `peer_timeout`. It then reports that it lost its peers, before its own limit ends it. The worker that still runs is
    thus known as the one that hangs.
    """
    return Patience(peer_timeout, progress_timeout, for_peers=2 * MARGIN if size > 1 else 0.0)


def watched(events: Iterable[Event], patience: Patience, *, has_peers: bool = False) -> Iterator[Event]:
    """Pass on the events of this process's worker. If the next one is overdue, dump all stacks and end the process.

    The dump goes to standard error, which on Ray is the worker's log. The timer works without running Python code, so
    it also ends a process that is stuck in a system call or in a library. Requests to storage time out before the timer
    ends it, so that the worker can report their error.

    Args:
        patience: time limit for each event. Its field `shortest` is the time for which peers wait.
        has_peers: True if other workers wait for this one in sums. Requests to storage must then end within the time
            for which peers wait; otherwise within the limit for the next event.
    """
    least = min(patience.shortest, patience.longest)

    def set_deadline() -> None:
        faulthandler.dump_traceback_later(patience.limit, exit=True, file=sys.__stderr__ or sys.stderr)
        end_within(least if has_peers else patience.limit, least)

    last = monotonic()
    try:
        set_deadline()
        for event in events:
            now = monotonic()
            patience.take(event, now - last)
            last = now
            yield event
            set_deadline()
    finally:
        faulthandler.cancel_dump_traceback_later()
        end_within()
