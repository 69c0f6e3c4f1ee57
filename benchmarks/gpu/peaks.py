"""Peaks of a GPU's memory that plans assume: blocks of augmented images, and stacks of networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from epochs import expert_epochs

from datm_ray.config import PUBLISHED_AUGMENTATION, ExpertConfig, NetworkSpec
from datm_ray.core.images.augment import parse_strategy
from datm_ray.core.networks.image_cost import image_cost
from datm_ray.core.networks.parameters import FlatNetwork, flatten
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.core.training.experts import ExpertState
from datm_ray.methods.trajectory.matching import _Block, draw_student_steps, place_steps
from datm_ray.methods.trajectory.step_functions import StudentStepFunctions
from gpu.experts import Way, setting, ways
from gpu.machine import Machine, freeing, measured

BATCH = 100
"""Number of images of a student step in a block."""


def block(machine: Machine, operation: str, size: int) -> Callable[[], None]:
    """Function that augments a block of images of about `size` bytes, and passes gradients back, as steps do."""
    spec = setting(machine).spec
    functions = StudentStepFunctions(FlatNetwork(build_network(spec, 0).to(machine.device)), machine.options())
    images = torch.randn(BATCH, spec.channels, *spec.size, device=machine.device)
    labels = torch.zeros(BATCH, spec.classes, device=machine.device)
    classes = torch.zeros(BATCH, dtype=torch.int64, device=machine.device)
    synthetic = SyntheticSet(images, labels, torch.full((1,), 0.01, device=machine.device), classes)
    drawn = draw_student_steps(BATCH, max(1, size // images.nbytes), BATCH, operation, 0, 0)
    pieces = [piece for step in place_steps(drawn, None, images) for piece in step]

    def call() -> None:
        own = _Block(synthetic, pieces, functions)
        for number, (x, y) in enumerate(zip(own.images, own.soft_labels, strict=True)):
            own.collect(number, torch.ones_like(x), torch.ones_like(y))
        own.add_to(torch.zeros_like(images), torch.zeros_like(labels))

    return call


def block_copies(machine: Machine, size: int) -> float:
    """Peak memory of a block as a multiple of its augmented images, for the operation that takes most."""
    calls = (block(machine, operation, size) for operation in parse_strategy(PUBLISHED_AUGMENTATION))
    return max(freeing(machine.device, partial(measured, call, machine.device, 1)).peak for call in calls) / size


def block_bytes(machine: Machine) -> float:
    """Smallest block in bytes that takes at most a tenth longer for each byte than the fastest of several sizes."""
    operation, sizes = "color+crop+scale", [2**power for power in ((14, 16) if machine.small else range(20, 29, 2))]
    seconds = {}
    for size in sizes:
        call = block(machine, operation, size)
        seconds[size] = freeing(machine.device, partial(measured, call, machine.device, 5)).median / size
    return float(next(size for size in sizes if seconds[size] <= 1.1 * min(seconds.values())))


def call_peak(machine: Machine, way: Way, spec: NetworkSpec, rows: int) -> int:
    """Peak memory in bytes of a training step of a stack, beyond its arguments."""
    networks = [build_network(spec, seed).to(machine.device) for seed in range(way.stacked)]
    state, functions = ExpertState.initial(networks), way.step(networks[0])
    images = torch.randn(way.stacked, rows, spec.channels, *spec.size, device=machine.device)
    labels = torch.full((way.stacked, rows, spec.classes), 1 / spec.classes, device=machine.device)
    weights = torch.full((rows,), 1 / rows, device=machine.device)
    call = partial(functions, state.parameters, state.buffers, images, labels, weights)
    return freeing(machine.device, partial(measured, call, machine.device, 1)).peak


def kept_maps(machine: Machine) -> float:
    """Peak of a stack's step as a multiple of all maps of a forward pass: what each further image of a batch adds."""
    how, way = setting(machine), next(iter(ways(machine).values()))
    cost = image_cost(build_network(how.spec, 0), (how.spec.channels, *how.spec.size))
    peaks = [call_peak(machine, way, how.spec, rows) for rows in (1, how.batch)]
    return (peaks[1] - peaks[0]) / (way.stacked * (how.batch - 1) * cost.maps)


def vectors(machine: Machine) -> dict[str, float]:
    """Vectors as long as all parameters of a stack: those of a step at its peak, and those that training adds.

    The network is wide, and its images are few and small, so that maps take next to nothing.
    """
    width = 8 if machine.small else 2048
    spec = NetworkSpec(channels=3, size=(8, 8), classes=10, width=width, depth=2)
    way = Way(2, machine.compiled, machine.precision, machine.channels_last)
    step = call_peak(machine, way, spec, 2)
    networks = [build_network(spec, seed).to(machine.device) for seed in range(way.stacked)]
    images, labels = torch.randn(4, 3, 8, 8, device=machine.device), torch.zeros(4, dtype=torch.int64)
    settings = ExpertConfig(epochs=1, batch_size=2, optimiser="sgd", momentum=0.9)
    functions: StackFunctions = way.step(networks[0])

    def train() -> None:
        for _ in expert_epochs(
            functions, images, labels.to(machine.device), settings, range(way.stacked), ExpertState.initial(networks)
        ):
            pass

    training = freeing(machine.device, partial(measured, train, machine.device, 1)).peak
    vector = 4 * way.stacked * flatten(networks[0]).numel()
    return {"step": step / vector, "training": (training - step) / vector}
