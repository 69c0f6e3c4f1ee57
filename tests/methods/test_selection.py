"""Tests the scores of method select against slow, plain versions, and how images are kept, cropped and tiled."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from datm_ray.methods.selection import (
    best_crops,
    crop_for_tile,
    draw_boxes,
    drawn_order,
    el2n_scores,
    forgetting_scores,
    keep,
    moderate_scores,
    padded,
    tiled,
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_equal_scores_keep_their_order_and_values_that_are_not_finite_come_last() -> None:
    """The lowest scores are kept, or the highest, and neither nan nor infinity is kept before a number."""
    scores = np.array([2.0, math.nan, 1.0, 2.0, -math.inf, 1.0, math.inf])
    assert keep(scores, 4).tolist() == [2, 5, 0, 3]
    assert keep(scores, 4, hardest=True).tolist() == [0, 3, 2, 5]
    assert sorted(keep(scores, 7).tolist()) == list(range(7))


def test_the_order_of_a_class_depends_on_seed_and_class_alone() -> None:
    """Each class and each seed has an order of its own, which holds all rows."""
    rows = np.arange(100, 140)
    orders = [drawn_order(rows, seed, label).tolist() for seed in (0, 1) for label in (0, 1)]
    assert orders[0] == drawn_order(rows, 0, 0).tolist()
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == rows.tolist() for order in orders)


@pytest.mark.parametrize("count", [6, 7])
def test_moderate_scores_equal_a_plain_computation(count: int) -> None:
    """Centre, distances and their median are computed number by number, for even and odd numbers of images."""
    features = normal(count, 3)

    def median(values: list[float]) -> float:
        values = sorted(values)
        half = len(values) // 2
        return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2

    centre = [median([float(row[d]) for row in features]) for d in range(3)]
    distances = [math.sqrt(sum((float(x) - c) ** 2 for x, c in zip(row, centre, strict=True))) for row in features]
    expected = [abs(distance - median(distances)) for distance in distances]
    np.testing.assert_allclose(moderate_scores(features), expected, rtol=1e-12)


def test_el2n_scores_equal_a_plain_computation() -> None:
    """The norm of softmax minus one-hot is computed number by number."""
    logits, labels = 3 * normal(5, 4), [0, 3, 1, 1, 2]
    expected = []
    for row, label in zip(logits, labels, strict=True):
        powers = [math.exp(value) for value in row]
        errors = [power / sum(powers) - (k == label) for k, power in enumerate(powers)]
        expected.append(math.sqrt(sum(error**2 for error in errors)))
    np.testing.assert_allclose(el2n_scores(torch.from_numpy(logits), torch.tensor(labels)), expected, rtol=1e-12)


def test_forgetting_scores_equal_a_plain_count() -> None:
    """Losses of a learned image are counted epoch by epoch; an image that is never learned scores all epochs."""
    correct = normal(9, 30) > 0
    correct[:, 0], correct[:, 1], correct[:, 2] = False, True, [True, False] * 4 + [True]
    expected = []
    for of_image in correct.T.tolist():
        forgotten = sum(now and not later for now, later in itertools.pairwise(of_image))
        expected.append(forgotten if any(of_image) else len(of_image))
    assert forgetting_scores(correct).tolist() == expected
    assert expected[:3] == [9, 0, 4]


def test_one_crop_of_an_image_is_kept() -> None:
    """The crop of lowest loss stands for its image; a loss that is not finite is never the lowest."""
    losses = np.array([[3.0, 1.0, 1.0], [math.nan, 5.0, 4.0], [math.nan, math.nan, math.nan]])
    numbers, lowest = best_crops(losses)
    assert numbers.tolist() == [1, 2, 0]
    assert lowest.tolist() == [1.0, 4.0, math.inf]


@pytest.mark.parametrize("least_share", [0.08, 0.5, 1.0])
def test_boxes_are_square_crops_within_the_image(least_share: float) -> None:
    """Crops have equal shares of both sides and at least the smallest area, and equal draws however many follow."""
    boxes = draw_boxes(200, 5, least_share, 3, 4)
    top, left, height, width = boxes.reshape(-1, 4).unbind(1)
    torch.testing.assert_close(height, width)
    assert float((height * width).min()) >= least_share - 1e-9
    assert float(torch.cat([top, left]).min()) >= 0
    assert float(torch.cat([top + height, left + width]).max()) <= 1 + 1e-9
    assert torch.equal(draw_boxes(7, 5, least_share, 3, 4), boxes[:7])
    assert not torch.equal(draw_boxes(7, 5, 0.08, 3, 5), draw_boxes(7, 5, 0.08, 3, 4))


def test_a_crop_of_whole_pixels_is_that_part_of_the_image_enlarged() -> None:
    """A quarter of the image is enlarged as torch resizes it, away from the crop's border."""
    images = torch.from_numpy(normal(2, 3, 8, 8))
    box = torch.tensor([[0.25, 0.5, 0.5, 0.5]], dtype=torch.float64).expand(2, -1)
    expected = interpolate(images[:, :, 2:6, 4:8], (8, 8), mode="bilinear", align_corners=False)
    cropped = crop_for_tile(images, box, 1)
    torch.testing.assert_close(cropped[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1])
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], dtype=torch.float64).expand(2, -1)
    torch.testing.assert_close(crop_for_tile(images, whole, 1), images)
    assert crop_for_tile(images, whole, 2).shape == (2, 3, 4, 4)
    ones = torch.ones(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(crop_for_tile(ones, box, 2), ones[:, :, :4, :4])


def test_tiles_lie_side_by_side_and_quality_is_spread_over_the_images() -> None:
    """Image i has crops i, n + i, 2n + i and 3n + i as its quarters; a teacher sees a crop between zeros."""
    crops = torch.arange(12.0).view(12, 1, 1, 1).expand(-1, 2, 3, 4)
    images = tiled(crops, 2)
    assert images.shape == (3, 2, 6, 8)
    for number, image in enumerate(images):
        corners = (image[:, :3, :4], image[:, :3, 4:], image[:, 3:, :4], image[:, 3:, 4:])
        assert [corner.unique().tolist() for corner in corners] == [[float(k * 3 + number)] for k in range(4)]
    assert torch.equal(tiled(crops, 1), crops)
    seen = padded(crops + 1, 6, 8)
    assert seen.shape == (12, 2, 6, 8)
    assert torch.equal(seen[:, :, 1:4, 2:6], crops + 1)
    assert float(seen.sum()) == float((crops + 1).sum())
