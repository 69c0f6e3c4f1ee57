"""Error of the float32 matching gradient over many problems: unrolling, and this package in both memory orders.

python benchmarks/bench_rounding.py [--problems 24]         (make bench-rounding)
python benchmarks/bench_rounding.py --experts               error and time of an expert's step; prints only
python benchmarks/bench_rounding.py --precisions            error in emulated TF32 and in bfloat16; prints only

A single problem says little: where rounding carries an activation over a rectifier's kink, a second derivative is taken
on its other side, and the error jumps from 1e-6 to 1e-3. How often that happens depends on the rounding of the
convolutions, which is measured beside it.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from bench_matching import Method, Ours, Shape
from facts import common_facts, head, parsed, present, sizes_and_places
from published_matching import Gradient, Problem, make_problem, unrolling
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from datm_ray.config import NetworkSpec
from datm_ray.core.compute.precision import Precision
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.core.training.experts import ExpertState
from datm_ray.methods.trajectory.matching import matching_gradient
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions

JUMP = 1e-5
"""Smallest error of the image gradient that shows that a kink was crossed. Rounding alone leaves less than 2e-6."""

HEADER = """ConvNet, depth 3, width 128, 32x32, 20 images a step, T = 5; random images, soft labels, parameters and
target of seeds 0 to n - 1.
Error: relative norm of the difference from float64 unrolling. A problem "jumps" where that of the images is above 1e-5:
rounding has carried an activation over a rectifier's kink."""


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference, divided by the norm of `exact`."""
    return float((value.double() - exact).norm() / exact.norm())


def convolution_rounding(memory_format: torch.memory_format) -> float:
    """Relative error of one float32 convolution of 128 channels, 32x32."""
    draw = torch.Generator().manual_seed(0)
    maps, kernel = torch.randn(20, 128, 32, 32, generator=draw), torch.randn(128, 128, 3, 3, generator=draw)
    exact = conv2d(maps.double(), kernel.double(), padding=1)
    return relative_error(conv2d(maps.contiguous(memory_format=memory_format), kernel, padding=1), exact)


def methods(shape: Shape) -> dict[str, Callable[[Problem], Gradient]]:
    """Methods to compare."""
    problem = make_problem(shape.spec, *shape.reference)
    first, last = (
        Ours(Method(shape, 1, channels_last=channels_last), problem.network, 0) for channels_last in (False, True)
    )
    return {"unrolling": unrolling, "ours, channels first": first, "ours, channels last (default)": last}


def errors_of(shape: Shape, problems: int) -> dict[str, list[list[float]]]:
    """Errors of the gradient in images, soft labels and step size, for each method and problem."""
    computed = methods(shape)
    errors: dict[str, list[list[float]]] = {name: [] for name in computed}
    for seed in range(problems):
        _, exact = unrolling(make_problem(shape.spec, *shape.reference, dtype=torch.float64, seed=seed))
        problem = make_problem(shape.spec, *shape.reference, seed=seed)
        for name, compute in computed.items():
            pairs = zip(compute(problem)[1], exact, strict=True)
            errors[name].append([relative_error(value, e) for value, e in pairs])
        print(f"{seed + 1} of {problems}", file=sys.stderr, flush=True)
    return errors


def table(errors: dict[str, list[list[float]]]) -> list[str]:
    """Format one line for each method."""
    lines = [
        "| method | problems that jump | median error of the others | largest error |",
        "| --- | --- | --- | --- |",
    ]
    for name, rows in errors.items():
        quiet = [row for row in rows if row[0] < JUMP]
        middle = [f"{statistics.median(part):.1e}" for part in zip(*quiet, strict=True)] if quiet else ["none"]
        largest = [f"{max(part):.0e}" for part in zip(*rows, strict=True)]
        jumps = f"{len(rows) - len(quiet)} of {len(rows)}"
        lines.append(f"| {name} | {jumps} | {' / '.join(middle)} | {' / '.join(largest)} |")
    return lines


def expert_lines(problems: int) -> Iterator[str]:
    """Yield a table's lines: error of an expert's float32 gradient against float64, and time, in both memory orders."""
    shapes = {
        "digits, 6 experts, batch 32": (6, 32, NetworkSpec(channels=1, size=(8, 8), classes=10, width=32, depth=2)),
        "CIFAR, 1 expert, batch 20": (1, 20, NetworkSpec(channels=3, size=(32, 32), classes=10)),
    }
    yield "| shape | method | median error | largest error | ms a call |"
    yield "| --- " * 5 + "|"
    for shape, (stacked, batch, spec) in shapes.items():
        errors, seconds = _expert_errors(stacked, batch, spec, problems)
        for name, values in errors.items():
            cells = [shape, name, f"{statistics.median(values):.1e}", f"{max(values):.0e}"]
            yield f"| {' | '.join(cells)} | {1000 * statistics.median(seconds[name]):.3g} |"


def _expert_errors(
    stacked: int, batch: int, spec: NetworkSpec, problems: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Errors and seconds of every method, measured in turns."""
    networks = [build_network(spec, seed) for seed in range(stacked)]
    state, weights = ExpertState.initial(networks), torch.full((batch,), 1 / batch)
    ours = {
        f"ours, channels {'last' if last else 'first'}{'' if compiled else ', uncompiled'}": StackFunctions(
            networks[0], stacked=stacked, compile_=compiled, channels_last=last
        )
        for compiled in (True, False)
        for last in (True, False)
    }
    names = ["plain torch", *ours]
    errors: dict[str, list[float]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(problems):
        draw = torch.Generator().manual_seed(seed)
        images = torch.randn(stacked, batch, spec.channels, *spec.size, generator=draw)
        labels = torch.randint(spec.classes, (stacked, batch), generator=draw)
        exact = _plainly(networks, images.double(), labels)
        for name in names:
            calls: list[Tensor] = []
            for _ in range(3):
                started = time.perf_counter()
                if name == "plain torch":
                    calls.append(_plainly(networks, images, labels))
                else:
                    calls.append(ours[name](state.parameters, state.buffers, images, labels, weights)[1])
                seconds[name].append(time.perf_counter() - started)
            errors[name] += [relative_error(one, right) for one, right in zip(calls[-1], exact, strict=True)]
    return errors, seconds


_ATEN = torch.ops.aten
PRODUCTS = {
    *(_ATEN.convolution.default, _ATEN.convolution_backward.default, _ATEN.mm.default),
    *(_ATEN.addmm.default, _ATEN.bmm.default, _ATEN.baddbmm.default),
}
"""Operations whose factors a GPU rounds to TF32."""


class EmulatedTf32(TorchDispatchMode):
    """Rounds the factors of all products to the 10 bits of TF32, as a GPU does; sums stay in float32."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        if function in PRODUCTS:
            arguments = tuple(map(self._rounded, arguments))
        return function(*arguments, **(options or {}))

    def _rounded(self, factor: Any) -> Any:
        if not isinstance(factor, Tensor) or factor.dtype != torch.float32:
            return factor
        bits = factor.contiguous().view(torch.int32)
        return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def precision_lines(problems: int) -> Iterator[str]:
    """Yield a table's lines: error of the uncompiled matching gradient in each precision against float64."""
    shapes = {
        "digits, 50 images, T = 10": (NetworkSpec(channels=1, size=(8, 8), classes=10, width=32, depth=2), 50, 10),
        "CIFAR, width 64, 20 images, T = 5": (NetworkSpec(channels=3, size=(32, 32), classes=10, width=64), 20, 5),
    }
    yield "| shape | precision | images: median error (largest) | least cosine | soft labels | step size |"
    yield "| --- " * 6 + "|"
    for shape, (spec, batch, steps) in shapes.items():
        errors: dict[Precision, list[list[float]]] = {"float32": [], "tf32": [], "bfloat16": []}
        for seed in range(problems):
            _, exact = unrolling(make_problem(spec, batch, steps, dtype=torch.float64, seed=seed))
            problem = make_problem(spec, batch, steps, seed=seed)
            for precision, rows in errors.items():
                own: Precision = "bfloat16" if precision == "bfloat16" else "float32"
                functions = StudentStepFunctions(problem.network, StepOptions(compiled=False, precision=own))
                with EmulatedTf32() if precision == "tf32" else nullcontext():
                    found = matching_gradient(
                        functions, problem.start, problem.target, problem.synthetic, problem.placed()
                    )
                parts = (found.images, found.soft_labels, found.step_size)
                row = [relative_error(value, e) for value, e in zip(parts, exact, strict=True)]
                flat = found.images.double().flatten(), exact[0].flatten()
                rows.append([*row, float(torch.cosine_similarity(*flat, dim=0))])
        for precision, rows in errors.items():
            images, labels, step_size, cosine = zip(*rows, strict=True)
            cells = [f"{statistics.median(each):.2g} ({max(each):.2g})" for each in (images, labels, step_size)]
            yield f"| {shape} | {precision} | {cells[0]} | {min(cosine):.5f} | {cells[1]} | {cells[2]} |"


def _plainly(networks: Sequence[nn.Module], images: Tensor, labels: Tensor) -> Tensor:
    """Gradients [s p] of modules one after the other, by autograd."""
    rows = []
    for network, x, y in zip(networks, images, labels, strict=True):
        own = copy.deepcopy(network).to(x.dtype)
        parts = torch.autograd.grad(cross_entropy(own(x), y), list(own.parameters()))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def main() -> None:
    """Compute all problems; print and save the table."""
    parser = sizes_and_places(__doc__)
    parser.add_argument("--problems", type=int, default=24)
    parser.add_argument("--experts", action="store_true", help="of an expert's step; written nowhere")
    parser.add_argument("--precisions", action="store_true", help="TF32 and bfloat16; written nowhere")
    arguments = parsed(parser)
    if arguments.experts or arguments.precisions:
        torch.set_num_threads(1)
        for line in (expert_lines if arguments.experts else precision_lines)(arguments.problems):
            print(line, flush=True)
        return
    size = (2, 4, (3, 8, 8), 4, 8, 8, (8, 2)) if arguments.quick else (3, 128, (3, 32, 32), 10, 20, 20, (20, 5))
    errors = errors_of(Shape("rounding", *size), arguments.problems)  # type: ignore[arg-type]
    facts = {**common_facts(__file__, sys.argv[1:]), "threads": str(len(os.sched_getaffinity(0)))}
    rounding = {
        "channels first": convolution_rounding(torch.contiguous_format),
        "channels last": convolution_rounding(torch.channels_last),
    }
    listed = ", ".join(f"{name} {value:.1e}" for name, value in rounding.items())
    lines = [
        *head("Rounding of the matching gradient", facts),
        HEADER,
    ]
    lines += ["", *table(errors), "", f"Relative rounding of one convolution of 128 channels: {listed}."]
    present(arguments.out, "rounding", lines, {**facts, "convolution": rounding, "errors": errors})


if __name__ == "__main__":
    main()
