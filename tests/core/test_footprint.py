"""Memory told beforehand: small graphs counted by hand, and the affine law that larger ones are told by."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from datm_ray.core.footprint import (
    COMPILED_SHARE,
    IMAGE_COPIES,
    NETWORK_VECTORS,
    SET_COPIES,
    WORKSPACE_BYTES,
    CallCost,
    Footprint,
    call_bytes,
    call_cost,
    choose_chunk,
    flop,
    footprint,
    scoring_bytes,
)
from datm_ray.core.instance_norm import InstanceNorm
from datm_ray.core.networks import NetworkSpec, build_network
from datm_ray.core.parameters import FlatNetwork
from datm_ray.core.step_functions import StepOptions, StudentStepFunctions

MATRIX = 4 * 10 * 10
"""Bytes of the matrices below."""


def traced(function: Callable[..., Any], *shapes: tuple[int, ...]) -> fx.GraphModule:
    """The graph of a function of matrices, traced as the step functions are."""
    with FakeTensorMode():
        inputs = [torch.zeros(shape) for shape in shapes or ((10, 10), (10, 10))]
        graph: fx.GraphModule = make_fx(function)(*inputs)
    return graph


def planned(size: int, width: int, depth: int, channels: int = 3, classes: int = 10) -> StudentStepFunctions:
    """Functions whose graphs are those that would be compiled, without a compiler."""
    network = build_network(NetworkSpec("convnet", channels, (size, size), classes, width, depth), seed=0)
    options = StepOptions(compiled=False, order="reverse-over-forward")
    functions = StudentStepFunctions(FlatNetwork(network), options)
    for part in functions.network.module.modules():
        if isinstance(part, InstanceNorm):
            part.explicit = True
    return functions


@functools.cache
def cost_of(size: int, width: int, depth: int, channels: int = 3, classes: int = 10) -> CallCost:
    """What a call of these functions costs; tracing them takes seconds, so each is traced once."""
    return call_cost(planned(size, width, depth, channels, classes), (channels, size, size), classes)


def test_inputs_are_not_counted_and_views_share_their_memory() -> None:
    """Two products are two matrices, however often the first is viewed."""
    graph = traced(lambda a, b: (a @ b).view(2, 50).view(10, 10).t() @ b)
    assert call_bytes(graph) == call_bytes(graph, compiled=False) == 2 * MATRIX


def test_what_is_no_longer_needed_is_given_back() -> None:
    """A chain of products has two in memory at a time; the first is kept where its view is needed later."""
    assert call_bytes(traced(lambda a, b: a @ b @ b @ b @ b)) == 2 * MATRIX

    def keeping(a: Tensor, b: Tensor) -> Tensor:
        first = a @ b
        return first.t() + first @ b @ b @ b

    assert call_bytes(traced(keeping)) == 3 * MATRIX


def test_values_between_kernels_are_fused() -> None:
    """Compiled, sine and cosine are never in memory; one by one they are, beside what they are made from."""

    def fused(a: Tensor, b: Tensor) -> Tensor:
        c = a @ b
        return c.sin() + c.cos()

    assert call_bytes(traced(fused)) == 2 * MATRIX
    assert call_bytes(traced(fused), compiled=False) == 3 * MATRIX


def test_a_value_that_a_kernel_reads_is_written() -> None:
    """The product needs its argument in memory, beside what that was made from."""
    assert call_bytes(traced(lambda a, b: (a.sin() * 2) @ b)) == 2 * MATRIX


@pytest.mark.parametrize(("reads", "matrices"), [(4, 4 + 2), (5, 5 + 2)])
def test_a_value_of_many_reads_is_kept_instead_of_its_sources(reads: int, matrices: int) -> None:
    """Up to four sources stay and the sum is made again (4, sine, product); five become one (5, sum, sine)."""

    def summed(a: Tensor, b: Tensor) -> Tensor:
        total = functools.reduce(torch.add, [a @ b for _ in range(reads)])
        return total + total.sin() @ b

    assert call_bytes(traced(summed)) == matrices * MATRIX


def test_a_value_of_which_only_the_shape_is_read_is_given_back() -> None:
    """zeros_like does not keep its argument, and is nothing but a number in the sum."""

    def shaped(a: Tensor, b: Tensor) -> Tensor:
        c = a @ b
        return torch.zeros_like(c) + c @ b

    assert call_bytes(traced(shaped)) == 2 * MATRIX


def test_an_operation_in_place_takes_no_more_memory() -> None:
    """The product is scaled where it lies."""
    assert call_bytes(traced(lambda a, b: (a @ b).mul_(2) @ b)) == 2 * MATRIX


MAPS, WEIGHT = (2, 3, 4, 4), (5, 3, 3, 3)


def convolved(x: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.conv2d(x, w, padding=1)


def test_a_convolution_of_channels_last_maps_copies_its_weight() -> None:
    """The copy is counted, for a network's weights are views of one vector in the other order."""

    def convolved_last(x: Tensor, w: Tensor) -> Tensor:
        return convolved(x.contiguous(memory_format=torch.channels_last), w)

    maps, output, weight = 4 * 2 * 3 * 4 * 4, 4 * 2 * 5 * 4 * 4, 4 * 5 * 3 * 3 * 3
    assert call_bytes(traced(convolved, MAPS, WEIGHT)) == output
    assert call_bytes(traced(convolved_last, MAPS, WEIGHT)) == maps + output + weight


