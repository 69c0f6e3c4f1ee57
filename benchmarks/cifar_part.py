"""A part of real CIFAR-10 small enough for CPUs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from datm_ray.errors import DatasetError

PER_CLASS = (1000, 500)
"""Numbers of training and of test images taken of each class."""
FEW_PER_CLASS = (20, 20)
"""Numbers of training and of test images taken of each class with `--quick`, which only tries a program."""
DESCRIPTION = (
    "A part of real CIFAR-10: the first 1000 training images (100 of them for validation) and 500 test images of\n"
    "each class."
)
FILES = ("cifar10-train.parquet", "cifar10-test.parquet")
SOURCE = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Folder of cifar10-train.parquet and cifar10-test.parquet."""


def dataset_override(source: Path, runs: Path, quick: bool) -> str:
    """Write the part beside the runs. Returns the override that makes a recipe use it.

    Raises:
        DatasetError: the files are not there.
    """
    part = runs.resolve() / "cifar10-subset"
    write_part(source, part, FEW_PER_CLASS if quick else PER_CLASS)
    tiny = {"resize": 16} if quick else {}
    return f"dataset={json.dumps({'source': 'parquet', 'path': str(part), 'validation': 0.1, **tiny})}"


def write_part(source: Path, folder: Path, per_class: tuple[int, int]) -> None:
    """Write the first training and test images of every class, in the order of the source files."""
    import pyarrow.parquet as pq

    missing = next((name for name in FILES if not (source / name).is_file()), None)
    if missing:
        raise DatasetError(
            f"{source} holds no {missing}",
            remedy="give the folder of CIFAR-10 as Parquet (`image.bytes`, `label`) with --cifar",
        )
    folder.mkdir(parents=True, exist_ok=True)
    for part, name, count in zip(("train", "test"), FILES, per_class, strict=True):
        images = pq.read_table(source / name)
        labels = images["label"].to_numpy()
        kept = [np.flatnonzero(labels == label)[:count] for label in np.unique(labels)]
        unfinished = folder / f"{part}.unfinished"
        pq.write_table(images.take(np.sort(np.concatenate(kept))), unfinished)
        os.replace(unfinished, folder / f"{part}.parquet")
