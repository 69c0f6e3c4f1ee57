"""Distribution matching (DM, arXiv 2110.04181): equal mean embeddings of real and synthetic images, class by class.

    L = sum over classes c of | mean psi(A_c(real images of c)) - mean psi(A_c(synthetic images of c)) |^2

psi, the embedding, is the classifier's input in a network with random parameters, drawn anew in every iteration. A_c is
one augmentation operation of DSA, with the same parameters for all real and synthetic images of a class. Every class
has its own loss, so classes can be divided over workers without sums between them. A mean may be added up over
micro-batches, which changes nothing but rounding. Nearly all time goes into the embeddings of real images, which need
no derivative.

Shapes: n synthetic images of this process, m real images of a class, b images of a micro-batch, c h w image, d numbers
of an embedding, p parameters of a network.
Tests: tests/methods/test_distribution.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn.functional import pad

from datm_ray.core.compute.compilation import CompiledForShapes, compiled_facts, compiler_problem
from datm_ray.core.compute.precision import Precision, tf32_products
from datm_ray.core.images.augment import Augmentation, augment, draw_augmentation
from datm_ray.core.networks.instance_norm import set_explicit
from datm_ray.core.networks.parameters import FlatNetwork, flatten, flatten_buffers
from datm_ray.core.networks.registry import embedding
from datm_ray.core.randomness import Purpose, generator
from datm_ray.errors import ConfigError


def draw_shared(strategy: str, seed: int, iteration: int, label: int) -> Augmentation:
    """Draw the augmentation of one class in one iteration: one operation, with the same parameters for all its images.

    Args:
        strategy: augmentation operations, such as "crop_flip", from which one is drawn; "" for none.
        seed: seed of the run.
        iteration: number of iterations done before this one.
        label: number of the class.
    """
    return draw_augmentation(strategy, 1, generator(seed, Purpose.SHARED_AUGMENTATION, iteration, label))


class EmbeddingFunctions:
    """Functions that compute embeddings of images by networks of one architecture, and derivatives of the embeddings.

    Attributes:
        note: one line on why the functions are not compiled although this was asked for; "" otherwise.
        is_compiled: True if the functions are compiled.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        compiled: bool = True,
        channels_last: bool = True,
        precision: Precision = "float32",
    ) -> None:
        """Prepare the functions for networks with the architecture and on the device of `network`.

        Args:
            network: gives the architecture, the device, and the values of its integer and boolean buffers. Its
                parameters are not read.
            compiled: True to compile if the machine can. Only a call with new shapes compiles.
            channels_last: True to keep images and feature maps in the memory format `torch.channels_last`.
            precision: precision of matrix products and convolutions. tf32 rounds their factors to 10 bits, on GPUs that
                support it. bfloat16 computes layers and their derivatives in bfloat16. Embeddings are returned in the
                parameters' type.
        """
        self.note = compiler_problem(next(network.parameters()).device.type) if compiled else ""
        self.is_compiled = compiled and not self.note
        self._order = torch.channels_last if channels_last else torch.contiguous_format
        self._precision = precision
        network = copy.deepcopy(network)
        set_explicit(network, self.is_compiled)
        self._network = FlatNetwork(_Embedding(network))
        self._fixed = _whole_numbers(network)
        self._forward: Callable[..., Tensor] = self._embed
        self._reverse: Callable[..., Tensor] = self._differentiate
        if self.is_compiled:
            self._forward = CompiledForShapes(self._embed, channels_last=channels_last)
            self._reverse = CompiledForShapes(self._differentiate, channels_last=channels_last)

    @property
    def facts(self) -> dict[str, str | bool]:
        """Options in use, as plain data: "precision", "compiled" and, if it cannot compile, "not_compiled_because"."""
        return {"precision": self._precision} | compiled_facts(self.is_compiled, self.note)

    def values_of(self, network: nn.Module) -> Tensor:
        """Parameters of a network, then its floating-point buffers, as one vector [p] for `forward` and `reverse`.

        Raises:
            ConfigError: an integer or boolean buffer differs from that of the network given to `__init__`.
        """
        theirs = _whole_numbers(network)
        if any(not torch.equal(theirs[name], own) for name, own in self._fixed.items()):
            raise ConfigError(
                f"{type(network).__name__} draws buffers of whole numbers, such as places of pixels",
                "the method has fresh parameters in each iteration, and such buffers stay",
                "draw them from a seed of their own, so that they are equal in all networks",
            )
        return torch.cat([flatten(network), flatten_buffers(network)])

    def forward(self, values: Tensor, images: Tensor, size: int) -> Tensor:
        """Compute the embeddings [b d] of images [b c h w].

        Args:
            values: [p] parameters and buffers of the network, from `values_of`.
            images: at most `size` images.
            size: number of images to which compiled functions pad the batch with zeros, so that one shape is compiled.
        """
        with torch.no_grad(), tf32_products(self._precision == "tf32", values.device):
            return self._forward(values, self._arranged(images, size))[: len(images)]

    def reverse(self, values: Tensor, images: Tensor, direction: Tensor, size: int) -> Tensor:
        """Derivative [b c h w] of the sum of scalar products of embeddings and `direction` with respect to the images.

        Args:
            direction: [d] vector. Its scalar product with each embedding is differentiated.
            values, images, size: as for `forward`: the network, at most `size` images, and the padded size.
        """
        with tf32_products(self._precision == "tf32", values.device):
            return self._reverse(values, self._arranged(images, size), direction)[: len(images)]

    def _arranged(self, images: Tensor, size: int) -> Tensor:
        if self.is_compiled and len(images) < size:
            images = pad(images, (0, 0) * 3 + (0, size - len(images)))
        return images.contiguous(memory_format=self._order)

    def _embed(self, values: Tensor, images: Tensor) -> Tensor:
        kind = torch.bfloat16 if self._precision == "bfloat16" else values.dtype
        parameters, buffers = values.to(kind).split([self._network.count, len(values) - self._network.count])
        return self._network.with_buffers(parameters, buffers, images.to(kind)).to(values.dtype)

    def _differentiate(self, values: Tensor, images: Tensor, direction: Tensor) -> Tensor:
        gradient: Tensor = grad(lambda images: (self._embed(values, images) @ direction).sum())(images)
        return gradient


