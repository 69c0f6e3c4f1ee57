"""Tests every operation against the published formula, written out pixel by pixel for one image."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision
from numpy.typing import NDArray

from datm_ray.config import PUBLISHED_AUGMENTATION
from datm_ray.core.images.augment import (
    LARGEST_RATIO,
    LEAST_SHARE,
    Augmentation,
    augment,
    augment_batches,
    crop_boxes,
    draw_augmentation,
    fitting_box,
    parse_strategy,
    resized_crop,
    width,
)
from datm_ray.core.randomness import Purpose, generator
from datm_ray.errors import ConfigError

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
COMPOSED = ("resized", "resized+flip", "crop+resized+color")
ALMOST_ONE = np.float32(1 - 2**-24)
Image = NDArray[np.float64]


def published(operation: str, image: Image, u: NDArray[np.float64]) -> Image:
    """The published formula for one image [c h w] and its numbers u [3] in [0, 1)."""
    height, width = image.shape[1:]
    if operation == "color":
        image = image + (u[0] - 0.5) * 1.0
        grey = image.mean(axis=0, keepdims=True)
        image = (image - grey) * (u[1] * 2.0) + grey
        return (image - image.mean()) * (u[2] + 0.5) + image.mean()
    if operation == "crop":
        reach_y, reach_x = int(height * 0.125 + 0.5), int(width * 0.125 + 0.5)
        return cropped(image, int(u[0] * (2 * reach_y + 1)) - reach_y, int(u[1] * (2 * reach_x + 1)) - reach_x)
    if operation == "cutout":
        cut_y, cut_x = int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
        offset_y, offset_x = int(u[0] * (height + 1 - cut_y % 2)), int(u[1] * (width + 1 - cut_x % 2))
        return with_hole(image, (offset_y, offset_x), (cut_y, cut_x))
    if operation == "flip":
        return image[:, :, ::-1] if u[0] < 0.5 else image
    if operation == "scale":
        along_x, along_y = u[:2] * (1.2 - 1 / 1.2) + 1 / 1.2
        return resampled(image, np.array([[along_x, 0], [0, along_y]]))
    angle = (u[0] - 0.5) * 2 * 15.0 / 180 * math.pi
    cos, sin = math.cos(angle), math.sin(angle)
    return resampled(image, np.array([[cos, -sin], [sin, cos]]))


def cropped(image: Image, shift_y: int, shift_x: int) -> Image:
    """An image padded by one zero, then read at indices clamped into the padded image."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    result = np.empty_like(image)
    for y, x in np.ndindex(image.shape[1:]):
        from_y = min(max(y + shift_y + 1, 0), image.shape[1] + 1)
        from_x = min(max(x + shift_x + 1, 0), image.shape[2] + 1)
        result[:, y, x] = padded[:, from_y, from_x]
    return result


