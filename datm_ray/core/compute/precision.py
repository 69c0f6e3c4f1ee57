"""Rounding of products on GPUs.

TF32 rounds the factors of float32 products to mantissas of 10 bits, and is several times as fast as float32. The
published results used TF32, because TF32 was torch's default at the time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["float32", "tf32", "bfloat16"]
"""Precision of products. "float32" rounds as usual. "tf32" rounds the factors of products to mantissas of 10 bits on
GPUs that have TF32; elsewhere it means "float32". "bfloat16" computes layers and their derivatives in bfloat16, and
adds products up in float32."""


def has_tf32(device: torch.device) -> bool:
    """True if the device can compute products in TF32: NVIDIA's GPUs from Ampere on, so neither V100 nor T4."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 8


@contextmanager
def restoring_tf32() -> Iterator[None]:
    """Context at whose end torch's switches for TF32 and other products of less precision have their former values.

    torch has older switches (`allow_tf32`) and newer ones (`fp32_precision`). Both are restored, but only the newer
    ones if the two contradict each other. A newer switch that takes its value from a more general one is restored to
    that state, which torch calls "none".
    """
    matmul: Any = torch.backends.cuda.matmul  # torch's types lack the newer switches
    cudnn: Any = torch.backends.cudnn
    newer, former = (matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision), _former_switches()
    try:
        yield
    finally:
        if former is not None:
            matmul.allow_tf32, cudnn.allow_tf32, precision = former
            if _former_switches() != former:  # "medium", or a switch of CPUs, which a GPU's switch does not change
                torch.set_float32_matmul_precision(precision)
        matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = newer


def _former_switches() -> tuple[bool, bool, str] | None:
    """Values of torch's older switches; `None` if they contradict the newer switches.

    The values are: True if TF32 is allowed in matrix products, True if in cuDNN, and the precision of float32 matrix
    products, such as "highest".
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 asks for the newer switches
        try:
            products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
            return products, convolutions, torch.get_float32_matmul_precision()
        except RuntimeError:
            return None


@contextmanager
def tf32_products(allowed: bool, device: torch.device) -> Iterator[None]:
    """Context in which matrix products and convolutions on a GPU may use TF32 if `allowed`, and may not otherwise.

    Afterwards torch's former settings hold again; by default they allow TF32 in convolutions only. For a device that is
    no GPU, nothing changes.
    """
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
