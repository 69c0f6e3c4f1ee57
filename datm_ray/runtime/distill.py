"""Distilling: one task, one synthetic set, resumed from its last checkpoint.

The files of a run's folder, each written atomically:
    initial.arrow      the set before the first iteration
    checkpoint.arrow   the whole state, replaced every `checkpoint_every` iterations and kept at the end
    synthetic.arrow    the result; there only when the distillation is finished
    last-good.arrow    after a divergence: the set as it was before
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.artifact import save_artifact
from datm_ray.config import ClusterConfig, RunConfig
from datm_ray.core.difficulty import DifficultyRange, draw_plan
from datm_ray.core.distillation import Distillation, LearningRates
from datm_ray.core.matching import StudentStepFunctions, draw_student_steps
from datm_ray.core.networks import build_network
from datm_ray.core.parameters import FlatNetwork, unflatten_into
from datm_ray.core.randomness import Purpose, derive_seed
from datm_ray.core.synthetic import SyntheticSet, correct_rows, mean_correct_logits
from datm_ray.core.training import PROTOCOLS, Schedule, accuracy, predict_logits, train_to_end
from datm_ray.data.dataset import Dataset
from datm_ray.errors import DivergenceError, MissingExpertsError
from datm_ray.runtime.executor import Event, Finished, Note, Progress, prepare_device, to_device
from datm_ray.runtime.experts import expert_group, network_spec
from datm_ray.runtime.provenance import provenance
from datm_ray.store.filesystem import Location, open_location
from datm_ray.store.tensors import read_tensors, write_tensors
from datm_ray.store.trajectories import ExpertGroup

INITIAL, CHECKPOINT, SYNTHETIC = "initial.arrow", "checkpoint.arrow", "synthetic.arrow"
LAST_GOOD = "last-good.arrow"
CHECKPOINT_KIND = "checkpoint"


class ExpertNetworks:
    """The experts of a run as networks: their last snapshots, and logits of real images."""

    def __init__(self, config: RunConfig, dataset: Dataset, store_uri: str, device: torch.device) -> None:
        self.group = expert_group(store_uri, config, dataset.name, dataset.fingerprint)
        self.experts = self._available(config)
        spec = network_spec(config, dataset.channels, dataset.size, dataset.classes)
        self.network = build_network(spec, seed=0).to(device)
        self._last_epoch = config.experts.epochs
        self._device = device

    def _available(self, config: RunConfig) -> list[int]:
        available = [expert for expert in self.group.experts() if expert < config.experts.count]
        if len(available) < config.experts.count:
            raise MissingExpertsError(
                f"{self.group.location.uri} holds {len(available)} of the {config.experts.count} experts that "
                f"{config.name} needs",
                "expert training has not finished for this recipe",
                f"run `datm-ray experts {config.name}` with the same --out and --store",
            )
        return available

    def logits(self, expert: int, images: Tensor) -> Tensor:
        """Logits [n k] of an expert's last snapshot."""
        (parameters,) = self.group.read_params(expert, [self._last_epoch])
        unflatten_into(self.network, to_device(parameters, self._device))
        return predict_logits(self.network, images)

    def soft_labels(self, images: Tensor, labels: Tensor) -> Tensor:
        """Soft labels [n k]: the mean logits of the experts that classify each image correctly."""
        return mean_correct_logits(torch.stack([self.logits(expert, images) for expert in self.experts]), labels)


