"""Trainings by whole epochs, and the accuracy of a network. The package does the same in steps, to report meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor, nn

from datm_ray.config import ExpertConfig
from datm_ray.core.images.batches import Images
from datm_ray.core.networks.stack_trial import StackStep
from datm_ray.core.steps import result_of
from datm_ray.core.training.curriculum import Curriculum
from datm_ray.core.training.experts import ExpertState, stack_steps
from datm_ray.core.training.loop import NetworkState, Training, TrainingState, accuracy_in_steps, train_steps
from datm_ray.core.training.teacher import Lessons

Epoch = TypeVar("Epoch")


def by_epoch(steps: Iterable[Epoch | None]) -> Iterator[Epoch]:
    """Yield what a training yields after the last step of each epoch; after other steps it yields None."""
    return (each for each in steps if each is not None)


def train(training: Training, lessons: Lessons | None = None, saved: TrainingState | None = None) -> NetworkState:
    """Train a network in place to the end of its schedule. Returns the last state."""
    return list(by_epoch(train_steps(training, lessons, saved)))[-1]


def train_experts(
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


def accuracy(network: nn.Module, images: Images, labels: Tensor) -> float:
    """Share of the images that the network classifies as their labels."""
    return result_of(accuracy_in_steps(network, images, labels))
