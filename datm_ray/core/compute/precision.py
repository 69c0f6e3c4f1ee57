"""Rounding of products on GPUs.

TF32 rounds the factors of float32 products to 10 bits, and is several times as fast. The published results used TF32,
which was torch's default then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["float32", "tf32", "bfloat16"]
"""Precision of a student step. "tf32" rounds the factors of products; "bfloat16" is used for layers and their
derivatives, with sums in float32."""


def has_tf32(device: torch.device) -> bool:
    """True if the device can compute products in TF32: NVIDIA's GPUs from Ampere on, so neither V100 nor T4."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8


@contextmanager
def tf32_products(allowed: bool, device: torch.device) -> Iterator[None]:
    """Allow or forbid TF32 on a GPU within the context. By default torch allows TF32 in convolutions only."""
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
