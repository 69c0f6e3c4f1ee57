"""The plain training loop of networks that are scored, and accuracy.

Data and augmentation stay on the device and are batched; there is no per-sample loader. Shapes: n images, k classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from datm_ray.config import ExpertConfig
from datm_ray.core.augment import augment, draw_augmentation
from datm_ray.core.batches import batches
from datm_ray.core.experts import ExpertState, train_stack
from datm_ray.core.networks.image_cost import image_cost
from datm_ray.core.networks.parameters import unflatten_into
from datm_ray.core.networks.stacked import StackFunctions, can_be_stacked

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

    def rate(self, epoch: int) -> float:
        """Learning rate in an epoch, counted from 0."""
        is_late = self.decay_epoch is not None and epoch >= self.decay_epoch
        return self.learning_rate / 10 if is_late else self.learning_rate

    def augment(self, images: Tensor) -> Tensor:
        """Augment a batch [b c h w] with one operation of `augmentation`, drawn anew in each call by torch's seed."""
        random = np.random.default_rng(int(torch.randint(2**62, ())))
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
    optimizer = _optimizer(network, schedule, schedule.rate(0))
    network.train()
    total = torch.zeros((), device=targets.device)
    steps = batches([images], [targets], [seed], range(schedule.epochs), schedule.batch_size, schedule.augmentation)
    for step, (epoch, is_last, x, y) in enumerate(steps, start=1):
        loss = cross_entropy(network(x[0]), y[0])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach() * x.shape[1]
        if is_last:
            yield Epoch(epoch + 1, step, float(total) / len(images))
            total.zero_()
            if epoch + 1 == schedule.decay_epoch:
                optimizer = _optimizer(network, schedule, schedule.rate(epoch + 1))


STEP_OVERHEAD = 3e7
"""Operations of a forward pass that take as long as what a training step needs beside its images, on a CPU core."""
COMPILED_WORK = 5e10
"""Expected work of a training from which its networks are trained together. One after another they then take some seven
seconds of a CPU core, and a row with three step sizes three times as long; a compilation serves all rows of a run."""


def work_of_training(schedule: Schedule, images: int, flop: float) -> float:
    """Expected work of training one network on so many images, in operations of forward passes.

    Args:
        flop: operations of one image in a forward pass.
    """
    return schedule.epochs * (images * flop + -(-images // schedule.batch_size) * STEP_OVERHEAD)


def are_trained_together(
    network: nn.Module, networks: int, image: tuple[int, int, int], count: int, schedule: Schedule
) -> bool:
    """True if so many networks like this one are trained together where torch.compile works, see `Trainer`.

    Args:
        image: channels, height and width.
        count: number of images that each is trained on.
    """
    if networks == 1 or schedule.optimiser != "sgd" or not can_be_stacked(network):
        return False
    return networks * work_of_training(schedule, count, image_cost(network, image).flop) >= COMPILED_WORK


class Trainer:
    """Trains networks of one kind that start at the same time: together if that is faster, else one after another.

    Together means one compiled call for all of them in every step. Each network has the same images, order and
    augmentation as alone, and its numbers do not depend on whose the others are; sums are rounded differently.
    """

    def __init__(self, *, compile_: bool = True, channels_last: bool = True) -> None:
        self.note = ""
        """Why nothing is compiled although it would be worth it; "" otherwise."""
        self._compile, self._channels_last = compile_, channels_last
        self._functions: dict[tuple[str, int], StackFunctions] = {}
        """What is compiled, for all trainings of this worker."""

    def train(
        self,
        networks: Sequence[nn.Module],
        images: Sequence[Tensor],
        targets: Sequence[Tensor],
        schedule: Schedule,
        seeds: Sequence[int],
    ) -> Iterator[int]:
        """Train the networks in place. Yields the number of epochs done, over all of them.

        Args:
            images: of each network, [n c h w], normalised; n is the same for all.
            targets: of each network, [n] int64 classes, or [n k] logits of soft labels.
            seeds: of each network's order and augmentation.
        """
        first, size, (count, *image) = networks[0], len(networks), images[0].shape
        if self._compile and are_trained_together(first, size, (image[0], image[1], image[2]), count, schedule):
            key = (f"{first} {image}", size)
            if key not in self._functions:
                self._functions[key] = StackFunctions(first, stacked=size, channels_last=self._channels_last)
            functions = self._functions[key]
            self.note = functions.note
            if not functions.note:
                for epoch in train_together(functions, networks, images, targets, schedule, seeds):
                    yield epoch * size
                return
        for number, (network, x, y, seed) in enumerate(zip(networks, images, targets, seeds, strict=True)):
            for done in train(network, x, y, schedule, seed):
                yield number * schedule.epochs + done.number


@functools.cache
def trainer(*, compile_: bool, channels_last: bool) -> Trainer:
    """The process's trainer with these settings, which keeps what it has compiled."""
    return Trainer(compile_=compile_, channels_last=channels_last)


def train_together(
    functions: StackFunctions,
    networks: Sequence[nn.Module],
    images: Sequence[Tensor],
    targets: Sequence[Tensor],
    schedule: Schedule,
    seeds: Sequence[int],
) -> Iterator[int]:
    """Train several networks of one kind in place by SGD, each as `train` would; see `Trainer.train` for arguments.

    Yields the number of epochs done. The networks get their new parameters after the last epoch.
    """
    state = ExpertState.initial(networks)
    classes = networks[0](images[0][:1].to(state.parameters.device)).shape[1]
    probabilities = [
        each.softmax(dim=1) if each.is_floating_point() else one_hot(each, classes).to(state.parameters.dtype)
        for each in targets
    ]
    for epochs in sorted({min(schedule.decay_epoch or schedule.epochs, schedule.epochs), schedule.epochs}):
        state.velocity = None
        settings = ExpertConfig(
            epochs=epochs,
            batch_size=schedule.batch_size,
            learning_rate=schedule.rate(state.epoch),
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
            augmentation=schedule.augmentation,
        )
        for _ in train_stack(functions, images, probabilities, settings, seeds, state):
            yield state.epoch
    for network, parameters in zip(networks, state.parameters, strict=True):
        unflatten_into(network, parameters)


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
