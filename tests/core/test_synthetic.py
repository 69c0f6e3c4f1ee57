"""Tests how a synthetic set starts: its real images and their soft labels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from datm_ray.core.steps import Steps, finished, result_of
from datm_ray.core.synthetic import SyntheticSet, correct_rows_in_steps, mean_correct_in_steps, random_rows

LABELS = np.array([0, 1, 2] * 8, np.int64)
Rows = NDArray[np.int64]
Predict = Callable[[int, Rows], Steps[Rows]]


def correct_rows(ipc: int, seed: int, experts: int, predict: Predict, classes: range = range(3)) -> Rows:
    return result_of(correct_rows_in_steps(LABELS, ipc, seed, experts=experts, predict=predict, classes=classes))


def right_on(*correct: set[int]) -> tuple[Predict, list[int]]:
    """Predictions that are right on these rows only, and a list of the distinct experts asked so far."""
    asked: list[int] = []

    def predict(expert: int, rows: Rows) -> Steps[Rows]:
        if expert not in asked:
            asked.append(expert)
        return finished(np.where(np.isin(rows, list(correct[expert])), LABELS[rows], LABELS[rows] + 1))

    return predict, asked


def rows_of(label: int) -> set[int]:
    return set(np.flatnonzero(label == LABELS).tolist())


def test_random_rows_are_stratified() -> None:
    """Random rows are `ipc` distinct ones of each class, in class order, and depend on the seed."""
    rows = random_rows(LABELS, 4, seed=0)
    assert LABELS[rows].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(set(rows.tolist())) == 12
    assert np.array_equal(rows, random_rows(LABELS, 4, seed=0))
    assert not np.array_equal(rows, random_rows(LABELS, 4, seed=1))


def test_perfect_expert_gives_the_random_rows() -> None:
    """An expert that is right everywhere selects the random rows, and no second expert is asked."""
    predict, asked = right_on(set(range(24)), set())
    rows = correct_rows(4, 5, experts=2, predict=predict)
    assert np.array_equal(rows, random_rows(LABELS, 4, 5))
    assert asked == [0]


def test_first_expert_is_preferred_and_the_next_fills_the_short_class() -> None:
    """Expert 0's correct images come first; expert 1's fill the class that lacks one."""
    short = {0, 3}
    predict, asked = right_on(short | rows_of(1) | rows_of(2), {6} | {1, 2}, set(range(24)))
    rows = correct_rows(3, 0, experts=3, predict=predict)
    assert LABELS[rows].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert set(rows[:2].tolist()) == short
    assert rows[2] == 6
    assert asked == [0, 1]


def test_images_nobody_gets_right_fill_the_rest() -> None:
    """Other distinct images of a class complete it when no expert has enough right."""
    predict, asked = right_on({0} | rows_of(1) | rows_of(2), {0, 3})
    rows = correct_rows(5, 0, experts=2, predict=predict)
    assert rows[:2].tolist() == [0, 3]
    assert set(rows[:5].tolist()) <= rows_of(0)
    assert len(set(rows.tolist())) == 15
    assert asked == [0, 1]


def test_a_shard_chooses_for_its_classes_what_one_process_chooses() -> None:
    """Rows chosen apart for ranges of classes join to the rows chosen at once."""
    whole = correct_rows(3, 7, experts=2, predict=right_on({0, 4, 8, 11}, {1, 3, 5, 6, 13})[0])
    parts = [
        correct_rows(3, 7, experts=2, predict=right_on({0, 4, 8, 11}, {1, 3, 5, 6, 13})[0], classes=classes)
        for classes in (range(1), range(1, 3))
    ]
    assert np.array_equal(np.concatenate(parts), whole)


def test_no_more_images_are_predicted_than_needed() -> None:
    """A perfect expert predicts twice the wanted images of each class, not the whole data set."""
    examined: list[int] = []

    def predict(expert: int, rows: Rows) -> Steps[Rows]:
        examined.extend(rows.tolist())
        return finished(LABELS[rows])

    correct_rows(2, 0, experts=1, predict=predict)
    assert len(examined) == 3 * 4


def test_soft_labels_are_the_mean_over_experts_that_are_right() -> None:
    """Soft labels average the experts that are right, or all experts if none is."""
    logits = torch.randn(5, 40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(40) % 3
    logits[:, 0, 0] = -100  # nobody is right about image 0
    logits[:, 1, 1] = 100  # everybody about image 1
    expected = []
    for image, label in enumerate(labels.tolist()):
        right = [expert for expert in logits[:, image] if int(expert.argmax()) == label]
        expected.append(torch.stack(right or list(logits[:, image])).mean(dim=0))
    assert not any(int(expert.argmax()) == 0 for expert in logits[:, 0])
    found = result_of(mean_correct_in_steps(map(finished, logits), labels))
    torch.testing.assert_close(found, torch.stack(expected))


def make_set() -> SyntheticSet:
    return SyntheticSet(torch.ones(2, 1, 2, 2), torch.ones(2, 3), torch.tensor([0.1]), torch.tensor([0, 1]))


def test_clone_is_independent() -> None:
    """Changing a clone leaves the original unchanged."""
    original = make_set()
    copy = original.clone()
    for tensor in (copy.images, copy.soft_labels, copy.step_size, copy.labels):
        tensor.add_(1)
    assert float(original.images.sum() + original.soft_labels.sum()) == 14
    assert float(original.step_size) == pytest.approx(0.1)
    assert original.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "value"),
    [("images", float("nan")), ("soft_labels", float("inf")), ("step_sizes", float("nan")), ("step_sizes", 0.0)],
)
def test_set_with_a_bad_value_is_not_valid(name: str, value: float) -> None:
    """One entry that is not finite, or a step size that is not positive, makes a set invalid."""
    bad = make_set()
    assert not bad.is_invalid()
    getattr(bad, name).view(-1)[-1] = value
    assert bad.is_invalid()
