"""Bytes and floating-point operations of one image's forward pass through a network, counted call by call.

For small images the pass is computed. For larger images it runs on torch's meta device, which only tracks shapes. The
meta device's first use takes seconds, because it loads torch's compiler.
Tests: tests/core/networks/test_image_cost.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from datm_ray.core.compute.torch_compat import storage_id

_IMAGES = 2
"""Number of images in the forward pass whose cost is counted. Not 1, because the memory order of a batch of one image
is not defined."""
_COMPUTED = 3 * 256 * 256
"""Largest size (channels x height x width, inclusive) of an image whose forward pass is computed. The cost of larger
images is counted on the meta device."""


@dataclass(frozen=True)
class ImageCost:
    """Cost of one image's forward pass through a network, in evaluation mode and float32."""

    maps: int
    """Bytes per image that torch functions write in the forward pass, in total. Views write nothing."""
    largest: int
    """Bytes per image of the largest tensor in the forward pass: the image, or a written result."""
    flop: int
    """Floating-point operations per image in convolutions and matrix products, at least 1. A multiply-add is two."""
    functions: int
    """Number of calls of torch functions that write a result, in one forward pass of any number of images."""
    parameters: int
    """Number of parameters of the network."""


def image_cost(network: nn.Module, image: tuple[int, ...]) -> ImageCost:
    """Count the cost of one image in a network, which is left as it is.

    Args:
        network: network on any device; a copy of it is run.
        image: shape (c, h, w) of an image, or the shape of another input.
    """
    device = "cpu" if math.prod(image) <= _COMPUTED else "meta"
    network = copy.deepcopy(network).to(device, torch.float32).eval()
    images = torch.zeros(_IMAGES, *image, device=device)
    with torch.no_grad(), _Counter() as counted:
        network(images)
    return ImageCost(
        maps=sum(counted.sizes) // _IMAGES,
        largest=max(images.nbytes, *counted.sizes) // _IMAGES,
        flop=max(1, counted.flop // _IMAGES),
        functions=len(counted.sizes),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
    )


class _Counter(TorchFunctionMode):
    """Context that records the bytes of each result that torch functions write, and the sum of their operations."""

    def __init__(self) -> None:
        self.sizes, self.flop = list[int](), 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        named = kwargs or {}
        result = func(*args, **named)
        read = [each for each in (*args, *named.values()) if isinstance(each, Tensor)]
        if isinstance(result, Tensor) and storage_id(result) not in map(storage_id, read):
            self.sizes.append(result.nbytes)
            if name in ("linear", "matmul", "__matmul__"):
                self.flop += 2 * result.numel() * read[0].shape[-1]
            elif "conv" in name:
                self.flop += 2 * result.numel() * read[1][0].numel()
        return result
