"""Distillation of one synthetic set in one task, by one worker or a mesh of workers, with checkpoints to resume from.

The files that a distillation writes into the run's folder, each atomically:
    initial.arrow      the set before the first iteration
    checkpoint.arrow   the whole state, kept at the end; the images are in checkpoint/, see `checkpoint`. It is replaced
                       every `checkpoint_every` iterations or `checkpoint_seconds`, before a validation, at the end, and
                       when the command is stopped. A piece (part of a set) spends at most about `WRITE_SHARE` of its
                       time on checkpoints
    maps.arrow         with MetaDD: class activation maps of some images, before and after the distillation
    synthetic.arrow    the result; it exists only when the distillation is finished
    candidates/        sets that wait for their validation, see `validation`; only while a set is unfinished
    last-good.arrow    after too many diverged or skipped iterations in a row: the set of the last update
    cost.json          the cost so far, over all workers and attempts; replaced after every checkpoint, so the cost of a
                       killed attempt after its last checkpoint is not counted. It is a separate file, because the
                       bytes of the other files do not depend on how often a run was stopped
A large transform, such as whitening, is stored once for all sets of all runs in ../transforms, see `artifact`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datm_ray.artifact import SYNTHETIC as SYNTHETIC, TRANSFORMS, read_artifact, save_artifact
from datm_ray.config import ClusterConfig, RunConfig, recipe_of_set, run_identity
from datm_ray.core.steps import Steps
from datm_ray.core.synthetic import Rows, SyntheticSet
from datm_ray.data.dataset import Dataset
from datm_ray.errors import DivergenceError, OvertakenError, ThresholdError
from datm_ray.methods.state import MetaTerm, State
from datm_ray.monitor.logs import fields
from datm_ray.monitor.provenance import provenance, workers_in_words
from datm_ray.monitor.spent import Account, Spent, total
from datm_ray.runtime.executor import (
    Event,
    Finished,
    More,
    Note,
    Phase,
    Progress,
    Task,
    WorkerRank,
    require_precision,
)
from datm_ray.runtime.heartbeats import reporting
from datm_ray.runtime.machine.devices import prepare_device
from datm_ray.runtime.mesh import ALONE, Mesh, open_mesh
from datm_ray.runtime.stopping import Interrupted, saving
from datm_ray.stages.distill.checkpoint import PARTS, Attempt, load_checkpoint, read_computed, save_checkpoint
from datm_ray.stages.distill.metadd import MetaNetworks, keep_maps_alone
from datm_ray.stages.distill.validation import (
    Candidates,
    is_due,
    only_validations_are_left,
    standard_error,
    unvalidated,
    validating,
)
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.experts.progress import REPORT_INTERVAL, WRITE_SHARE
from datm_ray.stages.methods.base import Method
from datm_ray.stages.methods.part import Part
from datm_ray.stages.methods.registry import method_of
from datm_ray.stages.prior import PriorOfSet
from datm_ray.store.files.filesystem import (
    Location,
    MissingFileError,
    open_location,
    require_shared,
    seconds_to_look,
)
from datm_ray.store.sealed import rejecting_nonsense

INITIAL = "initial.arrow"
LAST_GOOD = "last-good.arrow"
MAPS = "maps.arrow"
COST = "cost.json"
FOUND = "found"
"""Key in a set's provenance. Its value maps each setting of `distill` that is null in the recipe to the value that
the run found before the first iteration."""
VALIDATING = "validating the set"
CHOOSING = "choosing the first images"

_log = logging.getLogger(__name__)


class DistillWorker:
    """Distils synthetic sets from one data set and its experts, alone or together with other workers."""

    method: type[Method] | None = None
    """Class of the method that makes the set; `None` takes the recipe's method. Benchmarks may set another one."""

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
        validation: Task | None = None,
        worker_rank: WorkerRank | None = None,
    ) -> Iterator[Event]:
        """Make the set of one recipe in the run's folder, from the last checkpoint if there is one.

        Does nothing if the set is finished. If only validations are left, yields their tasks.

        Args:
            config: recipe of the run.
            store_uri: store of the experts.
            folder_uri: folder of the run.
            sharing: number of distilling workers that may run on this machine at the same time, and share its memory.
            validation: template for tasks that validate a set on any worker. Each task is a copy of the template with
                the set's iteration as a further argument. The last of these tasks writes the result. `None`: this
                worker validates, and writes the result.
            worker_rank: this worker's rank among the workers of the recipe; `None` if it works alone.

        Raises:
            MissingExpertsError: the store lacks experts of the recipe.
            DivergenceError: too many iterations in a row diverged. The checkpoint holds the set of the last update.
            ThresholdError: the first matching losses, or those of many iterations in a row, exceed `distill.threshold`.
            StoreError: an expert has the same parameters in its first and last epochs.
            ClusterError: the workers of the set do not share the disk of the run's folder.
            PeerLostError: another worker of the mesh died.
            OvertakenError: a newer attempt at the set has started.
            Interrupted: a worker of the set was asked to stop. The state is saved.
        """
        folder, account = open_location(folder_uri), Account(self._device, self._cluster)
        if (folder / SYNTHETIC).exists():
            yield Finished()
            return
        if validation is not None and only_validations_are_left(folder, config.distill):
            for iteration in Candidates(folder).open() or [config.distill.iterations]:
                yield More(_of_iteration(validation, iteration))
            yield Finished()
            return
        yield Phase("preparing the networks")
        rows = len(config.roles) if worker_rank else 1
        columns = worker_rank.world_size // rows if worker_rank else 1
        with open_mesh(worker_rank, rows, columns, self._device, self._cluster.peer_timeout) as mesh:
            part = Part(config, self._dataset, store_uri, mesh, self._device, sharing)
            with closing(self._method_of(config)(part)) as method:
                yield from Distillation(part, folder, method, account, validation).events()

    def _method_of(self, config: RunConfig) -> type[Method]:
        return self.method or method_of(config)

    def validate(self, config: RunConfig, store_uri: str, folder_uri: str, iteration: int) -> Iterator[Event]:
        """Validate a candidate: a set that an unfinished distillation wrote after some iterations.

        If all iterations are done and no other result is missing, also write the final set. Do nothing if the
        candidate's file is gone, because the distillation then has the result.

        Args:
            store_uri: store of the experts, for MetaDD's maps of the final set.
            iteration: number of iterations that were done when the candidate was written.

        Raises:
            MissingFileError: another file of the run is gone.
        """
        folder, account = open_location(folder_uri), Account(self._device, self._cluster)
        candidates = Candidates(folder)
        whole = Rows.of_shard(0, 1, self._dataset.classes, config.distill.ipc)
        try:
            if not candidates.results([iteration]):
                yield Phase(VALIDATING)
                candidate = candidates.read(iteration, whole, self._device)
                found = math.nan
                for progress in validating(config, self._dataset, candidate, self._device):
                    found = progress.values.get("validation", found)
                    yield progress
                candidates.write_result(iteration, found, standard_error(found, self._dataset), account.spent())
                _log.info("set validated %s", fields(run=config.name, iteration=iteration, accuracy=found))
            if not (folder / SYNTHETIC).exists() and only_validations_are_left(folder, config.distill):
                yield from self._conclude(config, store_uri, folder)
        except OvertakenError:
            _log.info("another worker writes the set %s", fields(run=config.name))
        except MissingFileError:
            if candidates.file(iteration).exists():
                raise
        yield Finished(metrics=account.metrics())

    def _conclude(self, config: RunConfig, store_uri: str, folder: Location) -> Iterator[Phase]:
        """Write the final set if every validation has a result; otherwise write nothing.

        Call this only after the last iteration. Yields phases as a heartbeat.

        Raises:
            OvertakenError: another worker writes the final set.
        """
        if Candidates(folder).open():
            return
        attempt = Attempt.start(folder, ALONE)
        folder, attempt.resumed_at = attempt.folder, config.distill.iterations
        spent = read_cost(folder)  # before the state, so that no result's cost is counted twice
        part, kind = Part(config, self._dataset, store_uri, ALONE, self._device, 1), self._method_of(config).state
        state = load_checkpoint(kind, folder, part.rows, config.distill, self._device)
        if state is None:
            return
        candidates, iterations = Candidates(folder), unvalidated(config.distill, state)
        results = candidates.results(iterations)
        if len(results) < len(iterations):
            return
        for iteration, result in zip(iterations, results, strict=True):
            _record(state, iteration, result.accuracy, self._dataset, candidates, part.rows)
            spent += result.cost
        last = read_artifact(candidates.file(config.distill.iterations))
        if iterations:
            save_checkpoint(attempt, state, part.rows, part.mesh, run_identity(config), read_computed(folder))
            (folder / COST).write_json(spent.to_json())
        final = state.chosen or state.result
        if config.metadd is not None and config.meta_network_count and (folder / INITIAL).exists():
            backbone = ExpertNetworks(config.each_backbone()[0], self._dataset, store_uri, self._device)
            initial = read_artifact(folder / INITIAL).images.to(self._device)
            yield from keep_maps_alone(part, config.metadd, backbone, folder / MAPS, initial, final)
        save_set(part, folder, SYNTHETIC, final, self._method_of(config), last.provenance)
        candidates.remove()


