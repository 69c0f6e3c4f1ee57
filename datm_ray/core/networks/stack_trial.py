"""How many networks of a stack a GPU computes in one call, found by a short trial.

Side by side, the networks share every kernel, as groups of one convolution. One after another, each has the kernels of
a single network, which libraries compute faster, and a CUDA graph saves their launches. Which is faster depends on the
GPU and the network. Both give the same values up to rounding. Tests: tests/core/networks/test_stack_trial.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from datm_ray.core.compute.cuda_graphs import Replayed
from datm_ray.core.networks.stacked import StackFunctions, StackResults

TURNS = 3
"""Number of timed calls of each way, which take turns. The fastest call counts."""


class OneByOne:
    """Function of a stack's networks that computes one network after another, each by the same CUDA graph.

    Attributes:
        note: see `StackFunctions`.
        fills_up: always True, because a graph has one size of batch.
    """

    fills_up = True

    def __init__(self, single: StackFunctions) -> None:
        """Keep the function of a single network, whose first call records the graph.

        Args:
            single: function of one network without batch statistics.
        """
        self.note, self._single = single.note, Replayed(single)

    def __call__(
        self, parameters: Tensor, buffers: Tensor, images: Tensor, labels: Tensor, weights: Tensor
    ) -> StackResults:
        """Compute losses [s], gradients [s p] and buffers [s q], see `StackFunctions`."""
        splits = (each.split(1) for each in (parameters, buffers, images, labels))
        found = [self._single(*each, weights) for each in zip(*splits, strict=True)]
        losses, gradients, after = (torch.cat(each) for each in zip(*found, strict=True))
        return losses, gradients, after


def fastest(ways: Mapping[int, Callable[[], Any]], now: Callable[[], float]) -> int:
    """Key of the fastest of several calls. The first call of each is not timed, since it compiles and records.

    A way that does not fit into the GPU's memory is not taken.

    Args:
        ways: key -> call that does the same work in its own way.
        now: waits until the device is idle, and returns the time in seconds.

    Raises:
        torch.OutOfMemoryError: no way fits.
    """
    seconds = {key: math.inf for key, call in ways.items() if _fits(call)}
    if not seconds:
        raise torch.OutOfMemoryError("neither a stack of networks nor one network fits into the GPU's memory")
    for _ in range(TURNS):
        for key in seconds:
            began = now()
            ways[key]()
            seconds[key] = min(seconds[key], now() - began)
    return min(seconds, key=lambda key: seconds[key])


def _fits(call: Callable[[], Any]) -> bool:
    try:
        call()
    except torch.OutOfMemoryError:
        return False
    return True
