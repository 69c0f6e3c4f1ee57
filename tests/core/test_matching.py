"""The exact gradient: against full unrolling, finite differences, and its own compiled form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from datm_ray.config import PUBLISHED_AUGMENTATION
from datm_ray.core.augment import augment, draw_augmentation
from datm_ray.core.matching import (
    MatchingGradient,
    StudentStep,
    StudentStepFunctions,
    draw_student_steps,
    matching_gradient,
    soft_cross_entropy,
)
from datm_ray.core.networks import NetworkSpec, build_network
from datm_ray.core.parameters import FlatNetwork, flatten
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.errors import ConfigError

OPERATIONS = PUBLISHED_AUGMENTATION.split("_")


def make_problem(
    *, channels: int = 3, size: int = 8, width: int = 6, classes: int = 4, ipc: int = 3, seed: int = 0
) -> tuple[FlatNetwork, Tensor, Tensor, SyntheticSet]:
    """A float64 ConvNet, two parameter vectors and a synthetic set."""
    spec = NetworkSpec("convnet", channels, (size, size), classes, width=width, depth=2)
    module = build_network(spec, seed).double()
    start = flatten(module)
    draw = torch.Generator().manual_seed(seed)
    target = start + 0.05 * torch.randn(start.shape, generator=draw, dtype=torch.float64)
    images = torch.randn(classes * ipc, channels, size, size, generator=draw, dtype=torch.float64)
    soft_labels = 3 * torch.randn(classes * ipc, classes, generator=draw, dtype=torch.float64)
    labels = torch.arange(classes).repeat_interleave(ipc)
    return FlatNetwork(module), start, target, SyntheticSet(images, soft_labels, torch.tensor(0.1).double(), labels)


def unrolled(
    network: FlatNetwork, start: Tensor, target: Tensor, synthetic: SyntheticSet, steps: list[StudentStep]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and gradients through the whole graph, as the published code computes them."""
    learned = [t.clone().requires_grad_() for t in (synthetic.images, synthetic.soft_labels, synthetic.step_size)]
    images, soft_labels, step_size = learned
    theta = start.clone().requires_grad_()
    for step in steps:
        x = augment(images[step.rows], step.augmentation)
        weights = torch.full((len(step.rows),), 1 / len(step.rows), dtype=x.dtype)
        loss = soft_cross_entropy(network(theta, x), soft_labels[step.rows], weights)
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - step_size * gradient
    matching = (theta - target).square().sum() / (start - target).square().sum()
    return matching.detach(), torch.autograd.grad(matching, learned)


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def parts(gradient: MatchingGradient) -> tuple[Tensor, Tensor, Tensor]:
    return gradient.images, gradient.soft_labels, gradient.step_size


@pytest.mark.parametrize("operation", ["", *OPERATIONS, PUBLISHED_AUGMENTATION])
def test_gradient_equals_full_unrolling(operation: str) -> None:
    """Images, labels and step size agree with the unrolled graph to 1e-10 under every augmentation."""
    network, start, target, synthetic = make_problem()
    steps = draw_student_steps(12, 7, 5, operation, seed=1, iteration=3)
    functions = StudentStepFunctions(network, compiled=False)
    ours = matching_gradient(functions, start, target, synthetic, steps)
    loss, reference = unrolled(network, start, target, synthetic, steps)
    assert ours.loss == pytest.approx(float(loss), rel=1e-12)
    for value, expected in zip(parts(ours), reference, strict=True):
        assert relative_error(value, expected) < 1e-10