def with_hole(image: Image, offset: tuple[int, int], cut: tuple[int, int]) -> Image:
    """An image with the pixels of a square blanked; its indices are clamped to the image."""
    result = image.copy()
    for y, x in np.ndindex(cut):
        blank_y = min(max(y + offset[0] - cut[0] // 2, 0), image.shape[1] - 1)
        blank_x = min(max(x + offset[1] - cut[1] // 2, 0), image.shape[2] - 1)
        result[:, blank_y, blank_x] = 0
    return result


def resampled(image: Image, matrix: NDArray[np.float64]) -> Image:
    """Bilinear reading at matrix @ (x, y), coordinates -1 and 1 being the centres of the outermost pixels."""
    channels, height, width = image.shape
    result = np.zeros_like(image)
    for y, x in np.ndindex(height, width):
        at_x, at_y = matrix @ np.array([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1])
        at_x, at_y = (at_x + 1) / 2 * (width - 1), (at_y + 1) / 2 * (height - 1)
        left, top = math.floor(at_x), math.floor(at_y)
        for near_y, weight_y in ((top, top + 1 - at_y), (top + 1, at_y - top)):
            for near_x, weight_x in ((left, left + 1 - at_x), (left + 1, at_x - left)):
                if 0 <= near_y < height and 0 <= near_x < width:
                    result[:, y, x] += weight_y * weight_x * image[:, near_y, near_x]
    assert result.shape[0] == channels
    return result


def apply(operation: str, images: NDArray[np.float64], parameters: NDArray[np.float32]) -> NDArray[np.float64]:
    return augment(torch.from_numpy(images), Augmentation(operation, parameters)).numpy()


@pytest.mark.parametrize("size", [(8, 8), (7, 11), (16, 5)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_is_the_published_formula(operation: str, channels: int, size: tuple[int, int]) -> None:
    """Each operation equals its formula, also at the ends of the ranges and for height unlike width."""
    draw = np.random.default_rng(0)
    ends = np.array([[0, 0, 0], [ALMOST_ONE] * 3, [0, ALMOST_ONE, 0.5], [0.5, 0.5, 0.5]], np.float32)
    parameters = np.concatenate([ends, draw.random((12, 3), np.float32)])
    images = draw.normal(size=(len(parameters), channels, *size))
    expected = [published(operation, image, u.astype(np.float64)) for image, u in zip(images, parameters, strict=True)]
    np.testing.assert_allclose(apply(operation, images, parameters), np.stack(expected), atol=1e-12)


@pytest.mark.parametrize("side", [8, 28, 32, 64])
def test_crop_reaches_every_shift_and_no_other(side: int) -> None:
    """Crop maps numbers in [0, 1) evenly to the whole shifts -reach..reach; reach is an eighth of the side."""
    reach = int(side * 0.125 + 0.5)
    count = 2 * reach + 1
    u = np.linspace(0, 1, 64 * count, endpoint=False, dtype=np.float32)
    u[-1] = ALMOST_ONE
    rows = np.tile(np.arange(1.0, side + 1)[None, None, :, None], (len(u), 1, 1, side))
    moved = apply("crop", rows, np.stack([u, np.full_like(u, 0.5), u], axis=1))
    shifts = Counter((moved[:, 0, side // 2, side // 2] - (side // 2 + 1)).astype(int).tolist())
    assert shifts == dict.fromkeys(range(-reach, reach + 1), 64)


@pytest.mark.parametrize("side", [7, 8, 9, 32])
def test_cutout_blanks_what_the_published_clamped_mask_blanks(side: int) -> None:
    """Cutout equals the published mask at every offset, also where the border cuts the square."""
    cut = int(side * 0.5 + 0.5)
    offsets = np.arange(side + 1 - cut % 2)
    parameters = np.zeros((len(offsets), 3), np.float32)
    parameters[:, 0] = parameters[:, 1] = (offsets + 0.5) / len(offsets)
    ours = apply("cutout", np.ones((len(offsets), 1, side, side)), parameters)
    expected = [with_hole(np.ones((1, side, side)), (offset, offset), (cut, cut)) for offset in offsets.tolist()]
    assert np.array_equal(ours, np.stack(expected))
    heights = set((ours == 0).any(axis=3).sum(axis=2)[:, 0].tolist())
    assert max(heights) == cut
    assert min(heights) == cut - cut // 2


def test_flip_has_probability_one_half() -> None:
    """Flip mirrors images whose number is below 0.5 and leaves the others alone."""
    images = np.arange(6.0).reshape(1, 1, 2, 3).repeat(4, axis=0)
    u = np.array([0, np.nextafter(np.float32(0.5), np.float32(0)), 0.5, ALMOST_ONE], np.float32)
    flipped = apply("flip", images, np.stack([u, u, u], axis=1))
    assert np.array_equal(flipped, np.concatenate([images[:2, :, :, ::-1], images[2:]]))


@pytest.mark.parametrize("operation", [*OPERATIONS, *COMPOSED])
def test_gradient_equals_finitedifferences(operation: str) -> None:
    """The gradient through every operation equals finite differences."""
    images = torch.randn(3, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = draw_augmentation(operation, 3, generator(1, Purpose.STUDENT_AUGMENTATION))
    assert torch.autograd.gradcheck(lambda x: augment(x, drawn), (images.requires_grad_(),))


def test_one_operation_is_drawn_per_batch_and_parameters_per_sample() -> None:
    """Operations are drawn equally often per batch; each sample has numbers of its own."""
    drawn = [
        draw_augmentation(PUBLISHED_AUGMENTATION, 5, generator(0, Purpose.STUDENT_AUGMENTATION, k)) for k in range(1200)
    ]
    assert {one.parameters.shape for one in drawn} == {(5, 3)}
    assert len(np.unique(np.concatenate([one.parameters for one in drawn[:50]]))) == 50 * 15
    counts = Counter(one.operation for one in drawn)
    assert sorted(counts) == sorted(OPERATIONS)
    assert max(abs(count - 200) for count in counts.values()) < 60  # 4.6 standard deviations


def test_published_strategy_has_the_six_operations() -> None:
    """The published strategy lists its six operations in the published order, on which draws depend."""
    assert parse_strategy(PUBLISHED_AUGMENTATION) == tuple(OPERATIONS)


def test_empty_strategy_leaves_images_alone() -> None:
    """The empty strategy returns the images unchanged and draws no number."""
    draw = generator(0, Purpose.STUDENT_AUGMENTATION)
    drawn = draw_augmentation("", 2, draw)
    images = torch.randn(2, 1, 4, 4)
    assert augment(images, drawn) is images
    assert augment(images[:1], drawn.take(np.array([1]))).shape == (1, 1, 4, 4)
    assert draw.random() == generator(0, Purpose.STUDENT_AUGMENTATION).random()


@pytest.mark.parametrize("operation", COMPOSED)
def test_a_composed_operation_is_its_parts_in_turn(operation: str) -> None:
    """Every sample gets each part with the part's own columns, and a slice of a batch the same numbers."""
    images = torch.randn(5, 3, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = draw_augmentation(operation, 5, generator(1, Purpose.TRAINING_AUGMENTATION, 0, 0))
    assert drawn.operation == operation
    expected, first = images, 0
    for part in operation.split("+"):
        columns = 4 if part == "resized" else 3
        expected = augment(expected, Augmentation(part, drawn.parameters[:, first : first + columns].copy()))
        first += columns
    assert first == width(operation) == drawn.parameters.shape[1]
    assert torch.equal(augment(images, drawn), expected)
    rows = np.array([3, 1])
    assert torch.equal(augment(images[rows], drawn.take(rows)), expected[rows])
    numbers = torch.from_numpy(drawn.parameters).double()
    if operation == "resized":
        assert torch.equal(expected, resized_crop(images, crop_boxes(numbers)))


def test_composed_operations_are_drawn_beside_single_ones() -> None:
    """Between underscores a composed operation counts as one, and single ones keep the numbers that they had."""
    strategy = "crop+flip_color_flip"
    assert parse_strategy(strategy) == ("crop+flip", "color", "flip")
    drawn = [draw_augmentation(strategy, 4, generator(0, Purpose.STUDENT_AUGMENTATION, k)) for k in range(60)]
    assert {one.operation: one.parameters.shape for one in drawn} == {
        "crop+flip": (4, 6),
        "color": (4, 3),
        "flip": (4, 3),
    }
    for k, one in enumerate(drawn):
        random = generator(0, Purpose.STUDENT_AUGMENTATION, k)
        random.integers(3)
        assert np.array_equal(one.parameters, random.random(one.parameters.shape, np.float32))


def test_batches_of_unlike_operations_are_augmented_as_each_alone() -> None:
    """One call for all batches of an operation gives each batch what it gets alone, whatever the columns."""
    images = [torch.randn(3 + number % 2, 2, 6, 6) for number in range(6)]
    names = ["resized+flip", "", "crop", "resized", "resized+flip", "crop"]
    pairs = zip(images, names, strict=True)
    drawn = [draw_augmentation(name, len(x), generator(2, Purpose.TRAINING_AUGMENTATION, 0, 0)) for x, name in pairs]
    for value, x, one in zip(augment_batches(images, drawn), images, drawn, strict=True):
        assert torch.equal(value, augment(x, one))


@pytest.mark.parametrize("strategy", ["blur", "crop_blur", "Crop", "crop+blur", "crop+"])
def test_an_unknown_operation_is_refused_with_the_known_ones(strategy: str) -> None:
    """An unknown operation is an error that lists the known ones, before any image changes."""
    with pytest.raises(ConfigError, match=r"not an operation.*color, crop, cutout, flip, scale, rotate, resized"):
        draw_augmentation(strategy, 1, generator(0, Purpose.STUDENT_AUGMENTATION))


@pytest.mark.parametrize("box", [(4, 8, 16, 12), (0, 0, 24, 32), (15, 20, 9, 11)])
def test_a_resized_crop_equals_torchvisions_inside_the_box(box: tuple[int, int, int, int]) -> None:
    """At the box's border torchvision repeats its pixels, and this crop blends in those beside it."""
    images = torch.from_numpy(np.random.default_rng(0).random((2, 3, 24, 32)))
    top, left, height, width = box
    shares = torch.tensor([[top / 24, left / 32, height / 24, width / 32]] * 2, dtype=torch.float64)
    theirs = torchvision.transforms.functional.resized_crop(images, *box, [24, 32], antialias=False)
    inner = (..., slice(24 // height, -(24 // height)), slice(32 // width, -(32 // width)))
    torch.testing.assert_close(resized_crop(images, shares)[inner], theirs[inner], rtol=0, atol=1e-12)


def test_boxes_of_resized_crops_lie_in_the_image_and_keep_the_least_share() -> None:
    """Sides cut to the image's make the area smaller, by no more than the largest ratio."""
    for least in (LEAST_SHARE, 0.5, 1.0):
        boxes = crop_boxes(torch.from_numpy(np.random.default_rng(1).random((2000, 4))), least)
        top, left, height, width = boxes.unbind(1)
        assert boxes.min() >= 0
        assert max(float((top + height).max()), float((left + width).max())) <= 1
        assert float((height * width).min()) >= least / LARGEST_RATIO
        assert float((height * width).median()) == pytest.approx((1 + least) / 2, abs=0.15)
        whole = (height < 1) & (width < 1)
        ratio = (width / height)[whole].log().abs()
        assert not len(ratio) or float(ratio.max()) <= math.log(LARGEST_RATIO) + 1e-9


@pytest.mark.parametrize("least", [LEAST_SHARE, 0.9, 0.98, 1.0])
def test_boxes_that_fit_are_those_of_torchvision(least: float) -> None:
    """Like torchvision's crops, boxes are the whole image as often, and otherwise have the same mean sides."""
    random, image = np.random.default_rng(1), torch.empty(1, 1, 1).expand(1, 10**4, 10**4)
    ours = torch.stack([fitting_box(torch.from_numpy(random.random((10, 4))), least) for _ in range(3000)])
    torch.manual_seed(1)
    ratio = [1 / LARGEST_RATIO, LARGEST_RATIO]
    draw = torchvision.transforms.RandomResizedCrop.get_params
    theirs = torch.tensor([draw(image, [least, 1.0], ratio) for _ in range(3000)]) / 10**4
    is_whole = [float((each[:, 2:] == 1).all(dim=1).double().mean()) for each in (ours, theirs)]
    assert is_whole[0] == pytest.approx(is_whole[1], abs=0.03)
    assert is_whole[0] == 1 or least < 1
    for found, expected in zip(ours.mean(dim=0), theirs.mean(dim=0), strict=True):
        assert float(found) == pytest.approx(float(expected), abs=0.02)
    assert float((ours[:, 0] + ours[:, 2]).max()) <= 1
    assert float((ours[:, 2] * ours[:, 3]).min()) >= least - 1e-9  # nothing is cut
