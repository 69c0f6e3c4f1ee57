"""Measured speed of this machine for a recipe: a few steps of every kind of work, on random images.

Tests: tests/planning/test_duration.py.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from datm_ray.config import RunConfig
from datm_ray.core.networks.parameters import FlatNetwork, flatten
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.core.training.experts import ExpertState, stack_steps
from datm_ray.core.training.loop import SCORING_BATCH, Training, predict_logits, scoring_schedule, train_steps
from datm_ray.methods.recovery import RecoveryLoss
from datm_ray.methods.trajectory.matching import draw_student_steps, matching_gradient, place_steps
from datm_ray.methods.trajectory.step_functions import StudentStepFunctions
from datm_ray.planning.duration import Proposal
from datm_ray.planning.machines import FORWARD_PASSES, Machine
from datm_ray.runtime.machine.devices import channels_last_on, prepare_device, restoring_settings
from datm_ray.shape import network_cost
from datm_ray.stages.experts.train import experts_at_a_time
from datm_ray.stages.methods.distribution import embedding_functions
from datm_ray.stages.methods.memory import laid_out
from datm_ray.stages.methods.trajectory import step_options

REPEATED, SECONDS, ENOUGH, MANY = 3, 0.2, 1.0, 10**6
"""Limits on timing one kind of work. After one repetition to warm up, there are at least REPEATED repetitions that take
at least SECONDS seconds in all; but none starts after ENOUGH seconds. MANY: number of epochs of a timed training, which
is never reached."""
STEPS = 3
"""Number of student steps in one timed repetition of matching."""
QUICK_FLOP = 1e11
"""Largest number of operations of one network's step in a quick measurement: the step gets as many images as this
allows, at least two. The time of the run's larger step is taken in proportion to its images. Much smaller steps would
be faster than in proportion, because their feature maps fit into the CPU's cache."""
COMPILED_GAIN = {"matching": (1.4, 56.0), "experts": (0.95, 30.0), "embedding": (2.5, 0.0), "recovery": (2.0, 0.0)}
"""Kind of step -> (a, b): in a network with `width` channels, a compiled step is a + b / width times as fast as an
uncompiled one. Of ten gains measured on one core for widths 32 to 128 and images of 32 and 64 pixels
(benchmarks/LOG.md, 2026-11-29), nine are within 18 %. Images of 8 pixels gain up to 2.6 times as much, so their plans
are too long. The gains of embedding and recovery were measured once each, for the networks of `FORWARD_PASSES`."""
GRAPHS = {"embedding": 4.0}
"""Kind of step -> time to compile all its graphs, as a multiple of that for the one graph that is timed; 1 for
others. DM compiles embeddings for two sizes of micro-batches, and their derivative, which takes twice as long."""


def measured(proposal: Proposal, *, quickly: bool = False) -> Machine:
    """Measure the speed of this machine with the recipe's network. Returns the proposal's machine with that speed.

    On CPUs with one thread per worker, CPU seconds are measured, because other programs change them little.

    Args:
        proposal: the recipe and its plans.
        quickly: True to time small uncompiled steps, which takes seconds; compiled steps are assumed to be faster, see
            `COMPILED_GAIN`. False to compile as the run will and to time steps of the recipe's own size,
            which may take minutes.
    """
    machine, cluster = proposal.machine, proposal.config.cluster
    cost, compiled = network_cost(proposal.config, proposal.shape), cluster.compile and not quickly
    # Timed steps have their fixed cost within them. Files differ, so their reading is not timed.
    seconds, compiling = {"steps": 0.0, "reading": machine.seconds["reading"]}, dict[str, float]()
    with restoring_settings():  # of the caller, such as a notebook
        device = prepare_device(cluster)
        for kind, (passes, work) in _work(proposal, device, compiled, cost.flop if quickly else 0).items():
            first, usual = _seconds(work, by_cpu=device.type == "cpu" and machine.cores == 1)
            seconds[kind] = usual / (cost.flop * passes)
            if cluster.compile and kind in machine.compiling:
                timed = GRAPHS.get(kind, 1.0) * max(0.0, first - usual) / cost.functions
                compiling[kind] = machine.compiling[kind] if quickly else timed
                seconds[kind] /= compiled_gain(kind, proposal.config.network.width) if quickly else 1.0
    basis = "timed here in small; --measure is more exact" if quickly else "measured here"
    return replace(machine, seconds=seconds, basis=basis, compiling=compiling)


def compiled_gain(kind: str, width: int) -> float:
    """Speed of a compiled step of `kind` relative to an uncompiled one, in a network with `width` channels."""
    fixed, narrow = COMPILED_GAIN[kind]
    return fixed + narrow / width


