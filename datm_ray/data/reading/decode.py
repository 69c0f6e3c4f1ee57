"""Decode image files into one uint8 array, in threads and without a second copy of the pixels.

All images of a data set get one shape: one channel if every image is grayscale, else RGB. The size is the common size,
or a square of `resize` pixels (bilinear with antialiasing; the aspect ratio is not kept). Sizes are read from the
files' headers first, so that a set too large for memory is refused before decoding. Each image is resized as soon as it
is decoded, so the images are never all in memory at full size. JPEG files are decoded at full size too: Pillow's
`draft` mode is faster, but gives other pixels. Images are turned as their EXIF data says. All further changes to pixels
are counted and reported.

`survey` and `decode_rows` are for sets too large for memory (`data/streamed.py`): the first checks a sample of the
headers, the second decodes some of the images.

Not covered: transparency (dropped), the lower half of 16 bits, frames after the first, and colour profiles. Images of
32 bits or floats are refused, because their range is unknown.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError, features

from datm_ray.data.reading.contents import HEAD_BYTES, Content, recognise, unreadable
from datm_ray.errors import DatasetError, TransientStoreError
from datm_ray.memory import available_memory
from datm_ray.words import data_size, dimensions, listed

T = TypeVar("T")

PIXELS_FREE, PIXELS_PER_BYTE = 2**24, 100
"""Limit on the pixels of an image: 16 million plus 100 per byte of its file. Photographs have 1 to 10 per byte."""

TEXT_BYTES = 2**26
"""Limit on all texts in a PNG together: 64 MiB, as in Pillow. Pillow's limit on one compressed text is raised from 1
MiB to this size."""

# Accepted formats. Pillow reads some other formats by starting other programs.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_BLOCK = 256  # images per task of a thread: few enough to balance the threads, enough to queue cheaply
_GRAY = frozenset({"1", "L"})
_MODES = {"1": "black and white", "L": "grey", "I;16": "16-bit grey", "P": "palette"}  # Pillow's mode -> words
_ALPHA = frozenset({"LA", "PA", "La", "RGBA", "RGBa"})
_NO_IMAGE = Content("no image of a known kind", "Replace or delete it")
_ORIENTATION = 0x0112  # EXIF tag of the orientation
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Without a handler, Pillow's warnings would go to the terminal.
logging.getLogger("PIL").addHandler(logging.NullHandler())

SURVEYED = 1000
"""Approximate number of images whose headers `survey` reads; if there are fewer, it reads all."""


@dataclass(frozen=True)
class Encoded:
    """Image files that are not decoded yet, with their labels."""

    labels: NDArray[np.int64]  # labels [n]
    open: Callable[[int], BinaryIO]
    """Opens the i-th file; called from several threads at once."""
    name: Callable[[int], str]
    """Returns the name of the i-th file for messages."""
    mark: Callable[[int], str] | None = None
    """Returns a text with the name and size of the i-th file, by which it is recognised without being read.

    `None` if `open` works in this process only, as for files in an archive."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> Encoded:
        """Select the files (and labels) with these indices, in this order."""
        mark = self.mark
        return Encoded(
            self.labels[rows],
            open=lambda i: self.open(int(rows[i])),
            name=lambda i: self.name(int(rows[i])),
            mark=None if mark is None else lambda i: mark(int(rows[i])),
        )


class _Header(NamedTuple):
    mode: str
    """Pillow's mode of the image, such as "RGB"; "I;16" for every kind of 16-bit grayscale."""
    width: int
    height: int
    """Height of the image in pixels. `width` and `height` are sizes after the turn that its EXIF data asks for."""
    is_turned: bool = False
    is_transparent: bool = False
    is_deep: bool = False
    """True if the image has 16 bits per channel."""
    has_frames: bool = False


