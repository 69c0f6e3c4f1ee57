"""Tests the fidelity benchmark: its runs, its statistics, and a tiny run of all of it."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datm_ray.config import NetworkSpec, RunConfig, run_identity
from datm_ray.methods.trajectory.matching import matching_gradient
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions
from datm_ray.pipeline import preview
from datm_ray.pipeline.checks import unequal_keys
from datm_ray.recipes import get_recipe

BENCH = {
    "main": "bench_fidelity",
    "variants": "fidelity_variants",
    "tables": "fidelity_tables",
    "plot": "fidelity_plot",
    "matching": "published_matching",
}


def differences(one: RunConfig, other: RunConfig) -> set[str]:
    """Keys in which two runs differ, apart from their names."""
    keys = {each.split(" ")[0] for each in unequal_keys(run_identity(one), run_identity(other))}
    return keys - {"name"}


RANGE = {f"distill.start_epochs.{key}" for key in ("first", "bound", "final_bound")}


def test_within_an_ipc_only_the_range_differs(bench: SimpleNamespace) -> None:
    """Five sizes and four ranges share experts and differ in the range alone; every start has a target."""
    runs = bench.variants.crossover_runs(bench.variants.FULL, 1, 5)
    assert {ipc for ipc, _ in runs} == {1, 5, 10, 20, 30}
    assert {name for _, name in runs} == {"early", "middle", "late", "datm"}
    for (ipc, _), (config,) in runs.items():
        (own,) = runs[ipc, "datm"]
        assert differences(own, config) <= RANGE
        assert config.distill.ipc == ipc
        assert config.evaluate.seeds == 5
        assert config.experts == own.experts
    starts = {name: (c.distill.start_epochs.first, c.distill.start_epochs.last) for (_, name), (c,) in runs.items()}
    assert [starts[name] for name in ("early", "middle", "late")] == [(0, 4), (5, 19), (20, 35)]


def test_ranges_are_those_of_the_recipes(bench: SimpleNamespace) -> None:
    """DATM's own ranges at 1, 10 and 30 images per class are those of the packaged recipes."""
    runs = bench.variants.crossover_runs(bench.variants.FULL, 1, 5)
    for ipc in (1, 10, 30):
        packaged = get_recipe(f"digits-ipc{ipc}").distill
        (own,) = runs[ipc, "datm"]
        assert own.distill.start_epochs == packaged.start_epochs


def test_each_variant_of_the_ablation_differs_in_what_its_name_says(bench: SimpleNamespace) -> None:
    """Each variant differs from DATM's run of its size by its name alone; TESLA's in the gradient."""
    sizes = bench.variants.FULL
    (base,) = bench.variants.crossover_runs(sizes, 1, 5)[sizes.ablation_ipc, "datm"]
    changed = {name: differences(base, runs[0]) for name, runs in bench.variants.ablation_runs(sizes, 1, 5).items()}
    assert changed.pop("tesla") == set()
    assert changed.pop("no range") == {*RANGE}
    assert changed.pop("floating bound") == {f"distill.start_epochs.{key}" for key in ("bound", "expand_iterations")}
    assert changed.pop("labels not learned") == {"distill.learning_rate_labels"}
    assert changed.pop("hard labels") == {"distill.labels"}
    assert changed.pop("random initial images") == {"distill.initial"}
    assert changed.pop("no range, hard labels, random (MTT)") == {*RANGE, "distill.labels", "distill.initial"}
    assert changed.pop("GSAM experts") == {"experts.optimiser"}
    assert changed == {name: {"experts.count"} for name in ("1 expert", "4 experts", "50 experts")}


def test_runs_without_the_limit_differ_in_it_alone(bench: SimpleNamespace) -> None:
    """Runs without the limit differ from the crossover's run of that size and range in the limit alone."""
    sizes = bench.variants.FULL
    crossover = bench.variants.crossover_runs(sizes, 1, 5)
    for row, (config,) in bench.variants.unlimited_runs(sizes, 1, 5).items():
        assert differences(crossover[row][0], config) == {"distill.gradient_limit"}


