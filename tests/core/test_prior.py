"""Tests priors: gradients through a decoder against one graph and finite differences, and training."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from datm_ray.config import PriorConfig
from datm_ray.core.networks.image_cost import image_cost
from datm_ray.core.networks.parameters import flatten, unflatten_into
from datm_ray.core.prior import (
    AutoencoderState,
    Prior,
    build_autoencoder,
    build_decoder,
    draw_latents,
    latent_shape,
    micro_batch,
    train_autoencoder,
)
from datm_ray.core.steps import Work, result_of
from datm_ray.errors import ConfigError

SMALL = PriorConfig(channels=3, width=5, halvings=2, epochs=4, batch_size=8)
IMAGE = (2, 7, 5)
"""Sides that are not divisible by 4, so that maps are cut."""


class Scaled(nn.Module):
    """A normalisation that is not the identity."""

    def forward(self, images: Tensor) -> Tensor:
        return 3 * images - 1


def prior_of(chunk: int = 100, settings: PriorConfig = SMALL) -> Prior:
    return Prior.of(build_decoder(settings, IMAGE, seed=1).double(), Scaled(), chunk)


def latents_of(count: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(draw_latents((count, 3, 2, 2), seed)).double()


def loss_of(images: Tensor) -> Tensor:
    """A loss that couples the images."""
    return (images.sin().sum(dim=0) ** 2).sum() + images.pow(3).mean()


def gradient_in(images: Tensor) -> Tensor:
    raw = images.clone().requires_grad_()
    return torch.autograd.grad(loss_of(raw), raw)[0]


@pytest.mark.parametrize("chunk", [1, 2, 5, 6])
def test_pulled_back_gradient_equals_that_of_one_graph(chunk: int) -> None:
    """A gradient in images, pulled back in micro-batches, is the gradient through decoder and loss in one graph."""
    prior, latents = prior_of(chunk), latents_of(5).requires_grad_()
    images = prior.network(latents)
    assert images.shape == (5, *IMAGE)
    torch.testing.assert_close(prior.render(latents.detach()), images.detach(), rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(loss_of(images), latents)
    ours = prior.pull_back(latents.detach(), gradient_in(images.detach()))
    assert float((ours - expected).norm() / expected.norm()) < 1e-12


def test_gradients_equal_finite_differences() -> None:
    """Pulled-back gradients and pushed directions equal central differences of the loss and of the images."""
    prior, latents, direction = prior_of(2), latents_of(3), latents_of(3, seed=1)
    ahead, behind = (prior.render(latents + sign * 1e-5 * direction) for sign in (1, -1))
    ours = prior.pull_back(latents, gradient_in(prior.render(latents)))
    assert float((ours * direction).sum()) == pytest.approx(float(loss_of(ahead) - loss_of(behind)) / 2e-5, rel=1e-6)
    torch.testing.assert_close(prior.push_forward(latents, direction), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-7)


def test_images_depend_on_their_own_latents_alone() -> None:
    """An image and its inversion do not depend on the other images of a batch, so shards make the same images."""
    prior, latents = prior_of(), latents_of(4)
    images = prior.render(latents_of(4, seed=2))
    alone = torch.cat([result_of(prior.invert(images[k : k + 1], latents[k : k + 1], 5)) for k in range(4)])
    torch.testing.assert_close(result_of(prior.invert(images, latents, 5)), alone, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(prior.render(latents)[2:3], prior.render(latents[2:3]), rtol=1e-12, atol=1e-12)


def test_an_inversion_comes_near_the_images() -> None:
    """An inversion of 200 steps leaves a small part of the squared error, and pauses after each step."""
    prior = prior_of(3)
    images, start = prior.render(latents_of(4, seed=2)), latents_of(4)
    inversion = Work(prior.invert(images, start, 200))
    assert len(list(inversion)) == 2 * 200
    before, after = ((prior.render(each) - images).square().sum() for each in (start, inversion.result))
    assert float(after / before) < 0.05


def train(epochs: int, state: AutoencoderState, network: Any) -> list[float]:
    """Train up to a number of epochs of `SMALL`'s schedule."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.rand(20, 1, *IMAGE[1:], generator=draw).repeat(1, 2, 1, 1)

    def rows(order: NDArray[np.int64]) -> Tensor:
        return pixels[torch.from_numpy(order)]

    errors = []
    for error in train_autoencoder(network, rows, len(pixels), SMALL, 3, state):
        if error is None:
            continue
        errors.append(error)
        if state.epoch == epochs:
            break
    return errors