def _work(proposal: Proposal, device: torch.device, compiled: bool, flop: int) -> dict[str, tuple[int, Iterator[Any]]]:
    """Kind of work -> number of images through networks in one timed repetition, and iterator over repetitions.

    An image counts once for each pass through each network. The iterator is endless: each call of `next` runs one
    repetition.

    Args:
        flop: operations of one image's forward pass, which limit the number of images by `QUICK_FLOP`; 0 for no limit.
    """
    config, shape = laid_out(proposal.config.each_backbone()[0], {"compile": compiled}), proposal.shape
    schedule, real = scoring_schedule(config.evaluate, 0.01), shape.training_images
    counts = dict.fromkeys(("matching", "embedding", "recovery"), proposal.plans[0].chunk) | {
        "experts": min(config.experts.batch_size, real),
        "training": min(schedule.batch_size, shape.synthetic(config)),
        "real": min(schedule.batch_size, real),
        "scoring": min(SCORING_BATCH, real),
    }
    if flop:
        counts = {kind: max(2, min(n, int(QUICK_FLOP / (flop * FORWARD_PASSES[kind])))) for kind, n in counts.items()}
    spec = config.network.for_images(shape.image[0], shape.image[1:], shape.classes)
    stack = experts_at_a_time(config, shape.image, shape.classes)
    networks = [build_network(spec, seed).to(device) for seed in range(stack)]
    first, images = networks[0], torch.randn(max(counts.values()), *shape.image, device=device)
    labels = torch.arange(len(images), device=device) % spec.classes
    data = {kind: (images[:count], labels[:count]) for kind, count in counts.items()}
    endless = replace(schedule, epochs=MANY, decay_epoch=None, warmup_epochs=0)
    experts = config.experts.model_copy(update={"epochs": MANY})
    x, y = ([each] * stack for each in data["experts"])
    layout = channels_last_on(config.cluster, device)
    functions = StackFunctions(first, stacked=stack, compile_=compiled, channels_last=layout)
    work = {  # steps of methods come first, so that their times include the first use of new memory, as in a run
        "matching": _matching(config, first, *data["matching"], spec.classes),
        "embedding": _embedding(config, first, data["embedding"][0]),
        "recovery": _recovery(config, first, *data["recovery"]),
        "experts": stack_steps(functions, x, y, experts, range(stack), ExpertState.initial(networks)),
        "training": train_steps(Training(first, *data["training"], endless, 0)),
        "real": train_steps(Training(first, *data["real"], endless, 0)),
        "scoring": (predict_logits(first, data["scoring"][0]) for _ in itertools.count()),
    }
    for kind in {"matching", "embedding", "recovery"} - proposal.plans[0].demand.passes.keys():
        del work[kind]
    times = {"matching": STEPS, "experts": stack * (2 if experts.optimiser == "gsam" else 1)}
    return {kind: (times.get(kind, 1) * counts[kind], each) for kind, each in work.items()}


def _matching(config: RunConfig, network: nn.Module, images: Tensor, labels: Tensor, classes: int) -> Iterator[Any]:
    """Iterate without end. Each item is a matching gradient through `STEPS` student steps, each on all images."""
    options, count = step_options(config.cluster, images.device), len(images)
    functions, start = StudentStepFunctions(FlatNetwork(network), options), flatten(network)
    soft = torch.zeros(count, classes, device=images.device)
    synthetic = SyntheticSet(images, soft, torch.full((1,), 0.01, device=images.device), labels)
    steps = draw_student_steps(count, STEPS, count, config.distill.augmentation, 0, 0)
    while True:
        yield matching_gradient(functions, start, start + 1, synthetic, place_steps(steps, count, images))


def _embedding(config: RunConfig, network: nn.Module, images: Tensor) -> Iterator[Any]:
    """Iterate without end. Each item is the embeddings of all images."""
    functions = embedding_functions(network, config.cluster, images.device)
    values = functions.values_of(network)
    while True:
        yield functions.forward(values, images, len(images))


def _recovery(config: RunConfig, network: nn.Module, images: Tensor, labels: Tensor) -> Iterator[Any]:
    """Iterate without end. Each item is the gradient of SRe2L's loss with respect to all images."""
    layout = channels_last_on(config.cluster, images.device)
    loss = RecoveryLoss(network, config.recover, compiled=config.cluster.compile, channels_last=layout)
    while True:
        yield loss.gradient(images, labels)


def _seconds(work: Iterator[Any], *, by_cpu: bool) -> tuple[float, float]:
    """Seconds of the first repetition of some work, and median seconds of the following ones.

    Args:
        work: iterator that runs one repetition for each item.
        by_cpu: True to measure CPU seconds, False to measure wall-clock seconds.
    """
    found: list[float] = []
    while len(found) < 2 or ((len(found) <= REPEATED or sum(found[1:]) < SECONDS) and sum(found[1:]) < ENOUGH):
        began = _now(by_cpu)
        next(work)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(_now(by_cpu) - began)
    return found[0], statistics.median(found[1:])


def _now(by_cpu: bool) -> float:
    """Current time in seconds: of a clock or, if `by_cpu`, CPU time of this process and its ended children."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system if by_cpu else time.perf_counter()
