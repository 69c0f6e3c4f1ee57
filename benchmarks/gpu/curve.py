"""Accuracy against minutes: experts, a distillation and its control from real images, in the time that is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from cifar_part import FILES
from epochs import expert_epochs
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.config import NetworkSpec, RunConfig
from datm_ray.core.networks.parameters import FlatNetwork, unflatten_into
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.core.steps import Steps, result_of
from datm_ray.core.synthetic import SyntheticSet, correct_rows_in_steps, mean_correct_in_steps, random_rows
from datm_ray.core.training.experts import ExpertState
from datm_ray.core.training.loop import PROTOCOLS, Training, accuracy_in_steps, logits_in_steps, trainer
from datm_ray.methods.trajectory.difficulty import draw_origin
from datm_ray.methods.trajectory.iteration import Match, MatchingState
from datm_ray.methods.trajectory.matching import draw_student_steps, place_steps
from datm_ray.methods.trajectory.step_functions import StudentStepFunctions
from datm_ray.recipes import get_recipe
from gpu.machine import Machine
from gpu.sections import Clock, Row, Section, Work, needed_packages

EXPERTS_SHARE = 0.4
"""Share of the section's time that experts may take."""
POINTS = 6
"""Number of points of the curve, if time allows."""


@dataclass(frozen=True)
class Images:
    """Real images, normalised, on the device."""

    name: str
    spec: NetworkSpec
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Recipe:
    """Recipe of the curve, with 1 image per class."""

    run: RunConfig
    """A run whose experts have as many epochs as starts and targets need."""
    stacks: int
    """Largest number of stacks of experts; fewer are trained if time runs out."""
    stacked: int
    """Number of experts in a stack."""
    starts: int
    """Exclusive upper bound of the start epochs."""
    evaluation_epochs: int


def recipe_of(machine: Machine, images: Images) -> Recipe:
    """The packaged recipes cifar10-ipc1 and digits-ipc1, with fewer and shorter experts."""
    if images.name == "CIFAR-10":
        return Recipe(_shorter(get_recipe("cifar10-ipc1"), epochs=6), 3, 4, 4, 500)
    digits = get_recipe("digits-ipc1")
    if machine.small:
        return Recipe(_shorter(digits, epochs=5, student_steps=4), 1, 2, 2, 30)
    return Recipe(_shorter(digits, epochs=13), 2, 4, 10, 500)


def _shorter(recipe: RunConfig, epochs: int, student_steps: int | None = None) -> RunConfig:
    experts = recipe.experts.model_copy(update={"epochs": epochs})
    distill = recipe.distill.model_copy(update={"student_steps": student_steps or recipe.distill.student_steps})
    return recipe.model_copy(update={"experts": experts, "distill": distill})


def read_images(machine: Machine) -> Images:
    """CIFAR-10, whitened, from its folder; else scikit-learn's digits."""
    from datm_ray.data import load_raw, prepare, transform_of

    # Both files are named, because in a folder the files' names would have to say which is train and which is test.
    if machine.data is not None:
        files = [str(Path(machine.data) / name) for name in FILES]
        name, raw = "CIFAR-10", load_raw("parquet", ",".join(files), validation=0.02)
    else:
        name, raw = "digits", load_raw("digits", validation=0.15)
    transform = transform_of(raw, "zca" if machine.data is not None else "standard", device=machine.device)
    found = prepare(raw, transform)
    channels, height, width = found.train_images.shape[1:]
    network = get_recipe("digits-ipc1" if machine.data is None else "cifar10-ipc1").network
    spec = network.for_images(channels, (height, width), len(found.class_names))
    arrays = (found.train_images, found.train_labels, found.test_images, found.test_labels)
    return Images(name, spec, *(torch.tensor(array).to(machine.device) for array in arrays))