def _whole_numbers(network: nn.Module) -> dict[str, Tensor]:
    """Buffers of a network that hold whole numbers or booleans: name -> values."""
    return {name: buffer for name, buffer in network.named_buffers() if not buffer.is_floating_point()}


class _Embedding(nn.Module):
    """A network as a module that returns embeddings, the input of its classifier, in place of logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return embedding(self.network, images)


def even_size(count: int, most: int) -> int:
    """Size of the largest micro-batch if `count` images are split as evenly as possible, at most `most` in each."""
    return math.ceil(count / math.ceil(count / most))


def distance_and_gradient(
    functions: EmbeddingFunctions,
    values: Tensor,
    synthetic: Tensor,
    real: Iterable[Tensor],
    augmentations: Sequence[Augmentation],
    sizes: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Compute DM's loss [] with one network, and its exact gradient [n c h w] with respect to the synthetic images.

    At any time, memory holds the real images of one class only, and the graph of one micro-batch only.

    Args:
        functions: functions for the network's architecture.
        values: [p] parameters and buffers of the network, from `EmbeddingFunctions.values_of`.
        synthetic: [n c h w] images, class by class, the same number of each class.
        real: for each class, its real images [m c h w].
        augmentations: for each class, the augmentation of `draw_shared` that is applied to all its images.
        sizes: largest number of synthetic images, and of real images, in a micro-batch.
    """
    gradient, loss, (own, theirs) = torch.zeros_like(synthetic), synthetic.new_zeros(()), sizes
    parts = zip(synthetic.chunk(len(augmentations)), gradient.chunk(len(augmentations)), strict=True)
    for (images, derivative), others, augmentation in zip(parts, real, augmentations, strict=True):
        gap = _mean(functions, values, images, augmentation, own)
        gap -= _mean(functions, values, others, augmentation, theirs)
        loss += gap.square().sum()
        for piece, result in zip(images.split(own), derivative.split(own), strict=True):
            raw = piece.detach().requires_grad_()
            shown = augment(raw, repeated(augmentation, len(raw)))
            along = functions.reverse(values, shown.detach(), gap, own)
            result.copy_(torch.autograd.grad(shown, raw, along * (2 / len(images)))[0])
    return loss, gradient


@torch.no_grad()
def _mean(
    functions: EmbeddingFunctions, values: Tensor, images: Tensor, augmentation: Augmentation, size: int
) -> Tensor:
    """Mean embedding [d] of the augmented images, computed `size` images at a time.

    The augmentation has parameters for one image, and is applied with these to every image.
    """
    shown = (augment(part, repeated(augmentation, len(part))) for part in images.split(size))
    return torch.stack([functions.forward(values, part, size).sum(dim=0) for part in shown]).sum(dim=0) / len(images)


def repeated(augmentation: Augmentation, count: int) -> Augmentation:
    """Augmentation of `count` images that all get the parameters of `augmentation`, which has them for one image."""
    return augmentation.take(np.zeros(count, np.int64))
