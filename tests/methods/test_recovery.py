"""Recovery from a teacher: its loss and gradient against a plain float64 version, Adam, views, and rounds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from datm_ray.config import DistillConfig, NetworkSpec, RecoverConfig
from datm_ray.core.images.augment import resized_crop
from datm_ray.core.networks.registry import build_network
from datm_ray.core.synthetic import SyntheticSet, hard_logits
from datm_ray.errors import ConfigError, DivergenceError
from datm_ray.methods import recovery
from datm_ray.methods.recovery import Recovery, RecoveryLoss, View, draw_view
from datm_ray.methods.state import MOST_DIVERGED

BOUNDS = (torch.full((3, 1, 1), -2.0), torch.full((3, 1, 1), 2.0))


def teacher_network(seed: int = 0, architecture: str = "resnet18") -> nn.Module:
    """Small network in float64, whose running statistics are those of a few batches."""
    changes = {"depth": 2} if architecture == "convnet" else {}
    spec = NetworkSpec(
        architecture=architecture, width=8, norm="batch", channels=3, size=(16, 16), classes=4, **changes
    )
    network = build_network(spec, seed).double()
    network.train()
    with torch.no_grad():
        for seed in range(3):
            network(torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1)
    return network


def some_images() -> tuple[Tensor, Tensor]:
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return images, torch.arange(6) % 4


def plain_loss(network: nn.Module, images: Tensor, labels: Tensor, weight: float, first: float) -> Tensor:
    """Loss by the formula: the input of each batch normalisation, image by image and pixel by pixel."""
    seen: list[tuple[nn.BatchNorm2d, Tensor]] = []
    layers = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    handles = [layer.register_forward_hook(lambda part, given, _: seen.append((part, given[0]))) for layer in layers]
    network.eval()
    logits = network(images)
    for handle in handles:
        handle.remove()
    total = cross_entropy(logits, labels)
    for number, (layer, given) in enumerate(seen):
        values = given.transpose(0, 1).flatten(1)
        mean = values.sum(dim=1) / values.shape[1]
        variance = ((values - mean[:, None]) ** 2).sum(dim=1) / values.shape[1]
        assert layer.running_mean is not None
        assert layer.running_var is not None
        gap = ((mean - layer.running_mean) ** 2).sum().sqrt() + ((variance - layer.running_var) ** 2).sum().sqrt()
        total = total + weight * (first if number == 0 else 1.0) * gap
    return total


def test_loss_and_gradient_equal_the_plain_formula_and_finite_differences() -> None:
    """The loss of a teacher is that of the formula, in float64, and its gradient too."""
    network, (images, labels) = teacher_network(), some_images()
    options = RecoverConfig(statistics=0.3, first_layer=10.0)
    teacher, images = RecoveryLoss(network, options), images.requires_grad_()
    loss, statistics = teacher(images, labels)
    plain = plain_loss(network, images, labels, 0.3, 10.0)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    rest = (loss - cross_entropy(network(images), labels)).detach()
    torch.testing.assert_close(rest, 0.3 * statistics.detach(), rtol=1e-12, atol=0)
    (gradient,), (theirs,) = torch.autograd.grad(loss, images), torch.autograd.grad(plain, images)
    torch.testing.assert_close(gradient, theirs, rtol=1e-10, atol=1e-14)
    together = teacher.gradient(images.detach(), labels)
    torch.testing.assert_close(together, (gradient, loss.detach(), statistics.detach()), rtol=1e-12, atol=1e-15)
    along = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    step = 1e-6
    ahead, behind = (float(teacher(images.detach() + sign * step * along, labels)[0]) for sign in (1, -1))
    assert (ahead - behind) / (2 * step) == pytest.approx(float((gradient * along).sum()), rel=1e-6)


@pytest.mark.parametrize(("of", "counted"), [("teacher", [0]), ("auxiliaries", [1, 2]), ("all", [0, 1, 2])])
def test_statistics_may_be_of_other_networks(of: str, counted: list[int]) -> None:
    """The teacher alone classifies; the gap and its gradient are the mean over the networks that are asked for."""
    networks, (images, labels) = [teacher_network(0), teacher_network(1), teacher_network(2, "convnet")], some_images()
    options = RecoverConfig.model_validate({"statistics": 0.3, "first_layer": 10.0, "statistics_of": of})
    images = images.requires_grad_()
    loss = RecoveryLoss(networks[0], options, networks[1:])
    classified = cross_entropy(networks[0].eval()(images), labels)
    gaps = [
        plain_loss(networks[each], images, labels, 1.0, 10.0) - cross_entropy(networks[each].eval()(images), labels)
        for each in counted
    ]
    plain = classified + 0.3 * torch.stack(gaps).mean()
    (theirs,) = torch.autograd.grad(plain, images)
    gradient, total, _ = loss.gradient(images.detach(), labels)
    torch.testing.assert_close(total, plain.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, theirs, rtol=1e-10, atol=1e-14)


def test_the_order_of_maps_in_memory_changes_rounding_alone() -> None:
    """With channels innermost, loss and gradient in float64 are the same to rounding."""
    network, (images, labels) = teacher_network(), some_images()
    images = images.requires_grad_()
    losses = [RecoveryLoss(network, RecoverConfig(), channels_last=each)(images, labels)[0] for each in (False, True)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, images)[0] for loss in losses]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_compiled_gradient_is_the_uncompiled_one(channels_last: bool) -> None:
    """Compiled code for two teachers of one architecture keeps each one's parameters and statistics."""
    images, labels = some_images()
    for seed in (0, 1):
        network = teacher_network(seed, "convnet")
        plain = RecoveryLoss(network, RecoverConfig()).gradient(images, labels)
        compiled = RecoveryLoss(network, RecoverConfig(), compiled=True, channels_last=channels_last)
        assert not compiled.note
        torch.testing.assert_close(compiled.gradient(images, labels), plain, rtol=1e-9, atol=1e-13)


