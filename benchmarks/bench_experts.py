"""Experts per hour: the published loop (a DataLoader that collects sample by sample) and this package.

python benchmarks/bench_experts.py [--quick]         (make bench-experts)

Every method trains the same network on the same images in one process; their epochs take turns, so that whatever else
the machine does hits all of them alike. A method's first epoch, with compilation, is shown apart from the others.
"""

from __future__ import annotations

import os
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import torch
from epochs import expert_epochs
from facts import common_facts, head, parsed, result_path, save, sizes_and_places
from published_experts import Epochs, epoch_seconds, loader_epochs
from tables import spread
from torch import Tensor

from datm_ray.config import PUBLISHED_AUGMENTATION, ExpertConfig, NetworkSpec
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.core.training.experts import ExpertState
from datm_ray.core.training.loop import predict_logits

HEADER = """One expert's epoch on random tensors of fixed seeds; ConvNet, instance normalisation, mean pooling.

- `loader`: torch's DataLoader over a TensorDataset, shuffled, in the training process, then augmentation, forward,
  backward and SGD, uncompiled: the loop of MTT, FTD and DATM. `+ test pass`: with their pass over the test images after
  every epoch. `ours`: `stack_steps`, with so many experts in a stack.
- seconds: of one epoch of one expert; median (smallest to largest) of n epochs, the methods taking turns. ratio: the
  loader's seconds to the method's in the same turn; median (smallest to largest).
- experts an hour: of one process, for so many epochs each.
- first epoch: of the whole stack, with compilation, where there is any."""


@dataclass(frozen=True)
class Shape:
    """Images, and how experts are trained on them."""

    name: str
    spec: NetworkSpec
    images: int
    test_images: int
    batch: int
    augmentation: str
    threads: int
    epochs: int
    """Epochs of a whole expert."""
    gsam: bool = False


@dataclass(frozen=True)
class Method:
    """One way to train experts."""

    name: str
    experts: int
    epochs: Epochs


def images_of(shape: Shape, count: int, device: str) -> tuple[Tensor, Tensor]:
    """Random images and classes."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(count, shape.spec.channels, *shape.spec.size, generator=draw)
    return images.to(device), torch.randint(shape.spec.classes, (count,), generator=draw).to(device)


def published_epochs(shape: Shape, device: str, *, test_pass: bool) -> Epochs:
    """Iterator that trains one epoch by the published loop at every step, with a pass over test images if asked for."""
    network = build_network(shape.spec, 0).to(device)
    train, test = (images_of(shape, count, "cpu") for count in (shape.images, shape.test_images))
    return loader_epochs(network, train, test if test_pass else None, shape.batch, shape.augmentation, gsam=shape.gsam)


def our_epochs(shape: Shape, device: str, stacked: int, *, compile_: bool, test_pass: bool = False) -> Epochs:
    """Iterator that trains one epoch by `stack_steps` at every step, more epochs than any caller takes."""
    networks = [build_network(shape.spec, seed).to(device) for seed in range(stacked)]
    functions = StackFunctions(networks[0], stacked=stacked, compile_=compile_)
    optimiser = "gsam" if shape.gsam else "sgd"
    settings = ExpertConfig(epochs=10**6, batch_size=shape.batch, augmentation=shape.augmentation, optimiser=optimiser)
    images, labels = images_of(shape, shape.images, device)
    test, _ = images_of(shape, shape.test_images, device)
    state = ExpertState.initial(networks)
    for _ in expert_epochs(functions, images, labels, settings, list(range(stacked)), state):
        state.parameters.cpu().clone()
        if test_pass:
            for network in networks:
                predict_logits(network, test)
        yield


def methods_of(shape: Shape, device: str, stacks: list[int]) -> list[Method]:
    """Methods in the order of the table. All are compared with the first."""
    methods = [
        Method("loader", 1, published_epochs(shape, device, test_pass=False)),
        Method("loader + test pass", 1, published_epochs(shape, device, test_pass=True)),
        Method("ours, 1, uncompiled", 1, our_epochs(shape, device, 1, compile_=False)),
    ]
    methods += [Method(f"ours, {size}", size, our_epochs(shape, device, size, compile_=True)) for size in stacks]
    methods.append(Method("ours, 1 + test pass", 1, our_epochs(shape, device, 1, compile_=True, test_pass=True)))
    return methods


def rows_of(shape: Shape, device: str, stacks: list[int], repetitions: int) -> list[dict[str, Any]]:
    """Measure the methods of one shape."""
    torch.set_num_threads(shape.threads)
    methods = methods_of(shape, device, stacks)
    first = [epoch_seconds(method.epochs, device) for method in methods]
    turns = [[epoch_seconds(method.epochs, device) / method.experts for method in methods] for _ in range(repetitions)]
    return [
        {
            "shape": shape.name,
            "threads": shape.threads,
            "method": method.name,
            "first_epoch": first[place],
            "seconds": [turn[place] for turn in turns],
            "ratios": [turn[0] / turn[place] for turn in turns],
            "experts_an_hour": 3600 / (shape.epochs * statistics.median(turn[place] for turn in turns)),
        }
        for place, method in enumerate(methods)
    ]


def table_line(row: dict[str, Any]) -> str:
    """Format one line of the table."""
    cells = [
        row["shape"],
        str(row["threads"]),
        row["method"],
        f"{spread(row['seconds'])}, n = {len(row['seconds'])}",
        spread(row["ratios"]),
        f"{row['experts_an_hour']:.3g}",
        f"{row['first_epoch']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def shapes(quick: bool, device: str) -> list[tuple[Shape, list[int]]]:
    """Shapes to measure, each with the numbers of experts in a stack."""
    cores = len(os.sched_getaffinity(0))
    digits_spec = NetworkSpec(channels=1, size=(8, 8), classes=10, width=32, depth=2)
    cifar_spec = NetworkSpec(channels=3, size=(32, 32), classes=10)
    if quick:
        return [(Shape("tiny", digits_spec, 64, 32, 32, "", 1, 40), [2])]
    cuda = device == "cuda"
    images, test_images = (50_000, 10_000) if cuda else (2_560, 512)
    digits = Shape("digits, SGD", digits_spec, 1_221, 359, 32, "", 1, 40)
    return [
        (digits, [1, 6, 8]),
        (
            Shape("CIFAR, SGD", cifar_spec, images, test_images, 256, PUBLISHED_AUGMENTATION, cores, 100),
            [1, 4, 16] if cuda else [1],
        ),
        (
            Shape("CIFAR, GSAM", cifar_spec, images, test_images, 256, PUBLISHED_AUGMENTATION, cores, 100, gsam=True),
            [1, 8] if cuda else [1],
        ),
    ]


def main() -> None:
    """Measure all shapes; print and save the results."""
    parser = sizes_and_places(__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parsed(parser)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = common_facts(__file__, sys.argv[1:], device)
    columns = "shape | threads | method | seconds | ratio | experts an hour | first epoch, s"
    lines = [*head("Expert training", facts), HEADER, ""]
    lines += [f"| {columns} |", "| --- " * 7 + "|"]
    print("\n".join(lines), flush=True)
    results: list[dict[str, Any]] = []
    for shape, stacks in shapes(arguments.quick, device):
        for row in rows_of(shape, device, stacks, arguments.repetitions):
            results.append(row)
            lines.append(table_line(row))
            print(lines[-1], flush=True)
    if arguments.out:
        save(result_path(arguments.out, "experts", device), lines, {**facts, "rows": results})


if __name__ == "__main__":
    main()
