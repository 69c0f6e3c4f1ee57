"""The CIFAR-10 benchmark: which runs it makes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from datm_ray.pipeline import _differences


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """bench_cifar.py, found as it is when it is run."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        return importlib.import_module("bench_cifar")
    finally:
        sys.path.pop(0)


def test_methods_differ_in_what_is_told_of_them(bench: ModuleType) -> None:
    """Range, labels and initial images; experts and budget are the same."""
    runs = bench.runs_of([1, 10, 50], 2, 3, "dataset={source: cifar10, validation: 0.1}", False)
    allowed = {"distill.first_start", "distill.start_bound", "distill.final_start_bound", "distill.expand_iterations"}
    for ipc in (1, 10, 50):
        for datm, mtt in zip(runs[ipc, "datm"], runs[ipc, "mtt"], strict=True):
            changed = {each.split(" ")[0] for each in _differences(datm.identity(), mtt.identity())} - {"name"}
            assert {"distill.labels", "distill.initial"} <= changed
            assert changed <= {"distill.labels", "distill.initial", *allowed}
            assert mtt.distill.final_start_bound == bench.EPOCHS == mtt.experts.epochs
            assert datm.distill.ipc == ipc
    assert [each.seed for each in runs[1, "datm"]] == [0, 1]


def test_ranges_stand_for_the_published_amount_of_training(bench: ModuleType) -> None:
    """Steps times rate of the scaled experts at a bound are those of the published ones, to half an epoch."""
    published = {1: (4, 4), 10: (10, 20), 50: (20, 40)}
    per_epoch, ours = 196 * 0.01, 71 * 0.02
    for ipc, bounds in published.items():
        expected = [min(bench.EPOCHS, bound * per_epoch / ours) for bound in bounds]
        assert bench.SCALES[ipc].bounds == pytest.approx(expected, abs=0.6)
