"""Tests the benchmark of `init` and `run`: its cases and its table, without a run."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datm_ray.data.sources import load_raw
from datm_ray.errors import DatasetError

BENCH = "bench_own_images"


def write_parquet(path: Path, labels: list[int]) -> None:
    """A data set of one-colour images in Hugging Face's layout."""
    images = []
    for label in labels:
        encoded = io.BytesIO()
        Image.new("RGB", (64, 64), (label, 0, 0)).save(encoded, "JPEG")
        images.append({"bytes": encoded.getvalue(), "path": None})
    pq.write_table(pa.table({"image": images, "label": labels}), path)


@pytest.mark.parametrize(("case", "image"), [("unbalanced-3", (3, 64, 64)), ("grey32-10", (1, 32, 32))])
def test_a_case_is_a_folder_of_its_classes(
    bench: ModuleType, tmp_path: Path, case: str, image: tuple[int, ...]
) -> None:
    """A case has its classes, at most its number of images of each, and its size and colours."""
    labels = [label for label in range(0, 200, 20) for _ in range(30)]
    for name in bench.TINY:
        write_parquet(tmp_path / name, labels)
    bench.write_case(case, tmp_path, tmp_path / "case")
    raw = load_raw("folder", str(tmp_path / "case"))
    assert (raw.channels, *raw.size) == image
    counts = bench.CASES[case][1].values()
    assert len(raw.train) + len(raw.validation) == sum(min(30, train) for train, _ in counts)
    assert len(raw.test) == sum(min(30, test) for _, test in counts)


def test_a_case_without_its_files_is_one_line(bench: ModuleType, tmp_path: Path) -> None:
    """The error names the missing file."""
    with pytest.raises(DatasetError, match=r"holds no cifar10-train\.parquet"):
        bench.write_case("cifar10-500", tmp_path, tmp_path / "case")


def test_a_row_compares_with_random_images_of_the_same_labels(bench: ModuleType) -> None:
    """Means and deviations are over the networks of all seeds, and the distance counts the larger deviation."""
    accuracies = {"random-hard": [0.2, 0.2], "random-soft": [0.3, 0.34], "distilled": [0.5, 0.5]}
    each = {"case": "mine", "ipc": 1, "planned_seconds": 100.0, "test_accuracy": accuracies, "skipped_share": 0.0}
    each |= {"planned_cpu_seconds": 200.0, "cpu_seconds": 180.0}
    results = [{**each, "seed": 0, "seconds": 90.0}, {**each, "seed": 1, "seconds": 120.0, "skipped_share": 0.02}]
    ((case, *cells),) = bench.rows_of(results)
    assert case == "mine, IPC 1"
    assert cells == ["20.0 ± 0.0", "32.0 ± 2.3", "50.0 ± 0.0", "7.8", "2.0%", "0.90 1.20", "0.90 0.90", "2"]
    assert len(cells) + 1 == len(bench.HEAD)


def test_the_time_of_a_resumed_run_counts_what_came_before(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted command leaves its seconds in a file, and the next call adds its own; a failure is an error."""
    clock, place = iter(range(0, 10**6, 10)), tmp_path / "run.seconds"
    monkeypatch.setattr(bench.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(subprocess.CalledProcessError):
        bench.timed([sys.executable, "-c", "raise SystemExit(3)"], place)
    before = json.loads(place.read_text())
    assert before > 0
    assert bench.timed([sys.executable, "-c", ""], place) >= before + 10
