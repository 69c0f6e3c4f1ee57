"""Training experts on the real data by SGD, or GSAM on top of SGD; several experts at a time.

Experts that are trained together (a stack) are computed by common calls, and share nothing else. Each expert has its
own initialisation, order of images and augmentation, and its values do not depend on the other experts. This module
stores nothing. Shapes: s experts, n images, b images of a batch, p parameters, q buffers.

GSAM is the optimiser of FTD and DATM (arXiv 2203.08065, with the adaptive scaling of arXiv 2102.11600). Let g be the
gradient at the parameters w, and g' the gradient at w + e, the worst point nearby, with e = rho t^2 g / |t g|. GSAM
descends along g' - alpha (part of g orthogonal to g'). Adaptive GSAM has t = |w|, otherwise t = 1.

Tests: tests/core/training/test_experts.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datm_ray.config import ExpertConfig
from datm_ray.core.images.batches import Images, batches
from datm_ray.core.networks.parameters import flatten, flatten_buffers
from datm_ray.core.networks.stack_trial import StackStep
from datm_ray.core.networks.stacked import filled_up
from datm_ray.core.training.curriculum import Curriculum
from datm_ray.core.training.rates import share_of_rate

SMALLEST_NORM = 1e-12
"""Constant added to norms of gradients, so that GSAM's divisions by them stay finite, as published."""


@dataclass
class ExpertState:
    """State of s experts that are trained together: everything that the next step depends on."""

    parameters: Tensor
    """Flat parameters of every expert [s p]."""
    buffers: Tensor
    """Flat buffers of every expert [s q], such as running statistics."""
    velocity: Tensor | None = None
    """Momentum's velocity [s p]; `None` without momentum or before the first step."""
    epoch: int = 0
    """Number of epochs done."""
    step: int = 0
    """Number of steps done."""

    @classmethod
    def initial(cls, networks: Sequence[nn.Module]) -> ExpertState:
        """Make the state before the first step, from the parameters and buffers of the networks."""
        parameters = torch.stack([flatten(network) for network in networks])
        return cls(parameters, torch.stack([flatten_buffers(network) for network in networks]))


def stack_steps(
    functions: StackStep,
    images: Sequence[Images],
    labels: Sequence[Tensor],
    settings: ExpertConfig,
    seeds: Sequence[int],
    state: ExpertState,
    rates: Sequence[float] | None = None,
    curriculum: Curriculum | None = None,
) -> Iterator[Tensor | None]:
    """Train s networks together, each on its own images, step by step.

    Yields the mean losses [s] of the epoch after its last step, and `None` after every other step. Only after an
    epoch's last step is the state one that a training can resume from.

    Args:
        functions: computes the losses and gradients of the s networks in each step.
        images: images [n c h w] of each network.
        labels: classes [n] int64 or probabilities [n k] of each network's images, on the device.
        settings: optimiser, learning rate, epochs, batch size, augmentation.
        seeds: seed of each network's order and augmentation.
        state: changed in place by every step.
        rates: highest learning rate of each network; `None` for `settings.learning_rate`.
        curriculum: which images an epoch has; `None` for all images in every epoch.
    """
    count, rates = len(images[0]), rates or [settings.learning_rate] * len(seeds)
    seen = None if curriculum is None else curriculum.rows
    size, done = min(settings.batch_size, count), 0
    steps, warmup = (
        steps_of(settings, count, epochs, curriculum) for epochs in (settings.epochs, settings.warmup_epochs)
    )
    total, whole = state.parameters.new_zeros(len(seeds)), state.parameters.new_full((size,), 1 / size)
    for batch in batches(
        images,
        labels,
        seeds,
        range(state.epoch, settings.epochs),
        settings.batch_size,
        settings.augmentation,
        seen,
    ):
        rows = batch.images.shape[1]
        weights = whole if rows == size else whole.new_full((rows,), 1 / rows)
        missing = size - rows if functions.fills_up else 0
        share = share_of_rate(state.step, steps, warmup, cosine=settings.schedule == "cosine")
        now = [rate * share for rate in rates]
        losses = _step(functions, state, settings, now, *filled_up(batch.images, batch.targets, weights, missing))
        total.add_(losses, alpha=rows)
        done += rows
        if batch.is_last:
            state.epoch += 1
            yield total / done
            total.zero_()
            done = 0
        else:
            yield None


