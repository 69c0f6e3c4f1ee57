"""Tests the benchmark of evaluation: what its ratios count, and which page it writes."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = "bench_evaluate"


def test_the_cold_ratio_counts_compilation(bench: ModuleType) -> None:
    """Five networks of 100 epochs, compiled in 10 s, against a loop of 100 ms an epoch."""
    found = bench.cold_ratio(100, 5, 10.02, [0.02, 0.02], [0.1, 0.1])
    assert found == pytest.approx(5 * 100 * 0.1 / (10.02 + 5 * 99 * 0.02))
    assert bench.cold_ratio(100, 1, 0.1, [0.1], [0.1]) == pytest.approx(1)


def test_a_page_of_some_shapes_replaces_none_of_all(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with --shape writes where --out says, and nowhere without it."""
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(bench, "rows_of", lambda shape, *_: [ROW | {"shape": shape.name}])
    for words in (["--shape", "IPC 10"], ["--shape", "IPC 10", "--out", str(tmp_path / "own")], []):
        monkeypatch.setattr("sys.argv", ["bench_evaluate.py", *words])
        bench.main()
    (page,) = (tmp_path / "results").glob("*.md")
    (own,) = (tmp_path / "own").glob("*.md")
    rows = [text.count("| 3.5 |") for text in (page.read_text(), own.read_text())]
    assert rows == [6, 2]


ROW: dict[str, Any] = {"threads": 1, "method": "ours", "seconds": [1.0], "ratios": [2.0]}
ROW |= {"networks_an_hour": 9.0, "first_epoch": 3.0, "cold_ratio": 3.5}


def test_pages_and_untracked_files_are_no_changes(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit counts as changed only where tracked programs differ, not for pages that were just written."""
    facts = importlib.import_module("facts")
    monkeypatch.setattr(facts, "REPOSITORY", tmp_path)
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    program, page = tmp_path / "program.py", tmp_path / "benchmarks/results/page.md"
    for file in (program, page):
        file.write_text("one\n")
    named = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], [*named, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    page.write_text("two\n")
    (tmp_path / "notes").write_text("untracked\n")
    assert "changed" not in facts.commit()
    program.write_text("two\n")
    assert facts.commit().endswith(", changed")
