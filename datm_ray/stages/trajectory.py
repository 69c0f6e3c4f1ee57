"""Trajectory matching as one worker does it: the experts it reads, the networks it matches, and what it reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from datm_ray.core.networks.parameters import FlatNetwork
from datm_ray.core.training import Heartbeat
from datm_ray.errors import StoreError
from datm_ray.methods.state import MetaTerm
from datm_ray.methods.trajectory.difficulty import draw_plan
from datm_ray.methods.trajectory.iteration import Distillation, Match, Origin
from datm_ray.methods.trajectory.matching import draw_student_steps
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions
from datm_ray.planning.fit import DataShape, DistillationPlan, Layout, chunk_by_trial, plans_of
from datm_ray.runtime.devices import to_device
from datm_ray.stages.expert_networks import ExpertNetworks
from datm_ray.stages.method import Part
from datm_ray.store.prefetch import Prefetcher
from datm_ray.store.trajectories import ExpertGroup


@dataclasses.dataclass(frozen=True)
class _Backbone:
    """One network that this worker matches."""

    number: int
    group: ExpertGroup
    """Experts of the network."""
    snapshots: Prefetcher
    """Reads them."""
    functions: StudentStepFunctions
    plan: DistillationPlan
    """Memory plan of the network."""
    chunk: int
    """Images of a micro-batch."""


class TrajectoryMatching:
    """Matches the networks of a worker's role with their experts, see `Method`."""

    functions: type[StudentStepFunctions] = StudentStepFunctions
    """How a student step and its reverse are computed; a benchmark may put another one here."""
    state = Distillation

    def __init__(self, part: Part) -> None:
        self._part = part
        config, dataset, role = part.config, part.dataset, part.role
        self.experts = [ExpertNetworks(each, dataset, part.store_uri, part.device) for each in config.each_backbone()]
        cluster = config.cluster
        options = StepOptions(
            compiled=cluster.compile, channels_last=cluster.channels_last, precision=cluster.precision
        )
        steps = {n: self.functions(FlatNetwork(self.experts[n].network), options) for n in role.backbones}
        planned = config
        if any(each.note for each in steps.values()):  # uncompiled steps take more memory
            planned = config.model_copy(update={"cluster": cluster.model_copy(update={"compile": False})})
        shape = DataShape(part.image, dataset.classes, 0)
        plans = plans_of(planned, shape, Layout(part.mesh.columns, part.roles, part.sharing))
        self._backbones = [
            _Backbone(number, group, Prefetcher(group), steps[number], plans[number], plans[number].chunk)
            for number in role.backbones
            for group in [self.experts[number].group]
        ]
        self.notes = sorted({each.note for each in steps.values()} - {""})
        first = next(iter(steps.values()), None)
        self.facts = {} if first is None else first.facts | ({"not_compiled_because": first.note} if first.note else {})

    def close(self) -> None:
        """Read nothing ahead any longer."""
        for backbone in self._backbones:
            backbone.snapshots.close()

    def prepare(self, heartbeat: Heartbeat) -> None:
        """Compile, which takes one network's workers longer than another's; on a GPU, find what it has room for."""
        for place, backbone in enumerate(self._backbones):

            def step(chunk: int, functions: StudentStepFunctions = backbone.functions) -> None:
                functions.prepare(chunk, self._part.image, self._part.dataset.classes, heartbeat)

            if self._part.device.type == "cuda":
                chunk = chunk_by_trial(step, backbone.plan, self._part.device)
                self._backbones[place] = dataclasses.replace(backbone, chunk=chunk)
            else:
                step(backbone.chunk)

    def step(self, state: Distillation, meta: MetaTerm | None) -> None:
        """Match every network once; the next iteration's snapshots are read meanwhile."""
        origins = self._origins(state.iteration)
        matches = [self._match(backbone, origins[backbone.number], state) for backbone in self._backbones]
        if state.iteration + 1 < self._part.config.distill.iterations:
            following = self._origins(state.iteration + 1)
            for backbone in self._backbones:
                backbone.snapshots.announce(*self._wanted(following[backbone.number]))
        state.step(
            matches,
            origins,
            meta=meta,
            all_sum=self._part.mesh.sum_over_classes,
            sum_over_backbones=self._part.mesh.sum_over_backbones,
            in_rows=self._part.mesh.in_rows,
        )

    def _origins(self, iteration: int) -> list[Origin]:
        config, allowed = self._part.config, self._part.config.distill.start_epochs
        starts = range(allowed.first, allowed.upper_bound(iteration))
        plans = [
            draw_plan(starts, config.experts.count, config.seed, iteration, backbone)
            for backbone in range(len(config.weights))
        ]
        return [Origin(plan.expert, plan.start) for plan in plans]

    def _wanted(self, origin: Origin) -> tuple[int, list[int]]:
        """The expert and the epochs of a start and its target."""
        return origin.expert, [origin.epoch, origin.epoch + self._part.config.distill.expert_epochs]

    def _match(self, backbone: _Backbone, origin: Origin, state: Distillation) -> Match:
        config, settings = self._part.config, self._part.config.distill
        steps = draw_student_steps(
            settings.ipc * self._part.dataset.classes,
            settings.student_steps,
            settings.batch_size,
            settings.augmentation,
            config.seed,
            state.iteration,
            backbone.number,
        )
        start, target = (
            to_device(each, self._part.device) for each in backbone.snapshots.read_params(*self._wanted(origin))
        )
        if torch.equal(start, target):
            self._require_motion(backbone, origin)  # a single pair skips its iteration, because its loss is not finite
        return Match(
            backbone.functions,
            start,
            target,
            [step.held_by(self._part.rows.first, self._part.rows.last) for step in steps],
            backbone.number,
            config.weights[backbone.number],
            backbone.chunk,
        )

    def _require_motion(self, backbone: _Backbone, origin: Origin) -> None:
        """Raise a `StoreError` if the expert ends where it began, given that its start and target are identical."""
        expert, (start, target) = self._wanted(origin)
        group = backbone.group
        epochs = group.read_info(expert).epochs
        first, last = group.read_params(expert, [epochs[0], epochs[-1]])
        if not np.array_equal(first, last):
            return
        raise StoreError(
            f"epochs {start} and {target} of expert {expert} in {group.location.uri} are identical, and so are its "
            f"first and last, {epochs[0]} and {epochs[-1]}: it does not move, and there is nothing to match",
            "it was imported from a script that stored the same parameters at every epoch, or experts.learning_rate "
            "is too low for experts.storage",
            f"delete {group.key} with `datm-ray store rm`, then train or import these experts again",
        )

    def measured(self, state: Distillation) -> dict[str, float]:
        """Measurements of the first backbone's matching."""
        first = state.history[-state.backbones]
        return {
            "matching_loss": first.loss,
            "step_size": first.step_size,
            "skipped_steps": state.skipped,
            "shortened_steps": state.shortened,
            "start_epoch": first.start,
            "upper_bound": self._part.config.distill.start_epochs.upper_bound(first.iteration),
        }

    def shown(self, state: Distillation) -> dict[str, float]:
        """Loss and step size of the first backbone, and the number of skipped updates."""
        first = state.history[-state.backbones]
        return {"loss": first.loss, "step_size": first.step_size, "skipped": float(state.skipped)}

    def counts(self, state: Distillation) -> dict[str, int]:
        """Numbers of skipped, diverged and shortened updates."""
        return {"skipped": state.skipped, "diverged": state.diverged, "shortened": state.shortened}

    def images_seen(self) -> float:
        """Images of all student steps of one iteration."""
        config, settings = self._part.config, self._part.config.distill
        images = settings.ipc * self._part.dataset.classes
        batches = -(-images // min(images, settings.batch_size))  # in a pass; the first of them may be short
        return settings.student_steps * images / batches * len(config.weights)

    def warnings(self, state: Distillation) -> Iterator[str]:
        """What must not look like success: a set that learned nothing, or not what the recipe says."""
        settings = self._part.config.distill
        updates, above = len(state.history), state.skipped - state.diverged
        if 4 * above > updates:
            yield (
                f"{above} of {updates} matching losses exceeded distill.threshold {settings.threshold:g}, and "
                "taught nothing: lower distill.student_steps or the start epochs, raise distill.expert_epochs, or see "
                "in the report whether it came all at once"
            )
        if 4 * state.diverged > updates:
            yield (
                f"{state.diverged} of {updates} updates were skipped because a value was not finite or a step size not "
                "positive: lower distill.learning_rate_images or learning_rate_step_size, or use "
                "cluster.precision=float32"
            )
        if 4 * state.shortened > updates:
            yield (
                f"{state.shortened} of {updates} gradients were shortened to distill.gradient_limit, "
                f"{settings.gradient_limit:g} times the loss: lower distill.learning_rate_images, or raise the limit"
            )
