"""Tests how real images are read while the first ones of a set, or the crops of a class, are chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from datm_ray.core.steps import Steps, finished, result_of
from datm_ray.core.synthetic import Rows, correct_rows_in_steps, random_rows
from datm_ray.core.training.loop import logits_in_steps
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.mesh import ALONE
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.methods.first_images import initial
from datm_ray.stages.methods.first_images.crops import chosen_crops
from datm_ray.stages.methods.part import Part
from tests.conftest import tiny_config


class Watched:
    """Images that record the rows of every read."""

    def __init__(self, images: Any) -> None:
        self.images, self.reads = images, list[NDArray[np.int64]]()

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        self.reads.append(rows)
        found: NDArray[np.float32] = self.images[rows]
        return found


class Guessing(nn.Module):
    """Two experts that classify images by the number in their first pixel, `wrong` ones as another class."""

    count = 2

    def __init__(self, labels: NDArray[np.int64], wrong: tuple[set[int], set[int]]) -> None:
        super().__init__()
        self.labels, self.wrong, self.expert = labels, wrong, 0

    def forward(self, images: Tensor) -> Tensor:
        rows = images[:, 0, 0, 0].long().tolist()
        classes = [self.labels[row] + (row in self.wrong[self.expert]) for row in rows]
        return torch.eye(int(self.labels.max()) + 2)[classes]

    def logits_in_steps(self, expert: int, images: Tensor) -> Steps[Tensor]:
        self.expert = expert
        return logits_in_steps(self, images)


def part_of(out: Path, labels: NDArray[np.int64], *settings: str) -> tuple[Part, Watched]:
    """Part of a worker with one numbered image for each label: its first pixel is its row."""
    pipeline = Pipeline([tiny_config(*settings)], str(out))
    (config,) = pipeline.configs
    numbers = np.broadcast_to(np.arange(len(labels), dtype=np.float32)[:, None, None, None], (len(labels), 1, 8, 8))
    watched = Watched(numbers.copy())
    dataset = dataclasses.replace(
        pipeline.runs.dataset(config.dataset), train_images=cast(Any, watched), train_labels=labels
    )
    return Part(config, dataset, "", ALONE, torch.device("cpu"), 1), watched


def test_candidates_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more images than one batch are in memory at a time, and the choice is that of one read."""
    monkeypatch.setattr(initial, "SCORING_BATCH", 7)
    labels = np.repeat(np.arange(3), 20)
    part, watched = part_of(tmp_path, labels, "distill.ipc=5", "distill.initial=correct")
    experts = Guessing(labels, (set(range(0, 60, 2)), set()))
    found = result_of(initial.first_rows(part, cast(ExpertNetworks, experts), Rows(0, 15)))

    def predict(expert: int, rows: NDArray[np.int64]) -> Steps[NDArray[np.int64]]:
        return finished(labels[rows] + np.isin(rows, list(experts.wrong[expert])))

    works = correct_rows_in_steps(labels, 5, part.config.seed, experts=2, predict=predict, classes=range(3))
    assert found.tolist() == result_of(works).tolist()
    assert max(map(len, watched.reads)) == 7


def test_a_class_whose_last_images_are_taken_already_is_filled(tmp_path: Path) -> None:
    """A second expert that is asked about no image, since the last one is taken already, does not end the choice."""
    labels = np.repeat(np.arange(2), 7)
    part, _ = part_of(tmp_path, labels, "distill.ipc=3", "distill.initial=correct")
    last = int(random_rows(labels, 7, part.config.seed)[6])  # the image of class 0 that is asked for last
    wrong = set(range(7)) - {last}
    experts = Guessing(labels, (wrong, wrong))
    found = result_of(initial.first_rows(part, cast(ExpertNetworks, experts), Rows(0, 6)))
    assert found[0] == last
    assert labels[found].tolist() == [0, 0, 0, 1, 1, 1]
    assert len(set(found.tolist())) == 6


def test_an_image_is_read_once_for_all_its_crops(tmp_path: Path) -> None:
    """A batch of crops reads each of its images once, since a streamed image is decoded whenever it is read."""
    labels = np.repeat(np.arange(10), 30)
    settings = ("method=select", "distill.ipc=2", "select.pool=20", "select.crops=5")
    part, watched = part_of(tmp_path, labels, *settings)
    chosen = result_of(chosen_crops(part, nn.Flatten(), 3))
    (read,) = watched.reads
    assert len(read) == len(set(read.tolist())) == 20
    watched.reads.clear()
    images = chosen.images(part, range(2))
    (read,) = watched.reads
    assert sorted(read.tolist()) == sorted(chosen.rows.tolist())
    assert images[:, 0, 4, 4].round().tolist() == chosen.rows.tolist()  # each crop is of its own image
