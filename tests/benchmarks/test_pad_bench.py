"""Tests which runs the benchmark of PAD's parts makes, how it pairs them, and a tiny run of all of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import pytest

BENCH = "bench_pad"


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_variants_differ_in_their_parts_alone(bench: ModuleType, data: str) -> None:
    """Every variant has the same seeds, and the settings of the sets without PAD but for its own parts."""
    arguments = argparse.Namespace(data=data, seeds=3, distillations=2, quick=False, variants=None, set=[])
    runs = bench.runs_of(arguments, "dataset={source: cifar10}")
    plain, *others = runs.values()
    for configs in others:
        assert [config.seed for config in configs] == [0, 1]
        own = {"unmatched_share": 0.0, "average_decay": None}
        bare = configs[0].model_copy(
            update={
                "name": plain[0].name,
                "distill": configs[0].distill.model_copy(update=own),
                "experts": configs[0].experts.model_copy(update={"curriculum": None}),
            }
        )
        assert bare == plain[0] != configs[0].model_copy(update={"name": plain[0].name})
    names = [config.name for configs in runs.values() for config in configs]
    assert len(set(names)) == len(names)
    chosen = bench.runs_of(argparse.Namespace(**{**vars(arguments), "variants": [5]}), "dataset={source: cifar10}")
    assert list(chosen) == ["without", "experts from easy to hard"]


def test_differences_are_paired_over_distillations(bench: ModuleType) -> None:
    """A row has the mean difference of equal seeds and its standard error, which leaves out what seeds share."""
    each = {"accuracies": [92.0, 82.0, 88.0], "differences": [2.0, 1.0, 3.0], "cpu_seconds": [4.0, 5.0, 6.0]}
    assert bench.row("mine", each) == ["mine", "87.3 ± 5.0", "+2.0 ± 0.6", "0.074", "5"]
    assert bench.row(bench.WITHOUT, each)[2:4] == ["", ""]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_tiny_run_compares_every_variant(bench: ModuleType, tmp_path: Path) -> None:
    """A tiny run of the program measures all variants, and has a difference of zero for the first."""
    words = ["--quick", "--executor", "serial", "--seeds", "1", "--distillations", "1"]
    found = bench.main([*words, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert list(found) == list(bench.variants("digits"))
    assert found[bench.WITHOUT]["differences"] == [0.0]
    assert "| all three |" in next((tmp_path / "out").glob("pad-digits*.md")).read_text()
