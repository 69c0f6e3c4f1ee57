"""Sums between processes: `runtime.mesh` over NCCL and gloo, with as many GPUs as there are.

A worker is a process of its own: `python -m gpu.sums RANK SIZE ADDRESS DEVICE SMALL` in the folder `benchmarks`. It
prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from published_matching import Problem, make_problem
from turns import timed

from datm_ray.config import PUBLISHED_AUGMENTATION
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.methods.trajectory.iteration import Match, MatchingState, Origin
from datm_ray.methods.trajectory.matching import matching_gradient, place_steps
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions
from datm_ray.runtime.executor import WorkerRank
from datm_ray.runtime.mesh import Mesh, open_mesh
from gpu.exactness import SETTINGS, compared, spec_of
from gpu.machine import Machine
from gpu.sections import Clock, Row, Section, Work

WAIT = 40.0
"""Longest time in seconds of all processes of a row. With tiny sizes it is five times as long, for a busy machine."""


def problem_of(machine: Machine) -> Problem:
    """One problem for every process: 8 images, so that 2 shards have 4 each."""
    return make_problem(
        spec_of(machine), 6, 3, dtype=torch.float64, device=machine.device, strategy=PUBLISHED_AUGMENTATION, images=8
    )


def work(mesh: Mesh, machine: Machine, size: int, rank: int) -> dict[str, Any]:
    """Error of this shard's gradient, seconds of a sum of a ConvNet's parameters, and the sums' latency and speed."""
    problem = problem_of(machine)
    functions = StudentStepFunctions(problem.network, StepOptions(compiled=False))
    synthetic = problem.synthetic
    whole = matching_gradient(functions, problem.start, problem.target, synthetic, problem.placed())
    first, last = (len(synthetic.images) * end // size for end in (rank, rank + 1))
    held = slice(first, last)
    mine = SyntheticSet(
        synthetic.images[held], synthetic.soft_labels[held], synthetic.step_sizes, synthetic.labels[held]
    )
    steps = place_steps([step.held_by(first, last) for step in problem.steps], None, mine.images)
    # Sums run over all processes: a row of a single process has no other to sum with.
    part = matching_gradient(functions, problem.start, problem.target, mine, steps, all_sum=mesh.sum_over_all)
    row = compared(
        [part.images, part.soft_labels, part.step_size], [whole.images[held], whole.soft_labels[held], whole.step_size]
    )
    state = MatchingState(mine, SETTINGS)
    match = Match(functions, problem.start, problem.target, steps)
    state.step(
        [match],
        [Origin(0, 0)],
        all_sum=mesh.sum_over_all,
        sum_over_backbones=mesh.sum_over_backbones,
        in_rows=mesh.in_rows if size > 1 else None,
    )
    gathered = mesh.gather(state.synthetic.images)
    mesh.barrier()
    vector = torch.randn(1_000 if machine.small else 320_010, device=machine.device)
    seconds = [timed(lambda: mesh.sum_over_all(vector), machine.device)[0] for _ in range(3 if machine.small else 20)]
    tiny, large = (torch.randn(size, device=machine.device) for size in (1, 1_000 if machine.small else 4_000_000))
    latency, whole = (
        min(timed(lambda held=held: mesh.sum_over_all(held), machine.device)[0] for _ in range(5))
        for held in (tiny, large)
    )
    alone = mesh.until_all_are_done(lambda heartbeat: rank)
    return {
        **row,
        "seconds": seconds[1:],
        "latency, s": latency,
        "GB/s": speed(large.nbytes, whole, latency),
        "gathered": None if gathered is None else len(gathered),
        "rank": alone,
        "backend": str(dist.get_backend_config()),
    }


def speed(size: int, seconds: float, latency: float) -> float | str:
    """GB/s of a sum beyond its latency; "" if it took no longer, so that its time says nothing of its size.

    Args:
        size: bytes of the sum.
        seconds: time of the sum.
        latency: time of a sum of one number.
    """
    return size / (seconds - latency) / 1e9 if seconds > latency else ""


def child(rank: int, size: int, address: str, device: str, small: str) -> None:
    """Run one worker."""
    machine = Machine(device, small == "small")
    torch.set_num_threads(1)
    with open_mesh(WorkerRank(rank, size, address), 1, size, torch.device(device), 2 * WAIT) as mesh:
        print(json.dumps(work(mesh, machine, size, rank)), flush=True)


def own_gpu(rank: int, size: int) -> dict[str, str]:
    """Environment variable that shows a worker one GPU; empty if there are fewer GPUs than workers."""
    if torch.cuda.device_count() < max(2, size):
        return {}
    visible = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    return {"CUDA_VISIBLE_DEVICES": visible[rank] if len(visible) >= size else str(rank)}


def together(machine: Machine, size: int) -> Row:
    """Results of several workers, each with a GPU of its own if there are enough; the worst errors and seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    place = Path(__file__).resolve().parents[1]
    words = [sys.executable, "-m", "gpu.sums"]
    sized = "small" if machine.small else "large"
    processes = [
        subprocess.Popen(
            [*words, str(rank), str(size), address, machine.device, sized],
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(place.parent), **own_gpu(rank, size)},
        )
        for rank in range(size)
    ]
    end = time.monotonic() + (5 * WAIT if machine.small else WAIT)
    try:
        outputs = [process.communicate(timeout=max(1.0, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for out, err in outputs:
        if not out:
            raise RuntimeError((err.strip().splitlines() or ["a worker died without a word"])[-1])
    rows = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    worst = max(rows, key=lambda row: row["errors"] if row["verdict"] == "ok" else [float("inf")])
    return {**worst, "seconds": max(rows, key=lambda row: sum(row["seconds"]))["seconds"]}


def works(machine: Machine, _: Clock) -> list[Work]:
    """List one worker alone, two that share the device or have one each, and two without it."""
    cpu = Machine("cpu", machine.small)
    rows = [(machine, 2)] if machine.device == "cpu" else [(machine, 2), (machine, 1), (cpu, 2)]
    return [
        Work({"processes": size, "device": each.device}, partial(noted, machine, each, size)) for each, size in rows
    ]


def noted(machine: Machine, where: Machine, size: int) -> Row:
    """Row of several workers, whose speed is noted for `gpu/constants.py` if each has a GPU of its own."""
    row = together(where, size)
    if where.device == "cuda" and size <= torch.cuda.device_count() and size > 1:
        machine.noted["sums", "latency"] = row["latency, s"]
        if row["GB/s"]:
            machine.noted["sums", "bandwidth"] = 1e9 * row["GB/s"]
    return row


SECTION = Section(
    "sums",
    "3. Do processes sum to the same?",
    "Class shards in processes of their own (`runtime.mesh`), float64: error of their gradients against one process, "
    "and seconds of a sum of 320,010 float32 numbers (a ConvNet-3). Latency: of a sum of one number. GB/s: of a sum of "
    "16 MB beyond it; empty if it took no longer. Plans assume both, see section 8. Two processes on one "
    "GPU cannot use NCCL, and sum through gloo; with two GPUs each has its own.",
    ("processes", "device", "backend", "error", "seconds", "latency, s", "GB/s", "verdict"),
    seconds=40,
    least=10,
    works=works,
)

if __name__ == "__main__":
    number, count, *others = sys.argv[1:]
    child(int(number), int(count), *others)
