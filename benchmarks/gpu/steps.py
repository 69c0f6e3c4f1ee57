"""What an iteration of distillation costs: seconds, memory and share of the device's matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from published_matching import Gradient, Problem, make_problem, step_operations, tesla, unrolling

from datm_ray.config import PUBLISHED_AUGMENTATION, NetworkSpec
from datm_ray.core.compute.precision import Precision, tf32_products
from datm_ray.methods.trajectory.matching import matching_gradient
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions
from gpu.machine import Machine, ceiling, free_memory, measured, timed
from gpu.sections import Clock, Row, Section, in_a_line

LARGEST_REPLAYED = 100
"""Largest batch that is also measured with CUDA graphs, which save launches."""


@dataclass(frozen=True)
class Shape:
    """A data set and how many of its images are distilled."""

    name: str
    spec: NetworkSpec
    images: int
    """In the set."""
    batch: int
    """Images of a student step."""
    steps: int
    """T."""
    chunk: int
    """Images of a call."""


def shapes(machine: Machine) -> list[Shape]:
    """Published settings; a batch of 1,000 replaces those of 5,000 and 10,000."""
    if machine.small:
        return [Shape("tiny", NetworkSpec(channels=3, size=(8, 8), classes=4, width=4, depth=2), 8, 8, 2, 4)]
    cifar, hundred = (NetworkSpec(channels=3, size=(32, 32), classes=classes) for classes in (10, 100))
    tiny = NetworkSpec(channels=3, size=(64, 64), classes=200, depth=4)
    return [
        Shape("CIFAR-10 IPC 10", cifar, 100, 100, 80, 100),
        Shape("CIFAR-100 IPC 50", hundred, 5_000, 1_000, 80, 500),
        Shape("CIFAR-10 IPC 1", cifar, 10, 10, 80, 10),
        Shape("Tiny-ImageNet IPC 50", tiny, 10_000, 1_000, 20, 250),
    ]


@functools.cache
def operations(spec: NetworkSpec) -> int:
    """Floating-point operations of one image's forward and reverse step: products and convolutions as they are defined.

    Of reverse over reverse, traced; what a compiler leaves out is counted too.
    """
    problem = make_problem(spec, 2, 1)
    functions = StudentStepFunctions(problem.network, StepOptions(compiled=False))
    return step_operations(functions, (spec.channels, *spec.size), spec.classes)


def ours(problem: Problem, functions: StudentStepFunctions, chunk: int) -> Gradient:
    """Measure `matching_gradient`."""
    found = matching_gradient(functions, problem.start, problem.target, problem.synthetic, problem.steps, chunk=chunk)
    return found.loss, (found.images, found.soft_labels, found.step_size)


def measured_row(
    machine: Machine,
    shape: Shape,
    method: str,
    precision: Precision,
    call: Callable[[], Any],
    clock: Clock,
    rate: float | None,
    warm_up: float = 0.0,
) -> Row:
    """Seconds, memory and rate of one method; running out of memory is a result."""
    row: Row = {"shape": shape.name, "T": shape.steps, "batch": shape.batch, "method": method, "precision": precision}
    try:
        first, _ = timed(call, machine.device)
        calls = 1 if machine.small else max(1, min(5, int(min(12.0, clock.left() / 3) / max(first, 1e-3))))
        found = measured(call, machine.device, calls, warm=0)
    except torch.OutOfMemoryError:
        return {**row, "seconds": "out of memory"}
    except Exception as failure:
        return {**row, "failed": in_a_line(failure), "seconds": in_a_line(failure)}
    finally:
        free_memory(machine.device)
    count = operations(shape.spec) * shape.batch * shape.steps
    row |= {"seconds": found.seconds, "peak MiB": round(found.peak / 2**20), "warm-up s": warm_up + first}
    if rate is not None:
        row |= {"TFLOP": count / 1e12, "TFLOP/s": count / 1e12 / found.median}
        row["of ceiling"] = f"{count / found.median / rate:.0%}"
    return row


def rows_of(machine: Machine, shape: Shape, rates: dict[Precision, float], clock: Clock) -> Iterator[Row]:
    """Rows of one shape: this package in every precision, then the others in float32 and in torch's default."""
    problem = make_problem(
        shape.spec,
        shape.batch,
        shape.steps,
        device=machine.device,
        strategy=PUBLISHED_AUGMENTATION,
        images=shape.images,
    )
    image = (shape.spec.channels, *shape.spec.size)
    for precision in machine.precisions:
        functions = StudentStepFunctions(problem.network, StepOptions(machine.compiled, precision=precision))
        prepare = functools.partial(functions.prepare, shape.chunk, image, shape.spec.classes)
        try:
            compiling, _ = timed(prepare, machine.device)
        except Exception as failure:  # a failing compiler must not hide the uncompiled rows
            yield {"shape": shape.name, "method": "ours", "precision": precision, "failed": in_a_line(failure)}
            functions, compiling = StudentStepFunctions(problem.network, StepOptions(False, precision=precision)), 0.0
        name = "ours" if functions._compiled else f"ours, uncompiled {functions.note}"
        call = functools.partial(ours, problem, functions, shape.chunk)
        yield measured_row(machine, shape, name, precision, call, clock, rates[precision], compiling)
    if machine.device == "cuda" and shape.batch <= LARGEST_REPLAYED:
        functions = StudentStepFunctions(problem.network, StepOptions(machine.compiled, precision="tf32", graphs=True))
        call = functools.partial(ours, problem, functions, shape.chunk)
        yield measured_row(machine, shape, "ours, CUDA graphs", "tf32", call, clock, rates["tf32"])
    for name, method in (("full unrolling", unrolling), ("TESLA", tesla)):
        yield measured_row(machine, shape, name, "float32", functools.partial(method, problem), clock, None)
    if machine.device == "cuda":
        with tf32_products(True, torch.device(machine.device)):
            yield measured_row(
                machine, shape, "full unrolling", "tf32", functools.partial(unrolling, problem), clock, None
            )


def measure(machine: Machine, clock: Clock) -> Iterator[Row]:
    """Measure the ceilings, then the shapes."""
    rates: dict[Precision, float] = {}
    for precision in machine.precisions:
        rates[precision] = ceiling(machine, precision)
        yield {"shape": "a product of random matrices", "precision": precision, "TFLOP/s": rates[precision] / 1e12}
    for shape in shapes(machine):
        yield from rows_of(machine, shape, rates, clock)


SECTION = Section(
    "steps",
    "3. What does an iteration cost?",
    "The matching loss and its gradient, all DSA operations, random tensors; ConvNet, instance normalisation. Seconds: "
    "of a call, median (smallest to largest); on a GPU between two events. Warm-up: the first call, with compilation. "
    "Peak: of torch's allocator beyond the problem itself. TFLOP: products and convolutions of one call as they are "
    "defined, a multiply-add is two; their rate over that of a large product in the same precision is the share of the "
    "ceiling. Full unrolling and TESLA run uncompiled, as published; in float32 without TF32, and in tf32 with it in "
    "all products. Out of memory is a result.",
    (
        "shape",
        "T",
        "batch",
        "method",
        "precision",
        "seconds",
        "peak MiB",
        "TFLOP",
        "TFLOP/s",
        "of ceiling",
        "warm-up s",
    ),
    seconds=170,
    least=20,
    measure=measure,
)
