"""Calls that are timed: one on any device, or several in turns in CPU seconds, which other work changes little."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from facts import result_path, write_page
from tables import spread
from torch import Tensor

WAYS_HEADING = "| | seconds | speed | difference |\n" + "| --- " * 4 + "|"
"""Heading of the lines of `compared`."""


def timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds and result of a call; on a GPU between two events, with the device idle before and after."""
    if device != "cuda":
        began = perf_counter()
        result = call()
        return perf_counter() - began, result
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    result = call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000, result


def cpu_seconds(calls: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """CPU seconds of this process for each call in each turn, by the call's name."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            before = process_time()
            call()
            seconds[name].append(process_time() - before)
    return seconds


def compared(calls: Mapping[str, Callable[[], Tensor]], exact: Tensor, turns: int) -> list[str]:
    """Lines for ways to compute a tensor: median seconds, speed relative to the first way, difference from `exact`."""
    off = {name: float((call() - exact).norm() / exact.norm()) for name, call in calls.items()}  # compiles
    seconds = cpu_seconds(calls, turns)
    first = next(iter(seconds.values()))
    return [
        f"| {name} | {median(own):.3g} | {spread([old / new for old, new in zip(first, own, strict=True)])} | "
        f"{off[name]:.1g} |"
        for name, own in seconds.items()
    ]


def publish(lines: list[str], folder: Path, name: str) -> None:
    """Print a page, and write it into the folder of results."""
    print("\n".join(lines))
    write_page(result_path(folder, name), lines)
