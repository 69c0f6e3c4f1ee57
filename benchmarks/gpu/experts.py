"""Experts an hour: the published loop, and `train_experts` in stacks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from published_experts import Data, Epochs, loader_epochs

from datm_ray.config import PUBLISHED_AUGMENTATION, ExpertConfig, NetworkSpec
from datm_ray.core.compute.precision import tf32_products
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.core.training.experts import ExpertState, train_experts
from gpu.machine import Machine, free_memory, timed
from gpu.sections import Clock, Row, Section, tried

IMAGES, EPOCHS = 50_000, 100
"""Images of an expert's epoch, and epochs of an expert, as published."""


@dataclass(frozen=True)
class Setting:
    """How experts are trained."""

    spec: NetworkSpec
    images: int
    """In the epochs that are timed."""
    batch: int


def setting(machine: Machine) -> Setting:
    """CIFAR-10's shape; 40 batches of it."""
    if machine.small:
        return Setting(NetworkSpec(channels=3, size=(8, 8), classes=4, width=4, depth=2), 64, 32)
    return Setting(NetworkSpec(channels=3, size=(32, 32), classes=10), 10_240, 256)


def data_of(how: Setting, device: str) -> Data:
    """Random images and classes."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(how.images, how.spec.channels, *how.spec.size, generator=draw)
    return images.to(device), torch.randint(how.spec.classes, (how.images,), generator=draw).to(device)


def our_epochs(
    machine: Machine, how: Setting, stacked: int, *, gsam: bool, compiled: bool, in_bfloat16: bool = False
) -> Epochs:
    """Run `train_experts` for more epochs than any caller consumes."""
    networks = [build_network(how.spec, seed).to(machine.device) for seed in range(stacked)]
    functions = StackFunctions(networks[0], stacked=stacked, compile_=compiled, in_bfloat16=in_bfloat16)
    settings = ExpertConfig(epochs=10**6, batch_size=how.batch, optimiser="gsam" if gsam else "sgd")
    state = ExpertState.initial(networks)
    for _ in train_experts(functions, *data_of(how, machine.device), settings, list(range(stacked)), state):
        state.parameters.cpu()  # a snapshot, as every epoch leaves
        yield


def published(machine: Machine, how: Setting, *, gsam: bool) -> Row:
    """Train by the published loop."""
    network = build_network(how.spec, 0).to(machine.device)
    epochs = loader_epochs(network, data_of(how, "cpu"), None, how.batch, PUBLISHED_AUGMENTATION, gsam=gsam)
    return row_of(machine, how, epochs, 1)


def ours(
    machine: Machine,
    how: Setting,
    stacked: int,
    *,
    gsam: bool,
    compiled: bool,
    tf32_: bool = False,
    in_bfloat16: bool = False,
) -> Row:
    """Train this many experts at a time."""
    with tf32_products(tf32_, torch.device(machine.device)):
        epochs = our_epochs(machine, how, stacked, gsam=gsam, compiled=compiled, in_bfloat16=in_bfloat16)
        return row_of(machine, how, epochs, stacked)


def teachers(machine: Machine, how: Setting) -> dict[str, Callable[[], Row]]:
    """Train one ResNet-18 with batch normalisation, a teacher, in TF32 and in bfloat16."""
    spec = how.spec.model_copy(update={"architecture": "resnet18", "norm": "batch"})
    mine = partial(ours, machine, replace(how, spec=spec), 1, gsam=False, compiled=False)
    return {"resnet18, tf32": partial(mine, tf32_=True), "resnet18, bfloat16": partial(mine, in_bfloat16=True)}


def row_of(machine: Machine, how: Setting, epochs: Epochs, experts: int) -> Row:
    """Seconds of an expert's whole epoch, and experts an hour."""
    first, _ = timed(partial(next, epochs), machine.device)
    whole = IMAGES / how.images / experts
    seconds = [timed(partial(next, epochs), machine.device)[0] * whole for _ in range(1 if machine.small else 3)]
    return {"epoch, s": seconds, "experts an hour": 3600 / (EPOCHS * statistics.median(seconds)), "first, s": first}


def measure(machine: Machine, _: Clock) -> Iterator[Row]:
    """Measure SGD, then GSAM; the published loop before this package."""
    how, stacks = setting(machine), (2,) if machine.small else (1, 8, 4)
    for gsam in (False, True):
        mine = partial(ours, machine, how, gsam=gsam)
        works: dict[str, Callable[[], Row]] = {"loader": partial(published, machine, how, gsam=gsam)}
        works |= {
            f"ours, {each} at a time": partial(mine, each, compiled=machine.compiled)
            for each in (stacks if not gsam else stacks[:2])
        }
        if not machine.small:
            works["ours, 8 at a time, tf32"] = partial(mine, 8, compiled=True, tf32_=True)
            works["ours, 1 at a time, uncompiled"] = partial(mine, 1, compiled=False)
            works["ours, 8 at a time, bfloat16"] = partial(mine, 8, compiled=True, in_bfloat16=True)
        works |= {} if gsam else teachers(machine, how)
        for method, work in works.items():
            yield tried({"optimiser": "GSAM" if gsam else "SGD", "method": method}, work)
            free_memory(machine.device)


SECTION = Section(
    "experts",
    "4. How many experts an hour?",
    f"ConvNet-3 at CIFAR-10's shape, batch 256, all DSA operations. `loader`: torch's DataLoader, sample by sample, in "
    f"the training process, as published. Seconds of an expert's epoch of {IMAGES:,} images, from epochs of 40 "
    f"batches; experts of {EPOCHS} epochs. float32 without TF32 unless stated. resnet18: a teacher with batch norm, "
    "uncompiled. First: those 40 batches with compilation, of all experts of a stack.",
    ("optimiser", "method", "epoch, s", "experts an hour", "first, s"),
    seconds=90,
    least=15,
    measure=measure,
)
