"""Strong and weak scaling of one distillation over processes with one thread each, against perfect division.

python benchmarks/bench_scaling.py [--quick]         (make bench-scaling)

All numbers of processes take turns, so that other work on the machine affects all of them alike. As in a run, each
process holds the images of some classes, and sums with the others through `Mesh` (gloo).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from facts import common_facts, head, parsed, present, sizes_and_places
from numpy.typing import NDArray
from program import positive, start
from published_matching import make_problem
from tables import quartiles, table
from torch import Tensor

from datm_ray.config import DistillConfig, NetworkSpec
from datm_ray.core.networks.parameters import FlatNetwork
from datm_ray.core.networks.registry import build_network
from datm_ray.core.synthetic import Rows, SyntheticSet
from datm_ray.methods.trajectory.iteration import Match, MatchingState, Origin
from datm_ray.methods.trajectory.matching import place_steps
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions
from datm_ray.runtime.executor import WorkerRank
from datm_ray.runtime.mesh import Mesh, open_mesh

TOLERANCE = 1e-5
"""Largest difference between images of one process and of several, as a share of their norm; the tests' tolerance."""
GROUPS = (("strong", 1), ("strong", 2), ("strong", 4), ("weak", 2), ("weak", 4))
"""Pairs (scaling, number of processes). All are compared with the first, one process."""

HEADER = """One distillation by trajectory matching; random tensors of fixed seeds; every minibatch is the whole set; no
augmentation; one thread in each process; all calls of a shape have the same number of images.

- `strong`: one set, divided over the processes. `weak`: a set so many times larger; each process has as many images.
- ms: one iteration, until its slowest process ends. CPU ms: of all processes together. in sums: waiting and sending,
  mean over the processes. Each is the median (quartiles) of n iterations.
- ideal: the time of one process, times the size of the set, divided by min(cores, processes); the set of one process
  has size 1. efficiency: the ideal divided by the time. by CPU seconds: those of one process, times the size of the
  set, divided by those of all processes. Both compare iterations of the same turn. Processes that exceed cores wait for
  cores too, which counts as time in sums; only the efficiency by CPU seconds leaves this out.
- MB: what one process adds to the sums of an iteration.
- difference: of the learned images from those of one process after a turn, as a share of their norm; in brackets how
  far the turn moved them. A weak row has a set of its own, which no process learns alone.
"""
COLUMNS = "shape|scaling|processes|images|ms|ideal ms|efficiency %|CPU ms|by CPU seconds %|in sums, ms|MB|difference"


@dataclass(frozen=True)
class Case:
    """A distillation."""

    name: str
    spec: NetworkSpec
    ipc: int
    steps: int
    chunk: int
    """Images in a call of the step functions."""
    iterations: int
    """Timed iterations in a turn; an iteration of a single student step comes before them."""
    rate: float
    """Learning rate of the images."""
    compiled: bool = True


@functools.cache
def functions_of(spec: NetworkSpec, compiled: bool) -> StudentStepFunctions:
    """Step functions, which a process compiles once for all turns."""
    return StudentStepFunctions(FlatNetwork(build_network(spec, 0)), StepOptions(compiled=compiled))


def first_state(case: Case, mesh: Mesh) -> tuple[MatchingState, Match]:
    """State before the first iteration, and the inputs of every iteration, for this process's rows."""
    rows = Rows.of_shard(mesh.column, mesh.columns, case.spec.classes, case.ipc)
    problem, held = make_problem(case.spec, case.spec.classes * case.ipc, case.steps), slice(rows.first, rows.last)
    whole, steps = problem.synthetic, [step.held_by(rows.first, rows.last) for step in problem.steps]
    part = SyntheticSet(whole.images[held], whole.soft_labels[held], whole.step_sizes, whole.labels[held])
    match = Match(
        functions_of(case.spec, case.compiled),
        problem.start,
        problem.target,
        place_steps(steps, case.chunk, part.images),
    )
    return MatchingState(part, DistillConfig(threshold=1e9, learning_rate_images=case.rate)), match


def take_part(case: Case, own: WorkerRank) -> tuple[list[list[float]], NDArray[np.float32]]:
    """Distil in one process: figures of the timed iterations, and images [2 n c h w], first and learned.

    The figures are seconds, CPU seconds, seconds in sums, and bytes that this process adds.
    """
    torch.set_num_threads(1)
    with open_mesh(own if own.world_size > 1 else None, 1, own.world_size, torch.device("cpu"), timeout=120.0) as mesh:
        state, match = first_state(case, mesh)
        first, figures = state.synthetic.images, list[list[float]]()
        state.step([replace(match, steps=match.steps[:1])], [Origin(0, 0)], all_sum=mesh.sum_over_classes)

        def timed_sum(tensor: Tensor) -> Tensor:
            before = time.perf_counter()
            total = mesh.sum_over_classes(tensor)
            figures[-1][2] += time.perf_counter() - before
            figures[-1][3] += tensor.nbytes if mesh.columns > 1 else 0
            return total

        for _ in range(case.iterations):
            figures.append([0.0] * 4)
            mesh.barrier()
            began, cpu = time.perf_counter(), time.process_time()
            state.step([match], [Origin(0, 0)], all_sum=timed_sum)
            figures[-1][:2] = time.perf_counter() - began, time.process_time() - cpu
        return figures, torch.stack([first, state.synthetic.images]).numpy()


