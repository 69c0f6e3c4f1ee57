"""CPU time of one iteration of SRe2L's recovery: uncompiled, with channels innermost, and compiled.

python benchmarks/bench_recovery.py [--turns 5] [--images 20]

One process with one thread. Calls take turns, and CPU seconds are counted, so that other work on the machine changes
little.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from facts import common_facts, head
from turns import WAYS_HEADING, compared, publish

from datm_ray.config import NetworkConfig, RecoverConfig
from datm_ray.core.networks.registry import build_network
from datm_ray.methods.recovery import RecoveryLoss

WAYS = {
    "uncompiled": {"compiled": False, "channels_last": False},
    "uncompiled, channels innermost": {"compiled": False, "channels_last": True},
    "compiled, channels innermost": {"compiled": True, "channels_last": True},
}


def rows(width: int, side: int, count: int, turns: int) -> list[str]:
    """Lines of the table: seconds, speed relative to the first way, and difference of the gradient from float64."""
    draw = torch.Generator().manual_seed(0)
    teacher = build_network(
        NetworkConfig(architecture="resnet18", norm="batch", width=width).for_images(3, (side, side), 10), 0
    )
    with torch.no_grad():  # running statistics of noise
        teacher(torch.randn(4 * count, 3, side, side, generator=draw))
    images, labels = torch.randn(count, 3, side, side, generator=draw), torch.arange(count) % 10
    losses = {name: RecoveryLoss(teacher, RecoverConfig(), **options) for name, options in WAYS.items()}
    exact = RecoveryLoss(teacher.double(), RecoverConfig()).gradient(images.double(), labels)[0]
    calls = {name: lambda loss=loss: loss.gradient(images, labels)[0] for name, loss in losses.items()}
    return compared(calls, exact, turns)


def main(words: list[str] | None = None) -> None:
    """Measure; print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--images", type=int, default=20, help="of a block")
    parser.add_argument("--width", type=int, default=64, help="of the teacher; 128 is a whole ResNet-18")
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the result")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    lines = [
        *head("An iteration of SRe2L on a CPU", {**common_facts(__file__, sys.argv[1:]), "threads": "1"}),
        f"Teacher: ResNet-18 of width {arguments.width} (whole: 128), {arguments.images} images of "
        f"{arguments.side}×{arguments.side} pixels. CPU seconds of the gradient in the images, medians of n = "
        f"{arguments.turns} in turns. Speed: relative to the first row, median (smallest to largest). Difference: of "
        "the gradient, from float64.",
        "",
        WAYS_HEADING,
        *rows(arguments.width, arguments.side, arguments.images, arguments.turns),
    ]
    publish(lines, arguments.out, "recovery")


if __name__ == "__main__":
    main()
