"""Sets that are made in pieces: each piece by one worker, by itself, and the set by whoever finishes the last piece.

    pieces/<number>/    folder of a piece, with the files of a distillation, see `distill`
    initial.arrow, checkpoint.arrow, maps.arrow, synthetic.arrow, cost.json    of the whole set, as elsewhere

The pieces are removed when the set is written. Any number of workers makes the same set, for no piece knows of another.
Tests: tests/stages/test_pieces.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from datm_ray.artifact import TRANSFORMS, Artifact, read_artifact, save_artifact
from datm_ray.config import ClusterConfig, RunConfig, recipe_of_set, run_identity
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.data.dataset import Dataset
from datm_ray.errors import OvertakenError
from datm_ray.methods.state import State
from datm_ray.monitor.spent import Account, total
from datm_ray.runtime.devices import prepare_device
from datm_ray.runtime.executor import Event, Finished, Phase
from datm_ray.runtime.mesh import Alone
from datm_ray.stages.checkpoint import PARTS, Attempt, Rows, load_checkpoint, save_checkpoint
from datm_ray.stages.distill import COST, INITIAL, MAPS, SYNTHETIC, Distillation, read_cost
from datm_ray.stages.expert_networks import ExpertNetworks
from datm_ray.stages.expert_progress import remove_folder
from datm_ray.stages.metadd import MetaNetworks
from datm_ray.stages.method import Part, Piece
from datm_ray.stages.registry import method_of
from datm_ray.store.files.filesystem import Location, MissingFileError, open_location

PIECES = "pieces"


def piece_folder(folder: Location, piece: Piece) -> Location:
    """Folder of a piece within that of its run."""
    return folder / PIECES / f"{piece.number:05d}"


def unfinished_pieces(config: RunConfig, folder: Location, classes: int) -> list[Piece]:
    """Pieces of a run without a result; the last one if only the set is missing. Empty if it is made as a whole."""
    pieces = method_of(config).pieces(config, classes)
    left = [piece for piece in pieces if not (piece_folder(folder, piece) / SYNTHETIC).exists()]
    return left or list(pieces[-1:])


class PieceWorker:
    """Makes pieces of sets from one data set."""

    def __init__(self, dataset: Dataset, cluster: ClusterConfig) -> None:
        self._device = prepare_device(cluster)
        self._cluster, self._dataset = cluster, dataset

    def make_piece(self, config: RunConfig, store_uri: str, folder_uri: str, number: int) -> Iterator[Event]:
        """Make a piece from its last checkpoint, and the set if no other piece is missing.

        Args:
            config: recipe of the run.
            store_uri: store of the trained networks.
            folder_uri: folder of the run.
            number: number of the piece.

        Raises:
            MissingExpertsError: the store has not all networks of the recipe.
            DivergenceError: too many iterations in a row diverged.
        """
        folder, end = open_location(folder_uri), Finished()
        if (folder / SYNTHETIC).exists():
            yield end
            return
        pieces = method_of(config).pieces(config, self._dataset.classes)
        own = piece_folder(folder, pieces[number])
        if not (own / SYNTHETIC).exists():
            for event in self._made(config, store_uri, own, pieces[number]):
                if isinstance(event, Finished):
                    end = event
                else:
                    yield event
        if all((piece_folder(folder, piece) / SYNTHETIC).exists() for piece in pieces):
            yield Phase("joining the pieces")
            try:
                self._join(config, store_uri, folder, pieces)
            except (OvertakenError, MissingFileError):  # another worker does the same, and removes the pieces
                if not (folder / SYNTHETIC).exists():
                    raise
        yield end

    def _made(self, config: RunConfig, store_uri: str, own: Location, piece: Piece) -> Iterator[Event]:
        yield Phase("preparing the networks")
        unvalidated = config.distill.model_copy(update={"validate_every": 0})
        config = config.model_copy(update={"distill": unvalidated})
        part = Part(config, self._dataset, store_uri, Alone(), self._device, sharing=1, piece=piece)
        with closing(method_of(config)(part)) as method:
            yield from Distillation(part, own, method, Account(self._device, self._cluster), None).events()

    def _join(self, config: RunConfig, store_uri: str, folder: Location, pieces: Sequence[Piece]) -> None:
        """Write the set and what belongs to it, then remove the pieces."""
        attempt, places = Attempt.start(folder, Alone()), [piece_folder(folder, piece) for piece in pieces]
        folder, attempt.resumed_at = attempt.folder, -1
        backbone = ExpertNetworks(config.each_backbone()[0], self._dataset, store_uri, self._device)
        initial, final = ([read_artifact(place / name) for place in places] for name in (INITIAL, SYNTHETIC))
        first, last = (self._whole(config, pieces, artifacts, backbone) for artifacts in (initial, final))
        kind = method_of(config).state
        whole = Rows.of_shard(0, 1, self._dataset.classes, config.distill.ipc)
        states = [
            load_checkpoint(kind, place, Rows(0, len(artifact.labels)), config.distill, self._device)
            for place, artifact in zip(places, final, strict=True)
        ]
        state = kind(last, config.distill, history=_mean_history([each for each in states if each is not None]))
        save_checkpoint(attempt, state, whole, Alone(), run_identity(config))
        (folder / COST).write_json(total(read_cost(place) for place in places).to_json())
        if config.metadd is not None:
            arguments = (config, config.metadd, self._dataset, store_uri, config.whole_role, backbone, whole)
            MetaNetworks(*arguments, self._device).keep_maps(folder / MAPS, Alone(), first.images, last)
        for name, held, artifact in ((INITIAL, first, initial[0]), (SYNTHETIC, last, final[0])):
            context = (self._dataset.transform, self._dataset.class_names, recipe_of_set(config), artifact.provenance)
            save_artifact(folder / name, held, *context, folder.parent / TRANSFORMS)
        for place in places:
            remove_folder(place / PARTS)
            remove_folder(place)
        remove_folder(folder / PIECES)

    def _whole(
        self, config: RunConfig, pieces: Sequence[Piece], artifacts: Sequence[Artifact], teacher: ExpertNetworks
    ) -> SyntheticSet:
        """The set from its pieces, class by class; with `distill.labels` soft, labelled by the teacher."""
        rows = torch.cat([torch.from_numpy(piece.rows(config.distill.ipc)) for piece in pieces])

        def joined(parts: Sequence[Tensor]) -> Tensor:
            values = torch.cat(list(parts))
            return torch.empty_like(values).index_copy_(0, rows, values).to(self._device)

        images, labels = (joined([getattr(each, name) for each in artifacts]) for name in ("images", "labels"))
        if config.distill.labels == "soft":
            soft_labels = teacher.logits(0, images)
        else:
            soft_labels = joined([each.soft_labels for each in artifacts])
        step_sizes = torch.tensor(artifacts[0].step_sizes, device=self._device)
        return SyntheticSet(images, soft_labels, step_sizes, labels)


def _mean_history(states: Sequence[State[Any]]) -> list[Any]:
    """Records of the iterations, each with the mean values of all pieces; skipped if it was in any of them."""
    found = []
    for records in zip(*(state.history for state in states), strict=True):
        means = {
            each.name: type(getattr(records[0], each.name))(
                sum(getattr(record, each.name) for record in records) / len(records)
            )
            for each in dataclasses.fields(records[0])
        }
        means["skipped"] = any(record.skipped for record in records)
        found.append(dataclasses.replace(records[0], **means))
    return found
