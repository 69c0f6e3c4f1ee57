"""Constants that plans and defaults assume for GPUs, beside what this card has.

A child is a process of its own: `python -m gpu.constants` in the folder `benchmarks`. It makes a context of CUDA,
prints one line of JSON, and ends when its input does.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from facts import status
from published_matching import make_problem

from datm_ray.config import PUBLISHED_AUGMENTATION
from datm_ray.core.networks.image_cost import image_cost
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stack_trial import KEPT_MAPS, KEPT_VECTORS, STATE_VECTORS
from datm_ray.core.training.loop import COMPILED_STEPS, predict_logits
from datm_ray.methods.trajectory.matching import BLOCK_BYTES, BLOCK_COPIES
from datm_ray.methods.trajectory.step_functions import REPLAYED_FLOP, StudentStepFunctions
from datm_ray.planning.machines import BANDWIDTH, COMPILING, FORWARD_PASSES, LATENCY, READERS, SPEED
from gpu import peaks
from gpu.experts import our_epochs, setting, ways
from gpu.machine import Machine, measured
from gpu.networks import epochs_of
from gpu.sections import Clock, NotHere, Section, Work
from gpu.steps import Shape, ours, shapes


def assumed(module: str, name: str) -> Any:
    """Value of a constant; "" if its module needs a package that is not installed here."""
    try:
        return getattr(import_module(f"datm_ray.{module}"), name)
    except ImportError:
        return ""


class _Speeds:
    """Speed of student steps, measured once, and times of other work relative to it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    @cached_property
    def of_steps(self) -> float:
        """FLOP/s of student steps, as `FORWARD_PASSES` counts them."""
        machine, shape = self._machine, shapes(self._machine)[0]
        spec, batch, count = shape.spec, shape.batch, min(shape.steps, 10)
        problem = make_problem(spec, batch, count, device=machine.device, strategy=PUBLISHED_AUGMENTATION)
        call = partial(ours, problem, StudentStepFunctions(problem.network, machine.options()), batch)
        seconds = measured(call, machine.device, 1 if machine.small else 5).median
        flop = image_cost(problem.network.module, (spec.channels, *spec.size)).flop
        return FORWARD_PASSES["matching"] * flop * batch * count / seconds

    def passes(self, kind: str) -> float:
        """Time of an image's work of this kind, in forward passes at the speed of student steps."""
        machine = self._machine
        with machine.as_in_a_run():
            training, epochs = epochs_of(machine, 10, 1)
            network, images = training.network, training.images
            calls = {"training": partial(next, epochs), "scoring": partial(predict_logits, network, images)}
            seconds = measured(calls[kind], machine.device, 2 if machine.small else 20).median
        return seconds * self.of_steps / (image_cost(network, tuple(images.shape[1:])).flop * len(images))

    def passes_of_experts(self) -> float:
        """Time of an image in an expert's step, in forward passes at the speed of student steps."""
        machine, how, way = self._machine, setting(self._machine), next(iter(ways(self._machine).values()))
        flop = image_cost(build_network(how.spec, 0), (how.spec.channels, *how.spec.size)).flop
        with machine.as_in_a_run():
            epochs = our_epochs(machine, how, way, gsam=False)
            seconds = measured(partial(next, epochs), machine.device, 1 if machine.small else 2).median
        return seconds * self.of_steps / (flop * how.images * way.stacked)


