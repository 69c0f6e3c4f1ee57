"""Rounding of products on GPUs.

TF32 rounds the factors of float32 products to 10 bits, and is several times as fast. The published numbers were made
with it, because it was torch's default then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["float32", "tf32", "bfloat16"]
"""Precision of a student step: bfloat16 computes layers and their derivatives in bfloat16, and sums in float32."""


@contextmanager
def tf32_products(allowed: bool, device: torch.device) -> Iterator[None]:
    """Allow or forbid TF32 in the block; torch itself allows it in convolutions by default."""
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
