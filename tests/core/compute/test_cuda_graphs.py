"""Tests CUDA graphs without a GPU: a fake records the operations of a call and plays them on the same memory."""

from __future__ import annotations

import gc
import logging
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from datm_ray.config import NetworkSpec
from datm_ray.core.compute.cuda_graphs import Replayed
from datm_ray.core.networks.image_cost import image_cost
from datm_ray.core.networks.parameters import FlatNetwork, flatten
from datm_ray.core.networks.registry import build_network
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.methods.trajectory import step_functions
from datm_ray.methods.trajectory.matching import MatchingGradient, draw_student_steps, matching_gradient, place_steps
from datm_ray.methods.trajectory.step_functions import Order, StepOptions, StudentStepFunctions
from datm_ray.stages.methods.memory import chunk_by_trial
from tests.tapes import Tape

SPEC = NetworkSpec(channels=3, size=(8, 8), classes=4, width=4, depth=2)


def test_a_replay_computes_the_results_of_new_arguments_in_new_memory(tapes: list[Tape]) -> None:
    """Every call copies its arguments in and its results out, so that earlier results and arguments stay."""
    single, double = Replayed(lambda x, y: (x @ y).relu()), Replayed(lambda x, y: (x + y, [x * y][0]))
    calls = [(torch.randn(3, 3), torch.randn(3, 3)) for _ in range(4)]
    before = [(x.clone(), y.clone()) for x, y in calls]
    products, pairs = [single(*call) for call in calls], [double(*call) for call in calls]
    assert [tape.replays for tape in tapes] == [4, 4]
    for product, pair, (x, y), given in zip(products, pairs, before, calls, strict=True):
        assert torch.equal(product, (x @ y).relu())
        assert torch.equal(pair[0], x + y)
        assert torch.equal(pair[1], x * y)
        assert torch.equal(torch.stack(given), torch.stack((x, y)))


def test_a_function_that_cannot_be_recorded_runs_as_without(
    tapes: list[Tape], caplog: pytest.LogCaptureFixture
) -> None:
    """A function that reads a value is logged in one line and computed by itself; short memory is an error."""
    reading = Replayed(lambda x: x * float(x.sum()))
    with caplog.at_level(logging.WARNING):
        assert [reading(torch.full((2,), value)).tolist() for value in (1.0, 2.0)] == [[2.0, 2.0], [8.0, 8.0]]
    (record,) = caplog.records
    assert "no CUDA graphs" in record.getMessage()
    assert "not permitted when stream is capturing" in record.getMessage()
    assert [tape.replays for tape in tapes] == [0]

    def too_large(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Replayed(too_large)(torch.zeros(1))


def test_small_calls_are_replayed_on_a_gpu_unless_the_recipe_says_otherwise(
    tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default calls of little work are replayed, on GPUs alone; true replays all, and false none."""
    network = FlatNetwork(build_network(SPEC, 0))
    monkeypatch.setattr(step_functions, "REPLAYED_FLOP", 3 * image_cost(network.module, (3, 8, 8)).flop)

    def replayed(graphs: bool | None) -> list[int]:
        tapes.clear()
        functions = StudentStepFunctions(network, StepOptions(compiled=False, graphs=graphs))
        found = []
        for images in (2, 3, 4):
            before = len(tapes)
            x = torch.zeros(images, 3, 8, 8)
            functions.forward(flatten(network.module), x, torch.zeros(images, 4), torch.ones(images))
            found += [images] * (len(tapes) - before)
        return found

    assert replayed(None) == []  # tensors of a CPU
    monkeypatch.setattr(step_functions, "_can_replay", lambda x: True)
    assert [replayed(each) for each in (None, True, False)] == [[2, 3], [2, 3, 4], []]


def test_a_trial_that_does_not_fit_leaves_no_graph(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions forget the graphs of a size that runs out of memory, so that nothing keeps the graphs' memory."""
    for name in ("empty_cache", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    plan = SimpleNamespace(chunk=8, budget=100, parts={"trace": 1, "block": 0})
    functions = StudentStepFunctions(FlatNetwork(build_network(SPEC, 0)), StepOptions(compiled=False, graphs=True))
    recorded: list[weakref.ref[Tape]] = []

    def step(chunk: int) -> None:
        theta, x = flatten(functions.network.module), torch.zeros(chunk, 3, 8, 8)
        functions.forward(theta, x, torch.zeros(chunk, 4), torch.ones(chunk))
        recorded.extend(map(weakref.ref, tapes))
        tapes.clear()
        if chunk > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    found = chunk_by_trial(step, plan, torch.device("cpu"), functions.forget)  # type: ignore[arg-type]
    assert found == 2
    gc.collect()
    assert [each() is not None for each in recorded] == [False, False, True]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", ["reverse-over-forward", "reverse-over-reverse"])
def test_matching_gradients_of_replayed_steps_have_equal_bits(tapes: list[Tape], order: Order, precision: Any) -> None:
    """Three iterations with replayed steps, in chunks of several sizes, have the bits of plain steps."""
    network, draw = FlatNetwork(build_network(SPEC, 0)), torch.Generator().manual_seed(0)
    start = flatten(network.module)
    target = start + 0.1 * torch.randn(start.shape, generator=draw)
    images, labels = torch.randn(7, 3, 8, 8, generator=draw), torch.randn(7, 4, generator=draw)
    held = SyntheticSet(images, labels, torch.tensor([0.05]), torch.arange(7) % 4)

    def gradients(*, graphs: bool) -> list[MatchingGradient]:
        options = StepOptions(compiled=False, order=order, precision=precision, graphs=graphs)
        functions = StudentStepFunctions(network, options)
        steps = [draw_student_steps(7, 4, 5, "crop_scale_flip", 1, iteration) for iteration in range(3)]
        chunks = (None, 3, 3)
        return [
            matching_gradient(functions, start, target, held, place_steps(each, chunk, images))
            for each, chunk in zip(steps, chunks, strict=True)
        ]

    for replayed, plain in zip(gradients(graphs=True), gradients(graphs=False), strict=True):
        assert replayed.loss == plain.loss
        assert torch.equal(replayed.images, plain.images)
        assert torch.equal(replayed.soft_labels, plain.soft_labels)
        assert torch.equal(replayed.step_size, plain.step_size)
    # Both functions of 2, 5 and 3 images. The first iteration has two steps of each of the first two sizes.
    assert [tape.replays for tape in tapes] == [2, 2, 2, 2, 12, 12]
