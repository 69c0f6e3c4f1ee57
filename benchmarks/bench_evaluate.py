"""Networks scored per hour: the published loop, this package one after another, and trained together.

python benchmarks/bench_evaluate.py [--quick]         (make bench-evaluate)

Every method trains the same network on the same images in one process; they take turns, so that whatever else the
machine does hits all of them alike. A method's first epochs, with compilation, count in the cold ratio only. With
`--shape`, results are written only if `--out` is given.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.compiler.config
from epochs import by_epoch
from facts import RESULTS, common_facts, head, present, sizes_and_places
from program import positive, start
from published_experts import epoch_seconds, evaluation_epochs
from tables import spread, table
from torch import Tensor

from datm_ray.config import PUBLISHED_AUGMENTATION, NetworkSpec
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.core.training.loop import PROTOCOLS, Schedule, Training, together_steps, train_steps

HEADER = """Training of networks that are scored, on random tensors of fixed seeds with soft labels; ConvNet, instance
normalisation, mean pooling, SGD with momentum and weight decay.

- `published loop`: a DataLoader that collects sample by sample, one augmentation and one uncompiled step for each
  network, loss and accuracy read back every step: the evaluation of MTT and DATM. `ours, 1`: `train_steps`, one network
  after another. `ours, together`: `together_steps`, so many networks in one compiled step.
- ms: of one epoch of one network; median (smallest to largest) of n turns. ratio: the published loop's time to the
  method's in the same turn; median (smallest to largest).
- networks an hour: of one process, trained for so many epochs.
- first, s: of the first epoch of the whole stack, with compilation, where there is any.
- cold ratio: the published loop's time for a whole training of as many networks, to the method's with its compilation,
  as if no other row had compiled the step before.
