"""Distilling: one task, one synthetic set, by one worker or by a mesh of them, resumed from its last checkpoint.

The files of a run's folder, each written atomically:
    initial.arrow      the set before the first iteration
    checkpoint.arrow   the whole state, replaced every `checkpoint_every` iterations and kept at the end; the images
                       are in checkpoint/, see `checkpoint`
    maps.arrow         with MetaDD: what its networks see in some images, before and after
    synthetic.arrow    the result; there only when the distillation is finished
    last-good.arrow    after too many diverged iterations in a row: the set of the last update
    cost.json          what it has cost so far, over all workers and attempts; replaced after every checkpoint, so what
                       a killed attempt spent after its last one is not counted. A file of its own, for the others are
                       the same however often a run was stopped
A transform that is large, as whitening is, lies once for all sets of all runs in ../transforms, see `artifact`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import torch
from numpy.typing import NDArray

from datm_ray.artifact import TRANSFORMS, read_artifact, save_artifact
from datm_ray.config import ClusterConfig, DistillConfig, RunConfig, run_identity
from datm_ray.core.networks.parameters import FlatNetwork
from datm_ray.core.networks.registry import build_network
from datm_ray.core.randomness import Purpose, derive_seed
from datm_ray.core.synthetic import SyntheticSet, correct_rows, hard_logits, random_rows
from datm_ray.core.training import PROTOCOLS, Heartbeat, Schedule, accuracy, train, validation_protocol
from datm_ray.data.dataset import Dataset
from datm_ray.errors import ClusterError, DivergenceError, StoreError
from datm_ray.methods.trajectory.difficulty import DifficultyRange, draw_plan
from datm_ray.methods.trajectory.distillation import Distillation, IterationRecord, LearningRates, Limits, Match, Origin
from datm_ray.methods.trajectory.matching import draw_student_steps
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions
from datm_ray.monitor.spent import Account, Spent
from datm_ray.planning.fit import DataShape, DistillationPlan, Layout, chunk_by_trial, plans_of
from datm_ray.runtime.devices import Meter, prepare_device, to_device
from datm_ray.runtime.executor import Event, Finished, Note, Progress, WorkerRank, require_precision
from datm_ray.runtime.mesh import Mesh, open_mesh
from datm_ray.stages.checkpoint import PARTS, Rows, load_checkpoint, read_computed, save_checkpoint
from datm_ray.stages.expert_networks import ExpertNetworks
from datm_ray.stages.experts import network_spec
from datm_ray.stages.metadd import MetaNetworks
from datm_ray.stages.provenance import provenance, workers_in_words
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.prefetch import Prefetcher
from datm_ray.store.sealed import rejecting_nonsense
from datm_ray.store.trajectories import ExpertGroup

INITIAL, SYNTHETIC = "initial.arrow", "synthetic.arrow"
LAST_GOOD = "last-good.arrow"
MAPS = "maps.arrow"
COST = "cost.json"


class DistillWorker:
    """Distils synthetic sets from one data set and its experts, alone or with others."""

    functions: type[StudentStepFunctions] = StudentStepFunctions
    """How a student step and its reverse are computed; a benchmark may put another one here."""

    def __init__(self, dataset: Dataset, cluster: ClusterConfig) -> None:
        self._device = prepare_device(cluster)
        require_precision(cluster, self._device.type == "cuda")
        self._cluster = cluster
        self._dataset = dataset

    def distill(
        self,
        config: RunConfig,
        store_uri: str,
        folder_uri: str,
        sharing: int = 1,
        worker_rank: WorkerRank | None = None,
    ) -> Iterator[Event]:
        """Distil one recipe into its folder, from the last checkpoint if there is one.

        Args:
            sharing: distilling workers that may be on this machine at a time.
            worker_rank: this worker's place among those that distil the recipe together.

        Raises:
            MissingExpertsError: the store has not all experts of the recipe.
            DivergenceError: too many iterations in a row diverged; the set of the last update is in the checkpoint.
            StoreError: an expert's first and last epochs are the same, and so are a start and its target.
            PeerLostError: another worker of the mesh died.
        """
        folder, account = open_location(folder_uri), Account(self._device, self._cluster)
        if (folder / SYNTHETIC).exists():
            yield Finished()
            return
        rows = len(config.roles) if worker_rank else 1
        columns = worker_rank.world_size // rows if worker_rank else 1
        with open_mesh(worker_rank, rows, columns, self._device, self._cluster.peer_timeout) as mesh:
            run = _Run(config, self._dataset, store_uri, folder, mesh, self._device, sharing, account, self.functions)
            with closing(run):
                yield from run.events()


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


class _Run:
    """One worker's part in the distillation of one recipe."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        store_uri: str,
        folder: Location,
        mesh: Mesh,
        device: torch.device,
        sharing: int,
        account: Account | None = None,
        functions: type[StudentStepFunctions] = StudentStepFunctions,
    ) -> None:
        self._functions = functions
        self._account, self._spent_before = account or Account(device, config.cluster), read_cost(folder)
        self._config, self._dataset, self._folder, self._mesh, self._device = config, dataset, folder, mesh, device
        self._rows = Rows.of_shard(mesh.column, mesh.columns, dataset.classes, config.distill.ipc)
        networks = [ExpertNetworks(each, dataset, store_uri, device) for each in config.each_backbone()]
        self._first = networks[0]
        self._fingerprints = [experts.group.key.fingerprint for experts in networks]
        self._computed = read_computed(folder)
        self._roles = config.roles if mesh.rows > 1 else ()
        role = self._roles[mesh.row] if self._roles else config.whole_role
        self._image = (dataset.channels, *dataset.size)
        steps = {number: self._step_functions(networks[number]) for number in role.backbones}
        planned = config
        if any(each.note for each in steps.values()):  # what runs uncompiled takes more memory
            uncompiled = config.cluster.model_copy(update={"compile": False})
            planned = config.model_copy(update={"cluster": uncompiled})
        shape, layout = DataShape(self._image, dataset.classes, 0), Layout(mesh.columns, self._roles, sharing)
        plans = plans_of(planned, shape, layout)
        self._backbones = [
            _Backbone(number, group, Prefetcher(group), steps[number], plans[number], plans[number].chunk)
            for number in role.backbones
            for group in [networks[number].group]
        ]
        self._meta_networks = (
            None
            if config.metadd is None
            else MetaNetworks(config, config.metadd, dataset, store_uri, role, self._first, self._rows, device)
        )

    def _step_functions(self, experts: ExpertNetworks) -> StudentStepFunctions:
        cluster = self._config.cluster
        options = StepOptions(
            compiled=cluster.compile, channels_last=cluster.channels_last, precision=cluster.precision
        )
        return self._functions(FlatNetwork(experts.network), options)

    def close(self) -> None:
        """Read nothing ahead any longer."""
        for backbone in self._backbones:
            backbone.snapshots.close()

    def events(self) -> Iterator[Event]:
        """Iterate to the end; every worker gives the same events."""
        settings, meter = self._config.distill, Meter(self._device)
        for note in {backbone.functions.note for backbone in self._backbones} - {""}:
            yield Note(note)
        state = self._resume_or_start()
        self._mesh.until_all_are_done(self._prepare)
        yield from self._computed_otherwise(state.iteration)
        first = state.iteration
        while state.iteration < settings.iterations:
            began = time.monotonic()
            try:
                records = self._iterate(state)
            except DivergenceError:
                self._keep_last_good(state)
                raise
            seconds = time.monotonic() - began
            last = state.iteration == settings.iterations
            if state.iteration % settings.validate_every == 0 or last:
                state.record_validation(*self._validate(state.synthetic))
            saves = state.iteration % settings.checkpoint_every == 0 or last
            if saves:
                self._save_checkpoint(state)
            metrics = meter.measure() | self._measured(state, records, seconds)
            metrics["datm_ray_distill_iterations_total"] = float(state.iteration - first)
            yield Progress(state.iteration, settings.iterations, _shown(state, records), metrics, saved=saves)
        final = state.chosen or state.synthetic
        if self._meta_networks is not None and (self._folder / INITIAL).exists():
            initial = read_artifact(self._folder / INITIAL).images[self._rows.first : self._rows.last]
            self._meta_networks.keep_maps(self._folder / MAPS, self._mesh, initial.to(self._device), final)
        yield from _warnings(state, settings)
        self._note_cost()
        self._save_set(final, SYNTHETIC)
        counts = {
            "skipped": state.skipped,
            "diverged": state.diverged,
            "shortened": state.shortened,
            "chosen_at": state.chosen_at,
        }
        yield Finished(counts, meter.measure())

    def _computed_otherwise(self, iteration: int) -> Iterator[Note]:
        """Note how student steps are computed from here on, and say so where it was done otherwise before."""
        if not self._backbones:
            return
        functions = self._backbones[0].functions
        now = functions.facts | ({"not_compiled_because": functions.note} if functions.note else {})
        before = {name: value for name, value in (self._computed or [{}])[-1].items() if name != "from_iteration"}
        changed = [
            f"{name} {before[name]} before, {value} now"
            for name, value in now.items()
            if before.get(name, value) != value
        ]
        if before != now:
            self._computed.append({"from_iteration": iteration, **now})
        if changed:
            yield Note(
                f"student steps are computed otherwise from iteration {iteration} on ({'; '.join(changed)}): the "
                "result differs in rounding from one without the change"
            )

    def _measured(self, state: Distillation, records: list[IterationRecord], seconds: float) -> dict[str, float]:
        """What is to be watched of an iteration."""
        config, first = self._config, records[0]
        images = config.distill.ipc * self._dataset.classes
        batches = -(-images // min(images, config.distill.batch_size))  # in a pass; the first of them may be short
        seen = config.distill.student_steps * images / batches * len(config.weights)
        values = {
            "iteration": state.iteration,
            "matching_loss": first.loss,
            "step_size": first.step_size,
            "skipped_steps": state.skipped,
            "shortened_steps": state.shortened,
            "start_epoch": first.start,
            "upper_bound": difficulty_range(config).upper_bound(first.iteration),
            "images_per_second": seen / seconds,
            "iteration_seconds": seconds,
        }
        if state.validations:
            values["validation_accuracy_ratio"] = state.validations[-1][1]
        metrics = {f"datm_ray_distill_{name}": float(value) for name, value in values.items()}
        if state.meta_history:
            meta = state.meta_history[-1]
            named = {"loss": meta.total, "variance": meta.variance, "invariance": meta.invariance}
            named |= {"position": meta.position, "feature_ratio": meta.ratio}
            metrics |= {f"datm_ray_metadd_{name}": value for name, value in named.items()}
        return metrics | {"datm_ray_mesh_workers": float(self._mesh.rows * self._mesh.columns)}

    def _prepare(self, heartbeat: Heartbeat) -> None:
        """Compile, which takes one network's workers longer than another's; on a GPU, find what it has room for."""
        for place, backbone in enumerate(self._backbones):

            def step(chunk: int, functions: StudentStepFunctions = backbone.functions) -> None:
                functions.prepare(chunk, self._image, self._dataset.classes, heartbeat)

            if self._device.type == "cuda":
                chunk = chunk_by_trial(step, backbone.plan, self._device)
                self._backbones[place] = dataclasses.replace(backbone, chunk=chunk)
            else:
                step(backbone.chunk)

    def _iterate(self, state: Distillation) -> list[IterationRecord]:
        origins = self._origins(state.iteration)
        matches = [self._match(backbone, origins[backbone.number], state) for backbone in self._backbones]
        if state.iteration + 1 < self._config.distill.iterations:
            following = self._origins(state.iteration + 1)
            for backbone in self._backbones:
                backbone.snapshots.announce(*self._wanted(following[backbone.number]))
        return state.step(
            matches,
            origins,
            meta=None if self._meta_networks is None else self._meta_networks.term(state.iteration),
            all_sum=self._mesh.sum_over_classes,
            sum_over_backbones=self._mesh.sum_over_backbones,
            in_rows=self._mesh.in_rows,
        )

    def _origins(self, iteration: int) -> list[Origin]:
        config, difficulty = self._config, difficulty_range(self._config)
        plans = [
            draw_plan(difficulty, config.experts.count, config.seed, iteration, backbone)
            for backbone in range(len(config.weights))
        ]
        return [Origin(plan.expert, plan.start) for plan in plans]

    def _wanted(self, origin: Origin) -> tuple[int, list[int]]:
        """The expert and the epochs of a start and its target."""
        return origin.expert, [origin.epoch, origin.epoch + self._config.distill.expert_epochs]

    def _match(self, backbone: _Backbone, origin: Origin, state: Distillation) -> Match:
        config, settings = self._config, self._config.distill
        steps = draw_student_steps(
            settings.ipc * self._dataset.classes,
            settings.student_steps,
            settings.batch_size,
            settings.augmentation,
            config.seed,
            state.iteration,
            backbone.number,
        )
        start, target = (
            to_device(each, self._device) for each in backbone.snapshots.read_params(*self._wanted(origin))
        )
        if torch.equal(start, target):
            self._require_motion(backbone, origin)  # a single pair costs its iteration, for its loss is not finite
        return Match(
            backbone.functions,
            start,
            target,
            [step.held_by(self._rows.first, self._rows.last) for step in steps],
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

    def _resume_or_start(self) -> Distillation:
        settings = self._config.distill
        of_labels = settings.learning_rate_labels if settings.labels == "soft" else 0.0
        rates = LearningRates(settings.learning_rate_images, of_labels, settings.learning_rate_step_size)
        if self._mesh.rank == 0:
            for place in (self._folder, self._folder / PARTS):
                place.remove_leftovers()
        limits = Limits(settings.threshold, math.inf if settings.gradient_limit is None else settings.gradient_limit)
        saved = load_checkpoint(self._folder, self._rows, rates, limits, self._device)
        self._require_one_state(-1 if saved is None else saved.iteration)
        if saved is not None:
            return saved
        synthetic = self._initial_set()
        self._save_set(synthetic, INITIAL)
        return Distillation(synthetic, rates, limits)

    def _require_one_state(self, iteration: int) -> None:
        """Raise an error unless every worker resumes at the same iteration; -1 stands for a new distillation."""
        mine = torch.tensor([iteration, 1.0], dtype=torch.float64)
        total, workers = self._mesh.sum_over_all(mine).tolist()
        if total != iteration * workers:
            raise ClusterError(
                f"the workers that share {self._config.name} see different checkpoints in {self._folder.uri}",
                "they run on machines that do not share this disk",
                "give --out and --store on a shared file system or on s3://",
            )

    def _initial_set(self) -> SyntheticSet:
        """Choose the first rows of this shard: real images that experts classify correctly, with their mean logits.

        The recipe may ask for any images, or for hard labels.
        """
        config, dataset, rows = self._config, self._dataset, self._rows
        step_sizes = torch.full((len(config.weights),), config.distill.initial_step_size, device=self._device)
        shape = (rows.last - rows.first, dataset.channels, *dataset.size)
        images = torch.zeros(shape, device=self._device)
        soft_labels = torch.zeros(len(images), dataset.classes, device=self._device)
        labels = torch.tensor(rows.classes(config.distill.ipc), device=self._device)
        labels = labels.repeat_interleave(config.distill.ipc)

        def choose(heartbeat: Heartbeat) -> None:
            if self._mesh.row == 0:
                images.copy_(torch.tensor(dataset.train_images[self._initial_rows(heartbeat)]))
                if config.distill.labels == "hard":
                    soft_labels.copy_(hard_logits(labels, dataset.classes))
                else:
                    soft_labels.copy_(self._first.soft_labels(images, labels, heartbeat))

        self._mesh.until_all_are_done(choose)
        # To the other backbones' workers as it is, for machines may round differently; x + 0 is x.
        images, soft_labels = self._mesh.sum_over_backbones(images), self._mesh.sum_over_backbones(soft_labels)
        return SyntheticSet(images, soft_labels, step_sizes, labels)

    def _initial_rows(self, heartbeat: Heartbeat) -> NDArray[np.int64]:
        dataset, settings = self._dataset, self._config.distill
        if settings.initial == "random":
            return random_rows(dataset.train_labels, settings.ipc, self._config.seed)[
                self._rows.first : self._rows.last
            ]

        def predict(expert: int, rows: NDArray[np.int64]) -> NDArray[np.int64]:
            images = torch.tensor(dataset.train_images[rows], device=self._device)
            return self._first.logits(expert, images, heartbeat).argmax(dim=1).cpu().numpy()

        return correct_rows(
            dataset.train_labels,
            settings.ipc,
            self._config.seed,
            experts=self._first.count,
            predict=predict,
            classes=self._rows.classes(settings.ipc),
        )

    def _validate(self, held: SyntheticSet) -> tuple[float, float]:
        """Mean validation accuracy of fresh networks trained on the whole set, and its standard error."""
        whole, seeds = self._whole(held), self._config.distill.validation_seeds

        def work(heartbeat: Heartbeat) -> float:
            assert whole is not None
            return sum(self._accuracy(whole, number, heartbeat) for number in range(seeds)) / seeds

        mean = self._mesh.from_first(work)
        # Over images only: networks scored on the same images are not independent draws.
        return mean, math.sqrt(mean * (1 - mean) / len(self._dataset.validation_labels))

    def _accuracy(self, whole: SyntheticSet, number: int, heartbeat: Heartbeat) -> float:
        config, dataset = self._config, self._dataset
        spec = network_spec(config, dataset.channels, dataset.size, dataset.classes)
        protocol = validation_protocol(config.evaluate.protocol)
        schedule = evaluation_schedule(config, float(whole.step_size), protocol)
        seed = derive_seed(config.seed, Purpose.VALIDATION, number)
        network = build_network(spec, seed).to(self._device)
        for _ in train(network, whole.images, whole.soft_labels, schedule, seed):
            heartbeat()
        images = to_device(dataset.validation_images, self._device)
        return accuracy(network, images, to_device(dataset.validation_labels, self._device), heartbeat)

    def _whole(self, held: SyntheticSet) -> SyntheticSet | None:
        """All shards' rows, on the first worker."""
        images, soft_labels, labels = (self._mesh.gather(part) for part in (held.images, held.soft_labels, held.labels))
        if images is None or soft_labels is None or labels is None:
            return None
        return SyntheticSet(images, soft_labels, held.step_sizes, labels)

    def _keep_last_good(self, state: Distillation) -> None:
        self._save_checkpoint(state)
        self._save_set(state.synthetic, LAST_GOOD)
        self._mesh.barrier()  # the first error that arrives ends all workers

    def _save_checkpoint(self, state: Distillation) -> None:
        save_checkpoint(self._folder, state, self._rows, self._mesh, run_identity(self._config), self._computed)
        self._note_cost()

    def _note_cost(self) -> None:
        """Write down what all workers have spent, this time and before."""
        now = over_workers(self._mesh, self._account.spent())
        if self._mesh.is_first:
            (self._folder / COST).write_json((self._spent_before + now).to_json())

    def _save_set(self, held: SyntheticSet, name: str) -> None:
        whole, mesh = self._whole(held), self._mesh
        workers = workers_in_words(self._device, mesh.sum_over_all, mesh.rank, mesh.rows * mesh.columns)
        if whole is None:
            return
        dataset = self._dataset
        origin = provenance(self._device) | {
            "workers": workers,
            "shards": mesh.columns,
            "dataset": dataset.name,
            "dataset_fingerprint": dataset.fingerprint,
            "expert_fingerprint": ", ".join(self._fingerprints),
        }
        if self._computed:
            origin["student_steps"] = self._computed[-1]
        if self._computed[1:]:
            origin["student_steps_before"] = self._computed[:-1]
        place, recipe = self._folder / name, run_identity(self._config)
        transforms = self._folder.parent / TRANSFORMS
        save_artifact(place, whole, dataset.transform, dataset.class_names, recipe, origin, transforms)


def over_workers(mesh: Mesh, mine: Spent) -> Spent:
    """What all workers have spent; every one gets the same."""
    sums = [mine.seconds, mine.cpu_seconds, mine.gpu_seconds, mine.read_bytes, mine.write_bytes]
    peaks = [mine.peak_memory_bytes * (rank == mesh.rank) for rank in range(mesh.rows * mesh.columns)]
    summed = mesh.sum_over_all(torch.tensor([*sums, *peaks], dtype=torch.float64)).tolist()
    seconds, cpu_seconds, gpu_seconds, read, written = summed[: len(sums)]
    return Spent(seconds, cpu_seconds, gpu_seconds, max(summed[len(sums) :]), read, written)


def read_cost(folder: Location) -> Spent:
    """Cost of the distillation in a folder until its last note; zero without a note."""
    place = folder / COST
    if not place.exists():
        return Spent()
    with rejecting_nonsense(place):
        return Spent.from_json(place.read_json())


def _warnings(state: Distillation, settings: DistillConfig) -> Iterator[Note]:
    """What must not look like success: a set that learned nothing, or not what the recipe says."""
    updates, above = len(state.history), state.skipped - state.diverged
    if 4 * above > updates:
        yield Note(
            f"{above} of {updates} matching losses exceeded distill.threshold {settings.threshold:g}, and "
            "taught nothing: lower distill.student_steps or the start epochs, raise distill.expert_epochs, or see in "
            "the report whether it came all at once"
        )
    if 4 * state.diverged > updates:
        yield Note(
            f"{state.diverged} of {updates} updates were skipped because a value was not finite or a step size not "
            "positive: lower distill.learning_rate_images or learning_rate_step_size, or use "
            "cluster.precision=float32"
        )
    if 4 * state.shortened > updates:
        yield Note(
            f"{state.shortened} of {updates} gradients were shortened to distill.gradient_limit, "
            f"{settings.gradient_limit:g} times the loss: lower distill.learning_rate_images, or raise the limit"
        )


def _shown(state: Distillation, records: list[IterationRecord]) -> dict[str, float]:
    values = {"loss": records[0].loss, "step_size": records[0].step_size, "skipped": float(state.skipped)}
    if state.meta_history:
        values["metadd"], values["ratio"] = state.meta_history[-1].total, state.meta_history[-1].ratio
    if state.validations:
        values["validation"] = state.validations[-1][1]
    return values


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
