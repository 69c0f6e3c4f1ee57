"""The matching loss and its exact gradient, keeping the graph of one student step instead of all T.

    student step     theta_{i+1} = theta_i - alpha * g_i,     g_i = grad_theta l(theta_i; A_i(X[b_i]), Y[b_i])
    matching loss    L = |theta_T - theta*|^2 / |theta_0 - theta*|^2

Full unrolling keeps T graphs. Here only the T parameter vectors are kept, and the reverse sweep is the adjoint of
the recursion above: with v_T = dL/dtheta_T and, for i = T-1 ... 0, s_i = <v_{i+1}, g_i>,

    X.grad -= alpha ds_i/dX     Y.grad -= alpha ds_i/dY     alpha.grad -= s_i     v_i = v_{i+1} - alpha ds_i/dtheta_i

The result is the gradient of full unrolling, not an approximation of it (TESLA drops the last term's effect).
Augmentation A_i is applied outside the compiled step and pulled back through its own vector-Jacobian product: it
does not depend on theta, so this is exact too.

Shapes: n synthetic images, b batch, k classes, p parameters, T student steps. Written for one process; a class shard
passes `all_sum`, which adds a tensor over all shards (see `runtime`). Tests: tests/core/test_matching.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import grad, grad_and_value

from datm_ray.core.augment import Augmentation, augment, draw_augmentation
from datm_ray.core.networks import couples_samples
from datm_ray.core.parameters import FlatNetwork
from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.errors import ConfigError

AllSum = Callable[[Tensor], Tensor]
"""Adds a tensor over all class shards and gives every shard the sum."""


def identity(tensor: Tensor) -> Tensor:
    """The `AllSum` of a process that holds every class."""
    return tensor


def soft_cross_entropy(logits: Tensor, soft_labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over samples of the cross-entropy between softmax(soft_labels) and softmax(logits).

    Args:
        logits, soft_labels: [b k].
        weights: [b]; 1/b each gives the mean, 0 takes a sample out.
    """
    per_sample = -(soft_labels.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)
    return (weights * per_sample).sum()


@dataclass(frozen=True)
class StudentStep:
    """The minibatch of one student step: which images, and how each is augmented."""

    rows: NDArray[np.int64]
    """[b] rows of the synthetic set, none twice."""
    augmentation: Augmentation
    """Drawn for exactly these rows."""
    global_batch: int
    """Images of the minibatch over all shards; the loss is the mean over these."""


