"""Workers of this machine, or of a cluster that the user describes: how many, how large, how fast.

Tests: tests/planning/test_duration.py.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, replace

import torch

from datm_ray.config import RunConfig, parse_bytes
from datm_ray.errors import ConfigError
from datm_ray.runtime.devices import uses_gpu

CORE_RATES = {"matching": 165e9, "experts": 155e9, "training": 75e9}
"""FLOP/s of one core by kind of work. Measured with ConvNet-3 of width 128 at 32x32 on an AMD EPYC without AVX-512;
narrow networks on small images, as for digits, take 3 to 20 times as long."""

GPU_RATE = 7e12
"""FLOP/s for which a layout of GPUs is chosen where no speed is given. Assumed: a tenth of an H200's float32 peak."""

BANDWIDTH = {"core": 0.75e9, "GPU": 25e9 / 8}
"""Bytes a second that a worker sends in a sum. Measured between two processes of one machine, 0.7 to 1.0 GB/s; assumed
for GPUs, 25 Gbps."""

LATENCY = 0.0002
"""Seconds of one round of a sum. Measured between two processes of one machine: 0.16 ms."""

EXAMPLE = "gpus=64,memory=80GiB,tflops=60,network=25Gbps or cpus=2,memory=24GiB,gflops=140"


@dataclass(frozen=True)
class Machine:
    """Workers of one kind."""

    device: str
    """core or GPU."""
    workers: int
    """Workers at work at a time."""
    rates: dict[str, float]
    """FLOP/s of one worker, by kind of work: keys as in `CORE_RATES`."""
    basis: str
    """Source of the rates, in words; "" if nobody measured them, and then no hours are shown."""
    bandwidth: float
    """Bytes a second that one worker sends in a sum."""
    memory: int | None = None
    """Bytes that one worker may take; None where it is not known."""
    cores: int = 1
    """Cores of one worker."""

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
    values: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (each.strip() for each in part.partition("="))
        if not equals or name not in _KEYS:
            raise _unreadable(text, f"{part.strip()!r} is not one of {', '.join(f'{key}=' for key in _KEYS)}")
        if name in values:
            raise _unreadable(text, f"{name} is there twice")
        values[name] = _read(name, value)
        if not values[name]:
            raise _unreadable(text, f"{name} is {value!r}")
    if ("gpus" in values) == ("cpus" in values):
        raise _unreadable(text, "it needs gpus= or cpus=, and not both")
    if "tflops" in values and "gflops" in values:
        raise _unreadable(text, "it has tflops= and gflops=")
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
    rates, basis = _rates(GPU_RATE), ""
    if device == "core":
        rates = _rates(cores * CORE_RATES["matching"])
        basis = "rough, and small networks take 3 to 20 times as long: --measure times them here"
    return Machine(device, workers, rates, basis, BANDWIDTH[device], cores=cores)


def _rates(matching: float) -> dict[str, float]:
    """Rates of all kinds of work where student steps run at this one."""
    return {kind: rate * matching / CORE_RATES["matching"] for kind, rate in CORE_RATES.items()}


def require_measurable(machine: Machine) -> None:
    """Raise a `ConfigError` where timing steps on this machine would tell nothing of the workers."""
    has_gpu = torch.cuda.is_available()
    if machine.basis == "as given" or (machine.device == "GPU") != has_gpu:
        here = "a GPU" if has_gpu else "no GPU"
        raise ConfigError(
            f"--measure times steps on this machine, which has {here}, and "
            + ("the speed is given" if machine.basis == "as given" else f"the workers compute on {machine.device}s"),
            remedy="leave it out; tflops= or gflops= in --cluster gives a speed",
        )


_NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"
_KEYS = {
    "gpus": (r"(\d{1,5})", 1.0),
    "cpus": (r"(\d{1,6})", 1.0),
    "memory": (None, 1.0),
    "tflops": (_NUMBER, 1e12),
    "gflops": (_NUMBER, 1e9),
    "network": (_NUMBER + r" ?([KMGT])bps", 1 / 8),
}
"""Key of a description -> what its value looks like, and its unit; the value of memory is read by `parse_bytes`."""


def _read(name: str, value: str) -> float:
    """Value in base units; 0 if it cannot be read."""
    pattern, unit = _KEYS[name]
    if pattern is None:
        try:
            size = parse_bytes(value)
        except ConfigError:
            return 0.0
        return float(size) if 2**20 <= size < 2**60 else 0.0  # a memory of 8 lacks its unit
    match = re.fullmatch(pattern, value, re.ASCII | re.IGNORECASE)
    if match is None:
        return 0.0
    prefix = match[2].upper() if match.lastindex == 2 else " "
    return unit * float(match[1]) * 1000.0 ** " KMGT".index(prefix)


def _unreadable(text: str, fact: str) -> ConfigError:
    return ConfigError(f"--cluster {text!r}: {fact}", remedy=f"write it like {EXAMPLE}")
