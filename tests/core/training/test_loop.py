"""Tests the training loop against one written by hand, and the protocols against the published numbers."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import get_args
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.epochs import by_epoch
from datm_ray.config import PUBLISHED_AUGMENTATION, EvaluateConfig, NetworkSpec, OptimiserName
from datm_ray.core.compute import compilation
from datm_ray.core.images.augment import augment, draw_augmentation
from datm_ray.core.networks import stack_trial, stacked
from datm_ray.core.networks.image_cost import image_cost
from datm_ray.core.networks.parameters import flatten, flatten_buffers
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import LARGEST_STACK, StackFunctions
from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.training import loop
from datm_ray.core.training.experts import ExpertState
from datm_ray.core.training.loop import (
    OPTIMISERS,
    PROTOCOLS,
    NetworkState,
    Optimiser,
    Schedule,
    Trainer,
    Training,
    TrainingState,
    predict_logits,
    scoring_schedule,
    stack_sizes,
    together_steps,
    train_steps,
    would_gain_together,
)
from datm_ray.core.training.teacher import Teacher
from datm_ray.errors import ConfigError
from tests.tapes import Tape
from tests.training import accuracy, train

PLAIN = Schedule(epochs=3, batch_size=8, learning_rate=0.05)
RICH = Schedule(5, 8, 0.05, momentum=0.9, weight_decay=1e-2, augmentation="crop_flip_scale", decay_epoch=3)
COSINE = replace(RICH, decay_epoch=None, cosine=True, warmup_epochs=2)
WARM = replace(RICH, warmup_epochs=2)


def make_network(seed: int = 0) -> nn.Module:
    return build_network(NetworkSpec(channels=1, size=(8, 8), classes=3, width=4, depth=2), seed)


def make_data(count: int = 20) -> tuple[Tensor, Tensor]:
    """Separable noise: the place of a bright row is the class."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    images = 0.3 * torch.randn(count, 1, 8, 8, generator=draw)
    images[torch.arange(count), 0, 1 + 2 * labels] += 2
    return images, labels


def train_by_hand(network: nn.Module, images: Tensor, labels: Tensor, schedule: Schedule, seed: int) -> list[Tensor]:
    """The published loop: torch's SGD, every image once an epoch, a new optimiser at the decay; parameters by epoch."""

    def sgd(rate: float) -> torch.optim.SGD:
        return torch.optim.SGD(
            network.parameters(), rate, momentum=schedule.momentum, weight_decay=schedule.weight_decay
        )

    optimizer, found = sgd(schedule.learning_rate), []
    for epoch in range(schedule.epochs):
        if epoch == schedule.decay_epoch:
            optimizer = sgd(schedule.learning_rate * 0.1)
        order = generator(seed, Purpose.TRAINING_ORDER, epoch).permutation(len(images))
        for batch, first in enumerate(range(0, len(images), schedule.batch_size)):
            rows = torch.from_numpy(order[first : first + schedule.batch_size])
            draw = generator(seed, Purpose.TRAINING_AUGMENTATION, epoch, batch)
            loss = cross_entropy(
                network(augment(images[rows], draw_augmentation(schedule.augmentation, len(rows), draw))), labels[rows]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found.append(flatten(network))
    return found


@pytest.mark.parametrize("schedule", [PLAIN, RICH], ids=["plain", "momentum, decay and augmentation"])
def test_training_equals_the_published_loop(schedule: Schedule) -> None:
    """Training equals a loop by hand that keeps the short last batch and drops the momentum at the decay."""
    images, labels = make_data()
    ours, by_hand = make_network(), make_network()
    expected = iter(train_by_hand(by_hand, images, labels, schedule, seed=4))
    states = by_epoch(train_steps(Training(ours, images, labels, schedule, seed=4)))
    for epoch, state in enumerate(states, start=1):
        assert (state.epoch, state.step) == (epoch, 3 * epoch)
        torch.testing.assert_close(flatten(ours), next(expected), rtol=1e-5, atol=1e-6)
    assert next(expected, None) is None


def trainings(schedule: Schedule, soft: bool) -> list[Training]:
    """Three networks in float64, each with images, a seed and a learning rate of its own."""
    images, labels = make_data(40)
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randperm(40, generator=draw)[:20] for _ in range(3)]
    targets = torch.randn(40, 3, generator=draw).double() if soft else labels
    rates = [schedule.learning_rate * factor for factor in (1, 0.3, 0.3)]
    return [
        Training(
            make_network(number).double(),
            images[own].double(),
            targets[own],
            replace(schedule, learning_rate=rate),
            4 + number,
        )
        for number, (own, rate) in enumerate(zip(rows, rates, strict=True))
    ]