def decode(
    sets: Sequence[Encoded], resize: int | None = None, copies: int = 1, largest: int | None = None
) -> tuple[list[NDArray[np.uint8]], tuple[str, ...]]:
    """Decode image files to arrays of one shape.

    Returns the images [n c h w] of each set, in which c, h and w are common to all sets. Also returns lines for the
    user: how many images were converted, and in which way; and a warning if 16-bit images are very dark.

    Every file is opened twice, for its header and for its pixels, so that the array is allocated only once.

    Args:
        sets: files of each set, such as training and test; all images get one shape.
        resize: side in pixels of the squares that all images become; `None` keeps their size.
        copies: number of float32 copies of all pixels that the caller will make, for which memory must suffice too.
        largest: largest width and height to accept, in pixels and after resizing; `None` for any.

    Raises:
        DatasetError: files are broken or have more than 16 bits a channel, sizes differ and `resize` is `None`, images
            are larger than `largest`, or memory does not suffice. Sizes and memory are checked before any image is
            decoded.
    """
    with _pillow_prepared():
        headers = [in_parallel(len(files), partial(_header, files)) for files in sets]
        if any(isinstance(header, _Unreadable) for of_set in headers for header in of_set):
            # Decode all images, so that one message counts the truncated files too. The pixels may not fit into
            # memory, so they are not kept.
            tried = [in_parallel(len(files), partial(_with_image, files, use=_try)) for files in sets]
            _require_readable(sets, tried)
        good = _require_readable(sets, headers)
        shape = _common_shape(sets, good, resize)
        if largest is not None and max(shape[1:]) > largest:
            raise DatasetError(
                f"images such as {sets[0].name(0)} are larger than {largest} pixels",
                remedy=f"Use --set dataset.resize={largest}",
            )
        require_memory(sum(map(len, sets)), shape, copies, f", such as {sets[0].name(0)},")
        pixels = [np.empty((len(files), *shape), dtype=np.uint8) for files in sets]
        done = [
            in_parallel(len(files), partial(_decode_one, files, resize, of_set))
            for files, of_set in zip(sets, pixels, strict=True)
        ]
        _require_readable(sets, done)
    return pixels, (*_notes(pixels[0].shape[1], good, resize), *_too_dark(pixels, good))


def marks(files: Encoded) -> list[str]:
    """For each image a text with the name and size of its file. Workers whose texts are equal read the same files.

    Raises:
        DatasetError: only this process can read the files, as those in an archive; or a file is missing.
    """
    if files.mark is None:
        raise DatasetError(
            f"{files.name(0)} cannot be streamed",
            "dataset.streamed reads the files of a folder, or Parquet files",
            "Unpack the archive and give the folder, or leave dataset.streamed out",
        )
    try:
        return in_parallel(len(files), files.mark)
    except OSError as error:
        raise DatasetError(f"{error.filename} cannot be read ({error.strerror})") from error


