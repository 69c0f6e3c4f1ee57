"""Tests the MetaDD benchmark: its statistics and its runs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from datm_ray.monitor.spent import Spent
from datm_ray.recipes import get_recipe
from datm_ray.stages.experts.train import EXPERTS_COST
from datm_ray.stages.methods.registry import method_of
from datm_ray.store.files.filesystem import open_location

pa = pytest.importorskip("pyarrow")


BENCH = "bench_metadd"


@pytest.fixture
def compare(bench: ModuleType) -> ModuleType:
    """metadd_compare.py, imported as when it runs."""
    return sys.modules["metadd_compare"]


def test_pairs_are_of_the_same_architecture_distillation_and_network(compare: ModuleType) -> None:
    """Pairs share architecture, distillation and network; distillations are tested by their means."""
    base = {"a": [[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]], "b": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]}
    gains = {"a": [[1.0, 3.0], [0.0, 2.0], [4.0, 4.0]], "b": [[2.0, 2.0], [1.0, 1.0], [0.0, 0.0]]}
    values = {
        name: [[x + y for x, y in zip(*pair, strict=True)] for pair in zip(base[name], gains[name], strict=True)]
        for name in base
    }
    found = compare.paired(values, base, ["a", "b"])
    assert found["pairs"] == 12
    assert found["difference"] == pytest.approx(20 / 12)
    assert found["of_distillations"] == pytest.approx([2.0, 1.0, 2.0])
    assert found["p_distillations"] == pytest.approx(ttest_1samp([2.0, 1.0, 2.0], 0.0).pvalue)
    assert found["p_t"] < found["p_distillations"], "it takes networks of one set for independent"


def test_two_distillations_are_too_few_to_be_tested(compare: ModuleType) -> None:
    """Two distillations get a mean difference and no p value of their own."""
    found = compare.paired({"a": [[1.0, 2.0], [3.0, 3.5]]}, {"a": [[0.0, 2.5], [1.0, 1.0]]}, ["a"])
    assert len(found["of_distillations"]) == 2
    assert "p_distillations" not in found
    assert "over distillations" not in compare.difference(found)


def test_one_distillation_has_the_variants_name(bench: ModuleType) -> None:
    """One distillation has the variant's name, so that earlier folders stay valid; several are numbered by seeds."""
    variant = bench.variants(bench.DIGITS)[-1]
    (alone,) = bench.runs_of(variant, bench.DIGITS, 1, [])
    several = bench.runs_of(variant, bench.DIGITS, 2, [])
    assert (alone.name, alone.seed) == (variant.name, 0)
    assert [(each.name, each.seed) for each in several] == [(f"{variant.name}-s0", 0), (f"{variant.name}-s1", 1)]


