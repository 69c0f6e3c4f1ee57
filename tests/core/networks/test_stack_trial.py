"""Tests experts that are computed one after another by one CUDA graph, and the trial that chooses it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.epochs import expert_epochs
from datm_ray.config import ExpertConfig, NetworkSpec
from datm_ray.core.compute.gpu import GPU_SHARE
from datm_ray.core.networks.image_cost import ImageCost
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stack_trial import (
    STATE_VECTORS,
    TURNS,
    InParts,
    StackStep,
    beside_state,
    fastest,
    fitting,
    found_at_a_time,
)
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.core.training.experts import ExpertState
from tests.tapes import Tape

SPEC = NetworkSpec(channels=3, size=(8, 8), classes=4, width=4, depth=2)


def trained(make: Callable[[], StackStep], optimiser: str) -> tuple[Tensor, list[Tensor]]:
    """Parameters and losses of three experts after two epochs of three batches; the last batch is smaller."""
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(20, 3, 8, 8, generator=draw).double(), torch.arange(20) % 4
    state = ExpertState.initial([build_network(SPEC, seed).double() for seed in range(3)])
    settings = ExpertConfig(epochs=2, batch_size=8, optimiser=optimiser, momentum=0.9)
    losses = [each.clone() for each in expert_epochs(make(), images, labels, settings, [5, 6, 7], state)]
    return state.parameters, losses


@pytest.mark.parametrize(("at_a_time", "calls"), [(1, [3]), (2, [1, 1]), (3, [1])])
@pytest.mark.parametrize("optimiser", ["sgd", "gsam"])
def test_experts_in_parts_equal_those_of_a_stack(
    tapes: list[Tape], optimiser: str, at_a_time: int, calls: list[int]
) -> None:
    """One graph for each size of a part, replayed with each part's parameters and images, gives a stack's experts."""
    network = build_network(SPEC, 0).double()
    part, stack = (StackFunctions(network, stacked=size, compile_=False) for size in (at_a_time, 3))
    parameters, losses = trained(lambda: InParts(part, at_a_time), optimiser)
    expected, expected_losses = trained(lambda: stack, optimiser)
    torch.testing.assert_close(parameters, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-12, atol=1e-13)
    assert [tape.replays for tape in tapes] == [each * 2 * 3 * (1 + (optimiser == "gsam")) for each in calls]


def test_a_graph_that_does_not_fit_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of parts of another size are freed, because the next, smaller try needs their memory."""
    recorded: list[int] = []

    def replayed(functions: object) -> Callable[..., tuple[Tensor, ...]]:
        def call(parameters: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
            recorded.append(len(parameters))
            if len(recorded) == 2:
                raise torch.OutOfMemoryError
            return parameters, parameters, parameters

        return call

    monkeypatch.setattr("datm_ray.core.networks.stack_trial.Replayed", replayed)
    step = InParts(StackFunctions(build_network(SPEC, 0), stacked=3, compile_=False), 3)
    with pytest.raises(torch.OutOfMemoryError):
        step(*[torch.zeros(5, 2)] * 5)
    assert recorded == [3, 2]
    assert step._graphs == {}


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


def test_a_trial_leaves_memory_for_the_momenta_of_the_whole_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a call is tried, vectors for the state of all networks are allocated; if they do not fit, it does not."""
    sizes, real = list[int](), torch.empty

    def allocate(*shape: int, **options: Any) -> Tensor:
        made = real(*shape, **options)
        sizes.append(made.nbytes)
        weakref.finalize(made, sizes.remove, made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", allocate)
    parameters, seen = torch.zeros(6, 5), list[int]()
    assert beside_state(lambda: seen.append(sum(sizes)) or "result", parameters)() == "result"
    assert seen == [STATE_VECTORS * parameters.nbytes]
    assert sizes == [], "the memory is free again after the call"
    monkeypatch.setattr(torch, "empty", raise_short_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        beside_state(lambda: seen.append(0), parameters)()
    assert len(seen) == 1


def raise_short_of_memory(*_: object, **__: object) -> None:
    """Allocate nothing."""
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_what_does_not_fit_into_memory_is_not_taken() -> None:
    """A stack that is too large leaves one network at a time; without either, memory is the error."""
    clock = Clock()

    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert fastest({8: too_large, 1: clock.way(1, [9, 9, 9])}, lambda: clock.now) == 1
    with pytest.raises(torch.OutOfMemoryError, match="neither a stack of networks nor one network"):
        fastest({8: too_large, 1: too_large}, lambda: clock.now)


CPU = torch.device("cpu")


def test_a_stack_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack is halved by its expected memory, then by trial; what fits is compared with one network at a time."""
    cost = ImageCost(maps=100, largest=50, flop=1, functions=1, parameters=10)
    call, state = 2 * 10 * 100 + 4 * 4 * 10, 8 * 4 * 4 * 10  # of a network in a call, of the whole stack
    for needed, expected in ((1e9, 8), (8 * call + state, 8), (8 * call + state - 1, 4), (3 * call + state, 2), (0, 1)):
        free = needed / GPU_SHARE * (1 + 1e-9)
        monkeypatch.setattr("datm_ray.core.networks.stack_trial.free_gpu_memory", lambda free=free: free)
        assert fitting(8, 10, cost) == expected, "momenta and new parameters are those of all networks, in any part"
    tried, given = list[int](), [torch.zeros(1, 1)]

    def step_of(size: int, most: int = 3) -> Callable[[Tensor], None]:
        def step(parameters: Tensor) -> None:
            tried.append(size)
            if size > most:
                raise torch.OutOfMemoryError("CUDA out of memory")

        return step

    monkeypatch.setattr("datm_ray.core.networks.stack_trial.fastest", lambda ways, now: -len(ways))
    assert found_at_a_time(step_of, given, 5, CPU) == -2
    assert tried == [5, 3]
    assert found_at_a_time(lambda size: step_of(size, 1), given, 5, CPU) == -1, "one at a time has no rival"
    assert found_at_a_time(step_of, given, 8, None) == 2, "nothing is timed"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert found_at_a_time(step_of, given, 8, CPU) == 2, "a timing would differ from run to run"
