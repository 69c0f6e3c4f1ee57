"""CPU time of one iteration of DM at the published size of CIFAR-10: the published way, and this package's.

python benchmarks/bench_distribution.py [--turns 5] [--classes 10]

The published way runs the network uncompiled on all 256 real images of a class at once, then differentiates through
the synthetic ones. One process with one thread. Calls take turns, and CPU seconds are counted, so that other work on
the machine changes little. The row in bfloat16 is left out on CPUs that do not multiply it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from facts import common_facts, head
from torch import Tensor, nn
from turns import WAYS_HEADING, compared, publish

from datm_ray.config import PUBLISHED_AUGMENTATION, NetworkConfig
from datm_ray.core.compute.precision import Precision
from datm_ray.core.images.augment import Augmentation, augment
from datm_ray.core.networks.registry import build_network, embedding
from datm_ray.methods.distribution import EmbeddingFunctions, distance_and_gradient, draw_shared, repeated
from datm_ray.runtime.executor import multiplies_bfloat16

REAL, IPC = 256, 10
SIZES = (10, 20)
"""Numbers of synthetic and of real images in a micro-batch: those that `datm-ray plan cifar10-dm-ipc10` chooses."""
Problem = tuple[nn.Module, Tensor, list[Tensor], list[Augmentation]]


def problem(classes: int, width: int = 128, side: int = 32) -> Problem:
    """A network with random parameters, synthetic images, real images of each class, and their augmentations."""
    draw = torch.Generator().manual_seed(0)
    network = build_network(NetworkConfig(width=width, depth=3).for_images(3, (side, side), classes), 0)
    images = torch.randn(classes, REAL + IPC, 3, side, side, generator=draw)
    drawn = [draw_shared(PUBLISHED_AUGMENTATION, 0, 0, label) for label in range(classes)]
    return network.requires_grad_(False), images[:, :IPC].flatten(0, 1), list(images[:, IPC:]), drawn


def published(network: nn.Module, synthetic: Tensor, real: list[Tensor], drawn: list[Augmentation]) -> Tensor:
    """Gradient [n c h w] in the synthetic images, as in the authors' program."""
    images, loss = synthetic.clone().requires_grad_(), synthetic.new_zeros(())
    for own, theirs, each in zip(images.split(IPC), real, drawn, strict=True):
        goal = embedding(network, augment(theirs, repeated(each, REAL))).detach().mean(dim=0)
        loss = loss + (goal - embedding(network, augment(own, repeated(each, IPC))).mean(dim=0)).square().sum()
    return torch.autograd.grad(loss, images)[0]


def ours(given: Problem, precision: Precision, *, compiled: bool = True) -> Callable[[], Tensor]:
    """Function that computes DM's gradient [n c h w] in micro-batches.

    Args:
        compiled: True compiles and stores maps channels-last. False does neither.
    """
    network, synthetic, real, drawn = given
    functions = EmbeddingFunctions(network, compiled=compiled, channels_last=compiled, precision=precision)
    values = functions.values_of(network)
    return lambda: distance_and_gradient(functions, values, synthetic, real, drawn, SIZES)[1]


def rows(given: Problem, turns: int) -> list[str]:
    """Lines of the table: seconds, their ratio to the published way, and the difference from it in float64."""
    network, synthetic, real, drawn = given
    calls: dict[str, Callable[[], Tensor]] = {"published way": partial(published, *given)}
    calls["uncompiled micro-batches"] = ours(given, "float32", compiled=False)
    calls["compiled"] = ours(given, "float32")
    if multiplies_bfloat16():
        calls["compiled, bfloat16"] = ours(given, "bfloat16")
    wide = [each.double() for each in real]
    exact = published(network.double(), synthetic.double(), wide, drawn)
    network.float()
    return compared(calls, exact, turns)


def main(words: list[str] | None = None) -> None:
    """Measure; print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--width", type=int, default=128, help="of the network")
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the result")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    lines = [
        *head("An iteration of DM on a CPU", {**common_facts(__file__, sys.argv[1:]), "threads": "1"}),
        f"ConvNet-3 of width {arguments.width}, {arguments.side}×{arguments.side} pixels, {arguments.classes} classes "
        f"of {REAL} real and {IPC} synthetic images; CPU seconds, medians of n = {arguments.turns} in turns. Speed: "
        "relative to the published way, median (smallest to largest). Difference: of the gradient, from the published "
        "way in float64.",
        "",
        WAYS_HEADING,
        *rows(problem(arguments.classes, arguments.width, arguments.side), arguments.turns),
    ]
    publish(lines, arguments.out, "distribution")


if __name__ == "__main__":
    main()
