"""Images that stay in their files: each is read and decoded whenever it is asked for, so that none is kept in memory.

`StreamedPixels` and `StreamedImages` are indexed by rows, as arrays are. They can be sent to workers, which then read
the files themselves, so the files must lie at the same path on every node. Tests: tests/data/test_streamed.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from datm_ray.data.reading.decode import Encoded, decode_rows, in_parallel
from datm_ray.data.transform import Transform

Rows = NDArray[np.int64] | slice
"""What streamed images are indexed by: numbers of images, in any order, or a slice."""
NORMALISED = 4
"""Number of images that are normalised in one call, small enough for a CPU's cache. On one core, with images of
224x224 pixels, calls with 4 images took a third of the time per image that calls with 184 images took
(`benchmarks/bench_reading.py`). The number changes no bit of the result."""


@dataclass(frozen=True, eq=False)
class StreamedPixels:
    """Pixels of image files, as uint8 in 0..255. Every image is decoded again each time it is asked for."""

    files: Encoded
    rows: NDArray[np.int64]  # index in `files` of each image [n]
    image: tuple[int, int, int]
    """Channels, height and width that every image gets."""
    threads: int | None = None
    """Number of threads that decode and normalise, which changes no bit; `None` for as many as torch has."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Number of images, channels, height, width."""
        return (len(self.rows), *self.image)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Rows) -> NDArray[np.uint8]:
        """Decode the images at `rows` to an array [m c h w].

        Raises:
            DatasetError: a file is damaged.
            TransientStoreError: a file is missing, or the operating system cannot read it.
        """
        return decode_rows(self.files, self.rows[rows], self.image, self.threads_used)

    def take(self, rows: NDArray[np.int64]) -> StreamedPixels:
        """Select the images at these rows, without reading them."""
        return replace(self, rows=self.rows[rows])

    @property
    def threads_used(self) -> int:
        """Number of threads that decode and normalise in this process."""
        return self.threads or torch.get_num_threads()


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """Normalised images, as float32. Every image is decoded and normalised again each time it is asked for."""

    pixels: StreamedPixels
    levels: int
    """Value of a uint8 pixel that means 1.0, such as 255."""
    transform: Transform

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Number of images, channels, height, width."""
        return self.pixels.shape

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Rows) -> NDArray[np.float32]:
        """Decode and normalise the images at `rows` to an array [m c h w].

        Raises:
            DatasetError: a file is damaged.
            TransientStoreError: a file is missing, or the operating system cannot read it.
        """
        pixels = self.pixels[rows]
        result = np.empty(pixels.shape, np.float32)

        def fill(number: int) -> None:
            part = slice(number * NORMALISED, (number + 1) * NORMALISED)
            result[part] = self.transform.apply(pixels[part].astype(np.float32) / np.float32(self.levels))

        threads = self.pixels.threads_used // torch.get_num_threads()  # torch starts its own in each of them
        in_parallel(-(-len(pixels) // NORMALISED), fill, max(1, threads))
        return result