def _of_iteration(validation: Task, iteration: int) -> Task:
    """Copy of a validation task for the set after `iteration` iterations. Name and arguments get this number."""
    arguments = (*validation.arguments, iteration)
    return dataclasses.replace(validation, name=f"{validation.name} {iteration}", arguments=arguments)


def _record(
    state: State[Any], iteration: int, accuracy: float, dataset: Dataset, candidates: Candidates, rows: Rows
) -> None:
    """Record in the state the validation accuracy of the set after `iteration` iterations.

    The set becomes the one chosen so far, unless its accuracy is more than one standard error below the best. If the
    state has passed `iteration`, this worker's images, the range `rows`, are read from the set's file in `candidates`.
    """
    device = state.synthetic.images.device
    earlier = None if iteration == state.iteration else (iteration, lambda: candidates.read(iteration, rows, device))
    state.record_validation(accuracy, standard_error(accuracy, dataset), earlier)


class Distillation:
    """One worker's part in the distillation of one set, or of one piece (some images of some classes) of a set."""

    def __init__(self, part: Part, folder: Location, method: Method, account: Account, validation: Task | None) -> None:
        config, dataset, mesh, device = part.config, part.dataset, part.mesh, part.device
        self._attempt = Attempt.start(folder, mesh)
        self._part, self._method, self._folder, self._account = part, method, self._attempt.folder, account
        self._config, self._dataset, self._mesh, self._device = config, dataset, mesh, device
        self._rows = part.rows
        self._iterations = method.iterations(config)
        self._prior = None if config.prior is None else PriorOfSet(part)
        self._validation, self._candidates = validation, Candidates(self._attempt.folder)
        self._has_joined = False
        """True if results of validation tasks were recorded in the state since the last checkpoint."""
        self._spent_before = read_cost(folder)
        self._fingerprints = [experts.group.key.fingerprint for experts in method.experts]
        self._computed = read_computed(folder)
        self._found: dict[str, Any] = {}
        """Setting that the recipe leaves open -> value that was found before the first iteration."""
        self._labels: NDArray[np.int64] | None = None
        """[n] classes of this worker's images; `None` until MetaDD needs them, since copying them waits for the GPU."""
        self._saved_at = -1
        """Number of iterations done at the last checkpoint; 0 for a new set; -1 before `events` starts, and while the
        state has a validation result that is not saved."""
        self._next_save = time.monotonic() + config.cluster.checkpoint_seconds
        """Time from which a checkpoint is due, in seconds of the monotonic clock."""
        self._next_counted_save = -math.inf
        """Time, in seconds of the monotonic clock, before which a piece (part of a set) writes no checkpoint just
        because `checkpoint_every` iterations are done."""
        meta = config.metadd if config.meta_network_count else None
        if meta is not None and part.piece is not None and not meta.has_weight:
            meta = None  # the task that joins the pieces computes the maps
        self._meta_networks = None if meta is None else MetaNetworks(part, meta, method.experts[0])

    def events(self) -> Iterator[Event]:
        """Run the remaining iterations and yield progress. All workers of the set yield the same events except phases.

        Raises:
            DivergenceError: too many iterations in a row diverged. The set of the last update is saved.
            ThresholdError: matching losses exceed `distill.threshold`, at the start or in many iterations in a row.
            ClusterError: the workers of the set do not share the disk of its folder.
            PeerLostError: another worker of the set died.
            OvertakenError: a newer attempt at the set has started.
            Interrupted: a worker of the set was asked to stop. The state is saved.
        """
        settings = self._config.distill
        state = yield from self._start()
        first = self._saved_at = state.iteration
        yield Progress(first, self._iterations, metrics=self._mesh_metrics)
        with saving() as is_asked:
            self._join(state)
            if open_before := unvalidated(settings, state):
                yield from self._validated(state, open_before, is_asked)
                if self._validation is None:
                    self._save_checkpoint(state)
            while state.iteration < self._iterations:
                is_late = self._late_or_stopped(is_asked(), state)
                began = time.monotonic()
                try:
                    self._method.step(state, self._meta_term(state))
                except (DivergenceError, ThresholdError):
                    self._keep_last_good(state)
                    raise
                seconds = time.monotonic() - began
                if is_due(settings, state.iteration):
                    self._late_or_stopped(is_asked(), state)
                    yield from self._validated(state, [state.iteration], is_asked)
                is_last = state.iteration == self._iterations
                saves = is_late or is_last or self._is_counted(state.iteration)
                if saves and (self._validation is None or self._saved_at != state.iteration):
                    self._save_checkpoint(state)
                metrics = self._account.metrics() | self._measured(state, seconds)
                metrics["datm_ray_distill_iterations_total"] = float(state.iteration - first)
                yield Progress(state.iteration, self._iterations, self._shown(state), metrics, saved=saves)
        yield from map(Note, self._method.warnings(state))
        if not unvalidated(settings, state):  # otherwise the worker that writes the last result writes the set too
            yield from self._write_result(state)
        yield Finished({**self._method.counts(state), "chosen_at": state.chosen_at}, self._account.metrics())

    def _start(self) -> Generator[Event, None, State[Any]]:
        """Return the state of the last checkpoint; without a checkpoint, make the first set and return its state.

        The first set is the one before any iteration. For it, settings that the recipe leaves open, such as the step
        size, are found. Then it is written to initial.arrow.
        """
        yield from map(Note, self._method.notes)
        saved = self._saved_state()
        state = saved or self._method.state((yield from self._chosen()), self._config.distill)
        state.prior = None if self._prior is None else self._prior.prior
        yield from map(Phase, filter(None, [self._method.preparation]))
        self._mesh.until_all_are_done(self._method.prepare)
        if self._meta_networks is not None:
            self._meta_networks.chunk = least_of_workers(self._mesh, self._meta_networks.images_that_fit())
        if saved is None and self._iterations:
            yield from map(Phase, filter(None, [self._method.calibration]))
            yield from map(Note, self._method.calibrate(state))
        self._found = self._found_values(state, is_new=saved is None)
        if saved is None:
            self._save_set(state.synthetic, INITIAL)
        yield from self._note_computing(state.iteration)
        return state

    def _write_result(self, state: State[Any]) -> Iterator[Phase]:
        """Write the final set, its cost, and with MetaDD its class activation maps. Yields phases as a heartbeat.

        The final set is the one chosen on validation data or, without validation, that of the last iteration.
        """
        final = state.chosen or state.result
        if self._meta_networks is not None and self._part.piece is None and (self._folder / INITIAL).exists():
            initial = read_artifact(self._folder / INITIAL).images[self._rows.first : self._rows.last]
            yield from self._meta_networks.keep_maps(self._folder / MAPS, initial.to(self._device), final)
        self._note_cost()
        self._save_set(final, SYNTHETIC)
        if self._mesh.is_first:
            self._candidates.remove()

    def _chosen(self) -> Generator[Phase, None, SyntheticSet]:
        """Make the first set, which the first iteration will change, and return it. Yields phases as a heartbeat.

        The method chooses images and labels. With a prior, images that the prior renders near them replace the images.
        """

        def choose() -> Steps[SyntheticSet]:
            first = yield from self._method.choose()
            return first if self._prior is None else (yield from self._prior.start(first))

        return (yield from reporting(choose(), CHOOSING, REPORT_INTERVAL))

    def _is_counted(self, iteration: int) -> bool:
        """True if a checkpoint is due because `checkpoint_every` iterations have passed.

        Iterations of a piece may be so short that these checkpoints would take much of its time. So a piece, which has
        one worker, skips some. Several workers of a set would have to agree on this.
        """
        is_counted = iteration % self._config.distill.checkpoint_every == 0
        return is_counted and (self._part.piece is None or time.monotonic() >= self._next_counted_save)

    def _late_or_stopped(self, is_asked: bool, state: State[Any]) -> bool:
        """True if the time for the next checkpoint has come on any worker. All workers get the same answer.

        Args:
            is_asked: True if this worker was asked to stop.
            state: state to save if any worker was asked to stop.

        Raises:
            Interrupted: any worker was asked to stop. The state is saved.
        """
        mine = torch.tensor([float(is_asked), float(time.monotonic() > self._next_save)])
        any_asked, any_late = self._mesh.sum_over_all(mine).tolist()
        if not any_asked:
            return bool(any_late)
        if state.iteration != self._saved_at:
            self._save_checkpoint(state)
        raise Interrupted(f"iteration {state.iteration} of {self._iterations}")

    def _validated(self, state: State[Any], iterations: Sequence[int], is_asked: Callable[[], bool]) -> Iterator[Event]:
        """Save a checkpoint, unless the last one is of this iteration. Then validate the sets after `iterations`.

        If validations are tasks of their own, a task is yielded for each set; otherwise the worker validates here.

        Args:
            state: present state.
            iterations: numbers of iterations, at most the state's own; sets of earlier ones are read from candidates/.
            is_asked: returns True once this worker was asked to stop.

        Raises:
            Interrupted: the worker that validates was asked to stop meanwhile. The state is saved, with the results of
                the validations before.
        """
        if self._validation is not None and state.iteration in iterations:
            self._save_set(state.result, self._candidates.name(state.iteration))
        if state.iteration != self._saved_at:
            self._save_checkpoint(state)  # a validation may take minutes, and a kill meanwhile loses nothing
        for iteration in iterations:
            if self._validation is not None:
                yield More(_of_iteration(self._validation, iteration))
                continue
            yield Phase(VALIDATING)
            is_present = iteration == state.iteration
            held = state.result if is_present else self._candidates.read(iteration, self._rows, self._device)
            accuracy = yield from self._validate(held, is_asked)
            self._late_or_stopped(math.isnan(accuracy), state)
            _record(state, iteration, accuracy, self._dataset, self._candidates, self._rows)
            self._saved_at = -1  # what was recorded is not in the checkpoint yet

    def _join(self, state: State[Any]) -> None:
        """Record the results of validations by other tasks, in order of iterations, up to the first missing one.

        All workers record the same results.
        """
        iterations = unvalidated(self._config.distill, state)
        if not iterations:
            return
        found = torch.zeros(len(iterations), dtype=torch.float64)
        if self._mesh.is_first:
            results = self._candidates.results(iterations)
            found[:] = -1.0
            found[: len(results)] = torch.tensor([each.accuracy for each in results], dtype=torch.float64)
            self._spent_before += total(each.cost for each in results)
        for iteration, accuracy in zip(iterations, self._mesh.sum_over_all(found).tolist(), strict=True):
            if accuracy < 0:
                return
            _record(state, iteration, accuracy, self._dataset, self._candidates, self._rows)
            self._has_joined = True

    def _found_values(self, state: State[Any], is_new: bool) -> dict[str, Any]:
        settings, place, found = self._config.distill, self._folder / INITIAL, dict[str, Any]()
        is_open = settings.initial_step_size is None and self._method.has_step_size(self._config)
        if is_open and (is_new or place.exists()):
            found["initial_step_size"] = (
                state.synthetic.step_sizes.tolist() if is_new else list(read_artifact(place).step_sizes)
            )
        if settings.learning_rate_images is None and state.image_rate is not None:
            found["learning_rate_images"] = state.image_rate
        return found

    def _note_computing(self, iteration: int) -> Iterator[Note]:
        """Record how iterations are computed from this one on, such as their precision.

        Yields a message if this differs from the iterations before.
        """
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
                f"iterations are computed otherwise from iteration {iteration} on ({'; '.join(changed)}): the "
                "result differs in rounding from one without the change"
            )

    def _meta_term(self, state: State[Any]) -> MetaTerm | None:
        """MetaDD's term for the next iteration; `None` without MetaDD, or if all its weights are 0.

        With `metadd.augmented`, MetaDD sees the images under the method's augmentation.
        """
        settings = self._config.metadd
        if self._meta_networks is None or settings is None or not settings.has_weight:
            return None
        term = self._meta_networks.term(state.iteration)
        if not settings.augmented:
            return term
        if self._labels is None:
            self._labels = state.synthetic.labels.cpu().numpy()
        drawn = self._method.augmentations(term.rows, self._labels[term.rows], state.iteration)
        return dataclasses.replace(term, augmentations=drawn)

    def _measured(self, state: State[Any], seconds: float) -> dict[str, float]:
        """Metrics of the last iteration, which took `seconds`: name of a metric of `monitor/metrics.py` -> value."""
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
        """State of the last checkpoint; `None` for a new distillation. Checks that all workers read the same one."""
        settings, kind = self._config.distill, self._method.state
        if self._mesh.rank == 0:
            for place in (self._folder, self._folder / PARTS):
                place.remove_leftovers()
        saved: State[Any] | None = None

        def read_together() -> bool:
            nonlocal saved
            saved = load_checkpoint(kind, self._folder, self._rows, settings, self._device)
            return len(set(of_workers(self._mesh, -1 if saved is None else saved.iteration))) == 1

        fact = f"the workers that share {self._config.name} see different checkpoints in {self._folder.uri}"
        seconds = seconds_to_look(self._folder, self._config.cluster.progress_timeout)
        require_shared(read_together, seconds, fact)
        self._attempt.resumed_at = -1 if saved is None else saved.iteration
        if self._mesh.is_first:  # forget candidates that a lost or removed checkpoint left
            self._candidates.forget(first=self._attempt.resumed_at + 1)
        if saved is not None:
            _log.info("distillation resumed %s", fields(run=self._config.name, iteration=saved.iteration))
        return saved

    def _validate(self, held: SyntheticSet, is_asked: Callable[[], bool]) -> Generator[Phase, None, float]:
        """Train fresh networks on the whole set, and return their mean validation accuracy, in [0, 1].

        The result is NaN on all workers if the first one, which validates, was asked to stop meanwhile. Yields phases
        as a heartbeat. Workers with peers also exchange heartbeats in the mesh.

        Args:
            held: this worker's images and labels of the set.
            is_asked: returns True once this worker was asked to stop.
        """
        whole = self._whole(held)

        def work() -> Steps[float]:
            assert whole is not None
            mean = math.nan
            for progress in validating(self._config, self._dataset, whole, self._device):
                mean = progress.values.get("validation", mean)
                if is_asked():
                    break
                yield
            return mean

        return (yield from reporting(self._mesh.from_first(work), VALIDATING, REPORT_INTERVAL, at_once=False))

    def _whole(self, held: SyntheticSet) -> SyntheticSet | None:
        """Whole set, joined from the images and labels of all workers, on the first worker; `None` on other workers.

        Args:
            held: this worker's images and labels of the set.
        """
        images, soft_labels, labels = (self._mesh.gather(part) for part in (held.images, held.soft_labels, held.labels))
        if images is None or soft_labels is None or labels is None:
            return None
        return SyntheticSet(images, soft_labels, held.step_sizes, labels)

    def _keep_last_good(self, state: State[Any]) -> None:
        self._save_checkpoint(state)
        self._save_set(state.result, LAST_GOOD)
        self._mesh.barrier()  # all must have written, because the first error that is reported ends all workers

    def _save_checkpoint(self, state: State[Any]) -> None:
        if self._validation is not None:
            self._join(state)
        began = time.monotonic()
        save_checkpoint(self._attempt, state, self._rows, self._mesh, run_identity(self._config), self._computed)
        self._note_cost()
        if self._has_joined and self._mesh.is_first:
            self._candidates.forget(last=state.validations[-1][0])
        self._has_joined = False
        self._saved_at, ended = state.iteration, time.monotonic()
        self._next_counted_save = ended + (ended - began) / WRITE_SHARE
        self._next_save = max(ended + self._config.cluster.checkpoint_seconds, self._next_counted_save)
        _log.info("checkpoint saved %s", fields(run=self._config.name, iteration=state.iteration))

    def _note_cost(self) -> None:
        """Write the cost so far, of all workers and all attempts together, to cost.json in the run's folder."""
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
        if self._prior is not None:
            origin["prior"] = self._prior.digest
        if self._found:
            origin[FOUND] = self._found
        if self._computed:
            origin["student_steps"] = self._computed[-1]
        if self._computed[1:]:
            origin["student_steps_before"] = self._computed[:-1]
        save_set(self._part, self._folder, name, whole, type(self._method), origin)