def test_the_teacher_is_a_frozen_copy_in_evaluation_mode() -> None:
    """The given network keeps its mode and statistics, and the teacher does not follow it."""
    network, (images, labels) = teacher_network(), some_images()
    teacher = RecoveryLoss(network, RecoverConfig())
    before = teacher(images, labels)[0]
    network.train()
    network(images + 3)
    assert network.training
    assert torch.equal(teacher(images, labels)[0], before)


def test_a_network_without_batch_normalisation_is_refused() -> None:
    """Images cannot be recovered from a network that keeps no statistics."""
    spec = NetworkSpec(architecture="convnet", width=8, depth=2, channels=3, size=(16, 16), classes=4)
    with pytest.raises(ConfigError, match=r"no batch normalisation.*norm=batch"):
        RecoveryLoss(build_network(spec, seed=0), RecoverConfig())
    with pytest.raises(ConfigError, match=r"no batch normalisation"):
        RecoveryLoss(teacher_network(), RecoverConfig(statistics_of="all"), [build_network(spec, seed=0)])


def test_statistics_are_of_maps_alone() -> None:
    """Normalisation of vectors before the classifier counts neither for the loss nor for a refusal, as published."""

    class Mixed(nn.Module):
        def __init__(self, vectors: nn.Module) -> None:
            super().__init__()
            self.maps, self.last = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)), nn.Linear(5, 4)
            self.vectors = vectors

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.last(self.vectors(self.maps(images).mean(dim=(2, 3))))
            return found

    torch.manual_seed(0)
    network, (images, labels) = Mixed(nn.BatchNorm1d(5)).double(), some_images()
    loss, statistics = RecoveryLoss(network, RecoverConfig())(images, labels)
    plain = Mixed(nn.Identity()).double()
    plain.load_state_dict(network.state_dict(), strict=False)
    torch.testing.assert_close(statistics, RecoveryLoss(plain, RecoverConfig())(images, labels)[1])
    torch.testing.assert_close(loss, plain_loss(network, images, labels, 1.0, 10.0), rtol=1e-12, atol=0)
    network.maps = nn.Sequential(nn.Conv2d(3, 5, 3))
    with pytest.raises(ConfigError, match="no batch normalisation"):
        RecoveryLoss(network, RecoverConfig())


