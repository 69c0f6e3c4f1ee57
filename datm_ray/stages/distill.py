"""Distilling: one task, one synthetic set, by one worker or by a mesh of them, resumed from its last checkpoint.

The files of a run's folder, each written atomically:
    initial.arrow      the set before the first iteration
    checkpoint.arrow   the whole state, replaced every `checkpoint_every` iterations or `checkpoint_seconds`, before a
                       validation and when the command is stopped, and kept at the end; the images are in checkpoint/,
                       see `checkpoint`
    maps.arrow         with MetaDD: what its networks see in some images, before and after
    synthetic.arrow    the result; there only when the distillation is finished
    last-good.arrow    after too many diverged or skipped iterations in a row: the set of the last update
    cost.json          what it has cost so far, over all workers and attempts; replaced after every checkpoint, so what
                       a killed attempt spent after its last one is not counted. A file of its own, for the others are
                       the same however often a run was stopped
A transform that is large, as whitening is, lies once for all sets of all runs in ../transforms, see `artifact`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch

from datm_ray.artifact import TRANSFORMS, read_artifact, save_artifact
from datm_ray.config import ClusterConfig, RunConfig, run_identity
from datm_ray.core.networks.registry import build_network
from datm_ray.core.randomness import Purpose, derive_seed
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.core.training import PROTOCOLS, Heartbeat, Schedule, accuracy, train, validation_protocol
from datm_ray.data.dataset import Dataset
from datm_ray.errors import ClusterError, DivergenceError, ThresholdError
from datm_ray.methods.state import MetaTerm, State
from datm_ray.monitor.logs import fields
from datm_ray.monitor.provenance import provenance, workers_in_words
from datm_ray.monitor.spent import Account, Spent
from datm_ray.runtime.devices import Meter, prepare_device, to_device
from datm_ray.runtime.executor import Event, Finished, Note, Phase, Progress, WorkerRank, require_precision
from datm_ray.runtime.mesh import Mesh, open_mesh
from datm_ray.runtime.stopping import Interrupted, saving
from datm_ray.stages.checkpoint import PARTS, Attempt, load_checkpoint, read_computed, save_checkpoint
from datm_ray.stages.expert_progress import WRITE_SHARE
from datm_ray.stages.initial import initial_set
from datm_ray.stages.metadd import MetaNetworks
from datm_ray.stages.method import Method, Part
from datm_ray.stages.trajectory import TrajectoryMatching
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.files.patience import while_peers_wait
from datm_ray.store.sealed import rejecting_nonsense

INITIAL, SYNTHETIC = "initial.arrow", "synthetic.arrow"
LAST_GOOD = "last-good.arrow"
MAPS = "maps.arrow"
COST = "cost.json"

_log = logging.getLogger(__name__)


class DistillWorker:
    """Distils synthetic sets from one data set and its experts, alone or with others."""

    method: type[TrajectoryMatching] = TrajectoryMatching
    """Method that changes the set; a benchmark may put another one here."""

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
            ThresholdError: the set would start above the threshold, or many iterations in a row were.
            StoreError: an expert's first and last epochs are the same, and so are a start and its target.
            PeerLostError: another worker of the mesh died.
            OvertakenError: a newer attempt at the set has started.
        """
        folder, account = open_location(folder_uri), Account(self._device, self._cluster)
        if (folder / SYNTHETIC).exists():
            yield Finished()
            return
        yield Phase("preparing the networks")
        rows = len(config.roles) if worker_rank else 1
        columns = worker_rank.world_size // rows if worker_rank else 1
        timeout = self._cluster.peer_timeout
        waited_for = while_peers_wait(timeout if worker_rank else math.inf)
        with open_mesh(worker_rank, rows, columns, self._device, timeout) as mesh, waited_for:
            part = Part(config, self._dataset, store_uri, mesh, self._device, sharing)
            with closing(self.method(part)) as method:
                yield from _Run(part, folder, method, account).events()


