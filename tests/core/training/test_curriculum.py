"""Tests which images experts see in an epoch, and that a curriculum changes nothing else in their training."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks.epochs import expert_epochs
from datm_ray.config import CurriculumConfig, ExpertConfig, parse_config
from datm_ray.core.images.augment import augment, draw_augmentation
from datm_ray.core.networks.parameters import flatten
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.training.curriculum import Curriculum
from datm_ray.core.training.experts import ExpertState, steps_of
from datm_ray.errors import ConfigError
from tests.core.training.test_experts import CLASSES, COUNT, data, make_networks, torchs_schedule

GROWING = {"first_share": 0.4, "whole_from": 2, "removals": [{"epoch": 3, "share": 0.3}]}
SETTINGS = ExpertConfig(epochs=5, batch_size=8, learning_rate=0.05, momentum=0.9, augmentation="crop_flip_color")


def curriculum(**changes: Any) -> Curriculum:
    """Images of three classes in some order of difficulty."""
    order = np.random.Generator(np.random.Philox(3)).permutation(COUNT)
    by_class = [order[order % CLASSES == k] for k in range(CLASSES)]
    return Curriculum(CurriculumConfig.model_validate(GROWING | changes), by_class)


def test_published_values_show_the_published_shares() -> None:
    """By default the share grows from 75 % to all images at epoch 20, and easy images leave at epochs 41 and 61."""
    settings = CurriculumConfig()
    ends = {
        0: (0, 0.75),
        4: (0, 0.8),
        19: (0, 0.9875),
        20: (0, 1),
        40: (0, 1),
        41: (0.1, 1),
        60: (0.1, 1),
        61: (0.2, 1),
    }
    for epoch, expected in ends.items():
        assert settings.bounds(epoch) == pytest.approx(expected), epoch
    experts = ExpertConfig(curriculum=settings)
    assert experts.share_seen(range(20)) == pytest.approx(sum(0.75 + 0.0125 * epoch for epoch in range(20)) / 20)
    assert ExpertConfig().share_seen(range(20)) == 1


def test_experts_see_the_easy_images_of_each_class_first() -> None:
    """An epoch has the share of each class that its settings say, counted from the easiest image."""
    found = curriculum()
    sizes = [len(own) for own in found.by_class]
    for epoch, (first, last) in enumerate([(0, 0.4), (0, 0.7), (0, 1), (0.3, 1), (0.3, 1)]):
        expected = [own[int(first * n) : int(last * n)] for own, n in zip(found.by_class, sizes, strict=True)]
        assert found.rows(epoch).tolist() == np.concatenate(expected).tolist()


def test_a_tiny_class_is_always_seen() -> None:
    """A share of less than one image is one image, the easiest or at the end the hardest."""
    tiny = Curriculum(CurriculumConfig.model_validate(GROWING), [np.array([5]), np.array([9, 2])])
    assert [tiny.rows(epoch).tolist() for epoch in (0, 2, 4)] == [[5, 9], [5, 9, 2], [5, 9, 2]]


@pytest.mark.parametrize("schedule", [{}, {"schedule": "cosine", "warmup_epochs": 1}])
def test_training_equals_plain_torch_on_the_images_of_each_epoch(schedule: dict[str, Any]) -> None:
    """Training equals torch's SGD on each epoch's images in drawn order, and reports the mean loss over them."""
    settings, order = SETTINGS.model_copy(update=schedule), curriculum()
    (network,) = make_networks(1)
    images, labels = data()
    state = ExpertState.initial([network])
    functions = StackFunctions(network, stacked=1, compile_=False)
    losses = list(expert_epochs(functions, images, labels, settings, [7], state, order))
    plain, expected = copy.deepcopy(network), []
    optimiser = torch.optim.SGD(plain.parameters(), settings.learning_rate, settings.momentum)
    rates = learning_rates(settings, order)
    for epoch in range(settings.epochs):
        rows = generator(7, Purpose.TRAINING_ORDER, epoch).permutation(order.rows(epoch))
        total = 0.0
        for batch, first in enumerate(range(0, len(rows), settings.batch_size)):
            own = torch.from_numpy(rows[first : first + settings.batch_size])
            drawn = draw_augmentation(
                settings.augmentation, len(own), generator(7, Purpose.TRAINING_AUGMENTATION, epoch, batch)
            )
            optimiser.param_groups[0]["lr"] = next(rates)
            optimiser.zero_grad()
            loss = cross_entropy(plain(augment(images[own], drawn)), labels[own])
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            total += len(own) * loss.item()
        expected.append(total / len(rows))
    torch.testing.assert_close(state.parameters[0], flatten(plain), rtol=1e-9, atol=1e-12)
    assert [float(loss) for loss in losses] == pytest.approx(expected)
    assert next(rates, None) is None


def learning_rates(settings: ExpertConfig, order: Curriculum) -> Any:
    """Rates of all steps by torch's own schedule, whose warm-up has as many steps as its epochs have."""
    steps, warmup = (steps_of(settings, COUNT, epochs, order) for epochs in (settings.epochs, settings.warmup_epochs))
    assert steps == sum(-(-len(order.rows(epoch)) // settings.batch_size) for epoch in range(settings.epochs))
    by_steps = settings.model_copy(update={"epochs": steps, "warmup_epochs": warmup})
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], settings.learning_rate)
    scheduler = torchs_schedule(optimiser, by_steps, 1)
    for _ in range(steps):
        yield optimiser.param_groups[0]["lr"]
        optimiser.step()
        scheduler.step()


