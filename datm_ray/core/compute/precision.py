"""Rounding of products on GPUs.

TF32 rounds the factors of float32 products to 10 bits, and is several times as fast as float32. The published results
used TF32, because TF32 was torch's default at the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["float32", "tf32", "bfloat16"]
"""Precision of a student step. "tf32" rounds the factors of products to 10 bits. "bfloat16" computes layers and their
derivatives in bfloat16, and sums in float32."""


def has_tf32(device: torch.device) -> bool:
    """True if the device can compute products in TF32: NVIDIA's GPUs from Ampere on, so neither V100 nor T4."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8


@contextmanager
def tf32_products(allowed: bool, device: torch.device) -> Iterator[None]:
    """Allow or forbid TF32 within the context, on GPUs only. By default torch allows TF32 in convolutions only."""
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
