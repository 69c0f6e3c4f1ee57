"""A prior: a decoder makes a set's images from latents, and the latents are learned in place of the pixels (GLaD).

    images = N(G(latents)),    dL/dlatents = J^T dL/dimages

G is a decoder from latents to pixels, N the data set's normalisation, and J the derivative of N after G. A method
computes dL/dimages as without a prior, exactly. The product with J^T is exact too, and needs no graph but that of one
micro-batch through G. Networks here have no batch statistics, so each image depends on its own latents alone.

A `trained` decoder is half of an autoencoder of the data set's images, trained by Adam for the mean squared error of
pixels. An `untrained` decoder, the control, has the same architecture with its random initial parameters. Both ideas
are from GLaD (arXiv 2305.01649), whose generator is a pretrained StyleGAN-XL.

Shapes: n images, c h w an image, l a b the latents of one image, p parameters. Tests: tests/core/test_prior.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss

from datm_ray.config import PriorConfig
from datm_ray.config.plugins import imported
from datm_ray.core.networks.parameters import FlatNetwork, flatten
from datm_ray.core.randomness import Purpose, derive_seed, generator
from datm_ray.core.steps import Steps
from datm_ray.core.training.adam import adam_step
from datm_ray.core.training.rates import share_of_rate
from datm_ray.errors import ConfigError

if TYPE_CHECKING:
    from datm_ray.core.networks.image_cost import ImageCost

MICRO_BATCH_BYTES = 256 * 2**20
"""Largest size in bytes of what a decoder keeps for the derivative of one micro-batch; one image may take more."""
KEPT_MAPS = 2
"""Peak memory of a micro-batch in a decoder's forward and backward pass, as a multiple of the bytes that its layers
write in one forward pass."""
INVERSION_RATE = 0.1
"""Learning rate of Adam at the start of an inversion, which searches latents for given images. The rate falls along a
cosine to 0."""
MIDDLE = 0.5
"""Value of a pixel halfway between black (0) and white (1), which decoders add to their output."""


def halved(size: tuple[int, int], halvings: int) -> list[tuple[int, int]]:
    """Sizes (height, width): `size`, then `halvings` more, each half of the size before, rounded up."""
    sizes = [size]
    for _ in range(halvings):
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution that roughly keeps its input's variance, so images of untrained decoders vary with latents."""
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class Decoder(nn.Module):
    """Convolutional decoder from latents [n l a b] to pixels [n c h w], 0 for black and 1 for white, not clamped."""

    def __init__(self, image: tuple[int, int, int], settings: PriorConfig) -> None:
        super().__init__()
        self._sizes = halved(image[1:], settings.halvings)
        self.latent_shape = (settings.channels, *self._sizes[-1])
        """Shape (l, a, b) of one image's latents."""
        width, halvings = settings.width, settings.halvings
        self.first = _conv(settings.channels, width)
        self.doubling = nn.ModuleList(_conv(width, width) for _ in range(halvings))
        self.last = _conv(width, image[0])
        self.activation = nn.SiLU()

    def forward(self, latents: Tensor) -> Tensor:
        maps = self.activation(self.first(latents))
        for size, layer in zip(reversed(self._sizes[:-1]), self.doubling, strict=True):
            larger = interpolate(maps, scale_factor=2.0, mode="nearest")[:, :, : size[0], : size[1]]
            maps = self.activation(layer(larger))
        pixels: Tensor = MIDDLE + self.last(maps)
        return pixels


class Autoencoder(nn.Module):
    """Encoder from pixels [n c h w] to latents, and a `Decoder` back to pixels."""

    def __init__(self, image: tuple[int, int, int], settings: PriorConfig) -> None:
        super().__init__()
        width = settings.width
        layers: list[nn.Module] = [_conv(image[0], width), nn.SiLU()]
        for _ in range(settings.halvings):
            layers += [_conv(width, width, stride=2), nn.SiLU()]
        self.encoder = nn.Sequential(*layers, _conv(width, settings.channels))
        self.decoder = Decoder(image, settings)

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [n l a b] of pixels [n c h w]."""
        latents: Tensor = self.encoder(pixels - MIDDLE)
        return latents

    def forward(self, pixels: Tensor) -> Tensor:
        decoded: Tensor = self.decoder(self.encode(pixels))
        return decoded


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """Context in which the parameters that new modules draw depend on the seed of a run alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, Purpose.PRIOR))
        yield


