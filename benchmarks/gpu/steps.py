"""What an iteration of distillation costs: seconds, memory and share of the device's matrix products."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from published_matching import Gradient, Problem, make_problem, step_operations, tesla, unrolling
from turns import timed

from datm_ray.config import PUBLISHED_AUGMENTATION, NetworkSpec
from datm_ray.core.compute.gpu import sent
from datm_ray.core.compute.precision import Precision, tf32_products
from datm_ray.methods.trajectory.iteration import Match, MatchingState, Origin
from datm_ray.methods.trajectory.matching import draw_student_steps, matching_gradient, place_steps
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions
from datm_ray.runtime.ahead import Ahead
from gpu.exactness import SETTINGS, Recorded, reproducible
from gpu.machine import Machine, ceiling, free_memory, measured
from gpu.sections import Clock, Row, Section, Work, in_a_line


@dataclass(frozen=True)
class Shape:
    """A data set and how many of its images are distilled."""

    name: str
    spec: NetworkSpec
    images: int
    """Number of images in the set."""
    batch: int
    """Images of a student step."""
    steps: int
    """Number of student steps of an iteration, T."""
    chunk: int
    """Largest number of images in one call of the step functions."""


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

    The traced functions of reverse over reverse are counted, with operations that a compiler leaves out.
    """
    problem = make_problem(spec, 2, 1)
    functions = StudentStepFunctions(problem.network, StepOptions(compiled=False))
    return step_operations(functions, (spec.channels, *spec.size), spec.classes)


def ours(problem: Problem, functions: StudentStepFunctions, chunk: int) -> Gradient:
    """Loss and gradient by `matching_gradient`, in the form in which `unrolling` and `tesla` return them."""
    found = matching_gradient(functions, problem.start, problem.target, problem.synthetic, problem.placed(chunk))
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
        return {**row, "failed": in_a_line(failure)}
    finally:
        free_memory(machine.device)
    count = operations(shape.spec) * shape.batch * shape.steps
    row |= {"seconds": found.seconds, "peak MiB": round(found.peak / 2**20), "warm-up s": warm_up + first}
    if rate is not None:
        row |= {"TFLOP": count / 1e12, "TFLOP/s": count / 1e12 / found.median}
        row["of ceiling"] = f"{count / found.median / rate:.0%}"
    return row


@dataclass(frozen=True)
class _Measurer:
    """Measures one shape in several ways, one row each."""

    machine: Machine
    shape: Shape
    rates: dict[Precision, float]
    clock: Clock
    kept: dict[tuple[StepOptions, bool], StudentStepFunctions] = field(default_factory=dict)
    """Options, and True for deterministic algorithms -> functions, which are compiled once."""

    def functions(self, options: StepOptions) -> StudentStepFunctions:
        """Step functions with these options. CUDA graphs record what is compiled for steps without."""
        key = options, torch.are_deterministic_algorithms_enabled()
        if key not in self.kept and options.graphs is False:
            self.kept[key] = StudentStepFunctions(self.problem.network, options)
        elif key not in self.kept:
            self.kept[key] = Recorded(self.functions(replace(options, graphs=False)), options.graphs)
        return self.kept[key]

    @functools.cached_property
    def problem(self) -> Problem:
        """Random set and minibatches of the shape, on the device."""
        shape = self.shape
        return make_problem(
            shape.spec,
            shape.batch,
            shape.steps,
            device=self.machine.device,
            strategy=PUBLISHED_AUGMENTATION,
            images=shape.images,
        )

    def work(self, method: str, run: Callable[[], Row | Iterator[Row]], precision: Precision | None = None) -> Work:
        """Work that measures the shape in one way; in a run's precision unless another is given."""
        what = {"shape": self.shape.name, "method": method, "precision": precision or self.machine.precision}
        return Work(what, run)

    def ours(self, name: str, **changes: Any) -> Work:
        """Measure this package with a run's options, some of them changed."""
        options = self.machine.options(**changes)
        return self.work(name, functools.partial(self._ours, name, options), options.precision)

    def _ours(self, name: str, options: StepOptions) -> Iterator[Row]:
        shape = self.shape
        row, image = {"shape": shape.name, "precision": options.precision}, (shape.spec.channels, *shape.spec.size)
        functions = self.functions(options)
        try:
            prepare = functools.partial(functions.prepare, shape.chunk, image, shape.spec.classes)
            compiling, _ = timed(prepare, self.machine.device)
        except torch.OutOfMemoryError:  # a graph keeps the memory of its whole call
            functions.forget()
            free_memory(self.machine.device)
            yield {**row, "T": shape.steps, "batch": shape.batch, "method": name, "seconds": "out of memory"}
            return
        except Exception as failure:  # a failing compiler must not hide the uncompiled rows
            yield {**row, "method": name, "failed": in_a_line(failure)}
            functions, compiling = self.functions(replace(options, compiled=False)), 0.0
        if not functions._compiled:
            name = f"{name}, uncompiled {functions.note}".rstrip()
        elif compiling:
            self.machine.noted["steps", shape.name, name, options.precision, "compiling"] = compiling
        call = functools.partial(ours, self.problem, functions, shape.chunk)
        yield self._row(name, options.precision, call, self.rates.get(options.precision), compiling)
        if isinstance(functions, Recorded):
            functions.forget()  # graphs would keep their memory; what they recorded stays compiled

    def theirs(self, name: str, method: Callable[[Problem], Gradient], precision: Precision) -> Work:
        """Measure full unrolling or TESLA, uncompiled as published."""

        def run() -> Row:
            with tf32_products(precision == "tf32", self.machine.place):
                return self._row(name, precision, functools.partial(method, self.problem))

        return self.work(name, run, precision)

    def _row(
        self,
        name: str,
        precision: Precision,
        call: Callable[[], Any],
        rate: float | None = None,
        warm_up: float = 0.0,
    ) -> Row:
        """Row of one way, whose seconds are noted for `gpu/constants.py`."""
        row = measured_row(self.machine, self.shape, name, precision, call, self.clock, rate, warm_up)
        if isinstance(row.get("seconds"), list):
            known = name.partition(", uncompiled")[0]
            self.machine.noted["steps", self.shape.name, known, precision] = statistics.median(row["seconds"])
        return row

    def reproducible(self) -> Iterator[Row]:
        """Measure what `cluster.deterministic` costs."""
        with reproducible():
            yield from self._ours("ours, deterministic", self.machine.options())

    def iterations(self, method: str, *, ahead: bool) -> Row:
        """Seconds of iterations as a run has them: experts from main memory, draws, their copies, gradient, update.

        Args:
            ahead: True to prepare each iteration's inputs in a thread during the one before, as a run on a GPU does.
        """
        machine, shape, problem = self.machine, self.shape, self.problem
        functions = self.functions(machine.options())
        parameters = [each.cpu().numpy() for each in (problem.start, problem.target)]
        state, count = MatchingState(problem.synthetic, SETTINGS), 3 if machine.small else 12

        def inputs(iteration: int) -> Match:
            drawn = draw_student_steps(shape.images, shape.steps, shape.batch, PUBLISHED_AUGMENTATION, 0, iteration)
            steps = place_steps(drawn, shape.chunk, problem.synthetic.images)
            start, target = (sent(torch.from_numpy(each), machine.place) for each in parameters)
            return Match(functions, start, target, steps)

        prepared = Ahead(inputs, count, in_thread=ahead)

        def iterate(number: int) -> None:
            state.step([prepared.get(number)], [Origin(0, 0)])

        seconds = [timed(functools.partial(iterate, number), machine.device)[0] for number in range(count)]
        prepared.close()
        row: Row = {"shape": shape.name, "T": shape.steps, "batch": shape.batch, "method": method}
        return row | {"precision": machine.precision, "seconds": seconds[2:], "warm-up s": seconds[0]}