def test_further_distillations_keep_the_first_ones_folders(bench: SimpleNamespace) -> None:
    """More distillations keep the folders of the first, so that a finished benchmark can be extended."""
    one, two = (bench.variants.crossover_runs(bench.variants.FULL, count, 5)[1, "early"] for count in (1, 2))
    assert two[0] == one[0]
    assert (two[1].name, two[1].seed) == ("ipc1-early-s1", 1)


def test_the_full_sizes_are_estimated_to_fit_into_half_an_hour_of_two_cores(bench: SimpleNamespace) -> None:
    """All parts are estimated at half an hour of two cores; each further distillation adds as much."""
    seconds = bench.main.main(["--estimate"])["estimate"]
    assert 5 * 60 < seconds / 2 < 25 * 60, "with something to spare"
    parts = [bench.main.main(["--estimate", "--part", part])["estimate"] for part in ("crossover", "ablation")]
    assert max(parts) < seconds < sum(parts)
    assert 1.8 < bench.main.main(["--estimate", "--distillations", "2"])["estimate"] / seconds < 2.1


def test_tesla_leaves_out_what_parameters_owe_to_the_images(bench: SimpleNamespace) -> None:
    """TESLA's gradient equals a plain step-by-step program, and not the exact gradient."""
    matching = bench.matching
    spec = NetworkSpec(channels=3, size=(8, 8), classes=4, width=4, depth=2)
    problem = matching.make_problem(spec, 8, 4, dtype=torch.float64)
    problem.synthetic.step_sizes.fill_(0.3)
    loss, expected = matching.tesla(problem)
    tesla, exact = (
        matching_gradient(
            functions(problem.network, StepOptions(compiled=False)),
            problem.start,
            problem.target,
            problem.synthetic,
            problem.placed(),
        )
        for functions in (bench.variants.TeslaStepFunctions, StudentStepFunctions)
    )
    assert tesla.loss == pytest.approx(loss)
    for value, wanted in zip((tesla.images, tesla.soft_labels, tesla.step_size), expected, strict=True):
        assert torch.allclose(value, wanted, rtol=1e-9, atol=1e-12)
    assert float((exact.images - tesla.images).norm() / exact.images.norm()) > 0.01


def test_lossless_is_within_one_standard_error(bench: SimpleNamespace) -> None:
    """Lossless means within one standard error of the paired differences; with one distillation it is unknown."""
    real = [[0.94, 0.96], [0.96, 0.98], [0.90, 0.92], [0.95, 0.95]]
    steps = (-0.02, 0.02, -0.02, 0.02)
    error = statistics.stdev(steps) / 2
    for below, expected in ((-0.02, True), (0.9 * error, True), (1.1 * error, False)):
        distilled = [[value + step - below for value in row] for row, step in zip(real, steps, strict=True)]
        assert bench.tables.paired_difference(distilled, real) == pytest.approx((-below, error))
        assert bench.tables.is_lossless(distilled, real) is expected
    assert bench.tables.is_lossless(real[:1], real[:1]) is None


def test_a_tie_is_lossless(bench: SimpleNamespace) -> None:
    """Half of 359 test images below, with a standard error of half an image, is lossless despite rounding."""
    right = ([352, 352], [353, 352])
    distilled, real = ([[float(np.float32(count / 359))] for count in counts] for counts in right)
    gain, error = bench.tables.paired_difference(distilled, real)
    assert -gain == pytest.approx(error, rel=1e-6)
    assert bench.tables.is_lossless(distilled, real) is True


def test_several_distillations_are_compared_by_their_means(bench: SimpleNamespace) -> None:
    """Several distillations are compared by the means of their networks, paired by seed."""
    values, others = [[0.8, 0.8, 0.8], [0.9, 0.9, 0.9]], [[0.7, 0.8, 0.6], [0.9, 0.8, 0.7]]
    assert bench.tables.mean(values) == pytest.approx(0.85)
    assert bench.tables.paired_difference(values, others) == pytest.approx((0.1, 0.0), abs=1e-12)
    assert bench.tables.cell(values) == "85.0 ± 5.5"


