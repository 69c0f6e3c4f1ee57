"""Encoded images to one uint8 array, in threads and without a second copy of the pixels.

All images of a data set get the same shape: one channel where every image is grayscale, RGB otherwise; the
common size, or a square of `resize` pixels (bilinear with antialiasing; the aspect ratio is not kept). Sizes are
read from the files' headers first, and what does not fit into memory is refused then. Each image is resized as soon
as it is decoded, so the images are never all in memory at their full size. JPEG files are decoded at their full size
too: Pillow's `draft` mode is faster, but the pixels differ. Left
out: EXIF rotation, which is not applied, transparency, which is dropped, and images of more than 8 bits a
channel, which are refused because halving their depth is a choice the user should make.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datm_ray.errors import DatasetError
from datm_ray.memory import available_memory

T = TypeVar("T")

PIXELS_FREE, PIXELS_PER_BYTE = 2**24, 100
"""An image may have 16 million pixels and 100 for each byte of its file besides: photographs have 1 to 10 a byte."""

_FORMATS = ("BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")  # Pillow knows some that start other programs
_BLOCK = 256  # images a thread takes at a time: few enough to balance the threads, enough to queue cheaply
_GRAY = frozenset({"1", "L"})
_DEEP = ("I", "F")  # first letters of Pillow's modes of 16 and 32 bits


@dataclass(frozen=True)
class Encoded:
    """Image files not yet decoded, and what they show."""

    labels: NDArray[np.int64]  # [n]
    open: Callable[[int], BinaryIO]
    """Opens the i-th file; called from several threads at once."""
    name: Callable[[int], str]
    """Names the i-th file in messages."""

    def __len__(self) -> int:
        return len(self.labels)


class _Header(NamedTuple):
    mode: str
    width: int
    height: int


def decode(sets: Sequence[Encoded], resize: int | None = None, copies: int = 1) -> list[NDArray[np.uint8]]:
    """Pixels [n c h w] of each set, with c, h and w common to all of them.

    Opens every file twice, for its header and for its pixels, so that the array can be allocated once.

    Args:
        resize: side in pixels of the squares that all images become; None keeps their size.
        copies: float32 copies of all pixels that the caller will make.

    Raises:
        DatasetError: a file is broken or too deep, sizes differ and `resize` is None, or memory does not suffice.
            The last two are raised before any image is decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_with_image` bounds the pixels
        headers = [_in_parallel(len(files), partial(_header, files)) for files in sets]
        shape = _common_shape(sets, headers, resize)
        require_memory(sum(map(len, sets)), shape, copies, f", such as {sets[0].name(0)},")
        return [_decode_set(files, shape) for files in sets]


def resize_images(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Images [n c h w], c in {1, 3}, resized to [n c side side]."""
    resized = np.empty((*images.shape[:2], side, side), dtype=np.uint8)

    def one(i: int) -> None:
        pixels = images[i, 0] if images.shape[1] == 1 else images[i].transpose(1, 2, 0)
        resized[i] = _pixels(Image.fromarray(np.ascontiguousarray(pixels)), resized.shape[1:])

    _in_parallel(len(images), one)
    return resized


_SIDES = (128, 64, 32, 16, 8)
"""Sizes that an error may suggest, in pixels."""


def require_memory(images: int, shape: tuple[int, int, int], copies: int, example: str = "") -> None:
    """Raise a `DatasetError` if so many images do not fit into the memory that is free.

    Counted are one byte for every value as it is read, and four for every value of each float32 copy.

    Args:
        shape: channels, height and width.
        copies: float32 copies of all of them: one where a single process does everything, two with Ray, whose object
            store has its own.
        example: names one of the images in the message.
    """
    free = available_memory()

    def needed(height: int, width: int) -> int:
        return images * shape[0] * height * width * (1 + 4 * copies)

    if needed(*shape[1:]) <= free:
        return
    side = next((side for side in _SIDES if side < min(shape[1:]) and needed(side, side) <= free), None)
    raise DatasetError(
        f"{images:,} images of {'x'.join(map(str, shape))}{example} need {_gib(needed(*shape[1:]))} of memory, and "
        f"{_gib(free)} is free",
        f"They are kept in memory as they are read and, as float32, {'twice' if copies > 1 else 'once'} more",
        f"Use --set dataset.resize={side}, which resizes each image as it is read"
        if side
        else "Use fewer images, or a smaller dataset.resize",
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _decode_set(files: Encoded, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    pixels = np.empty((len(files), *shape), dtype=np.uint8)

    def one(i: int) -> None:
        pixels[i] = _with_image(files, i, lambda image: _pixels(image, shape))

    _in_parallel(len(files), one)
    return pixels


def _header(files: Encoded, index: int) -> _Header:
    header = _with_image(files, index, lambda image: _Header(image.mode, *image.size))
    if header.mode.startswith(_DEEP):
        raise DatasetError(
            f"image {files.name(index)} has more than 8 bits a channel (mode {header.mode})",
            remedy="Convert it to an 8-bit image first",
        )
    return header


def _with_image(files: Encoded, index: int, use: Callable[[Image.Image], T]) -> T:
    try:
        with files.open(index) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            with Image.open(file, formats=_formats()) as image:
                if math.prod(image.size) > PIXELS_FREE + PIXELS_PER_BYTE * size:
                    raise DatasetError(
                        f"image {files.name(index)} has {image.width}x{image.height} pixels in only {size:,} bytes",
                        f"More than {PIXELS_PER_BYTE} pixels a byte may be made to fill the memory",
                        "Scale it down, or delete it",
                    )
                return use(image)
    except DatasetError:
        raise
    except Image.DecompressionBombError as error:
        raise DatasetError(
            f"image {files.name(index)} is too large ({error})",
            "Pillow, which decodes images, refuses so many pixels",
            "Scale it down",
        ) from error
    except Exception as error:  # a malformed file can raise almost anything inside its decoder
        raise DatasetError(
            f"image {files.name(index)} cannot be read ({type(error).__name__}: {error})",
            "The file is missing, truncated or not an image",
            "Replace or delete it",
        ) from error


@cache
def _formats() -> tuple[str, ...]:
    """The names in `_FORMATS` that this machine's Pillow can open."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _common_shape(
    sets: Sequence[Encoded], headers: Sequence[Sequence[_Header]], resize: int | None
) -> tuple[int, int, int]:
    every = [header for of_set in headers for header in of_set]
    channels = 1 if all(header.mode in _GRAY for header in every) else 3
    if resize is not None:
        return channels, resize, resize
    for files, of_set in zip(sets, headers, strict=True):
        for i, header in enumerate(of_set):
            if header[1:] != every[0][1:]:
                raise _mixed_sizes(sets[0].name(0), every[0], files.name(i), header)
    return channels, every[0].height, every[0].width


def _mixed_sizes(first: str, a: _Header, other: str, b: _Header) -> DatasetError:
    side = min(a.height, a.width, _SIDES[0])
    return DatasetError(
        f"the images differ in size: {first} is {a.width}x{a.height}, {other} is {b.width}x{b.height}",
        remedy=f"Make all of them squares of one size, e.g. with --set dataset.resize={side}",
    )


def _pixels(image: Image.Image, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Pixels [c h w] of one image converted to the given shape."""
    channels, height, width = shape
    converted = image.convert("L" if channels == 1 else "RGB")
    if converted.size != (width, height):
        converted = converted.resize((width, height), Image.Resampling.BILINEAR)
    pixels: NDArray[np.uint8] = np.asarray(converted)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _in_parallel(count: int, work: Callable[[int], T]) -> list[T]:
    """[work(0), ..., work(count - 1)], in threads, as Pillow releases the GIL; raises the first failure."""

    def block(start: int) -> list[T]:
        return [work(i) for i in range(start, min(start + _BLOCK, count))]

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        return [result for results in pool.map(block, range(0, count, _BLOCK)) for result in results]
