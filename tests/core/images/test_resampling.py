"""Tests reading images at other places: with sums in a fixed order, the images are equal and the gradients agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import affine_grid

from datm_ray.core.images.augment import Augmentation, augment, draw_augmentation, parse_strategy
from datm_ray.core.images.resampling import _grid
from datm_ray.core.randomness import Purpose, generator

OPERATIONS = parse_strategy("color_crop_cutout_flip_scale_rotate_resized_resized+flip_crop+resized+color_scale+rotate")
ENDS = np.array([0.0, 1 - 2**-24], np.float32)


def augmented(operation: str, dtype: torch.dtype, size: tuple[int, int], *, in_order: bool) -> tuple[Tensor, Tensor]:
    """Images after an operation, some with parameters at the ends of their range, and the gradient in them."""
    torch.use_deterministic_algorithms(in_order)
    drawn = draw_augmentation(operation, 9, generator(5, Purpose.STUDENT_AUGMENTATION, 0, 0))
    drawn.parameters[:4] = ENDS[[[0], [1], [0], [1]]]
    drawn.parameters[2:4, 1:] = ENDS[[[1], [0]]]
    draw = torch.Generator().manual_seed(0)
    images, along = (torch.randn(9, 3, *size, generator=draw, dtype=torch.float64).to(dtype) for _ in range(2))
    found = augment(images.requires_grad_(), Augmentation(operation, drawn.parameters))
    return found.detach(), torch.autograd.grad(found, images, along)[0]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (7, 12), (32, 32)], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_sums_in_a_fixed_order_change_no_image_and_round_the_gradient(
    operation: str, size: tuple[int, int], dtype: torch.dtype, limit: float
) -> None:
    """With deterministic algorithms every operation gives equal images, and gradients equal within rounding."""
    images, gradient = augmented(operation, dtype, size, in_order=True)
    usual, of_usual = augmented(operation, dtype, size, in_order=False)
    assert torch.equal(images, usual)
    torch.testing.assert_close(gradient, of_usual, rtol=limit, atol=limit)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_more_images_than_a_call_takes_are_sampled_in_several(
    operation: str, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images and gradients keep their bits."""
    usual = augmented(operation, torch.float32, (8, 8), in_order=in_order)
    monkeypatch.setattr("datm_ray.core.images.resampling.MOST_SAMPLED", 4)
    for found, expected in zip(augmented(operation, torch.float32, (8, 8), in_order=in_order), usual, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("operation", ["scale", "rotate", "resized+flip"])
def test_the_gradient_in_a_fixed_order_equals_finite_differences(operation: str) -> None:
    """With deterministic algorithms gradients, and derivatives of gradients, equal finite differences."""
    torch.use_deterministic_algorithms(True)
    drawn = draw_augmentation(operation, 3, generator(1, Purpose.STUDENT_AUGMENTATION, 0, 0))
    images = torch.randn(3, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: augment(x, drawn), (images.requires_grad_(),))
    assert torch.autograd.gradgradcheck(lambda x: augment(x, drawn), (images,))


@pytest.mark.filterwarnings("ignore:Since version 1.3.0")  # of torch, about a side of one pixel
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (7, 12), (32, 32), (1, 5), (64, 64), (224, 224)], ids=str)
def test_places_round_no_more_than_torchs(size: tuple[int, int], align_corners: bool) -> None:
    """Places in float32 are off by no more than those of torch's `affine_grid`; in float64 the two agree.

    The largest difference may also be the distance of float32 numbers above 1: where the library's products round once,
    as on CPUs with AMX, `affine_grid` comes closer than that.
    """
    angle = torch.linspace(-0.3, 0.3, 41, dtype=torch.float64)
    factors, cos, sin = 1 + angle, angle.cos(), angle.sin()
    for rows in (
        [[factors, 0 * sin, sin], [0 * sin, factors.flip(0), -sin]],
        [[cos, -sin, 0 * sin], [sin, cos, 0 * sin]],
    ):
        matrix = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1).float()
        exact = _grid(matrix.double(), *size, align_corners=align_corners)
        theirs = affine_grid(matrix.double(), [41, 1, *size], align_corners=align_corners)
        torch.testing.assert_close(exact, theirs, rtol=0, atol=1e-14)
        ours = (_grid(matrix, *size, align_corners=align_corners) - exact).abs()
        torchs = (affine_grid(matrix, [41, 1, *size], align_corners=align_corners) - exact).abs()
        assert ours.max() <= max(1.2 * torchs.max().item(), torch.finfo(torch.float32).eps)
        assert ours.mean() <= 1.2 * torchs.mean()