def context() -> dict[str, float]:
    """GPU memory of another process's context of CUDA, and that process's peak of main memory, in bytes."""
    place = Path(__file__).resolve().parents[1]
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), str(place.parent)])}
    child = subprocess.Popen(
        [sys.executable, "-m", "gpu.constants"],
        cwd=place,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdout is not None
    try:
        found: dict[str, float] = json.loads(child.stdout.readline())
        after = torch.cuda.mem_get_info()[0]
    finally:
        child.communicate("\n", timeout=60)
    return {"context": before - after - found["reserved"], "main memory": found["main memory"]}


def child() -> None:
    """Make a context and libraries' handles on the GPU, report them, and wait for the end of the input."""
    maps = torch.randn(8, 3, 32, 32, device="cuda", requires_grad=True)
    features = torch.nn.Conv2d(3, 128, 3, device="cuda")(maps).flatten(1)
    features.matmul(torch.ones(features.shape[1], 8, device="cuda")).sum().backward()
    torch.cuda.synchronize()
    facts = {"reserved": torch.cuda.memory_reserved(), "main memory": status("VmHWM")}
    print(json.dumps(facts), flush=True)
    sys.stdin.read()


def graphs_gain(machine: Machine) -> str:
    """Times without CUDA graphs as multiples of those with them, by the work of a call; from section 4."""
    require_gpus(machine, 1)
    gains = []
    for shape in shapes(machine)[:2]:
        pair = [noted(machine, shape, f"ours, {each}CUDA graphs") for each in ("no ", "")]
        network = build_network(shape.spec, 0)
        work = shape.chunk * image_cost(network, (shape.spec.channels, *shape.spec.size)).flop
        gains.append(f"{work:.2g}: {pair[0] / pair[1]:.2f} times as fast")
    return "; ".join(gains)


def order_gain(machine: Machine) -> str:
    """Time with the other memory order as a multiple of that with a run's; from section 4."""
    shape, other = shapes(machine)[0], "first" if machine.channels_last else "last"
    ratio = noted(machine, shape, f"ours, channels {other}") / noted(machine, shape, "ours")
    return f"{machine.precision}: channels {other} take {ratio:.2f} times as long"


def compiling(machine: Machine) -> float:
    """Seconds to compile student steps per torch function of the network's forward pass; from section 4."""
    shape = shapes(machine)[0]
    seconds = of_section(machine, "steps", shape.name, "ours", machine.precision, "compiling")
    return seconds / image_cost(build_network(shape.spec, 0), (shape.spec.channels, *shape.spec.size)).functions


def steps_until_compiled(machine: Machine) -> float | str:
    """Steps of one network after which a stack of five has saved the time that compiling it took; from section 6."""
    require_gpus(machine, 1)
    found = partial(of_section, machine, "evaluation", "10 images per class")
    step, first = min((found(way, "step"), found(way, "first")) for way in ("5 of 5 in a call", "1 of 5 in a call"))
    saved = found("1 of 1 in a call", "step") - step
    return first / saved if saved > 0 else "a stack saves no time"


def on_a_gpu(machine: Machine, measure: Callable[[Machine], float]) -> float:
    """What `measure` finds on a GPU, whose memory is counted."""
    require_gpus(machine, 1)
    return measure(machine)


def cpus_of_a_gpu(machine: Machine) -> float:
    """CPUs that this process may use, for each GPU of the machine."""
    require_gpus(machine, 1)
    return len(os.sched_getaffinity(0)) / torch.cuda.device_count()


def noted(machine: Machine, shape: Shape, method: str) -> float:
    """Seconds that section 4 found.

    Raises:
        NotHere: that row was not reached in this run.
    """
    return of_section(machine, "steps", shape.name, method, machine.precision)


def of_section(machine: Machine, *names: str) -> float:
    """Value that an earlier section noted under these names.

    Raises:
        NotHere: it was not noted.
    """
    if names not in machine.noted:
        raise NotHere(f"it is measured in section {names[0]}")
    return machine.noted[names]


def require_gpus(machine: Machine, count: int) -> None:
    """Raise `NotHere` if the measured device is no GPU, or this machine has fewer of them."""
    if machine.device != "cuda" or torch.cuda.device_count() < count:
        raise NotHere(f"it takes {'a GPU' if count == 1 else f'{count} GPUs'}")


def of_sums(machine: Machine, name: str) -> float:
    """Latency in seconds, or bandwidth in bytes per second, of sums between two GPUs; from section 3."""
    require_gpus(machine, 2)
    return of_section(machine, "sums", name)


def constant(name: str, where: str, value: Any, measure: Callable[[], float | str]) -> Work:
    """A constant, where it is, what it is, and what was measured."""
    assumed = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    return Work({"constant": name, "where": where, "assumed": assumed}, lambda: {"measured": measure()})


def works(machine: Machine, _: Clock) -> list[Work]:
    """List what plans and defaults assume of GPUs."""
    found, machines, steps = _Speeds(machine), "planning/machines.py", "methods/trajectory/step_functions.py"
    sizes = functools.cache(partial(context_of, machine))

    def process(name: str, where: str, key: str) -> Work:
        value = assumed(where.removesuffix(".py").replace("/", "."), name)
        return constant(name, where, value, lambda: sizes()[key])

    gpu_speed = assumed("stages.methods.recovery", "GPU_SPEED")
    order = f"channels {'last' if machine.channels_last else 'first'}"
    return [
        constant('SPEED["GPU"], FLOP/s', machines, SPEED["GPU"], lambda: found.of_steps),
        constant("REPLAYED_FLOP", steps, REPLAYED_FLOP, partial(graphs_gain, machine)),
        constant("memory order", "runtime/machine/devices.py", order, partial(order_gain, machine)),
        process("CONTEXT_BYTES", "core/compute/gpu.py", "context"),
        process("GPU_PROCESS_BYTES", "planning/memory.py", "main memory"),
        constant('LATENCY["GPU"], s', machines, LATENCY["GPU"], partial(of_sums, machine, "latency")),
        constant('BANDWIDTH["GPU"], bytes/s', machines, BANDWIDTH["GPU"], partial(of_sums, machine, "bandwidth")),
        constant(
            "GPU_SPEED, of a core", "stages/methods/recovery.py", gpu_speed, lambda: found.of_steps / SPEED["core"]
        ),
        *(
            constant(f'FORWARD_PASSES["{kind}"]', machines, FORWARD_PASSES[kind], partial(found.passes, kind))
            for kind in ("training", "scoring")
        ),
        constant('FORWARD_PASSES["experts"]', machines, FORWARD_PASSES["experts"], found.passes_of_experts),
        constant('COMPILING["matching"], s', machines, COMPILING["matching"], partial(compiling, machine)),
        constant("COMPILED_STEPS", "core/training/loop.py", COMPILED_STEPS, partial(steps_until_compiled, machine)),
        constant("READERS", machines, READERS, partial(cpus_of_a_gpu, machine)),
        *peaks_of(machine),
    ]


def peaks_of(machine: Machine) -> list[Work]:
    """List memory that plans and trials assume."""
    matching, trial = "methods/trajectory/matching.py", "core/networks/stack_trial.py"
    vectors = functools.cache(partial(peaks.vectors, machine))

    def row(name: str, where: str, value: float, measure: Callable[[Machine], float]) -> Work:
        return constant(name, where, value, partial(on_a_gpu, machine, measure))

    return [
        row("BLOCK_COPIES", matching, BLOCK_COPIES, lambda machine: peaks.block_copies(machine, BLOCK_BYTES)),
        row("BLOCK_BYTES", matching, BLOCK_BYTES, peaks.block_bytes),
        row("KEPT_VECTORS", trial, KEPT_VECTORS, lambda _: vectors()["step"]),
        row("STATE_VECTORS", trial, STATE_VECTORS, lambda _: vectors()["training"]),
        row("KEPT_MAPS", trial, KEPT_MAPS, peaks.kept_maps),
    ]


NO_ROW = {
    "COMPILED_FROM": "measured on a CPU; its docstring assumes GPU_SPEED, which has a row",
    "CPU_BLOCK_BYTES": "measured on a CPU; its docstring assumes BLOCK_BYTES, which has a row",
    "STREAM_BYTES": "a user's Parquet files decide",
    "PHOTO_BYTES": "counted: 20 megapixels of three bytes",
}
"""Constant whose docstring names an assumption and that has no row -> why."""


def context_of(machine: Machine) -> dict[str, float]:
    """Sizes of `context`, for which a GPU is needed."""
    require_gpus(machine, 1)
    return context()


SECTION = Section(
    "constants",
    "8. Is what plans assume right?",
    "Constants of plans and defaults for GPUs, and what this card has. Forward passes: time of an image, as a multiple "
    "of its forward pass at the speed of student steps. Context: GPU memory that another process takes beside its "
    "tensors; its peak of main memory with torch alone. `REPLAYED_FLOP`: calls with more work are not replayed as CUDA "
    "graphs; what graphs gain below and above it. Latency and bandwidth: of sums between two GPUs of this machine. "
    "`COMPILED_STEPS`: after so many steps five networks together have saved what compiling takes. `READERS`: CPUs for "
    "each GPU here. `BLOCK_BYTES`: smaller blocks take more time for each byte. Copies, maps and vectors: multiples of "
    "memory, see the constants' docstrings.",
    ("constant", "where", "assumed", "measured"),
    seconds=45,
    least=5,
    works=works,
)

if __name__ == "__main__":
    child()