def expert_trajectories(machine: Machine, images: Images, recipe: Recipe, clock: Clock) -> Tensor:
    """[experts epochs p] parameters before the first epoch and after every one; as many as the time allows."""
    end = Clock.of(EXPERTS_SHARE * clock.left())
    found: list[Tensor] = []
    for stack in range(recipe.stacks):
        began = time.monotonic()
        seeds = list(range(stack * recipe.stacked, (stack + 1) * recipe.stacked))
        networks = [build_network(images.spec, seed).to(machine.device) for seed in seeds]
        options = {"compile_": machine.compiled, "channels_last": machine.channels_last}
        functions = StackFunctions(networks[0], stacked=len(seeds), **options)
        state = ExpertState.initial(networks)
        kept = [state.parameters]
        for _ in expert_epochs(functions, images.train, images.train_labels, recipe.run.experts, seeds, state):
            kept.append(state.parameters)
            if end.left() < 0 and len(kept) > recipe.run.distill.expert_epochs + 1:
                break
        found.append(torch.stack(kept, dim=1))
        if end.left() < time.monotonic() - began:
            break
    epochs = min(each.shape[1] for each in found)
    return torch.cat([each[:, :epochs] for each in found])


class _Experts:
    """The last snapshots of the experts as networks."""

    def __init__(self, images: Images, trajectories: Tensor) -> None:
        self._images, self._last = images, trajectories[:, -1]
        self._network = build_network(images.spec, 0).to(images.train.device)

    def logits(self, expert: int, pixels: Tensor) -> Steps[Tensor]:
        unflatten_into(self._network, self._last[expert])
        return (yield from logits_in_steps(self._network, pixels))

    def soft_labels(self, rows: Tensor) -> Tensor:
        """The experts' mean correct logits for real images, as published."""
        each = (self.logits(expert, self._images.train[rows]) for expert in range(len(self._last)))
        return result_of(mean_correct_in_steps(each, self._images.train_labels[rows]))

    def predict(self, expert: int, rows: NDArray[np.int64]) -> Steps[NDArray[np.int64]]:
        pixels = self._images.train[torch.from_numpy(rows).to(self._last.device)]
        logits = yield from self.logits(expert, pixels)
        predicted: NDArray[np.int64] = logits.argmax(dim=1).cpu().numpy()
        return predicted

    def real_set(self, recipe: Recipe, rows: NDArray[np.int64]) -> SyntheticSet:
        """Real images with soft labels."""
        there = torch.from_numpy(rows).to(self._last.device)
        images = self._images
        step_sizes = torch.tensor([recipe.run.distill.initial_step_size], device=there.device)
        return SyntheticSet(images.train[there], self.soft_labels(there), step_sizes, images.train_labels[there])


def scored(machine: Machine, images: Images, recipe: Recipe, held: SyntheticSet, networks: int) -> list[float]:
    """Test accuracies in percent of fresh networks, trained as a run does; nothing is chosen by them."""
    schedule = replace(
        PROTOCOLS["short"],
        epochs=recipe.evaluation_epochs,
        decay_epoch=recipe.evaluation_epochs // 2,
        learning_rate=float(held.step_size),
        augmentation=recipe.run.evaluate.augmentation,
    )
    trainings = [
        Training(
            build_network(images.spec, 1_000 + seed).to(images.train.device),
            held.images,
            held.soft_labels,
            schedule,
            seed,
        )
        for seed in range(networks)
    ]
    for _ in trainer(compile_=machine.compiled, channels_last=machine.channels_last).train_all(trainings):
        pass
    every = (accuracy_in_steps(each.network, images.test, images.test_labels) for each in trainings)
    return [100 * result_of(each) for each in every]


