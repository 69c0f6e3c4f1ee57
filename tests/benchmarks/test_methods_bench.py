"""Tests which runs the benchmark of methods makes, and a tiny run of all of it."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from datm_ray.stages.methods.registry import METHODS
from tests.benchmarks.test_cifar_bench import write_cifar


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """bench_methods.py, imported as when it runs."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        return importlib.import_module("bench_methods")
    finally:
        sys.path.pop(0)


def test_every_packaged_method_has_a_row_of_ten_images_a_class(bench: ModuleType) -> None:
    """Rows have equal sizes and one scored network; under a teacher's labels DM, which trains none, is left out."""
    arguments = argparse.Namespace(seeds=3, distillations=2, quick=False)
    own, taught = (bench.runs_of(arguments, "dataset={source: cifar10}", labels) for labels in ("own", "teacher"))
    others = {"mtt", "given"}  # bench_cifar.py has MTT
    assert {configs[0].method for configs in own.values()} == METHODS.keys() - others
    assert own.keys() - taught.keys() == {"DM"}
    for configs in own.values():
        assert [config.seed for config in configs] == [0, 1]
        assert {(config.distill.ipc, config.evaluate.networks) for config in configs} == {(10, (bench.SCORED,))}
    names = [config.name for configs in own.values() for config in configs]
    assert len(set(names)) == len(names)
    assert bench.plain("SRe2L, falling crops (CDA)") == "sre2l-falling-crops-cda"


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_tiny_run_scores_every_method(bench: ModuleType, tmp_path: Path) -> None:
    """A tiny run of the program measures all rows under all labels they can have."""
    write_cifar(tmp_path / "data")
    words = ["--quick", "--executor", "serial", "--seeds", "1", "--cifar", str(tmp_path / "data")]
    found = bench.main([*words, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert {*bench.METHODS, "random images, resnet18 as teacher", "random images, convnet as teacher"} == found.keys()
    for name, each in found.items():
        assert len(each["hard"]) == len(each["one soft label"]) == 1
        assert len(each["a teacher's"]) == (name != "DM")
    assert "| DATM |" in next((tmp_path / "out").glob("methods-quick*.md")).read_text()
