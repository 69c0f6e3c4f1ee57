"""Tests reading images at other places: with sums in a fixed order, the images are equal and the gradients agree."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from datm_ray.core.images.augment import Augmentation, augment, draw_augmentation, parse_strategy
from datm_ray.core.randomness import Purpose, generator
from datm_ray.runtime.devices import restoring_determinism

OPERATIONS = parse_strategy("color_crop_cutout_flip_scale_rotate_resized_resized+flip_crop+resized+color_scale+rotate")
ENDS = np.array([0.0, 1 - 2**-24], np.float32)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restoring_determinism():
        yield


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


@pytest.mark.parametrize("operation", ["scale", "rotate", "resized+flip"])
def test_the_gradient_in_a_fixed_order_equals_finite_differences(operation: str) -> None:
    """With deterministic algorithms gradients, and derivatives of gradients, equal finite differences."""
    torch.use_deterministic_algorithms(True)
    drawn = draw_augmentation(operation, 3, generator(1, Purpose.STUDENT_AUGMENTATION, 0, 0))
    images = torch.randn(3, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x: augment(x, drawn), (images.requires_grad_(),))
    assert torch.autograd.gradgradcheck(lambda x: augment(x, drawn), (images,))
