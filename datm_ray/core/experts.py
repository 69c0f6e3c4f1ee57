"""Training experts: SGD, or GSAM on top of it, on the real data; several experts at a time.

The experts of a stack share every call and nothing else: each has its own initialisation, order of images and
augmentation, and its numbers do not depend on whose the others are. What they are trained for, where their epochs go
and how many are stacked is decided elsewhere. Shapes: s experts, n images, b of a batch, p parameters, q buffers.

GSAM is the optimiser of FTD and DATM (arXiv 2203.08065, with the adaptive scaling of arXiv 2102.11600). Let g be the
gradient at the parameters w, and g' that at w + e, the worst point nearby, with e = rho t^2 g / |t g|. GSAM descends
along g' - alpha (part of g orthogonal to g'). If it is adaptive, t = |w|, else t = 1.

Tests: tests/core/test_experts.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, grad_and_value, vmap
from torch.nn.functional import pad

from datm_ray.config import ExpertConfig
from datm_ray.core.augment import augment, draw_augmentation
from datm_ray.core.compilation import Compiled, compiler_problem, traced
from datm_ray.core.networks.image_cost import image_cost
from datm_ray.core.networks.instance_norm import InstanceNorm
from datm_ray.core.networks.parameters import FlatNetwork, flatten, flatten_buffers
from datm_ray.core.networks.registry import couples_samples
from datm_ray.core.networks.stacked import StackedNetwork, can_be_stacked
from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.torch_compat import BatchNorm, shapes_only

SMALLEST_NORM = 1e-12
"""Keeps GSAM's division by a norm finite, as published."""
CACHED_MAP_BYTES = 10 * 2**20
"""Bytes that the largest map of one call may have on a CPU: 20 images of 32x32 with 128 channels."""
STACKED_MAP_BYTES = 3 * 2**19
"""Bytes that the largest map of a stack's whole batch may have on a CPU, so that it stays in the second-level cache.

Measured with experts of digits at batch 32: six ran 1.9 times as fast as one, eight, above this size, 1.2 times."""
LARGEST_STACK = 8


@dataclass
class ExpertState:
    """A stack of experts in training: all that the next step depends on."""

    parameters: Tensor
    """Flat parameters of every expert [s p]."""
    buffers: Tensor
    """Flat buffers of every expert [s q], such as running statistics."""
    velocity: Tensor | None = None
    """Momentum's velocity [s p]; `None` without momentum or before the first step."""
    epoch: int = 0
    """Epochs done."""
    step: int = 0
    """Steps done."""

    @classmethod
    def initial(cls, networks: Sequence[nn.Module]) -> ExpertState:
        """State before the first step, with the networks' own parameters and buffers."""
        parameters = torch.stack([flatten(network) for network in networks])
        return cls(parameters, torch.stack([flatten_buffers(network) for network in networks]))


