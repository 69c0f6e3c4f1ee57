"""Number, size and speed of the workers on this machine, or on a cluster that the user describes.

Tests: tests/planning/test_duration.py.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch

from datm_ray.config import RunConfig, parse_bytes
from datm_ray.errors import ConfigError
from datm_ray.runtime.devices import uses_gpu

FORWARD_PASSES = {"matching": 11.0, "experts": 3.2, "training": 6.7, "real": 6.7, "scoring": 2.9}
"""Kind of work -> time of one image pass, as a multiple of a forward pass at the speed of student steps.

"training" is on a synthetic set, "real" on real data. Measured with ConvNet-3 of width 128 at 32x32 on one core."""
COMPILING = {"matching": 1.7, "experts": 0.8}
"""Kind of step -> CPU seconds to compile it in a new process, per torch function of the network's forward pass.

Measured by `measure.measured` for digits-ipc1, with an empty compiler cache, on an idle core of an EPYC with AVX-512. A
busy, older core took up to three times as long."""
CORE_SPEED, GPU_SPEED = 150e9, 7e12
"""FLOP/s of student steps on one core and on one GPU, used to choose a layout if no speed is given. The GPU's value is
assumed: a tenth of an H200's float32 peak."""
BANDWIDTH = {"core": 0.75e9, "GPU": 25e9 / 8}
"""Bytes per second that a worker sends in a sum. Measured between two processes of one machine: 0.7 to 1.0 GB/s.
Assumed for GPUs: 25 Gbps."""
LATENCY = 0.0002
"""Seconds of one round of messages in a sum. Measured between two processes of one machine: 0.16 ms."""


@dataclass(frozen=True)
class Machine:
    """Workers of one kind on a machine or cluster: number, size and speed."""

    device: str
    """Device of a worker: "core" or "GPU"."""
    workers: int
    """Number of workers that run at the same time."""
    seconds: Mapping[str, float]
    """Kind of work -> one worker's seconds for one image pass, per FLOP of the network's forward pass."""
    basis: str
    """Source of `seconds`, in words; "" if no speed is known, so that plans show no times."""
    bandwidth: float
    """Bytes per second that one worker sends in a sum."""
    memory: int | None = None
    """Bytes that one worker may take; None if unknown."""
    cores: int = 1
    """Number of cores of one worker."""
    compiling: Mapping[str, float] = field(default_factory=lambda: COMPILING)
    """Kind of work -> one worker's seconds to compile it, per torch function as in `COMPILING`."""

    @classmethod
    def of(cls, device: str, workers: int, cores: int = 1, speed: float = 0.0) -> Machine:
        """Make a machine from the speed of its student steps.

        Args:
            device: "core" or "GPU".
            workers: number of workers.
            cores: number of cores of one worker.
            speed: FLOP/s of one core or GPU in student steps; 0 if unknown. Then an assumed speed serves to compare
                layouts, and `basis` is "".
        """
        known = speed or (GPU_SPEED if device == "GPU" else CORE_SPEED)
        seconds = {kind: passes / (known * cores) for kind, passes in FORWARD_PASSES.items()}
        return cls(device, workers, seconds, "as given" if speed else "", BANDWIDTH[device], cores=cores)

    def sum_seconds(self, size: float, sums: int, members: int) -> float:
        """Seconds of a number of sums over `members` workers.

        Args:
            size: bytes of all summed tensors together.
            sums: number of sums.
            members: number of workers; 1 takes no time.
        """
        if members == 1:
            return 0.0
        return 2 * (members - 1) / members * size / self.bandwidth + sums * LATENCY * math.ceil(math.log2(members))


def machine_here(config: RunConfig) -> Machine:
    """Machine to plan for if the user describes no cluster: `cluster.workers` workers, or as many as fit here."""
    cluster = config.cluster
    if uses_gpu(cluster):
        return Machine.of("GPU", cluster.workers or torch.cuda.device_count() or config.workers_per_set)
    workers = cluster.workers or max(1, (os.cpu_count() or 1) // cluster.threads_per_worker)
    return Machine.of("core", workers, cluster.threads_per_worker)


_NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"
_KEYS = {
    "gpus": (r"(\d{1,5})", 1),
    "cpus": (r"(\d{1,6})", 1),
    "memory": (r"(.*)", 1),
    "tflops": (_NUMBER, 1e12),
    "gflops": (_NUMBER, 1e9),
    "network": (rf"{_NUMBER} ?([KMGT])bps", 1 / 8),
}
"""Key of a cluster's description -> regular expression of its value, and factor to base units."""


def parse_cluster(text: str, threads: int = 1) -> Machine:
    """Read the description of a cluster, such as `gpus=64,memory=80GiB,tflops=60,network=25Gbps`.

    Args:
        text: description. Its memory is that of one GPU, or of all cores together. Its tflops or gflops are the speed
            of student steps on one GPU or core, not the peak. Its network is the speed at which one GPU or core sends.
        threads: number of cores of one worker, for a cluster without GPUs.

    Raises:
        ConfigError: the text cannot be read, or the cluster has fewer cores than one worker takes.
    """

    def unreadable(fact: str) -> ConfigError:
        example = "gpus=64,memory=80GiB,tflops=60,network=25Gbps or cpus=2,memory=24GiB,gflops=140"
        return ConfigError(f"--cluster {text!r}: {fact}", remedy=f"write it like {example}")

    values: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (each.strip() for each in part.partition("="))
        if not equals or name not in _KEYS:
            raise unreadable(f"{part.strip()!r} is not one of {', '.join(f'{key}=' for key in _KEYS)}")
        if name in values:
            raise unreadable(f"it has {name}= twice")
        values[name] = _number(name, value)
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
    machine = Machine.of(device, count // cores, cores, values.get("tflops") or values.get("gflops") or 0.0)
    if memory:
        machine = replace(machine, memory=int(memory if device == "GPU" else memory // machine.workers))
    return replace(machine, bandwidth=values.get("network") or machine.bandwidth)


def _number(key: str, text: str) -> float:
    """Value of a key in base units; 0 if the text cannot be read, such as "8" for memory, which lacks a unit."""
    pattern, unit = _KEYS[key]
    match = re.fullmatch(pattern, text, re.ASCII | re.IGNORECASE)
    if not match:
        return 0.0
    if key == "memory":
        with suppress(ConfigError):
            return float(size) if 2**20 <= (size := parse_bytes(text)) < 2**60 else 0.0
        return 0.0
    prefix = match[2].upper() if match.lastindex == 2 else " "
    return unit * float(match[1]) * 1000.0 ** " KMGT".index(prefix)


def require_measurable(machine: Machine) -> None:
    """Raise a `ConfigError` if steps timed on this machine would not show the speed of the planned workers."""
    if machine.basis or (machine.device == "GPU" and not torch.cuda.is_available()):
        raise ConfigError(
            "--measure times steps on this machine, and "
            + ("the speed is given" if machine.basis else "it has no GPU, which the workers compute on"),
            remedy="leave it out; tflops= or gflops= in --cluster gives a speed",
        )
