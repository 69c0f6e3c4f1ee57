"""Measured speed of this machine for a recipe: a few steps of every kind of work, on random images.

Tests: tests/planning/test_duration.py.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from datm_ray.core.experts import ExpertState, train_experts
from datm_ray.core.networks.parameters import FlatNetwork, flatten
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.core.training import SCORING_BATCH, predict_logits, train
from datm_ray.methods.trajectory.matching import draw_student_steps, matching_gradient
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions
from datm_ray.planning.duration import Proposal
from datm_ray.planning.machines import FORWARD_PASSES, Machine
from datm_ray.planning.shape import network_cost
from datm_ray.runtime.devices import precision_on, prepare_device
from datm_ray.stages.experts import experts_at_a_time
from datm_ray.stages.validation import evaluation_schedule

REPEATED, SECONDS, MANY = 3, 0.2, 10**6
"""Smallest number of repetitions of each kind of work after a first one to warm up, their smallest total time in
seconds, and a number of repetitions that is never reached."""
STEPS = 3
"""Number of student steps in a repetition."""
QUICK_FLOP = 1e10
"""Largest number of operations in a repetition of a quick measurement. Larger steps take proportionally longer."""
COMPILED_GAIN = 2.0
"""Speed of a compiled step relative to an uncompiled step. Measured: 1.7 to 3.2, highest for small networks."""

_Work = tuple[int, Iterator[object]]


def measured(proposal: Proposal, *, quickly: bool = False) -> Machine:
    """Measure the speed of this machine with the recipe's network. Returns the proposal's machine with that speed.

    On CPUs with one thread per worker, CPU seconds are measured, because other programs change them little.

    Args:
        proposal: the recipe and its plans.
        quickly: True to time small uncompiled steps, which takes seconds; compiled steps are assumed to be
            `COMPILED_GAIN` times as fast. False to compile as the run will and to time steps of the recipe's own size,
            which may take minutes.
    """
    machine, cluster, threads = proposal.machine, proposal.config.cluster, torch.get_num_threads()
    cost, compiled = network_cost(proposal.config, proposal.shape), cluster.compile and not quickly
    try:
        device = prepare_device(cluster)
        work = _work(proposal, device, compiled, cost.flop if quickly else 0)
        by_cpu = device.type == "cpu" and machine.cores == 1
        found = {kind: (passes, *_seconds(each, by_cpu=by_cpu)) for kind, (passes, each) in work.items()}
    finally:
        torch.set_num_threads(threads)  # restore the setting of the caller, such as a notebook
    seconds = {kind: usual / (cost.flop * passes) for kind, (passes, _, usual) in found.items()}
    if compiled:
        timed = machine.compiling.keys() & found.keys()
        more = {kind: max(0.0, found[kind][1] - found[kind][2]) / cost.functions for kind in timed}
        machine = replace(machine, compiling=more)
    elif cluster.compile:
        seconds |= {kind: seconds[kind] / COMPILED_GAIN for kind in machine.compiling.keys() & found.keys()}
    basis = "timed here in small; --measure is more exact" if quickly else "measured here"
    return replace(machine, seconds=seconds, basis=basis)


def _work(proposal: Proposal, device: torch.device, compiled: bool, flop: int) -> dict[str, _Work]:
    """Kind of work -> image passes of one repetition, and an endless iterator that runs one repetition per item.

    Args:
        device: device to compute on.
        compiled: True to compile steps.
        flop: operations of one image's forward pass, which limit the number of images by `QUICK_FLOP`; 0 for no limit.
    """
    config, shape, cluster = proposal.config.each_backbone()[0], proposal.shape, proposal.config.cluster
    real, batch = shape.training_images, evaluation_schedule(config, 0.01).batch_size
    matches = any("matching" in plan.passes for plan in proposal.plans)
    counts = {
        "matching": proposal.plans[0].chunk if matches else 1,
        "experts": min(config.experts.batch_size, real),
        "training": min(batch, shape.synthetic(config)),
        "real": min(batch, real),
        "scoring": min(SCORING_BATCH, real),
    }
    if flop:
        counts = {kind: max(2, min(n, int(QUICK_FLOP / (flop * FORWARD_PASSES[kind])))) for kind, n in counts.items()}
    spec = config.network.for_images(shape.image[0], shape.image[1:], shape.classes)
    stack = experts_at_a_time(config, shape.image, shape.classes)
    networks = [build_network(spec, seed).to(device) for seed in range(stack)]
    images = torch.randn(max(counts.values()), *shape.image, device=device)
    labels = torch.arange(len(images), device=device) % spec.classes
    first = {kind: (images[:count], labels[:count]) for kind, count in counts.items()}
    soft = torch.zeros(counts["matching"], spec.classes, device=device)
    synthetic = SyntheticSet(first["matching"][0], soft, torch.full((1,), 0.01, device=device), first["matching"][1])

    def matching() -> Iterator[object]:
        options = StepOptions(compiled, channels_last=cluster.channels_last, precision=precision_on(cluster, device))
        functions, start = StudentStepFunctions(FlatNetwork(networks[0]), options), flatten(networks[0])
        steps = draw_student_steps(len(soft), STEPS, len(soft), config.distill.augmentation, 0, 0)
        match = functools.partial(matching_gradient, functions, start, start + 1, synthetic, steps, chunk=len(soft))
        yield from (match() for _ in range(MANY))

    experts = StackFunctions(networks[0], stacked=stack, compile_=compiled, channels_last=cluster.channels_last)
    own, state = config.experts.model_copy(update={"epochs": MANY}), ExpertState.initial(networks)
    together = stack * (2 if own.optimiser == "gsam" else 1)
    schedule = replace(evaluation_schedule(config, 0.01), epochs=MANY, decay_epoch=None, warmup_epochs=0)
    of_matching = {"matching": (STEPS * counts["matching"], matching())} if matches else {}
    return of_matching | {
        "experts": (together * counts["experts"], train_experts(experts, *first["experts"], own, range(stack), state)),
        "training": (counts["training"], train(networks[0], *first["training"], schedule, 0)),
        "real": (counts["real"], train(networks[0], *first["real"], schedule, 0)),
        "scoring": (counts["scoring"], (predict_logits(networks[0], first["scoring"][0]) for _ in range(MANY))),
    }


def _seconds(work: Iterator[object], *, by_cpu: bool) -> tuple[float, float]:
    """Seconds of the first repetition, and median seconds of the following ones."""
    found: list[float] = []
    while len(found) <= REPEATED or sum(found[1:]) < SECONDS:
        began = _now(by_cpu)
        next(work)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(_now(by_cpu) - began)
    return found[0], statistics.median(found[1:])


def _now(by_cpu: bool) -> float:
    """Current time in seconds: of the clock, or CPU time of this process and of compilers that it started."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system if by_cpu else time.perf_counter()
