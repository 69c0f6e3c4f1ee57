"""Origin of a result: versions and hardware, for artifacts, evaluations and reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DESCRIPTION_BYTES = 128
"""Largest size in bytes of one worker's description in `workers_in_words`. Longer descriptions are cut."""

PACKAGES = ("datm-ray", "torch", "torchvision", "numpy", "pyarrow", "ray")


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions of packages, and CPU, cores, threads and `device` as plain data, without names of hosts or users."""
    return {
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "processor": _cpu_model(),  # former name
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }


def workers_in_words(device: torch.device, sum_over_all: Callable[[Tensor], Tensor], rank: int, size: int) -> str:
    """Torch's version and the device of all workers of a task, such as "2 x torch 2.14.1 on cpu".

    Args:
        device: device of this worker.
        sum_over_all: sums a tensor over the workers. All of them must call this function.
        rank: rank of this worker.
        size: number of workers.
    """
    facts = provenance(device)
    own = f"torch {facts['versions']['torch']} on {facts['device']}".encode()[:DESCRIPTION_BYTES]
    words = torch.zeros(size, DESCRIPTION_BYTES, dtype=torch.int64)
    words[rank, : len(own)] = torch.tensor(list(own))
    lines = [bytes(each).rstrip(b"\0").decode(errors="replace") for each in sum_over_all(words).tolist()]
    return "; ".join(f"{count} x {line}" for line, count in sorted(Counter(lines).items()))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """Model name of the CPU if the system reports it, otherwise the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
