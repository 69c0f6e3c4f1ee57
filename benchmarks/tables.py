"""Markdown tables that several benchmarks share, among them what the rows of a comparison have cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from datm_ray.words import data_size


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(each)} |" for each in (head, ["---"] * len(head), *rows)]


def spread(values: Sequence[float]) -> str:
    """Median (smallest to largest); "" without values."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})" if values else ""


def quartiles(values: Sequence[float], scale: float = 1.0) -> str:
    """Median (first to third quartile), each times `scale`."""
    low, middle, high = (scale * each for each in np.percentile(values, (25, 50, 75)))
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


COST_HEAD = ("what", "number", "worker s", "CPU s", "GPU s", "peak memory", "read")


def cost_cells(what: str, number: int, cost: Mapping[str, float]) -> list[str]:
    """Cells of a row under `COST_HEAD`.

    Args:
        number: number of experts, sets or networks that cost this much together.
        cost: result of `Spent.to_json`.
    """
    seconds = [f"{cost[name]:.1f}" for name in ("seconds", "cpu_seconds", "gpu_seconds")]
    sizes = [data_size(cost[name]) for name in ("peak_memory_bytes", "read_bytes")]
    return [what, str(number), *seconds, *sizes]
