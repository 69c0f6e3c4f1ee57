"""Transforms from pixels in [0, 1] to normalised images for networks, and back.

There are two kinds. `zca` is the whitening that published distillation results use: W = U diag(1/sqrt(S + eps)) U^T. U
S U^T is the unbiased covariance of the training images in [0, 1], and whitened = (x - mean) W (the formula of kornia's
ZCAWhitening with eps = 0.1). `standard` subtracts each channel's mean and divides by its standard deviation.

A transform keeps U (in float32) and S. Both directions follow from U and S without inverting a matrix: W is composed at
its first use, in float64, and the inverse is two products with U. On CIFAR-10, U in float32 changes W by 1.4e-7 and
whitened images by at most 3e-6. A float32 product with the exact W changes them as much.

If there are fewer images n than values d in an image, the images span only r < n directions. In all other directions W
multiplies by 1/sqrt(eps). Then U is [d r], from the eigenvectors of an [n n] matrix, and W is applied as I/sqrt(eps) -
F F^T without being composed.

The statistics are exact: pixels are integers, and their sums and products are accumulated without rounding. So the
fingerprint, computed from those sums, is equal on every machine, although the last bits of U depend on the linear
algebra library. Not covered: augmentation and clipping.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from datm_ray.data.patience import Lines, Matrix, Say, eigenpairs, silent, slabs
from datm_ray.data.reading.decode import pixels_of
from datm_ray.errors import CorruptFileError, DatasetError
from datm_ray.memory import available_memory
from datm_ray.words import counted, data_size, dimensions, duration

Kind = Literal["zca", "standard"]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Statistics = tuple[Sequence[float], Sequence[float]]
"""Means and standard deviations of the channels, for pixels in [0, 1]."""
AnyFloats = NDArray[np.floating[Any]]
Images = Tensor | AnyFloats | NDArray[np.uint8]
"""A batch [n c h w] or one image [c h w]: floats from 0 (black) to 1 (white), or uint8 from 0 to 255."""

_log = logging.getLogger(__name__)
PUBLISHED_EPS = 0.1
_TOO_LARGE = 2**20  # exclusive bound of a side in pixels that a file may state
_SMALLEST_DEVIATION = 1e-30  # smallest standard deviation that a file may state; float32 holds any pixel divided by it
_CHUNK_BYTES = 1 << 26  # 64 MiB of temporaries while pixels are normalised
_CPU = torch.device("cpu")
_CENTRE = 128  # subtracted from uint8 pixels, so that they lie in -128..127
_EIGEN_SECONDS = 2e-10  # seconds / n^3 for eigenvectors of [n n] in float64 on two cores; one core: 2.6e-10 to 3.1e-10
_PRODUCT_SECONDS = 1.5e-11  # seconds per multiplication of a float32 matrix product on two cores; one core: 2.3e-11
_WORTH_A_LINE = 0.1  # minutes; a fit that takes longer is announced
_EXACT_ROWS = 1024  # images at a time: 1024 products of at most 128 * 128 add up to 2^24, exact in float32


class Normaliser(nn.Module):
    """Module that normalises images in [0, 1] as networks trained under a transform expect them.

    Use the module as a layer before a network, or as a torchvision transform: by itself, as in `ImageFolder(path,
    transform=normaliser, loader=PIL.Image.open)`, or as a step of a `Compose`. `.to(device)` moves it, and tensors must
    be on its device. `PIL.Image.open` as loader keeps images of 16 bits; torchvision's own loader makes them white.

    PIL images are turned, converted and resized in the same way as images of a data set. The result has the dtype of
    the module's buffers: float32 unless the module is converted. Images of another float dtype are cast to it; uint8
    images are cast and divided by 255. Autocast does not lower the precision. Gradients flow through. A call takes at
    most 64 MiB besides the result, for any number of images.
    """

    scale: Tensor
    """For `zca`: the whitening matrix [d d] with d = c * h * w or, if `rest` is a number b, the factor F [d r] of the
    matrix b I - F F^T. For `standard`: reciprocal deviations [c]."""
    shift: Tensor
    """Shift [d] added before the product for `zca`; [c] added after it for `standard`."""

    def __init__(
        self, kind: Kind, shape: tuple[int, int, int], scale: Tensor, shift: Tensor, rest: float | None = None
    ) -> None:
        """Make a module from its buffers, see the attributes `scale` and `shift`.

        Args:
            kind: "zca" or "standard".
            shape: channels, height and width of the images.
            rest: number b if the whitening matrix is b I - F F^T with F in `scale`; otherwise `None`.
        """
        super().__init__()
        self.kind, self.shape, self.rest = kind, shape, rest
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: Images | Image.Image) -> Tensor:
        """Normalise images, which keep their shape, or one PIL image, which is resized to the transform's shape.

        Raises:
            DatasetError: the images have another shape than those the transform was fitted on.
            TypeError: the images are integers other than uint8.
        """
        if isinstance(images, Image.Image):
            images = torch.from_numpy(pixels_of(images, self.shape).copy()).to(self.scale.device)
        return _map_chunks(self._one_chunk, images, self.kind, self.shape, self.scale.dtype)

    def extra_repr(self) -> str:
        return f"{self.kind}, shape={self.shape}"

    def _one_chunk(self, images: Tensor) -> Tensor:
        if self.kind == "zca":
            centred = images.flatten(1) + self.shift
            product = centred @ self.scale
            white = product if self.rest is None else self.rest * centred - product @ self.scale.T
            return white.reshape(images.shape)
        return images * self.scale[:, None, None] + self.shift[:, None, None]


@dataclass(frozen=True, eq=False)
class Transform:
    """Fitted normalisation of images [n c h w], and its inverse. Cached results are not pickled."""

    kind: Kind
    shape: tuple[int, int, int]
    """Channels, height and width of the images that the transform was fitted on."""
    mean: Floats
    """Mean [d], d = c * h * w, for `zca`; [c] for `standard`; in units of [0, 1] pixels."""
    fingerprint: str
    """16 hex digits that depend on the kind, `eps` (for `zca`) and exact statistics of the images that were fitted.

    If the statistics were given, the digits depend on them and the image shape."""
    std: Floats | None = None
    """Standard deviations [c] for `standard`; `None` for `zca`."""
    vectors: Floats | None = None
    """Eigenvectors of the covariance, as columns [d r]; `None` for `standard` and if `stored_matrix` is given.

    r is d, or the number of directions in which the images differ, if there are fewer images than values."""
    values: Doubles | None = None
    """Eigenvalues [r] of the covariance, all >= 0; `None` if `vectors` is `None`."""
    eps: float = PUBLISHED_EPS
    """Number above 0 that is added to every eigenvalue before whitening; unused if `vectors` is `None`."""
    stored_matrix: Floats | None = None
    """Whitening matrix [d d] from a file of an earlier version, which has no eigenvectors; otherwise `None`."""

    def normalise(self, images: Images) -> Tensor:
        """Normalise images, floats from 0 to 1 or uint8, to float32. Shape and device stay.

        The first call for `zca` composes the whitening matrix in O(d^3), unless there are fewer eigenvectors than
        values in an image. The matrix is kept.

        Raises:
            DatasetError: the images have another shape than those the transform was fitted on.
            TypeError: the images are integers other than uint8.
        """
        return self._normaliser(_device_of(images))(images)  # type: ignore[no-any-return]

    def denormalise(self, images: Tensor | AnyFloats) -> Tensor:
        """Map normalised images back to pixels in [0, 1], without clipping. Shape and device stay.

        Raises:
            DatasetError: the images have another shape than those the transform was fitted on.
            TypeError: the images are integers.
        """
        if not (images.is_floating_point() if isinstance(images, Tensor) else np.issubdtype(images.dtype, np.floating)):
            raise TypeError(f"normalised images are floats, not {images.dtype}")
        return _map_chunks(self._inverse(_device_of(images)), images, self.kind, self.shape, torch.float32)

    def apply(self, images: AnyFloats) -> Floats:
        """Normalise an array of floats from 0 to 1 as `normalise` does, and return a float32 array."""
        return self.normalise(images).numpy()

    def invert(self, images: AnyFloats) -> Floats:
        """Map an array of normalised images back to pixels as `denormalise` does, and return a float32 array."""
        return self.denormalise(images).numpy()

    def normaliser(self) -> Normaliser:
        """Make a module on the CPU that normalises as `normalise` does."""
        return copy.deepcopy(self._normaliser(_CPU))

    @cached_property
    def matrix(self) -> Floats:
        """Symmetric whitening matrix [d d] of `zca`. Raises AssertionError for `standard`, which has none."""
        if self.stored_matrix is not None:
            return self.stored_matrix
        if not self._spans_less:
            return self._composed()
        factor, rest = self._factor(inverse=False)
        composed: Floats = (rest * np.eye(len(factor)) - factor @ factor.T).astype(np.float32)
        return composed

    @cached_property
    def digest(self) -> str:
        """32 hex digits over all arrays and metadata: transforms with equal digests have equal bits."""
        arrays = [part for name, array in self.to_arrays().items() for part in (name, array.shape, array)]
        return _digest(json.dumps(self.to_metadata(), sort_keys=True), *arrays, digits=32)

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        return sum(array.nbytes for array in self.to_arrays().values())

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Named arrays of the transform. `from_arrays` restores it from these arrays and `to_metadata`."""
        named = {"mean": self.mean, "std": self.std, "vectors": self.vectors, "values": self.values}
        named["matrix"] = self.stored_matrix
        return {name: array for name, array in named.items() if array is not None}

    def to_metadata(self) -> dict[str, Any]:
        """Metadata of the transform: only strings, numbers and lists, so that JSON can hold it."""
        plain = {"kind": self.kind, "shape": list(self.shape), "fingerprint": self.fingerprint}
        return plain if self.vectors is None else plain | {"eps": self.eps}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any], place: str = "memory"
    ) -> Transform:
        """Restore a transform from `to_arrays` and `to_metadata` of this version or an earlier one.

        Args:
            place: name of the file or object that holds the arrays, for messages.

        Raises:
            CorruptFileError: an array or a metadata entry is missing, or has an impossible shape or value.
        """
        unusable = partial(_unusable, place)
        try:
            kind: Kind = metadata["kind"]
            channels, height, width = map(int, metadata["shape"])
            if not all(1 <= side < _TOO_LARGE for side in (channels, height, width)):
                raise ValueError(f"its images are {channels}x{height}x{width}")
            shape = (channels, height, width)
            rank = None if "matrix" in arrays else min(np.size(arrays.get("values", ())), math.prod(shape))
            expected = _array_shapes(kind, shape, rank)
            wide = {"values": np.float64}
            found: dict[str, Any] = {name: np.asarray(arrays[name], wide.get(name, np.float32)) for name in expected}
            fingerprint, eps = str(metadata["fingerprint"]), float(metadata.get("eps", PUBLISHED_EPS))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise unusable(f"{type(error).__name__}: {error}") from error
        for name, array in found.items():
            if array.shape != expected[name]:
                raise unusable(f"{name} has shape {array.shape}, not {expected[name]}")
            if not np.isfinite(array).all():
                raise unusable(f"{name} holds values that are not finite")
        if not 0 < eps < math.inf:
            raise unusable(f"eps is {eps}")
        if "values" in found and found["values"].min(initial=0) < 0:
            raise unusable("an eigenvalue is negative")
        if "vectors" in found and np.abs(found["vectors"]).max(initial=0) > 1.01:
            raise unusable("an eigenvector is longer than 1")
        smallest = (
            found["std"].min() if "std" in found else math.sqrt(found.get("values", np.ones(1)).min(initial=1) + eps)
        )
        if smallest < _SMALLEST_DEVIATION:
            raise unusable(f"a deviation is {smallest:.3g}")
        matrix = found.pop("matrix", None)
        return cls(kind, shape, fingerprint=fingerprint, eps=eps, stored_matrix=matrix, **found)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _normalisers(self) -> dict[torch.device, Normaliser]:
        return {}

    @cached_property
    def _inverses(self) -> dict[torch.device, Callable[[Tensor], Tensor]]:
        return {}

    def _normaliser(self, device: torch.device) -> Normaliser:
        """Normaliser for a device, made once. On the CPU it shares memory with this transform's arrays.

        Only for use inside this class: `normaliser()` gives other callers a copy, which they may change.
        """
        if device not in self._normalisers:
            rest, scale, shift = None, self.mean, -self.mean
            if self.kind == "standard":
                scale, shift = np.reciprocal(self._std), -self.mean / self._std
            elif self._spans_less:
                factor, rest = self._factor(inverse=False)
                scale = factor.astype(np.float32)
            else:
                scale = self.matrix
            made = Normaliser(self.kind, self.shape, _shared(scale).to(device), _shared(shift).to(device), rest)
            self._normalisers[device] = made
        return self._normalisers[device]

    def _composed(self) -> Floats:
        """Whitening matrix W = U diag(1 / sqrt(S + eps)) U^T, from eigenvectors U and eigenvalues S.

        Peak memory: U, W and a float64 copy of U.
        """
        assert self.vectors is not None
        wide = self.vectors.astype(np.float64)
        matrix = np.empty_like(self.vectors)
        for rows in _chunks(len(wide), 16 * len(wide)):
            matrix[rows] = (wide[rows] / self._deviations) @ wide.T
        del wide
        symmetric: Floats = np.maximum(matrix, matrix.T)  # only rounding makes the two differ
        return symmetric

    @property
    def _spans_less(self) -> bool:
        """True if there are fewer eigenvectors than values in an image."""
        return self.vectors is not None and self.vectors.shape[0] > self.vectors.shape[1]

    def _factor(self, *, inverse: bool) -> tuple[Matrix, float]:
        """F [d r] and b of the whitening matrix W = b I - F F^T; with `inverse`, those of W^-1 = b I + F F^T."""
        assert self.vectors is not None
        rest = math.sqrt(self.eps) if inverse else 1 / math.sqrt(self.eps)
        lengths = self._deviations - rest if inverse else rest - 1 / self._deviations
        return self.vectors.astype(np.float64) * np.sqrt(lengths), rest

    @property
    def _deviations(self) -> Doubles:
        assert self.values is not None
        deviations: Doubles = np.sqrt(self.values + self.eps)
        return deviations

    def _inverse(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Function from a chunk of normalised images to pixels in [0, 1], on `device`; made once for each device."""
        if device not in self._inverses:
            self._inverses[device] = self._made_inverse(device)
        return self._inverses[device]

    def _made_inverse(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        mean = _shared(self.mean).to(device)
        if self.kind == "standard":
            std = _shared(self._std).to(device)
            return lambda images: images * std[:, None, None] + mean[:, None, None]
        if self.stored_matrix is not None:
            inverse = _shared(self._inverse_of_stored).to(device)
            return lambda images: (images.flatten(1) @ inverse + mean).reshape(images.shape)
        if self._spans_less:
            wide, rest = self._factor(inverse=True)
            factor = _shared(wide.astype(np.float32)).to(device)

            def back(images: Tensor) -> Tensor:
                white = images.flatten(1)
                return (rest * white + (white @ factor) @ factor.T + mean).reshape(images.shape)

            return back
        assert self.vectors is not None
        vectors = _shared(self.vectors).to(device)
        deviations = torch.from_numpy(self._deviations.astype(np.float32)).to(device)
        return lambda images: ((images.flatten(1) @ vectors * deviations) @ vectors.T + mean).reshape(images.shape)

    @cached_property
    def _inverse_of_stored(self) -> Floats:
        # Inverse of the stored float32 matrix, which `normalise` uses, not of the matrix before rounding.
        assert self.stored_matrix is not None
        return np.linalg.inv(self.stored_matrix.astype(np.float64)).astype(np.float32)

    @property
    def _std(self) -> Floats:
        assert self.std is not None
        return self.std


def _map_chunks(
    function: Callable[[Tensor], Tensor], images: Images, kind: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> Tensor:
    """Apply `function` to the images in chunks, and join the results. Results have the shape of the images.

    Args:
        function: maps a chunk [m c h w] of type `dtype`. uint8 images are divided by 255 before.
        kind: kind of the transform, for messages.
        shape: channels, height and width of the images that the transform was fitted on.
        dtype: type of the result.
    """
    images = images if isinstance(images, Tensor) else _shared(images)
    if not images.is_floating_point() and images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}: give floats from 0 to 1, or uint8 from 0 to 255")
    batch = images if images.ndim == 4 else images[None]
    require_shape(tuple(batch.shape[1:]), kind, shape)
    result = torch.empty(batch.shape, dtype=dtype, device=batch.device)
    with _without_autocast(batch.device):
        for rows in _chunks(len(batch), 3 * dtype.itemsize * math.prod(shape)):
            chunk = batch[rows].to(dtype)
            result[rows] = function(chunk / 255 if images.dtype == torch.uint8 else chunk)
    return result if images.ndim == 4 else result[0]


def require_shape(found: Sequence[int], kind: str, shape: tuple[int, int, int]) -> None:
    """Raise a `DatasetError` if images of shape `found` are not of the shape that a transform was fitted on."""
    if tuple(found) != shape:
        raise DatasetError(
            f"images of shape {tuple(found)} meet a {kind} transform fitted on {shape}",
            "They come from another data set, or were resized differently",
            "Use the transform that was stored with these images",
        )


def _device_of(images: Images) -> torch.device:
    return images.device if isinstance(images, Tensor) else _CPU


def _without_autocast(device: torch.device) -> Any:
    """Context without autocast, whose three decimal digits are too few for whitened images."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _shared(array: NDArray[Any]) -> Tensor:
    """Tensor for reading only, which shares the array's memory if torch allows it."""
    plain = np.ascontiguousarray(array)
    with warnings.catch_warnings():  # arrays from Ray's object store, which torch cannot mark as read-only
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(plain)


@dataclass(frozen=True)
class FitCost:
    """Estimated memory, time and disk space for fitting a transform, without the memory of the images."""

    kind: Kind
    shape: tuple[int, int, int]
    """Channels, height and width of the images."""
    size: int = 0
    """Peak memory in bytes; 0 for `standard`, which takes almost nothing."""
    minutes: float = 0.0
    """Estimated minutes on two CPU cores; a GPU is faster. 0 for `standard`."""
    stored: int = 0
    """Size of the fitted transform on disk, in bytes."""

    @classmethod
    def of(cls, kind: Kind, shape: tuple[int, int, int], images: int) -> FitCost:
        """Estimate the cost of a fit.

        Let d be the number of values in an image. `zca` holds five matrices [d d] of float64 while it decomposes one of
        them. The decomposition takes time O(d^3), after a product of O(n d^2). With fewer images n than values, the
        five matrices are [n n], and three more are [n d], one of them of float32.

        Args:
            kind: "zca" or "standard".
            shape: channels, height and width of the images.
            images: number n of images; 0 if it is unknown, to assume more images than an image has values.
        """
        values = math.prod(shape)
        if kind == "standard":
            return cls(kind, shape, stored=8 * shape[0])
        if _is_smaller(images, values):
            seconds = _EIGEN_SECONDS * images**3 + 4 * _PRODUCT_SECONDS * images**2 * values  # two products, in float64
            size, rank = 40 * images**2 + 20 * images * values, images - 1
        else:
            seconds = _EIGEN_SECONDS * values**3 + _PRODUCT_SECONDS * images * values**2
            size, rank = 40 * values**2, values
        return cls(kind, shape, size, seconds / 60, 4 * values * (rank + 1) + 8 * rank)

    def __str__(self) -> str:
        size = f"{data_size(self.size)} of memory"
        if self.minutes < 1:
            return size
        return f"{size}, {data_size(self.stored)} of disk and about {duration(60 * self.minutes)} on two CPU cores"

    def require_memory(self) -> None:
        """Raise a `DatasetError` if fitting takes more memory than is free."""
        free = available_memory()
        if self.size > free:
            raise DatasetError(
                f"fitting zca to images of {dimensions(self.shape)} takes {self}, and {data_size(free)} is free",
                "Whitening has a row and a column for every value of an image",
                "Use --set dataset.normalisation=standard, or a smaller dataset.resize",
            )


def _is_smaller(images: int, values: int) -> bool:
    """True if the Gram matrix [n n] of the images is smaller than the covariance [d d]; False for 0 images."""
    return 0 < images < values


def fitted_elsewhere(name: str, images: str) -> str:
    """Text of a warning: a distilled set's transform was fitted on other images than the transform now in use.

    Args:
        name: name of the distilled set.
        images: images that the transform in use was fitted on, such as "these 100 images".
    """
    return (
        f"the transform of {name} was fitted on other images than {images}: real images are normalised a little "
        "differently than those that the set was made with"
    )


def fit_transform(
    kind: Kind,
    images: NDArray[np.uint8],  # images [n c h w]
    levels: int,
    *,
    given: Statistics | None = None,
    eps: float = PUBLISHED_EPS,
    device: str = "cpu",
    say: Say = silent,
) -> Transform:
    """Fit a normalisation to training images, whose pixels are images / levels.

    `zca` costs O(n d^2 + d^3), or O(n^2 d) with fewer images than values, see `FitCost`. Ctrl-C interrupts it at once.
    For `standard`, a channel without variation is only centred.

    Args:
        kind: "zca" or "standard".
        images: [n c h w] training images.
        levels: value of a pixel that means 1.0.
        given: means and standard deviations [c] for `standard`, in units of [0, 1] pixels, which are used as they are:
            `images` then gives only its shape. `None` computes them.
        eps: number above 0 that is added to every eigenvalue, for `zca`.
        device: torch device that decomposes the covariance; a GPU pays off from 64x64 RGB.
        say: shows a line for each part of a fit that takes more than some seconds, and one every 30 seconds.

    Raises:
        DatasetError: there are fewer than two images, or memory does not suffice; or the `given` numbers are not one
            per channel.
    """
    assert kind in get_args(Kind), kind
    assert eps > 0, eps
    if len(images) < 2:
        raise DatasetError(
            f"a set of {counted(len(images), 'image')} is too small to fit a {kind} transform", remedy="Use two or more"
        )
    if given is not None:
        return _given_standard(_image_shape(images), *given)
    cost = FitCost.of(kind, _image_shape(images), len(images))
    cost.require_memory()
    if kind == "standard":
        return _fit_standard(images, levels)
    shown = say if cost.minutes >= _WORTH_A_LINE else silent
    shown(f"fitting zca to {len(images):,} images of {dimensions(cost.shape)}: about {duration(60 * cost.minutes)}")
    return _fit_zca(images, levels, eps, device, shown)


def _fit_zca(images: NDArray[np.uint8], levels: int, eps: float, device: str, say: Say) -> Transform:
    count, values, note = len(images), images[0].size, Lines(say).note
    fitted, total = ("zca", images.shape[1:], levels, eps, count), _pixel_sums(images)
    if _is_smaller(count, values):
        say(f"zca: eigenvectors of a {count:,} x {count:,} matrix, as there are fewer images than values")
        pairs = _eigenpairs_of_few(images, total, levels, device, note)
        fingerprint = _digest(*fitted, total, *sorted(hashlib.sha256(image.tobytes()).digest() for image in images))
    else:
        say(f"zca: covariance of {values:,} x {values:,}")
        covariance = _covariance(images, total, levels, note)
        fingerprint = _digest(*fitted, total, covariance)
        say(f"zca: eigenvectors of the covariance, {values:,} x {values:,}")
        pairs = eigenpairs(covariance, note, device)
    return Transform(
        kind="zca",
        shape=_image_shape(images),
        mean=((total / count + _CENTRE) / levels).astype(np.float32),
        fingerprint=fingerprint,
        # Rounding makes the eigenvalues of directions without variance slightly negative.
        values=np.maximum(pairs[0], 0),
        vectors=pairs[1].astype(np.float32),
        eps=eps,
    )


def _covariance(images: NDArray[np.uint8], total: Doubles, levels: int, note: Say = silent) -> Matrix:
    """Unbiased covariance [d d] of pixels / levels. `total` is from `_pixel_sums`."""
    covariance = _exact_products(images, note)
    covariance -= np.outer(total, total) / len(images)
    covariance /= (len(images) - 1) * levels**2
    return covariance


def _exact_products(images: NDArray[np.uint8], note: Say = silent) -> Matrix:
    """Matrix product X^T X, [d d], without rounding. X [n d] holds all pixels, with `_CENTRE` subtracted from each.

    Sums within a chunk are integers that float32 holds exactly, and sums over chunks are integers that float64 holds
    exactly. So the speed is that of single precision, and the bits do not depend on a library's order of additions.
    """
    width = images[0].size
    products = np.zeros((width, width))
    for start in range(0, len(images), _EXACT_ROWS):
        chunk = images[start : start + _EXACT_ROWS].reshape(-1, width).astype(np.float32) - _CENTRE
        note(f"zca: covariance, {start:,} of {len(images):,} images")
        for columns in slabs(width, len(chunk) * width):
            products[columns] += chunk[:, columns].T @ chunk
    return products


def _pixel_sums(images: NDArray[np.uint8]) -> Doubles:
    """Sums [d] over the images of each pixel minus `_CENTRE`, without rounding."""
    sums: Doubles = images.sum(axis=0, dtype=np.float64).ravel() - _CENTRE * len(images)
    return sums


def _eigenpairs_of_few(
    images: NDArray[np.uint8], total: Doubles, levels: int, device: str, note: Say = silent
) -> tuple[Doubles, Matrix]:
    """Positive eigenvalues [r] and eigenvectors [d r] of the covariance, for fewer images n than values d in an image.

    They are computed from the Gram matrix [n n] of the images, which is smaller than the covariance [d d].

    Args:
        total: sums [d] that `_pixel_sums` returns.
    """
    count = len(images)
    centred = images.reshape(count, -1).astype(np.float64)
    centred -= total / count + _CENTRE
    centred /= levels * math.sqrt(count - 1)
    products, found = np.empty((count, count)), np.empty(centred.shape[::-1])
    for rows in slabs(count, centred.size):
        note(f"zca: products of {rows.start:,} of {count:,} images")
        products[rows] = centred[rows] @ centred.T
    values, vectors = eigenpairs(products, note, device)
    kept = values > count * np.finfo(np.float64).eps * values[-1]  # the rest is rounding
    values, vectors = values[kept], vectors[:, kept]
    for rows in slabs(len(found), vectors.size):
        note(f"zca: {rows.start:,} of {len(found):,} values of the eigenvectors")
        found[rows, : len(values)] = centred.T[rows] @ vectors / np.sqrt(values)
    return values, found[:, : len(values)]


def _fit_standard(images: NDArray[np.uint8], levels: int) -> Transform:
    # Sums over all pixels of a channel, as integers.
    total = images.sum(axis=(0, 2, 3), dtype=np.int64)
    squares = np.einsum("nchw,nchw->c", images, images, dtype=np.int64)
    count = images[:, 0].size
    mean = total / count
    std = np.sqrt(squares / count - mean**2) / levels
    return Transform(
        kind="standard",
        shape=_image_shape(images),
        mean=(mean / levels).astype(np.float32),
        fingerprint=_digest("standard", images.shape[1:], levels, count, total, squares),
        std=np.where(std > 0, std, 1).astype(np.float32),
    )


def _given_standard(shape: tuple[int, int, int], mean: Sequence[float], std: Sequence[float]) -> Transform:
    require_per_channel(mean, shape[0])
    arrays = np.array(mean, np.float32), np.array(std, np.float32)
    return Transform("standard", shape, arrays[0], _digest("given", shape, *arrays), std=arrays[1])


def require_per_channel(mean: Sequence[float], channels: int) -> None:
    """Raise a `DatasetError` unless there is one mean for each channel."""
    if len(mean) != channels:
        raise DatasetError(
            f"dataset.mean has {counted(len(mean), 'number')}, and the images have {counted(channels, 'channel')}",
            remedy="Give one mean and one std for each channel",
        )


def _chunks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    step = max(1, _CHUNK_BYTES // max(1, bytes_per_row))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _image_shape(images: NDArray[np.uint8]) -> tuple[int, int, int]:
    return images.shape[1], images.shape[2], images.shape[3]


def _array_shapes(kind: Kind, shape: tuple[int, int, int], rank: int | None) -> dict[str, tuple[int, ...]]:
    """Shapes of a transform's arrays by name. `rank`: number of eigenvectors; `None` if a matrix is stored instead."""
    channels, pixels = shape[0], math.prod(shape)
    whitening = {"matrix": (pixels, pixels)} if rank is None else {"vectors": (pixels, rank), "values": (rank,)}
    known: dict[str, dict[str, tuple[int, ...]]] = {
        "zca": {"mean": (pixels,), **whitening},
        "standard": {"mean": (channels,), "std": (channels,)},
    }
    return known[kind]


def _digest(*parts: Any, digits: int = 16) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else f"{part};".encode())
    return digest.hexdigest()[:digits]


def _unusable(place: str, detail: str) -> CorruptFileError:
    return CorruptFileError(
        f"the transform in {place} is unusable ({detail})",
        "The file was altered or written by another program",
        "Restore the file or prepare the data set again",
    )
