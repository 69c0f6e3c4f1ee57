"""Storage formats of parameters: float32, float16, or bfloat16 as the 16 bits of a uint16.

A bfloat16 is the upper half of a float32; neither numpy nor Arrow has this type. Values are rounded to the nearest,
ties to even; nan stays nan. A finite value beyond the range of the format raises an error, because an expert with an
infinite parameter cannot be matched. Values too close to zero become subnormal or zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datm_ray.errors import StoreError

_ARROW_TYPES = {"float32": pa.float32(), "float16": pa.float16(), "bfloat16": pa.uint16()}
_WIDER = {"float16": "bfloat16 (the same range as float32) or float32", "bfloat16": "float32"}


def storage_type(storage: str) -> pa.DataType:
    """Arrow type of one value in the storage format `storage`. Raises ValueError if the format is unknown."""
    if storage not in _ARROW_TYPES:
        raise ValueError(f"{storage!r} is not a storage format; there are {', '.join(_ARROW_TYPES)}")
    return _ARROW_TYPES[storage]


def to_storage(values: NDArray[np.float32], storage: str) -> NDArray[Any]:
    """Convert a vector [p] to the format `storage`: float32 [p], float16 [p], or uint16 [p] for bfloat16.

    Raises:
        StoreError: a finite value is beyond the range of the storage format.
    """
    if storage == "float32":
        return values
    if storage == "float16":
        with np.errstate(over="ignore"):
            stored: NDArray[Any] = values.astype(np.float16)
        overflown = np.isinf(stored) & np.isfinite(values)
    else:
        stored = _upper_half(values)
        overflown = (stored & 0x7FFF == 0x7F80) & np.isfinite(values)
    if overflown.any():
        raise StoreError(
            f"A parameter of {values[overflown][0]:.3g} cannot be stored as {storage}",
            "It is beyond the largest value of that type, or the training diverged",
            f"Store the experts as {_WIDER[storage]}",
        )
    return stored


def from_storage(stored: NDArray[Any], storage: str) -> NDArray[np.float32]:
    """Convert a stored vector [p] back to float32 [p]. The result is a copy, which the caller may change."""
    if storage != "bfloat16":
        return stored.astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def _upper_half(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits [p] of the bfloat16 numbers nearest to the values [p], ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    half = bits >> 16
    rounded = (bits + 0x7FFF + (half & 1)) >> 16
    # A nan is not rounded, because a carry could change its exponent. The bit 0x40 keeps it from becoming infinity.
    return np.where(np.isnan(values), half | 0x40, rounded).astype(np.uint16)