def state_of(images: Tensor, iterations: int) -> Recovery:
    """State before the first iteration."""
    labels = torch.arange(len(images)) % 4
    held = SyntheticSet(images.clone(), hard_logits(labels, 4), torch.full((1,), 0.01), labels)
    return Recovery(held, DistillConfig(iterations=iterations))


def test_a_state_restored_in_the_middle_ends_with_the_same_bits() -> None:
    """Adam's moments, the first images and the round survive a checkpoint."""
    (images, _), options = some_images(), RecoverConfig(learning_rate=0.25, rounds=2, mixed_in=0.5)

    def run(state: Recovery, until: int) -> Recovery:
        while state.iteration < until:
            if state.first_images is None:
                state.first_images = state.synthetic.images.clone()
            gradient = state.synthetic.images.sin()
            state.follow(gradient, torch.tensor(1.0), torch.tensor(0.5), options, BOUNDS)
        return state

    whole = run(state_of(images.float(), 9), 9)
    for stop in (3, 5, 7):
        half = run(state_of(images.float(), 9), stop)
        again = Recovery.from_arrays(*half.to_arrays(), half.settings, torch.device("cpu"))
        assert torch.equal(run(again, 9).synthetic.images, whole.synthetic.images)
        assert again.history == whole.history


@pytest.mark.parametrize(("rounds", "restarts", "rate"), [(1, "adam", 0.25), (3, "adam", 0.1), (3, "all", 0.1)])
def test_rounds_equal_torchs_adam_started_anew_under_a_rate_of_the_whole_run(
    rounds: int, restarts: str, rate: float
) -> None:
    """Twelve updates are those of torch's Adam with a cosine and a clamp.

    FADRM: each of three rounds has a new Adam and starts from a mixture, and the rate keeps falling; "all" starts the
    rate anew too.
    """
    target, (images, _) = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)), some_images()
    first, steps = images.float(), 12 // rounds
    settings = {"learning_rate": rate, "rounds": rounds, "mixed_in": 0.25, "restarts": restarts}
    options = RecoverConfig.model_validate(settings)
    state, theirs = state_of(first, 12), first.clone().requires_grad_()
    state.first_images = first.clone()
    for number in range(rounds):
        adam = torch.optim.Adam([theirs], lr=rate, betas=(0.5, 0.9), eps=1e-8)
        for step in range(steps):
            along = step / steps if restarts == "all" else (steps * number + step) / 12
            adam.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * along))
            theirs.grad = 2 * (theirs.detach() - target)
            gradient = 2 * (state.synthetic.images - target)
            adam.step()
            with torch.no_grad():
                theirs.clamp_(-2, 2)
            state.follow(gradient, torch.tensor(1.0), torch.tensor(0.5), options, BOUNDS)
        if number < rounds - 1:
            with torch.no_grad():
                theirs.copy_((0.75 * theirs + 0.25 * first).clamp(-2, 2))
    torch.testing.assert_close(state.synthetic.images, theirs.detach(), rtol=1e-5, atol=1e-6)
    assert [record.iteration for record in state.history] == list(range(12))
    assert float(state.synthetic.images.abs().max()) <= 2


