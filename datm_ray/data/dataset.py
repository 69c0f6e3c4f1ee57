"""Data sets ready for training: three sets of normalised images, and the transform that normalised them.

Images are plain numpy arrays, so that an object store can share one copy between all workers of a node; or they are
streamed, and stay in their files (`datm_ray.data.streamed`). Reading and splitting are in `datm_ray.data.sources`.
Augmentation is applied later, to each batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from datm_ray.data.patience import Lines, Say, silent
from datm_ray.data.sources import ImageSet, RawDataset
from datm_ray.data.streamed import StreamedImages, StreamedPixels
from datm_ray.data.transform import Kind, Statistics, Transform, fit_transform

_CHUNK = 2048  # images normalised at a time: 100 MB for 64x64 RGB, fewer if they are larger
_CHUNK_BYTES = 1 << 27
FITTED = 2000
"""Largest number of images that a transform is fitted on, if the images are streamed: decoded again at each use."""
_LARGE = 1 << 27  # bytes of a transform that takes more than some seconds to apply


@dataclass(frozen=True, eq=False)
class Dataset:
    """Normalised images [n c h w] and labels [n] of the training, validation and test sets."""

    name: str
    class_names: tuple[str, ...]
    train_images: NDArray[np.float32] | StreamedImages
    train_labels: NDArray[np.int64]
    validation_images: NDArray[np.float32] | StreamedImages
    validation_labels: NDArray[np.int64]
    test_images: NDArray[np.float32] | StreamedImages
    test_labels: NDArray[np.int64]
    transform: Transform
    fingerprint: str
    """`RawDataset.fingerprint` of the data set before normalisation. The transform's fingerprint is not part of it."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.transform.shape

    @property
    def channels(self) -> int:
        return self.image_shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.image_shape[1:]

    @property
    def classes(self) -> int:
        return len(self.class_names)

    def read_by(self, threads: int) -> Dataset:
        """Copy that decodes streamed images in `threads` threads, bit-identically; `self` if no image is streamed."""
        if not isinstance(self.train_images, StreamedImages):
            return self
        train, validation, test = (
            replace(each, pixels=replace(each.pixels, threads=threads)) if isinstance(each, StreamedImages) else each
            for each in (self.train_images, self.validation_images, self.test_images)
        )
        return replace(self, train_images=train, validation_images=validation, test_images=test)


def prepare(raw: RawDataset, transform: Transform, *, say: Say = silent) -> Dataset:
    """Normalise the training, validation and test images.

    To use stored experts or a distilled set, pass their transform: images whitened by two transforms cannot be
    compared. The result holds float32 copies of all images; little other memory is used. Streamed images are not
    copied: they are normalised whenever they are read.

    Args:
        raw: images before normalisation.
        transform: transform to apply, such as that of `transform_of`.
        say: shows lines about work that takes more than some seconds.

    Raises:
        DatasetError: `transform` is fitted on another image shape. If images are streamed, reading them raises this.
    """
    if transform.nbytes >= _LARGE:
        say(f"{transform.kind}: composing the matrix, and normalising {raw.name}'s images")
    lines = Lines(say)
    return Dataset(
        name=raw.name,
        class_names=raw.class_names,
        train_images=_normalise(raw.train, raw.levels, transform, lines),
        train_labels=raw.train.labels,
        validation_images=_normalise(raw.validation, raw.levels, transform, lines),
        validation_labels=raw.validation.labels,
        test_images=_normalise(raw.test, raw.levels, transform, lines),
        test_labels=raw.test.labels,
        transform=transform,
        fingerprint=raw.fingerprint,
    )


def transform_of(
    raw: RawDataset, kind: Kind, given: Statistics | None = None, *, device: str = "cpu", say: Say = silent
) -> Transform:
    """Fit a normalisation to the training images, or make one from `given` statistics.

    If images are streamed, at most `FITTED` of them are read, spread evenly; only two if the statistics are given.

    Args:
        raw: images before normalisation.
        kind: kind of normalisation, "zca" or "standard".
        given: means and standard deviations of the channels for "standard"; `None` computes them.
        device: torch device that decomposes the covariance, for "zca".
        say: shows lines about work that takes more than some seconds.

    Raises:
        DatasetError: memory does not suffice, an image cannot be read, there are fewer than two, or `given` has another
            number of channels.
        TransientStoreError: the file of a streamed image is missing.
    """
    images: NDArray[np.uint8] | StreamedPixels = raw.train.images
    if isinstance(images, StreamedPixels):
        images = images[np.linspace(0, len(images) - 1, min(len(images), 2 if given else FITTED)).astype(np.int64)]
    return fit_transform(kind, images, raw.levels, given=given, device=device, say=say)


def _normalise(
    images: ImageSet, levels: int, transform: Transform, lines: Lines
) -> NDArray[np.float32] | StreamedImages:
    pixels = images.images
    if isinstance(pixels, StreamedPixels):
        return StreamedImages(pixels, levels, transform)
    result = np.empty(pixels.shape, dtype=np.float32)
    step = max(1, min(_CHUNK, _CHUNK_BYTES // (4 * pixels[:1].size)))
    for start in range(0, len(pixels), step):
        rows = slice(start, start + step)
        lines.note(f"normalising images: {start:,} of {len(pixels):,} in this set")
        result[rows] = transform.apply(pixels[rows].astype(np.float32) / np.float32(levels))
    return result