def build_autoencoder(settings: PriorConfig, image: tuple[int, int, int], seed: int) -> Autoencoder:
    """Build an autoencoder for images of shape `image` (c, h, w). Its parameters are drawn from `seed` alone."""
    with _drawn_from(seed):
        return Autoencoder(image, settings)


def build_decoder(settings: PriorConfig, image: tuple[int, int, int], seed: int) -> nn.Module:
    """Build the untrained decoder that a recipe describes, or call the user's function that returns a decoder.

    Parameters that torch draws in the user's function depend on `seed` alone. `image` is the shape (c, h, w).

    Raises:
        ConfigError: the function cannot be imported, or does not return a decoder for images of this shape.
    """
    if settings.is_packaged:
        return build_autoencoder(settings, image, seed).decoder
    with _drawn_from(seed):
        decoder = imported("prior.kind", settings.kind)(image)
    if not isinstance(decoder, nn.Module) or not hasattr(decoder, "latent_shape"):
        raise ConfigError(
            f"prior.kind {settings.kind!r} returned {type(decoder).__name__}, which is no decoder",
            remedy="return a torch.nn.Module with an attribute latent_shape, the shape of one image's latents",
        )
    with torch.no_grad():
        found = tuple(decoder.eval()(torch.zeros(1, *latent_shape(decoder))).shape[1:])
    if found != tuple(image):
        raise ConfigError(
            f"the decoder of prior.kind {settings.kind!r} makes images of {found}, and the data has {tuple(image)}",
            remedy="its function is given the shape (channels, height, width): return a decoder for it",
        )
    return decoder


def latent_shape(decoder: nn.Module) -> tuple[int, ...]:
    """Shape of one image's latents, as the decoder's attribute `latent_shape` gives it."""
    return tuple(int(side) for side in decoder.latent_shape)  # type: ignore[union-attr]