def test_a_stack_trains_each_expert_as_if_alone_on_its_own_order() -> None:
    """Experts of a stack see the same images of an epoch, each in its own order, as each alone does."""
    networks, seeds, order = make_networks(3), [4, 5, 6], curriculum()
    images, labels = data()
    together = ExpertState.initial(networks)
    functions = StackFunctions(networks[0], stacked=3, compile_=False)
    losses = list(expert_epochs(functions, images, labels, SETTINGS, seeds, together, order))
    for number, (network, seed) in enumerate(zip(networks, seeds, strict=True)):
        alone = ExpertState.initial([network])
        single = StackFunctions(network, stacked=1, compile_=False)
        own = list(expert_epochs(single, images, labels, SETTINGS, [seed], alone, order))
        torch.testing.assert_close(together.parameters[number], alone.parameters[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.stack(losses)[:, number], torch.cat(own), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("stop", range(1, 5))
def test_training_resumes_from_any_epoch_with_the_same_bits(stop: int) -> None:
    """A training that ends after any epoch and resumes from its state equals an uninterrupted one."""
    networks, order = make_networks(2), curriculum()
    images, labels = data()
    functions = StackFunctions(networks[0], stacked=2, compile_=False)
    whole, cut = ExpertState.initial(networks), ExpertState.initial(networks)
    list(expert_epochs(functions, images, labels, SETTINGS, [1, 2], whole, order))
    list(itertools.islice(expert_epochs(functions, images, labels, SETTINGS, [1, 2], cut, order), stop))
    assert cut.epoch == stop
    list(expert_epochs(functions, images, labels, SETTINGS, [1, 2], cut, order))
    assert torch.equal(cut.parameters, whole.parameters)
    assert cut.step == whole.step == steps_of(SETTINGS, COUNT, 5, order)


def test_all_images_in_every_epoch_are_the_training_without_a_curriculum() -> None:
    """A curriculum that leaves nothing out, in the images' own order, gives the same bits as none."""
    (network,) = make_networks(1)
    images, labels = data()
    every = Curriculum(CurriculumConfig(first_share=1.0, removals=()), [np.arange(COUNT)])
    states = [ExpertState.initial([network]) for _ in range(2)]
    functions = StackFunctions(network, stacked=1, compile_=False)
    for state, order in zip(states, (None, every), strict=True):
        list(expert_epochs(functions, images, labels, SETTINGS, [3], state, order))
    assert torch.equal(states[0].parameters, states[1].parameters)


def test_removals_that_are_not_in_order_are_refused() -> None:
    """Removals before all images are seen, or not in order, are one line with both epochs."""
    for removals in ([{"epoch": 1, "share": 0.1}], [{"epoch": 9, "share": 0.1}, {"epoch": 9, "share": 0.2}]):
        with pytest.raises(ConfigError, match=r"removals are at epochs .* from whole_from 2 on"):
            parse_config({"experts": {"curriculum": GROWING | {"removals": removals}}}, "test")