def functions_of(stack: list[Training], compile_: bool = False) -> StackFunctions:
    functions = StackFunctions(stack[0].network, stacked=len(stack), compile_=compile_)
    assert functions.note == ""
    return functions


def together(schedule: Schedule, soft: bool, compile_: bool = False) -> tuple[list[nn.Module], list[nn.Module]]:
    """Networks trained together, and the same ones trained one after another."""
    stack, alone = trainings(schedule, soft), trainings(schedule, soft)
    epochs = [state.epoch for state in by_epoch(together_steps(functions_of(stack, compile_), stack))]
    assert epochs == list(range(1, schedule.epochs + 1))
    for each in alone:
        train(each)
    return [each.network for each in stack], [each.network for each in alone]


@pytest.mark.parametrize(
    "schedule", [PLAIN, RICH, COSINE, WARM], ids=["plain", "momentum, decay and augmentation", "cosine", "warm-up"]
)
@pytest.mark.parametrize("soft", [False, True])
def test_networks_trained_together_equal_those_trained_one_after_another(schedule: Schedule, soft: bool) -> None:
    """Networks with rates of their own equal those trained alone to 1e-12 in float64, also at a short last batch."""
    for ours, alone in zip(*together(schedule, soft), strict=True):
        torch.testing.assert_close(flatten(ours), flatten(alone), rtol=1e-12, atol=1e-13)


def test_networks_trained_together_keep_their_layout() -> None:
    """Channels-last networks are still so when they were trained together, with the bits of others."""
    ours, usual = trainings(RICH, soft=False), trainings(RICH, soft=False)
    for each in ours:
        each.network.to(memory_format=torch.channels_last)
    layouts = [[weight.stride() for weight in each.network.parameters()] for each in ours]
    for stack in (ours, usual):
        list(together_steps(functions_of(stack), stack))
    assert [[weight.stride() for weight in each.network.parameters()] for each in ours] == layouts
    assert layouts != [[weight.stride() for weight in each.network.parameters()] for each in usual]
    for one, other in zip(ours, usual, strict=True):
        assert torch.equal(flatten(one.network), flatten(other.network))


@pytest.mark.slow
def test_networks_trained_together_are_compiled_exactly() -> None:
    """The compiled step is exact to 1e-12 in float64, with the last batch filled up."""
    for ours, alone in zip(*together(RICH, soft=True, compile_=True), strict=True):
        torch.testing.assert_close(flatten(ours), flatten(alone), rtol=1e-12, atol=1e-13)


@pytest.mark.slow
def test_networks_go_together_only_where_that_is_worth_its_compilation() -> None:
    """Long trainings of several networks that stack go together.

    Short ones, one network, ResNets, AdamW and networks under a teacher do not.
    """
    network = make_network()
    resnet = build_network(NetworkSpec(architecture="resnet18", channels=1, size=(8, 8), classes=3, width=4), 0)
    long, cost = replace(RICH, epochs=2000), functools.partial(image_cost, network, (1, 8, 8))
    assert would_gain_together(cost, 2, 20, long)
    assert not would_gain_together(cost, 2, 20, RICH)
    half = replace(long, epochs=1000)
    assert not would_gain_together(cost, 2, 20, half)
    assert would_gain_together(cost, 2, 20, half, alike=4), "other rows have the same step"
    assert [would_gain_together(cost, 2, 20, half, on_gpu=True, alike=each) for each in (4, 5)] == [
        False,
        True,
    ], "a GPU compiles for 15,000 steps, three in an epoch"
    assert not would_gain_together(cost, 1, 20, long)
    assert not would_gain_together(cost, 2, 20, long.with_optimiser("adamw"))
    divided = [
        replace(long, epochs=6000, batch_size=size, micro_batch=micro)
        for size, micro in ((8, 7), (8, 8), (64, 19), (64, 20))
    ]
    together = [would_gain_together(cost, 2, 20, each) for each in divided]
    assert together == [False, True, False, True], "micro-batches that hold a whole batch divide no step"
    images, labels = torch.zeros(20, 1, 8, 8), torch.zeros(20, 3)
    trainer, lessons = Trainer(compile_=True, channels_last=False), mock.Mock()
    for each, teaching, sizes in ((network, None, [2]), (network, lessons, [1, 1]), (resnet, None, [1, 1])):
        stacks = trainer.stacks([Training(each, images, labels, long, seed) for seed in range(2)], teaching)
        assert [len(stack) for stack in stacks] == sizes


