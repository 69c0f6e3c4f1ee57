"""Error of the float32 matching gradient over many problems: unrolling, and this package in both memory orders.

python benchmarks/bench_rounding.py [--problems 24]         (make bench-rounding)

A single problem says little: where rounding carries an activation over a rectifier's kink, a second derivative is taken
on its other side, and the error jumps from 1e-6 to 1e-3. How often that happens depends on the rounding of the
convolutions, which is measured beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from bench_matching import Gradient, Method, Ours, Problem, Shape, make_problem, unrolling
from facts import common_facts, head, result_path, save
from torch import Tensor
from torch.nn.functional import conv2d

JUMP = 1e-5
"""Error of the image gradient from which on a kink was crossed: rounding alone leaves less than 2e-6."""

HEADER = """ConvNet, depth 3, width 128, 32x32, 20 images a step, T = 5; random images, soft labels, parameters and
target of seeds 0 to n - 1.
Error: relative norm of the difference from float64 unrolling. A problem "jumps" where that of the images is above 1e-5:
rounding has carried an activation over a rectifier's kink."""


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact one."""
    return float((value.double() - exact).norm() / exact.norm())


def convolution_rounding(memory_format: torch.memory_format) -> float:
    """Relative error of one float32 convolution of 128 channels, 32x32."""
    draw = torch.Generator().manual_seed(0)
    maps, kernel = torch.randn(20, 128, 32, 32, generator=draw), torch.randn(128, 128, 3, 3, generator=draw)
    exact = conv2d(maps.double(), kernel.double(), padding=1)
    return relative_error(conv2d(maps.contiguous(memory_format=memory_format), kernel, padding=1), exact)


def methods(shape: Shape) -> dict[str, Callable[[Problem], Gradient]]:
    """What is compared."""
    problem = make_problem(Method(shape, 1), *shape.reference, torch.float32)
    first, last = (
        Ours(Method(shape, 1, channels_last=channels_last), problem.network, 0) for channels_last in (False, True)
    )
    return {"unrolling": unrolling, "ours, channels first": first, "ours, channels last (default)": last}


def errors_of(shape: Shape, problems: int) -> dict[str, list[list[float]]]:
    """For each method and problem the errors of the gradient in images, soft labels and step size."""
    computed = methods(shape)
    errors: dict[str, list[list[float]]] = {name: [] for name in computed}
    for seed in range(problems):
        method = Method(shape, shape.reference[1])
        _, exact = unrolling(make_problem(method, *shape.reference, torch.float64, seed))
        problem = make_problem(method, *shape.reference, torch.float32, seed)
        for name, compute in computed.items():
            pairs = zip(compute(problem)[1], exact, strict=True)
            errors[name].append([relative_error(value, e) for value, e in pairs])
        print(f"{seed + 1} of {problems}", file=sys.stderr, flush=True)
    return errors


def table(errors: dict[str, list[list[float]]]) -> list[str]:
    """One line for each method."""
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


def main() -> None:
    """Compute all problems; print the table and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=24)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; written nowhere unless --out is given")
    parser.add_argument("--out", type=Path, help="folder for the results; benchmarks/results unless --quick")
    arguments = parser.parse_args()
    size = (2, 4, (3, 8, 8), 4, 8, 8, (8, 2)) if arguments.quick else (3, 128, (3, 32, 32), 10, 20, 20, (20, 5))
    errors = errors_of(Shape("rounding", *size), arguments.problems)  # type: ignore[arg-type]
    facts = {**common_facts(__file__, sys.argv[1:]), "threads": str(len(os.sched_getaffinity(0)))}
    rounding = {
        "channels first": convolution_rounding(torch.contiguous_format),
        "channels last": convolution_rounding(torch.channels_last),
    }
    told = ", ".join(f"{name} {value:.1e}" for name, value in rounding.items())
    lines = [
        *head("Rounding of the matching gradient", facts),
        HEADER,
    ]
    lines += ["", *table(errors), "", f"Relative rounding of one convolution of 128 channels: {told}."]
    print("\n".join(lines))
    out = arguments.out or (None if arguments.quick else Path(__file__).parent / "results")
    if out:
        save(result_path(out, "rounding"), lines, {**facts, "convolution": rounding, "errors": errors})


if __name__ == "__main__":
    main()
