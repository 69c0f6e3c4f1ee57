"""Sets made in pieces. One worker makes each piece independently, and a further task joins all pieces into the set.

A piece is some images of some classes. The folder of a run holds:

    pieces/<number>/    folder of a piece, with the files of a distillation, see `task`
    pieces/shared/      what one worker computed for all pieces, see `shared_arrays` of `stages/methods/part.py`
    initial.arrow, checkpoint.arrow, maps.arrow, synthetic.arrow, cost.json    of the whole set, see `task`

The folder pieces/ is removed after the set is written. Pieces do not depend on each other, so any number of workers
makes the same set.
Tests: tests/stages/distill/test_pieces.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from datm_ray.artifact import read_artifact
from datm_ray.config import ClusterConfig, RunConfig, run_identity
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.core.training.loop import accuracy_in_steps, logits_in_steps
from datm_ray.data.dataset import Dataset
from datm_ray.methods.state import MetaRecord, records
from datm_ray.monitor.spent import Account, total
from datm_ray.runtime.executor import Event, Finished, Note, Phase, Progress
from datm_ray.runtime.heartbeats import reporting
from datm_ray.runtime.machine.devices import images_on, prepare_device, to_device
from datm_ray.runtime.mesh import ALONE
from datm_ray.stages.distill.checkpoint import CHECKPOINT, KIND, PARTS, Attempt, save_checkpoint
from datm_ray.stages.distill.metadd import keep_maps_alone
from datm_ray.stages.distill.task import COST, INITIAL, MAPS, SYNTHETIC, Distillation, read_cost, save_set
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.stages.experts.progress import REPORT_INTERVAL, remove_folder
from datm_ray.stages.experts.train import expert_group
from datm_ray.stages.methods.part import Part, Piece
from datm_ray.stages.methods.registry import method_of
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.sealed import rejecting_nonsense
from datm_ray.store.tensors import read_tensors

PIECES = "pieces"
SHARED = "shared"


def piece_folder(folder: Location, piece: Piece) -> Location:
    """Folder of a piece (some images of some classes of a set), within the folder of its run."""
    return folder / PIECES / f"{piece.number:05d}"


def unfinished_pieces(config: RunConfig, folder: Location, classes: int) -> list[Piece]:
    """Unfinished pieces (parts of the set) of a run; empty if only joining is left, or if its method makes no pieces.

    Args:
        folder: folder of the run.
        classes: number of classes of the data set.
    """
    pieces = method_of(config).pieces(config, classes)
    started = {(folder / PIECES / name).uri for name in (folder / PIECES).list()} if pieces else set()
    places = [(piece, piece_folder(folder, piece)) for piece in pieces]
    return [piece for piece, own in places if own.uri not in started or not (own / SYNTHETIC).exists()]


class PieceWorker:
    """Worker that makes pieces of sets (some images of some classes) from one data set, and joins the pieces.

    The worker keeps the trained networks of the last piece, so that the next piece of the run does not read them again.
    """

    def __init__(self, dataset: Dataset, cluster: ClusterConfig) -> None:
        self._device = prepare_device(cluster)
        self._cluster, self._dataset = cluster, dataset
        self._kept: tuple[list[tuple[str, int]], list[ExpertNetworks]] = [], []
        """Networks of the last piece, for the next one: keys (URI of the group of experts, number of experts) and,
        in the same order, the `ExpertNetworks`. Both lists are empty before the first piece."""
        self._made: dict[Any, Any] = {}
        """Objects that methods made from the kept networks, such as compiled code, see `Part.kept`."""

    def _experts(self, config: RunConfig, store_uri: str) -> list[ExpertNetworks]:
        """Trained networks of a run's method: the kept ones if they are the same, otherwise read from the store."""
        trained, data = method_of(config).trained_backbones(config), self._dataset
        groups = [expert_group(store_uri, each, data.name, data.fingerprint) for each in trained]
        wanted = [(group.location.uri, config.experts.count) for group in groups]
        if wanted != self._kept[0]:
            self._kept, self._made = ([], []), {}  # free the device before it gets other networks
            self._kept = wanted, [ExpertNetworks(each, data, store_uri, self._device) for each in trained]
        return self._kept[1]

    def make_piece(self, config: RunConfig, store_uri: str, folder_uri: str, number: int) -> Iterator[Event]:
        """Make a piece (some images of some classes) of a set, from its last checkpoint if there is one.

        Does nothing for a finished piece.

        Args:
            config: recipe of the run.
            store_uri: store of the trained networks.
            folder_uri: folder of the run.
            number: number of the piece within the set, from 0.

        Raises:
            MissingExpertsError: the store lacks networks of the recipe.
            DivergenceError: too many iterations in a row diverged.
            OvertakenError: a newer attempt makes the same piece.
            Interrupted: the work was asked to stop, and is saved.
        """
        piece = method_of(config).pieces(config, self._dataset.classes)[number]
        folder = open_location(folder_uri)
        own, shared = piece_folder(folder, piece), folder / PIECES / SHARED
        if (own / SYNTHETIC).exists():
            yield Finished()
            return
        yield Phase("preparing the networks")
        unvalidated = config.distill.model_copy(update={"validate_every": 0})
        config = config.model_copy(update={"distill": unvalidated})
        experts = self._experts(config, store_uri)
        place = (config, self._dataset, store_uri, ALONE, self._device)
        part = Part(*place, sharing=1, piece=piece, experts=experts, kept=self._made, shared=shared)
        with closing(method_of(config)(part)) as method:
            yield from Distillation(part, own, method, Account(self._device, self._cluster), None).events()

    def join_pieces(self, config: RunConfig, store_uri: str, folder_uri: str) -> Iterator[Event]:
        """Join the pieces (parts of a set), which must be finished, and write the set and its other files.

        Does nothing if the set exists. The teacher (expert 0 of the first network) makes soft labels anew.

        Args:
            config: recipe of the run.
            store_uri: store of the trained networks.
            folder_uri: folder of the run.

        Raises:
            MissingExpertsError: the store lacks networks of the recipe.
            MissingFileError: a piece is not finished.
            OvertakenError: a newer attempt joins the same pieces.
        """
        folder, account = open_location(folder_uri), Account(self._device, self._cluster)
        if not (folder / SYNTHETIC).exists():
            yield Phase("joining the pieces")
            pieces = method_of(config).pieces(config, self._dataset.classes)
            yield from self._joined(config, store_uri, folder, pieces, account)
        yield Finished()

    def _joined(
        self, config: RunConfig, store_uri: str, folder: Location, pieces: Sequence[Piece], account: Account
    ) -> Iterator[Event]:
        attempt, places = Attempt.start(folder, ALONE), [piece_folder(folder, piece) for piece in pieces]
        folder = attempt.folder
        first = config.each_backbone()[0]
        (teacher, *_) = self._experts(config, store_uri) or [
            ExpertNetworks(first, self._dataset, store_uri, self._device)
        ]
        provenance = read_artifact(places[0] / SYNTHETIC).provenance
        sets = {}
        for name in (INITIAL, SYNTHETIC):
            sets[name] = self._whole(config, pieces, [place / name for place in places])
            yield Progress(len(sets), 2)
        if config.distill.has_soft_labels:
            yield from self._labelled(teacher, sets)
        part = Part(config, self._dataset, store_uri, ALONE, self._device, 1)
        state = method_of(config).state(sets[SYNTHETIC], config.distill)
        state.history = _mean_records(places, "history", state.record)
        state.meta_history = _mean_records(places, "meta", MetaRecord) if config.metadd else []
        save_checkpoint(attempt, state, part.rows, part.mesh, run_identity(config))
        if config.metadd is not None and config.meta_network_count:
            initial, final = sets.values()  # in main memory, which a set may need
            yield from keep_maps_alone(part, config.metadd, teacher, folder / MAPS, initial.images, final)
        spent = total([*(read_cost(place) for place in places), account.spent()])
        (folder / COST).write_json(spent.to_json())
        for name, held in sets.items():
            save_set(part, folder, name, held, method_of(config), provenance)

    def _labelled(self, teacher: ExpertNetworks, sets: Mapping[str, SyntheticSet]) -> Iterator[Event]:
        """Replace the soft labels of each set by the teacher's logits for its images, in place.

        Yields phases as a heartbeat, and a message with the teacher's accuracy on validation images.
        """
        network = teacher.restored(0)
        for held in sets.values():
            logits = yield from reporting(logits_in_steps(network, held.images), "labelling the set", REPORT_INTERVAL)
            held.soft_labels = logits.cpu()
        images, labels = self._dataset.validation_images, to_device(self._dataset.validation_labels, self._device)
        work = accuracy_in_steps(network, images_on(images, self._device), labels)
        right = yield from reporting(work, "testing the teacher", REPORT_INTERVAL)
        yield Note(f"the teacher classifies {right:.1%} of the validation images correctly")

    @staticmethod
    def _whole(config: RunConfig, pieces: Sequence[Piece], files: Sequence[Location]) -> SyntheticSet:
        """Whole set in main memory, joined from its pieces. One piece is read at a time.

        Args:
            files: for each of `pieces`, the file with its images and labels.
        """
        found: list[Tensor] = []
        step_sizes = torch.zeros(1)
        for piece, file in zip(pieces, files, strict=True):
            artifact, rows = read_artifact(file), torch.from_numpy(piece.rows(config.distill.ipc))
            parts = (artifact.images, artifact.soft_labels, artifact.labels)
            if not found:
                count = sum(len(each.classes) * len(each.images) for each in pieces)
                step_sizes = torch.tensor(artifact.step_sizes)
                found = [part.new_zeros(count, *part.shape[1:]) for part in parts]
            for whole, part in zip(found, parts, strict=True):
                whole[rows] = part
        images, soft_labels, labels = found
        return SyntheticSet(images, soft_labels, step_sizes, labels)