def curve(machine: Machine, images: Images, recipe: Recipe, trajectories: Tensor, clock: Clock) -> Iterator[Row]:
    """Distil until the time is over, and score the set at intervals."""
    experts, labels = _Experts(images, trajectories), images.train_labels.cpu().numpy()
    count = len(trajectories)
    networks = 1 if machine.small else 3
    began = time.monotonic()
    random = experts.real_set(recipe, random_rows(labels, 1, seed=0))
    accuracies = scored(machine, images, recipe, random, networks)
    yield {"set": "random real images, the same soft labels", "accuracy, %": accuracies}
    scoring = (time.monotonic() - began) / networks
    classes = range(images.spec.classes)
    chosen = correct_rows_in_steps(labels, 1, 0, experts=count, predict=experts.predict, classes=classes)
    state = MatchingState(experts.real_set(recipe, result_of(chosen)), recipe.run.distill)
    module = build_network(images.spec, 0).to(machine.device)
    functions = StudentStepFunctions(FlatNetwork(module), machine.options())
    functions.prepare(len(random.images), tuple(random.images.shape[1:]), images.spec.classes)  # type: ignore[arg-type]
    bound = min(recipe.starts, trajectories.shape[1] - recipe.run.distill.expert_epochs)
    started, worked = time.monotonic(), 0.0
    last = networks * scoring * 1.5 + 2
    interval = max(0.0, clock.left() - last) / POINTS - scoring
    while clock.left() > last or not state.iteration:
        point, before = time.monotonic(), state.iteration
        while state.iteration == before or (time.monotonic() - point < interval and clock.left() > last):
            _iterate(state, functions, trajectories, bound)
            if machine.small and state.iteration % 2 == 0:
                break
        worked += time.monotonic() - point
        done = clock.left() <= last or machine.small
        yield {
            "set": "distilled",
            "minutes": worked / 60,
            "iterations": state.iteration,
            "loss": state.history[-1].loss,
            "step size": state.history[-1].step_size,
            "skipped": state.skipped,
            "shortened": state.shortened,
            "since start, s": time.monotonic() - started,
            "accuracy, %": scored(machine, images, recipe, state.synthetic, networks if done else 1),
        }
        if done:
            break


def _iterate(state: MatchingState, functions: StudentStepFunctions, trajectories: Tensor, bound: int) -> None:
    images, settings = len(state.synthetic.images), state.settings
    origin = draw_origin(range(bound), len(trajectories), 0, state.iteration)
    steps = draw_student_steps(images, settings.student_steps, images, settings.augmentation, 0, state.iteration)
    epochs = (origin.epoch, origin.epoch + settings.expert_epochs)
    start, target = (trajectories[origin.expert, epoch] for epoch in epochs)
    placed = place_steps(steps, None, state.synthetic.images)
    state.step([Match(functions, start, target, placed)], [origin])


def measure(machine: Machine, clock: Clock) -> Iterator[Row]:
    """Measure images, experts, the control, then the curve."""
    if machine.data is not None and not all((Path(machine.data) / name).is_file() for name in FILES):
        yield {"set": f"no {' and '.join(FILES)} in the folder given: digits instead"}
        machine = replace(machine, data=None)
    began = time.monotonic()
    with needed_packages():
        images = read_images(machine)
    recipe = recipe_of(machine, images)
    yield {
        "set": f"{images.name}: {len(images.train)} images, 1 per class distilled",
        "minutes": (time.monotonic() - began) / 60,
    }
    began = time.monotonic()
    with machine.as_in_a_run():
        trajectories = expert_trajectories(machine, images, recipe, clock)
        count, epochs = trajectories.shape[0], trajectories.shape[1] - 1
        yield {"set": f"{count} experts of {epochs} epochs", "minutes": (time.monotonic() - began) / 60}
        yield from curve(machine, images, recipe, trajectories, clock)


def works(machine: Machine, clock: Clock) -> list[Work]:
    """List one work, which takes the time that there is."""
    return [Work({"set": "the last points of the curve"}, lambda: measure(machine, clock))]


SECTION = Section(
    "curve",
    "9. What accuracy after how many minutes?",
    "Real images, 1 per class, in a run's precision, memory order and stacks. The packaged recipe's values, but for "
    "what was cut: experts are few (the recipe has 100 "
    "for CIFAR-10, 16 for digits), end where the latest target lies and give the soft labels from there (100 epochs in "
    "the recipe), iterations are as many as fit (10,000; 500), and networks are trained for 500 epochs (1,001). "
    "Minutes: of distilling alone, without scoring. Test accuracy of fresh ConvNets: of one, of three for the control "
    "and the last point. Nothing is chosen on the test set.",
    ("set", "minutes", "iterations", "accuracy, %", "loss", "step size", "skipped", "shortened"),
    seconds=55,
    least=45,
    works=works,
)