@pytest.mark.parametrize("recipe", ["digits-ipc1", "digits-mtt-ipc10", "digits-dm-ipc10", "digits-sre2l-ipc10"])
def test_a_recipes_method_is_the_host_and_has_its_rivals(
    bench: ModuleType, compare: ModuleType, recipe: str, tmp_path: Path
) -> None:
    """Variants of every host are recipes that its method accepts; rivals have no term of MetaDD but cross-entropy.

    All variants with the usual number of auxiliaries have the same ones, and every auxiliary scores the sets.
    """
    arguments = bench.asked(["--recipe", recipe, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    setting = arguments.setting
    runs = {each.name: bench.runs_of(each, setting, 1, [])[0] for each in bench.variants(setting)}
    assert {config.method for config in runs.values()} == {get_recipe(recipe).method}
    assert len(runs) == (18 if "sre2l" in recipe else 16)
    usual = runs["var-ai-pos"].metadd.auxiliaries
    for name, config in runs.items():
        method_of(config).check(config.resolved((16, 16)))
        if name == "without":
            assert config.metadd is None
            continue
        scored = {compare.label(network) for network in config.evaluate.networks}
        assert {compare.label(network) for network in config.metadd.auxiliaries} <= scored
        assert config.metadd.auxiliaries == usual or name.startswith("all-")
        assert config.recover.statistics_of == name.removeprefix("statistics-of-") or "statistics" not in name
    rival = runs["classes-of-several"].metadd
    assert (rival.variance, rival.position, rival.divergence) == (0, 0, 0)
    apart = runs["ai-pushed-apart"].metadd
    assert (apart.variance, apart.position, apart.divergence, apart.invariance) == (0, 0, -1, rival.invariance)
    assert rival.invariance == runs["ai"].metadd.invariance == {"SRe2L": 1.0, "DM": 0.3}.get(setting.host, 0.01)
    page = bench.heading(setting, {"seen": ["a"], "unseen": ["b"]}, 3, 2, learns="sre2l" not in recipe)
    assert page.startswith(f"Host: {setting.host}. Real digits")
    assert ("the learned one" in page) == ("sre2l" not in recipe)


def test_only_hosts_are_measured(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe whose method MetaDD cannot join is refused in one line, and so is a variant of another host."""
    for words, expected in (
        (["--recipe", "digits-select-ipc10"], "method select, and hosts are datm, mtt, dm, sre2l"),
        (["--recipe", "digits-dm-ipc10", "--variants", "statistics-of-all"], "and not statistics-of-all"),
    ):
        with pytest.raises(SystemExit):
            bench.asked(words)
        assert expected in capsys.readouterr().err


def test_sets_without_a_step_size_of_their_own_have_tuned_ones_alone(compare: ModuleType) -> None:
    """Tables of sets that learn no step size have no column of learned ones."""
    tuned = {"a": [[90.0, 91.0]], "b": [[80.0, 82.0]], "c": [[70.0, 70.0]]}
    groups = {"same": ["a"], "seen": ["b"], "unseen": ["c"]}
    row = {"variant": "without", "tuned": tuned, "groups": groups, "ratio": [0.5],
           "tests": {name: compare.paired(tuned, tuned, each) for name, each in groups.items()}}  # fmt: skip
    assert compare.variant_table([{**row, "learned": {}}])[0].startswith("| variant | same, tuned | seen")
    assert compare.variant_table([{**row, "learned": {}}])[2].startswith("| without | 90.5 | 81.0 | 70.0 |")
    assert compare.by_architecture([{**row, "learned": {}}])[0] == "| architecture | without, tuned |"
    assert compare.variant_table([{**row, "learned": tuned}])[2].startswith("| without | 90.5 (90.5) | 81.0 (81.0)")


def test_the_part_of_a_data_set_has_the_first_images_of_every_class(bench: ModuleType, tmp_path: Path) -> None:
    """A part of a data set has each class's first images, in the order of the file."""
    import pyarrow.parquet as pq

    labels = np.array([1, 0, 1, 1, 0, 0])
    for part in ("train", "test"):
        pq.write_table(pa.table({"label": labels, "row": np.arange(6)}), tmp_path / f"cifar10-{part}.parquet")
    sys.modules["cifar_part"].write_part(tmp_path, tmp_path / "part", (2, 1))
    kept = {part: pq.read_table(tmp_path / "part" / f"{part}.parquet")["row"].to_pylist() for part in ("train", "test")}
    assert kept == {"train": [0, 1, 2, 4], "test": [0, 1]}


def test_results_name_no_folder_of_a_machine(bench: ModuleType) -> None:
    """Results name all options except folders of one machine."""
    words = ["--data", "cifar10", "--runs", "/here", "--out=/there", "--seeds", "3"]
    assert sys.modules["facts"].without_places(words) == ["--data", "cifar10", "--seeds", "3"]


def test_experts_that_variants_share_are_counted_once(bench: ModuleType, compare: ModuleType, tmp_path: Path) -> None:
    """Shared experts count once per architecture and seed; sets and networks count for each variant."""
    runs = {
        each.name: bench.runs_of(each, bench.DIGITS, 2, [])
        for each in bench.variants(bench.DIGITS)
        if each.name in ("without", "var-ai-pos")
    }
    spent = Spent(seconds=2.0, cpu_seconds=1.0).to_json()
    for config in (config for each in runs.values() for config in each):
        names = ["convnet", *(["vgg11"] if config.metadd else [])]
        rows = [{"architecture": name, "known": 8, "spent": spent} for name in names]
        (open_location(str(tmp_path)) / config.name / EXPERTS_COST).write_json(rows)
    experts = compare.experts_costs(SimpleNamespace(out=open_location(str(tmp_path))), runs)
    assert {name: (number, cost["cpu_seconds"]) for name, (number, cost) in experts.items()} == {
        "convnet": (16, 2.0),
        "vgg11": (16, 2.0),
    }
    row = {
        "variant": "without",
        "tuned": {"convnet": [[90.0], [91.0]]},
        "cost": {"distillation": spent, "convnet": spent},
    }
    lines = compare.spent_table([row], experts)
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| experts, convnet", "16"],
        ["| experts, vgg11", "16"],
        ["| without: distillation", "2"],
        ["| without: convnet", "2"],
    ]