def survey(sets: Sequence[Encoded], side: int) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    """Shape (channels, height, width) of images once resized to `side`, and lines for the user on conversions.

    Only the headers of about `SURVEYED` files are read, spread evenly. The shape has one channel if all these images
    are grayscale.

    Raises:
        DatasetError: one of these images is damaged or has more than 16 bits a channel.
    """
    total = sum(map(len, sets))
    with _pillow_prepared():
        counts = [min(len(files), -(-SURVEYED * len(files) // total)) for files in sets]
        chosen = [np.linspace(0, len(files) - 1, n).astype(int) for files, n in zip(sets, counts, strict=True)]
        parts = [files.take(rows) for files, rows in zip(sets, chosen, strict=True)]
        headers = [in_parallel(len(part), partial(_header, part)) for part in parts]
        good = _require_readable(parts, headers)
        shape = _common_shape(parts, good, side)
    return shape, _notes(shape[0], good, side, " read")


def decode_rows(
    files: Encoded, rows: NDArray[np.int64], shape: tuple[int, int, int], threads: int
) -> NDArray[np.uint8]:
    """Decode the images with the indices `rows` to [n c h w], each resized to `shape`.

    Images are read in ascending order of `rows`, so that neighbours in one Parquet file are read together.

    Args:
        threads: number of threads, which changes no pixel.

    Raises:
        DatasetError: files are damaged, or have neither 8 nor 16 bits a channel.
        TransientStoreError: the operating system cannot open or read a file any more, for example on a node without
            the disk.
    """
    order = np.argsort(rows, kind="stable")
    pixels, part = np.empty((len(rows), *shape), dtype=np.uint8), files.take(rows[order])

    def decode_one(index: int) -> _Unreadable | None:
        def put(image: ImageFile.ImageFile) -> None:
            _require_known_range(part.name(index), _read_header(image).mode)
            pixels[order[index]] = pixels_of(image, shape)

        return _with_image(part, index, put)

    with _pillow_prepared():
        done = in_parallel(len(part), decode_one, threads)
    if away := {part.name(i): each.reason for i, each in enumerate(done) if each and each.is_away}:
        raise TransientStoreError(
            f"image {listed(sorted(away), 1)} cannot be read any more ({away[min(away)]})",
            "its disk is not mounted on this node, or files were moved",
            "give every node the same files at the same path, then run the same command again: it resumes",
        )
    _require_readable([part], [done])
    return pixels


@contextmanager
def _pillow_prepared() -> Iterator[None]:
    """Raise Pillow's limit on texts in PNG files and hide its warnings while the block runs."""
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    with warnings.catch_warnings():
        # `_with_image` limits the pixels, and Pillow repairs the other faults that it warns of.
        warnings.simplefilter("ignore")
        PngImagePlugin.MAX_TEXT_CHUNK = max(limit, TEXT_BYTES)
        try:
            yield
        finally:
            PngImagePlugin.MAX_TEXT_CHUNK = limit


def resize_images(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Resize images [n c h w], c in {1, 3}, to [n c side side]."""
    resized = np.empty((*images.shape[:2], side, side), dtype=np.uint8)

    def one(i: int) -> None:
        pixels = images[i, 0] if images.shape[1] == 1 else images[i].transpose(1, 2, 0)
        resized[i] = _pixels(Image.fromarray(np.ascontiguousarray(pixels)), resized.shape[1:])

    in_parallel(len(images), one)
    return resized


_SIDES = (128, 64, 32, 16, 8)
"""Sides in pixels of square images that an error may suggest for `dataset.resize`."""
_STREAMED = "a recipe with dataset.streamed=true, which leaves the images in their folder or Parquet files"


def require_memory(images: int, shape: tuple[int, int, int], copies: int, example: str = "") -> None:
    """Raise a `DatasetError` if this number of images and their float32 copies do not fit into free memory.

    The images take one byte per value, and each float32 copy takes four bytes per value.

    Args:
        shape: channels, height and width.
        copies: number of float32 copies: one if a single process does everything; two with Ray, whose object store
            has its own.
        example: text behind "images of 3x64x64" in the message, such as ", such as a.png,".
    """
    free = available_memory()

    def needed(height: int, width: int) -> int:
        return images * shape[0] * height * width * (1 + 4 * copies)

    if needed(*shape[1:]) <= free:
        return
    side = next((side for side in _SIDES if side < min(shape[1:]) and needed(side, side) <= free), None)
    raise DatasetError(
        f"{images:,} images of {dimensions(shape)}{example} need {data_size(needed(*shape[1:]))} of memory, "
        f"and {data_size(free)} is free",
        f"They are kept in memory as they are read and, as float32, {'twice' if copies > 1 else 'once'} more",
        f"Use --set dataset.resize={side} (--resize {side} of init), or {_STREAMED}"
        if side
        else f"Use fewer images, a smaller dataset.resize (--resize of init), or {_STREAMED}",
    )


def _decode_one(files: Encoded, resize: int | None, pixels: NDArray[np.uint8], index: int) -> _Unreadable | None:
    def use(image: Image.Image) -> None:
        turned = _turned(image)
        if resize is None and turned.size[::-1] != pixels.shape[2:]:  # EXIF data after the pixels, seen only now
            raise _mixed_sizes(files.name(0), pixels.shape[:1:-1], files.name(index), turned.size)
        pixels[index] = _pixels(turned, pixels.shape[1:])

    return _with_image(files, index, use)


def _header(files: Encoded, index: int) -> _Header | _Unreadable:
    header = _with_image(files, index, _read_header)
    if isinstance(header, _Header):
        _require_known_range(files.name(index), header.mode)
    return header


def _require_known_range(name: str, mode: str) -> None:
    """Raise a `DatasetError` if an image has pixels of 32 bits or floats, because their range is unknown.

    Args:
        name: name of the image, for the message.
        mode: Pillow mode in the image's header.
    """
    if mode[0] in "IF" and mode != "I;16":
        raise DatasetError(
            f"image {name} has neither 8 nor 16 bits a channel (mode {mode})",
            "Which of its values are black and white is not known",
            "Convert it to an image of 8 or 16 bits first",
        )


def _read_header(image: ImageFile.ImageFile) -> _Header:
    args = image.tile[0][3] if image.tile else ""
    # `raw` is Pillow's raw mode, such as "RGB;16B"; for PPM, `more` has the largest value of a pixel.
    raw, *more = args if isinstance(args, tuple) and args else (args,)
    is_16bit = ";16" in str(raw) or (image.format == "PPM" and more[:1] > [255])
    is_grey = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    orientation = _orientation(image)
    if orientation > 4 and image.format == "TIFF":
        image.load()  # Pillow turns TIFF images itself, and some versions know the turned size only after loading
    width, height = image.size if orientation <= 4 or image.format == "TIFF" else image.size[::-1]
    return _Header(
        mode=image.mode if not is_grey else "I;16" if is_16bit or image.mode == "I" else str(raw),
        width=width,
        height=height,
        is_turned=orientation in _TURNS,
        is_transparent=image.mode in _ALPHA or "transparency" in image.info,
        is_deep=is_16bit or is_grey,
        has_frames=_has_frames(image),
    )


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) if the file has none that can be read."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the pixels to read EXIF data behind them
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
        return orientation if orientation in _TURNS else 1
    except Exception:  # a malformed tag can raise almost anything
        return 1


def _has_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # the next frame is damaged, and not needed
        return True


class _Unreadable(NamedTuple):
    """Reason why an image cannot be read."""

    reason: str
    cause: str
    remedy: str
    is_away: bool = False
    """True if the operating system could not open or read the file, as on a node without its disk."""


def _with_image(files: Encoded, index: int, use: Callable[[ImageFile.ImageFile], T]) -> T | _Unreadable:
    head = b""
    try:
        with files.open(index) as file:
            head = file.read(HEAD_BYTES)
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            with Image.open(file, formats=_formats()) as image:
                if math.prod(image.size) > PIXELS_FREE + PIXELS_PER_BYTE * size:
                    raise DatasetError(
                        f"image {files.name(index)} has {image.width}x{image.height} pixels in only {size:,} bytes",
                        f"An image of more than {PIXELS_PER_BYTE} pixels a byte may be crafted to fill the memory",
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
        content = recognise(head)
        if content is not None and content.suffix in image_suffixes():
            content = None  # the right kind, but damaged
        elif content is None and isinstance(error, UnidentifiedImageError):
            content = _NO_IMAGE
        is_away = isinstance(error, OSError) and error.errno is not None  # Pillow's own OSErrors have no errno
        return _Unreadable(*unreadable(error, content), is_away)


def _require_readable(sets: Sequence[Encoded], results: Sequence[Sequence[T | _Unreadable]]) -> list[list[T]]:
    """Return the results, one list per set; raise a `DatasetError` that names the files if any is `_Unreadable`."""
    found = {
        files.name(i): result
        for files, of_set in zip(sets, results, strict=True)
        for i, result in enumerate(of_set)
        if isinstance(result, _Unreadable)
    }
    bad = list(found.items())  # each file once, although streamed rows may repeat it
    if len(bad) == 1:
        ((name, only),) = bad
        raise DatasetError(f"image {name} cannot be read ({only.reason})", only.cause, only.remedy)
    if bad:
        folder = os.path.commonpath([name for name, _ in bad])
        named = listed((f"{os.path.relpath(name, folder)} ({each.reason})" for name, each in bad), 3)
        raise DatasetError(
            f"{len(bad)} of {sum(map(len, sets))} images cannot be read, in {folder}: {named}",
            remedy=". ".join(dict.fromkeys(each.remedy.split(":")[0] for _, each in bad)),
        )
    return [[result for result in of_set if not isinstance(result, _Unreadable)] for of_set in results]


def image_suffixes() -> frozenset[str]:
    """Suffixes, such as ".png", in lower case, of the images that this machine's Pillow can decode."""
    Image.init()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _formats())


@cache
def _formats() -> tuple[str, ...]:
    """Names in `_FORMATS` that this machine's Pillow can open."""
    Image.init()
    lacking = {name for name in ("AVIF", "WEBP") if name.lower() not in features.get_supported()}
    return tuple(name for name in _FORMATS if name in Image.OPEN and name not in lacking)


def _common_shape(
    sets: Sequence[Encoded], headers: Sequence[Sequence[_Header]], resize: int | None
) -> tuple[int, int, int]:
    every = [header for of_set in headers for header in of_set]
    channels = 1 if all(header.mode in _GRAY or header.mode == "I;16" for header in every) else 3
    if resize is not None:
        return channels, resize, resize
    for files, of_set in zip(sets, headers, strict=True):
        for i, header in enumerate(of_set):
            if header[1:3] != every[0][1:3]:
                raise _mixed_sizes(sets[0].name(0), every[0][1:3], files.name(i), header[1:3])
    return channels, every[0].height, every[0].width


def _mixed_sizes(first: str, a: tuple[int, ...], other: str, b: tuple[int, ...]) -> DatasetError:
    """Error for two images of different size, given by name and (width, height) in pixels; suggests a common size."""
    return DatasetError(
        f"the images differ in size: {first} is {a[0]}x{a[1]}, {other} is {b[0]}x{b[1]}",
        remedy=f"Make all of them squares of one size, e.g. with --set dataset.resize={min(*a, *b, _SIDES[0])}",
    )


def _notes(channels: int, sets: Sequence[Sequence[_Header]], resize: int | None, counted: str = "") -> tuple[str, ...]:
    """Tuple of one line that counts the converted images; empty if no image is converted.

    Args:
        channels: channels of the images after conversion, 1 or 3.
        sets: headers of each set's images.
        resize: side of the resized images; `None` if they keep their size.
        counted: text behind "of N images" in the line.
    """
    headers = [header for of_set in sets for header in of_set]
    target = "L" if channels == 1 else "RGB"
    modes = Counter(_MODES.get(header.mode, header.mode) for header in headers if header.mode != target)
    named = ", ".join(f"{mode} {count}" for mode, count in modes.most_common())
    counts = (
        (f"converted to {'grey' if target == 'L' else 'RGB'} ({named})", modes.total()),
        ("turned by EXIF", sum(header.is_turned for header in headers)),
        ("left without their transparency", sum(header.is_transparent for header in headers)),
        ("cut from 16 to 8 bits", sum(header.is_deep for header in headers)),
        ("read as the first of several frames", sum(header.has_frames for header in headers)),
        (
            "changed in aspect ratio by dataset.resize",
            sum(resize is not None and header.width != header.height for header in headers),
        ),
    )
    changes = ", ".join(f"{count:,} {what}" for what, count in counts if count)
    return (f"of {len(headers):,} images{counted}: {changes}",) if changes else ()


def _too_dark(pixels: Sequence[NDArray[np.uint8]], sets: Sequence[Sequence[_Header]]) -> tuple[str, ...]:
    """One line of warning if no pixel of any 16-bit grey image, cut to 8 bits (0..255), reaches 64; otherwise empty."""
    headers = [header for of_set in sets for header in of_set]
    images = (image for of_set in pixels for image in of_set)
    brightest = max(
        (int(image.max()) for image, header in zip(images, headers, strict=True) if header.mode == "I;16"), default=255
    )
    dark = f"the brightest pixel of the 16-bit images is {brightest} of 255; scale them if they use fewer than 16 bits"
    return (dark,) if brightest < 64 else ()


def _try(image: Image.Image) -> None:
    """Decode an image to check that it is readable. Pillow raises an error if it is not."""
    image.load()


def _turned(image: Image.Image) -> Image.Image:
    """Copy of the image turned as its EXIF orientation says; the image itself if it is upright."""
    image.load()  # also reads EXIF data that follow the pixels
    turn = None if image.format == "TIFF" else _TURNS.get(_orientation(image))  # Pillow turns TIFF images itself
    return image if turn is None else image.transpose(turn)


def pixels_of(image: Image.Image, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Pixels of an image, turned by EXIF, converted and resized to `shape` [c h w], as `decode` does for a data set."""
    return _pixels(_turned(image), shape)


def _pixels(image: Image.Image, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Pixels [c h w] of one image, converted and resized to `shape` (channels, height, width)."""
    channels, height, width = shape
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    converted = image.convert("L" if channels == 1 else "RGB")
    if converted.size != (width, height):
        converted = converted.resize((width, height), Image.Resampling.BILINEAR)
    pixels: NDArray[np.uint8] = np.asarray(converted)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def in_parallel(count: int, work: Callable[[int], T], threads: int | None = None) -> list[T]:
    """Compute [work(0), ..., work(count - 1)] in threads, because Pillow releases the GIL; raise the first failure.

    Args:
        threads: number of threads; `None` for one per CPU, at most 32.
    """

    threads = threads or min(32, os.cpu_count() or 1)
    size = max(1, min(_BLOCK, -(-count // threads)))

    def block(start: int) -> list[T]:
        return [work(i) for i in range(start, min(start + size, count))]

    with ThreadPoolExecutor(threads) as pool:
        return [result for results in pool.map(block, range(0, count, size)) for result in results]
