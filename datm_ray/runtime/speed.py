"""How fast this machine's cores are, in a second."""

from __future__ import annotations

import os
import time

import torch

from datm_ray.errors import ConfigError
from datm_ray.runtime.cost import Described

SIDE = 2048
"""Of the matrices; smaller ones would be a matter of calls and caches."""


def require_measurable(described: Described) -> None:
    """Raise a `ConfigError` where timing this machine's cores would tell nothing of a cluster."""
    if described.device == "GPU" or described.flops:
        raise ConfigError(
            "--measure times the cores of this machine, and "
            + ("the speed is given" if described.flops else "the workers compute on GPUs"),
            remedy="leave it out; tflops= in --cluster gives the speed of student steps on a GPU",
        )


def product_rate(repetitions: int = 5, side: int = SIDE) -> float:
    """FLOP/s of a float32 matrix product on one core while all cores are busy with it; the best of some."""
    cores, before = os.cpu_count() or 1, torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        a = torch.ones(side, side)
        a @ a  # the first one starts threads
        seconds = []
        for _ in range(repetitions):
            started = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return 2 * side**3 / min(seconds) / cores