def micro_batch(cost: ImageCost) -> int:
    """Number of images that pass through a decoder together: as many as `MICRO_BATCH_BYTES` allows, at least one.

    The number is the same on every machine.

    Args:
        cost: cost of the forward pass of one image's latents through the decoder.
    """
    return max(1, MICRO_BATCH_BYTES // (KEPT_MAPS * cost.maps))


@dataclass(frozen=True)
class Prior:
    """Decoder as a distillation uses it: makes normalised images from latents, and turns their gradients into gradients
    with respect to the latents.
    """

    network: nn.Module
    """Decoder and normalisation, frozen and in evaluation mode: latents [n l a b] to normalised images [n c h w]."""
    chunk: int
    """Number of images in a micro-batch: images that pass through the decoder together."""

    @classmethod
    def of(cls, decoder: nn.Module, normaliser: nn.Module, chunk: int) -> Prior:
        """Make a prior from two modules, which are frozen and put into evaluation mode.

        Args:
            decoder: makes pixels, 0 for black and 1 for white, from latents.
            normaliser: makes normalised images from pixels.
            chunk: number of images in a micro-batch: images that pass through the decoder together.
        """
        return cls(nn.Sequential(decoder, normaliser).eval().requires_grad_(False), chunk)

    @torch.no_grad()
    def render(self, latents: Tensor) -> Tensor:
        """Make the normalised images [n c h w] of latents [n l a b], without derivatives."""
        return torch.cat([self.network(part) for part in latents.split(self.chunk)])

    def pull_back(self, latents: Tensor, gradient: Tensor) -> Tensor:
        """Turn a gradient of a loss with respect to the images into the gradient with respect to the latents.

        Args:
            latents: [n l a b] latents of the images.
            gradient: [n c h w] gradient with respect to the images.

        Returns:
            [n l a b] gradient with respect to the latents.
        """
        found = []
        for part, along in zip(latents.split(self.chunk), gradient.split(self.chunk), strict=True):
            inner = part.detach().requires_grad_()
            found.append(torch.autograd.grad(self.network(inner), inner, along)[0])
        return torch.cat(found)

    def push_forward(self, latents: Tensor, direction: Tensor) -> Tensor:
        """First-order change [n c h w] of the normalised images if the latents change by `direction` [n l a b]."""
        found = []
        for part, along in zip(latents.split(self.chunk), direction.split(self.chunk), strict=True):
            inner = part.detach().requires_grad_()
            images = self.network(inner)
            weights = torch.zeros_like(images, requires_grad=True)
            (back,) = torch.autograd.grad(images, inner, weights, create_graph=True)  # J^T weights
            found.append(torch.autograd.grad(back, weights, along)[0])
        return torch.cat(found)

    def invert(self, images: Tensor, latents: Tensor, steps: int) -> Steps[Tensor]:
        """Find latents [n l a b] whose images are near the given images, by Adam on the squared error of the images.

        Yields `None` after each of Adam's steps, and returns the latents at the end.

        Args:
            images: [n c h w] normalised images.
            latents: [n l a b] latents at the start, which are not changed.
            steps: number of Adam's steps for each micro-batch.
        """
        found = []
        for part, start in zip(images.split(self.chunk), latents.split(self.chunk), strict=True):
            own = start.clone().requires_grad_()
            optimizer = torch.optim.Adam([own], INVERSION_RATE)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = INVERSION_RATE * share_of_rate(step, steps, cosine=True)
                (own.grad,) = torch.autograd.grad((self.network(own) - part).square().sum(), own)
                optimizer.step()
                yield
            found.append(own.detach())
        return torch.cat(found)


def draw_latents(shape: Sequence[int], seed: int) -> NDArray[np.float32]:
    """Draw random latents of a whole synthetic set: independent standard normal numbers of the shape (n, l, a, b).

    An inversion, which searches latents for given images, starts from them. `seed` is the run's.
    """
    return generator(derive_seed(seed, Purpose.PRIOR), Purpose.INITIAL_NOISE).standard_normal(tuple(shape), np.float32)


@dataclass
class AutoencoderState:
    """Autoencoder in training: parameters, Adam's moments, and the number of epochs done."""

    parameters: Tensor
    """[p] flat parameters of the autoencoder."""
    first: Tensor
    """[p] Adam's running mean of gradients."""
    second: Tensor
    """[p] Adam's running mean of squared gradients."""
    epoch: int = 0

    @classmethod
    def initial(cls, network: nn.Module) -> AutoencoderState:
        """State before the first epoch, with a copy of the network's parameters."""
        parameters = flatten(network)
        return cls(parameters, torch.zeros_like(parameters), torch.zeros_like(parameters))


def train_autoencoder(
    network: Autoencoder,
    pixels: Callable[[NDArray[np.int64]], Tensor],
    count: int,
    settings: PriorConfig,
    seed: int,
    state: AutoencoderState,
) -> Iterator[float | None]:
    """Train an autoencoder from `state.epoch` to the last epoch, and update `state` in place.

    Yields the epoch's mean squared error of pixels after its last step, and `None` after every other step. The learning
    rate falls along a cosine to 0. A training resumed after any epoch gives the same numbers.

    Args:
        network: architecture; its own parameters are not read.
        pixels: function from indices of training images to these images [n c h w], 0 for black and 1 for white.
        count: number of training images.
        settings: section `prior` of the recipe: epochs, batch size and learning rate.
        seed: seed of the run.
        state: parameters and moments, on the device that computes.
    """
    flat, own, rows = FlatNetwork(network), derive_seed(seed, Purpose.PRIOR), settings.batch_size
    steps = -(-count // rows)
    while state.epoch < settings.epochs:
        order, errors = generator(own, Purpose.TRAINING_ORDER, state.epoch).permutation(count), []
        for step in range(steps):
            images = pixels(order[step * rows : (step + 1) * rows])
            parameters = state.parameters.detach().requires_grad_()
            error = mse_loss(flat(parameters, images), images)
            (gradient,) = torch.autograd.grad(error, parameters)
            done, moments = state.epoch * steps + step, (state.first, state.second)
            rate = settings.learning_rate * share_of_rate(done, settings.epochs * steps, cosine=True)
            state.parameters, state.first, state.second = adam_step(state.parameters, gradient, moments, rate, done)
            errors.append(error.detach() * len(images))
            if step < steps - 1:
                yield None
        state.epoch += 1
        yield float(torch.stack(errors).sum()) / count
