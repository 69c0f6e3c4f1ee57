"""Ranks: Ray actors that run one task together, on resources that Ray reserves for all of them at once.

Without such reservations, two groups might each hold half of their resources and wait for each other for ever.
benchmarks/LOG.md, 2026-11-29, explains why Ray Train is not used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from datm_ray.runtime.ray.cluster import bundle_of
from datm_ray.runtime.ray.pool import PoolWorker


class RankGroup:
    """Actors that run one task together; each has a number, its rank.

    Callers start the group once Ray has reserved its resources (`is_reserved`).
    """

    def __init__(self, size: int, options: Mapping[str, Any]) -> None:
        """Request the resources of a group from Ray, without waiting for them.

        Args:
            size: number of ranks.
            options: Ray's options of one rank's actor.
        """
        self.size, self.options = size, options
        self.is_placed = False
        """True if Ray has reserved the resources of all ranks, as last asked by `is_reserved`."""
        self.workers: list[PoolWorker] = []
        """Actors by rank; empty until the group is started."""
        self._placement, self._more = self._reserve(size), dict[PlacementGroup, int]()
        """_placement: resources of the ranks. _more: resources requested for further ranks -> number of these ranks."""

    def _reserve(self, size: int) -> PlacementGroup:
        labels = self.options.get("label_selector")
        selector = {"bundle_label_selector": [labels] * size} if labels else {}
        placement: PlacementGroup = placement_group([bundle_of(self.options)] * size, **selector)
        return placement

    def is_reserved(self) -> bool:
        """Ask Ray whether it has reserved the resources of all ranks, and return the answer."""
        self.is_placed = _is_placed(self._placement)
        return self.is_placed

    @property
    def possible(self) -> int:
        """Number of ranks that the group would have after a restart on all resources that Ray has reserved for it."""
        return self.size + sum(count for each, count in self._more.items() if _is_placed(each))

    def start(self, larger: Sequence[int] = ()) -> None:
        """Start the actors on the reserved resources, and request the resources of a larger group.

        Ranks of one node have consecutive numbers, and nodes with many ranks come first. So workers of the same
        networks (a row of the `Mesh`), which communicate most, are on as few nodes as possible.

        Args:
            larger: larger sizes of the group that the task can use, the smallest first. Resources are requested in
                steps from one size to the next, so that Ray reserves none for a size that the task cannot use. For size
                2 and `larger` (4, 8), Ray gets one request for 2 further ranks and one for 4.
        """
        nodes: dict[int, str] = placement_group_table(self._placement)["bundles_to_node_id"]
        count = Counter(nodes.values())
        bundles = sorted(nodes, key=lambda bundle: (-count[nodes[bundle]], nodes[bundle]))
        options = {name: value for name, value in self.options.items() if name != "label_selector"}
        for bundle in bundles:
            self.workers.append(PoolWorker.start(options, (self._placement, bundle)))
            self.workers[-1].node = nodes[bundle]
        steps = [after - before for before, after in pairwise((self.size, *larger))]
        self._more = {self._reserve(step): step for step in steps}

    def give_back(self) -> None:
        """Free the resources requested for further ranks, so that the group cannot grow. Its actors keep theirs."""
        while self._more:
            remove_placement_group(self._more.popitem()[0])

    def stop(self) -> None:
        """Kill the actors and free all resources."""
        for worker in self.workers:
            worker.stop()
        self.give_back()
        remove_placement_group(self._placement)


def _is_placed(placement: PlacementGroup) -> bool:
    # placement.wait(0) would return False whenever the answer takes time, even if the resources are reserved.
    return bool(placement_group_table(placement).get("state") == "CREATED")