def test_values_that_are_not_finite_are_skipped_and_many_in_a_row_end_the_run() -> None:
    """A bad gradient leaves the images alone; the error names the learning rate of a recovery."""
    images = some_images()[0].float()
    state, bad = state_of(images, 10**6), torch.full_like(images, math.nan)
    arguments = (bad, torch.tensor(1.0), torch.tensor(0.0), RecoverConfig(), BOUNDS)
    for _ in range(MOST_DIVERGED - 1):
        state.follow(*arguments)
    with pytest.raises(DivergenceError, match=r"Lower recover\.learning_rate"):
        state.follow(*arguments)
    assert torch.equal(state.synthetic.images, images)
    assert state.skipped == len(state.history) == MOST_DIVERGED


def test_a_view_is_one_crop_flip_and_shift_for_all_images() -> None:
    """The whole image, flipped and rolled, is seen by every image alike."""
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.float64).reshape(2, 3, 4, 4)
    seen = View((0.0, 0.0, 1.0, 1.0), True, (1, -2)).of(images)
    torch.testing.assert_close(seen, images.flip(3).roll((1, -2), (2, 3)), rtol=0, atol=1e-9)
    box = (0.1, 0.25, 0.6, 0.5)
    expected = resized_crop(images, torch.tensor([box] * 2, dtype=torch.float64))
    torch.testing.assert_close(View(box, False, (0, 0)).of(images), expected, rtol=0, atol=1e-9)
    corner = View((0.0, 0.0, 0.5, 0.5), False, (0, 0)).of(images)
    assert float(corner.mean()) < float(images.mean())


class ProductsOf10Bits(TorchDispatchMode):
    """Counts matrix products, and those for which TF32 is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.rounded = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation if it is a matrix product, and run it."""
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            self.products += 1
            self.rounded += torch.backends.cuda.matmul.allow_tf32
        return func(*args, **(kwargs or {}))


def test_views_and_their_gradients_are_not_rounded_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product of a crop, or of its gradient, may use TF32, although a run allows it."""
    on_gpus = recovery.tf32_products
    monkeypatch.setattr(recovery, "tf32_products", lambda allowed, device: on_gpus(allowed, torch.device("cuda")))
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    images = some_images()[0].float().requires_grad_()
    view = View((0.1, 0.25, 0.6, 0.5), True, (1, -2))
    with ProductsOf10Bits() as counted:
        seen = view.of(images)
        forward = counted.products
        gradient = recovery.pulled_back(seen, images, torch.ones_like(seen))
    assert forward >= 2
    assert counted.products >= forward + 2
    assert counted.rounded == 0
    assert torch.backends.cuda.matmul.allow_tf32
    torch.testing.assert_close(gradient, torch.autograd.grad(view.of(images).sum(), images)[0])


@pytest.mark.parametrize("crops", ["published", "falling", "falling-cut"])
def test_crops_are_as_small_as_the_recipe_allows(crops: str) -> None:
    """Published crops keep at least the least share at any time; falling ones begin with the whole image."""
    options = RecoverConfig.model_validate({"crops": crops, "least_share": 0.25, "shift": 2})
    views = [draw_view(options, 1, 0, iteration, 1000) for iteration in range(1000)]
    areas = np.array([view.box[2] * view.box[3] for view in views])
    assert areas.min() >= 0.25 * 3 / 4
    assert (areas[:100].min() > 0.65) == (crops != "published")
    assert (np.mean(areas[:50] == 1) > 0.9) == (crops == "falling")
    assert np.mean(areas[-300:] == 1) < 0.05
    assert areas[-100:].min() < 0.5
    assert {view.shift[0] for view in views} == {-2, -1, 0, 1, 2}
    assert 400 < sum(view.is_flipped for view in views) < 600
    assert draw_view(options, 1, 0, 3, 1000) == views[3]
    unflipped = [draw_view(options.model_copy(update={"flip": False}), 1, 0, number, 1000) for number in range(50)]
    assert [(view.box, view.shift) for view in unflipped] == [(view.box, view.shift) for view in views[:50]]
    assert not any(view.is_flipped for view in unflipped)
    assert draw_view(options, 1, 1, 3, 1000) != views[3]
