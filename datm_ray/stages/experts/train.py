"""Training of experts. One task trains several experts together (a stack), and stores one trajectory per expert.

A stack killed at any moment resumes after the last epoch in its progress folder (see `progress`), with
bit-identical results. The experts of each stack are recorded before training, so every attempt trains the same stacks.
A stack also trains those of its experts that the store already has, but does not store them again.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import re
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

from datm_ray.config import ClusterConfig, ExpertConfig, NetworkSpec, RunConfig, expert_fingerprint
from datm_ray.core.images.batches import Images, rows_on
from datm_ray.core.networks.image_cost import image_cost
from datm_ray.core.networks.parameters import FlatNetwork, float_buffers, unflatten_buffers_into, unflatten_into
from datm_ray.core.networks.registry import build_network, couples_samples
from datm_ray.core.networks.stack_trial import InParts, StackStep, fitting, found_at_a_time, is_tried
from datm_ray.core.networks.stacked import LARGEST_STACK, STACKED_MAP_BYTES, StackFunctions, cost_and_stacking
from datm_ray.core.randomness import Purpose, derive_seed
from datm_ray.core.steps import Steps, all_of
from datm_ray.core.training.curriculum import Curriculum
from datm_ray.core.training.experts import ExpertState, stack_steps
from datm_ray.core.training.loop import accuracy_in_steps
from datm_ray.data.dataset import Dataset
from datm_ray.errors import CorruptFileError, DivergenceError, StoreError
from datm_ray.monitor.logs import fields
from datm_ray.monitor.spent import Account, Spent, total
from datm_ray.runtime.executor import Event, Finished, Note, Phase, Progress
from datm_ray.runtime.heartbeats import (
    interval_between_epochs,
    interval_in_epochs,
    reporting,
    stopped_if,
    with_heartbeats,
    within_epoch,
)
from datm_ray.runtime.machine.devices import channels_last_on, images_on, prepare_device, to_device, uses_gpu
from datm_ray.runtime.stopping import Interrupted, given_up, is_overdue, saving
from datm_ray.shape import DataShape, network_cost
from datm_ray.stages.experts.curriculum import curriculum_of
from datm_ray.stages.experts.progress import ExpertProgress, wait_for_disk_space
from datm_ray.store.files.filesystem import Location
from datm_ray.store.sealed import rejecting_nonsense
from datm_ray.store.trajectories import ExpertGroup, TrajectoryInfo, TrajectoryStore
from datm_ray.words import counted


def expert_group(store_uri: str, config: RunConfig, dataset: str, dataset_fingerprint: str) -> ExpertGroup:
    """Folder in the store of the experts that a run uses: those of its data set, network and training settings."""
    fingerprint = expert_fingerprint(config, dataset_fingerprint)
    return group_in_store(store_uri, dataset, config.network.architecture, fingerprint)


def group_in_store(store_uri: str, dataset: str, architecture: str, fingerprint: str) -> ExpertGroup:
    """Folder in the store for experts of one data set, architecture and fingerprint of the training.

    Characters of the two names that are not allowed in a folder's name are replaced.
    """
    # Two names may become equal, since data sets are named after folders and networks after modules. The fingerprint
    # then separates their folders.
    names = _as_folder(dataset, "dataset"), _as_folder(architecture, "network")
    return TrajectoryStore(store_uri).group(*names, fingerprint)


TESTING = "testing the experts"
"""Text of the phase that is reported, as a heartbeat, during a slow test of experts."""


def _as_folder(name: str, usual: str) -> str:
    """Replace characters of a name that are not allowed in a folder's name. Returns `usual` if nothing is left."""
    return re.sub(r"[^A-Za-z0-9._+=-]+", "-", name).lstrip("._+=-") or usual


