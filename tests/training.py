"""A training to its end, and the accuracy of a network. The package does the same in steps, to report meanwhile."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.epochs import by_epoch
from datm_ray.core.images.batches import Images
from datm_ray.core.steps import result_of
from datm_ray.core.training.loop import NetworkState, Training, TrainingState, accuracy_in_steps, train_steps
from datm_ray.core.training.teacher import Lessons


def train(training: Training, lessons: Lessons | None = None, saved: TrainingState | None = None) -> NetworkState:
    """Train a network in place to the end of its schedule. Returns the last state."""
    return list(by_epoch(train_steps(training, lessons, saved)))[-1]


def accuracy(network: nn.Module, images: Images, labels: Tensor) -> float:
    """Share of the images that the network classifies as their labels."""
    return result_of(accuracy_in_steps(network, images, labels))
