"""Tests the benchmark of scaling: its ideal and efficiencies, and that all numbers of processes learn one set."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.processes import PROCESSES

BENCH = "bench_scaling"


def test_all_numbers_of_processes_learn_one_set(bench: ModuleType) -> None:
    """Sets of 1, 2 and 4 processes move, and differ by rounding alone; sums have bytes wherever there are peers."""
    (case,) = bench.cases(quick=True)
    with ExitStack() as stack:
        pools = [stack.enter_context(ProcessPoolExecutor(1, PROCESSES)) for _ in range(4)]
        rows = bench.measure(case, 1, pools)
    assert [(row["scaling"], row["processes"]) for row in rows] == list(bench.GROUPS)
    assert [row["images"] for row in rows] == [20, 20, 20, 40, 80]
    assert [bool(row["bytes"][0]) for row in rows] == [row["processes"] > 1 for row in rows]
    for row in rows:
        assert len(bench.cells(row)) == len(bench.COLUMNS.split("|"))
        assert 0 <= row["in_sums"][0] <= row["seconds"][0]
    for row in rows[:3]:
        assert row["difference"] < bench.TOLERANCE < 1e-3 < row["moved"]
    assert rows[0]["difference"] == 0


@pytest.mark.parametrize(
    ("scaling", "count", "cores", "ideal"),
    [("strong", 2, 2, 2.0), ("strong", 4, 2, 2.0), ("weak", 2, 2, 4.0), ("weak", 4, 2, 8.0), ("weak", 4, 8, 4.0)],
)
def test_ideal_divides_over_cores_and_efficiencies_compare_with_it(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, scaling: str, count: int, cores: int, ideal: float
) -> None:
    """The ideal divides one process's time over no more cores than there are; CPU seconds need no cores."""
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda _: set(range(cores)))
    images = np.ones((4, 2))

    def made(seconds: float, cpu: float) -> list[dict[str, Any]]:
        figures = {"seconds": seconds, "cpu": cpu, "in_sums": 0.5, "bytes": 8.0}
        timed = {name: np.array([value, 2 * value]) for name, value in figures.items()}
        return [{"timed": timed, "images": np.stack([images / 2, images])}]

    (case,) = bench.cases(quick=True)
    row = bench.row_of(case, scaling, count, made(5.0, 16.0), made(4.0, 4.0))
    assert row["ideal"] == [ideal, 2 * ideal]
    assert row["efficiency"] == [ideal / 5] * 2
    assert row["by_cpu"] == [(count if scaling == "weak" else 1) / 4] * 2
    assert row.get("moved") == (1.0 if scaling == "strong" else None)
