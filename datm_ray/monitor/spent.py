"""Cost of work on its workers: seconds, peak memory, and bytes read from and written to files.

CPU seconds are summed over all threads of the worker's process and over finished child processes, such as compilers.
GPU seconds are wall-clock seconds times the worker's share of a GPU, busy or not. Bytes are counted by
`store.files.traffic`: experts, checkpoints and results, but not images of data sets. The start of a worker (imports,
transfer of images) is not counted.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from datm_ray.config import ClusterConfig
from datm_ray.runtime.machine.devices import peak_memory
from datm_ray.store.files.traffic import traffic


@dataclass(frozen=True)
class Spent:
    """Cost of some work: seconds, memory and bytes of files. For several workers, all but the peak memory are sums."""

    seconds: float = 0.0
    """Wall-clock seconds, summed over workers."""
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    peak_memory_bytes: float = 0.0
    """Highest peak memory of a worker, on its GPU if it has one, else of its process; 0 if unknown."""
    read_bytes: float = 0
    write_bytes: float = 0
    is_partial: bool = False
    """True if the true cost is higher, because a file with the cost of some of the work is missing or damaged. Work
    that a killed worker had not saved is in no cost, and does not make a cost partial."""

    def __add__(self, other: Spent) -> Spent:
        """Sum of two costs, with the higher of the two peaks; partial if one of them is."""
        added = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in dataclasses.fields(self)}
        peak = max(self.peak_memory_bytes, other.peak_memory_bytes)
        return Spent(**added | {"peak_memory_bytes": peak, "is_partial": self.is_partial or other.is_partial})

    def share(self, part: float) -> Spent:
        """Cost with all sums multiplied by `part`, from 0 to 1. The peak memory stays."""
        scaled = {each.name: part * getattr(self, each.name) for each in dataclasses.fields(self)}
        return Spent(**scaled | {"peak_memory_bytes": self.peak_memory_bytes, "is_partial": self.is_partial})

    def to_json(self) -> dict[str, float]:
        """Cost as plain data, rounded to three decimals, for `from_json`. `is_partial` is there only if it is True."""
        numbers = {name: round(value, 3) for name, value in dataclasses.asdict(self).items() if name != "is_partial"}
        return numbers | ({"is_partial": True} if self.is_partial else {})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Spent:
        """Restore a cost from the data that `to_json` returned."""
        numbers = [each.name for each in dataclasses.fields(cls) if each.name != "is_partial"]
        return cls(**{name: float(value[name]) for name in numbers}, is_partial=bool(value.get("is_partial")))


def total(costs: Iterable[Spent]) -> Spent:
    """Sum of costs, with the highest of the peaks; all 0 for no costs."""
    return sum(costs, start=Spent())


class Account:
    """Measures the cost of this process's work, as a `Spent`, from the construction of the object on."""

    def __init__(self, device: torch.device, cluster: ClusterConfig) -> None:
        self._device = device
        self._gpus = (cluster.gpus_per_worker or 1.0) if device.type == "cuda" else 0.0
        _forget_peak(device)
        self._before, self._moved = self._read(), traffic()

    def spent(self) -> Spent:
        """Cost since the construction or the last `lap`. The peak memory is always the peak since the construction."""
        now = self._read()
        clock, cpu, read, written = (late - early for late, early in zip(now, self._before, strict=True))
        peak = peak_memory(self._device)
        known = 0.0 if math.isnan(peak) else peak
        return Spent(clock, cpu, clock * self._gpus, known, read, written)

    def lap(self) -> Spent:
        """Return the cost since the construction or the last `lap`, and start a new lap."""
        found, self._before = self.spent(), self._read()
        return found

    def metrics(self) -> dict[str, float]:
        """Requests, retries, bytes and seconds of file access, and peak memory in bytes, since the construction.

        The result is for `Progress.metrics`: name in `monitor.metrics.CATALOGUE` -> value. Memory is nan if unknown.
        """
        moved = dataclasses.asdict(traffic() - self._moved)
        sums = {f"datm_ray_store_{name}_total": float(value) for name, value in moved.items()}
        return {**sums, "datm_ray_worker_memory_bytes": peak_memory(self._device)}

    @staticmethod
    def _read() -> tuple[float, float, float, float]:
        moved, times = traffic(), os.times()
        cpu = times.user + times.system + times.children_user + times.children_system
        return time.monotonic(), cpu, moved.read_bytes, moved.write_bytes


def _forget_peak(device: torch.device) -> None:
    """Reset the record of peak memory, of the GPU or else of this process, if the system supports it."""
    if device.type == "cuda":
        torch.cuda.init()  # resetting statistics before CUDA is initialised is an error
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