def test_multiply_adds_are_two_operations() -> None:
    """A product and a convolution, counted by hand; adding is not counted."""
    assert flop(traced(lambda a, b: a @ b + 1, (2, 3), (3, 4))) == 2 * 2 * 3 * 4
    assert flop(traced(convolved, MAPS, WEIGHT)) == 2 * (2 * 5 * 4 * 4) * (3 * 3 * 3)


def test_two_small_traces_tell_any_number_of_images() -> None:
    """Bytes are affine in each stage and operations proportional: as counted in a trace of that very size."""
    functions, cost = planned(16, width=8, depth=2), cost_of(16, 8, 2)
    for images in (1, 3, 40):
        graphs = functions.graphs(images, (3, 16, 16), 10)
        exact = WORKSPACE_BYTES + COMPILED_SHARE * max(call_bytes(graph) for graph in graphs)
        if images == 1:  # a single image has no memory order, and its weights no copies
            assert cost.bytes(1) >= int(exact)
        else:
            assert cost.bytes(images) == pytest.approx(exact, abs=2)
        assert (images * cost.forward_flop, images * cost.reverse_flop) == tuple(flop(graph) for graph in graphs)


@pytest.mark.parametrize(
    ("shape", "images", "measured"),
    [((32, 128, 3, 3, 10), 20, 81.5), ((32, 128, 3, 3, 10), 100, 402.4), ((8, 32, 2, 1, 10), 100, 6.7)],
)
def test_the_prediction_is_near_what_was_measured(
    shape: tuple[int, int, int, int, int], images: int, measured: float
) -> None:
    """Peak resident MiB of a compiled `reverse`: at most a tenth below, at most a quarter above."""
    assert 0.9 * measured <= cost_of(*shape).bytes(images) / 2**20 <= 1.25 * measured


def test_uncompiled_functions_take_more() -> None:
    """Without fusion, and with the graphs of derivatives kept, a call takes several times the memory."""
    plain = StudentStepFunctions(planned(16, 8, 2).network, StepOptions(compiled=False))
    uncompiled = call_cost(plain, (3, 16, 16), 10, compiled=False)
    assert uncompiled.bytes(100) > 2 * cost_of(16, 8, 2).bytes(100)


COST = CallCost(((1000.0, 100.0), (4000.0, 50.0)), forward_flop=1, reverse_flop=3)
"""Of two stages, equal at 60 images."""


