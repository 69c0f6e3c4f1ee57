"""CPU time in bfloat16 against float32, at the published size of CIFAR-10: matching gradient and an expert's gradient.

python benchmarks/bench_bfloat16.py [--turns 9]

One process with one thread. Calls take turns, and CPU seconds are counted, so that other work on the machine changes
little. Needs a CPU that multiplies bfloat16 numbers, see `multiplies_bfloat16`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from facts import common_facts, head
from published_matching import make_problem
from tables import spread
from torch import Tensor
from turns import cpu_seconds, publish

from datm_ray.config import PUBLISHED_AUGMENTATION, NetworkConfig, NetworkSpec
from datm_ray.core.networks.parameters import flatten
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.methods.trajectory.matching import matching_gradient
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions
from datm_ray.runtime.executor import multiplies_bfloat16

CHUNK = 20
"""Largest number of images in one call of the step functions."""
EXPERT_BATCH = 256
Call = Callable[[], Tensor]


def matching(spec: NetworkSpec, images: int, steps: int) -> list[Call]:
    """Calls that compute the gradient in the images, in float32 and in bfloat16."""
    problem = make_problem(spec, images, steps, strategy=PUBLISHED_AUGMENTATION, device="cpu")
    options = StepOptions()
    both = [StudentStepFunctions(problem.network, each) for each in (options, replace(options, precision="bfloat16"))]

    def call(functions: StudentStepFunctions) -> Tensor:
        steps = problem.placed(min(images, CHUNK))
        return matching_gradient(functions, problem.start, problem.target, problem.synthetic, steps).images

    return [lambda functions=functions: call(functions) for functions in both]


def expert(spec: NetworkSpec) -> list[Call]:
    """Calls that compute the gradient of an expert's batch, in float32 and in bfloat16."""
    network, draw = build_network(spec, 0), torch.Generator().manual_seed(0)
    images = torch.randn(1, EXPERT_BATCH, spec.channels, *spec.size, generator=draw)
    labels = torch.randint(0, spec.classes, (1, EXPERT_BATCH), generator=draw)
    arguments = (
        flatten(network)[None],
        torch.zeros(1, 0),
        images,
        labels,
        torch.full((EXPERT_BATCH,), 1 / EXPERT_BATCH),
    )
    both = [StackFunctions(network, in_bfloat16=lowered) for lowered in (False, True)]
    return [lambda functions=functions: functions(*arguments)[1] for functions in both]


def measured(title: str, calls: list[Call], turns: int) -> str:
    """Line of the table for a call in float32 and in bfloat16: CPU seconds, their ratio, and how the results differ."""
    exact, rounded = (call().flatten() for call in calls)  # the first calls compile
    seconds = list(cpu_seconds(dict(zip(("float32", "bfloat16"), calls, strict=True)), turns).values())
    ratios = [low / full for full, low in zip(*seconds, strict=True)]
    cosine = float(torch.cosine_similarity(exact, rounded, 0))
    off = float((exact - rounded).norm() / exact.norm())
    cells = [title, *(f"{median(each):.3g}" for each in seconds), spread(ratios), f"{cosine:.4f}", f"{off:.1%}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure; print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the result")
    arguments = parser.parse_args()
    if not multiplies_bfloat16():
        parser.error("this machine's CPU has no instructions for bfloat16")
    torch.set_num_threads(1)
    spec = NetworkConfig(width=128, depth=3).for_images(3, (32, 32), 10)
    facts = {**common_facts(__file__, sys.argv[1:]), "threads": "1"}
    lines = [
        *head("bfloat16 on a CPU", facts),
        f"ConvNet-3 of width 128, 32×32 pixels; CPU seconds, medians of n = {arguments.turns} in turns; ratio: median "
        "(smallest to largest). Cosine and difference: of the gradients, those of matching in the images.",
        "",
        "| gradient | float32 | bfloat16 | ratio | cosine | difference |\n" + "| --- " * 6 + "|",
        measured("matching, 5 images, T = 8", matching(spec, 5, 8), arguments.turns),
        measured("matching, 100 images, T = 2", matching(spec, 100, 2), arguments.turns),
        measured(f"an expert's, {EXPERT_BATCH} images", expert(spec), arguments.turns),
    ]
    publish(lines, arguments.out, "bfloat16")


if __name__ == "__main__":
    main()
