"""What MetaDD adds to an iteration of distillation: peak memory and seconds, each row in a process of its own.

Run by bench_metadd.py.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_matching import Shape
from facts import status
from tables import table

from datm_ray.config import DistillConfig, NetworkSpec
from datm_ray.core.metadd import MetaDD
from datm_ray.core.networks.parameters import FlatNetwork, flatten
from datm_ray.core.networks.registry import build_network
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.methods.state import MetaTerm
from datm_ray.methods.trajectory.iteration import Match, MatchingState, Origin
from datm_ray.methods.trajectory.matching import draw_student_steps, place_steps
from datm_ray.methods.trajectory.step_functions import StudentStepFunctions

TITLE = (
    "Cost of an iteration at CIFAR-10's shape, IPC 10, ConvNet-3/128, T = 10, batch 100, auxiliaries of published "
    "size, median of 3:"
)


def cost_child(auxiliaries: int, quick: bool, share: float) -> None:
    """Print a line of JSON: peak memory and seconds of an iteration at CIFAR shape, IPC 10, with so many auxiliaries.

    Args:
        share: share of the images for which MetaDD's losses are computed, in (0, 1].
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    width, size, steps = (8, (16, 16), 2) if quick else (128, (32, 32), 10)
    shape = Shape("CIFAR-10 IPC 10", 3, width, (3, *size), 10, 100, 20, (20, 5))
    names = ["convnet", "resnet18", "vgg11", "alexnet", "lenet"][: 1 + auxiliaries]
    specs = [NetworkSpec(architecture=name, channels=3, size=size, classes=10, width=width) for name in names]
    networks = [build_network(spec, seed) for seed, spec in enumerate(specs)]
    functions = StudentStepFunctions(FlatNetwork(networks[0]))
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(100, 3, *size, generator=draw), torch.arange(100) % 10
    state = MatchingState(
        SyntheticSet(images, torch.randn(100, 10, generator=draw), torch.tensor([0.01]), labels),
        DistillConfig(
            learning_rate_images=1e-3,
            learning_rate_labels=1e-3,
            learning_rate_step_size=0.0,
            threshold=1e9,
            gradient_limit=None,
        ),
    )
    start = flatten(networks[0])
    target = start + torch.randn(start.shape, generator=draw) / len(start) ** 0.5
    metadd, looking = (MetaDD(networks) if auxiliaries else None), len(networks)
    del networks  # a worker holds MetaDD's copies only

    def iterate() -> float:
        drawn = draw_student_steps(100, steps, shape.batch, "", 0, state.iteration)
        match = Match(functions, start, target, place_steps(drawn, shape.chunk, images))
        rows = torch.arange(round(100 * share)).numpy()
        meta = MetaTerm(metadd, looking, rows, len(rows)) if metadd else None
        before = time.perf_counter()
        state.step([match], [Origin(0, 0)], meta=meta)
        return time.perf_counter() - before

    iterate()  # compiles
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    seconds = [iterate() for _ in range(3)]
    print(json.dumps({"peak": status("VmHWM"), "seconds": seconds}))


def cost_rows(quick: bool) -> list[dict[str, Any]]:
    """Measure each row in a process of its own."""
    rows = []
    for auxiliaries, share in ((0, 1.0), (1, 1.0), (2, 1.0), (4, 1.0), (4, 0.2)):
        request = json.dumps([auxiliaries, quick, share])
        command = [sys.executable, __file__, request]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        rows.append({"auxiliaries": auxiliaries, "share": share, **json.loads(answer)})
    return rows


def cost_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Table with a line for each number of auxiliaries."""
    base, lines = rows[0], []
    for row in rows:
        seconds, before = statistics.median(row["seconds"]), statistics.median(base["seconds"])
        spread = f"{min(row['seconds']):.2f} to {max(row['seconds']):.2f}"
        lines.append(
            [
                str(row["auxiliaries"]),
                f"{row['share']:g}",
                f"{row['peak'] / 2**20:.0f}",
                f"{row['peak'] / base['peak']:.2f}",
                f"{seconds:.2f} ({spread})",
                f"{seconds / before:.2f}",
            ]
        )
    return table(["auxiliaries", "share of images", "peak, MiB", "ratio", "seconds an iteration", "ratio"], lines)


if __name__ == "__main__":
    cost_child(*json.loads(sys.argv[1]))