def test_the_largest_number_of_images_fits_and_one_more_does_not() -> None:
    """Whichever stage takes most, and whatever lies beside each image."""
    assert (COST.bytes(0), COST.bytes(60), COST.bytes(61)) == (4000, 7000, 7100)
    for budget in (4050, 5000, 6999, 7000, 7001, 90_000):
        for beside in (0, 7):
            images = COST.largest(budget, beside)
            assert COST.bytes(images) + images * beside <= budget < COST.bytes(images + 1) + (images + 1) * beside
    assert COST.largest(4049) == COST.largest(-1) == 0
    constant = CallCost(((1000.0, 0.0), (0.0, 1.0)), forward_flop=1, reverse_flop=3)
    assert (constant.largest(999), constant.largest(1000)) == (0, 1000)


@pytest.mark.parametrize(
    ("batch", "budget", "cache", "chunk"),
    [
        (100, 1e9, None, 100),  # all of it where all fits
        (100, 1e9, 2000, 20),  # by the cache
        (10, 1e9, 2000, 10),  # never more than the batch
        (50, 1e9, 2000, 17),  # 17, 17, 16 and not 20, 20, 10
        (100, 1e9, 10, 1),  # a cache too small for one image
        (100, 9000, None, 13),  # 50 bytes and the images beside, 312, for each image over the 4000 of the second stage
        (100, float("inf"), None, 100),  # without a limit
        (100, 4000, None, 0),  # which do not fit without an image
    ],
)
def test_the_chunk_is_even_and_within_batch_budget_and_cache(
    batch: int, budget: float, cache: int | None, chunk: int
) -> None:
    """One row per rule."""
    assert 4 * IMAGE_COPIES * (3 + 10) == 312
    assert choose_chunk(COST, (1, 1, 3), 10, batch, budget, cache) == chunk


def test_convnet_3_computes_about_twenty_images_at_a_time() -> None:
    """What was measured fastest is what the constant gives, in parts of one size."""
    cost = cost_of(32, 128, 3, 3, 10)
    assert choose_chunk(cost, (3, 32, 32), 10, batch=100, budget=2**34) == 20
    assert 18 <= choose_chunk(cost, (3, 32, 32), 10, batch=500, budget=2**34) <= 24


def test_parts_are_counted_and_the_larger_of_two_phases_is_the_total() -> None:
    """By hand; matching and scoring are never at the same time."""
    parts = footprint(parameters=10, steps=4, images=6, image=(1, 2, 2), classes=3, call=5000, chunk=2, process=100)
    assert parts == Footprint(
        process=100,
        synthetic=SET_COPIES * 6 * 28,
        network=NETWORK_VECTORS * 40,
        trace=5 * 40,
        call=5000 + IMAGE_COPIES * 2 * 28,
    )
    assert parts.total == sum((parts.process, parts.synthetic, parts.network, parts.trace, parts.call))
    assert parts.largest_part == "call"
    scored = footprint(
        parameters=10, steps=4, images=6, image=(1, 2, 2), classes=3, call=50, chunk=2, process=100, scoring=9000
    )
    assert scored.total == 100 + parts.synthetic + parts.network + 9000
    assert scored.largest_part == "scoring"


def test_scoring_holds_the_largest_map_before_and_after_a_layer() -> None:
    """1,000 images: two maps of width 4; training on few images takes less."""
    network = FlatNetwork(build_network(NetworkSpec("convnet", 1, (8, 8), 10, width=4, depth=1), seed=0))
    two_maps = 2 * 4 * 1000 * 4 * 8 * 8
    assert two_maps <= scoring_bytes(network, (1, 8, 8), 10, training_batch=10, scoring_batch=1000) <= 1.05 * two_maps
    assert scoring_bytes(network, (1, 8, 8), 10, training_batch=1000, scoring_batch=1000) > 1.5 * two_maps
