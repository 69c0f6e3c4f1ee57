"""Read ahead: fetch the next snapshots of a remote group while the current ones are in use.

    prefetcher = Prefetcher(group)
    prefetcher.announce(next_expert, next_epochs)
    start, target = prefetcher.read_params(expert, epochs)

The caller announces the snapshots that it will read next. Local files are not read ahead: they are memory-mapped, and
reading two snapshots takes milliseconds (see benchmarks/bench_store.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from datm_ray.store.trajectories import ExpertGroup

_Request = tuple[int, tuple[int, ...]]


class Prefetcher:
    """Reads announced snapshots in one background thread. For a single caller; not picklable, unlike its group.

    Holds at most `depth` announced requests, read or still being read. With p parameters, these take depth x epochs x
    4p bytes; a running read takes epochs x 4p bytes more.
    """

    def __init__(self, group: ExpertGroup, depth: int = 2) -> None:
        self._group, self._depth = group, depth
        self._announced: dict[_Request, Future[list[NDArray[np.float32]]]] = {}
        pays = depth > 0 and group.location.local_path is None
        self._thread = ThreadPoolExecutor(1, "prefetch") if pays else None

    def announce(self, expert: int, epochs: Sequence[int]) -> None:
        """Start to read snapshots in the background. Beyond `depth` announcements, the oldest one is dropped."""
        request = (expert, tuple(epochs))
        if self._thread is None or request in self._announced:
            return
        if len(self._announced) >= self._depth:
            self._announced.pop(next(iter(self._announced))).cancel()
        self._announced[request] = self._thread.submit(self._group.read_params, expert, epochs)

    def read_params(self, expert: int, epochs: Sequence[int]) -> list[NDArray[np.float32]]:
        """Parameters after each of `epochs`, read ahead if announced. Raises as `ExpertGroup.read_params` does."""
        announced = self._announced.pop((expert, tuple(epochs)), None)
        return self._group.read_params(expert, epochs) if announced is None else announced.result()

    def close(self) -> None:
        """Drop all announcements, and end the thread after its current read. Later announcements have no effect."""
        self._announced.clear()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
