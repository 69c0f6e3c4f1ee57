"""How many networks of a stack a GPU computes in one call, found by a short trial.

Side by side, the networks share every kernel, as groups of one convolution. One after another, each network has kernels
of its own, which libraries compute faster, and a CUDA graph launches these kernels together. Which way is faster
depends on the GPU and the network. Both ways give the same values up to rounding. Tests:
tests/core/networks/test_stack_trial.py.
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
"""Number of timed calls of each candidate. The candidates are called in turn, and each one's fastest call counts."""


class OneByOne:
    """Function of a stack's networks that computes one network after another, each by the same CUDA graph.

    Attributes:
        note: see `StackFunctions`.
        fills_up: always True, because a recorded graph takes batches of one size only.
    """

    fills_up = True

    def __init__(self, single: StackFunctions) -> None:
        """Store the function of a single network. The first call records its graph.

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
    """Time several functions that do the same work. Returns the key of the fastest one.

    The first call of each function is not timed, since it compiles and records. A function that runs out of GPU memory
    is left out.

    Args:
        ways: key -> function.
        now: function that waits until the device is idle, and returns the time in seconds.

    Raises:
        torch.OutOfMemoryError: every function runs out of GPU memory.
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
