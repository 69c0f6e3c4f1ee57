"""Tests the rounding of parameters against torch's own conversions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datm_ray.errors import StoreError
from datm_ray.store.precision import from_storage, storage_type, to_storage

TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def patterns() -> np.ndarray:
    """Float32 values of all exponents: random bits, ties and their neighbours, zeros, subnormals, infinities, nan."""
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (bits[:50_000] & 0xFFFF0000) | 0x8000
    special = np.array([0, 0x80000000, 1, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF], np.uint32)
    return np.concatenate([bits, ties, ties - 1, ties + 1, special]).view(np.float32)


@pytest.mark.parametrize("storage", TORCH)
def test_rounding_is_that_of_torch(storage):
    """Rounding equals torch's: to nearest, ties to even; infinities and nan stay."""
    values = patterns()
    expected = torch.from_numpy(values).to(TORCH[storage]).float().numpy()
    fits = np.isfinite(expected) | ~np.isfinite(values)
    np.testing.assert_array_equal(from_storage(to_storage(values[fits], storage), storage), expected[fits])
    assert fits.sum() > 100_000


@pytest.mark.parametrize("storage", ["float32", *TORCH])
def test_what_can_be_stored_comes_back_and_belongs_to_the_caller(storage):
    """A value with few digits survives every storage; writing into it does not change the stored one."""
    values = np.array([0.5, -1.25, 0.0, np.nan, np.inf], np.float32)
    stored = to_storage(values, storage)
    found = from_storage(stored, storage)
    np.testing.assert_array_equal(found, values)
    found[:] = 7
    np.testing.assert_array_equal(from_storage(stored, storage), values)


@pytest.mark.parametrize(
    ("storage", "value", "remedy"),
    [("float16", 65520.0, "bfloat16"), ("float16", -1e30, "bfloat16"), ("bfloat16", 3.4e38, "float32")],
)
def test_overflow_is_refused(storage, value, remedy):
    """The first value that would round to infinity is an error that names a storage that can hold it."""
    with pytest.raises(StoreError, match=f"cannot be stored as {storage}.* Store the experts as .*{remedy}"):
        to_storage(np.array([1.0, value], np.float32), storage)


def test_the_largest_float16_is_stored():
    """65504, the largest float16, is stored."""
    assert from_storage(to_storage(np.array([65504.0], np.float32), "float16"), "float16")[0] == 65504.0


def test_an_unknown_storage_is_named():
    """An unknown storage is an error that lists the known ones."""
    with pytest.raises(ValueError, match="'float8' is not a storage format; there are float32, float16, bfloat16"):
        storage_type("float8")
