"""Tests a teacher's labels: the loss against torch's divergence, and CutMix against its definition."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from datm_ray.config import NetworkSpec
from datm_ray.core.images.augment import augment, draw_augmentation
from datm_ray.core.networks.parameters import flatten
from datm_ray.core.networks.registry import build_network
from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.training.experts import ExpertState
from datm_ray.core.training.loop import Schedule, Trainer, Training
from datm_ray.core.training.teacher import CutMix, Teacher, box_side, divergence, draw_cutmix, mix
from tests.training import train


def make_network(seed: int = 0, norm: str = "batch") -> nn.Module:
    spec = {"channels": 1, "size": (8, 8), "classes": 3, "width": 4, "depth": 2, "norm": norm}
    return build_network(NetworkSpec.model_validate(spec), seed).double()


def make_images(count: int = 20) -> Tensor:
    return torch.randn(count, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_the_loss_is_torchs_divergence_in_float64(temperature: float) -> None:
    """The loss and its gradient are T^2 times torch's kl_div of the softened logits, a mean over the batch."""
    draw = torch.Generator().manual_seed(0)
    logits, wanted = (3 * torch.randn(5, 7, dtype=torch.float64, generator=draw) for _ in range(2))
    found = []
    for loss_of in (
        lambda z: divergence(z, wanted, temperature),
        lambda z: (
            temperature**2
            * kl_div((z / temperature).log_softmax(1), (wanted / temperature).softmax(1), reduction="batchmean")
        ),
    ):
        z = logits.clone().requires_grad_()
        loss = loss_of(z)
        found.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    assert float(divergence(wanted, wanted, temperature)) == pytest.approx(0, abs=1e-12)


