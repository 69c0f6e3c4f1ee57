"""Reading ahead: the next snapshots of a remote group are fetched while the present ones are in use.

    prefetcher = Prefetcher(group)
    prefetcher.announce(next_expert, next_epochs)
    start, target = prefetcher.read_params(expert, epochs)

What comes next is the caller's knowledge. Local files are not read ahead: they are mapped, and reading two snapshots
takes milliseconds (see benchmarks/bench_store.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from datm_ray.store.trajectories import ExpertGroup

_Request = tuple[int, tuple[int, ...]]


class Prefetcher:
    """Reads what was announced in one background thread. For one caller; not picklable, unlike its group.

    Holds at most `depth` announced requests, read or being read: depth x epochs x 4p bytes, once more while a request
    is being read.
    """

    def __init__(self, group: ExpertGroup, depth: int = 2) -> None:
        self._group, self._depth = group, depth
        self._announced: dict[_Request, Future[list[NDArray[np.float32]]]] = {}
        pays = depth > 0 and group.location.local_path is None
        self._thread = ThreadPoolExecutor(1, "prefetch") if pays else None

    def announce(self, expert: int, epochs: Sequence[int]) -> None:
        """Begin to read what will be asked for. Of more than `depth` announcements the oldest is forgotten."""
        request = (expert, tuple(epochs))
        if self._thread is None or request in self._announced:
            return
        if len(self._announced) >= self._depth:
            self._announced.pop(next(iter(self._announced))).cancel()
        self._announced[request] = self._thread.submit(self._group.read_params, expert, epochs)

    def read_params(self, expert: int, epochs: Sequence[int]) -> list[NDArray[np.float32]]:
        """Parameters of `epochs`, read ahead if announced. Raises what `ExpertGroup.read_params` raises."""
        announced = self._announced.pop((expert, tuple(epochs)), None)
        return self._group.read_params(expert, epochs) if announced is None else announced.result()

    def close(self) -> None:
        """Forget what was announced, and end the thread after the read it is at; from then on nothing is read ahead."""
        self._announced.clear()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
