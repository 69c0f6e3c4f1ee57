"""What a piece of work has cost its workers: seconds, peak memory, bytes from and to files.

CPU seconds are those of all threads of the worker's process, and of the processes it has started and waited for, such
as compilers. GPU seconds are seconds on the clock times the share of a GPU that the worker holds, busy or not. Bytes
are those that `store.traffic` counts: experts, checkpoints, results; images come from memory, and are none of them. The
start of a worker (its imports, the images that it is handed) belongs to no task and is not counted.
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
from datm_ray.runtime.devices import peak_memory
from datm_ray.store.traffic import traffic


@dataclass(frozen=True)
class Spent:
    """What some work has cost; of several workers, or attempts, the sum."""

    seconds: float = 0.0
    """On the clock, of every worker."""
    cpu_seconds: float = 0.0
    gpu_seconds: float = 0.0
    peak_memory_bytes: float = 0.0
    """Of the worker that took most: of its GPU where it has one, else of its process. 0 where it cannot be told."""
    read_bytes: float = 0
    write_bytes: float = 0

    def __add__(self, other: Spent) -> Spent:
        """Both; of the peaks the higher one."""
        added = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in dataclasses.fields(self)}
        peak = max(self.peak_memory_bytes, other.peak_memory_bytes)
        return Spent(**{**added, "peak_memory_bytes": peak})

    def share(self, part: float) -> Spent:
        """A part of it, from 0 to 1; the peak stays."""
        scaled = {each.name: part * getattr(self, each.name) for each in dataclasses.fields(self)}
        return Spent(**{**scaled, "peak_memory_bytes": self.peak_memory_bytes})

    def to_json(self) -> dict[str, float]:
        """As plain data, for `from_json`."""
        return {name: round(value, 3) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Spent:
        """What `to_json` gave."""
        return cls(**{each.name: float(value[each.name]) for each in dataclasses.fields(cls)})


def total(costs: Iterable[Spent]) -> Spent:
    """Of all of them."""
    return sum(costs, start=Spent())


class Account:
    """Measures what this process spends from now on."""

    def __init__(self, device: torch.device, cluster: ClusterConfig) -> None:
        self._device = device
        self._gpus = (cluster.gpus_per_worker or 1.0) if device.type == "cuda" else 0.0
        _forget_peak(device)
        self._before = self._read()

    def spent(self) -> Spent:
        """Since the beginning, or the last `lap`."""
        now = self._read()
        clock, processor, read, written = (late - early for late, early in zip(now, self._before, strict=True))
        peak = peak_memory(self._device)
        known = 0.0 if math.isnan(peak) else peak
        return Spent(clock, processor, clock * self._gpus, known, read, written)

    def lap(self) -> Spent:
        """The same; what comes then is counted anew, but for the peak."""
        found, self._before = self.spent(), self._read()
        return found

    @staticmethod
    def _read() -> tuple[float, float, float, float]:
        moved, times = traffic(), os.times()
        processor = times.user + times.system + times.children_user + times.children_system
        return time.monotonic(), processor, moved.read_bytes, moved.write_bytes


def _forget_peak(device: torch.device) -> None:
    """Let the peak be that of what follows, where the system lets us."""
    if device.type == "cuda":
        torch.cuda.init()  # else there are no statistics to reset, which is an error
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