def turn(case: Case, scaling: str, count: int, pools: Sequence[ProcessPoolExecutor]) -> dict[str, Any]:
    """Distil once in `count` processes, each of a pool of its own: figures of each iteration, and the whole set."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    case = replace(case, ipc=case.ipc * count) if scaling == "weak" else case
    calls = [pools[rank].submit(take_part, case, WorkerRank(rank, count, address)) for rank in range(count)]
    figures, images = zip(*(call.result() for call in calls), strict=True)
    seconds, cpu, in_sums, size = np.moveaxis(np.array(figures), -1, 0)  # each [processes, iterations]
    timed = {"seconds": seconds.max(0), "cpu": cpu.sum(0), "in_sums": in_sums.mean(0), "bytes": size[0]}
    return {"timed": timed, "images": np.concatenate(images, axis=1)}


def measure(case: Case, turns: int, pools: Sequence[ProcessPoolExecutor]) -> list[dict[str, Any]]:
    """Rows of the table for one case."""
    for group in GROUPS:  # the first turns compile
        turn(case, *group, pools)
    columns = list(zip(*([turn(case, *group, pools) for group in GROUPS] for _ in range(turns)), strict=True))
    return [row_of(case, *group, own, columns[0]) for group, own in zip(GROUPS, columns, strict=True)]


def row_of(
    case: Case, scaling: str, count: int, own: Sequence[dict[str, Any]], alone: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Figures of all iterations of a number of processes, against those of one process."""
    timed = [[each["timed"] for each in turns] for turns in (own, alone)]
    mine, one = ({name: np.concatenate([each[name] for each in turns]) for name in turns[0]} for turns in timed)
    (first, learned), work = own[-1]["images"], count if scaling == "weak" else 1
    ideal = work * one["seconds"] / min(len(os.sched_getaffinity(0)), count)
    each = mine | {"ideal": ideal, "efficiency": ideal / mine["seconds"], "by_cpu": work * one["cpu"] / mine["cpu"]}
    row = {"case": case.name, "scaling": scaling, "processes": count, "images": len(learned)}
    if scaling == "strong":
        row |= {"difference": distance(learned, alone[-1]["images"][1]), "moved": distance(learned, first)}
    return row | {name: values.tolist() for name, values in each.items()}


def distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Norm of the difference, as a share of the second array's norm."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def cells(row: dict[str, Any]) -> list[str]:
    """Cells of one line of the table, under `COLUMNS`."""
    return [
        *(str(row[name]) for name in ("case", "scaling", "processes", "images")),
        f"{quartiles(row['seconds'], 1e3)}, n = {len(row['seconds'])}",
        f"{1e3 * np.median(row['ideal']):.3g}",
        *(quartiles(row[name], scale) for name, scale in (("efficiency", 100), ("cpu", 1e3), ("by_cpu", 100))),
        quartiles(row["in_sums"], 1e3),
        f"{row['bytes'][0] / 1e6:.3g}",
        f"{row['difference']:.0e} ({row['moved']:.0e})" if "difference" in row else "",
    ]


def cases(quick: bool) -> list[Case]:
    """Distillations to measure: sets of twenty classes, which divide evenly over 1, 2 and 4 processes."""
    small = NetworkSpec(channels=1, size=(8, 8), classes=20, width=32, depth=2)
    if quick:
        return [Case("tiny", small.model_copy(update={"width": 4}), 1, 2, 5, 1, 1e3, compiled=False)]
    large = small.model_copy(update={"channels": 3, "size": (32, 32), "depth": 3})
    # At a rate of 1e4 the 32×32 images of two processes are 1.6e-5 off, a thousandth of the move; in float64 3e-17.
    return [Case("8×8, ConvNet-2/32", small, 5, 20, 25, 5, 1e3), Case("32×32, ConvNet-3/32", large, 5, 20, 25, 1, 1e3)]


def main() -> None:
    """Measure all cases; print and save the results."""
    parser = sizes_and_places(__doc__)
    parser.add_argument("--turns", type=positive, default=7)
    arguments = parsed(parser)
    pools = [ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for _ in range(4)]
    turns, facts = 1 if arguments.quick else arguments.turns, common_facts(__file__, sys.argv[1:])
    rows = [row for case in cases(arguments.quick) for row in measure(case, turns, pools)]
    lines = table(COLUMNS.split("|"), [cells(row) for row in rows])
    lines = [*head("Scaling of one distillation", facts), HEADER, *lines]
    present(arguments.out, "scaling", lines, {**facts, "rows": rows})
    worst = max(row.get("difference", 0.0) for row in rows)
    if worst > TOLERANCE:
        sys.exit(f"Images of several processes differ by {worst:.0e} from those of one, more than {TOLERANCE:.0e}.")


if __name__ == "__main__":
    start(main)
