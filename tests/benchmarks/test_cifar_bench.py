"""Tests which runs the CIFAR-10 benchmark makes, and a tiny run of all of it."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from datm_ray.config import run_identity
from datm_ray.errors import DatasetError
from datm_ray.pipeline.checks import unequal_keys

BENCH = "bench_cifar"


def test_methods_differ_in_the_documented_settings(bench: ModuleType) -> None:
    """Methods differ in range, labels and initial images alone; experts and budget are equal."""
    runs = bench.runs_of([1, 10, 50], 2, 3, "dataset={source: cifar10, validation: 0.1}", False)
    ranges = {f"distill.start_epochs.{key}" for key in ("first", "bound", "final_bound", "expand_iterations")}
    for ipc in (1, 10, 50):
        for datm, mtt in zip(runs[ipc, "datm"], runs[ipc, "mtt"], strict=True):
            changed = {each.split(" ")[0] for each in unequal_keys(run_identity(datm), run_identity(mtt))} - {"name"}
            assert {"distill.labels", "distill.initial"} <= changed
            assert changed <= {"distill.labels", "distill.initial", *ranges}
            assert mtt.distill.start_epochs.last + 1 == bench.EPOCHS == mtt.experts.epochs
            assert datm.distill.ipc == ipc
        for datm, other in zip(runs[ipc, "datm"], runs[ipc, "datm, any first images"], strict=True):
            changed = {each.split(" ")[0] for each in unequal_keys(run_identity(datm), run_identity(other))} - {"name"}
            assert changed == {"distill.initial"}
    assert [each.seed for each in runs[1, "datm"]] == [0, 1]


def test_ranges_stand_for_the_published_amount_of_training(bench: ModuleType) -> None:
    """Steps times rate at a range's bound equal the published ones to half an epoch."""
    published = {1: (4, 4), 10: (10, 20), 50: (20, 40)}
    per_epoch, ours = 196 * 0.01, 71 * 0.02
    for ipc, bounds in published.items():
        expected = [min(bench.EPOCHS, bound * per_epoch / ours) for bound in bounds]
        assert bench.SCALES[ipc].bounds == pytest.approx(expected, abs=0.6)


@pytest.mark.slow
def test_a_tiny_run_scores_every_method(bench: ModuleType, tmp_path: Path) -> None:
    """A tiny run scores every method, reads files in the real format, and names results as partial."""
    write_cifar(tmp_path)
    words = ["--quick", "--ipc", "1", "--seeds", "1", "--executor", "serial", "--cifar", str(tmp_path)]
    found = bench.main([*words, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results")])
    assert [row["range"] for row in found["crossover"]] == list(bench.METHODS)
    assert all(len(row["accuracy"]) == 4 for row in found["crossover"])
    names = {file.name.partition("_")[0] for file in (tmp_path / "results").iterdir()}
    assert names == {"cifar10-part-ipc1-quick"}
    (page,) = (tmp_path / "results").glob("*.md")
    for row in found["crossover"]:
        ((first, second),) = row["validation_curves"]
        assert (first[0], second[0]) == (2, 4), "QUICK validates every two of four iterations"
        expected = f"| 1 | {row['range']} | {100 * first[1]:.1f} at 2, {100 * second[1]:.1f} at 4 |"
        assert expected in page.read_text().splitlines()
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "results").iterdir())


def test_files_that_are_not_there_are_one_line(bench: ModuleType, tmp_path: Path) -> None:
    """Missing files are one line of error before anything starts."""
    with pytest.raises(DatasetError, match=r"holds no cifar10-train.parquet.*--cifar"):
        bench.main(["--cifar", str(tmp_path), "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)])
    assert list((tmp_path / "runs").iterdir()) == []


def write_cifar(folder: Path) -> None:
    """Write Parquet files like those of CIFAR-10, with 20 images of noise in each class and part."""
    noise = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for part in ("train", "test"):
        images = [jpeg(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(200)]
        table = pa.table({"image": [{"bytes": image} for image in images], "label": [n % 10 for n in range(200)]})
        pq.write_table(table, folder / f"cifar10-{part}.parquet")


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """An image as data sets have it."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()
