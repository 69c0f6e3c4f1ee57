"""Tests the exact gradient against full unrolling, finite differences and its own compiled form."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from datm_ray.config import PUBLISHED_AUGMENTATION, DistillConfig, NetworkSpec, PriorConfig
from datm_ray.core.images.augment import apply_operation, augment, draw_augmentation
from datm_ray.core.networks.parameters import FlatNetwork, flatten
from datm_ray.core.networks.registry import build_network
from datm_ray.core.prior import Prior, build_decoder, draw_latents
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.methods.trajectory import matching
from datm_ray.methods.trajectory.iteration import Match, MatchingState, Origin
from datm_ray.methods.trajectory.matching import (
    MatchingGradient,
    PlacedSteps,
    StudentStep,
    draw_student_steps,
    first_matched,
    first_shown,
    identity,
    matching_gradient,
    place_steps,
)
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions, soft_cross_entropy
from datm_ray.runtime.machine.devices import restoring_settings

OPERATIONS = PUBLISHED_AUGMENTATION.split("_")
SETTINGS = DistillConfig(
    learning_rate_images=1.0,
    learning_rate_labels=1.0,
    learning_rate_step_size=1e-3,
    threshold=100.0,
    gradient_limit=None,
)


def make_problem(
    *, channels: int = 3, size: int = 8, width: int = 6, classes: int = 4, ipc: int = 3, seed: int = 0
) -> tuple[FlatNetwork, Tensor, Tensor, SyntheticSet]:
    """A float64 ConvNet, two parameter vectors and a synthetic set."""
    spec = NetworkSpec(channels=channels, size=(size, size), classes=classes, width=width, depth=2)
    module = build_network(spec, seed).double()
    start = flatten(module)
    draw = torch.Generator().manual_seed(seed)
    target = start + 0.05 * torch.randn(start.shape, generator=draw, dtype=torch.float64)
    images = torch.randn(classes * ipc, channels, size, size, generator=draw, dtype=torch.float64)
    soft_labels = 3 * torch.randn(classes * ipc, classes, generator=draw, dtype=torch.float64)
    labels = torch.arange(classes).repeat_interleave(ipc)
    return FlatNetwork(module), start, target, SyntheticSet(images, soft_labels, torch.tensor([0.1]).double(), labels)


def eager(network: FlatNetwork) -> StudentStepFunctions:
    return StudentStepFunctions(network, StepOptions(compiled=False))


def gradient_of(
    functions: StudentStepFunctions,
    start: Tensor,
    target: Tensor,
    synthetic: SyntheticSet,
    steps: Sequence[StudentStep],
    *,
    chunk: int | None = None,
    **options: Any,
) -> MatchingGradient:
    """Matching gradient of minibatches, which are cut into pieces of at most `chunk` images; `None` for whole ones."""
    return matching_gradient(functions, start, target, synthetic, place_steps(steps, chunk, start), **options)


def unrolled(
    network: FlatNetwork,
    start: Tensor,
    target: Tensor,
    synthetic: SyntheticSet,
    steps: list[StudentStep],
    first: int = 0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients through the whole graph, as the published code computes them."""
    learned = [t.clone().requires_grad_() for t in (synthetic.images, synthetic.soft_labels, synthetic.step_size)]
    matching = unrolled_loss(network, start, target, learned, steps, first)
    return matching.detach(), torch.autograd.grad(matching, learned)


def unrolled_loss(
    network: FlatNetwork, start: Tensor, target: Tensor, learned: list[Tensor], steps: list[StudentStep], first: int = 0
) -> Tensor:
    """Loss as a function of images, soft labels and step size, with the whole graph."""
    images, soft_labels, step_size = learned
    theta = start.clone().requires_grad_()
    for step in steps:
        x = augment(images[step.rows], step.augmentation)
        weights = torch.full((len(step.rows),), 1 / len(step.rows), dtype=x.dtype)
        loss = soft_cross_entropy(network(theta, x), soft_labels[step.rows], weights)
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - step_size * gradient
    return (theta - target)[first:].square().sum() / (start - target)[first:].square().sum()


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def parts(gradient: MatchingGradient) -> tuple[Tensor, Tensor, Tensor]:
    return gradient.images, gradient.soft_labels, gradient.step_size


