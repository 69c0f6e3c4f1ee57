"""Evaluation networks an hour, and what MetaDD adds to an iteration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from datm_ray.config import PUBLISHED_AUGMENTATION, NetworkSpec
from datm_ray.core.metadd import MetaDD
from datm_ray.core.networks.registry import build_network
from datm_ray.core.training.loop import PROTOCOLS, predict_logits, train_to_end
from gpu.machine import Machine, free_memory, measured
from gpu.sections import Clock, Row, Section, tried

TEST_IMAGES = 10_000
AUXILIARIES = ("resnet18", "vgg11", "alexnet", "lenet")


def random_set(machine: Machine, images: int) -> tuple[NetworkSpec, torch.Tensor, torch.Tensor]:
    """A network spec, and random images and soft labels for it."""
    side, width = (16, 8) if machine.small else (32, 128)
    spec = NetworkSpec(channels=3, size=(side, side), classes=10, width=width)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, *spec.size, generator=draw)
    return spec, pixels.to(machine.device), torch.randn(images, 10, generator=draw).to(machine.device)


def evaluation_row(machine: Machine, ipc: int) -> Row:
    """Seconds to evaluate a network: the schedule, extrapolated from a part of it, and scoring."""
    spec, images, targets = random_set(machine, 10 * ipc)
    part = 3 if machine.small else 50
    published = PROTOCOLS["published"]
    schedule = replace(published, epochs=part, decay_epoch=None, augmentation=PUBLISHED_AUGMENTATION)
    network = build_network(spec, 0).to(machine.device)
    calls = 1 if machine.small else 3
    training = measured(lambda: train_to_end(network, images, targets, schedule, 0), machine.device, calls)
    test = torch.randn(100 if machine.small else TEST_IMAGES, 3, *spec.size, device=machine.device)
    scoring = measured(lambda: predict_logits(network, test), machine.device, calls)
    seconds = [each * published.epochs / part + scoring.median for each in training.seconds]
    return {
        "training and scoring, s": seconds,
        "scoring, s": scoring.median,
        "networks an hour": 3600 / (training.median * published.epochs / part + scoring.median),
    }


def evaluation(machine: Machine, _: Clock) -> Iterator[Row]:
    """Measure the evaluation of sets of several sizes."""
    for ipc in (1,) if machine.small else (1, 10, 50):
        yield tried({"images per class": ipc}, partial(evaluation_row, machine, ipc))


def metadd_row(machine: Machine, auxiliaries: int) -> Row:
    """Seconds and memory of MetaDD's gradient in 100 images."""
    count = 10 if machine.small else 100
    spec, images, _ = random_set(machine, count)
    names = ("convnet", *AUXILIARIES[:auxiliaries])
    networks = [build_network(spec.model_copy(update={"architecture": name}), seed) for seed, name in enumerate(names)]
    metadd = MetaDD([network.to(machine.device) for network in networks])
    labels = torch.arange(count, device=machine.device) % 10
    found = measured(lambda: metadd.gradient(images, labels), machine.device, 1 if machine.small else 5)
    free_memory(machine.device)
    return {"seconds": found.seconds, "peak MiB": round(found.peak / 2**20)}


def metadd(machine: Machine, _: Clock) -> Iterator[Row]:
    """Measure MetaDD with one auxiliary, and with all of them."""
    for auxiliaries in (1, 2) if machine.small else (1, 2, 4):
        yield tried({"auxiliaries": auxiliaries}, partial(metadd_row, machine, auxiliaries))


EVALUATION = Section(
    "evaluation",
    "5. How many networks an hour are scored?",
    "A fresh ConvNet-3 trained on a set of CIFAR-10's shape for the published 1,001 epochs of batches of 128, from 50 "
    "of them, and scored on 10,000 images; uncompiled, float32.",
    ("images per class", "training and scoring, s", "scoring, s", "networks an hour"),
    seconds=25,
    least=5,
    measure=evaluation,
)
METADD = Section(
    "metadd",
    "6. What does MetaDD cost?",
    "Its gradient in 100 images of CIFAR-10's shape, ConvNet-3 and auxiliaries of published size, 10 images at a time; "
    "to be added to an iteration of section 3.",
    ("auxiliaries", "seconds", "peak MiB"),
    seconds=20,
    least=5,
    measure=metadd,
)