class _Run:
    """One worker's part in the distillation of one set."""

    def __init__(self, part: Part, folder: Location, method: Method[Any], account: Account) -> None:
        config, dataset, mesh, device = part.config, part.dataset, part.mesh, part.device
        self._attempt = Attempt.start(folder, mesh)
        self._part, self._method, self._folder, self._account = part, method, self._attempt.folder, account
        self._config, self._dataset, self._mesh, self._device = config, dataset, mesh, device
        self._rows = part.rows
        self._spent_before = read_cost(folder)
        self._fingerprints = [experts.group.key.fingerprint for experts in method.experts]
        self._computed = read_computed(folder)
        self._found: dict[str, Any] = {}
        """Values that were found before the first iteration, by the setting that leaves them open."""
        self._saved_at = -1
        """Iteration of the last checkpoint, or of the first images."""
        self._next_save = time.monotonic() + config.cluster.checkpoint_seconds
        """Time from which a checkpoint is due, in seconds of the monotonic clock."""
        self._meta_networks = (
            None
            if config.metadd is None
            else MetaNetworks(
                config, config.metadd, dataset, part.store_uri, part.role, method.experts[0], self._rows, device
            )
        )

    def events(self) -> Iterator[Event]:
        """Iterate to the end; every worker gives the same events."""
        settings, meter = self._config.distill, Meter(self._device)
        yield from map(Note, self._method.notes)
        saved = self._saved_state()
        if saved is None:
            yield Phase("choosing the first images")
        state = saved or self._method.state(initial_set(self._part, self._method.experts[0]), settings)
        yield Phase(self._method.preparation)
        self._mesh.until_all_are_done(self._method.prepare)
        if saved is None:
            yield Phase("measuring the first matching losses")
            yield from map(Note, self._method.calibrate(state))
        self._found = self._found_values(state, is_new=saved is None)
        if saved is None:
            self._save_set(state.synthetic, INITIAL)
        yield from self._computed_otherwise(state.iteration)
        first = self._saved_at = state.iteration
        yield Progress(first, settings.iterations, metrics=self._mesh_metrics)
        with saving() as is_asked:
            if self._is_unvalidated(state):  # it was stopped before
                yield from self._validated(state)
                self._save_checkpoint(state)
            while state.iteration < settings.iterations:
                is_late = self._stop_if(is_asked(), state)
                began = time.monotonic()
                try:
                    self._method.step(state, self._meta_term(state.iteration))
                except (DivergenceError, ThresholdError):
                    self._keep_last_good(state)
                    raise
                seconds = time.monotonic() - began
                if self._is_unvalidated(state):
                    self._stop_if(is_asked(), state)
                    self._save_checkpoint(state)  # a validation may take minutes, and a kill meanwhile loses nothing
                    yield from self._validated(state)
                is_due = state.iteration % settings.checkpoint_every == 0 or state.iteration == settings.iterations
                saves = is_late or is_due
                if saves:
                    self._save_checkpoint(state)
                metrics = meter.measure() | self._measured(state, seconds)
                metrics["datm_ray_distill_iterations_total"] = float(state.iteration - first)
                yield Progress(state.iteration, settings.iterations, self._shown(state), metrics, saved=saves)
        final = state.chosen or state.synthetic
        if self._meta_networks is not None and (self._folder / INITIAL).exists():
            initial = read_artifact(self._folder / INITIAL).images[self._rows.first : self._rows.last]
            self._meta_networks.keep_maps(self._folder / MAPS, self._mesh, initial.to(self._device), final)
        yield from map(Note, self._method.warnings(state))
        self._note_cost()
        self._save_set(final, SYNTHETIC)
        yield Finished({**self._method.counts(state), "chosen_at": state.chosen_at}, meter.measure())

    def _stop_if(self, is_asked: bool, state: State[Any]) -> bool:
        """Save the state and raise `Interrupted` if any worker was asked to stop.

        Returns:
            True if a checkpoint is due on any worker's clock. All workers decide alike.
        """
        mine = torch.tensor([float(is_asked), float(time.monotonic() > self._next_save)])
        any_asked, any_late = self._mesh.sum_over_all(mine).tolist()
        if not any_asked:
            return bool(any_late)
        if state.iteration != self._saved_at:
            self._save_checkpoint(state)
        raise Interrupted(f"iteration {state.iteration} of {self._config.distill.iterations}")

    def _is_unvalidated(self, state: State[Any]) -> bool:
        """True if the set is due for validation and was not validated yet."""
        settings, done = self._config.distill, state.iteration
        is_due = done > 0 and (done % settings.validate_every == 0 or done == settings.iterations)
        return is_due and done not in (iteration for iteration, _ in state.validations[-1:])

    def _validated(self, state: State[Any]) -> Iterator[Phase]:
        yield Phase("validating the set")
        state.record_validation(*self._validate(state.synthetic))

    def _found_values(self, state: State[Any], is_new: bool) -> dict[str, Any]:
        settings, place, found = self._config.distill, self._folder / INITIAL, dict[str, Any]()
        if settings.initial_step_size is None and (is_new or place.exists()):
            found["initial_step_size"] = (
                state.synthetic.step_sizes.tolist() if is_new else list(read_artifact(place).step_sizes)
            )
        if settings.learning_rate_images is None and state.image_rate is not None:
            found["learning_rate_images"] = state.image_rate
        return found

    def _computed_otherwise(self, iteration: int) -> Iterator[Note]:
        """Note how student steps are computed from here on, and say so where it was done otherwise before."""
        now = dict(self._method.facts)
        if not now:
            return
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

    def _meta_term(self, iteration: int) -> MetaTerm | None:
        return None if self._meta_networks is None else self._meta_networks.term(iteration)

    def _measured(self, state: State[Any], seconds: float) -> dict[str, float]:
        """Measurements of one iteration, by the names in `monitor/metrics.py`."""
        values = {
            "iteration": state.iteration,
            "images_per_second": self._method.images_seen() / seconds,
            "iteration_seconds": seconds,
            **self._method.measured(state),
        }
        if state.validations:
            values["validation_accuracy_ratio"] = state.validations[-1][1]
        metrics = {f"datm_ray_distill_{name}": float(value) for name, value in values.items()}
        if state.meta_history:
            meta = state.meta_history[-1]
            named = {"loss": meta.total, "variance": meta.variance, "invariance": meta.invariance}
            named |= {"position": meta.position, "feature_ratio": meta.ratio}
            metrics |= {f"datm_ray_metadd_{name}": value for name, value in named.items()}
        return metrics | self._mesh_metrics

    @property
    def _mesh_metrics(self) -> dict[str, float]:
        return {"datm_ray_mesh_workers": float(self._mesh.rows * self._mesh.columns)}

    def _shown(self, state: State[Any]) -> dict[str, float]:
        values = dict(self._method.shown(state))
        if state.meta_history:
            values["metadd"], values["ratio"] = state.meta_history[-1].total, state.meta_history[-1].ratio
        if state.validations:
            values["validation"] = state.validations[-1][1]
        return values

    def _saved_state(self) -> State[Any] | None:
        """State of the last checkpoint; `None` for a new distillation."""
        settings, kind = self._config.distill, self._method.state
        if self._mesh.rank == 0:
            for place in (self._folder, self._folder / PARTS):
                place.remove_leftovers()
        saved = load_checkpoint(kind, self._folder, self._rows, settings, self._device)
        self._attempt.resumed_at = -1 if saved is None else saved.iteration
        self._require_one_state(self._attempt.resumed_at)
        if saved is not None:
            _log.info("distillation resumed %s", fields(run=self._config.name, iteration=saved.iteration))
        return saved

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
        spec = config.network.for_images(dataset.channels, dataset.size, dataset.classes)
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

    def _keep_last_good(self, state: State[Any]) -> None:
        self._save_checkpoint(state)
        self._save_set(state.synthetic, LAST_GOOD)
        self._mesh.barrier()  # the first error that arrives ends all workers

    def _save_checkpoint(self, state: State[Any]) -> None:
        began = time.monotonic()
        save_checkpoint(self._attempt, state, self._rows, self._mesh, run_identity(self._config), self._computed)
        self._note_cost()
        self._saved_at, ended = state.iteration, time.monotonic()
        self._next_save = ended + max(self._config.cluster.checkpoint_seconds, (ended - began) / WRITE_SHARE)
        _log.info("checkpoint saved %s", fields(run=self._config.name, iteration=state.iteration))

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
        if self._found:
            origin["found"] = self._found
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


def evaluation_schedule(config: RunConfig, step_size: float, protocol: str | None = None) -> Schedule:
    """How a fresh network is trained on a synthetic set."""
    return dataclasses.replace(
        PROTOCOLS[protocol or config.evaluate.protocol],
        learning_rate=step_size,
        augmentation=config.evaluate.augmentation,
    )