@pytest.mark.parametrize("operation", ["", *OPERATIONS, PUBLISHED_AUGMENTATION, "resized+flip_crop_color+crop"])
def test_gradient_equals_full_unrolling(operation: str) -> None:
    """Loss and gradients equal the unrolled graph's, with every augmentation."""
    network, start, target, synthetic = make_problem()
    steps = draw_student_steps(12, 7, 5, operation, seed=1, iteration=3)
    functions = eager(network)
    ours = gradient_of(functions, start, target, synthetic, steps)
    loss, reference = unrolled(network, start, target, synthetic, steps)
    assert ours.loss == pytest.approx(float(loss), rel=1e-12)
    for value, expected in zip(parts(ours), reference, strict=True):
        assert relative_error(value, expected) < 1e-10


@pytest.mark.parametrize(("steps", "batch"), [(7, 5), (1, 5), (3, 12), (2, 40)])
def test_images_are_first_shown_as_the_student_first_sees_them(steps: int, batch: int) -> None:
    """An image has its augmentation of the first student step with it; images of no step have one operation."""
    drawn = draw_student_steps(12, steps, batch, PUBLISHED_AUGMENTATION, seed=4, iteration=6)
    rows = np.array([0, 2, 3, 5, 8, 11])
    found = first_shown(rows, 12, steps, batch, PUBLISHED_AUGMENTATION, seed=4, iteration=6)
    unseen = []
    for row, one in zip(rows, found, strict=True):
        step = next((each for each in drawn if row in each.rows), None)
        if step is None:
            unseen.append(one)
            continue
        expected = step.augmentation.take(np.flatnonzero(step.rows == row))
        assert (one.operation, one.parameters.tolist()) == (expected.operation, expected.parameters.tolist())
    assert len({one.operation for one in unseen}) == (steps == 1)
    assert len({one.parameters.tobytes() for one in found}) == len(rows)
    (single,) = first_shown(rows[2:3], 12, steps, batch, PUBLISHED_AUGMENTATION, seed=4, iteration=6)
    assert single.parameters.tolist() == found[2].parameters.tolist()


def test_gradient_in_latents_equals_full_unrolling_through_a_decoder() -> None:
    """With a prior, an iteration moves latents and labels along the gradients of one graph, through the decoder too."""
    network, start, target, synthetic = make_problem(channels=1)
    steps = draw_student_steps(12, 4, 5, "crop_flip", seed=1, iteration=3)
    decoder = build_decoder(PriorConfig(channels=2, width=4), (1, 8, 8), seed=0).double()
    prior = Prior.of(decoder, torch.nn.Identity(), chunk=5)
    latents = torch.from_numpy(draw_latents((12, 2, 2, 2), seed=0)).double()
    state = MatchingState(
        dataclasses.replace(synthetic, images=prior.render(latents), latents=latents.clone()), SETTINGS
    )
    state.prior = prior
    state.step([Match(eager(network), start, target, place_steps(steps, None, start))], [Origin(0, 0)])
    leaf, soft_labels = latents.clone().requires_grad_(), synthetic.soft_labels.clone().requires_grad_()
    learned = [prior.network(leaf), soft_labels, synthetic.step_size.clone()]
    expected = torch.autograd.grad(unrolled_loss(network, start, target, learned, steps), (leaf, soft_labels))
    assert relative_error(state.momenta["images"], expected[0]) < 1e-10
    assert relative_error(state.momenta["soft_labels"], expected[1]) < 1e-10
    assert relative_error(latents - state.synthetic.variable("images"), expected[0]) < 1e-9
    assert torch.equal(state.synthetic.images, prior.render(state.synthetic.variable("images")))


