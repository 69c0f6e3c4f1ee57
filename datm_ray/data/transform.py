"""From pixels in [0, 1] to what networks are trained on, and back.

Two kinds. `zca` is the whitening that published distillation results use: W = U diag(1/sqrt(S + eps)) U^T,
with U S U^T the unbiased covariance of the training images in [0, 1], and whitened = (x - mean) W (the
formula of kornia's ZCAWhitening with eps = 0.1). `standard` subtracts each channel's mean and divides by its
standard deviation.

The statistics are exact: pixels are integers, so their sums and products are too, and they are accumulated
without any rounding. Hence the fingerprint, taken from those sums, is the same on every machine, although the
last bits of W depend on the linear algebra library. Augmentation and clipping are left out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from datm_ray.errors import CorruptFileError, DatasetError

Kind = Literal["zca", "standard"]
Floats = NDArray[np.float32]
AnyFloats = NDArray[np.floating[Any]]

PUBLISHED_EPS = 0.1
_CHUNK_BYTES = 1 << 26  # 64 MiB of temporaries while pixels are normalised
_CENTRE = 128  # subtracted from uint8 pixels, so that they lie in -128..127
_EXACT_ROWS = 1024  # float32 holds integers up to 2^24 exactly: 1024 products of at most 128 * 128


@dataclass(frozen=True, eq=False)
class Transform:
    """A fitted normalisation of images [n c h w] and its inverse."""

    kind: Kind
    shape: tuple[int, int, int]
    """Channels, height and width it was fitted on."""
    mean: Floats
    """[d], d = c * h * w, for `zca`; [c] for `standard`; in units of [0, 1] pixels."""
    matrix: Floats | None
    """The symmetric whitening matrix [d d]; None for `standard`."""
    std: Floats | None
    """[c]; None for `zca`."""
    fingerprint: str
    """16 hex digits over the kind, eps and the exact statistics of the images it was fitted on."""

    def apply(self, images: AnyFloats) -> Floats:
        """Images [n c h w] in [0, 1], normalised. Takes one array of the result's size and at most 64 MiB.

        Raises:
            DatasetError: the images have another shape than those the transform was fitted on.
        """
        if self.matrix is not None:
            return self._affine(images, -self.mean, self.matrix, None)
        return self._per_channel(images, np.reciprocal(self._std), -self.mean / self._std)

    def invert(self, images: AnyFloats) -> Floats:
        """Normalised images [n c h w] back in the space of [0, 1] pixels, not clipped to it.

        The first call for `zca` inverts the matrix, O(d^3) in float64; the inverse is kept.

        Raises:
            DatasetError: the images have another shape than those the transform was fitted on.
        """
        if self.matrix is not None:
            return self._affine(images, None, self._inverse, self.mean)
        return self._per_channel(images, self._std, self.mean)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Named arrays that, with `to_metadata`, are all there is to it."""
        named = {"mean": self.mean, "matrix": self.matrix, "std": self.std}
        return {name: array for name, array in named.items() if array is not None}

    def to_metadata(self) -> dict[str, Any]:
        """What goes with the arrays; strings, integers and lists only, so that JSON can hold it."""
        return {"kind": self.kind, "shape": list(self.shape), "fingerprint": self.fingerprint}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> Transform:
        """The transform that `to_arrays` and `to_metadata` were taken from.

        Raises:
            CorruptFileError: something is missing or of the wrong shape.
        """
        try:
            kind: Kind = metadata["kind"]
            channels, height, width = map(int, metadata["shape"])
            shape = (channels, height, width)
            expected = _array_shapes(kind, shape)
            found = {name: np.asarray(arrays[name], dtype=np.float32) for name in expected}
            fingerprint = str(metadata["fingerprint"])
        except (KeyError, TypeError, ValueError) as error:
            raise _unusable(f"{type(error).__name__}: {error}") from error
        for name, array in found.items():
            if array.shape != expected[name]:
                raise _unusable(f"{name} has shape {array.shape}, not {expected[name]}")
        return cls(kind, shape, found["mean"], found.get("matrix"), found.get("std"), fingerprint)

    @cached_property
    def _inverse(self) -> Floats:
        # Of the float32 matrix as stored, not of the one before rounding: this undoes what `apply` did.
        assert self.matrix is not None
        return np.linalg.inv(self.matrix.astype(np.float64)).astype(np.float32)

    @property
    def _std(self) -> Floats:
        assert self.std is not None
        return self.std

    def _affine(self, images: AnyFloats, before: Floats | None, matrix: Floats, after: Floats | None) -> Floats:
        """(x + before) @ matrix + after for each flattened image."""
        result = self._empty_like(images)
        width = math.prod(self.shape)
        flat = result.reshape(len(images), width)
        for rows in _chunks(len(images), 4 * width):
            chunk = images[rows].reshape(-1, width).astype(np.float32)
            if before is not None:
                chunk += before
            np.matmul(chunk, matrix, out=flat[rows])
            if after is not None:
                flat[rows] += after
        return result

    def _per_channel(self, images: AnyFloats, scale: Floats, shift: Floats) -> Floats:
        result = self._empty_like(images)
        np.multiply(images, scale[:, None, None], out=result)
        result += shift[:, None, None]
        return result

    def _empty_like(self, images: AnyFloats) -> Floats:
        if images.shape[1:] != self.shape:
            raise DatasetError(
                f"images of shape {images.shape[1:]} meet a {self.kind} transform fitted on {self.shape}",
                "They come from another data set, or were resized differently",
                "Use the transform that was stored with these images",
            )
        return np.empty(images.shape, dtype=np.float32)


