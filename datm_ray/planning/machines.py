"""Workers of this machine, or of a cluster that the user describes: how many, how large, how fast.

Tests: tests/planning/test_duration.py.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from datm_ray.config import RunConfig, parse_bytes
from datm_ray.errors import ConfigError
from datm_ray.runtime.devices import uses_gpu

RELATIVE_RATES = {"matching": 1.0, "experts": 0.94, "training": 0.45, "real": 0.45, "scoring": 0.35}
"""Rate of each kind of work, as a multiple of that of student steps. Measured with ConvNet-3 of width 128 at 32x32 on
one core: 165, 155, 75, 75 and 57 GFLOP/s."""
COMPILING = {"matching": 5.0, "experts": 2.0}
"""CPU seconds to compile each kind of step in a fresh process, for each torch function of the network's forward pass.
Measured with ConvNets of 2 to 4 blocks on a busy core; an idle one takes less."""
GPU_RATE = 7e12
"""FLOP/s for which a layout of GPUs is chosen where no speed is given. Assumed: a tenth of an H200's float32 peak."""
BANDWIDTH = {"core": 0.75e9, "GPU": 25e9 / 8}
"""Bytes a second that a worker sends in a sum. Measured between two processes of one machine, 0.7 to 1.0 GB/s; assumed
for GPUs, 25 Gbps."""
LATENCY = 0.0002
"""Seconds of one round of a sum. Measured between two processes of one machine: 0.16 ms."""


@dataclass(frozen=True)
class Machine:
    """Workers of one kind."""

    device: str
    """core or GPU."""
    workers: int
    """Workers at work at a time."""
    rates: dict[str, float]
    """FLOP/s of one worker, by kind of work: keys as in `RELATIVE_RATES`."""
    basis: str
    """Source of the rates, in words; "" if nobody measured them, and then no time is shown."""
    bandwidth: float
    """Bytes a second that one worker sends in a sum."""
    memory: int | None = None
    """Bytes that one worker may take; None where it is not known."""
    cores: int = 1
    """Cores of one worker."""
    compiling: dict[str, float] = field(default_factory=lambda: COMPILING)
    """Seconds in which one worker compiles, by kind of work; a multiple as in `COMPILING`."""

    def sum_seconds(self, size: float, sums: int, members: int) -> float:
        """Seconds of so many sums over so many workers, of `size` bytes together."""
        if members == 1:
            return 0.0
        return 2 * (members - 1) / members * size / self.bandwidth + sums * LATENCY * math.ceil(math.log2(members))


def machine_here(config: RunConfig) -> Machine:
    """Machine to plan for if no cluster is described: `cluster.workers` workers, or as many as this machine holds."""
    cluster = config.cluster
    if uses_gpu(cluster):
        return _machine("GPU", cluster.workers or torch.cuda.device_count() or config.workers_per_set, 1)
    workers = cluster.workers or max(1, (os.cpu_count() or 1) // cluster.threads_per_worker)
    return _machine("core", workers, cluster.threads_per_worker)


def parse_cluster(text: str, threads: int = 1) -> Machine:
    """Read a cluster such as `gpus=64,memory=80GiB,tflops=60,network=25Gbps` or `cpus=2,memory=24GiB,gflops=140`.

    Args:
        text: memory is that of a GPU, or of all cores together; tflops or gflops is the speed of student steps on one
            GPU or core, not its peak; network is what one GPU or core can send.
        threads: cores of a worker, where there are no GPUs.

    Raises:
        ConfigError: it cannot be read, or has fewer cores than one worker takes.
    """

    def unreadable(fact: str) -> ConfigError:
        example = "gpus=64,memory=80GiB,tflops=60,network=25Gbps or cpus=2,memory=24GiB,gflops=140"
        return ConfigError(f"--cluster {text!r}: {fact}", remedy=f"write it like {example}")

    values: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (each.strip() for each in part.partition("="))
        if not equals or name not in _READERS:
            raise unreadable(f"{part.strip()!r} is not one of {', '.join(f'{key}=' for key in _READERS)}")
        if name in values:
            raise unreadable(f"{name} is there twice")
        values[name] = _READERS[name](value)
        if not values[name]:
            raise unreadable(f"{name} is {value!r}")
    if ("gpus" in values) == ("cpus" in values):
        raise unreadable("it needs gpus= or cpus=, and not both")
    if "tflops" in values and "gflops" in values:
        raise unreadable("it has tflops= and gflops=")
    device, cores = ("GPU", 1) if "gpus" in values else ("core", threads)
    count, memory = int(values.get("gpus") or values["cpus"]), values.get("memory")
    if count < cores:
        raise ConfigError(
            f"a worker takes {threads} cores, and the cluster has {count}",
            remedy="lower cluster.threads_per_worker, or describe a larger cluster",
        )
    machine = _machine(device, count // cores, cores)
    if memory:
        machine = replace(machine, memory=int(memory if device == "GPU" else memory // machine.workers))
    if speed := values.get("tflops") or values.get("gflops"):
        machine = replace(machine, rates=_rates(speed * cores), basis="as given")
    return replace(machine, bandwidth=values.get("network") or machine.bandwidth)


def _machine(device: str, workers: int, cores: int) -> Machine:
    """Machine whose speed is not known; its rates serve to compare layouts."""
    rates = _rates(GPU_RATE if device == "GPU" else 150e9 * cores)
    return Machine(device, workers, rates, "", BANDWIDTH[device], cores=cores)


def _rates(matching: float) -> dict[str, float]:
    """Rates of all kinds of work where student steps run at this one."""
    return {kind: matching * share for kind, share in RELATIVE_RATES.items()}


def require_measurable(machine: Machine) -> None:
    """Raise a `ConfigError` where timing steps on this machine would tell nothing of the workers."""
    if machine.basis or (machine.device == "GPU" and not torch.cuda.is_available()):
        raise ConfigError(
            "--measure times steps on this machine, and "
            + ("the speed is given" if machine.basis else "it has no GPU, which the workers compute on"),
            remedy="leave it out; tflops= or gflops= in --cluster gives a speed",
        )


def _number(unit: float, pattern: str = r"(\d{1,9}(?:\.\d{1,9})?)") -> Callable[[str], float]:
    """Function that reads a number of this unit; 0 if the text is none."""

    def read(text: str) -> float:
        match = re.fullmatch(pattern, text, re.ASCII | re.IGNORECASE)
        prefix = match[2].upper() if match and match.lastindex == 2 else " "
        return unit * float(match[1]) * 1000.0 ** " KMGT".index(prefix) if match else 0.0

    return read


def _size(text: str) -> float:
    """Bytes of memory, from 1 MiB on; 0 if the text is none: a memory of 8 lacks its unit."""
    try:
        size = parse_bytes(text)
    except ConfigError:
        return 0.0
    return float(size) if 2**20 <= size < 2**60 else 0.0


_READERS: dict[str, Callable[[str], float]] = {
    "gpus": _number(1, r"(\d{1,5})"),
    "cpus": _number(1, r"(\d{1,6})"),
    "memory": _size,
    "tflops": _number(1e12),
    "gflops": _number(1e9),
    "network": _number(1 / 8, r"(\d{1,9}(?:\.\d{1,9})?) ?([KMGT])bps"),
}
"""Key of a description -> what reads its value in base units, or gives 0."""