def test_a_batch_that_keeps_a_cpu_busy_is_trained_alone() -> None:
    """Networks stay alone if their maps are large but still fit the cache, as measured; a GPU counts steps alone."""
    shapes = [(64, 10), (128, 10), (128, 20), (128, 100)]
    together = []
    for width, images in shapes:
        network = build_network(NetworkSpec(channels=3, size=(32, 32), classes=10, width=width), 0)
        cost = functools.partial(image_cost, network, (3, 32, 32))
        assert would_gain_together(cost, 15, images, PROTOCOLS["published"], on_gpu=True)
        together.append(would_gain_together(cost, 5, images, PROTOCOLS["published"]))
    assert together == [True, False, True, True]


def test_stacks_have_one_size_if_possible_and_leave_no_network_alone() -> None:
    """Five seeds of any number of candidates are stacks of five; every stack has two to eight networks."""
    assert [stack_sizes(5 * candidates) for candidates in (1, 3, 4)] == [[5], [5] * 3, [5] * 4]
    assert [stack_sizes(each) for each in (1, 2, 6, 9, 11)] == [[1], [2], [6], [3] * 3, [6, 5]]
    for networks in range(2, 60):
        sizes = stack_sizes(networks)
        assert sum(sizes) == networks
        assert 2 <= min(sizes) <= max(sizes) <= LARGEST_STACK


def test_a_trainer_trains_all_networks_and_counts_their_epochs() -> None:
    """A trainer that trains one network after another gives the results of single trainings."""
    images, labels = make_data()
    alone = [make_network(0), make_network(1)]
    own = [Training(make_network(seed), images, labels, PLAIN, 4 + seed) for seed in range(2)]
    counts = list(Trainer().train_all(own))
    assert len(counts) == 2 * PLAIN.epochs * -(-len(images) // PLAIN.batch_size)
    assert list(dict.fromkeys(counts)) == list(range(7))  # 0 within the first epoch
    for each, other in zip(own, alone, strict=True):
        train(Training(other, images, labels, PLAIN, each.seed))
        assert torch.equal(flatten(each.network), flatten(other))


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tapes: list[Tape]) -> list[Tape]:
    """Let the CPU play a GPU with much memory that compiles at once. Returns the CUDA graphs recorded so far."""
    monkeypatch.setattr(loop, "is_tried", lambda device: True)
    monkeypatch.setattr(loop, "COMPILED_STEPS", 0)
    monkeypatch.setattr(stack_trial, "free_gpu_memory", lambda: 2**40)
    monkeypatch.setattr(stacked, "compiler_problem", lambda device: "")
    monkeypatch.setattr(compilation, "Compiled", lambda graph, *_, **__: graph)
    return tapes


def test_a_trial_on_a_gpu_decides_how_a_stack_is_computed(
    monkeypatch: pytest.MonkeyPatch, on_a_gpu: list[Tape]
) -> None:
    """One trial serves all stacks of a kind; each way gives the networks of single trainings, by CUDA graphs."""
    asked = list[list[int]]()
    for taken, replays in ((3, 1), (1, 3)):

        def fastest(ways: dict[int, object], now: object, taken: int = taken) -> int:
            asked.append(list(ways))
            return taken

        monkeypatch.setattr(stack_trial, "fastest", fastest)
        trainer, before = Trainer(channels_last=False), len(on_a_gpu)
        for _ in range(2):
            own, alone = trainings(RICH, soft=True), trainings(RICH, soft=True)
            assert list(trainer.train_all(own))[-1] == 3 * RICH.epochs
            assert on_a_gpu[-1].replays == replays * 3 * RICH.epochs
            for each, other in zip(own, alone, strict=True):
                train(other)
                torch.testing.assert_close(flatten(each.network), flatten(other.network), rtol=1e-12, atol=1e-13)
        assert len(on_a_gpu) == before + 3, "a graph of the trial, which is not kept, and one of each training"
    assert asked == [[3, 1]] * 2