def works(machine: Machine, clock: Clock) -> Iterator[Work]:
    """List the ceilings, then all shapes as a run has them, what differs from a run, and other precisions."""
    rates: dict[Precision, float] = {}
    for precision in machine.precisions:
        what = {"shape": "a product of random matrices", "precision": precision}
        yield Work(what, functools.partial(ceiling_row, machine, precision, rates))
    first, *others = (_Measurer(machine, shape, rates, clock) for shape in shapes(machine))
    yield from as_in_a_run([first])
    for ahead in (True, False):
        method = f"iterations of a run, inputs {'ahead' if ahead else 'not ahead'}"
        yield first.work(method, functools.partial(first.iterations, method, ahead=ahead))
    yield from as_in_a_run(others[:1])
    if machine.device == "cuda":  # a large and a small call, whatever the default takes
        for each in (*others[:1], first):
            yield from (each.ours(f"ours, {'' if graphs else 'no '}CUDA graphs", graphs=graphs) for graphs in BOTH)
    order = "first" if machine.channels_last else "last"
    yield first.ours(f"ours, channels {order}", channels_last=not machine.channels_last)
    yield first.work("ours, deterministic", first.reproducible)
    yield from as_in_a_run(others[1:])
    yield from in_other_ways([first, *others])


BOTH = (True, False)


def ceiling_row(machine: Machine, precision: Precision, rates: dict[Precision, float]) -> Row:
    """Rate of a large product, which is also kept in `rates`."""
    rates[precision] = ceiling(machine, precision)
    return {"TFLOP/s": rates[precision] / 1e12}


def as_in_a_run(measurers: Sequence[_Measurer]) -> Iterator[Work]:
    """List shapes with a run's options, and full unrolling in the same precision."""
    for each in measurers:
        yield each.ours("ours")
        yield each.theirs("full unrolling", unrolling, each.machine.precision)


def in_other_ways(measurers: Sequence[_Measurer]) -> Iterator[Work]:
    """List every shape in the precisions that a run does not take by default, and the other published way."""
    for each in measurers:
        machine = each.machine
        yield each.theirs("TESLA", tesla, machine.precision)
        for precision in machine.precisions[1:]:
            yield each.ours("ours", precision=precision)
        if machine.precision != "float32":
            yield each.ours("ours, channels first", precision="float32", channels_last=False)
            yield each.theirs("full unrolling", unrolling, "float32")


SECTION = Section(
    "steps",
    "4. What does an iteration cost?",
    "The matching loss and its gradient, all DSA operations, random tensors; ConvNet, instance normalisation. Seconds: "
    "of a call, median (smallest to largest); on a GPU between two events. Warm-up: the first call, with compilation. "
    "Peak: of torch's allocator beyond the problem itself. TFLOP: products and convolutions of one call as they are "
    "defined, a multiply-add is two; their rate over that of a large product in the same precision is the share of the "
    "ceiling. `ours`: with a run's precision, memory order and CUDA graphs (`cluster.cuda_graphs: null`) unless the "
    "row names another. Full unrolling and TESLA run uncompiled, as published. Iterations of a run: with draws, copies "
    "to the device, gradient and update, the inputs prepared during the iteration before, or not. Out of memory is a "
    "result.",
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
    seconds=150,
    least=20,
    works=works,
)
