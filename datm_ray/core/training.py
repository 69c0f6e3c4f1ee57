"""The plain training loop of networks that are scored, and accuracy.

Data and augmentation stay on the device and are batched; there is no per-sample loader. Shapes: n images, k classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from datm_ray.core.augment import augment, draw_augmentation
from datm_ray.core.randomness import Purpose, generator

Heartbeat = Callable[[], None]
"""Heartbeat callback, called regularly during long work, so that waiting workers know it is running."""


SCORING_BATCH = 250
"""Images that are scored at a time; a thousand of 64x64 would take 4 GB."""


def no_heartbeat() -> None:
    """Send no heartbeat."""


@dataclass(frozen=True)
class Schedule:
    """How a network that is scored is trained: SGD or AdamW, with at most one decay of the learning rate."""

    epochs: int
    """Passes over the images."""
    batch_size: int
    """Images per step; the last, smaller batch is kept."""
    learning_rate: float
    """Step size of the updates."""
    momentum: float = 0.0
    """SGD's momentum; 0 for none."""
    weight_decay: float = 0.0
    """L2 penalty."""
    augmentation: str = ""
    """DSA operations joined by underscores; "" for none."""
    decay_epoch: int | None = None
    """Epoch before which the learning rate is divided by ten; the momentum is lost there, as published."""
    optimiser: Literal["sgd", "adamw"] = "sgd"
    """adamw has its own momenta, 0.9 and 0.999."""

    def with_adamw(self) -> Schedule:
        """This training by AdamW, with AdamW's weight decay."""
        return dataclasses.replace(self, optimiser="adamw", weight_decay=ADAMW_WEIGHT_DECAY)

    def augment(self, images: Tensor, random: np.random.Generator | None = None) -> Tensor:
        """Augment a batch [b c h w] with one operation of `augmentation`, drawn anew in each call.

        Args:
            images: normalised images; they stay as they are.
            random: source of the draws; None follows torch's seed.
        """
        random = random or np.random.default_rng(int(torch.randint(2**62, ())))
        return augment(images, draw_augmentation(self.augmentation, len(images), random))


PROTOCOLS: dict[str, Schedule] = {
    "published": Schedule(1001, 128, 0.01, momentum=0.9, weight_decay=5e-4, decay_epoch=502),
    "short": Schedule(500, 128, 0.01, momentum=0.9, weight_decay=5e-4, decay_epoch=251),
    "brief": Schedule(200, 128, 0.01, momentum=0.9, weight_decay=5e-4, decay_epoch=101),
    "quick": Schedule(20, 128, 0.01, momentum=0.9, weight_decay=5e-4, decay_epoch=11),
}
"""Evaluation protocols by name; learning rate and augmentation are replaced by the run's own."""

ADAMW_WEIGHT_DECAY = 0.05
"""Weight decay of AdamW, a usual value for transformers."""


def validation_protocol(evaluation: str) -> str:
    """Name of the protocol that trains networks for validation in a run with this evaluation protocol."""
    return "short" if evaluation == "published" else evaluation


@dataclass(frozen=True)
class Epoch:
    """What one epoch of training did."""

    number: int
    """Counted from 1."""
    step: int
    """SGD steps so far."""
    loss: float
    """Mean over the epoch's images."""


def train(network: nn.Module, images: Tensor, targets: Tensor, schedule: Schedule, seed: int) -> Iterator[Epoch]:
    """Train the network in place, epoch by epoch.

    Args:
        images: [n c h w], normalised.
        targets: [n] int64 classes, or [n k] logits of soft labels.
        seed: of order and augmentation.
    """
    if targets.is_floating_point():
        targets = targets.softmax(dim=1)
    optimizer = _optimizer(network, schedule, schedule.learning_rate)
    network.train()
    step = 0
    for epoch in range(schedule.epochs):
        if epoch == schedule.decay_epoch:
            optimizer = _optimizer(network, schedule, schedule.learning_rate / 10)
        order = torch.from_numpy(generator(seed, Purpose.TRAINING_ORDER, epoch).permutation(len(images)))
        total = torch.zeros((), device=images.device)
        for batch, rows in enumerate(order.to(images.device).split(schedule.batch_size)):
            inputs = schedule.augment(images[rows], generator(seed, Purpose.TRAINING_AUGMENTATION, epoch, batch))
            loss = cross_entropy(network(inputs), targets[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(rows)
            step += 1
        yield Epoch(epoch + 1, step, float(total) / len(images))


@torch.no_grad()
def predict_logits(
    network: nn.Module, images: Tensor, heartbeat: Heartbeat = no_heartbeat, *, batch_size: int = SCORING_BATCH
) -> Tensor:
    """Logits [n k] in evaluation mode, so many images at a time."""
    was_training = network.training
    network.eval()
    logits = []
    for chunk in images.split(batch_size):
        logits.append(network(chunk))
        heartbeat()
    network.train(was_training)
    return torch.cat(logits)


def accuracy(network: nn.Module, images: Tensor, labels: Tensor, heartbeat: Heartbeat = no_heartbeat) -> float:
    """Share of the images [n c h w] that are classified as their labels [n], in [0, 1]."""
    return float((predict_logits(network, images, heartbeat).argmax(dim=1) == labels).float().mean())


def train_to_end(network: nn.Module, images: Tensor, targets: Tensor, schedule: Schedule, seed: int) -> Epoch:
    """Train for the whole schedule. Returns the last epoch."""
    epoch = Epoch(0, 0, float("nan"))
    for epoch in train(network, images, targets, schedule, seed):  # noqa: B007
        pass
    return epoch


def _optimizer(network: nn.Module, schedule: Schedule, learning_rate: float) -> torch.optim.Optimizer:
    if schedule.optimiser == "adamw":
        return torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=schedule.weight_decay)
    return torch.optim.SGD(
        network.parameters(),
        lr=learning_rate,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
    )
