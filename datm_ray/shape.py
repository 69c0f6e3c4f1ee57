"""Size of a data set, and the memory and operations of one of its images in a network, for planning.

Tests: tests/planning/test_memory.py.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, replace

from datm_ray.config import DatasetConfig, PriorConfig, RunConfig
from datm_ray.core.networks.image_cost import ImageCost, image_cost
from datm_ray.core.networks.stacked import cost_and_stacking
from datm_ray.core.prior import build_decoder, latent_shape
from datm_ray.data.reading.decode import require_memory
from datm_ray.data.sources import load_raw, require_streamable
from datm_ray.data.splits import held_out
from datm_ray.data.transform import FitCost, require_per_channel
from datm_ray.errors import ConfigError, MissingImagesError
from datm_ray.words import data_size, dimensions


@dataclass(frozen=True)
class DataShape:
    """Size of a data set: the shape of its images, and the numbers of its classes and images."""

    image: tuple[int, int, int]
    """Channels, height, width."""
    classes: int
    training_images: int
    """Number of training images, those set aside for validation included."""
    test_images: int = 0
    """Number of test images. 0 if it is unknown; then the time to score them is not counted."""
    is_streamed: bool = False
    """True if images stay in their files, see `dataset.streamed`."""
    validation_images: int | None = None
    """Number of training images that the recipe sets aside for validation; `None` if they were not counted."""

    def __str__(self) -> str:
        held = f"{data_size(self.bytes)}, shared by the workers of a machine" if self.bytes else "read when needed"
        images = f"{self.training_images:,} images of {dimensions(self.image)} in {self.classes:,} classes"
        return f"{images} to train and validate on: {held}"

    @property
    def bytes(self) -> int:
        """Bytes of the training images as float32. Workers on one node share one copy. 0 for streamed images."""
        return 0 if self.is_streamed else 4 * self.training_images * math.prod(self.image)

    @property
    def row(self) -> int:
        """Bytes of one image and its soft label as float32."""
        return 4 * (math.prod(self.image) + self.classes)

    def trained(self, dataset: DatasetConfig) -> int:
        """Number of training images that are left when a recipe's validation images are set aside.

        Each class sets aside at least one image, so small classes lose a large share. The classes are assumed to be
        equally large if `validation_images` is `None`.
        """
        if self.validation_images is not None:
            return self.training_images - self.validation_images
        each, larger = divmod(self.training_images, self.classes)
        small, large = (held_out(count, dataset.validation) if count else 0 for count in (each, each + 1))
        return self.training_images - (self.classes - larger) * small - larger * large

    def set_aside(self, dataset: DatasetConfig) -> int:
        """Number of training images that a recipe sets aside for validation."""
        return self.training_images - self.trained(dataset)

    def synthetic(self, config: RunConfig, shards: int = 1) -> int:
        """Number of images in the largest of the shards of a recipe's synthetic set, which hold whole classes.

        With one shard, the number of images of the set.
        """
        return config.distill.ipc * -(-self.classes // shards)


KNOWN_SHAPES = {
    "digits": DataShape((1, 8, 8), 10, 1438, 359),
    "cifar10": DataShape((3, 32, 32), 10, 50_000, 10_000),
    "cifar100": DataShape((3, 32, 32), 100, 50_000, 10_000),
    "tiny-imagenet": DataShape((3, 64, 64), 200, 100_000, 10_000),
}
"""`dataset.source` -> shape of the data, for sources of a fixed shape, whose files need not be read."""


def parse_shape(text: str) -> DataShape:
    """Read a data set's shape: channels x height x width, classes, training images, such as `3x64x64,200,100000`.

    Raises:
        ConfigError: the text has another form, or no data set can have these numbers.
    """
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})x(\d{1,5}),(\d{1,6}),(\d{1,10})", text.strip(), re.ASCII)
    channels, height, width, classes, images = map(int, match.groups()) if match else (0, 0, 0, 0, 0)
    if not (channels * height * width and 0 < classes <= images and max(channels, height, width) <= 2**14):
        raise ConfigError(
            f"--data-shape {text!r} is no shape of a data set",
            "it has another form, fewer images than classes, or a larger number than any data set",
            "write channels x height x width, classes, training images, as 3x64x64,1000,1281167",
        )
    return DataShape((channels, height, width), classes, images)


def data_shape(dataset: DatasetConfig, *, here: bool = False) -> DataShape:
    """Shape of a recipe's data. Files are read only if the source is not in `KNOWN_SHAPES`.

    Args:
        here: True if the run will be on this machine, where resized images must fit into memory.

    Raises:
        DatasetError: images cannot be read or streamed, do not fit into memory, or have another number of channels than
            `dataset.mean`.
        MissingImagesError: images are not on this machine. The message names the option of `plan` that replaces them.
    """
    streamed = dataset.streamed
    if streamed:
        require_streamable(dataset.source, dataset.resize)
    if (shape := KNOWN_SHAPES.get(dataset.source)) is None:
        source, path, resize, validation = dataset.source, dataset.path, dataset.resize, dataset.validation
        try:
            raw = load_raw(source, path, resize=resize, validation=validation, copies=2, streamed=streamed)
        except MissingImagesError as failure:
            remedy = f"{failure.remedy}, or plan without the images: --data-shape CxHxW,CLASSES,IMAGES"
            raise MissingImagesError(failure.fact, failure.cause, remedy) from None
        images = len(raw.train) + len(raw.validation)
        return DataShape((raw.channels, *raw.size), raw.classes, images, len(raw.test), streamed, len(raw.validation))
    if dataset.resize is not None:
        shape = replace(shape, image=(shape.image[0], dataset.resize, dataset.resize), is_streamed=streamed)
        if here and not streamed:
            require_memory(shape.training_images, shape.image, copies=2)
    if dataset.mean is not None:
        require_per_channel(dataset.mean, shape.image[0])
    return shape


def fitting_cost(dataset: DatasetConfig, shape: DataShape) -> FitCost:
    """Estimated memory, minutes and disk space of fitting a recipe's normalisation to its training images.

    Images set aside for validation are not fitted.
    """
    return FitCost.of(dataset.resolved(shape.image[1:]).kind, shape.image, shape.trained(dataset))


@functools.lru_cache(maxsize=64)
def prior_cost(prior: PriorConfig, image: tuple[int, int, int]) -> tuple[ImageCost, int]:
    """Memory and operations of decoding one image with a prior's decoder, and the number of an image's latents.

    Raises:
        ConfigError: a user's function returns no decoder for images of this shape.
    """
    decoder = build_decoder(prior, image, seed=0)
    return image_cost(decoder, latent_shape(decoder)), math.prod(latent_shape(decoder))


def network_cost(config: RunConfig, shape: DataShape) -> ImageCost:
    """Memory and operations of one image in a forward pass through the recipe's main network, `config.network`."""
    return cost_and_stacking(config.network.for_images(shape.image[0], shape.image[1:], shape.classes))[0]