def steps_of(settings: ExpertConfig, count: int, epochs: int, curriculum: Curriculum | None = None) -> int:
    """Number of steps in the first `epochs` epochs of one expert's training on `count` images.

    Args:
        settings: section `experts` of the recipe, which gives the batch size.
        curriculum: which images an epoch has; `None` for all images in every epoch.
    """
    if curriculum is None:
        return epochs * -(-count // settings.batch_size)
    return sum(-(-len(curriculum.rows(epoch)) // settings.batch_size) for epoch in range(epochs))


def _step(
    functions: StackStep,
    state: ExpertState,
    settings: ExpertConfig,
    rates: Sequence[float],
    images: Tensor,
    labels: Tensor,
    weights: Tensor,
) -> Tensor:
    """Update `state` in place by one step of every expert. Returns each expert's loss [s] before the step.

    Args:
        rates: learning rate of each expert in this step.
        images: [s b c h w] images of each expert.
        labels: [s b] classes, or [s b k] probabilities.
        weights: [b] weights of the images in every expert's loss.
    """
    parameters = state.parameters
    losses, gradient, state.buffers = functions(parameters, state.buffers, images, labels, weights)
    if settings.optimiser == "gsam":
        there = parameters + perturbation(parameters, gradient, settings)
        # The second pass's buffers are dropped, because the first pass already counted the batch's statistics.
        _, sharp, _ = functions(there, state.buffers, images, labels, weights)
        gradient = descent(gradient, sharp, settings)
    # The calls of torch.optim.SGD, which round as it does. A sum with alpha is one pass, and rounds once.
    if settings.weight_decay:
        gradient = torch.add(gradient, parameters, alpha=settings.weight_decay)
    if settings.momentum:
        velocity = state.velocity
        gradient = state.velocity = gradient if velocity is None else (settings.momentum * velocity).add_(gradient)
    state.parameters = _descended(parameters, gradient, rates)
    state.step += 1
    return losses


def _descended(parameters: Tensor, gradient: Tensor, rates: Sequence[float]) -> Tensor:
    """Parameters [s p] minus each network's rate times its gradient [s p].

    Each network gets the same bits as if it were computed alone.
    """
    if len(set(rates)) == 1:
        return torch.sub(parameters, gradient, alpha=rates[0])
    after = torch.empty_like(parameters)
    for number, rate in enumerate(rates):  # multiplying by a tensor of rates would round once more
        torch.sub(parameters[number], gradient[number], alpha=rate, out=after[number])
    return after


def perturbation(parameters: Tensor, gradient: Tensor, settings: ExpertConfig) -> Tensor:
    """Compute SAM's step [s p] from the parameters [s p], at which `gradient` [s p] is taken, to the worst point
    nearby.

    The point has the largest loss to first order. `settings` give the step's length `rho`, and whether it is
    `adaptive`.
    """
    if not settings.adaptive:
        return gradient * (settings.rho / (_norm(gradient) + SMALLEST_NORM))
    scale = parameters.abs()
    return scale.square() * gradient * (settings.rho / (_norm(scale * gradient) + SMALLEST_NORM))


def descent(gradient: Tensor, sharp: Tensor, settings: ExpertConfig) -> Tensor:
    """Compute GSAM's gradient [s p]: `sharp` minus alpha times the part of `gradient` that is orthogonal to `sharp`.

    Args:
        gradient: [s p] gradient at the parameters.
        sharp: [s p] gradient at the worst point nearby: the parameters plus `perturbation`.
    """
    unit = sharp / (_norm(sharp) + SMALLEST_NORM)
    across = gradient - (gradient * unit).sum(dim=1, keepdim=True) * unit
    return sharp - settings.alpha * across


def _norm(vectors: Tensor) -> Tensor:
    lengths: Tensor = vectors.norm(dim=1, keepdim=True)
    return lengths
