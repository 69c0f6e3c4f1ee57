"""Speed of this machine at a recipe's own work, from a few real steps of every kind on made-up images.

Tests: tests/planning/test_duration.py.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from datm_ray.core.experts import ExpertState, train_experts
from datm_ray.core.networks.parameters import FlatNetwork, flatten
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import StackFunctions, chunk_in_cache
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.core.training import PROTOCOLS, SCORING_BATCH, predict_logits, train
from datm_ray.methods.trajectory.matching import draw_student_steps, matching_gradient
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions
from datm_ray.planning.duration import FORWARD_PASSES, Proposal
from datm_ray.planning.fit import network_cost
from datm_ray.planning.machines import Machine
from datm_ray.runtime.devices import precision_on, prepare_device
from datm_ray.stages.experts import experts_at_a_time
from datm_ray.stages.validation import evaluation_schedule

REPEATED, SECONDS, MANY = 3, 0.2, 10**6
"""Repetitions of each kind of work after a first one that warms up, at least; their seconds, at least; an end of both
that is never reached."""
STEPS = 3
"""Student steps of a repetition."""
QUICK_FLOP = 1e10
"""Operations of a repetition, at most, if it shall be quick. Larger steps take longer in proportion."""
COMPILED_GAIN = 2.0
"""Times by which a compiled step is faster than an uncompiled one. Measured 1.7 to 3.2, highest for small networks."""
BUSY = "import numpy, os\na = numpy.ones((512, 512), numpy.float32)\nwhile os.getppid() == {parent}: a @ a"
"""Program that keeps a core busy while the process that started it lives."""


def measured(proposal: Proposal, *, quickly: bool = False) -> Machine:
    """The proposal's machine, with rates measured on this one at the recipe's network and numbers of images.

    Meanwhile the cores of the run's other workers are kept busy, since workers of a machine share caches and clock.
    On CPUs with one thread a worker, CPU seconds are measured, which other programs change little.

    Args:
        proposal: the recipe and its plans.
        quickly: True to time small uncompiled steps, in seconds; compiled ones are taken to be `COMPILED_GAIN` times as
            fast. False compiles as the run will, which takes up to minutes.
    """
    threads = torch.get_num_threads()
    try:
        return _measured(proposal, prepare_device(proposal.config.cluster), quickly)
    finally:
        torch.set_num_threads(threads)  # those of a notebook that asks


def _measured(proposal: Proposal, device: torch.device, quickly: bool) -> Machine:
    machine, cluster, backbone = proposal.machine, proposal.config.cluster, proposal.config.each_backbone()[0]
    cost, compiled = network_cost(backbone, proposal.shape), cluster.compile and not quickly
    stack = experts_at_a_time(backbone, proposal.shape.image, proposal.shape.classes)
    images = _images_of(proposal, cost.flop if quickly else 0)
    work = _work(proposal, images, stack, device, compiled)
    others = 0 if quickly or device.type != "cpu" else min(machine.workers, (os.cpu_count() or 1) // machine.cores) - 1
    by_cpu = device.type == "cpu" and machine.cores == 1
    with _others_busy(others):
        seconds = {kind: _seconds(each, by_cpu=by_cpu) for kind, each in work.items()}
    times = {"matching": STEPS, "experts": stack * (2 if backbone.experts.optimiser == "gsam" else 1)}
    passes = {kind: times.get(kind, 1) * count * FORWARD_PASSES[kind] for kind, count in images.items()}
    rates = {kind: cost.flop * passes[kind] / usual for kind, (_, usual) in seconds.items()}
    if compiled:
        compiling = {kind: max(0.0, seconds[kind][0] - seconds[kind][1]) / cost.functions for kind in machine.compiling}
        machine = replace(machine, compiling=compiling)
    elif cluster.compile:
        rates |= {kind: COMPILED_GAIN * rates[kind] for kind in machine.compiling}
    basis = "timed here in small; --measure is more exact" if quickly else "measured here"
    return replace(machine, rates=rates, basis=basis)


def _images_of(proposal: Proposal, flop: int) -> dict[str, int]:
    """Images of a step of each kind of work, as in the run.

    Args:
        flop: operations of an image in a forward pass, to take fewer images than `QUICK_FLOP` allows; 0 for no limit.
    """
    plan, real = proposal.plans[0], proposal.shape.training_images
    batch = PROTOCOLS[proposal.config.evaluate.protocol].batch_size
    images = {
        "matching": plan.chunk,
        "experts": min(proposal.config.experts.batch_size, real),
        "training": min(batch, plan.images),
        "real": min(batch, real),
        "scoring": min(SCORING_BATCH, real),
    }
    if not flop:
        return images
    return {kind: max(2, min(count, int(QUICK_FLOP / (flop * FORWARD_PASSES[kind])))) for kind, count in images.items()}


def _work(
    proposal: Proposal, images_of: Mapping[str, int], stack: int, device: torch.device, compiled: bool
) -> dict[str, Iterator[object]]:
    """Kind of work -> repetitions without end, on made-up images."""
    config, cluster, image = proposal.config, proposal.config.cluster, proposal.shape.image
    spec = config.network.for_images(image[0], image[1:], proposal.shape.classes)
    networks = [build_network(spec, seed).to(device) for seed in range(stack)]
    chunk, many = images_of["matching"], max(images_of.values())
    images, labels = torch.randn(many, *image, device=device), torch.arange(many, device=device) % spec.classes
    soft, step_size = torch.zeros(chunk, spec.classes, device=device), torch.full((1,), 0.01, device=device)
    synthetic, start = SyntheticSet(images[:chunk], soft, step_size, labels[:chunk]), flatten(networks[0])
    options = StepOptions(compiled, channels_last=cluster.channels_last, precision=precision_on(cluster, device))
    functions = StudentStepFunctions(FlatNetwork(networks[0]), options)
    steps = draw_student_steps(chunk, STEPS, chunk, config.distill.augmentation, 0, 0)
    in_cache = chunk_in_cache(networks[0], image, stack) if device.type == "cpu" else None
    experts = StackFunctions(
        networks[0], stacked=stack, compile_=compiled, chunk=in_cache, channels_last=cluster.channels_last
    )
    own, state = config.experts.model_copy(update={"epochs": MANY}), ExpertState.initial(networks)
    schedule = replace(evaluation_schedule(config, 0.01), epochs=MANY, decay_epoch=None)

    def first(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        return images[: images_of[kind]], labels[: images_of[kind]]

    return {
        "matching": (
            matching_gradient(functions, start, start + 1, synthetic, steps, chunk=chunk) for _ in range(MANY)
        ),
        "experts": train_experts(experts, *first("experts"), own, range(stack), state),
        "training": train(networks[0], *first("training"), schedule, 0),
        "real": train(networks[0], *first("real"), schedule, 0),
        "scoring": (predict_logits(networks[0], first("scoring")[0]) for _ in range(MANY)),
    }


def _seconds(work: Iterator[object], *, by_cpu: bool) -> tuple[float, float]:
    """Seconds of the first repetition, and the median of some others."""
    found: list[float] = []
    while len(found) <= REPEATED or sum(found[1:]) < SECONDS:
        began = _now(by_cpu)
        next(work)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(_now(by_cpu) - began)
    return found[0], statistics.median(found[1:])


def _now(by_cpu: bool) -> float:
    """Seconds of the clock, or CPU seconds of this process and of compilers that it has started."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system if by_cpu else time.perf_counter()


@contextmanager
def _others_busy(count: int) -> Iterator[None]:
    """Keep so many further cores busy."""
    alone = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BUSY.format(parent=os.getpid())]
    others = [subprocess.Popen(command, env=alone) for _ in range(count)]
    try:
        yield
    finally:
        for each in others:
            each.kill()
            each.wait()
