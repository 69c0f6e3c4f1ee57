"""Named sources of raw images in three sets: training, validation, test.

A source is one function, registered under its name, that reads its files into uint8 arrays. The built-in ones are in
`data/reading/readers.py`. Splits, checks and the fingerprint are common to all sources. The validation set is always
split off the training images, so that no choice depends on test images. A source without a test set gets one that is
split off too.
Not covered: normalisation (`datm_ray.data.transform`) and augmentation (`datm_ray.core.images.augment`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
from numpy.typing import NDArray

from datm_ray.data.reading.decode import marks
from datm_ray.data.splits import TEST_FRACTION, Stream, stratified_split
from datm_ray.data.streamed import StreamedPixels
from datm_ray.errors import DatasetError, MissingImagesError
from datm_ray.words import counted, listed, one_line


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images, uint8 [n c h w], and their labels [n], from 0."""

    images: NDArray[np.uint8] | StreamedPixels  # images [n c h w]
    labels: NDArray[np.int64]  # labels [n]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> ImageSet:
        """Copy the images and labels at these indices to another `ImageSet`. Streamed images stay in their files."""
        images = self.images.take(indices) if isinstance(self.images, StreamedPixels) else self.images[indices]
        return ImageSet(images, self.labels[indices])


@dataclass(frozen=True)
class Request:
    """Options for reading a data source: where its images are, and how they are decoded."""

    path: str | None
    """File or folder of the images, as the source defines it; `None` for the source's default."""
    resize: int | None
    """Side in pixels of the squares that all images become; `None` keeps their size."""
    download: bool
    """True if missing files may be downloaded."""
    copies: int = 1
    """Number of float32 copies of all pixels that the caller will make. Memory must suffice for them too."""
    streamed: bool = False
    """True to leave the images in their files and to decode each whenever it is needed. `resize` is then given."""
    largest: int | None = None
    """Largest width and height to accept, in pixels and after `resize`; `None` for any. Read by sources of image files,
    unless images are streamed."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """Data set that a source has read, before it is checked and split."""

    name: str
    class_names: tuple[str, ...]
    train: ImageSet
    test: ImageSet | None
    """Test set of the source; `None` to split one off `train`."""
    levels: int = 255
    """Value of a uint8 pixel that means 1.0: 16 for digits, 255 for photographs."""
    notes: tuple[str, ...] = ()
    """Lines for the user on left-out files, the use of files and changes to pixels."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RawDataset(Loaded):
    """Data set after reading, checks and split, before normalisation. `notes` are without control characters."""

    validation: ImageSet
    test: ImageSet
    fingerprint: str
    """16 hex digits that depend on all pixels, labels, class names, levels and the split.

    For streamed images they depend on names and sizes of files in place of pixels."""

    @property
    def channels(self) -> int:
        return int(self.train.images.shape[1])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.train.images.shape[2], self.train.images.shape[3]

    @property
    def classes(self) -> int:
        return len(self.class_names)


Loader = Callable[[Request], Loaded]

_SOURCES: dict[str, Loader] = {}


def source(name: str) -> Callable[[Loader], Loader]:
    """Decorator: register the function as the source called `name`."""

    def register(loader: Loader) -> Loader:
        _SOURCES[name] = loader
        return loader

    return register


def known_sources() -> tuple[str, ...]:
    """Names that `load_raw` accepts, sorted."""
    return tuple(sorted(_SOURCES))


def load_raw(
    source: str,
    path: str | None = None,
    *,
    resize: int | None = None,
    validation: float = 0.1,
    download: bool = True,
    copies: int = 1,
    streamed: bool = False,
    largest: int | None = None,
) -> RawDataset:
    """Read a data set and split it. Equal input gives equal sets on every machine and for every seed.

    Args:
        source: one of `known_sources()`.
        path: folder or file of the source. `digits` takes none; `folder` and `parquet` need one. For `cifar10`,
            `cifar100` and `tiny-imagenet`, `None` means `~/.cache/datm_ray`.
        resize: side in pixels of the squares that all images become; `None` keeps their size.
        validation: share of each class's training images used for validation, in (0, 1).
        download: True to download missing files of `cifar10` and `cifar100`.
        copies: number of float32 copies of all pixels that the caller will make. If memory does not suffice for images
            and copies, an error is raised before any image is decoded.
        streamed: True to leave the images in their files and to decode each whenever it is needed. Needs `resize`, and
            the source `folder`, `parquet` or `tiny-imagenet`. The fingerprint then depends on names and sizes of files
            in place of pixels.
        largest: largest width and height to accept, in pixels and after `resize`; `None` for any. If images are larger,
            an error is raised before any is decoded. `digits`, `cifar10`, `cifar100` and streamed images ignore it.

    Raises:
        DatasetError: an argument or a file is wrong; the message names the first thing to mend.
        MissingImagesError: this DatasetError means that `path` is an address such as s3://bucket/birds; that nothing
            exists there, for `folder`, `parquet` and `tiny-imagenet`; or that `folder` or `parquet` has no `path`.
    """
    _check_options(source, resize, validation, streamed)
    require_disk(path)
    loaded = _find_source(source)(Request(path, resize, download, copies, streamed, largest))
    _check_labels("training", loaded.train.labels, loaded.class_names)
    train, test = loaded.train, loaded.test
    if test is None:
        train, test = _split(train, TEST_FRACTION, Stream.TEST, loaded.class_names)
    _check_labels("test", test.labels, loaded.class_names)
    train, held_out = _split(train, validation, Stream.VALIDATION, loaded.class_names)
    fingerprint = _fingerprint(loaded.class_names, loaded.levels, (train, held_out, test))
    kept = (loaded.name, loaded.class_names, train, loaded.levels, tuple(map(one_line, loaded.notes)))
    return RawDataset(*kept, validation=held_out, test=test, fingerprint=fingerprint)