class ExpertFunctions:
    """Loss and gradient of a stack of networks of one kind, compiled where the machine can.

    Attributes:
        note: one line on why the function is not compiled although asked to be; "" otherwise.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        stacked: int = 1,
        compile_: bool = True,
        chunk: int | None = None,
        channels_last: bool = True,
    ) -> None:
        """Prepare stacks of so many networks like this one.

        Args:
            chunk: images of one call; a batch takes several, and their sums. None takes every batch whole.
            channels_last: keep maps with their channels innermost, which is faster on CPUs and rounds more coarsely.
        """
        self._channels_last = channels_last
        self.note = compiler_problem(next(network.parameters()).device.type) if compile_ else ""
        # Statistics of a batch are written in place, which a traced graph may not do.
        self._has_statistics = couples_samples(network)
        self._is_compiled = compile_ and not self.note and not self._has_statistics
        network = _without_counters(network)
        self._chunk = None if self._has_statistics else chunk
        self._network = FlatNetwork(network)
        self._stacked = StackedNetwork(self._network) if can_be_stacked(network) else None
        for part in network.modules():
            if isinstance(part, InstanceNorm):
                part.explicit = self._is_compiled and (stacked == 1 or self._stacked is not None)
        self._built: dict[tuple[torch.Size, ...], Callable[..., tuple[Tensor, Tensor]]] = {}

    @property
    def fills_up(self) -> bool:
        """True if a batch may be filled up with images of no weight, so that all batches have one size."""
        return self._is_compiled

    def __call__(
        self, parameters: Tensor, buffers: Tensor, images: Tensor, labels: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [s], their gradients [s p], and the buffers [s q] afterwards.

        Args:
            parameters: [s p].
            buffers: [s q].
            images: [s b c h w].
            labels: [s b] int64.
            weights: [b] of the images in every loss.
        """
        if self._has_statistics:
            return self._with_statistics(parameters, buffers, images, labels, weights)
        calls = math.ceil(len(weights) / (self._chunk or len(weights)))
        size = math.ceil(len(weights) / calls)
        missing = calls * size - len(weights)
        images, labels, weights = _filled_up(images, labels, weights, missing)
        parts = [
            self._part(parameters, part, labels[:, first : first + size], weights[first : first + size])
            for first, part in zip(range(0, calls * size, size), images.split(size, dim=1), strict=True)
        ]
        losses, gradients = parts[0]
        for loss, gradient in parts[1:]:
            losses, gradients = losses + loss, gradients.add_(gradient)
        return losses, gradients, buffers

    def _part(self, parameters: Tensor, images: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        # Under vmap torch 2.11 cannot put channels innermost, which group norms ask for where their input's are.
        is_mapped = len(parameters) > 1 and self._stacked is None
        innermost = self._channels_last and not is_mapped
        images, labels = _channels_innermost(images) if innermost else images.contiguous(), labels.contiguous()
        return self._function(parameters, images, labels)(parameters, images, labels, weights)

    def _function(self, parameters: Tensor, images: Tensor, labels: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        if not self._is_compiled:
            return self._all
        key = (parameters.shape, images.shape)
        if key not in self._built:
            with shapes_only():
                like = (torch.empty_like(parameters), torch.empty_like(images), torch.empty_like(labels))
                graph = traced(self._all, *like, like[0].new_empty(images.shape[1]))
            self._built[key] = Compiled(graph, parameters.device.type, channels_last=self._channels_last)
        return self._built[key]

    def _all(self, parameters: Tensor, images: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if len(parameters) == 1:
            loss, gradient = self._one(parameters[0], images[0], labels[0], weights)
            return loss[None], gradient[None]
        if self._stacked is not None:
            return self._side_by_side(self._stacked, parameters, images, labels, weights)
        losses, gradients = vmap(self._one, in_dims=(0, 0, 0, None))(parameters, images, labels, weights)
        return losses, gradients

    def _side_by_side(
        self, network: StackedNetwork, parameters: Tensor, images: Tensor, labels: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        def total(parameters: Tensor) -> tuple[Tensor, Tensor]:
            # No loss depends on another expert's parameters, so the gradient of the sum holds each one's own.
            losses = _losses(network(parameters, images), labels, weights)
            return losses.sum(), losses

        gradients, losses = grad(total, has_aux=True)(parameters)
        return losses, gradients

    def _one(self, theta: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        gradient, loss = grad_and_value(lambda theta: _losses(self._network(theta, x), y, weights))(theta)
        return loss, gradient

    def _with_statistics(
        self, parameters: Tensor, buffers: Tensor, images: Tensor, labels: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        after = buffers.clone()
        losses, gradients = [], []
        for theta, own, x, y in zip(parameters, after, images, labels, strict=True):
            theta = theta.detach().requires_grad_()
            loss = _losses(self._network.with_buffers(theta, own, x), y, weights)
            gradients.append(torch.autograd.grad(loss, theta)[0])
            losses.append(loss.detach())
        return torch.stack(losses), torch.stack(gradients), after


def chunk_in_cache(network: nn.Module, image: tuple[int, int, int], stacked: int) -> int:
    """Number of images per call with which the largest map fits the CPU's cache; at least 1."""
    return max(1, CACHED_MAP_BYTES // (stacked * image_cost(network, image).largest))


def train_experts(
    functions: ExpertFunctions,
    images: Tensor,
    labels: Tensor,
    settings: ExpertConfig,
    seeds: Sequence[int],
    state: ExpertState,
) -> Iterator[Tensor]:
    """Train the stack from where it is to the end; after every epoch, its mean losses [s], with `state` up to date.

    Args:
        images: [n c h w], normalised.
        labels: [n] int64.
        seeds: of each expert's order and augmentation.
        state: changed in place.
    """
    while state.epoch < settings.epochs:
        orders = torch.stack([_order(seed, state.epoch, len(images)) for seed in seeds]).to(images.device)
        total = images.new_zeros(len(seeds))
        whole = images.new_full((min(settings.batch_size, len(images)),), 1 / min(settings.batch_size, len(images)))
        for batch, rows in enumerate(orders.split(settings.batch_size, dim=1)):
            count = rows.shape[1]
            weights = whole if count == len(whole) else images.new_full((count,), 1 / count)
            missing = len(whole) - count if functions.fills_up else 0
            drawn = _drawn(images, rows, settings.augmentation, seeds, state.epoch, batch)
            losses = _step(functions, state, settings, *_filled_up(drawn, labels[rows], weights, missing))
            total.add_(losses, alpha=count)
        state.epoch += 1
        yield total / len(images)


def _filled_up(images: Tensor, labels: Tensor, weights: Tensor, missing: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images [s b c h w], labels [s b] and weights [b], filled up with `missing` images of weight zero."""
    if not missing:  # padding by nothing would copy
        return images, labels, weights
    return pad(images, (0, 0) * 3 + (0, missing)), pad(labels, (0, missing)), pad(weights, (0, missing))


def _order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.from_numpy(generator(seed, Purpose.TRAINING_ORDER, epoch).permutation(count))


def _drawn(images: Tensor, rows: Tensor, augmentation: str, seeds: Sequence[int], epoch: int, batch: int) -> Tensor:
    """[s b c h w] every expert's own images, augmented with its own draws."""
    drawn = images[rows]
    if not augmentation:
        return drawn
    count = rows.shape[1]
    draws = [
        draw_augmentation(augmentation, count, generator(seed, Purpose.TRAINING_AUGMENTATION, epoch, batch))
        for seed in seeds
    ]
    return torch.stack([augment(own, draw) for own, draw in zip(drawn, draws, strict=True)])


def _step(
    functions: ExpertFunctions,
    state: ExpertState,
    settings: ExpertConfig,
    images: Tensor,
    labels: Tensor,
    weights: Tensor,
) -> Tensor:
    """One step of every expert; the losses [s] before it."""
    parameters = state.parameters
    losses, gradient, state.buffers = functions(parameters, state.buffers, images, labels, weights)
    if settings.optimiser == "gsam":
        there = parameters + perturbation(parameters, gradient, settings)
        # The statistics of the batch were counted already.
        _, sharp, _ = functions(there, state.buffers, images, labels, weights)
        gradient = descent(gradient, sharp, settings)
    if settings.weight_decay:
        gradient = gradient + settings.weight_decay * parameters
    if settings.momentum:
        velocity = state.velocity
        gradient = state.velocity = gradient if velocity is None else settings.momentum * velocity + gradient
    state.parameters = torch.sub(parameters, gradient, alpha=settings.learning_rate)
    state.step += 1
    return losses


def perturbation(parameters: Tensor, gradient: Tensor, settings: ExpertConfig) -> Tensor:
    """e [s p], the step to the worst point near the parameters [s p] to first order."""
    if not settings.adaptive:
        return gradient * (settings.rho / (_norm(gradient) + SMALLEST_NORM))
    scale = parameters.abs()
    return scale.square() * gradient * (settings.rho / (_norm(scale * gradient) + SMALLEST_NORM))


def descent(gradient: Tensor, sharp: Tensor, settings: ExpertConfig) -> Tensor:
    """The direction [s p] that GSAM descends along, from the gradients at w and at w + e."""
    unit = sharp / (_norm(sharp) + SMALLEST_NORM)
    across = gradient - (gradient * unit).sum(dim=1, keepdim=True) * unit
    return sharp - settings.alpha * across


def _norm(vectors: Tensor) -> Tensor:
    lengths: Tensor = vectors.norm(dim=1, keepdim=True)
    return lengths


def _channels_innermost(images: Tensor) -> Tensor:
    """Images [s b c h w], copied so that memory has the order [b h w s c].

    Stacked, a network's convolutions are one with a group for each expert, which reads [b, s c, h, w]: in this order of
    memory without a copy, and on CPUs in less than half the time (benchmarks/LOG.md).
    """
    return images.permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2)


def _losses(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """[s], or [] of one network: weighted sums of the cross-entropy of logits [s b k] at labels [s b]."""
    per_sample = -logits.log_softmax(dim=-1).gather(-1, labels[..., None])[..., 0]
    sums: Tensor = (weights * per_sample).sum(dim=-1)
    return sums


def _without_counters(network: nn.Module) -> nn.Module:
    """A copy whose batch normalisations do not count their batches, for nothing here reads the count."""
    network = copy.deepcopy(network)
    for part in network.modules():
        if isinstance(part, BatchNorm):
            part.num_batches_tracked = None
    return network
