"""Evaluation networks an hour, and what MetaDD adds to an iteration."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from epochs import by_epoch
from turns import timed

from datm_ray.config import PUBLISHED_AUGMENTATION, NetworkSpec
from datm_ray.core.metadd import IMAGES_AT_A_TIME, MetaDD
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stack_trial import InParts
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.core.training.loop import PROTOCOLS, Training, predict_logits, together_steps, train_steps
from gpu.machine import Machine, free_memory, freeing, measured
from gpu.sections import Clock, Row, Section, Work

TEST_IMAGES = 10_000
AUXILIARIES = ("resnet18", "vgg11", "alexnet", "lenet")


def random_set(machine: Machine, images: int) -> tuple[NetworkSpec, torch.Tensor, torch.Tensor]:
    """A network spec, and random images and soft labels for it."""
    side, width = (16, 8) if machine.small else (32, 128)
    spec = NetworkSpec(channels=3, size=(side, side), classes=10, width=width)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, *spec.size, generator=draw)
    return spec, pixels.to(machine.device), torch.randn(images, 10, generator=draw).to(machine.device)


def epochs_of(
    machine: Machine, ipc: int, networks: int, at_a_time: int | None = None
) -> tuple[Training, Iterator[object]]:
    """Training of the first of some networks, and an iterator that trains all of them for an epoch at each step.

    Args:
        at_a_time: networks in a call, `None` for all; a run takes all or one, whichever a trial finds faster.
    """
    at_a_time = at_a_time or networks
    spec, images, targets = random_set(machine, 10 * ipc)
    schedule = replace(PROTOCOLS["published"], epochs=10**6, decay_epoch=None, augmentation=PUBLISHED_AUGMENTATION)
    stack = [
        Training(build_network(spec, seed).to(machine.device), images, targets, schedule, seed)
        for seed in range(networks)
    ]
    first = stack[0]
    if networks == 1:
        return first, by_epoch(train_steps(first))
    options = {"compile_": machine.compiled, "channels_last": machine.channels_last}
    functions = StackFunctions(first.network, stacked=at_a_time, **options)
    step = InParts(functions, at_a_time) if machine.device == "cuda" else functions
    return first, by_epoch(together_steps(step, stack))


def evaluation_row(machine: Machine, ipc: int, networks: int, at_a_time: int) -> Row:
    """Seconds to evaluate a network of a stack: the schedule, extrapolated from a part of it, and scoring."""
    part, calls = (3, 1) if machine.small else (25, 3)
    with machine.as_in_a_run():
        training, epochs = epochs_of(machine, ipc, networks, at_a_time)
        first, _ = timed(partial(next, epochs), machine.device)
        trained = measured(lambda: [next(epochs) for _ in range(part)], machine.device, calls)
        test = torch.randn(100 if machine.small else TEST_IMAGES, *training.images.shape[1:], device=machine.device)
        scoring = measured(lambda: predict_logits(training.network, test), machine.device, calls)
    steps = part * networks * math.ceil(len(training.images) / training.schedule.batch_size)
    names = ("evaluation", f"{ipc} images per class", f"{at_a_time} of {networks} in a call")
    machine.noted.update({(*names, "step"): trained.median / steps, (*names, "first"): first})
    whole = PROTOCOLS["published"].epochs / part / networks
    seconds = [each * whole + scoring.median for each in trained.seconds]
    return {
        "training and scoring, s": seconds,
        "scoring, s": scoring.median,
        "networks an hour": 3600 / statistics.median(seconds),
        "first, s": first,
    }


def evaluation(machine: Machine, _: Clock) -> Iterator[Work]:
    """List the evaluation of sets of several sizes, five seeds together as a run has them, and one by one."""
    cases = [(10, 5, 5), (1, 5, 5), (10, 5, 1), (10, 1, 1), (50, 5, 5), (1, 5, 1), (1, 1, 1), (50, 1, 1)]
    for ipc, networks, at_a_time in [(1, 2, 2), (1, 1, 1)] if machine.small else cases:
        call = partial(evaluation_row, machine, ipc, networks, at_a_time)
        what = {"images per class": ipc, "together": networks, "in a call": at_a_time}
        yield Work(what, partial(freeing, machine.device, call))


def metadd_row(machine: Machine, auxiliaries: int) -> Row:
    """Seconds and memory of MetaDD's gradient in 100 images, as an iteration computes it."""
    count = 10 if machine.small else 100
    spec, images, _ = random_set(machine, count)
    names = ("convnet", *AUXILIARIES[:auxiliaries])
    networks = [build_network(spec.model_copy(update={"architecture": name}), seed) for seed, name in enumerate(names)]
    metadd = MetaDD([network.to(machine.device) for network in networks])
    labels = torch.arange(count, device=machine.device) % 10

    def gradient(chunk: int) -> object:
        return metadd.gradient(images, labels, networks=len(networks), classes=10, chunk=chunk)

    with machine.as_in_a_run():
        chunk = most_that_fit(machine, gradient, count)
        found = measured(partial(gradient, chunk), machine.device, 1 if machine.small else 5)
    return {"images at a time": chunk, "seconds": found.seconds, "peak MiB": round(found.peak / 2**20)}


def most_that_fit(machine: Machine, call: Callable[[int], object], count: int) -> int:
    """Most images at a time: on a GPU all, or half of them until they fit; else ten."""
    if machine.device != "cuda":
        return IMAGES_AT_A_TIME
    while True:
        try:
            call(count)
            return count
        except torch.OutOfMemoryError:  # the failed call's tensors live as long as its error
            if count == 1:
                raise
        free_memory(machine.device)
        count //= 2


def metadd(machine: Machine, _: Clock) -> Iterator[Work]:
    """List MetaDD with one auxiliary, and with all of them."""
    for auxiliaries in (1, 2) if machine.small else (1, 2, 4):
        call = partial(metadd_row, machine, auxiliaries)
        yield Work({"auxiliaries": auxiliaries}, partial(freeing, machine.device, call))


EVALUATION = Section(
    "evaluation",
    "6. How many networks an hour are scored?",
    "Fresh ConvNet-3s trained on a set of CIFAR-10's shape for the published 1,001 epochs of batches of 128, from 25 "
    "of them, and scored on 10,000 images, in a run's precision and memory order. Together: so many in one compiled "
    "step, as a run trains the seeds of a row, by CUDA graphs. In a call: all of them, or one after another, whichever "
    "a run's trial finds faster. Together 1: uncompiled, as networks that cannot be stacked. Seconds of one. "
    "First: an epoch of all of them with compilation.",
    (
        "images per class",
        "together",
        "in a call",
        "training and scoring, s",
        "scoring, s",
        "networks an hour",
        "first, s",
    ),
    seconds=40,
    least=5,
    works=evaluation,
)
METADD = Section(
    "metadd",
    "7. What does MetaDD cost?",
    "Its gradient in 100 images of CIFAR-10's shape, ConvNet-3 and auxiliaries of published size, to be added to an "
    "iteration of section 4. As in a run: as many images at a time as fit, and no label is read back.",
    ("auxiliaries", "images at a time", "seconds", "peak MiB"),
    seconds=15,
    least=5,
    works=metadd,
)