def fit_transform(
    kind: Kind,
    images: NDArray[np.uint8],  # [n c h w]
    levels: int,
    *,
    eps: float = PUBLISHED_EPS,
    device: str = "cpu",
) -> Transform:
    """The normalisation of these training images, with x = images / levels.

    `zca` costs O(n d^2 + d^3) and at its peak about 5 d^2 float64 numbers: 0.4 GB for 32x32 RGB, 6 GB for
    64x64. `device` is where torch decomposes the covariance: half a minute on two cores for 32x32 RGB, 64 times
    that for 64x64, which is worth a GPU. A channel without any variation is only centred by `standard`.

    Raises:
        DatasetError: the kind is unknown, eps is not positive, or there are fewer than two images.
    """
    if kind not in ("zca", "standard"):
        raise DatasetError(f"unknown normalisation {kind!r}", remedy="Use 'zca' or 'standard'")
    if len(images) < 2:
        raise DatasetError(
            f"a set of {len(images)} image(s) is too small to fit a {kind} transform", remedy="Use two or more"
        )
    return _fit_zca(images, levels, eps, device) if kind == "zca" else _fit_standard(images, levels)


def _fit_zca(images: NDArray[np.uint8], levels: int, eps: float, device: str) -> Transform:
    if not eps > 0:
        raise DatasetError(
            f"the setting eps={eps} of the zca transform is not positive",
            "Some directions of the pixel space have no variance at all",
            f"Set it to {PUBLISHED_EPS}, the published value",
        )
    sums = _exact_sums(images)
    covariance = _covariance(sums, levels)
    fingerprint = _digest("zca", images.shape[1:], levels, eps, sums.count, sums.total, covariance)
    return Transform(
        kind="zca",
        shape=_image_shape(images),
        mean=((sums.total / sums.count + _CENTRE) / levels).astype(np.float32),
        matrix=_whitening(covariance, eps, device),
        std=None,
        fingerprint=fingerprint,
    )


@dataclass(frozen=True, eq=False)
class _Sums:
    count: int
    total: NDArray[np.float64]  # [d], of pixels - _CENTRE
    products: NDArray[np.float64]  # [d d], likewise


def _exact_sums(images: NDArray[np.uint8]) -> _Sums:
    """Sums over images of each pixel and of each product of two, free of rounding.

    A chunk's sums are integers that float32 holds exactly, and sums of chunks integers that float64 does:
    single precision speed, and the same bits whatever the order in which a library adds.
    """
    width = images[0].size
    total, products = np.zeros(width), np.zeros((width, width))
    for start in range(0, len(images), _EXACT_ROWS):
        chunk = images[start : start + _EXACT_ROWS].reshape(-1, width).astype(np.float32) - _CENTRE
        total += chunk.sum(axis=0, dtype=np.float64)
        products += chunk.T @ chunk
    return _Sums(len(images), total, products)


def _covariance(sums: _Sums, levels: int) -> NDArray[np.float64]:
    """Unbiased covariance [d d] of pixels / levels. Overwrites `sums.products`, which may take gigabytes."""
    covariance = sums.products
    covariance -= np.outer(sums.total, sums.total) / sums.count
    covariance /= (sums.count - 1) * levels**2
    return covariance


def _whitening(covariance: NDArray[np.float64], eps: float, device: str) -> Floats:
    values, vectors = _eigh(covariance, device)
    # Rounding makes the eigenvalues of directions without variance slightly negative.
    scaled = vectors / np.sqrt(np.maximum(values, 0) + eps)
    matrix: Floats = (scaled @ vectors.T).astype(np.float32)
    symmetric: Floats = np.maximum(matrix, matrix.T)  # only rounding makes the two differ
    return symmetric


def _eigh(covariance: NDArray[np.float64], device: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if device == "cpu":  # numpy's took half as long as torch's
        values, vectors = np.linalg.eigh(covariance)
        return values, vectors
    import torch

    on_device = torch.linalg.eigh(torch.from_numpy(covariance).to(device))
    return on_device.eigenvalues.cpu().numpy(), on_device.eigenvectors.cpu().numpy()


def _fit_standard(images: NDArray[np.uint8], levels: int) -> Transform:
    total, squares = _channel_sums(images)
    count = images[:, 0].size
    mean = total / count
    std = np.sqrt(squares / count - mean**2) / levels
    return Transform(
        kind="standard",
        shape=_image_shape(images),
        mean=(mean / levels).astype(np.float32),
        matrix=None,
        std=np.where(std > 0, std, 1).astype(np.float32),
        fingerprint=_digest("standard", images.shape[1:], levels, count, total, squares),
    )


def _channel_sums(images: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sums [c] and sums of squares [c] over all pixels of a channel, as integers."""
    total, squares = (np.zeros(images.shape[1], dtype=np.int64) for _ in range(2))
    for rows in _chunks(len(images), 8 * images[0].size):
        chunk = images[rows].astype(np.int64)
        total += chunk.sum(axis=(0, 2, 3))
        squares += (chunk**2).sum(axis=(0, 2, 3))
    return total, squares


def _chunks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // max(1, bytes_per_row))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _image_shape(images: NDArray[np.uint8]) -> tuple[int, int, int]:
    return images.shape[1], images.shape[2], images.shape[3]


def _array_shapes(kind: Kind, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    channels, height, width = shape
    pixels = channels * height * width
    known: dict[str, dict[str, tuple[int, ...]]] = {
        "zca": {"mean": (pixels,), "matrix": (pixels, pixels)},
        "standard": {"mean": (channels,), "std": (channels,)},
    }
    return known[kind]


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else f"{part};".encode())
    return digest.hexdigest()[:16]


def _unusable(detail: str) -> CorruptFileError:
    return CorruptFileError(
        f"the stored transform is unusable ({detail})",
        "The file was altered or written by another program",
        "Restore the file or prepare the data set again",
    )
