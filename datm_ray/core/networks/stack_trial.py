"""How many networks of a stack (networks that are trained together) a GPU computes in one call, found by a short trial.

Side by side, the networks share every kernel, as groups of one convolution. One after another, each network has kernels
of its own, which libraries compute faster, and a CUDA graph launches these kernels together. Which way is faster
depends on the GPU and the network. A stack that does not fit into the GPU's memory is computed in parts. All ways give
the same values up to rounding. Tests: tests/core/networks/test_stack_trial.py.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from datm_ray.core.compute.cuda_graphs import Replayed
from datm_ray.core.compute.gpu import GPU_SHARE, free_gpu_memory
from datm_ray.core.networks.image_cost import ImageCost
from datm_ray.core.networks.stacked import StackFunctions, StackResults

TURNS = 3
"""Number of timed calls of each function that a trial compares. Functions take turns; their fastest calls count."""
KEPT_MAPS, KEPT_VECTORS = 2, 4
"""Assumed factors of a training step's peak memory on a GPU. The peak is KEPT_MAPS times the bytes that all layers
write in a forward pass, for feature maps and their gradients, plus KEPT_VECTORS times the bytes of the parameters of
the networks that are computed together. If they do not fit nevertheless, the trial halves their number."""
STATE_VECTORS = 4
"""Assumed number of vectors, each as long as all parameters of a stack (networks that are trained together), that
training holds while a call computes: momenta, their update, new parameters. Calls that compute fewer networks at a time
do not lower it."""


class InParts:
    """Function that computes losses and gradients of a stack (networks that are trained together) in parts.

    The networks are split into groups. One replay of a CUDA graph computes one group.

    Attributes:
        note: one line on why the function is not compiled although this was asked for; "" otherwise.
        fills_up: always True: callers must fill smaller batches up with images of weight 0, because a recorded graph
            takes batches of one size only.
    """

    fills_up = True

    def __init__(self, functions: StackFunctions, at_a_time: int = 1) -> None:
        """Store the function. The first group with each number of networks records a graph.

        Args:
            functions: computes one group. Its networks must have no batch statistics.
            at_a_time: number of networks in a group, at least 1. The last group may have fewer.
        """
        self.note, self._at_a_time = functions.note, at_a_time
        self._graphs = defaultdict[int, Replayed](partial(Replayed, functions))
        """Number of networks in a group -> the graph that computes the group."""

    def __call__(
        self, parameters: Tensor, buffers: Tensor, images: Tensor, labels: Tensor, weights: Tensor
    ) -> StackResults:
        """Compute losses [s], their gradients [s p], and the buffers [s q] of all s networks of the stack.

        Args:
            parameters: [s p] flat parameters of each network.
            buffers: [s q] flat buffers of each network.
            images: [s b c h w] images of each network.
            labels: [s b] int64 classes, or [s b k] probabilities.
            weights: [b] weights of the images in every network's loss.

        Raises:
            torch.OutOfMemoryError: a graph does not fit into the GPU's memory. No graph is kept then.
        """
        splits = (each.split(self._at_a_time) for each in (parameters, buffers, images, labels))
        try:
            found = [self._graphs[len(each[0])](*each, weights) for each in zip(*splits, strict=True)]
        except torch.OutOfMemoryError:
            self._graphs.clear()  # else the graph of another number of networks would keep its memory
            raise
        if len(found) == 1:
            whole: StackResults = found[0]
            return whole
        losses, gradients, after = (torch.cat(each) for each in zip(*found, strict=True))
        return losses, gradients, after


StackStep = StackFunctions | InParts
"""Function that computes losses and gradients of the networks of a stack (networks that are trained together)."""


def is_tried(device: torch.device) -> bool:
    """True for GPUs, where a trial finds how many networks of a stack a call computes. On CPUs a call computes all."""
    return device.type == "cuda"


def now_on(device: torch.device) -> float:
    """Wait until the device has finished all its work. Returns the time in seconds since an arbitrary start."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fitting(networks: int, rows: int, cost: ImageCost) -> int:
    """Estimate how many networks of a stack, at least 1, one call can compute in the GPU's free memory.

    The number of all networks is halved, rounded up, until the estimate fits into the share `GPU_SHARE` of free memory,
    beside `STATE_VECTORS` vectors as long as the parameters of the whole stack.

    Args:
        networks: number of networks of the whole stack.
        rows: number of images of each network in a step.
        cost: cost of an image in a network.
    """
    vector = 4 * cost.parameters
    needed = KEPT_MAPS * rows * cost.maps + KEPT_VECTORS * vector
    free = GPU_SHARE * free_gpu_memory() - STATE_VECTORS * networks * vector
    while networks > 1 and networks * needed > free:
        networks = _half(networks)
    return networks


def beside_state(call: Callable[[], Any], parameters: Tensor) -> Callable[[], Any]:
    """Wrap a trial's call so that it takes as much more memory as training needs beside such a call.

    The additional memory is of `STATE_VECTORS` vectors as long as all parameters. So the call fits only if training
    does.

    Args:
        call: computes a step of the whole stack.
        parameters: parameters [s p] of the whole stack.
    """

    def step() -> Any:
        state = torch.empty(STATE_VECTORS, *parameters.shape, dtype=parameters.dtype, device=parameters.device)
        result = call()
        del state
        return result

    return step


def found_at_a_time(
    step_of: Callable[[int], Callable[..., Any]], arguments: Sequence[Tensor], most: int, device: torch.device | None
) -> int:
    """Find how many networks of a stack (networks that are trained together) one call should compute.

    The number `most` is halved, rounded up, until a step fits into memory. Then a trial times this number against one
    network at a time, and the faster wins. Under deterministic algorithms nothing is timed, so that every run computes
    alike; the first number that fits is then the result.

    Args:
        step_of: function from a number n of networks to a function that computes a step of the whole stack, n networks
            at a time.
        arguments: arguments of a step, first the parameters [s p] of the whole stack.
        most: number of networks to begin with, at least 1.
        device: device that is timed; `None` to time nothing, and to return the first number that fits, or 1 untried.

    Raises:
        torch.OutOfMemoryError: one network at a time was timed, and does not fit.
    """

    def call_of(networks: int) -> Callable[[], Any]:
        return beside_state(partial(step_of(networks), *arguments), arguments[0])

    while most > 1 and not _fits(call_of(most)):
        most = _half(most)
    if device is None or torch.are_deterministic_algorithms_enabled():
        return most
    return fastest({each: call_of(each) for each in dict.fromkeys((most, 1))}, partial(now_on, device))


def _half(networks: int) -> int:
    return -(-networks // 2)


def fastest(ways: Mapping[int, Callable[[], Any]], now: Callable[[], float]) -> int:
    """Time several functions that do the same work. Returns the key of the fastest one.

    The first call of each function is not timed, since it compiles and records. A function whose first call runs out of
    GPU memory is left out.

    Args:
        ways: key, such as a number of networks -> function.
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
        return True
    except torch.OutOfMemoryError:
        pass  # the failed call's tensors live as long as its error
    torch.cuda.empty_cache()
    return False
