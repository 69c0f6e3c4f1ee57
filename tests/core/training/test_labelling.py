"""Tests the views that a teacher labels, the teacher's logits for them, and how logits are packed."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datm_ray.core.images.augment import resized_crop
from datm_ray.core.training.labelling import (
    Views,
    apply_views,
    draw_views,
    images_fingerprint,
    pack_logits,
    teacher_logits,
    unpack_logits,
)

SIZE = (12, 10)


def images_of(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def values(views: Views) -> list[bytes]:
    return [getattr(views, each.name).tobytes() for each in fields(views)]


def slow_view(images: Tensor, views: Views, place: int) -> Tensor:
    """One view, made by itself."""

    def shown(row: int) -> Tensor:
        crop = resized_crop(images[row : row + 1], torch.from_numpy(views.boxes[place : place + 1]))[0]
        return crop.flip(2) if views.flips[place] else crop

    view = shown(int(views.rows[place])).clone()
    top, left, height, width = map(int, views.mix_boxes[place])
    inside = (slice(None), slice(top, top + height), slice(left, left + width))
    view[inside] = shown(int(views.partners[place]))[inside]
    return view


def test_views_depend_on_seed_and_epoch_alone() -> None:
    """Equal arguments give equal views; another seed or epoch gives others in every respect."""
    drawn = draw_views(3, 5, 40, SIZE)
    assert values(draw_views(3, 5, 40, SIZE)) == values(drawn)
    for other in (draw_views(4, 5, 40, SIZE), draw_views(3, 6, 40, SIZE)):
        assert all(one != two for one, two in zip(values(other)[1:], values(drawn)[1:], strict=True))
    part = drawn.take(np.array([7, 3]))
    assert (len(part), part.rows.tolist()) == (2, [7, 3])
    assert np.array_equal(part.boxes, drawn.boxes[[7, 3]])


def test_views_are_drawn_from_their_distributions() -> None:
    """Half of the views are mirrored, no image is its own partner, and shares are those of the boxes."""
    count = 4000
    drawn = draw_views(0, 0, count, SIZE)
    assert abs(drawn.flips.mean() - 0.5) < 0.04  # 5 standard deviations
    assert not (drawn.partners == drawn.rows).any()
    assert len(np.unique(drawn.partners)) > 0.6 * count  # 0.632 of a random map's
    few = [draw_views(0, epoch, 3, SIZE).partners.tolist() for epoch in range(50)]
    assert {(row, partner) for partners in few for row, partner in enumerate(partners)} == {
        (row, partner) for row in range(3) for partner in range(3) if row != partner
    }
    areas = drawn.mix_boxes[:, 2:].astype(float).prod(axis=1) / (SIZE[0] * SIZE[1])
    np.testing.assert_allclose(drawn.lambdas, 1 - areas, atol=1e-7)
    assert (drawn.mix_boxes[:, :2].astype(int) + drawn.mix_boxes[:, 2:] <= SIZE).all()
    assert 0.02 < (drawn.lambdas == 1).mean() < 0.1  # boxes of less than two pixels
    assert drawn.lambdas.min() == pytest.approx(1 - 80 / 120)  # published boxes have even sides below 12 and 10
    assert drawn.boxes.min() >= 0
    assert drawn.boxes.max() <= 1
    alone = draw_views(0, 0, 1, SIZE)
    assert alone.partners.tolist() == [0]


def test_whole_images_without_partners_are_shown_as_they_are() -> None:
    """Views that keep everything and mix nothing are the images, or their mirror images."""
    images = images_of(20)
    views = draw_views(0, 1, 20, SIZE, least_share=1.0, mix=0.0)
    views = Views(**{**vars(views), "boxes": np.tile(np.float32([0, 0, 1, 1]), (20, 1))})
    expected = torch.where(torch.from_numpy(views.flips)[:, None, None, None], images.flip(3), images)
    torch.testing.assert_close(apply_views(images, views), expected, rtol=0, atol=1e-5)
    assert (views.lambdas == 1).all()


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_views_made_together_equal_views_made_one_by_one(mix: float) -> None:
    """A view has the same bits alone, in any batch, and in any order."""
    images, views = images_of(33), draw_views(1, 2, 33, SIZE, mix=mix)
    together = apply_views(images, views)
    assert torch.equal(together, torch.stack([slow_view(images, views, place) for place in range(33)]))
    for size in (1, 4, 32):
        parts = [apply_views(images, views.take(slice(first, first + size))) for first in range(0, 33, size)]
        assert torch.equal(torch.cat(parts), together)
    order = np.random.default_rng(0).permutation(33)
    assert torch.equal(apply_views(images, views.take(order)), together[torch.from_numpy(order)])


def test_the_teacher_labels_views_in_evaluation_mode() -> None:
    """Logits are those of the views by the network in evaluation mode, whose mode and statistics stay."""
    images, views = images_of(10), draw_views(0, 0, 10, SIZE)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(320, 5))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    calls: list[int] = []
    network.register_forward_hook(lambda *_: calls.append(1))
    found = teacher_logits(network, images, views, 4)
    assert len(calls) == 3
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not found.requires_grad
    torch.testing.assert_close(found, network.eval()(apply_views(images, views)))


def teacher_like(classes: int, count: int = 500) -> Tensor:
    """Logits with the spread of a trained network's: a few large ones over a normal rest."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(count, classes, generator=draw) * 1.5
    logits[torch.arange(count), torch.randint(classes, (count,), generator=draw)] += 8
    return logits