@pytest.mark.parametrize("is_planned", [True, False])
def test_a_stack_that_does_not_fit_into_a_gpu_is_computed_in_parts(
    monkeypatch: pytest.MonkeyPatch, on_a_gpu: list[Tape], is_planned: bool
) -> None:
    """Networks and accuracies are those of a stack that fits, if memory is expected to be short, or proves to be."""
    images, labels = make_data(40)
    monkeypatch.setattr(stack_trial, "fastest", lambda ways, now: next(iter(ways)))
    whole, parts = trainings(RICH, soft=False), trainings(RICH, soft=False)
    list(Trainer().train_all(whole))
    computed, failed = list[int](), list[int]()
    function = StackFunctions.__call__

    def short_of_memory(functions: StackFunctions, parameters: Tensor, *others: Tensor) -> object:
        if len(parameters) == 3 and not failed:
            failed.append(len(parameters))
            raise torch.OutOfMemoryError("CUDA out of memory")
        computed.append(len(parameters))
        return function(functions, parameters, *others)

    monkeypatch.setattr(StackFunctions, "__call__", short_of_memory)
    if is_planned:
        monkeypatch.setattr(stack_trial, "free_gpu_memory", lambda: 0)
    trainer = Trainer()
    list(trainer.train_all(parts))
    assert (len(failed), set(computed)) == ((0, {1}) if is_planned else (1, {2, 1}))
    assert trainer.at_a_time(parts) == (1 if is_planned else 2)
    for each, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(flatten(each.network), flatten(other.network), rtol=1e-12, atol=1e-13)
        right = [accuracy(network.float(), images, labels) for network in (each.network, other.network)]
        assert right[0] == right[1] > 0.5


def test_a_deterministic_run_reuses_nothing_that_was_timed(
    monkeypatch: pytest.MonkeyPatch, on_a_gpu: list[Tape]
) -> None:
    """A process's trainer has functions and trials of its own for deterministic runs, and for every device."""
    monkeypatch.setattr(stack_trial, "fastest", lambda ways, now: 1)
    trainer, stack = Trainer(), trainings(PLAIN, soft=True)
    assert trainer.at_a_time(stack) == 1
    timed = trainer._functions_for(stack[0], 3)
    torch.use_deterministic_algorithms(True)
    try:
        assert trainer.at_a_time(stack) == 3
        assert trainer._functions_for(stack[0], 3) is not timed
    finally:
        torch.use_deterministic_algorithms(False)
    assert trainer._functions_for(stack[0], 3) is timed
    elsewhere = Training(copy.deepcopy(stack[0].network).to("meta"), *make_data(), PLAIN, 0)
    assert trainer._functions_for(elsewhere, 3) is not timed


def test_a_resumed_training_is_computed_as_it_was(monkeypatch: pytest.MonkeyPatch, on_a_gpu: list[Tape]) -> None:
    """A saved number of networks in a call holds without a trial, unless it does not fit; a CPU takes the stack."""
    monkeypatch.setattr(stack_trial, "fastest", lambda ways, now: pytest.fail("there is no trial"))
    stack = trainings(PLAIN, soft=True)
    assert [Trainer().at_a_time(stack, saved) for saved in (1, 2, 3)] == [1, 2, 3]
    monkeypatch.setattr(loop, "is_tried", lambda device: device.type == "cuda")
    assert Trainer().at_a_time(stack, 1) == 3


def copied(state: TrainingState) -> ExpertState:
    """State as a file holds it."""
    velocity = None if state.velocity is None else state.velocity.clone()
    return ExpertState(state.parameters.clone(), state.buffers.clone(), velocity, state.epoch, state.step)


ADAMW = replace(RICH, learning_rate=0.01).with_optimiser("adamw", 0.5)


