"""Tests the facts above results: what names a machine's pages."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCH = "facts"
CPUS = [
    ("AMD EPYC", "flags\t: fpu avx2 sse2\n"),
    ("AMD EPYC", "flags\t: fpu avx2 avx512f\n"),
    ("AMD EPYC", "flags\t: fpu avx2 avx512f avx512_bf16\n"),
    ("Intel(R) Xeon(R) 6", "flags\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n"),
    ("aarch64", "Features\t: fp asimd bf16\n"),
]


def test_no_machine_overwrites_the_page_of_another(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPUs with another name or other vector units have pages of their own, and readers see which it was."""
    paths, words, units_of = [], [], bench.vector_units
    for number, (model, flags) in enumerate(CPUS):
        (tmp_path / f"{number}").write_text(f"model name\t: {model}\n{flags}")
        units = units_of(str(tmp_path / f"{number}"))
        monkeypatch.setattr(bench, "vector_units", lambda units=units: units)
        monkeypatch.setattr(bench, "provenance", lambda device, model=model: {"processor": model})  # former name
        paths.append(bench.result_path(Path("results"), "evaluate").name)
        words.append(bench.hardware("cpu")[1])
    assert len(set(paths)) == len(CPUS), paths
    assert len(set(words)) == len(CPUS), words
    assert "-core-amd-epyc-avx-512-with-bfloat16_" in paths[2]
    assert "of Intel(R) Xeon(R) 6 (AMX)," in words[3]


def test_a_system_that_does_not_name_vector_units_has_none(bench: ModuleType, tmp_path: Path) -> None:
    """Without /proc/cpuinfo, or flags in it, the name has no vector units."""
    (tmp_path / "empty").write_text("model name\t: a CPU\n")
    assert [bench.vector_units(str(tmp_path / name)) for name in ("empty", "absent")] == ["", ""]


def test_results_make_their_folder(bench: ModuleType, tmp_path: Path) -> None:
    """A result is written where no folder is yet, by both ways in which benchmarks write pages, and so is a figure."""
    publish = importlib.import_module("turns").publish
    publish(["a line"], tmp_path / "one/two", "alone")
    bench.save(tmp_path / "three/four/both", ["a line"], {"a": 1})
    figure = bench.in_folder(tmp_path / "five/figure.png")
    written = sorted(place.parent for place in tmp_path.rglob("*") if place.is_file())
    assert written == [tmp_path / "one/two", tmp_path / "three/four", tmp_path / "three/four"]
    assert figure.parent.is_dir()