def difference(one: Tensor, other: Tensor, temperature: float) -> float:
    """Mean total variation distance of softmaxes, in [0, 1]."""
    shares = [(each / temperature).softmax(dim=1) for each in (one, other)]
    return float((shares[0] - shares[1]).abs().sum(dim=1).mean() / 2)


def test_all_logits_are_packed_to_half_precision() -> None:
    """Without a number of classes to keep, logits change by rounding to float16 alone."""
    logits = teacher_like(20)
    packed, indices = pack_logits(logits, None)
    assert (packed.dtype, indices.shape) == (np.float16, (500, 0))
    assert torch.equal(unpack_logits(packed, indices, 20), logits.half().float())


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_kept_classes_have_their_probabilities_and_others_an_even_share(temperature: float) -> None:
    """The largest classes keep their probabilities at the chosen temperature; the rest is spread evenly."""
    logits = teacher_like(200)
    packed, indices = pack_logits(logits, 10, temperature)
    assert (packed.shape, indices.shape, indices.dtype) == ((500, 11), (500, 10), np.uint16)
    kept = torch.from_numpy(indices.astype(np.int64))
    assert torch.equal(kept, logits.topk(10).indices)
    found = unpack_logits(packed, indices, 200)
    truth, shares = ((each / temperature).softmax(dim=1) for each in (logits, found))
    torch.testing.assert_close(shares.gather(1, kept), truth.gather(1, kept), rtol=0.01, atol=1e-6)
    rest = shares.scatter(1, kept, torch.nan)
    assert all(len(row[~row.isnan()].unique()) == 1 for row in rest)
    torch.testing.assert_close(rest.nansum(dim=1), 1 - truth.gather(1, kept).sum(dim=1), rtol=0.01, atol=1e-3)


def test_the_error_of_kept_classes_is_that_of_the_rest() -> None:
    """Probabilities move by no more than the rest has, and less if more classes are kept."""
    logits = teacher_like(200)
    for temperature in (1.0, 20.0):
        errors = []
        for top in (5, 20, 100, 199):
            found = unpack_logits(*pack_logits(logits, top, temperature), 200)
            outside = 1 - (logits / temperature).softmax(dim=1).topk(top).values.sum(dim=1).mean()
            errors.append(difference(found, logits, temperature))
            assert errors[-1] <= float(outside) + 0.001
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.001
    at_one, at_twenty = (unpack_logits(*pack_logits(logits, 20, each), 200) for each in (1.0, 20.0))
    assert difference(at_one, logits, 1.0) <= difference(at_twenty, logits, 1.0) + 1e-6
    assert difference(at_twenty, logits, 20.0) < difference(at_one, logits, 20.0)


@pytest.mark.parametrize("top", [0, 5, 6])
def test_an_impossible_number_of_classes_is_refused(top: int) -> None:
    """The number of kept classes lies between one and all but one."""
    with pytest.raises(ValueError, match="cannot be kept"):
        pack_logits(torch.zeros(2, 5), top)


def test_a_fingerprint_tells_images_apart() -> None:
    """A fingerprint depends on every value and on the shape, not on layout or gradient."""
    images = images_of(4)
    same = images.clone().to(memory_format=torch.channels_last).requires_grad_()
    assert images_fingerprint(same) == images_fingerprint(images)
    changed = images.clone()
    changed[3, 2, 11, 9] += 1e-6
    assert len({images_fingerprint(each) for each in (images, changed, images[:3], images.view(4, 3, 10, 12))}) == 4
