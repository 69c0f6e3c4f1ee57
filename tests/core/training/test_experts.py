"""Tests the training of experts: each step equals a plain implementation, alone or stacked, compiled or not."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.epochs import expert_epochs
from datm_ray.config import ExpertConfig, NetworkSpec
from datm_ray.core.compute import compilation
from datm_ray.core.images.augment import augment, draw_augmentation
from datm_ray.core.networks import stacked
from datm_ray.core.networks.parameters import flatten, flatten_buffers
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import StackFunctions, can_be_stacked
from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.training.experts import ExpertState, descent, perturbation, stack_steps

COUNT, CLASSES = 22, 3
SGD = ExpertConfig(epochs=2, batch_size=8, learning_rate=0.05, augmentation="")
RICH = SGD.model_copy(update={"momentum": 0.9, "weight_decay": 1e-2, "augmentation": "crop_flip_color"})
GSAM = SGD.model_copy(update={"optimiser": "gsam", "rho": 0.05})
COSINE = RICH.model_copy(update={"epochs": 4, "schedule": "cosine", "warmup_epochs": 1})


def make_networks(count: int, norm: Any = "instance", dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    spec = NetworkSpec(channels=3, size=(8, 8), classes=CLASSES, width=4, depth=2, norm=norm)
    return [build_network(spec, seed).to(dtype) for seed in range(count)]


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(COUNT, 3, 8, 8, generator=draw, dtype=dtype), torch.arange(COUNT) % CLASSES


def trained(
    networks: Sequence[nn.Module], settings: ExpertConfig, seeds: Sequence[int], *, compile_: bool = False
) -> tuple[ExpertState, list[Tensor]]:
    """Parameters at the end, and the losses of every epoch."""
    lowered = settings.precision == "bfloat16"
    functions = StackFunctions(networks[0], stacked=len(networks), compile_=compile_, in_bfloat16=lowered)
    assert functions.note == "", "without compiled code nothing of it would be tested"
    state = ExpertState.initial(networks)
    images, labels = data(state.parameters.dtype)
    return state, list(expert_epochs(functions, images, labels, settings, seeds, state))


def plainly(network: nn.Module, settings: ExpertConfig, seed: int, step: Callable[..., None]) -> nn.Module:
    """Train by modules and torch's optimiser on equal draws; `step(network, loss of the batch, optimiser)`."""
    network = copy.deepcopy(network)
    images, labels = data(next(network.parameters()).dtype)
    optimiser = torch.optim.SGD(
        network.parameters(), settings.learning_rate, settings.momentum, weight_decay=settings.weight_decay
    )
    scheduler = torchs_schedule(optimiser, settings, -(-COUNT // settings.batch_size))
    for epoch in range(settings.epochs):
        order = generator(seed, Purpose.TRAINING_ORDER, epoch).permutation(COUNT)
        for batch, first in enumerate(range(0, COUNT, settings.batch_size)):
            rows = torch.from_numpy(order[first : first + settings.batch_size])
            draw = generator(seed, Purpose.TRAINING_AUGMENTATION, epoch, batch)
            inputs = augment(images[rows], draw_augmentation(settings.augmentation, len(rows), draw))
            step(network, lambda x=inputs, y=labels[rows]: cross_entropy(network(x), y), optimiser)
            scheduler.step()
    return network


def torchs_schedule(
    optimiser: torch.optim.Optimizer, settings: ExpertConfig, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule by torch's own, to be stepped once a step."""
    warmup, steps = (epochs * steps_per_epoch for epochs in (settings.warmup_epochs, settings.epochs))
    rates = torch.optim.lr_scheduler
    linear = rates.LinearLR(optimiser, start_factor=0.01 if warmup else 1.0, total_iters=warmup)
    if settings.schedule == "constant":
        return linear
    return rates.SequentialLR(optimiser, [linear, rates.CosineAnnealingLR(optimiser, steps - warmup)], [warmup])


def sgd_step(network: nn.Module, loss: Callable[[], Tensor], optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    loss().backward()
    optimiser.step()


def gsam_step(settings: ExpertConfig) -> Callable[..., None]:
    """A GSAM step layer by layer, with norms over all layers, as FTD describes it."""

    def step(network: nn.Module, loss: Callable[[], Tensor], optimiser: torch.optim.Optimizer) -> None:
        layers = list(network.parameters())
        g = torch.autograd.grad(loss(), layers)
        scales = [w.detach().abs() if settings.adaptive else torch.ones_like(w) for w in layers]
        length = sum(float((t * part).square().sum()) for t, part in zip(scales, g, strict=True)) ** 0.5
        with torch.no_grad():
            moves = [t * t * part * settings.rho / (length + 1e-12) for t, part in zip(scales, g, strict=True)]
            for w, e in zip(layers, moves, strict=True):
                w.add_(e)
        sharp = torch.autograd.grad(loss(), layers)
        with torch.no_grad():
            for w, e in zip(layers, moves, strict=True):
                w.sub_(e)
        norm_g = sum(float(part.square().sum()) for part in g) ** 0.5
        norm_s = sum(float(part.square().sum()) for part in sharp) ** 0.5
        cosine = sum(float((a * b).sum()) for a, b in zip(g, sharp, strict=True)) / (norm_g * norm_s)
        for w, a, b in zip(layers, g, sharp, strict=True):
            w.grad = b - settings.alpha * (a - cosine * norm_g * b / norm_s)
        optimiser.step()

    return step


def assert_close(value: Tensor, expected: Tensor, bound: float = 1e-12) -> None:
    assert float((value - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("settings", [SGD, RICH, COSINE], ids=["plain", "momentum, decay, augmentation", "cosine"])
def test_sgd_equals_torchs(settings: ExpertConfig) -> None:
    """Epochs with a smaller last batch end at the parameters of modules, torch's SGD and torch's schedules."""
    (network,) = make_networks(1)
    state, _ = trained([network], settings, [7])
    assert_close(state.parameters[0], flatten(plainly(network, settings, 7, sgd_step)))
    assert (state.epoch, state.step) == (settings.epochs, 3 * settings.epochs)


class Given:
    """Gradients of two networks that were drawn beforehand, instead of those of a loss."""

    note, fills_up = "", False

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        self._left = iter(gradients)

    def __call__(self, parameters: Tensor, buffers: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return zeros as losses, and the next gradients."""
        return torch.zeros(len(parameters)), next(self._left), buffers


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 5e-4), (0.0, 5e-4), (0.9, 0.0), (0.0, 0.0)])
def test_a_step_rounds_as_torchs_sgd_does(momentum: float, decay: float, foreach: bool) -> None:
    """Thirty steps of two networks side by side have the bits of torch.optim.SGD on the layers of each."""
    draw, rates = torch.Generator().manual_seed(0), [0.01, 0.03]
    shapes = [(13, 3, 3, 3), (13,), (13,), (10, 117), (10,)]
    layers = [[nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes] for _ in rates]
    given = [[[torch.randn(shape, generator=draw) for shape in shapes] for _ in rates] for _ in range(30)]
    flat = [torch.stack([torch.cat([part.flatten() for part in own]) for own in each]) for each in (layers, *given)]
    optimisers = [
        torch.optim.SGD(own, rate, momentum, weight_decay=decay, foreach=foreach)
        for own, rate in zip(layers, rates, strict=True)
    ]
    settings = SGD.model_copy(update={"momentum": momentum, "weight_decay": decay, "batch_size": 2, "epochs": 15})
    state = ExpertState(flat[0].detach(), torch.empty(2, 0))
    images, labels = [torch.zeros(4, 1, 1, 1)] * 2, [torch.zeros(4, dtype=torch.int64)] * 2
    list(stack_steps(Given(flat[1:]), images, labels, settings, [0, 1], state, rates))
    for gradients in given:
        for own, gradient, optimiser in zip(layers, gradients, optimisers, strict=True):
            for part, value in zip(own, gradient, strict=True):
                part.grad = value
            optimiser.step()
    expected = torch.stack([torch.cat([part.detach().flatten() for part in own]) for own in layers])
    assert torch.equal(state.parameters, expected)


@pytest.mark.parametrize("adaptive", [True, False])
def test_gsam_equals_a_plain_implementation(adaptive: bool) -> None:
    """GSAM equals a plain implementation step by step, with and without scaling, beside momentum and decay."""
    settings = RICH.model_copy(update={"optimiser": "gsam", "rho": 0.05, "alpha": 0.4, "adaptive": adaptive})
    (network,) = make_networks(1)
    state, _ = trained([network], settings, [7])
    reference = flatten(plainly(network, settings, 7, gsam_step(settings)))
    assert_close(state.parameters[0], reference)
    assert float((reference - flatten(plainly(network, settings, 7, sgd_step))).norm()) > 1e-3


def test_gsam_perturbs_by_rho_and_subtracts_an_orthogonal_part() -> None:
    """GSAM's perturbation has length rho; the part it subtracts is orthogonal to the sharp gradient."""
    draw = torch.Generator().manual_seed(0)
    w, g, sharp = (torch.randn(2, 50, generator=draw, dtype=torch.float64) for _ in range(3))
    e = perturbation(w, g, ExpertConfig(rho=0.3, alpha=0.5))
    torch.testing.assert_close((e / w.abs()).norm(dim=1), torch.full((2,), 0.3, dtype=torch.float64))
    taken = sharp - descent(g, sharp, ExpertConfig(rho=0.3, alpha=0.5))
    torch.testing.assert_close((taken * sharp).sum(dim=1), torch.zeros(2, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(descent(g, sharp, ExpertConfig(rho=0.3, alpha=0.0)), sharp)


@pytest.mark.parametrize("settings", [RICH, GSAM, COSINE], ids=["sgd", "gsam", "cosine"])
@pytest.mark.parametrize("norm", ["instance", "group", "batch", "none"])
def test_a_stack_trains_each_expert_as_if_alone(settings: ExpertConfig, norm: str) -> None:
    """Each expert of a stack has the parameters, running statistics and losses of an expert trained alone."""
    networks, seeds = make_networks(3, norm), [5, 6, 7]
    together, losses = trained(networks, settings, seeds)
    for place, (network, seed) in enumerate(zip(networks, seeds, strict=True)):
        alone, own = trained([network], settings, [seed])
        assert_close(together.parameters[place], alone.parameters[0], 1e-10)
        torch.testing.assert_close(together.buffers[place], alone.buffers[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(torch.stack(losses)[:, place], torch.stack(own)[:, 0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("chunk", [1, 3, 5, 8])
def test_batches_in_parts_equal_whole_batches(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Splitting a batch into calls of any size changes nothing; padding images have weight zero."""
    networks, seeds = make_networks(2), [5, 6]
    images, labels = data()
    whole, _ = trained(networks, GSAM, seeds)
    state = ExpertState.initial(networks)
    functions = StackFunctions(networks[0], stacked=2, compile_=False)
    monkeypatch.setattr(StackFunctions, "_in_cache", lambda *_: chunk)
    list(expert_epochs(functions, images, labels, GSAM, seeds, state))
    assert_close(state.parameters, whole.parameters)


@pytest.mark.parametrize("name", ["convnet", "vgg11", "alexnet", "lenet", "resnet18", "mlp"])
def test_every_network_trains_in_a_stack(name: str) -> None:
    """Every architecture trains in a stack as if alone, side by side or under vmap."""
    spec = NetworkSpec(architecture=name, channels=3, size=(8, 8), classes=CLASSES, width=4, depth=2)
    networks = [build_network(spec, seed).double() for seed in range(2)]
    assert can_be_stacked(networks[0]) == (name not in ("resnet18", "mlp"))
    settings = SGD.model_copy(update={"epochs": 1})
    together, _ = trained(networks, settings, [1, 2])
    for place, network in enumerate(networks):
        alone, _ = trained([network], settings, [place + 1])
        assert_close(together.parameters[place], alone.parameters[0], 1e-9)


def test_running_statistics_are_those_of_the_module() -> None:
    """Running statistics come from the first gradient of every step, and not from GSAM's second."""
    (network,) = make_networks(1, "batch")
    state, _ = trained([network], SGD, [7])
    plain = plainly(network, SGD, 7, sgd_step)
    assert_close(state.buffers[0], flatten_buffers(plain))
    assert_close(state.parameters[0], flatten(plain))
    one_step = GSAM.model_copy(update={"epochs": 1, "batch_size": COUNT})
    first, _ = trained([network], one_step, [7])
    second, _ = trained([network], one_step.model_copy(update={"optimiser": "sgd"}), [7])
    assert torch.equal(first.buffers, second.buffers)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_networks_with_batch_statistics_have_the_memory_order_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, on_gpu: bool, channels_last: bool
) -> None:
    """On a GPU a convolution of theirs reads images and weights with channels innermost; values stay, and CPUs too."""
    networks = make_networks(2, "batch")
    state, (x, y) = ExpertState.initial(networks), data()
    arguments = (state.parameters, state.buffers, x.expand(2, *x.shape), y.expand(2, -1), torch.full((COUNT,), 0.1))
    stack = functools.partial(StackFunctions, networks[0], stacked=2, compile_=False, channels_last=channels_last)
    expected = stack()(*arguments)
    orders = list[tuple[bool, bool]]()
    convolved = nn.Conv2d._conv_forward

    def noting(layer: nn.Conv2d, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        orders.append(tuple(each.is_contiguous(memory_format=torch.channels_last) for each in (images, weight)))
        return convolved(layer, images, weight, bias)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", noting)
    if on_gpu:
        monkeypatch.setattr(stacked, "_gains_from_order", lambda device: True)
    found = stack()(*arguments)
    for each, other in zip(found, expected, strict=True):
        assert_close(each, other) if on_gpu else torch.testing.assert_close(each, other, rtol=0, atol=0)
    assert set(orders) == {(on_gpu and channels_last,) * 2}


@pytest.mark.slow
def test_compiled_experts_equal_uncompiled_ones() -> None:
    """Compiled experts equal uncompiled ones, also where the last batch is padded with images of weight zero."""
    networks, seeds = make_networks(2), [0, 1]
    compiled, losses = trained(networks, GSAM.model_copy(update={"momentum": 0.5}), seeds, compile_=True)
    plain, expected = trained(networks, GSAM.model_copy(update={"momentum": 0.5}), seeds)
    assert_close(compiled.parameters, plain.parameters)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-10, atol=0)


def test_channels_first_round_as_finely_as_plain_torch() -> None:
    """A float32 step at digits' size is at most twice as far from float64 as modules and autograd."""
    spec = NetworkSpec(channels=1, size=(8, 8), classes=10, width=32, depth=3)
    networks = [build_network(spec, seed) for seed in range(6)]
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(6, 32, 1, 8, 8, generator=draw)
    labels = torch.randint(10, (6, 32), generator=draw)

    def plain(dtype: torch.dtype) -> Tensor:
        rows = []
        for network, x, y in zip(networks, images, labels, strict=True):
            own = copy.deepcopy(network).to(dtype)
            gradient = torch.autograd.grad(cross_entropy(own(x.to(dtype)), y), list(own.parameters()))
            rows.append(torch.cat([part.flatten() for part in gradient]).double())
        return torch.stack(rows)

    exact, state = plain(torch.float64), ExpertState.initial(networks)
    functions = StackFunctions(networks[0], stacked=6, compile_=False, channels_last=False)
    _, ours, _ = functions(state.parameters, state.buffers, images, labels, torch.full((32,), 1 / 32))
    errors = [(each.double() - exact).norm(dim=1) for each in (ours, plain(torch.float32))]
    # The median, because in a single problem a value may cross a rectifier's kink.
    assert float((errors[0] / errors[1]).median()) < 2


def test_memory_order_reaches_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The requested memory order is the one for which the graph is traced and compiled."""
    asked: list[tuple[bool, bool]] = []

    class Uncompiled:
        def __init__(self, graph: Any, device_type: str, *, channels_last: bool) -> None:
            images = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"][1]
            asked.append((channels_last, images.is_contiguous()))
            self._graph = graph

        def __call__(self, *arguments: Tensor) -> Any:
            return self._graph(*arguments)

    monkeypatch.setattr(compilation, "Compiled", Uncompiled)
    monkeypatch.setattr(stacked, "compiler_problem", lambda device_type: "")
    networks, (images, labels) = make_networks(2), data()
    state = ExpertState.initial(networks)
    for channels_last in (True, False):
        functions = StackFunctions(networks[0], stacked=2, channels_last=channels_last)
        arguments = (images[:4].expand(2, -1, -1, -1, -1), labels[:4].expand(2, -1), torch.full((4,), 0.25).double())
        functions(state.parameters, state.buffers, *arguments)
    assert asked == [(True, False), (False, True)]


def test_gsam_follows_the_schedule() -> None:
    """GSAM equals a plain implementation under torch's schedules, and ends elsewhere than at a constant rate."""
    settings = COSINE.model_copy(update={"optimiser": "gsam", "rho": 0.05})
    (network,) = make_networks(1)
    state, _ = trained([network], settings, [7])
    assert_close(state.parameters[0], flatten(plainly(network, settings, 7, gsam_step(settings))))
    constant, _ = trained([network], settings.model_copy(update={"schedule": "constant"}), [7])
    assert float((state.parameters - constant.parameters).norm()) > 1e-3


@pytest.mark.slow
def test_a_schedule_compiles_nothing_anew() -> None:
    """A rate that changes in every step calls one compiled function, with the numbers of uncompiled code."""
    networks, seeds = make_networks(2), [0, 1]
    functions = StackFunctions(networks[0], stacked=2)
    assert functions.note == ""
    state = ExpertState.initial(networks)
    list(expert_epochs(functions, *data(), COSINE, seeds, state))
    assert isinstance(functions._function, compilation.CompiledForShapes)
    assert len(functions._function.built) == 1
    plain, _ = trained(networks, COSINE, seeds)
    assert_close(state.parameters, plain.parameters)


@pytest.mark.parametrize(("name", "norm"), [("convnet", "instance"), ("resnet18", "group"), ("resnet18", "batch")])
def test_bfloat16_rounds_layers_but_not_parameters(name: str, norm: Any) -> None:
    """Gradients in bfloat16 are off by as much as rounded parameters make them, and stay float32 as statistics do."""
    spec = NetworkSpec(architecture=name, channels=3, size=(8, 8), classes=CLASSES, width=8, depth=2, norm=norm)
    networks = [build_network(spec, seed) for seed in range(2)]
    state, (x, y) = ExpertState.initial(networks), data(torch.float32)
    others = (state.buffers, x.expand(2, *x.shape), y.expand(2, -1), torch.full((COUNT,), 1 / COUNT))
    exact, lowered = (StackFunctions(networks[0], stacked=2, compile_=False, in_bfloat16=on) for on in (False, True))
    fine, coarse = exact(state.parameters, *others), lowered(state.parameters, *others)
    rounded = exact(state.parameters.bfloat16().float(), *others)
    assert {each.dtype for each in coarse} == {torch.float32}
    torch.testing.assert_close(coarse[0], fine[0], rtol=0.01, atol=0)
    torch.testing.assert_close(coarse[2], fine[2], rtol=0.01, atol=0.01)
    assert 0.5 < (fine[1] - coarse[1]).norm() / (fine[1] - rounded[1]).norm() < 2


@pytest.mark.slow
def test_compiled_bfloat16_is_as_fine() -> None:
    """Compiled experts in bfloat16 end as near to float32's as uncompiled ones."""
    networks, lowered = make_networks(2, dtype=torch.float32), SGD.model_copy(update={"precision": "bfloat16"})
    expected = trained(networks, SGD, [0, 1])[0].parameters
    plain, compiled = (
        (trained(networks, lowered, [0, 1], compile_=on)[0].parameters - expected).norm() for on in (False, True)
    )
    assert 0 < 0.7 * plain < compiled < 1.4 * plain


STEADY, LOWERED = {"epochs": 4}, {"epochs": 4, "precision": "bfloat16"}


@pytest.mark.parametrize("change", [STEADY, LOWERED, {"epochs": 4, "schedule": "cosine", "warmup_epochs": 3}], ids=str)
def test_training_resumes_from_any_epoch_with_the_same_bits(change: dict[str, Any]) -> None:
    """Resuming from the state of any epoch gives bit-identical experts."""
    networks, seeds, settings = make_networks(2, dtype=torch.float32), [1, 2], RICH.model_copy(update=change)
    undisturbed, _ = trained(networks, settings, seeds)
    lowered = settings.precision == "bfloat16"
    functions = StackFunctions(networks[0], stacked=2, compile_=False, in_bfloat16=lowered)
    half = ExpertState.initial(networks)
    for _ in zip(range(2), expert_epochs(functions, *data(torch.float32), settings, seeds, half), strict=False):
        pass
    resumed = copy.deepcopy(half)
    assert (resumed.epoch, resumed.step) == (2, 6)
    assert len(list(expert_epochs(functions, *data(torch.float32), settings, seeds, resumed))) == 2
    assert torch.equal(resumed.parameters, undisturbed.parameters)
    assert torch.equal(resumed.velocity, undisturbed.velocity)  # type: ignore[arg-type]
    assert np.isfinite(resumed.parameters.numpy()).all()