def test_gradient_equals_finite_differences() -> None:
    """Directional derivatives in all three variables agree with central differences of the loss."""
    network, start, target, synthetic = make_problem(channels=1, width=3, classes=3, ipc=2)
    steps = draw_student_steps(6, 4, 4, "color_crop_flip_scale_rotate", seed=2, iteration=0)
    functions = StudentStepFunctions(network, compiled=False)
    ours = matching_gradient(functions, start, target, synthetic, steps)
    draw = torch.Generator().manual_seed(5)
    for name in ("images", "soft_labels", "step_size"):
        value = getattr(synthetic, name)
        direction = torch.randn(value.shape, generator=draw, dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            moved = synthetic.clone()
            getattr(moved, name).add_(sign * 1e-5 * direction)
            losses.append(matching_gradient(functions, start, target, moved, steps).loss)
        numeric = (losses[0] - losses[1]) / 2e-5
        assert float((getattr(ours, name) * direction).sum()) == pytest.approx(numeric, rel=1e-5)


@pytest.mark.slow
def test_compiled_step_equals_eager_step() -> None:
    """Compilation changes rounding only: 1e-12 relative in float64."""
    network, start, target, synthetic = make_problem()
    steps = draw_student_steps(12, 3, 12, PUBLISHED_AUGMENTATION, seed=1, iteration=0)
    eager = matching_gradient(StudentStepFunctions(network, compiled=False), start, target, synthetic, steps)
    fast = matching_gradient(StudentStepFunctions(network, compiled=True), start, target, synthetic, steps)
    for value, expected in zip(parts(fast), parts(eager), strict=True):
        assert relative_error(value, expected) < 1e-12


WITHOUT_COMPILER = """
import torch
from datm_ray.core.matching import StudentStepFunctions
from datm_ray.core.networks import NetworkSpec, build_network
from datm_ray.core.parameters import FlatNetwork, flatten

module = build_network(NetworkSpec("convnet", 1, (8, 8), 3, width=2, depth=1), 0)
functions = StudentStepFunctions(FlatNetwork(module), compiled=True)
gradient = functions.forward(flatten(module), torch.ones(2, 1, 8, 8), torch.eye(3)[:2], torch.ones(2))
assert gradient.isfinite().all()
print(functions.note)
"""


@pytest.mark.parametrize("compiler", ["absent", "broken"])
def test_without_a_working_compiler_the_step_runs_eagerly_and_says_so(compiler: str, tmp_path: Path) -> None:
    """No compiler, or one that answers and then fails, costs speed and one line, not the run."""
    cxx = tmp_path / "g++"
    if compiler == "broken":
        cxx.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 12.0 && exit\nexit 1\n')
        cxx.chmod(0o755)
    # An empty cache, for this machine's real compiler may have filled the usual one.
    environment = {**os.environ, "CXX": str(cxx), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("torch.compile does not work here (")
    assert len(result.stdout.splitlines()) == 1


def test_sum_over_two_shards_equals_one_process() -> None:
    """Shards that each hold some classes and add their gradients get the gradient of the whole set."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    network, start, target, synthetic = make_problem()
    whole_steps = draw_student_steps(12, 3, 12, "crop", seed=1, iteration=0)
    functions = StudentStepFunctions(network, compiled=False)
    whole = matching_gradient(functions, start, target, synthetic, whole_steps)
    barrier, slots = Barrier(2), [torch.empty(0)] * 2

    def shard(rank: int) -> MatchingGradient:
        mine = np.arange(0, 5) if rank == 0 else np.arange(5, 12)
        part = SyntheticSet(
            synthetic.images[mine], synthetic.soft_labels[mine], synthetic.step_size, synthetic.labels[mine]
        )

        def all_sum(tensor: Tensor) -> Tensor:
            slots[rank] = tensor
            barrier.wait(timeout=30)
            total = slots[0] + slots[1]
            barrier.wait(timeout=30)
            return total

        steps = [_shard_step(step, mine) for step in whole_steps]
        # A network of its own: a functional call swaps the module's parameters and is not safe across threads.
        functions = StudentStepFunctions(make_problem()[0], compiled=False)
        return matching_gradient(functions, start, target, part, steps, all_sum=all_sum)

    with ThreadPoolExecutor(2) as pool:
        shards = list(pool.map(shard, range(2)))
    assert relative_error(torch.cat([s.images for s in shards]), whole.images) < 1e-12
    assert relative_error(torch.cat([s.soft_labels for s in shards]), whole.soft_labels) < 1e-12
    assert all(relative_error(s.step_size, whole.step_size) < 1e-12 for s in shards)


def _shard_step(step: StudentStep, mine: np.ndarray) -> StudentStep:
    """The part of a global minibatch that a shard holds, still weighted by the global batch."""
    position = {int(row): index for index, row in enumerate(mine)}
    held = np.array([index for index, row in enumerate(step.rows) if int(row) in position], np.int64)
    rows = np.array([position[int(step.rows[index])] for index in held], np.int64)
    return StudentStep(rows, step.augmentation.take(held), step.global_batch)


def test_batches_cover_the_set_once_a_pass_and_the_short_one_comes_first() -> None:
    """Every image is used once before any is used twice."""
    steps = draw_student_steps(10, 6, 4, "", seed=0, iteration=0)
    assert [len(step.rows) for step in steps] == [2, 4, 4, 2, 4, 4]
    for one_pass in (steps[:3], steps[3:]):
        assert sorted(np.concatenate([step.rows for step in one_pass])) == list(range(10))


def test_draws_depend_on_the_iteration_and_on_nothing_before_it() -> None:
    """The same iteration draws the same batches in any process; another one draws others."""
    first, again, other = (draw_student_steps(10, 3, 5, PUBLISHED_AUGMENTATION, 7, k) for k in (4, 4, 5))
    assert all(np.array_equal(a.rows, b.rows) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a.rows, b.rows) for a, b in zip(first, other, strict=True))


def test_batch_norm_backbone_is_refused() -> None:
    """Batch statistics couple samples, so the exact sum over samples does not exist."""
    network = build_network(NetworkSpec("convnet", 1, (8, 8), 3, width=4, depth=2, norm="batch"), 0)
    with pytest.raises(ConfigError, match=r"network\.norm=instance"):
        StudentStepFunctions(FlatNetwork(network))


def test_strategy_draws_the_same_whatever_the_slice() -> None:
    """Parameters drawn for a global batch, then sliced, augment each image as the whole batch would."""
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    for operation in OPERATIONS:
        drawn = draw_augmentation(operation, 6, np.random.Generator(np.random.Philox(1)))
        rows = np.array([4, 1])
        assert torch.equal(augment(images, drawn)[rows], augment(images[rows], drawn.take(rows)))