def test_a_teacher_is_in_evaluation_mode_and_gets_no_gradient() -> None:
    """A network given in training mode predicts by its running statistics, which stay, and only the student learns."""
    network, student, images = make_network(0).train(), make_network(1), make_images()
    before = copy.deepcopy(network.state_dict())
    teacher = Teacher(network, temperature=2.0)
    (batch,) = teacher.batches(images, seed=0, epochs=range(1), batch_size=len(images), augmentation="")
    seen, wanted = batch.images[0], batch.targets[0]
    loss = divergence(student(seen), wanted, teacher.temperature)
    loss.backward()
    assert torch.is_grad_enabled()
    assert not network.training
    assert student.training
    assert all(each.grad is None and not each.requires_grad for each in network.parameters())
    assert all(each.grad is not None for each in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    torch.testing.assert_close(wanted, copy.deepcopy(network).eval()(seen))
    assert torch.equal(seen.sort(dim=0).values, images.sort(dim=0).values)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_box_in_the_middle_has_the_area_that_is_not_kept(kept: float) -> None:
    """A box that no border cuts has 1 - kept of the image's area, up to whole pixels; at a border it is cut."""
    height, width = 400, 300
    rows, columns = box_side(height, kept, height // 2), box_side(width, kept, width // 2)
    share = (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    assert share == pytest.approx(1 - kept, abs=2 / width)
    side = int(height * math.sqrt(1 - kept))
    assert box_side(height, kept, 0) == slice(0, side - side // 2)
    cut = box_side(height, kept, height - 1)
    assert cut == slice(height - 1 - side // 2, min(height, height - 1 - side // 2 + side))


def test_cutmix_copies_one_box_from_each_partner() -> None:
    """Every image has its partner's pixels in the box and its own elsewhere; each image is a partner once."""
    images = make_images(6)
    for number in range(20):
        drawn = draw_cutmix(1.0, 6, (8, 8), generator(3, Purpose.CUTMIX, 0, number))
        assert sorted(drawn.partners.tolist()) == list(range(6))
        mixed = mix(images, drawn)
        for place, partner in enumerate(drawn.partners.tolist()):
            expected = images[place].clone()
            for y in range(drawn.rows.start, drawn.rows.stop):
                for x in range(drawn.columns.start, drawn.columns.stop):
                    expected[:, y, x] = images[partner, :, y, x]
            assert torch.equal(mixed[place], expected)
    swap = CutMix(slice(0, 8), slice(0, 8), np.array([1, 0, 2, 3, 4, 5]))
    assert torch.equal(mix(images, swap)[:2], images[[1, 0]])


def test_the_kept_share_has_the_beta_distribution() -> None:
    """With alpha 1 the kept share is uniform; with a small alpha most boxes are nothing or the whole image."""
    random = np.random.default_rng(0)
    for alpha, bound in ((1.0, 0.2), (0.01, 0.9)):
        drawn = [draw_cutmix(alpha, 1, (64, 64), random) for _ in range(400)]
        lengths = np.array([each.rows.stop - each.rows.start for each in drawn])
        extreme = float(((lengths == 0) | (lengths >= 32)).mean())
        assert extreme > bound
    assert Teacher(make_network(), cutmix=0.0).mixed(images := make_images(3), 0, 0, 0) is images


def test_training_under_a_teacher_equals_a_loop_by_hand() -> None:
    """Order, augmentation and CutMix of a batch are those of its counters, and teacher and student see one batch."""
    images, labels = make_images(), torch.arange(20) % 3
    schedule = Schedule(3, 8, 0.05, momentum=0.9, augmentation="crop+flip", cosine=True, warmup_epochs=1)
    teacher = Teacher(make_network(5), temperature=4.0, cutmix=1.0)
    ours, by_hand = make_network(1), make_network(1)
    train(Training(ours, images, labels, schedule, 4), teacher)
    optimiser, step = torch.optim.SGD(by_hand.parameters(), 0.05, 0.9), 0
    for epoch in range(3):
        order = generator(4, Purpose.TRAINING_ORDER, epoch).permutation(20)
        for batch, first in enumerate(range(0, 20, 8)):
            rows = torch.from_numpy(order[first : first + 8])
            draw = generator(4, Purpose.TRAINING_AUGMENTATION, epoch, batch)
            x = augment(images[rows], draw_augmentation("crop+flip", len(rows), draw))
            x = mix(x, draw_cutmix(1.0, len(rows), (8, 8), generator(4, Purpose.CUTMIX, epoch, batch)))
            optimiser.param_groups[0]["lr"] = schedule.rate(step, 3)
            loss = divergence(by_hand(x), teacher.network(x), 4.0)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            step += 1
    torch.testing.assert_close(flatten(ours), flatten(by_hand), rtol=1e-10, atol=1e-12)


def test_a_network_learns_its_teacher_whatever_the_targets() -> None:
    """Wrong targets do not matter, the loss falls, and a trainer trains one network after another with equal bits."""
    images = make_images(60)
    teacher = Teacher(make_network(5), temperature=2.0)
    schedule = Schedule(20, 10, 0.05, momentum=0.9)
    networks, alone = [make_network(1), make_network(2)], [make_network(1), make_network(2)]
    targets = [torch.zeros(60, dtype=torch.int64)] * 2
    trainer = Trainer(compile_=False)
    own = [Training(*each, schedule, seed) for *each, seed in zip(networks, [images] * 2, targets, [4, 5], strict=True)]
    for stack in trainer.stacks(own, teacher):
        assert [state.epoch for state in trainer.train_steps(stack, teacher) if state][-1] == 20
    for network, other, seed in zip(networks, alone, [4, 5], strict=True):
        before = float(divergence(copy.deepcopy(other)(images), teacher.network(images), teacher.temperature).detach())
        train(Training(other, images, torch.randn(60, 3), schedule, seed), teacher)
        assert float(divergence(other(images), teacher.network(images), teacher.temperature).detach()) < before / 4
        assert torch.equal(flatten(network), flatten(other))
    untaught = make_network(1)
    train(Training(untaught, images, targets[0], schedule, 4))
    assert not torch.equal(flatten(untaught), flatten(networks[0]))


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_a_training_under_a_teacher_resumes_with_the_same_bits(cutmix: float) -> None:
    """A network resumes after any epoch with the batches, boxes and logits that follow."""
    schedule = Schedule(4, 8, 0.05, momentum=0.9, augmentation="crop+flip", cosine=True, decay_epoch=3)
    teacher, trainer, images = Teacher(make_network(5), 4.0, cutmix), Trainer(), make_images()

    def trained(saved: ExpertState | None) -> tuple[Tensor, list[ExpertState]]:
        own = Training(make_network(1), images, torch.arange(20) % 3, schedule, 4)
        states = [
            ExpertState(state.parameters, state.buffers, state.velocity, state.epoch, state.step)
            for state in trainer.train_steps([own], teacher, saved)
            if state is not None
        ]
        return flatten(own.network), states

    whole, states = trained(None)
    assert [state.epoch for state in states] == [1, 2, 3, 4]
    for state in states:
        assert torch.equal(trained(state)[0], whole)