def remove_pieces(folder: Location) -> None:
    """Remove the folders of a finished set's pieces, and the files that they shared, from the run's folder `folder`."""
    for name in (folder / PIECES).list():
        remove_folder(folder / PIECES / name / PARTS)
        remove_folder(folder / PIECES / name)
    remove_folder(folder / PIECES)


def _mean_records(places: Sequence[Location], prefix: str, record: type[Any]) -> list[Any]:
    """Means over the pieces of what each iteration recorded: a record (a row of the curves) per iteration, in order.

    Pieces without a record of an iteration are left out of its means. The list is empty if a piece has no checkpoint.
    An iteration counts as skipped if it was skipped in any piece.

    Args:
        places: folders of the pieces.
        prefix: first part of the columns' names in the checkpoints: "history" or "meta".
        record: dataclass of a record, whose fields are the columns.
    """
    of_iterations: dict[int, list[Any]] = {}
    for place in places:
        if not (place / CHECKPOINT).exists():
            return []
        arrays = read_tensors(place / CHECKPOINT, kind=KIND).arrays
        with rejecting_nonsense(place / CHECKPOINT):
            has_none = prefix == "meta" and "meta.iteration" not in arrays  # no weight, or all skipped
            found = [] if has_none else records(dict(arrays), prefix, record)
        for each in found:
            of_iterations.setdefault(each.iteration, []).append(each)
    return [_mean(rows) for _, rows in sorted(of_iterations.items())]


def _mean(rows: Sequence[Any]) -> Any:
    """Record whose numbers are the means over the records `rows`; a boolean value is True if any of theirs is."""
    means: dict[str, Any] = {}
    for each in dataclasses.fields(rows[0]):
        values = [getattr(row, each.name) for row in rows]
        means[each.name] = any(values) if isinstance(values[0], bool) else type(values[0])(sum(values) / len(values))
    return dataclasses.replace(rows[0], **means)