@pytest.mark.parametrize(
    ("schedule", "norm", "is_stack"),
    [
        (PLAIN, "instance", False),
        (PLAIN, "instance", True),
        (RICH, "batch", False),
        (RICH, "instance", True),
        (COSINE, "instance", True),
        (ADAMW, "batch", False),
        (replace(ADAMW, optimiser="another"), "instance", False),
    ],
)
def test_a_training_resumes_after_any_epoch_with_the_same_bits(
    schedule: Schedule, norm: str, is_stack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, buffers and the optimiser's vectors are the whole state, before, at and after the decay.

    A row of `OPTIMISERS` is all that another optimiser needs.
    """
    names, vectors = ("momentum", "weight_decay"), ("square_avg", "momentum_buffer")
    another = Optimiser("RMSprop", torch.optim.RMSprop, names, vectors, (1e-3,))
    monkeypatch.setitem(OPTIMISERS, "another", another)
    images, labels = make_data()
    spec = NetworkSpec(channels=1, size=(8, 8), classes=3, width=4, depth=2, norm=norm)

    def stack() -> list[Training]:
        rates = (0.05, 0.02) if is_stack else (schedule.learning_rate,)
        own = [replace(schedule, learning_rate=rate) for rate in rates]
        return [Training(build_network(spec, 0), images, labels, each, 4) for each in own]

    def training(saved: ExpertState | None) -> tuple[list[Training], list[ExpertState]]:
        own = stack()
        if is_stack:
            return own, [copied(state) for state in by_epoch(together_steps(functions_of(own), own, saved))]
        return own, [copied(state) for state in Trainer().train_steps(own, None, saved) if state is not None]

    whole, states = training(None)
    for state in states:
        resumed, later = training(state)
        assert [each.epoch for each in later] == list(range(state.epoch + 1, schedule.epochs + 1))
        for each, other in zip(resumed, whole, strict=True):
            assert torch.equal(flatten(each.network), flatten(other.network))
            assert torch.equal(flatten_buffers(each.network), flatten_buffers(other.network))


def test_decay_divides_the_rate_by_ten_and_forgets_the_momentum() -> None:
    """The decay divides the rate by ten and drops the momentum; a constant gradient shows both."""

    class Constant(nn.Module):
        """Loss log(1 + exp(-p)) for class 1 of two: with p far below zero its gradient is -1."""

        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.tensor(-200.0, dtype=torch.float64))

        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([torch.zeros_like(self.p), self.p]).expand(len(images), 2)

    network, schedule = Constant(), Schedule(4, 1, 1.0, momentum=0.5, decay_epoch=2)
    epochs = by_epoch(train_steps(Training(network, torch.zeros(1, 1, 1, 1), torch.tensor([1]), schedule, seed=0)))
    places = [float(network.p.detach()) for _ in epochs]
    assert np.diff([-200.0, *places]) == pytest.approx([1, 1.5, 0.1, 0.15])


@pytest.mark.parametrize(
    "schedule",
    [
        RICH,
        WARM,
        COSINE,
        replace(RICH.with_optimiser("adamw"), decay_epoch=2),
        replace(COSINE.with_optimiser("adamw"), epochs=4),
    ],
    ids=["decay", "warm-up", "cosine", "adamw with decay", "adamw with cosine"],
)
def test_the_batches_of_a_users_loop_train_as_scoring_does(schedule: Schedule) -> None:
    """A user's loop over `batches` ends with the very parameters of a scored network: rates and resets are the same."""
    schedule = replace(schedule, augmentation="")
    image, probabilities = make_data(1)[0], torch.tensor([[0.7, 0.2, 0.1]])
    images, targets = image.repeat(20, 1, 1, 1), probabilities.repeat(20, 1)  # equal, since the orders differ
    scored, own = make_network(), make_network()
    train(Training(scored, images, targets.log(), schedule, seed=0))
    optimizer = schedule.optimizer(own)
    loader = DataLoader(TensorDataset(images, targets.log().softmax(dim=1)), schedule.batch_size, shuffle=True)
    for epoch in range(schedule.epochs):
        for x, y in schedule.batches(loader, optimizer, epoch):
            optimizer.zero_grad()
            cross_entropy(own(x), y).backward()
            optimizer.step()
    assert torch.equal(flatten(own), flatten(scored))


def test_every_optimiser_of_a_recipe_has_its_row() -> None:
    """The table has the names that recipes may give, and no others."""
    assert tuple(OPTIMISERS) == get_args(OptimiserName)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimisers_row_names_all_of_torchs_state(name: OptimiserName) -> None:
    """A row names every tensor that torch's optimizer keeps between steps, so that a saved training is whole."""
    network, rule = make_network(), OPTIMISERS[name]
    optimizer = RICH.with_optimiser(name).optimizer(network)
    torch.stack([each.sum() for each in network.parameters()]).sum().backward()
    optimizer.step()
    for each in network.parameters():
        state = {key: value for key, value in optimizer.state[each].items() if value is not None}
        assert state.keys() - {"step"} == {*rule.vectors}
        assert all(state[key].shape == each.shape for key in rule.vectors)


def test_adamw_equals_torchs() -> None:
    """AdamW equals torch's: its decay shrinks parameters directly, and not through the gradient."""
    images, labels = make_data(1)  # AdamW's first step is the gradient's sign, so zeros must agree
    schedule = Schedule(2, 8, 0.01, weight_decay=0.5, optimiser="adamw", decay_epoch=1)
    network, slow = make_network(), make_network()
    train(Training(network, images, labels, schedule, 0))
    for learning_rate in (0.01, 0.001):
        optimizer = torch.optim.AdamW(slow.parameters(), lr=learning_rate, weight_decay=0.5)
        torch.nn.functional.cross_entropy(slow(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(flatten(network), flatten(slow), rtol=1e-4, atol=1e-5)


def test_a_section_changes_what_it_names_of_its_protocol() -> None:
    """The defaults are the protocol, halfway is as in the protocols, and a warm-up without end is refused."""
    for name, protocol in PROTOCOLS.items():
        plain = EvaluateConfig.model_validate({"protocol": name})
        assert scoring_schedule(plain, 0.3) == replace(protocol, learning_rate=0.3, augmentation=PUBLISHED_AUGMENTATION)
    changed = EvaluateConfig(protocol="quick", epochs=500, batch_size=256, augmentation="")
    assert scoring_schedule(changed, 0.01) == replace(PROTOCOLS["short"], batch_size=256)
    for protocol in PROTOCOLS.values():  # its number of epochs, given with another protocol, decays where it does
        stated = scoring_schedule(EvaluateConfig(protocol="quick", epochs=protocol.epochs, augmentation=""), 0.01)
        assert stated == protocol
    cosine = scoring_schedule(EvaluateConfig(protocol="quick", schedule="cosine", warmup_epochs=5), 0.01)
    assert (cosine.epochs, cosine.decay_epoch, cosine.cosine, cosine.warmup_epochs) == (20, None, True, 5)
    with pytest.raises(ConfigError, match=r"warmup_epochs is 20, and there are 20 epochs"):
        scoring_schedule(EvaluateConfig(protocol="quick", warmup_epochs=20), 0.01)


def test_published_protocol_has_the_published_numbers() -> None:
    """The published protocol has 1001 epochs of batch 128, and a tenth of the rate after epoch index 501."""
    published = PROTOCOLS["published"]
    assert (published.epochs, published.batch_size) == (1001, 128)
    assert (published.momentum, published.weight_decay) == (0.9, 5e-4)
    assert published.decay_epoch == 1000 // 2 + 1 + 1


@pytest.mark.parametrize("targets", ["classes", "logits", "a teacher's"])
def test_micro_batches_train_as_whole_batches_do(targets: str) -> None:
    """In float64, a step in parts has the gradient of the whole step, and no part has more images than allowed."""
    images, labels = make_data()
    images, found, sizes = images.double(), list[Tensor](), list[int]()
    wanted = labels if targets == "classes" else torch.rand(len(images), 3, dtype=torch.float64)
    for micro_batch in (None, 3):
        network = make_network().double()
        teacher = Teacher(make_network(1).double(), 4.0, 1.0, micro_batch) if targets == "a teacher's" else None
        for each in (network, *([teacher.network] if teacher else [])):
            each.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
        schedule = Schedule(3, 8, 0.05, momentum=0.9, augmentation="flip", micro_batch=micro_batch)
        train(Training(network, images, wanted, schedule, 5), teacher)
        found.append(flatten(network))
        assert max(sizes) == (micro_batch or 8)
        sizes.clear()
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-8)


def test_a_schedule_without_micro_batches_is_written_as_before() -> None:
    """Files and names of earlier versions stay, and one with micro-batches is read back."""
    whole = Schedule(3, 8, 0.05)
    assert "micro_batch" not in whole.to_json()
    for each in (whole, replace(whole, micro_batch=2)):
        assert Schedule.from_json(each.to_json()) == each
    with pytest.raises(ValueError, match="micro_batch"):
        Schedule.from_json({**whole.to_json(), "micro_batch": 0})


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_channels_last_network_resumes_with_the_same_bits(optimiser: OptimiserName) -> None:
    """The layout of a network's weights stays when it resumes, and its moments get the same layout."""
    images, labels = make_data()
    schedule = Schedule(4, 8, 0.05, momentum=0.9, optimiser=optimiser)

    def layouts(state: NetworkState) -> set[bool]:
        tensors = [each for values in state.optimizer.state.values() for each in values.values() if each.dim() == 4]
        tensors += [each for each in state.network.parameters() if each.dim() == 4 and each.shape[1] > 1]
        return {each.is_contiguous(memory_format=torch.channels_last) for each in tensors if each.shape[1] > 1}

    network = make_network().to(memory_format=torch.channels_last)
    saved = [copied(each) for each in by_epoch(train_steps(Training(network, images, labels, schedule, 5)))]
    again = make_network().to(memory_format=torch.channels_last)
    assert layouts(NetworkState(again, schedule, saved[1])) == {True}
    train(Training(again, images, labels, schedule, 5), saved=saved[1])
    assert torch.equal(flatten(again), flatten(network))
    if optimiser == "sgd":  # AdamW divides gradients that are rounding alone by themselves
        usual = make_network()
        train(Training(usual, images, labels, schedule, 5))
        torch.testing.assert_close(flatten(usual), flatten(network), rtol=1e-3, atol=1e-4)


def test_one_hot_soft_labels_train_as_hard_ones_do() -> None:
    """Logits whose softmax is one-hot train exactly like class numbers."""
    images, labels = make_data()
    hard, soft = make_network(), make_network()
    train(Training(hard, images, labels, RICH, 0))
    train(Training(soft, images, 100.0 * torch.nn.functional.one_hot(labels, 3), RICH, 0))
    torch.testing.assert_close(flatten(soft), flatten(hard), rtol=1e-4, atol=1e-5)


def test_soft_labels_are_logits() -> None:
    """The loss of soft labels is the cross-entropy with the softmax of the logits."""
    images, _ = make_data(6)
    targets = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    network = make_network()
    before = flatten(network)
    expected = -(targets.softmax(1) * network(images).log_softmax(1)).sum(1).mean()
    gradient = torch.cat([each.flatten() for each in torch.autograd.grad(expected, list(network.parameters()))])
    train(Training(network, images, targets, replace(PLAIN, epochs=1), seed=0))
    torch.testing.assert_close(flatten(network), before - PLAIN.learning_rate * gradient, rtol=1e-5, atol=1e-6)


def test_seed_alone_decides_the_result() -> None:
    """The seed alone decides the parameters bit for bit, whatever the state of the global generators."""
    images, labels = make_data()
    results = []
    for seed, noise in ((1, 10), (1, 20), (2, 10)):
        torch.manual_seed(noise)
        network = make_network()
        train(Training(network, images, labels, RICH, seed))
        results.append(flatten(network))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_measuring_between_epochs_changes_nothing() -> None:
    """Measuring accuracy between epochs changes neither training mode nor results."""
    images, labels = make_data()
    watched, alone = make_network(), make_network()
    for _ in by_epoch(train_steps(Training(watched, images, labels, RICH, seed=0))):
        accuracy(watched, images, labels)
        assert watched.training
    train(Training(alone, images, labels, RICH, 0))
    assert torch.equal(flatten(watched), flatten(alone))


def test_a_separable_problem_is_learned() -> None:
    """A separable problem goes from chance to all new images right in a few epochs."""
    images, labels = make_data(90)
    network = make_network()
    before = accuracy(network, images[60:], labels[60:])
    train(Training(network, images[:60], labels[:60], Schedule(30, 8, 0.05, momentum=0.9), 0))
    assert before < 0.7
    assert accuracy(network, images[60:], labels[60:]) == 1
    assert cross_entropy(predict_logits(network, images[:60]), labels[:60]) < 0.1


def test_logits_are_predicted_in_evaluation_mode_in_chunks() -> None:
    """Prediction uses evaluation mode, and the size of its chunks does not matter."""
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 3))
    images, _ = make_data(7)
    logits = predict_logits(network, images, batch_size=3)
    torch.testing.assert_close(logits, predict_logits(network, images))
    assert not logits.requires_grad
    assert network.training
    assert int(network.get_buffer("1.num_batches_tracked")) == 0


def test_accuracy_is_the_share_of_images_that_are_right() -> None:
    """Accuracy is the share of correctly classified images, counted by hand."""
    images = torch.tensor([[3.0, 1, 1], [0, 2, 1], [0, 1, 5], [1, 0, 0]]).view(4, 3, 1, 1)
    assert accuracy(nn.Flatten(), images, torch.tensor([0, 1, 1, 0])) == 0.75
