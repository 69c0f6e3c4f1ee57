"""Memory and operations that one image takes in a network, counted function by function in one forward pass.

Small images are computed, which is quicker than loading torch's compiler: its meta device does that, for seconds.
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

from datm_ray.core.torch_compat import storage_id

_IMAGES = 2
"""Images of the counted pass: a batch of one has no memory order."""
_COMPUTED = 3 * 256 * 256
"""Numbers of an image up to which the pass is computed; larger ones are counted on the meta device."""


@dataclass(frozen=True)
class ImageCost:
    """Forward pass of one image through a network in evaluation mode and float32."""

    maps: int
    """Bytes that all torch functions of one forward pass write; views write none."""
    largest: int
    """Bytes of the largest tensor among them and the image."""
    flop: int
    """Floating-point operations of convolutions and matrix products; a multiply-add is two. At least 1."""
    functions: int
    """Number of torch functions that write something."""
    parameters: int
    """Number of the network's parameters."""


def image_cost(network: nn.Module, image: tuple[int, int, int]) -> ImageCost:
    """Cost of one image [c h w] in the network."""
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
    """Notes what torch's functions write and compute while it is entered; views write nothing."""

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