"""


@dataclass(frozen=True)
class Shape:
    """A synthetic set, and how networks are trained on it."""

    name: str
    spec: NetworkSpec
    images: int
    augmentation: str
    threads: int
    epochs: int
    """Epochs of a training."""
    turn: int
    """Epochs that are timed in a turn."""


def data_of(shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Random images and logits."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(shape.images, shape.spec.channels, *shape.spec.size, generator=draw)
    return images.to(device), torch.randn(shape.images, shape.spec.classes, generator=draw).to(device)


def methods_of(shape: Shape, device: str, together: list[int]) -> dict[str, tuple[int, Iterator[Any]]]:
    """Name -> number of networks, and an iterator whose every step is an epoch of all of them."""
    schedule = dataclasses.replace(PROTOCOLS["published"], epochs=10**6, augmentation=shape.augmentation)
    images, logits = data_of(shape, device)
    network = build_network(shape.spec, 0).to(device)
    loop = evaluation_epochs(network, images.cpu(), logits.softmax(1).cpu(), schedule.batch_size, shape.augmentation)
    alone = by_epoch(train_steps(Training(build_network(shape.spec, 0).to(device), images, logits, schedule, 0)))
    found: dict[str, tuple[int, Iterator[Any]]] = {"published loop": (1, loop), "ours, 1": (1, alone)}
    for size in together:
        found[f"ours, {size} together"] = (size, stack(shape, device, schedule, size))
    return found


def stack(shape: Shape, device: str, schedule: Schedule, size: int) -> Iterator[Any]:
    """Iterator that trains `size` networks together, one epoch of all of them at every step."""
    images, logits = data_of(shape, device)
    networks = [build_network(shape.spec, seed).to(device) for seed in range(size)]
    trainings = [Training(network, images, logits, schedule, seed) for seed, network in enumerate(networks)]
    return by_epoch(together_steps(StackFunctions(networks[0], stacked=size), trainings))


def rows_of(shape: Shape, device: str, together: list[int], turns: int) -> list[dict[str, Any]]:
    """Measure the methods of one shape. All are compared with the first, the published loop."""
    torch.set_num_threads(shape.threads)
    methods = methods_of(shape, device, together)
    first = {name: epoch_seconds(epochs, device) for name, (_, epochs) in methods.items()}
    for _, epochs in methods.values():
        epoch_seconds(epochs, device, shape.turn)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(turns):
        for name, (networks, epochs) in methods.items():
            seconds[name].append(epoch_seconds(epochs, device, shape.turn) / (shape.turn * networks))
    published = seconds["published loop"]
    return [
        {
            "shape": shape.name,
            "threads": shape.threads,
            "method": name,
            "first_epoch": first[name],
            "seconds": own,
            "ratios": [theirs / ours for theirs, ours in zip(published, own, strict=True)],
            "networks_an_hour": 3600 / (shape.epochs * statistics.median(own)),
            "cold_ratio": cold_ratio(shape.epochs, methods[name][0], first[name], own, published),
        }
        for name, own in seconds.items()
    ]


def cold_ratio(epochs: int, networks: int, first: float, seconds: list[float], published: list[float]) -> float:
    """Time of the published loop for a whole training, divided by a method's with its first epoch and compilation.

    Args:
        epochs: epochs of a training.
        networks: networks that the method trains together.
        first: seconds of the method's first epoch, of all networks together.
        seconds, published: seconds of one network's later epochs, of the method and of the published loop.
    """
    whole = first + networks * (epochs - 1) * statistics.median(seconds)
    return networks * epochs * statistics.median(published) / whole


def cells(row: dict[str, Any]) -> list[str]:
    """Cells of one line of the table."""
    return [
        row["shape"],
        str(row["threads"]),
        row["method"],
        f"{spread([1000 * each for each in row['seconds']])}, n = {len(row['seconds'])}",
        spread(row["ratios"]),
        f"{row['networks_an_hour']:.3g}",
        f"{row['first_epoch']:.1f}",
        f"{row['cold_ratio']:.3g}",
    ]


def shapes(quick: bool, device: str) -> list[tuple[Shape, list[int]]]:
    """Shapes to measure, each with the numbers of networks to train together."""
    digits = NetworkSpec(channels=1, size=(8, 8), classes=10, width=32, depth=2)
    cifar, cores = NetworkSpec(channels=3, size=(32, 32), classes=10), len(os.sched_getaffinity(0))
    if quick:
        return [(Shape("tiny", digits, 16, "crop_scale_rotate", 1, 500, 2), [2])]
    wide, narrow = [5, 10] if device == "cuda" else [5], cifar.model_copy(update={"width": 64})
    return [
        (Shape("digits, IPC 1", digits, 10, "crop_scale_rotate", 1, 500, 40), [3, 5, 8]),
        (Shape("digits, IPC 10", digits, 100, "crop_scale_rotate", 1, 500, 10), [3, 5, 8]),
        (Shape("32x32, width 64, IPC 1", narrow, 10, PUBLISHED_AUGMENTATION, cores, 1001, 6), wide),
        (Shape("CIFAR-10, IPC 1", cifar, 10, PUBLISHED_AUGMENTATION, cores, 1001, 4), wide),
        (Shape("CIFAR-10, IPC 2", cifar, 20, PUBLISHED_AUGMENTATION, cores, 1001, 2), wide),
        (Shape("CIFAR-10, IPC 10", cifar, 100, PUBLISHED_AUGMENTATION, cores, 1001, 1), wide),
    ]


def main() -> None:
    """Measure all shapes; print and save the results."""
    parser = sizes_and_places(__doc__)
    parser.add_argument("--turns", type=positive, default=7)
    parser.add_argument("--shape", default="", help="text in the names of the shapes to measure; all without it")
    arguments = parser.parse_args()
    torch.compiler.config.force_disable_caches = True  # else an earlier run's files would shorten compilation
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = common_facts(__file__, sys.argv[1:], device)
    rows: list[dict[str, Any]] = []
    for shape, together in [each for each in shapes(arguments.quick, device) if arguments.shape in each[0].name]:
        rows += rows_of(shape, device, together, 1 if arguments.quick else arguments.turns)
        print("\n".join(" | ".join(cells(row)) for row in rows if row["shape"] == shape.name), flush=True)
    columns = ["shape", "threads", "method", "ms", "ratio", "networks an hour", "first, s", "cold ratio"]
    lines = [*head("Training for evaluation", facts), HEADER, *table(columns, [cells(row) for row in rows])]
    out = arguments.out or (None if arguments.quick or arguments.shape else RESULTS)
    present(out, "evaluate", lines, {**facts, "rows": rows}, device)


if __name__ == "__main__":
    start(main)