def require_disk(path: str | None) -> None:
    """Raise a `MissingImagesError` if `path` is an address such as s3://bucket/birds, not on a disk. `None` passes."""
    if path is not None and re.match(r"[a-z][a-z0-9+.-]+://", path.strip(), re.IGNORECASE):
        raise MissingImagesError(
            f"images cannot be read from {path}",
            "Images are read from a disk of each node; only experts and results may lie on S3",
            "Copy them to a disk, or mount the bucket, and give that path",
        )


STREAMED = ("folder", "parquet", "tiny-imagenet")
"""Sources whose images can be streamed."""


def require_streamable(source: str, resize: int | None) -> None:
    """Raise a `DatasetError` if the images of a source cannot be streamed, or `resize` is `None`."""
    if resize is None or source not in STREAMED:
        raise DatasetError(
            f"dataset.streamed needs one of the sources {', '.join(STREAMED)}, and dataset.resize",
            f"The source is {source}, and dataset.resize is {'null' if resize is None else resize}",
            "Use --set dataset.resize=224, for example, or leave dataset.streamed out",
        )


def _check_options(source: str, resize: int | None, validation: float, streamed: bool) -> None:
    if streamed:
        require_streamable(source, resize)
    if resize is not None and resize < 1:
        raise DatasetError(f"the setting resize={resize} is not a size in pixels", remedy="Set it to 1 or more")
    if not 0 < validation < 1:
        raise DatasetError(
            f"the setting validation={validation} is not a share between 0 and 1",
            "Choosing the best state needs images that are neither trained nor tested on",
            "Set it to 0.1, for example",
        )


def _find_source(name: str) -> Loader:
    if name in _SOURCES:
        return _SOURCES[name]
    near = get_close_matches(name, _SOURCES, n=1)
    raise DatasetError(
        f"unknown data source {name!r}",
        f"Known are {', '.join(known_sources())}",
        f"Did you mean {near[0]!r}?" if near else "For images of your own use 'folder' or 'parquet'",
    )


def _check_labels(role: str, labels: NDArray[np.int64], class_names: Sequence[str]) -> None:
    """Raise a `DatasetError` for fewer than two classes, a label out of range, or a class without an image."""
    if len(class_names) < 2:
        raise DatasetError(
            f"the {role} set has {counted(len(class_names), 'class')}, {listed(map(repr, class_names))}",
            "The path may lead one folder too high or too low",
            "Give it images of two classes or more",
        )
    outside = labels[(labels < 0) | (labels >= len(class_names))]
    if len(outside):
        raise DatasetError(
            f"the {role} set has the label {outside[0]}, outside 0..{len(class_names) - 1}",
            "The labels start at another number, or these images are unlabelled",
            "Number the classes from 0 in both sets",
        )
    absent = np.flatnonzero(np.bincount(labels, minlength=len(class_names)) == 0)
    if len(absent):
        raise DatasetError(
            f"the {role} set has no image of {len(absent)} of {len(class_names)} classes, "
            f"{class_names[absent[0]]!r} for one",
            "Files are missing, or the labels have gaps",
            "Add images of that class or number the classes without gaps",
        )


def _split(images: ImageSet, fraction: float, stream: Stream, class_names: Sequence[str]) -> tuple[ImageSet, ImageSet]:
    kept, held_out = stratified_split(images.labels, fraction, stream, class_names)
    return images.take(kept), images.take(held_out)


def _fingerprint(class_names: Sequence[str], levels: int, sets: Sequence[ImageSet]) -> str:
    digest = hashlib.sha256(repr((tuple(class_names), levels)).encode())
    for images in sets:
        pixels = images.images
        digest.update(repr(pixels.shape).encode())
        if isinstance(pixels, StreamedPixels):
            texts = marks(pixels.files.take(pixels.rows))
            digest.update("\n".join(texts).encode(errors="surrogateescape"))
        else:
            digest.update(np.ascontiguousarray(pixels).data)
        digest.update(images.labels.astype("<i8").data)
    return digest.hexdigest()[:16]