def save_set(
    part: Part, folder: Location, name: str, held: SyntheticSet, method: type[Method], provenance: Mapping[str, Any]
) -> None:
    """Write a whole set of a run to the file `name` in the run's folder.

    A transform above 64 KiB, such as whitening, is written once for all runs, to a folder beside the run's.

    Args:
        part: part of the run's set; its configuration and data set are those of the whole set.
        held: the whole set.
        method: class of the method, which says whether the set has a step size to train with.
        provenance: facts on the set's origin to store with it: name -> plain data.
    """
    config, dataset = part.config, part.dataset
    save_artifact(
        folder / name,
        held,
        dataset.transform,
        dataset.class_names,
        recipe_of_set(config),
        provenance,
        folder.parent / TRANSFORMS,
        has_step_size=method.has_step_size(config),
    )


def of_workers(mesh: Mesh, own: float) -> list[float]:
    """List of one value from every worker, in the order of ranks. All workers call this together and get the same list.

    Args:
        own: value of this worker.
    """
    mine = [own * (rank == mesh.rank) for rank in range(mesh.rows * mesh.columns)]
    found: list[float] = mesh.sum_over_all(torch.tensor(mine, dtype=torch.float64)).tolist()
    return found


def least_of_workers(mesh: Mesh, own: int) -> int:
    """Smallest of the workers' values that are not 0; 1 if all are 0.

    All workers call this together and get the same value.

    Args:
        own: value of this worker, at least 0.
    """
    return int(min(filter(None, of_workers(mesh, own)), default=1))


def over_workers(mesh: Mesh, mine: Spent) -> Spent:
    """Cost of all workers: sums, and their largest peak of memory. All workers call this and get the same value."""
    sums = [mine.seconds, mine.cpu_seconds, mine.gpu_seconds, mine.read_bytes, mine.write_bytes]
    seconds, cpu_seconds, gpu_seconds, *bytes_ = mesh.sum_over_all(torch.tensor(sums, dtype=torch.float64)).tolist()
    return Spent(seconds, cpu_seconds, gpu_seconds, max(of_workers(mesh, mine.peak_memory_bytes)), *bytes_)


def read_cost(folder: Location) -> Spent:
    """Cost of the distillation in a folder, as last written to cost.json; zero if there is no such file.

    Raises:
        CorruptFileError: the file is damaged.
    """
    place = folder / COST
    if not place.exists():
        return Spent()
    with rejecting_nonsense(place):
        return Spent.from_json(place.read_json())