@pytest.mark.parametrize("share", [0.25, 0.6, 0.999])
def test_gradient_without_shallow_parameters_equals_full_unrolling(share: float) -> None:
    """With the first parameters left out of both norms, loss and gradients equal the unrolled graph's."""
    network, start, target, synthetic = make_problem()
    first = first_matched(len(start), share)
    assert 0 < first < len(start)
    steps = draw_student_steps(12, 7, 5, PUBLISHED_AUGMENTATION, seed=1, iteration=3)
    ours = gradient_of(eager(network), start, target, synthetic, steps, first=first, chunk=2)
    loss, reference = unrolled(network, start, target, synthetic, steps, first)
    assert ours.loss == pytest.approx(float(loss), rel=1e-12)
    for value, expected in zip(parts(ours), reference, strict=True):
        assert relative_error(value, expected) < 1e-10
    whole = gradient_of(eager(network), start, target, synthetic, steps)
    assert relative_error(ours.images, whole.images) > 0.01  # the parameters left out count in the whole loss


def test_shallow_parameters_are_trained_though_they_are_not_matched() -> None:
    """A student whose first parameters are held still reaches another loss than one that trains all of them."""
    network, start, target, synthetic = make_problem()
    steps = draw_student_steps(12, 7, 5, "", seed=1, iteration=3)
    first, functions = first_matched(len(start), 0.5), eager(network)
    whole = gradient_of(functions, start, target, synthetic, steps, first=first)
    trained = functions.forward

    def held(theta: Tensor, *arguments: Tensor) -> Tensor:
        return trained(theta, *arguments).index_fill(0, torch.arange(first), 0.0)

    functions.forward = held  # type: ignore[method-assign]
    part = gradient_of(functions, start, target, synthetic, steps, first=first, skip_above=0.0)
    assert part.loss != pytest.approx(whole.loss, rel=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_gradient_equals_finitedifferences(share: float) -> None:
    """Directional derivatives in all three variables equal central differences of the loss."""
    network, start, target, synthetic = make_problem(channels=1, width=3, classes=3, ipc=2)
    steps = draw_student_steps(6, 4, 4, "color_crop_flip_scale_rotate", seed=2, iteration=0)
    functions, first = eager(network), first_matched(len(start), share)
    ours = gradient_of(functions, start, target, synthetic, steps, first=first)
    draw = torch.Generator().manual_seed(5)
    for name in ("images", "soft_labels", "step_size"):
        value = getattr(synthetic, name)
        direction = torch.randn(value.shape, generator=draw, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            moved = synthetic.clone()
            getattr(moved, name).add_(sign * 1e-5 * direction)
            losses.append(gradient_of(functions, start, target, moved, steps, first=first).loss)
        numeric = (losses[0] - losses[1]) / 2e-5
        assert float((getattr(ours, name) * direction).sum()) == pytest.approx(numeric, rel=1e-5)


@pytest.mark.parametrize("strategy", [PUBLISHED_AUGMENTATION, "resized+flip_crop"])
@pytest.mark.parametrize("chunk", [1, 3, 4, 12])
def test_chunks_of_any_size_give_the_same_gradient(chunk: int, strategy: str) -> None:
    """Micro-batches of any size, also padded with images of weight zero, change rounding only."""
    network, start, target, synthetic = make_problem()
    steps = draw_student_steps(12, 4, 5, strategy, seed=1, iteration=2)
    functions = eager(network)
    whole = gradient_of(functions, start, target, synthetic, steps)
    chunked = gradient_of(functions, start, target, synthetic, steps, chunk=chunk)
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-13)
    for value, expected in zip(parts(chunked), parts(whole), strict=True):
        assert relative_error(value, expected) < 1e-12


def step_by_step(
    functions: StudentStepFunctions,
    start: Tensor,
    target: Tensor,
    synthetic: SyntheticSet,
    steps: PlacedSteps,
    first: int = 0,
) -> tuple[Tensor, ...]:
    """Loss and gradient with every piece of a minibatch augmented, and differentiated so, in calls of its own."""

    def filled_up(x: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
        missing = size - len(x)
        return pad(x, (0, 0) * 3 + (0, missing)), pad(y, (0, 0, 0, missing))

    images, soft_labels = torch.zeros_like(synthetic.images), torch.zeros_like(synthetic.soft_labels)
    trace, step_size = [start], synthetic.step_size
    for pieces in steps:
        g = torch.zeros_like(start)
        for piece in pieces:
            x = apply_operation(synthetic.images[piece.rows], piece.operation, piece.uniform)
            x, y = filled_up(x, synthetic.soft_labels[piece.rows], len(piece.weights))
            g += functions.forward(trace[-1], x, y, piece.weights)
        trace.append(trace[-1] - step_size * g)
    distance, gap = (start - target)[first:].square().sum(), trace.pop() - target
    gap[:first] = 0
    v, d_step_size = 2 * gap / distance, torch.zeros_like(step_size)
    for pieces in reversed(steps):
        theta = trace.pop()
        total, d_alpha = torch.zeros_like(start), torch.zeros_like(step_size)
        for piece in pieces:
            raw = synthetic.images[piece.rows].requires_grad_()
            x = apply_operation(raw, piece.operation, piece.uniform)
            filled = filled_up(x.detach(), synthetic.soft_labels[piece.rows], len(piece.weights))
            s, d_theta, d_x, d_y = functions.reverse(theta, *filled, piece.weights, v)
            total += d_theta
            d_alpha += s
            images[piece.rows] += torch.autograd.grad(x, raw, d_x[: len(raw)])[0]
            soft_labels[piece.rows] += d_y[: len(raw)]
        d_step_size -= d_alpha
        v = v - step_size * total
    return gap.square().sum() / distance, images.mul_(-step_size), soft_labels.mul_(-step_size), d_step_size


@pytest.mark.parametrize(
    ("channels", "chunk", "dtype", "in_order"),
    [
        (1, None, torch.float32, True),
        (3, None, torch.float32, False),
        (3, 2, torch.float32, True),
        (1, 3, torch.float64, False),
    ],
)
def test_steps_that_are_augmented_together_have_the_bits_of_each_alone(
    channels: int, chunk: int | None, dtype: torch.dtype, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of any size give the loss and gradients of steps augmented one by one, also with padded pieces."""
    network, start, target, synthetic = make_problem(channels=channels)
    network = FlatNetwork(network.module.to(dtype))
    start, target = start.to(dtype), target.to(dtype)
    learned = {name: getattr(synthetic, name).to(dtype) for name in ("images", "soft_labels", "step_sizes")}
    synthetic = dataclasses.replace(synthetic, **learned)
    strategy = f"{PUBLISHED_AUGMENTATION}_resized+flip"
    drawn, color, plain = (draw_student_steps(12, 8, 5, each, seed=1, iteration=3) for each in (strategy, "color", ""))
    functions = eager(network)
    image = synthetic.images[0].numel() * synthetic.images.element_size()
    with restoring_settings():
        torch.use_deterministic_algorithms(in_order)
        for steps in (color[:3] + drawn + plain[:2], [each.held_by(0, 7) for each in drawn]):
            placed = place_steps(steps, chunk, synthetic.images)
            expected = step_by_step(functions, start, target, synthetic, placed, first=5)
            for most in (0, 11, 1000):
                monkeypatch.setattr(matching, "CPU_BLOCK_BYTES", most * image)
                found = matching_gradient(functions, start, target, synthetic, placed, first=5)
                assert found.loss == float(expected[0])
                assert all(map(torch.equal, parts(found), expected[1:])), most


class OnGpu(Tensor):
    """A tensor in main memory that claims to be on a GPU."""

    device = torch.device("cuda", 0)  # type: ignore[assignment]


def test_rows_that_come_repeatedly_add_up_on_a_gpu_too() -> None:
    """The operation for GPUs adds values to rows as the one for CPUs does, also to the same row and in any order."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(7, 2, 3, dtype=torch.float64, generator=draw).transpose(1, 2)
    rows = torch.tensor([3, 0, 3, 1, 0, 3, 1])
    totals = [torch.ones(5, 3, 2, dtype=torch.float64) for _ in range(2)]
    matching._add_rows(totals[0], rows, values)
    matching._add_rows(totals[1].as_subclass(OnGpu), rows, values)
    expected = torch.ones(5, 3, 2, dtype=torch.float64)
    for row, value in zip(rows.tolist(), values, strict=True):
        expected[row] += value
    assert torch.equal(totals[0], expected)
    torch.testing.assert_close(totals[1], expected, rtol=1e-14, atol=1e-14)


def test_large_images_keep_their_bits_with_several_threads() -> None:
    """Steps of one large image, whose mean several threads compute, give the bits of each step augmented alone."""
    network, start, target, synthetic = make_problem(size=105, width=2, ipc=1)
    network, start, target = FlatNetwork(network.module.float()), start.float(), target.float()
    learned = {name: getattr(synthetic, name).float() for name in ("images", "soft_labels", "step_sizes")}
    synthetic = dataclasses.replace(synthetic, **learned)
    placed = place_steps(draw_student_steps(4, 6, 1, "color", seed=1, iteration=3), None, synthetic.images)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = step_by_step(eager(network), start, target, synthetic, placed)
        found = matching_gradient(eager(network), start, target, synthetic, placed)
    finally:
        torch.set_num_threads(threads)
    assert found.loss == float(expected[0])
    assert all(map(torch.equal, parts(found), expected[1:]))


def test_steps_are_augmented_once_for_each_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient calls each operation once for all its steps; with blocks of one step, twice for each step."""
    network, start, target, synthetic = make_problem()
    steps = draw_student_steps(12, 12, 12, PUBLISHED_AUGMENTATION, seed=1, iteration=3)
    called: list[str] = []

    def counted(images: Tensor, operation: str, uniform: Tensor) -> Tensor:
        called.append(operation)
        return apply_operation(images, operation, uniform)

    monkeypatch.setattr(matching, "apply_operation", counted)
    gradient_of(eager(network), start, target, synthetic, steps)
    assert sorted(called) == sorted({step.augmentation.operation for step in steps})
    called.clear()
    monkeypatch.setattr(matching, "CPU_BLOCK_BYTES", synthetic.images.nbytes)
    gradient_of(eager(network), start, target, synthetic, steps)
    assert len(called) == 2 * len(steps) - 1  # the reverse sweep starts with the last step's


class Barrier:
    """Adds tensors over threads; the sum is taken in one order, so every thread gets the same bits."""

    def __init__(self, size: int) -> None:
        self._barrier, self._slots = threading.Barrier(size), [torch.empty(0)] * size

    def all_sum(self, rank: int, tensor: Tensor) -> Tensor:
        self._slots[rank] = tensor
        self._barrier.wait(timeout=60)
        total = torch.stack(self._slots).sum(dim=0)
        self._barrier.wait(timeout=60)
        return total


@pytest.mark.parametrize("bounds", [(0, 12), (0, 5, 12), (0, 3, 6, 9, 12), (0, 1, 2, 3, 12)])
@pytest.mark.parametrize(("batch", "share"), [(12, 0.0), (4, 0.0), (4, 0.3)])
def test_class_shards_add_up_to_one_process(bounds: tuple[int, ...], batch: int, share: float) -> None:
    """Shards of the classes, even or not, add up to the gradient of one process to 1e-12 in float64."""
    network, start, target, synthetic = make_problem()
    whole_steps = draw_student_steps(12, 4, batch, "crop", seed=1, iteration=0)
    matched = first_matched(len(start), share)
    whole = gradient_of(eager(network), start, target, synthetic, whole_steps, first=matched)
    ranges = list(itertools.pairwise(bounds))
    barrier = Barrier(len(ranges))

    def shard(rank: int) -> MatchingGradient:
        first, last = ranges[rank]
        held = SyntheticSet(
            synthetic.images[first:last],
            synthetic.soft_labels[first:last],
            synthetic.step_sizes,
            synthetic.labels[first:last],
        )
        steps = [step.held_by(first, last) for step in whole_steps]
        # A network of its own: a functional call swaps the module's parameters and is not safe across threads.
        functions, all_sum = eager(make_problem()[0]), functools.partial(barrier.all_sum, rank)
        return gradient_of(functions, start, target, held, steps, chunk=2, first=matched, all_sum=all_sum)

    with ThreadPoolExecutor(len(ranges)) as pool:
        shards = list(pool.map(shard, range(len(ranges))))
    assert relative_error(torch.cat([s.images for s in shards]), whole.images) < 1e-12
    assert relative_error(torch.cat([s.soft_labels for s in shards]), whole.soft_labels) < 1e-12
    assert all(relative_error(s.step_size, whole.step_size) < 1e-12 for s in shards)
    assert all(s.loss == shards[0].loss for s in shards)


def test_backbones_add_up_to_the_gradient_of_the_weighted_sum() -> None:
    """Two backbones with different weights equal the unrolled gradient of the weighted sum."""
    network, start, target, synthetic = make_problem(width=6)
    other, other_start, other_target, _ = make_problem(width=4, seed=3)
    synthetic.step_sizes = torch.tensor([0.1, 0.03], dtype=torch.float64)
    problems = [(network, start, target, 1.0), (other, other_start, other_target, 0.4)]
    steps = draw_student_steps(12, 3, 5, "scale", seed=1, iteration=0)
    state = MatchingState(synthetic.clone(), SETTINGS)
    state.step(
        [
            Match(eager(net), start, target, place_steps(steps, None, start), number, weight)
            for number, (net, start, target, weight) in enumerate(problems)
        ],
        [Origin(0, 0), Origin(0, 0)],
    )
    expected = {"images": torch.zeros_like(synthetic.images), "soft_labels": torch.zeros_like(synthetic.soft_labels)}
    step_sizes = torch.zeros(2, dtype=torch.float64)
    for number, (net, start, target, weight) in enumerate(problems):
        alone = dataclasses.replace(synthetic, step_sizes=synthetic.step_sizes[number : number + 1])
        _, (images, soft_labels, step_size) = unrolled(net, start, target, alone, steps)
        expected["images"] += weight * images
        expected["soft_labels"] += weight * soft_labels
        step_sizes[number] = weight * step_size
    assert relative_error(synthetic.images - state.synthetic.images, expected["images"]) < 1e-10
    assert relative_error(synthetic.soft_labels - state.synthetic.soft_labels, expected["soft_labels"]) < 1e-10
    assert relative_error(synthetic.step_sizes - state.synthetic.step_sizes, 1e-3 * step_sizes) < 1e-10


def test_class_shards_shorten_what_one_process_shortens() -> None:
    """Shards shorten an update by the length of the whole gradient, as one process does."""
    _, start, target, synthetic = make_problem()
    steps = draw_student_steps(12, 3, 5, "scale", seed=1, iteration=0)
    ranges = [(0, 3), (3, 12)]
    barrier = Barrier(len(ranges))

    def learned(first: int, last: int, limit: float | None, all_sum: Callable[[Tensor], Tensor]) -> MatchingState:
        held = {name: getattr(synthetic, name)[first:last] for name in ("images", "soft_labels", "labels")}
        settings = SETTINGS.model_copy(update={"gradient_limit": limit})
        state = MatchingState(dataclasses.replace(synthetic.clone(), **held), settings)
        drawn = place_steps([step.held_by(first, last) for step in steps], None, start)
        state.step([Match(eager(make_problem()[0]), start, target, drawn)], [Origin(0, 0)], all_sum=all_sum)
        return state

    decrease = learned(0, 12, None, identity).history[0].decrease
    whole = learned(0, 12, decrease / 3, identity)
    with ThreadPoolExecutor(len(ranges)) as pool:
        shards = list(
            pool.map(
                lambda rank: learned(*ranges[rank], decrease / 3, functools.partial(barrier.all_sum, rank)),
                range(len(ranges)),
            )
        )
    for shard in shards:
        assert shard.shortened == 1
        assert shard.history[0].decrease == pytest.approx(decrease, rel=1e-12)
        assert relative_error(shard.synthetic.step_sizes, whole.synthetic.step_sizes) < 1e-12
    for name in ("images", "soft_labels"):
        joined, before = torch.cat([getattr(shard.synthetic, name) for shard in shards]), getattr(synthetic, name)
        assert relative_error(joined - before, getattr(whole.synthetic, name) - before) < 1e-9


def test_backbones_in_processes_of_their_own_learn_what_one_process_learns() -> None:
    """Backbones in separate rows of the mesh learn the pixels, labels and step sizes of one process."""
    problems = [make_problem(width=6), make_problem(width=4, seed=3)]
    synthetic = problems[0][3]
    synthetic.step_sizes = torch.tensor([0.1, 0.03], dtype=torch.float64)
    steps = place_steps(draw_student_steps(12, 3, 5, "scale", seed=1, iteration=0), None, synthetic.images)
    origins, barrier = [Origin(0, 0), Origin(1, 0)], Barrier(2)

    def learned(rows: Sequence[int], **sums: Callable[[Tensor], Tensor]) -> SyntheticSet:
        state = MatchingState(synthetic.clone(), SETTINGS)
        networks = [make_problem(width=6)[0], make_problem(width=4, seed=3)[0]]  # not shared between threads
        matches = [Match(eager(networks[row]), *problems[row][1:3], steps, row) for row in rows]
        for _ in range(3):
            state.step(matches, origins, **sums)
        return state.synthetic

    def apart(row: int) -> SyntheticSet:
        return learned([row], sum_over_backbones=functools.partial(barrier.all_sum, row))

    together = learned([0, 1])
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(apart, range(2)))
    for name in ("images", "soft_labels", "step_sizes"):
        assert torch.equal(getattr(both[0], name), getattr(both[1], name))
        assert relative_error(getattr(both[0], name), getattr(together, name)) < 1e-12


def test_loss_above_the_limit_is_not_differentiated() -> None:
    """A loss above the limit skips the reverse sweep."""
    network, start, target, synthetic = make_problem()
    functions = eager(network)
    functions.reverse = lambda *_: pytest.fail("differentiated")  # type: ignore[method-assign]
    steps = draw_student_steps(12, 2, 5, "", seed=1, iteration=0)
    gradient = gradient_of(functions, start, target, synthetic, steps, skip_above=1e-9)
    assert gradient.loss > 1e-9
    assert not any(bool(value.any()) for value in parts(gradient))


def test_batches_cover_the_set_once_a_pass_and_the_short_one_comes_first() -> None:
    """A pass uses every image once, and its short batch comes first."""
    steps = draw_student_steps(10, 6, 4, "", seed=0, iteration=0)
    assert [len(step.rows) for step in steps] == [2, 4, 4, 2, 4, 4]
    for one_pass in (steps[:3], steps[3:]):
        assert sorted(np.concatenate([step.rows for step in one_pass])) == list(range(10))


def test_draws_depend_on_the_iteration_and_on_nothing_before_it() -> None:
    """Draws of batches depend on the iteration alone, in any process."""
    first, again, other = (draw_student_steps(10, 3, 5, PUBLISHED_AUGMENTATION, 7, k) for k in (4, 4, 5))
    assert all(np.array_equal(a.rows, b.rows) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a.rows, b.rows) for a, b in zip(first, other, strict=True))


def test_strategy_draws_the_same_whatever_the_slice() -> None:
    """Parameters drawn for a global batch, then sliced, augment each image as the whole batch would."""
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    for operation in OPERATIONS:
        drawn = draw_augmentation(operation, 6, np.random.Generator(np.random.Philox(1)))
        rows = np.array([4, 1])
        assert torch.equal(augment(images, drawn)[rows], augment(images[rows], drawn.take(rows)))