class DistillWorker:
    """Distils synthetic sets from one data set and its experts."""

    def __init__(self, dataset: Dataset, cluster: ClusterConfig) -> None:
        self._device = prepare_device(cluster)
        self._cluster = cluster
        self._dataset = dataset

    def distill(self, config: RunConfig, store_uri: str, folder_uri: str) -> Iterator[Event]:
        """Distil one recipe into its folder, from the last checkpoint if there is one.

        Raises:
            MissingExpertsError: the store has not all experts of the recipe.
            DivergenceError: a value stopped being finite; the last good state is in the checkpoint.
        """
        folder = open_location(folder_uri)
        if (folder / SYNTHETIC).exists():
            yield Finished()
            return
        experts = ExpertNetworks(config, self._dataset, store_uri, self._device)
        state = self._resume_or_start(config, experts, folder)
        functions = StudentStepFunctions(FlatNetwork(experts.network), compiled=self._cluster.compile)
        if functions.note:
            yield Note(functions.note)
        settings = config.distill
        total = settings.iterations
        while state.iteration < total:
            try:
                loss = self._iterate(config, experts, state, functions)
            except DivergenceError:
                self._save_checkpoint(state, config, folder)
                self._save_set(state.synthetic, config, experts.group, folder / LAST_GOOD)
                raise
            values = {"loss": loss, "step_size": float(state.synthetic.step_size), "skipped": float(state.skipped)}
            if state.iteration % settings.validate_every == 0 or state.iteration == total:
                state.record_validation(*self._validate(config, state.synthetic))
            if state.validations:
                values["validation"] = state.validations[-1][1]
            if state.iteration % settings.checkpoint_every == 0 or state.iteration == total:
                self._save_checkpoint(state, config, folder)
            yield Progress(state.iteration, total, values)
        self._save_set(state.chosen or state.synthetic, config, experts.group, folder / SYNTHETIC)
        yield Finished({"skipped": state.skipped, "chosen_at": state.chosen_at})

    def _iterate(
        self, config: RunConfig, experts: ExpertNetworks, state: Distillation, functions: StudentStepFunctions
    ) -> float:
        settings = config.distill
        plan = draw_plan(difficulty_range(config), len(experts.experts), config.seed, state.iteration)
        expert = experts.experts[plan.expert]
        start, target = experts.group.read_params(expert, [plan.start, plan.start + settings.expert_epochs])
        steps = draw_student_steps(
            len(state.synthetic.images),
            settings.student_steps,
            settings.batch_size,
            settings.augmentation,
            config.seed,
            state.iteration,
        )
        parameters = (to_device(start, self._device), to_device(target, self._device))
        return state.step(functions, expert, plan.start, parameters, steps).loss

    def _resume_or_start(self, config: RunConfig, experts: ExpertNetworks, folder: Location) -> Distillation:
        settings = config.distill
        rates = LearningRates(
            settings.learning_rate_images, settings.learning_rate_labels, settings.learning_rate_step_size
        )
        checkpoint = folder / CHECKPOINT
        if checkpoint.exists():
            arrays = read_tensors(checkpoint, kind=CHECKPOINT_KIND).arrays
            return Distillation.from_arrays(arrays, rates, settings.threshold, self._device)
        synthetic = self._initial_set(config, experts)
        self._save_set(synthetic, config, experts.group, folder / INITIAL)
        return Distillation(synthetic, rates, settings.threshold)

    def _initial_set(self, config: RunConfig, experts: ExpertNetworks) -> SyntheticSet:
        """Real images that experts classify correctly, with their mean correct logits as soft labels."""
        dataset = self._dataset
        all_images = to_device(dataset.train_images, self._device)

        def predictions(position: int) -> NDArray[np.int64]:
            return experts.logits(experts.experts[position], all_images).argmax(dim=1).cpu().numpy()

        rows = correct_rows(
            dataset.train_labels,
            config.distill.ipc,
            config.seed,
            experts=len(experts.experts),
            predictions=predictions,
        )
        images = torch.tensor(dataset.train_images[rows], device=self._device)
        labels = torch.tensor(dataset.train_labels[rows], device=self._device)
        step_size = torch.tensor(config.distill.initial_step_size, device=self._device)
        return SyntheticSet(images, experts.soft_labels(images, labels), step_size, labels)

    def _validate(self, config: RunConfig, synthetic: SyntheticSet) -> tuple[float, float]:
        """Mean validation accuracy of fresh networks trained on the set, and its standard error."""
        dataset = self._dataset
        images = to_device(dataset.validation_images, self._device)
        labels = to_device(dataset.validation_labels, self._device)
        spec = network_spec(config, dataset.channels, dataset.size, dataset.classes)
        schedule = evaluation_schedule(config, float(synthetic.step_size), protocol="short")
        accuracies = []
        for number in range(config.distill.validation_seeds):
            seed = derive_seed(config.seed, Purpose.VALIDATION, number)
            network = build_network(spec, seed).to(self._device)
            train_to_end(network, synthetic.images, synthetic.soft_labels, schedule, seed)
            accuracies.append(accuracy(network, images, labels))
        mean = sum(accuracies) / len(accuracies)
        # Over images only: networks scored on the same images are not independent draws.
        return mean, math.sqrt(mean * (1 - mean) / len(images))

    def _save_checkpoint(self, state: Distillation, config: RunConfig, folder: Location) -> None:
        metadata = {"recipe": config.identity(), "iteration": state.iteration}
        write_tensors(folder / CHECKPOINT, state.to_arrays(), kind=CHECKPOINT_KIND, metadata=metadata)

    def _save_set(self, synthetic: SyntheticSet, config: RunConfig, group: ExpertGroup, location: Location) -> None:
        origin = provenance(self._device) | {
            "dataset": self._dataset.name,
            "dataset_fingerprint": self._dataset.fingerprint,
            "expert_fingerprint": group.key.fingerprint,
        }
        save_artifact(
            location, synthetic, self._dataset.transform, self._dataset.class_names, config.identity(), origin
        )


def difficulty_range(config: RunConfig) -> DifficultyRange:
    """The start epochs that the recipe allows."""
    settings = config.distill
    return DifficultyRange(
        settings.first_start, settings.start_bound, settings.final_start_bound, settings.expand_iterations
    )


def evaluation_schedule(config: RunConfig, step_size: float, protocol: str | None = None) -> Schedule:
    """How a fresh network is trained on a synthetic set."""
    return dataclasses.replace(
        PROTOCOLS[protocol or config.evaluate.protocol],
        learning_rate=step_size,
        augmentation=config.evaluate.augmentation,
    )


def read_history(folder: Location) -> dict[str, Any]:
    """The history columns and validation curve of a run's checkpoint, by name."""
    arrays = read_tensors(folder / CHECKPOINT, kind=CHECKPOINT_KIND).arrays
    return {name: array for name, array in arrays.items() if name.startswith(("history.", "validation."))}