def draw_student_steps(
    images: int, steps: int, batch: int, strategy: str, seed: int, iteration: int
) -> list[StudentStep]:
    """The minibatches of one iteration: shuffled passes over the set, cut into batches.

    Where the batch does not divide the set, the short batch comes first in each pass, as published.
    """
    drawn: list[StudentStep] = []
    batch = min(batch, images)
    per_pass = -(-images // batch)
    for step in range(steps):
        number, position = divmod(step, per_pass)
        if position == 0:
            order = generator(seed, Purpose.STUDENT_ORDER, iteration, number).permutation(images)
            chunks = [order[first : first + batch] for first in range(0, images, batch)][::-1]
        rows = chunks[position]
        draw = generator(seed, Purpose.STUDENT_AUGMENTATION, iteration, step)
        drawn.append(StudentStep(rows, draw_augmentation(strategy, len(rows), draw), len(rows)))
    return drawn


class StudentStepFunctions:
    """The two functions the inner loop is made of, compiled where the machine can.

    Attributes:
        forward: (theta [p], x [b c h w], y [b k], weights [b]) -> g [p], the student's gradient.
        reverse: (theta, x, y, weights, v [p]) -> (s [], ds/dtheta [p], ds/dx, ds/dy) with s = <v, g>.
        note: one line on why they are not compiled although asked to be; "" otherwise.

    Raises:
        ConfigError: the network couples the samples of a batch, so that no step is a sum over samples.
    """

    def __init__(self, network: FlatNetwork, *, compiled: bool = True) -> None:
        if couples_samples(network.module):
            raise ConfigError(
                "network.norm is 'batch', which cannot be a backbone for matching",
                "batch statistics couple the images of a batch, so its gradient is not a sum over images",
                "use network.norm=instance",
            )

        def loss(theta: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
            return soft_cross_entropy(network(theta, x), y, weights)

        def directional(theta: Tensor, x: Tensor, y: Tensor, weights: Tensor, v: Tensor) -> Tensor:
            return torch.dot(v, grad(loss)(theta, x, y, weights))

        def reverse(
            theta: Tensor, x: Tensor, y: Tensor, weights: Tensor, v: Tensor
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            (d_theta, d_x, d_y), s = grad_and_value(directional, argnums=(0, 1, 2))(theta, x, y, weights, v)
            return s, d_theta, d_x, d_y

        self.forward: Callable[..., Tensor] = grad(loss)
        self.reverse: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = reverse
        self.note = compiler_problem(network.device.type) if compiled else ""
        if compiled and not self.note:
            options = _compile_options(network.device.type)
            self.forward = torch.compile(self.forward, fullgraph=True, dynamic=False, options=options)
            self.reverse = torch.compile(self.reverse, fullgraph=True, dynamic=False, options=options)


@functools.cache
def compiler_problem(device_type: str) -> str:
    """Why torch.compile does not work on this machine, in one line; "" where it does. Tried out once per process."""
    trial = torch.compile(torch.sin, fullgraph=True, dynamic=False, options=_compile_options(device_type))
    try:
        trial(torch.zeros(8, device=device_type))
    except Exception as failure:  # whatever a missing or broken toolchain raises, from any layer
        reason = next(iter(str(failure).strip().splitlines()), type(failure).__name__)
        return f"torch.compile does not work here ({reason[:120]}): running without it, more slowly"
    return ""


def _compile_options(device_type: str) -> dict[str, Any]:
    # On a CPU the generated kernels are called from generated C++: at digits size Python's calls took a fifth to a
    # third of the reverse step (benchmarks/LOG.md).
    return {"cpp_wrapper": device_type == "cpu"}


@dataclass(frozen=True)
class MatchingGradient:
    """Loss and gradient of one iteration."""

    loss: float
    """Normalised matching loss; 1 means that the student came no closer to the target."""
    images: Tensor
    """[n c h w]."""
    soft_labels: Tensor
    """[n k]."""
    step_size: Tensor
    """[]."""

    def is_finite(self) -> bool:
        """Whether loss and every gradient entry are finite."""
        gradients = (self.images, self.soft_labels, self.step_size)
        return bool(np.isfinite(self.loss)) and all(bool(g.isfinite().all()) for g in gradients)


def matching_gradient(
    functions: StudentStepFunctions,
    start: Tensor,
    target: Tensor,
    synthetic: SyntheticSet,
    steps: Sequence[StudentStep],
    *,
    all_sum: AllSum = identity,
) -> MatchingGradient:
    """Exact gradient of the normalised matching loss in images, soft labels and step size.

    Keeps len(steps) + 1 parameter vectors, one gradient accumulator per learned variable, and the graph of one
    student step.

    Args:
        start, target: [p] expert parameters at the start epoch and at the epoch to land on.
        steps: minibatches, as from `draw_student_steps`.
        all_sum: sum over class shards.
    """
    trace = _student_trace(functions, start, synthetic, steps, all_sum)
    distance = (start - target).square().sum()
    gap = trace[-1] - target
    loss = float(gap.square().sum() / distance)
    v = 2 * gap / distance

    step_size = synthetic.step_size
    images = torch.zeros_like(synthetic.images)
    soft_labels = torch.zeros_like(synthetic.soft_labels)
    d_step_size = torch.zeros_like(step_size)
    for theta, step in zip(reversed(trace[:-1]), reversed(steps), strict=True):
        rows = torch.from_numpy(step.rows).to(images.device)
        raw = synthetic.images[rows].requires_grad_()
        x = augment(raw, step.augmentation)
        weights = _weights(step, x)
        s, d_theta, d_x, d_y = functions.reverse(theta, x.detach(), synthetic.soft_labels[rows], weights, v)
        images[rows] -= step_size * torch.autograd.grad(x, raw, d_x)[0]
        soft_labels[rows] -= step_size * d_y
        summed = all_sum(torch.cat([d_theta, s[None]]))
        d_step_size -= summed[-1]
        v = v - step_size * summed[:-1]
    return MatchingGradient(loss, images, soft_labels, d_step_size)


def _student_trace(
    functions: StudentStepFunctions,
    start: Tensor,
    synthetic: SyntheticSet,
    steps: Sequence[StudentStep],
    all_sum: AllSum,
) -> list[Tensor]:
    """theta_0 ... theta_T."""
    trace = [start]
    for step in steps:
        rows = torch.from_numpy(step.rows).to(synthetic.images.device)
        x = augment(synthetic.images[rows], step.augmentation)
        gradient = functions.forward(trace[-1], x, synthetic.soft_labels[rows], _weights(step, x))
        trace.append(trace[-1] - synthetic.step_size * all_sum(gradient))
    return trace


def _weights(step: StudentStep, x: Tensor) -> Tensor:
    return torch.full((len(step.rows),), 1 / step.global_batch, dtype=x.dtype, device=x.device)