def experts_at_a_time(config: RunConfig, image: tuple[int, int, int], classes: int) -> int:
    """Largest number of experts in a stack: experts that one worker trains together.

    `cluster.experts_at_a_time` gives the number. Without this key it is at most `LARGEST_STACK`. On GPUs it is then at
    most the number of experts divided by the number of workers, rounded up, so that no worker is idle. On CPUs, it
    keeps the largest feature map of all experts of a stack, for a whole batch, within `STACKED_MAP_BYTES`; it is 1 if a
    single expert's map is larger, or if the architecture cannot be stacked.

    Args:
        image: channels, height and width of an image.
        classes: number of classes.
    """
    cluster = config.cluster
    if cluster.experts_at_a_time is not None:
        return cluster.experts_at_a_time
    if uses_gpu(cluster.shaped(light=True)):
        # If there would be fewer stacks than workers, stacks are made smaller, so that no worker is idle.
        return min(LARGEST_STACK, -(-config.experts.count // (cluster.workers or 1)))
    cost, is_stackable = cost_and_stacking(config.network.for_images(image[0], image[1:], classes))
    if not is_stackable:
        return 1
    return max(1, min(LARGEST_STACK, STACKED_MAP_BYTES // (config.experts.batch_size * cost.largest)))


def stored_bytes(config: RunConfig, shape: DataShape) -> int:
    """Bytes of the parameters that all experts of `config.network` store; other networks of the run do not count."""
    snapshot = getattr(torch, config.experts.storage).itemsize * network_cost(config, shape).parameters
    return config.experts.count * len(config.kept_epochs) * int(snapshot)


def described_experts(config: RunConfig) -> str:
    """Text for plans: number, architecture and epochs of the experts of `config.network`, not of other networks."""
    settings, order = config.experts, ", easy images first" if config.experts.curriculum else ""
    epochs = counted(settings.epochs, "epoch")
    return f"{settings.count:,} {config.network.architecture}, {epochs}{order}"


def stacks(missing: Sequence[int], size: int, count: int, workers: int = 1, least: int = 1) -> list[tuple[int, ...]]:
    """Divide experts into stacks (experts trained together). Returns the numbers of the experts in each stack.

    Only stacks with a missing expert are returned. Expert e belongs to stack e // size. The last stack may be smaller.
    If it would hold one expert alone (and `size` is above 1), it also trains expert `count`, which is never stored,
    because a network alone rounds differently from one in a stack.

    With several workers and consecutive missing experts, the missing ones are instead divided evenly, with at most
    `size` and at least `least` in a stack if possible, so that every worker trains equally many stacks.

    Args:
        missing: numbers of the experts that are not stored, sorted.
        size: largest number of experts in a stack.
        count: number of experts of the recipe; their numbers are 0 to `count` - 1.
        workers: number of workers that train at the same time.
        least: smallest number of experts in a stack of an even division.
    """
    each_worker = -(-len(missing) // (size * workers))
    parts = min(each_worker * workers, len(missing) // least)
    if workers > 1 and parts and parts * size >= len(missing) == missing[-1] - missing[0] + 1:
        return [tuple(part.tolist()) for part in np.array_split(np.array(missing), parts)]
    firsts = sorted({each // size * size for each in missing})
    return [tuple(range(first, min(first + size, max(count, first + 2)))) for first in firsts]


def divided(
    config: RunConfig, missing: Sequence[int], size: int, workers: int, groups: int = 1
) -> list[tuple[int, ...]]:
    """Divide the missing experts of one network into stacks (experts trained together), of at most `size` experts.

    If possible, stacks are made smaller so that every worker trains equally many; on CPUs, at least two experts stay
    together. If the recipe gives `cluster.experts_at_a_time`, the number of workers is ignored, and only the last stack
    may be smaller. Returns the numbers of the experts in each stack, see `stacks`.

    Args:
        missing: numbers of the experts that are not stored, sorted.
        size: largest number of experts in a stack.
        workers: number of workers that train at the same time, for all networks.
        groups: number of networks whose experts are trained at the same time, each by equally many workers.
    """
    share = 1 if config.cluster.experts_at_a_time else -(-workers // groups)
    least = 1 if uses_gpu(config.cluster.shaped(light=True)) else 2
    return stacks(missing, size, config.experts.count, share, least)


_log = logging.getLogger(__name__)


class ExpertWorker:
    """Worker that trains experts on one data set.

    Attributes:
        dataset: the data set.
        device: device that trains.
    """

    def __init__(self, dataset: Dataset, cluster: ClusterConfig) -> None:
        self.device = prepare_device(cluster)
        self._cluster = cluster
        self.dataset = dataset
        self._images = images_on(dataset.train_images, self.device)
        self._labels = to_device(dataset.train_labels, self.device)
        self._functions: dict[tuple[NetworkSpec, int, str], StackFunctions] = {}
        self._in_parts: dict[tuple[NetworkSpec, int, str, int], InParts] = {}
        """(network, number of networks in a call, precision, images in a step) -> step of a stack, in several calls."""
        self._at_a_time: dict[tuple[NetworkSpec, int, str, int], int] = {}
        """(network, size of the stack, precision, images in a step) -> number of networks per call, found by trial."""

    def train(self, config: RunConfig, store_uri: str, experts: Sequence[int]) -> Iterator[Event]:
        """Train experts together, and store the trajectories of those whose numbers are below the recipe's count.

        Stored trajectories stay unchanged.

        Args:
            experts: numbers of the experts, consecutive: a stack from `stacks`.

        Raises:
            StoreError: the store cannot be written, its disk stays full, or another process removed the progress.
            MissingExpertsError: the scores that order the images of a curriculum are not stored.
            CorruptFileError: the file of these scores is damaged.
            DivergenceError: the loss of an expert is not finite.
            Interrupted: the work was asked to stop, and is saved.
        """
        group = expert_group(store_uri, config, self.dataset.name, self.dataset.fingerprint)
        account = Account(self.device, self._cluster)
        progress = progress_of(config, group, experts, account)
        try:
            if not progress.wanted <= set(group.experts()):
                yield from self._train(config, store_uri, progress, account)
                yield from self._store(config, group, progress)
        except (StoreError, CorruptFileError):
            # Another command may have stored these experts and removed the progress that both commands used.
            if not progress.wanted <= set(group.experts()):
                raise
        progress.remove()
        yield Finished(metrics=account.metrics())

    def _store(self, config: RunConfig, group: ExpertGroup, progress: ExpertProgress) -> Iterator[Note]:
        """Store the trajectories of trained experts that the store lacks. Yields a message if the disk is full."""
        progress.note_cost()  # before storing, because a command that finds all experts stored skips this
        for expert in progress.wanted - set(group.experts()):
            progress.require_whole(config.experts.epochs)
            info = self._info(config, group, expert)
            size = 4 * info.parameter_count * len(info.epochs)
            yield from map(Note, wait_for_disk_space(group.location, size))
            group.write_expert(expert, progress.snapshots(expert), info)
            _log.info("expert stored %s", fields(expert=expert, group=group.key, epochs=len(info.epochs)))
        progress.note_cost()

    def _train(self, config: RunConfig, store_uri: str, progress: ExpertProgress, account: Account) -> Iterator[Event]:
        """Train the experts of a stack to their last epoch, from their saved progress if there is one.

        Raises:
            MissingExpertsError: the scores that order the images of a curriculum are not stored.
            DivergenceError: the loss of an expert is not finite.
            Interrupted: the work was asked to stop, and is saved.
        """
        curriculum, experts = self._curriculum(config, store_uri), progress.experts
        yield Phase(f"{'compiling and ' * self._cluster.compile}training the first epoch")
        dataset, settings = self.dataset, config.experts
        spec = config.network.for_images(dataset.channels, dataset.size, dataset.classes)
        seeds = [derive_seed(config.expert_seed, Purpose.EXPERT, expert) for expert in experts]
        networks = [build_network(spec, seed).to(self.device) for seed in seeds]
        state = progress.resume(self.device)
        saved = progress.at_a_time if state else None
        progress.at_a_time = self._found_at_a_time(spec, networks, settings, saved)
        functions = self._step_of(spec, networks[0], len(experts), settings, progress.at_a_time)
        if functions.note:
            yield Note(functions.note)
        if state is None:
            state = ExpertState.initial(networks)
            progress.add(state, torch.full((len(experts),), float("nan")))
        else:
            _log.info("experts resumed %s", fields(experts=f"{experts[0]}-{experts[-1]}", epoch=state.epoch))
        first, began = state.epoch, time.monotonic()
        images, labels = [self._images] * len(seeds), [self._labels] * len(seeds)
        steps = stack_steps(functions, images, labels, settings, seeds, state, curriculum=curriculum)
        with saving() as is_asked:
            for losses in with_heartbeats(steps, interval_in_epochs(self._cluster)):
                if losses is None:
                    yield within_epoch(lambda: f"epoch {progress.last_epoch} of {settings.epochs}")
                    continue
                seconds, seen = time.monotonic() - began, settings.share_seen(range(state.epoch - 1, state.epoch))
                _require_finite(losses, experts, state.epoch)
                measured = yield from self._accuracies(networks[0], state, settings, progress)
                waiting = progress.add(state, losses.cpu(), measured, last=state.epoch == settings.epochs)
                yield from map(Note, waiting)
                shown = {"loss": float(losses.mean())}
                metrics = account.metrics() | {
                    "datm_ray_expert_epoch": float(state.epoch),
                    "datm_ray_expert_loss": shown["loss"],
                    "datm_ray_expert_images_per_second": seen * len(experts) * len(self._labels) / seconds,
                    "datm_ray_expert_epochs_total": float(len(experts) * (state.epoch - first)),
                }
                if measured is not None:
                    shown["test_accuracy"] = metrics["datm_ray_expert_accuracy_ratio"] = float(measured.mean())
                yield Progress(state.epoch, settings.epochs, shown, metrics, saved=progress.is_written)
                if is_asked():
                    yield from map(Note, progress.write(state))
                    raise Interrupted(f"epoch {state.epoch} of {settings.epochs}")
                began = time.monotonic()

    def _curriculum(self, config: RunConfig, store_uri: str) -> Curriculum | None:
        """Which images experts see in each epoch; `None` if they see all images in every epoch."""
        if config.scoring_run is None:
            return None
        scoring = expert_group(store_uri, config.scoring_run, self.dataset.name, self.dataset.fingerprint)
        return curriculum_of(config, self.dataset, scoring)

    def _step_of(
        self, spec: NetworkSpec, network: nn.Module, stacked: int, settings: ExpertConfig, at_a_time: int
    ) -> StackStep:
        """Training step for `stacked` networks: in one call, or in several calls of at most `at_a_time` networks."""
        functions = self._functions_for(spec, network, at_a_time, settings.precision)
        key = (spec, at_a_time, settings.precision, self._rows_of(settings))
        if at_a_time == stacked:
            return functions
        return self._in_parts.setdefault(key, InParts(functions, at_a_time))

    def _rows_of(self, settings: ExpertConfig) -> int:
        """Number of images that each network of a stack gets in a training step."""
        return min(settings.batch_size, len(self._labels))

    def _found_at_a_time(
        self, spec: NetworkSpec, networks: Sequence[nn.Module], settings: ExpertConfig, saved: int | None
    ) -> int:
        """Number of networks of a stack that one call of the training step computes: all, or fewer if a trial says so.

        The trial, on a GPU with the first batch, takes as many networks as fit into the GPU's memory, or one if this is
        faster. There is no trial if the recipe gives `cluster.experts_at_a_time`, or for networks with batch
        normalisation: one call computes all.

        Args:
            saved: number with which an earlier part of this training was computed, maybe on another device. A GPU takes
                this number, halved until the networks fit. A CPU ignores this number. `None` for a new training.
        """
        stacked, key = len(networks), (spec, len(networks), settings.precision, self._rows_of(settings))
        is_given = self._cluster.experts_at_a_time is not None
        if stacked == 1 or is_given or not is_tried(self.device) or couples_samples(networks[0]):
            return stacked
        if key not in self._at_a_time or saved not in (None, self._at_a_time[key]):
            state, rows = ExpertState.initial(networks), np.arange(self._rows_of(settings))
            images = rows_on(self._images, torch.from_numpy(rows), self.device).expand(stacked, *[-1] * 4)
            labels = self._labels[: len(rows)].to(self.device).expand(stacked, -1)
            arguments = (state.parameters, state.buffers, images, labels, state.parameters.new_ones(len(rows)))
            step_of = functools.partial(self._step_of, spec, networks[0], stacked, settings)
            most = saved or fitting(stacked, len(rows), image_cost(networks[0], tuple(images.shape[2:])))
            found = found_at_a_time(step_of, arguments, most, None if saved else self.device)
            self._at_a_time[key] = found
            for other in self._in_parts.keys() - {(spec, found, *key[2:])}:  # unused graphs would keep their memory
                del self._in_parts[other]
            _log.info("experts timed %s", fields(stacked=stacked, at_a_time=found))
        return self._at_a_time[key]

    def _functions_for(self, spec: NetworkSpec, network: nn.Module, stacked: int, precision: str) -> StackFunctions:
        """Training step for `stacked` networks together. The worker compiles it once for all its tasks."""
        if (spec, stacked, precision) not in self._functions:
            lowered = precision == "bfloat16"
            self._functions[spec, stacked, precision] = StackFunctions(
                network,
                stacked=stacked,
                compile_=self._cluster.compile,
                channels_last=channels_last_on(self._cluster, self.device, "bfloat16" if lowered else None),
                in_bfloat16=lowered,
            )
        return self._functions[spec, stacked, precision]

    def _accuracies(
        self, network: nn.Module, state: ExpertState, settings: ExpertConfig, progress: ExpertProgress
    ) -> Generator[Phase, None, torch.Tensor | None]:
        """Measure and return test accuracies [s] of experts after an epoch, in [0, 1]. Yields phases if this is slow.

        The result is `None` without a test, see `experts.test_every`.

        Raises:
            Interrupted: the work was asked to stop, and the test takes too long to wait for its end.
        """
        if not settings.test_every or state.epoch % settings.test_every:
            return None

        def measure(parameters: torch.Tensor, buffers: torch.Tensor) -> Steps[float]:
            unflatten_into(network, parameters)
            unflatten_buffers_into(network, buffers)
            return (yield from accuracy_in_steps(network, *self._test_set))

        works = all_of(itertools.starmap(measure, zip(state.parameters, state.buffers, strict=True)))
        work = stopped_if(is_overdue, works, lambda: given_up(f"epoch {progress.last_epoch} of {settings.epochs}"))
        interval = interval_between_epochs(self._cluster)
        return torch.tensor((yield from reporting(work, TESTING, interval, at_once=False)))

    @functools.cached_property
    def _test_set(self) -> tuple[Images, torch.Tensor]:
        """Test images, on the device if they fit there, and labels on the device; placed once for all epochs."""
        return images_on(self.dataset.test_images, self.device), to_device(self.dataset.test_labels, self.device)

    def _info(self, config: RunConfig, group: ExpertGroup, expert: int) -> TrajectoryInfo:
        dataset, seed = self.dataset, derive_seed(config.expert_seed, Purpose.EXPERT, expert)
        network = build_network(config.network.for_images(dataset.channels, dataset.size, dataset.classes), seed)
        return expert_info(config, group, dataset.fingerprint, network, expert, seed=seed, epochs=config.kept_epochs)


def expert_info(
    config: RunConfig,
    group: ExpertGroup,
    dataset_fingerprint: str,
    network: nn.Module,
    expert: int,
    *,
    seed: int,
    epochs: tuple[int, ...],
    imported: Mapping[str, object] | None = None,
) -> TrajectoryInfo:
    """Describe an expert for its file: where it comes from, and the names and shapes of its parameters and buffers.

    Args:
        config: recipe of the expert, with its network alone.
        group: folder of the experts in the store.
        dataset_fingerprint: fingerprint of the data set.
        network: any network of the expert's architecture.
        expert: number of the expert.
        seed: seed of the training; -1 if it is unknown.
        epochs: stored epochs.
        imported: file that an imported expert comes from, and other facts; `None` for a trained expert.
    """
    flat, buffers = FlatNetwork(network), float_buffers(network)
    origin = {} if imported is None else {"imported": dict(imported)}
    # Without a curriculum, files have the bytes that they had before the key existed.
    settings = config.experts.model_dump(exclude={"count"} if config.experts.curriculum else {"count", "curriculum"})
    return TrajectoryInfo(
        dataset=group.key.dataset,
        dataset_fingerprint=dataset_fingerprint,
        architecture=group.key.architecture,
        recipe={"network": config.network.model_dump(), "experts": settings, **origin},
        fingerprint=group.key.fingerprint,
        seed=seed,
        expert=expert,
        parameter_names=flat.names,
        parameter_shapes=flat.shapes,
        epochs=epochs,
        buffer_names=tuple(buffers),
        buffer_shapes=tuple(tuple(buffer.shape) for buffer in buffers.values()),
        storage=config.experts.storage,
    )


def origins(group: ExpertGroup, count: int) -> dict[int, str]:
    """Number of each stored expert below `count` -> digest of its imported weights; "" if it was trained here.

    To spare reading hundreds of files, reading ends after the first expert that was trained here and has several stored
    epochs. The experts after it are taken for trained here too, and are not in the result.

    Raises:
        CorruptFileError: the file of an expert is damaged.
    """
    found = dict[int, str]()
    for expert in sorted(each for each in group.experts() if each < count):
        info = group.read_info(expert)
        found[expert] = str(info.recipe.get("imported", {}).get("digest", ""))
        if not found[expert] and len(info.epochs) > 1:
            break
    return found


def progress_of(
    config: RunConfig, group: ExpertGroup, experts: Sequence[int], account: Account | None = None
) -> ExpertProgress:
    """Progress folder of experts that are trained together.

    Args:
        experts: numbers of these experts.
        account: measures the cost of the worker that trains them; `None` for a reader.
    """
    wanted = {expert for expert in experts if expert < config.experts.count}
    return ExpertProgress(group, experts, config.kept_epochs, wanted, account)


@dataclass(frozen=True)
class ExpertsCost:
    """Cost of the experts of one network (architecture)."""

    architecture: str
    known: int
    """Number of experts whose cost is known. Imported experts, and experts of earlier versions, have unknown costs."""
    spent: Spent
    role: str = "experts"
    """What the networks are in the run: "experts", "teacher" or "auxiliaries" (of MetaDD). Files of earlier versions
    may have "experts" for all."""


EXPERTS_COST = "experts-cost.json"
"""Name of the file with the experts' costs in the folder of a run."""


def write_experts_cost(folder: Location, costs: Sequence[ExpertsCost]) -> None:
    """Write the costs of a run's experts into the run's folder."""
    (folder / EXPERTS_COST).write_json([asdict(each) | {"spent": each.spent.to_json()} for each in costs])


def read_experts_cost(folder: Location) -> list[ExpertsCost]:
    """Costs of a run's experts, one per network in the recipe's order, from the run's folder; empty without the file.

    Raises:
        CorruptFileError: the file of the costs is damaged.
    """
    place = folder / EXPERTS_COST
    costs = place.read_json() if place.exists() else []
    with rejecting_nonsense(place):
        return [
            ExpertsCost(
                str(each["architecture"]),
                int(each["known"]),
                Spent.from_json(each["spent"]),
                str(each.get("role", "experts")),
            )
            for each in costs
        ]


def may_have_experts(folder: Location) -> bool:
    """True unless the run's cost file says that no network needed training. True if there is no such file yet."""
    return not (folder / EXPERTS_COST).exists() or bool(read_experts_cost(folder))


def experts_cost(config: RunConfig, group: ExpertGroup) -> ExpertsCost:
    """Cost of the experts that a recipe uses. If an expert was trained more than once, each training counts.

    The cost of a stack (experts trained together) is divided evenly among those of its experts that are in the store or
    that this recipe uses. The result is marked as partial if the cost of an expert is unknown.

    Raises:
        CorruptFileError: the file of a stack's cost is damaged.
    """
    found: list[tuple[set[int], Spent]] = []
    stored = set(group.experts())
    try:
        for place in group.costs():
            with rejecting_nonsense(place):
                cost = place.read_json()
                used = {expert for expert in cost["experts"] if expert < config.experts.count}
                if used:
                    every = used | (stored & set(cost["experts"]))
                    found.append((used, Spent.from_json(cost["spent"]).share(len(used) / len(every))))
    except CorruptFileError as error:
        remedy = "Move this note away; the experts stay, and only what it says of their cost is lost"
        raise CorruptFileError(error.fact, error.cause, remedy) from error
    known = set().union(*(experts for experts, _ in found))
    spent = total([Spent(is_partial=len(known) < config.experts.count), *(spent for _, spent in found)])
    return ExpertsCost(config.network.architecture, len(known), spent)


def _require_finite(losses: torch.Tensor, experts: Sequence[int], epoch: int) -> None:
    for expert, loss in zip(experts, losses.tolist(), strict=True):
        if not math.isfinite(loss):
            raise DivergenceError(
                f"expert {expert} diverged in epoch {epoch}: its loss is {loss}",
                "the learning rate is too high for this network and data",
                "lower experts.learning_rate",
            )
