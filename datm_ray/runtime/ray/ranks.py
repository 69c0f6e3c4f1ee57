"""Ranks: Ray actors that run one task together, on resources that Ray reserves for all of them at once.

Otherwise two groups might each hold half of their resources and wait for each other for ever. benchmarks/LOG.md,
2026-11-29, explains why Ray Train is not used.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from datm_ray.runtime.ray.cluster import bundle_of
from datm_ray.runtime.ray.pool import PoolWorker, labels_without


class RankGroup:
    """Group of ranks. Callers start the group once Ray has reserved its resources (`is_placed`)."""

    def __init__(self, size: int, wanted: int, options: Mapping[str, Any], avoided: set[str]) -> None:
        """Request the resources of a group from Ray, without waiting for them.

        Args:
            size: number of ranks.
            wanted: number of ranks that the task can use; resources beyond `size` are requested one by one.
            options: Ray's options of one rank's actor.
            avoided: nodes on which no rank may run.
        """
        self.size, self.requested_at, self.avoids = size, time.monotonic(), bool(avoided)
        self.memory = int(options.get("memory", 0))
        """Bytes of main memory that Ray reserves for each rank."""
        self.workers: list[PoolWorker] = []
        """Actors by rank; empty until the group is started."""
        labels = labels_without(options, avoided)
        self._selector = [labels] if labels else []
        self._options = {name: value for name, value in options.items() if name != "label_selector"}
        self._placement = self._reserve(size)
        self._more = [self._reserve(1) for _ in range(wanted - size)]

    def _reserve(self, size: int) -> PlacementGroup:
        labels = {"bundle_label_selector": self._selector * size} if self._selector else {}
        placement: PlacementGroup = placement_group([bundle_of(self._options)] * size, **labels)
        return placement

    @property
    def is_placed(self) -> bool:
        """True if Ray has reserved the resources of all ranks."""
        return _is_placed(self._placement)

    @property
    def possible(self) -> int:
        """Number of ranks, up to `wanted`, for which Ray has reserved resources."""
        return self.size + sum(map(_is_placed, self._more))

    def start(self) -> None:
        """Start the actors on the reserved resources."""
        self.workers = [PoolWorker.start(self._options, (self._placement, rank)) for rank in range(self.size)]

    def stop(self) -> None:
        """Kill the actors and free all resources."""
        for worker in self.workers:
            worker.stop()
        for placement in (self._placement, *self._more):
            remove_placement_group(placement)


def _is_placed(placement: PlacementGroup) -> bool:
    # placement.wait(0) would return False whenever the answer takes time, even if the resources are reserved.
    return bool(placement_group_table(placement).get("state") == "CREATED")
