"""Tests the benchmarks of bfloat16, of iterations of DM and SRe2L, and of experts that a set never saw."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datm_ray.store.trajectories import TrajectoryStore
from tests.conftest import tiny_config

BENCH = {name: f"bench_{name}" for name in ("bfloat16", "distribution", "recovery", "unseen")}


def test_losses_of_unseen_experts_stand_beside_those_of_the_sets_own(
    bench: SimpleNamespace, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A set's losses are shown for each start epoch and their mean; equal experts give equal losses."""
    store = str(finished_run / "experts")
    group = str(TrajectoryStore(store).groups()[0])
    words = ["--store", store, "--group", group, "--experts", "0", "1", "--others", "0", "1", "--starts", "0", "1"]
    bench.unseen.main([str(finished_run / "tiny"), *words])
    heading, rule, own, others = capsys.readouterr().out.splitlines()
    assert heading == "| start epoch | 0 | 1 | mean |"
    assert rule == "| --- | --- | --- | --- |"
    values = own.removeprefix("| experts it was made with (n = 2) ")
    assert others == f"| others (n = 2) {values}"
    first, second, mean = (float(cell) for cell in values.strip("| ").split("|"))
    assert mean == pytest.approx((first + second) / 2, abs=0.011)
    assert 0 < first < 10


def test_an_expert_that_is_missing_is_one_line(bench: SimpleNamespace, finished_run: Path) -> None:
    """A group or expert that the store lacks ends the program with one line."""
    words = ["--store", str(finished_run / "experts"), "--group", "a/b/c", "--experts", "0", "--others", "1"]
    with pytest.raises(SystemExit, match="bench_unseen: "):
        bench.unseen.main([str(finished_run / "tiny"), *words, "--starts", "0"])


def test_precisions_are_compared_in_turns(bench: SimpleNamespace) -> None:
    """A line has both times, their ratio, and how far the rounded gradient is off."""
    turns: list[str] = []

    def call(name: str, values: list[float]) -> Any:
        def compute() -> torch.Tensor:
            turns.append(name)
            return torch.tensor(values)

        return compute

    line = bench.bfloat16.measured("title", [call("exact", [3.0, 4.0]), call("rounded", [3.0, 4.5])], 2)
    assert turns == ["exact", "rounded"] * 3
    assert line.startswith("| title | ")
    assert line.endswith(" | 0.9985 | 10.0% |")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_both_precisions_compute_one_gradient(bench: SimpleNamespace) -> None:
    """Calls in float32 and bfloat16 compute the same gradient but for rounding."""
    spec = tiny_config().network.for_images(1, (8, 8), 10)
    for calls in (bench.bfloat16.matching(spec, 4, 2), bench.bfloat16.expert(spec)):
        exact, rounded = (call().flatten() for call in calls)
        assert not torch.equal(exact, rounded)
        assert float(torch.cosine_similarity(exact, rounded, 0)) > 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "ways"),
    [
        pytest.param(
            *("distribution", ["--classes", "2", "--width", "4"], ["published way", "uncompiled micro-batches"]),
            marks=pytest.mark.exhaustive,
        ),
        ("recovery", ["--images", "3", "--width", "8"], ["uncompiled", "uncompiled, channels innermost"]),
    ],
)
def test_ways_to_compute_an_iteration_differ_by_rounding(
    name: str,
    size: list[str],
    ways: list[str],
    bench: SimpleNamespace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A table of an iteration has a line for each way, and the first ones differ from float64 by rounding alone."""
    vars(bench)[name].main([*size, "--side", "8", "--turns", "1", "--out", str(tmp_path / "new")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ways
    assert all(float(line.split("|")[4]) < 1e-4 for line in lines[2:4])
    assert [file.name.split("_")[0] for file in (tmp_path / "new").iterdir()] == [name]