def test_training_resumes_at_any_epoch_with_the_same_bits() -> None:
    """An autoencoder that is trained in two parts has the bits of one that is trained at once, and a smaller error."""
    network = build_autoencoder(SMALL, IMAGE, seed=3)
    whole, parts = AutoencoderState.initial(network), AutoencoderState.initial(network)
    errors = train(4, whole, network)
    assert errors[-1] < errors[0]
    train(2, parts, network)
    copied = AutoencoderState(parts.parameters.clone(), parts.first.clone(), parts.second.clone(), parts.epoch)
    train(4, copied, network)
    for field in dataclasses.fields(AutoencoderState):
        assert np.array_equal(getattr(whole, field.name), getattr(copied, field.name))


def test_training_equals_torchs_adam() -> None:
    """A step of the training equals one of `torch.optim.Adam`."""
    network = build_autoencoder(SMALL, IMAGE, seed=3)
    state, settings = AutoencoderState.initial(network), SMALL.model_copy(update={"epochs": 1, "batch_size": 20})
    images = torch.rand(20, *IMAGE, generator=torch.Generator().manual_seed(1))
    list(train_autoencoder(network, lambda order: images[torch.from_numpy(order)], 20, settings, 3, state))
    optimizer = torch.optim.Adam(network.parameters(), settings.learning_rate)
    (network(images) - images).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(state.parameters, flatten(network), rtol=1e-4, atol=1e-5)


def test_an_untrained_decoder_is_the_trained_ones_start() -> None:
    """An untrained decoder has the first parameters of the trained one, and another seed gives others."""
    network = build_autoencoder(SMALL, IMAGE, seed=3)
    untrained = build_decoder(SMALL.model_copy(update={"kind": "untrained"}), IMAGE, seed=3)
    assert torch.equal(flatten(network.decoder), flatten(untrained))
    assert not torch.equal(flatten(untrained), flatten(build_decoder(SMALL, IMAGE, seed=4)))
    unflatten_into(untrained, torch.zeros(flatten(untrained).numel()))
    grey = untrained(torch.ones(1, *latent_shape(untrained)))
    assert bool((grey == 0.5).all())


def test_micro_batches_are_bounded_by_memory() -> None:
    """A micro-batch of larger decoders has fewer images, and at least one."""
    small, large = (
        micro_batch(image_cost(build_decoder(PriorConfig(width=width), (3, size, size), 0), (16, size // 4, size // 4)))
        for width, size in ((16, 32), (256, 256))
    )
    assert small > 100 > large >= 1


def broken(value: object) -> Any:
    return lambda image: value


class Wrong(nn.Linear):
    """A decoder that makes vectors."""

    latent_shape = (4,)


def test_a_users_decoder_is_drawn_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random parameters of a user's decoder depend on the seed alone, and the global generator stays as it was."""

    class Vector(nn.Linear):
        latent_shape = (4,)

        def forward(self, latents: Tensor) -> Tensor:
            return super().forward(latents).view(-1, *IMAGE)

    module = ModuleType("my_decoders")
    module.made = lambda image: Vector(4, 70)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_decoders", module)
    before = torch.random.get_rng_state()
    one, again, other = (build_decoder(PriorConfig(kind="my_decoders:made"), IMAGE, seed) for seed in (1, 1, 2))
    assert torch.equal(flatten(one), flatten(again))
    assert not torch.equal(flatten(one), flatten(other))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "returned str, which is no decoder"),
        (nn.Identity(), "returned Identity, which is no decoder.*latent_shape"),
        (Wrong(4, 5), r"makes images of \(5,\), and the data has \(2, 7, 5\)"),
    ],
)
def test_functions_that_return_no_decoder_are_refused(
    value: object, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A user's function must return a module that states its latents and makes images of the data's shape."""
    module = ModuleType("my_decoders")
    module.made = broken(value)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_decoders", module)
    with pytest.raises(ConfigError, match=message):
        build_decoder(PriorConfig(kind="my_decoders:made"), IMAGE, seed=0)
    with pytest.raises(ConfigError, match=r"prior\.kind 'my_decoders:absent' cannot be imported"):
        build_decoder(PriorConfig(kind="my_decoders:absent"), IMAGE, seed=0)
