"""Trainings by whole epochs, as benchmarks time them and tests compare them. The package trains in steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from datm_ray.config import ExpertConfig
from datm_ray.core.images.batches import Images
from datm_ray.core.networks.stack_trial import StackStep
from datm_ray.core.training.curriculum import Curriculum
from datm_ray.core.training.experts import ExpertState, stack_steps

Epoch = TypeVar("Epoch")


def by_epoch(steps: Iterable[Epoch | None]) -> Iterator[Epoch]:
    """Yield what a training yields after the last step of each epoch; after other steps it yields None."""
    return (each for each in steps if each is not None)


def expert_epochs(
    functions: StackStep,
    images: Images,
    labels: Tensor,
    settings: ExpertConfig,
    seeds: Sequence[int],
    state: ExpertState,
    curriculum: Curriculum | None = None,
) -> Iterator[Tensor]:
    """Train experts together on the same images, and change their state in place. Yields the losses of each epoch."""
    own = [images] * len(seeds), [labels] * len(seeds)
    return by_epoch(stack_steps(functions, *own, settings, seeds, state, curriculum=curriculum))
