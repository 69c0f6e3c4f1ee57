"""The matching gradient as others compute it, and the problems on which it is compared with `matching_gradient`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from datm_ray.config import NetworkSpec
from datm_ray.core.images.augment import augment
from datm_ray.core.networks.parameters import FlatNetwork, flatten
from datm_ray.core.networks.registry import build_network
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.methods.trajectory.matching import PlacedSteps, StudentStep, draw_student_steps, place_steps
from datm_ray.methods.trajectory.step_functions import StudentStepFunctions, soft_cross_entropy


@dataclass(frozen=True)
class Problem:
    """Arguments of a matching gradient."""

    network: FlatNetwork
    start: Tensor
    target: Tensor
    synthetic: SyntheticSet
    steps: list[StudentStep]

    def placed(self, chunk: int | None = None) -> PlacedSteps:
        """Minibatches as `matching_gradient` takes them, in pieces of at most `chunk` images; `None` for whole ones."""
        return place_steps(self.steps, chunk, self.synthetic.images)


Gradient = tuple[float, tuple[Tensor, Tensor, Tensor]]
"""Loss, and its gradient in images, soft labels and step size."""


def make_problem(
    spec: NetworkSpec,
    batch: int,
    steps: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    strategy: str = "",
    images: int | None = None,
    seed: int = 0,
) -> Problem:
    """Random tensors: the same numbers in every process, on every device and in every precision.

    The target lies at distance 1 from the start.

    Args:
        images: number of images in the set; `None` makes every minibatch the whole set.
    """
    count = images or batch
    module = build_network(spec, seed)
    draw = torch.Generator().manual_seed(seed)
    start = flatten(module)
    way = torch.randn(start.shape, generator=draw)
    pixels = torch.randn(count, spec.channels, *spec.size, generator=draw)
    soft_labels = torch.randn(count, spec.classes, generator=draw)
    there = {"device": device, "dtype": dtype}
    labels = torch.arange(count, device=device) % spec.classes
    synthetic = SyntheticSet(pixels.to(**there), soft_labels.to(**there), torch.tensor([0.01]).to(**there), labels)
    drawn = draw_student_steps(count, steps, batch, strategy, seed=0, iteration=0)
    start, target = start.to(**there), (start + way / way.norm()).to(**there)
    return Problem(FlatNetwork(module.to(**there)), start, target, synthetic, drawn)


def step_loss(problem: Problem, theta: Tensor, learned: Sequence[Tensor], step: StudentStep) -> Tensor:
    """The student's loss on one minibatch."""
    rows = torch.from_numpy(step.rows).to(theta.device)
    x = augment(learned[0][rows], step.augmentation)
    return soft_cross_entropy(
        problem.network(theta, x), learned[1][rows], torch.full_like(x[:, 0, 0, 0], 1 / len(rows))
    )


def unrolling(problem: Problem) -> Gradient:
    """The exact gradient, through the graph of all steps."""
    synthetic = problem.synthetic
    learned = [t.clone().requires_grad_() for t in (synthetic.images, synthetic.soft_labels, synthetic.step_sizes[0])]
    theta = problem.start.clone().requires_grad_()
    for step in problem.steps:
        (g,) = torch.autograd.grad(step_loss(problem, theta, learned, step), theta, create_graph=True)
        theta = theta - learned[2] * g
    loss = (theta - problem.target).square().sum() / (problem.start - problem.target).square().sum()
    images, soft_labels, step_size = torch.autograd.grad(loss, learned)
    return float(loss.detach()), (images, soft_labels, step_size)


def tesla(problem: Problem) -> Gradient:
    """TESLA's gradient, step by step, as if no step's parameters depended on the images."""
    synthetic = problem.synthetic
    learned = [t.clone().requires_grad_() for t in (synthetic.images, synthetic.soft_labels)]
    trace = [problem.start]
    for step in problem.steps:
        theta = trace[-1].detach().requires_grad_()
        (g,) = torch.autograd.grad(step_loss(problem, theta, [t.detach() for t in learned], step), theta)
        trace.append(trace[-1] - synthetic.step_sizes[0] * g)
    gap, distance = trace[-1] - problem.target, (problem.start - problem.target).square().sum()
    total = [torch.zeros_like(t) for t in (*learned, synthetic.step_sizes[0])]
    for theta, step in zip(trace, problem.steps, strict=False):
        theta = theta.detach().requires_grad_()
        (g,) = torch.autograd.grad(step_loss(problem, theta, learned, step), theta, create_graph=True)
        s = torch.dot(g, 2 * gap / distance)
        for sum_, part in zip(total, torch.autograd.grad(s, learned), strict=False):
            sum_ -= synthetic.step_sizes[0] * part
        total[2] -= s.detach()
    return float(gap.square().sum() / distance), (total[0], total[1], total[2])


def step_as_traced(
    functions: StudentStepFunctions, images: int, image: tuple[int, int, int], classes: int
) -> Callable[[], None]:
    """Forward and reverse step of some images: what is compiled, to be run uncompiled on zeros."""
    theta = flatten(functions.network.module)
    x, y = functions.layout(theta.new_zeros(images, *image)), theta.new_zeros(images, classes)
    arguments = (theta, x, y, theta.new_zeros(images))
    forward, reverse = functions.graphs(images, image, classes)

    def step() -> None:
        forward(*arguments)
        reverse(*arguments, theta)

    return step


def step_operations(functions: StudentStepFunctions, image: tuple[int, int, int], classes: int) -> int:
    """Floating-point operations of one image's forward and reverse step: products and convolutions, as traced."""
    images = 2
    step = step_as_traced(functions, images, image, classes)
    with FlopCounterMode(display=False) as counted:
        step()
    return int(counted.get_total_flops()) // images
