"""Tests experts that are computed one after another by one CUDA graph, and the trial that chooses it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from datm_ray.config import ExpertConfig, NetworkSpec
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stack_trial import TURNS, OneByOne, fastest
from datm_ray.core.networks.stacked import StackFunctions, StackStep
from datm_ray.core.training.experts import ExpertState, train_experts
from tests.tapes import Tape

SPEC = NetworkSpec(channels=3, size=(8, 8), classes=4, width=4, depth=2)


def trained(make: Callable[[], StackStep], optimiser: str) -> tuple[Tensor, list[Tensor]]:
    """Parameters and losses of three experts after two epochs of three batches; the last batch is smaller."""
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(20, 3, 8, 8, generator=draw).double(), torch.arange(20) % 4
    state = ExpertState.initial([build_network(SPEC, seed).double() for seed in range(3)])
    settings = ExpertConfig(epochs=2, batch_size=8, optimiser=optimiser, momentum=0.9)
    losses = [each.clone() for each in train_experts(make(), images, labels, settings, [5, 6, 7], state)]
    return state.parameters, losses


@pytest.mark.parametrize("optimiser", ["sgd", "gsam"])
def test_experts_one_by_one_equal_those_of_a_stack(tapes: list[Tape], optimiser: str) -> None:
    """One graph, replayed for each expert with its own parameters and images, gives a stack's experts to 1e-12."""
    network = build_network(SPEC, 0).double()
    single, stack = (StackFunctions(network, stacked=size, compile_=False) for size in (1, 3))
    parameters, losses = trained(lambda: OneByOne(single), optimiser)
    expected, expected_losses = trained(lambda: stack, optimiser)
    torch.testing.assert_close(parameters, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-13)
    assert [tape.replays for tape in tapes] == [3 * 2 * 3 * (1 + (optimiser == "gsam"))]


class Clock:
    """Time in seconds, which calls let pass."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[int]()

    def way(self, key: int, seconds: list[float]) -> Callable[[], None]:
        """A call that takes these seconds, in turn, and the first ones for compiling."""
        left = iter([100.0, *seconds])

        def call() -> None:
            self.calls.append(key)
            self.now += next(left)

        return call


@pytest.mark.parametrize(("stack", "single", "expected"), [([2, 2, 2], [3, 3, 3], 8), ([4, 4, 4], [9, 3, 9], 1)])
def test_the_fastest_way_is_found_without_its_compilation(
    stack: list[float], single: list[float], expected: int
) -> None:
    """Ways take turns, the first calls do not count, and the fastest call of each decides."""
    clock = Clock()
    ways = {8: clock.way(8, stack), 1: clock.way(1, single)}
    assert fastest(ways, lambda: clock.now) == expected
    assert clock.calls == [8, 1] * (1 + TURNS)


def test_what_does_not_fit_into_memory_is_not_taken() -> None:
    """A stack that is too large leaves one network at a time; without either, memory is the error."""
    clock = Clock()

    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert fastest({8: too_large, 1: clock.way(1, [9, 9, 9])}, lambda: clock.now) == 1
    with pytest.raises(torch.OutOfMemoryError, match="neither a stack of networks nor one network"):
        fastest({8: too_large, 1: too_large}, lambda: clock.now)