def ablation_row(name: str, distilled: list[list[float]], **other: Any) -> dict[str, Any]:
    """A row of the ablation as `measured` makes it."""
    cost = {"seconds": 40.0, "cpu_seconds": 30.0, "gpu_seconds": 0.0, "peak_memory_bytes": 2**30, "read_bytes": 2**20}
    row = {"variant": name, "ipc": 10, "iterations": 200, "start_epochs": [5, 29], "experts": 16, "optimiser": "sgd"}
    row |= {"accuracy": {"distilled": distilled}, "validation": [0.98, 0.96], "kept_at": [100, 200], "seeds": [0, 1]}
    row |= {"runs": [name, f"{name}-s1"], "same_sets_as_base": 0, "shortened": [0, 3], "skipped": [0, 99]}
    return row | {"cost": {"experts": cost, "distillation": cost, "distilled": cost}} | other


def test_the_ablation_reports_variants_that_changed_nothing(bench: SimpleNamespace) -> None:
    """The ablation table has paired differences, costs of one set, and a note on sets equal to the base's."""
    base = ablation_row("DATM", [[0.95, 0.95], [0.97, 0.97]], same_sets_as_base=2)
    rows = [base, ablation_row("other", [[0.96, 0.96], [0.99, 0.99]]), {**base, "variant": "no change"}]
    table = bench.tables.ablation_table({"ablation": rows, "crossover": []})
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in table if " | " in line}
    assert cells["other"][4] == "+1.50 (se 0.50)"
    assert cells["other"][5:10] == ["100, 200", "0, 3", "97.0", "15", "15 |"]
    assert cells["no change"][4] == "+0.00 (se 0.00); 2 of 2 set(s) the same bit for bit"


def test_runs_without_the_limit_stand_beside_those_with_it(bench: SimpleNamespace) -> None:
    """Runs with and without the limit share a row: skipped and shortened updates, and the paired difference."""
    limited = ablation_row("", [[0.93], [0.94]], ipc=1, range="early", skipped=[0, 1])
    other = ablation_row("", [[0.5], [0.5]], ipc=10, range="early")
    without = ablation_row("", [[0.91], [0.94]], ipc=1, range="early")
    table = bench.tables.unlimited_table({"crossover": [other, limited], "unlimited": [without]})
    expected = "| 1, early | 0, 99 | 0, 1 | 0, 3 | 92.5 ± 2.1 | 93.5 ± 0.7 | +1.00 (se 1.00) |"
    assert table[-1] == expected


def test_costs_that_rows_share_are_counted_once(bench: SimpleNamespace) -> None:
    """Shared costs count once: experts of the largest row, controls per IPC, all real data."""
    cost = ablation_row("", [[]])["cost"]["experts"]
    accuracy = {"random-hard": [[0.9, 0.9]], "distilled": [[0.9, 0.9]], "full": [[0.9, 0.9]]}
    parts = [*accuracy, "experts", "distillation"]
    rows = [
        ablation_row("", [], ipc=ipc, range=name, accuracy=accuracy, cost=dict.fromkeys(parts, cost))
        for ipc, name in ((1, "early"), (1, "late"), (10, "early"))
    ]
    ablation = [rows[0], ablation_row("50 experts", [[0.9]], experts=50)]
    found = {"crossover": rows, "ablation": ablation, "unlimited": []}
    lines = [line.split(" | ")[:2] for line in bench.tables.cost_table(found)[4:]]
    labels = [name.strip("| ") for name, _ in lines]
    assert labels.count("experts, sgd") == labels.count("full") == 1
    assert [name for name in labels if name.startswith("random-hard")] == ["random-hard, IPC 1", "random-hard, IPC 10"]
    assert lines[0] == ["| experts, sgd", "100"], "fifty for each of two seeds"


