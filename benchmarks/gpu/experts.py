"""Experts an hour: the published loop, and this package's in stacks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from epochs import expert_epochs
from published_experts import Data, Epochs, loader_epochs
from turns import timed

from datm_ray.config import PUBLISHED_AUGMENTATION, ExpertConfig, NetworkSpec
from datm_ray.core.compute.precision import Precision, tf32_products
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stack_trial import InParts, StackStep
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.core.training.experts import ExpertState
from gpu.machine import Machine, freeing, timed_algorithms
from gpu.sections import Clock, Row, Section, Work

IMAGES, EPOCHS = 50_000, 100
"""Images of an expert's epoch, and epochs of an expert, as published."""


@dataclass(frozen=True)
class Setting:
    """How experts are trained."""

    spec: NetworkSpec
    images: int
    """Number of images of a timed epoch."""
    batch: int


def setting(machine: Machine) -> Setting:
    """Setting of the section: CIFAR-10's shape, and epochs of 40 batches."""
    if machine.small:
        return Setting(NetworkSpec(channels=3, size=(8, 8), classes=4, width=4, depth=2), 64, 32)
    return Setting(NetworkSpec(channels=3, size=(32, 32), classes=10), 10_240, 256)


def data_of(how: Setting, device: str) -> Data:
    """Random images and classes."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(how.images, how.spec.channels, *how.spec.size, generator=draw)
    return images.to(device), torch.randint(how.spec.classes, (how.images,), generator=draw).to(device)


@dataclass(frozen=True)
class Way:
    """How a stack of experts is computed."""

    stacked: int
    compiled: bool
    precision: Precision
    channels_last: bool
    one_by_one: bool = False
    """True for one expert after another by a CUDA graph, False for all in one call."""
    timed_algorithms: bool = True
    """True if cuDNN times its algorithms at the first step, as in a run."""

    def step(self, network: torch.nn.Module) -> StackStep:
        """Function of a training step of all experts."""
        functions = StackFunctions(
            network,
            stacked=1 if self.one_by_one else self.stacked,
            compile_=self.compiled,
            channels_last=self.channels_last,
            in_bfloat16=self.precision == "bfloat16",
        )
        return InParts(functions) if self.one_by_one else functions


def our_epochs(machine: Machine, how: Setting, way: Way, *, gsam: bool) -> Epochs:
    """Iterator that trains one epoch by `stack_steps` at every item, more epochs than any caller takes."""
    networks, stacked = [build_network(how.spec, seed).to(machine.device) for seed in range(way.stacked)], way.stacked
    functions = way.step(networks[0])
    settings = ExpertConfig(epochs=10**6, batch_size=how.batch, optimiser="gsam" if gsam else "sgd")
    state = ExpertState.initial(networks)
    for _ in expert_epochs(functions, *data_of(how, machine.device), settings, list(range(stacked)), state):
        state.parameters.cpu()  # a snapshot, as every epoch leaves
        yield


def published(machine: Machine, how: Setting, *, gsam: bool) -> Row:
    """Train by the published loop."""
    network = build_network(how.spec, 0).to(machine.device)
    with machine.as_in_a_run():
        epochs = loader_epochs(network, data_of(how, "cpu"), None, how.batch, PUBLISHED_AUGMENTATION, gsam=gsam)
        return row_of(machine, how, epochs, 1)


def ours(machine: Machine, how: Setting, way: Way, *, gsam: bool) -> Row:
    """Train experts in this way."""
    with tf32_products(way.precision == "tf32", machine.place), timed_algorithms(way.timed_algorithms):
        return row_of(machine, how, our_epochs(machine, how, way, gsam=gsam), way.stacked)


def teachers(machine: Machine, how: Setting, one: Way) -> dict[str, Callable[[], Row]]:
    """Train one ResNet-18 with batch normalisation, a teacher, as a run does and in bfloat16."""
    spec = how.spec.model_copy(update={"architecture": "resnet18", "norm": "batch"})
    mine, alone = replace(how, spec=spec), replace(one, compiled=False)
    lower = replace(alone, precision="bfloat16")
    return {
        "resnet18": partial(ours, machine, mine, alone, gsam=False),
        "resnet18, bfloat16": partial(ours, machine, mine, lower, gsam=False),
    }


def ways(machine: Machine) -> dict[str, Way]:
    """Ways to train experts, by name: a run's, then those that differ from it in one point."""
    size = 2 if machine.small else 8
    run = Way(size, machine.compiled, machine.precision, machine.channels_last)
    found = {f"{size} at a time": run}
    if machine.device == "cuda":
        found[f"{size} one by one, CUDA graph"] = replace(run, one_by_one=True)
    order = "first" if run.channels_last else "last"
    found[f"{size} at a time, channels {order}"] = replace(run, channels_last=not run.channels_last)
    if machine.small:
        return found
    found |= {f"{each} at a time": replace(run, stacked=each) for each in (1, 4)}
    found[f"{size} at a time, cuDNN's algorithms not timed"] = replace(run, timed_algorithms=False)
    others = [each for each in machine.precisions if each != run.precision]
    found |= {f"{size} at a time, {each}": replace(run, precision=each) for each in others}
    return found | {"1 at a time, uncompiled": replace(run, stacked=1, compiled=False)}


def row_of(machine: Machine, how: Setting, epochs: Epochs, experts: int) -> Row:
    """Seconds of an expert's whole epoch, and experts an hour."""
    first, _ = timed(partial(next, epochs), machine.device)
    whole = IMAGES / how.images / experts
    seconds = [timed(partial(next, epochs), machine.device)[0] * whole for _ in range(1 if machine.small else 3)]
    return {"epoch, s": seconds, "experts an hour": 3600 / (EPOCHS * statistics.median(seconds)), "first, s": first}


def works(machine: Machine, _: Clock) -> Iterator[Work]:
    """List SGD, then GSAM with a run's way alone; the published loop before this package."""
    how, found = setting(machine), ways(machine)
    for gsam in (False, True):
        mine = {f"ours, {name}": partial(ours, machine, how, way, gsam=gsam) for name, way in found.items()}
        each: dict[str, Callable[[], Row]] = {"loader": partial(published, machine, how, gsam=gsam)}
        each |= dict(list(mine.items())[: 1 if gsam else None])
        each |= {} if gsam else teachers(machine, how, replace(next(iter(found.values())), stacked=1))
        for method, work in each.items():
            what = {"optimiser": "GSAM" if gsam else "SGD", "method": method}
            yield Work(what, partial(freeing, machine.device, work))


SECTION = Section(
    "experts",
    "5. How many experts an hour?",
    f"ConvNet-3 at CIFAR-10's shape, batch 256, all DSA operations. `loader`: torch's DataLoader, sample by sample, in "
    f"the training process, as published. Seconds of an expert's epoch of {IMAGES:,} images, from epochs of 40 "
    f"batches; experts of {EPOCHS} epochs. A run's precision and memory order unless stated, the loader's too. one by "
    "one: the experts of a stack one after another, by one CUDA graph. resnet18: a teacher with batch norm, "
    "uncompiled. First: those 40 batches with compilation, of all experts of a stack.",
    ("optimiser", "method", "epoch, s", "experts an hour", "first, s"),
    seconds=75,
    least=15,
    works=works,
)
