"""Expert trajectories of the MTT family: `replay_buffer_*.pt` files into a trajectory store, and back.

A replay buffer is a `torch.save` of trajectories; a trajectory is a list of snapshots, epochs 0, 1, ... by position; a
snapshot is the list of a network's parameters in the order in which the modules were made. The ConvNet of those
projects makes its modules in the order of ours (blocks of convolution and norm, then the classifier) and normalises
with the same epsilon, so the parameters need no mapping: shapes that agree mean the same. There is one exception: for
images of one channel theirs pads the first convolution by 3, ours by 1. Such experts are refused.

What a buffer does not tell is taken from a recipe: data set, network, number of epochs. Nor does it hold the transform
of its experts' images. Imported experts are stored beside the transform that the recipe's data set has here; where
theirs was another one (other whitening, or fitted on the images that are set aside here for validation), they match
synthetic images less well. That an expert was imported, and from which file, stands in the recipe of its info.

Buffers of batch norms are in no replay buffer: such experts cannot be imported, and are exported without them. Files
are read as data, see `store.torch_files`: nothing in them is executed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.config import RunConfig, override
from datm_ray.core.networks import build_network
from datm_ray.core.parameters import FlatNetwork, float_buffers
from datm_ray.data.sources import RawDataset, load_raw
from datm_ray.data.transform import fit_transform
from datm_ray.errors import CorruptFileError, DatmError, StoreError
from datm_ray.runtime.experts import expert_group, network_spec
from datm_ray.store.filesystem import Location, open_location
from datm_ray.store.torch_files import read_torch_file
from datm_ray.store.trajectories import ExpertGroup, Snapshot, TrajectoryInfo, epochs_in_words

PUBLISHED_PER_FILE = 10

PUBLISHED_PADDING = 3
"""Pixels by which the published ConvNet pads images of one channel at its first convolution; ours pads all by 1."""

_ANOTHER_RECIPE = "give the recipe of these experts: their data set, network and epochs"

_Trajectory = list[list[NDArray[Any]]]


@dataclass(frozen=True)
class Imported:
    """One trajectory of a replay buffer, in the store."""

    group: str
    """The group it went to, or lay in already."""

    expert: int
    """Its number there."""

    new: bool
    """False where the same trajectory had been imported before."""


@dataclass(frozen=True)
class Exported:
    """What went into replay buffers."""

    files: tuple[str, ...]
    left_out: tuple[int, ...]
    """Epochs of the first expert after a gap: the position in a buffer is the epoch, so they have no place there."""
    without_statistics: bool
    """Whether the experts have running statistics of batch norms, which have no place there either."""
    padded_otherwise: bool
    """Whether the published ConvNet computes something else with the parameters, see `pads_differently`."""


def import_replay_buffers(files: Sequence[str], config: RunConfig, store_uri: str) -> Iterator[Imported]:
    """Store every trajectory of the files as an expert of the recipe, under the next free numbers.

    A trajectory that was imported before is found by its content and not stored again, so an import can be repeated.
    Stored are the epochs that the recipe keeps, as `experts.storage` says. Loads one file at
    a time, whole, and all of them twice: nothing is stored unless everything fits.

    Raises:
        CorruptFileError: a file is no replay buffer.
        StoreError: its trajectories do not fit the recipe, or a place cannot be read or written.
    """
    d = config.dataset
    raw = load_raw(d.source, d.path, resize=d.resize, validation=d.validation)
    networks = [_Network(backbone, raw, store_uri) for backbone in config.resolved(raw.size).each_backbone()]
    locations = [open_location(file) for file in files]
    for location in locations:  # all of them, before anything is written
        for position, trajectory in enumerate(_read(location)):
            _network_of(trajectory, networks, f"Trajectory {position} of {location.uri}", config.name)
    for location in locations:
        trajectories = _read(location)
        for position, trajectory in enumerate(trajectories):
            network = _network_of(trajectory, networks, f"Trajectory {position} of {location.uri}", config.name)
            trajectories[position] = []  # read and done with: the next one needs the room
            yield network.store(trajectory, {"file": PurePosixPath(location.path).name, "position": position})


def _network_of(trajectory: _Trajectory, networks: Sequence[_Network], place: str, recipe: str) -> _Network:
    """The one that the trajectory is of. Raises StoreError if it is of none."""
    differences = [network.difference(trajectory) for network in networks]
    if None not in differences:
        settings = networks[0].settings_for(trajectory) if len(networks) == 1 else []
        remedy = " ".join(["give", *(f"--set {each}" for each in settings)]) if settings else _ANOTHER_RECIPE
        raise StoreError(f"{place} does not fit {recipe}", str(differences[0]), remedy)
    return networks[differences.index(None)]


def export_replay_buffers(group: ExpertGroup, out: Location, per_file: int = PUBLISHED_PER_FILE) -> Exported:
    """Write all experts of a group as `replay_buffer_<n>.pt`, some experts a file, replacing files of that name.

    Raises:
        StoreError: there are no experts, or one whose epoch 0 was not kept.
    """
    experts = group.experts()
    if not experts:
        raise StoreError(f"{group.location.uri} holds no experts", remedy="`datm-ray store ls` names the groups")
    files = []
    for number, start in enumerate(range(0, len(experts), per_file)):
        trajectories = [_trajectory(group, expert) for expert in experts[start : start + per_file]]
        name = f"replay_buffer_{number}.pt"
        with (out / name).create() as file, (out / name).explaining("write"):
            torch.save(trajectories, file)
        files.append(name)
    info = group.read_info(experts[0])
    channels = info.parameter_shapes[0][1:2]
    padded_otherwise = bool(channels) and pads_differently(info.architecture, channels[0])
    return Exported(tuple(files), info.epochs[len(_unbroken(info.epochs)) :], info.buffer_count > 0, padded_otherwise)


def pads_differently(architecture: str, channels: int) -> bool:
    """Whether the published network of this name is another function of the same parameters."""
    return architecture == "convnet" and channels == 1


class _Network:
    """One network of the recipe, and the group of its experts."""

    def __init__(self, config: RunConfig, raw: RawDataset, store_uri: str) -> None:
        module = build_network(network_spec(config, raw.channels, raw.size, raw.classes), seed=0)
        self._config, self._raw, self._store_uri = config, raw, store_uri
        self._flat = FlatNetwork(module)
        self._has_buffers = bool(float_buffers(module))
        self._pads_differently = pads_differently(config.network.architecture, raw.channels)
        self._group = expert_group(store_uri, config, raw.name, raw.fingerprint)
        self._known: dict[str, int] | None = None

    def difference(self, trajectory: _Trajectory) -> str | None:
        """Why the trajectory cannot be one of this network's, in words; none where it can."""
        epochs, wanted = len(trajectory) - 1, self._config.experts.epochs
        if self._pads_differently:
            return (
                f"Its images have one channel: the published ConvNet pads them by {PUBLISHED_PADDING} pixels at its "
                "first convolution and this one by 1, so equal parameters are another network"
            )
        if self._has_buffers:
            return "The recipe's network has batch norms, whose running statistics are in no replay buffer"
        if epochs < wanted:
            return f"It ends after {epochs} epochs, and experts.epochs is {wanted}"
        for epoch in self._config.kept_epochs:
            shapes = [tuple(tensor.shape) for tensor in trajectory[epoch]]
            if len(shapes) != len(self._flat.shapes):
                return f"Epoch {epoch} has {len(shapes)} tensors, the recipe's network {len(self._flat.shapes)}"
            for name, shape, own in zip(self._flat.names, shapes, self._flat.shapes, strict=True):
                if shape != own:
                    return f"{name} is {list(shape)} in epoch {epoch}, and {list(own)} in the recipe's network"
        return None

    def settings_for(self, trajectory: _Trajectory) -> list[str]:
        """Settings of the recipe, `section.field=value`, with which the trajectory fits; none where there are none."""
        config, d = self._config, self._config.distill
        wanted: dict[str, int] = {}
        epochs = min(len(trajectory) - 1, config.experts.epochs)
        wanted["experts.epochs"] = epochs
        if config.latest_matched > epochs:
            span = min(d.expert_epochs, max(1, epochs // 2))
            bound = epochs + 1 - span
            start = min(d.start_bound, bound) if d.expand_iterations else bound
            wanted |= {"distill.expert_epochs": span, "distill.final_start_bound": bound, "distill.start_bound": start}
            wanted["distill.first_start"] = min(d.first_start, start - 1)
        if config.network.architecture == "convnet" and config.network.depth and trajectory[0][0].ndim == 4:
            a_block = (len(self._flat.shapes) - 2) // config.network.depth
            wanted["network.width"] = trajectory[0][0].shape[0]
            wanted["network.depth"] = (len(trajectory[0]) - 2) // a_block
        now = config.model_dump()
        changes = [f"{key}={value}" for key, value in wanted.items() if value != _value_at(now, key)]
        try:
            other = _Network(override(config, changes), self._raw, self._store_uri)
        except DatmError:
            return []
        return changes if other.difference(trajectory) is None else []

    def store(self, trajectory: _Trajectory, origin: dict[str, object]) -> Imported:
        """Store one trajectory whose shapes are right."""
        epochs = self._config.kept_epochs
        vectors = [_vector(trajectory[epoch]) for epoch in epochs]
        digest = sha256(b"".join(sha256(vector.tobytes()).digest() for vector in vectors)).hexdigest()
        known = self._imported()
        if digest in known:
            return Imported(str(self._group.key), known[digest], new=False)
        self._require_same_epochs(epochs)
        self._store_transform()
        nan = float("nan")
        snapshots = [Snapshot(epoch, -1, nan, nan, vector) for epoch, vector in zip(epochs, vectors, strict=True)]
        taken = set(self._group.experts())
        for expert in count():
            if expert not in taken:
                info = self._info(expert, {**origin, "digest": digest})
                if self._group.write_expert(expert, snapshots, info):  # else another import was faster
                    known[digest] = expert
                    return Imported(str(self._group.key), expert, new=True)
        raise AssertionError("count() ends")

    def _require_same_epochs(self, epochs: Sequence[int]) -> None:
        for expert in self._group.experts()[:1]:
            kept = self._group.read_info(expert).epochs
            if tuple(kept) != tuple(epochs):
                raise StoreError(
                    f"{self._group.key} holds {epochs_in_words(kept)}, and these would be {epochs_in_words(epochs)}",
                    "the experts of a group are kept alike, so that a recipe can match any of them",
                    "give the same experts.keep_epochs as before, or another --store",
                )

    def _imported(self) -> dict[str, int]:
        """Digest -> number of the experts that were imported into the group so far."""
        if self._known is None:
            recipes = {expert: self._group.read_info(expert).recipe for expert in self._group.experts()}
            self._known = {
                recipe["imported"]["digest"]: expert for expert, recipe in recipes.items() if "imported" in recipe
            }
        return self._known

    def _store_transform(self) -> None:
        if not self._group.has_transform():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            train, kind = self._raw.train.images, self._config.dataset.kind
            transform = fit_transform(kind, train, self._raw.levels, device=device)
            self._group.write_transform(transform.to_arrays(), transform.to_metadata())

    def _info(self, expert: int, imported: dict[str, object]) -> TrajectoryInfo:
        config = self._config
        return TrajectoryInfo(
            dataset=self._group.key.dataset,
            dataset_fingerprint=self._raw.fingerprint,
            architecture=config.network.architecture,
            recipe={
                "network": config.network.model_dump(),
                "experts": config.experts.model_dump(exclude={"count"}),
                "imported": imported,
            },
            fingerprint=self._group.key.fingerprint,
            seed=-1,
            expert=expert,
            parameter_names=self._flat.names,
            parameter_shapes=self._flat.shapes,
            epochs=config.kept_epochs,
            storage=config.experts.storage,
        )


def _value_at(values: dict[str, Any], key: str) -> Any:
    section, _, field = key.partition(".")
    return values[section][field]


def _read(location: Location) -> list[_Trajectory]:
    """The trajectories of one file, together no larger than the file.

    Raises:
        CorruptFileError: it holds anything else, or a trajectory that never moves.
    """
    try:
        trajectories = read_torch_file(location)
    except StoreError:
        raise
    except Exception as error:  # neither archives nor pickles have a common error
        raise CorruptFileError(
            f"{location.uri} is no replay buffer",
            "It cannot be read as lists of tensors: it is another file, was cut off, holds objects that could run "
            "code, or was written by torch before 1.6",
            "Check that it was downloaded whole",
        ) from error
    left = location.size()
    for position, trajectory in enumerate(_items(trajectories, location)):
        snapshots = [_items(snapshot, location) for snapshot in _items(trajectory, location)]
        place = f"Trajectory {position} of {location.uri}"
        left -= sum(1 + len(snapshot) for snapshot in snapshots)
        if left < 0:
            raise _no_buffer(location)
        _require_training(snapshots, _is_same_view, place)  # before the bytes: live weights are in the file only once
        tensors = [tensor for snapshot in snapshots for tensor in snapshot]
        left -= sum(getattr(tensor, "nbytes", 0) for tensor in tensors)
        if left < 0 or not all(map(_is_parameter, tensors)):
            raise _no_buffer(location)
        _require_training(snapshots, np.array_equal, place)
    found: list[_Trajectory] = trajectories
    return found


def _items(value: object, location: Location) -> list[Any]:
    """A list that is not empty."""
    if not isinstance(value, list) or not value:
        raise _no_buffer(location)
    return value


def _no_buffer(location: Location) -> CorruptFileError:
    return CorruptFileError(
        f"{location.uri} is no replay buffer",
        "It holds something else than trajectories: lists of snapshots, which are lists of finite tensors",
    )


def _require_training(trajectory: list[list[Any]], same: Callable[[Any, Any], bool], place: str) -> None:
    """The parameters change from the first epoch to some other."""
    first = trajectory[0]
    still = all(len(snapshot) == len(first) and all(map(same, first, snapshot)) for snapshot in trajectory)
    if still and len(trajectory) > 1:
        raise CorruptFileError(
            f"{place} holds the same parameters {len(trajectory)} times, one for each epoch",
            "It was written on a CPU, where the published code stores references to the live weights and not copies",
            "Train these experts again on a GPU, or with `p.detach().clone().cpu()` in the place of `p.detach().cpu()`",
        )


def _is_same_view(one: object, other: object) -> bool:
    """Whether both are arrays of the same values in memory; no value is looked at."""
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray):
        return False
    return one is other or bool(one.__array_interface__ == other.__array_interface__)


def _is_parameter(value: object) -> bool:
    """Whether it is an array of finite numbers."""
    return isinstance(value, np.ndarray) and bool(np.isfinite(value).all())


def _vector(snapshot: list[NDArray[Any]]) -> NDArray[np.float32]:
    """[p]"""
    return np.concatenate([tensor.reshape(-1) for tensor in snapshot], dtype=np.float32, casting="same_kind")


def _trajectory(group: ExpertGroup, expert: int) -> list[list[Tensor]]:
    """The epochs from 0 on, up to the first that was not kept."""
    info = group.read_info(expert)
    epochs = _unbroken(info.epochs)
    if not epochs:
        raise StoreError(
            f"Expert {expert} of {group.key} has no epoch 0",
            "A replay buffer begins with the initialisation",
            "Export experts that were stored from epoch 0 on",
        )
    sizes = [math.prod(shape) for shape in info.parameter_shapes]
    return [
        [
            piece.reshape(shape).clone()
            for piece, shape in zip(torch.from_numpy(vector).split(sizes), info.parameter_shapes, strict=True)
        ]
        for vector in group.read_params(expert, epochs)
    ]


def _unbroken(epochs: Sequence[int]) -> list[int]:
    """0, 1, ... as far as they are there."""
    return [epoch for position, epoch in enumerate(epochs) if position == epoch]