def test_a_range_is_ahead_only_beyond_a_standard_error(bench: SimpleNamespace) -> None:
    """A range is ahead only beyond one standard error: early at one image, late at ten, else neither."""
    accuracy = {(1, "early"): 0.9, (1, "late"): 0.6, (10, "early"): 0.9, (10, "late"): 0.95}
    accuracy |= {(5, "early"): 0.9, (5, "late"): 0.9}
    rows = [
        {"ipc": ipc, "range": name, "accuracy": {"distilled": [[value - 0.01, value + 0.01]]}}
        for (ipc, name), value in accuracy.items()
    ]
    lines = {line.split(" | ")[0]: line.split(" | ")[2] for line in bench.tables.range_table({"crossover": rows})}
    assert (lines["| 1"], lines["| 10"], lines["| 5"]) == ("early", "late", "neither")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_tiny_run_leaves_tables_numbers_and_a_figure(bench: SimpleNamespace, tmp_path: Path) -> None:
    """A tiny run of both parts leaves all files; running it again computes nothing and prints the same."""
    words = ["--quick", "--seeds", "2", "--executor", "serial", "--runs", str(tmp_path / "runs")]
    words += ["--out", str(tmp_path / "results")]
    first = bench.main.main(words)
    files = {file.suffix: file for file in (tmp_path / "results").iterdir()}
    assert set(files) == {".md", ".json", ".png"}
    result = json.loads(files[".json"].read_text())
    assert {"command", "hardware", "versions", "commit", "seeds", "date"} <= set(result)
    assert str(tmp_path) not in files[".json"].read_text() + files[".md"].read_text()
    rows = result["crossover"]
    assert len(rows) == 6
    for row in rows:
        assert set(row["accuracy"]) == {"random-hard", "random-soft", "distilled", "full"}
        assert all(len(networks) == 2 for values in row["accuracy"].values() for networks in values)
        assert row["cost"]["distillation"]["cpu_seconds"] > 0
    assert [row["variant"] for row in result["ablation"]][:1] == ["DATM"]
    assert "tesla" in {row["variant"] for row in result["ablation"]}
    assert [
        (row["ipc"], row["range"], row["recipe"]["distill"].get("gradient_limit")) for row in result["unlimited"]
    ] == [(1, "early", None)]
    with Image.open(files[".png"]) as image:
        assert min(image.size) > 500
    assert nothing_is_left(bench, tmp_path / "runs")
    assert bench.main.main(words)["crossover"] == first["crossover"]


def nothing_is_left(bench: SimpleNamespace, runs: Path) -> bool:
    """True if all tasks of the tiny run are done."""
    rows = bench.main.wanted("all", bench.variants.QUICK, 1, 2).rows()
    pipeline = bench.main.Scoring([config for each in rows for config in each], str(runs))
    plan = preview.remaining_lines(pipeline.runs, pipeline.scored_rows)
    return bool(plan == ["0 experts to train", "0 sets to distil", "0 networks to train for evaluation"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--distillations", "0"], "0 is less than 1"),
        (["--seeds", "-1"], "-1 is less than 1"),
        (["--seeds", "many"], "invalid positive value: 'many'"),
        (["--quick", "--out", "{file}"], "cannot be made a folder: File exists"),
        (["--quick", "--runs", "{file}/runs"], "cannot be made a folder: Not a directory"),
    ],
)
def test_bad_input_is_refused_before_the_work(
    bench: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], expected: str
) -> None:
    """Bad input exits with code 2 before an executor starts."""
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        bench.main.main([word.format(file=tmp_path / "file") for word in words])
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_several_sessions_in_one_folder_are_reported(bench: SimpleNamespace, tmp_path: Path) -> None:
    """Each session in a folder of runs is reported; an interrupted one has no time."""
    facts = sys.modules["facts"]
    with pytest.raises(KeyboardInterrupt), facts.going(tmp_path):
        raise KeyboardInterrupt
    with facts.going(tmp_path):
        pass
    found = facts.common_facts("bench_fidelity.py", [], runs=tmp_path)
    assert found["took"] == "0 minutes in 2 go(es), 1 of them interrupted and not counted"
    assert found["commit"] == facts.commit()
