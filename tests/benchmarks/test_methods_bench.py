"""Tests which runs the benchmark of methods makes, and a tiny run of all of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import pytest

from datm_ray.config import expert_fingerprint, run_identity
from datm_ray.stages.evaluate.rows import training_of
from datm_ray.stages.methods.registry import METHODS, teacher_of, trained_networks
from tests.benchmarks.test_cifar_bench import write_cifar

BENCH = "bench_methods"


def test_every_packaged_method_has_a_row_of_ten_images_a_class(bench: ModuleType) -> None:
    """Rows have equal sizes and one scored network, and are the same runs under pruned labels."""
    arguments = argparse.Namespace(seeds=3, distillations=2, quick=False)
    whole, pruned = (bench.runs_of(arguments, "dataset={source: cifar10}", share) for share in (1.0, 0.025))
    others = {"mtt", "given"}  # bench_cifar.py has MTT
    assert {configs[0].method for configs in whole.values()} == METHODS.keys() - others
    for name, configs in whole.items():
        assert [config.seed for config in configs] == [0, 1]
        assert {(config.distill.ipc, config.evaluate.networks) for config in configs} == {(10, (bench.SCORED,))}
        assert [run_identity(each) for each in configs] == [run_identity(each) for each in pruned[name]]
        assert {(each.evaluate.keep_labels, each.evaluate.epochs) for each in pruned[name]} == {(5, 200)}
    names = [config.name for configs in whole.values() for config in configs]
    assert len(set(names)) == len(names)
    assert bench.plain("SRe2L, falling crops (CDA)") == "sre2l-falling-crops-cda"


def test_one_teacher_labels_all_rows_and_the_network_that_chooses_is_the_same(bench: ModuleType) -> None:
    """All sets of a seed have one teacher in one normalisation, which SRe2L and the selections are made from."""
    arguments = argparse.Namespace(seeds=3, distillations=2, quick=False)
    runs = bench.runs_of(arguments, "dataset={source: cifar10}")
    for seed in range(2):
        of = [configs[seed].resolved((32, 32)) for configs in runs.values()]
        (teacher,) = {expert_fingerprint(teacher_of(config), "d") for config in of}
        assert {config.dataset.normalisation for config in of} == {"standard"}
        for config in of:
            is_made_from_it = config.method in ("sre2l", "select")
            assert (expert_fingerprint(config, "d") == teacher) == is_made_from_it
            assert len(trained_networks(config)) == (2 if config.method == "datm" else 1)


def test_every_cell_is_what_its_heading_says(bench: ModuleType) -> None:
    """No cell has a step size without a choice, DM has no soft label, and random images are scored once for each."""
    arguments = argparse.Namespace(seeds=3, distillations=1, quick=False)
    runs = bench.runs_of(arguments, "dataset={source: cifar10}")
    pruned = bench.runs_of(arguments, "dataset={source: cifar10}", 0.1)
    controls = set(bench.OF_RANDOM.values())
    for name, (config,) in runs.items():
        scored = bench.Scored.scored_rows(None, config.resolved((32, 32)))
        rows = {row for row, _ in scored}
        for row, network in scored:
            count, schedule = training_of(config, row, network)
            assert count >= 3
            assert (schedule.augmentation == "resized+flip") == (row in ("distilled", "random-soft"))
        own = set(bench.LABELS.values()) - ({"distilled-fixed"} if name == "DM" else set())
        assert rows - controls == own
        assert rows & controls == {"DM": set(), "DATM": {"random-fixed"}}.get(name, controls)
        (short,) = pruned[name]
        kept = {row for row, _ in bench.Scored.scored_rows(None, short.resolved((32, 32)))}
        assert kept == {"distilled"} | (controls & rows & {"random-soft"})


def test_cells_and_differences_are_over_sets_if_there_are_several(bench: ModuleType) -> None:
    """A cell's spread is over the means of sets, or over networks of a single one; differences are in pairs."""
    sets, fewer = [[0.5, 0.6], [0.7, 0.8]], [[0.4, 0.5], [0.5, 0.8]]
    assert bench.cell(sets) == "65.0 ± 14.1"
    assert bench.cell(sets[:1]) == "55.0 ± 7.1"
    assert (bench.cell([]), bench.cell([[0.5]])) == ("–", "50.0")
    assert bench.difference(fewer, sets) == "-10.0 ± 0.0"
    assert bench.difference(fewer[1:], sets[1:]) == "-10.0 ± 10.0"


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_tiny_run_scores_every_method(bench: ModuleType, tmp_path: Path) -> None:
    """A tiny run of the program measures all rows under all labels they can have, and what was scored is counted."""
    write_cifar(tmp_path / "data")
    words = ["--quick", "--executor", "serial", "--seeds", "1", "--kept", "0.5", "--cifar", str(tmp_path / "data")]
    found = bench.main([*words, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert {*bench.METHODS, bench.RANDOM, bench.OF_EXPERTS} == found.keys()
    kept = "1 of 2 epochs"
    for name, row in found.items():
        columns = {"one soft label"} if name == bench.OF_EXPERTS else {*bench.LABELS, kept}
        columns -= {"one soft label"} if name == "DM" else set()
        assert row["accuracies"].keys() == row["labels"].keys() == columns
        assert all(len(networks) == 1 for sets in row["accuracies"].values() for networks in sets)
        is_real = name in bench.WHOLE or name.startswith("random")
        assert row["images"] == 100 * 3 * 16 * 16 * (1 if is_real else 4)
        assert row["labels"].get("one soft label", 4000) == 4000
    store = next((tmp_path / "runs" / "dm-s0" / "labels").iterdir())
    files = {place.name: place.stat().st_size for place in store.glob("*.arrow")}
    assert found["DM"]["labels"][bench.EVERY] == sum(files.values())
    assert found["DM"]["labels"][kept] == files["labels.arrow"] + files["epoch-00000.arrow"]
    assert found["DM"]["hours"]["networks"] > 0  # the teacher's
    page = next((tmp_path / "out").glob("methods-quick*.md")).read_text()
    assert page.count("| DATM |") == 2
