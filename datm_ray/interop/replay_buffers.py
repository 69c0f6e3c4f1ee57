"""Import and export of expert trajectories of the MTT family: `replay_buffer_*.pt` files.

A replay buffer is a `torch.save` of a list of trajectories. A trajectory is a list of snapshots; a snapshot's position
in it is the epoch. A snapshot is a list of a network's parameters, in the order in which its modules were created. The
published ConvNet creates its modules in the same order as the ConvNet of this package (blocks of convolution and norm,
then the classifier) and normalises with the same epsilon. So parameters need no mapping if their shapes agree. One case
is refused: for images of one channel, the published ConvNet pads the first convolution by 3 pixels, and the ConvNet
here by 1.

A buffer does not name its data set, network or number of epochs; a recipe gives them. Nor does it hold the transform of
its experts' images. Imported experts are stored with the transform of the recipe's data set. If they were trained under
another transform (other whitening, or fitted on images that are validation data here), synthetic images match them less
well. So the first trajectory is measured on test images, after the recipe's last epoch. An expert's info records
that it was imported, and from which file.

Replay buffers contain no running statistics of batch norms. Experts with batch norms cannot be imported, and are
exported without the statistics. Files are read as data (see `interop.torch_files`): nothing in them is executed.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import count
from operator import attrgetter
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.config import RunConfig, override
from datm_ray.core.networks.parameters import FlatNetwork, float_buffers, unflatten_into
from datm_ray.core.networks.registry import build_network
from datm_ray.data.dataset import transform_of
from datm_ray.data.sources import RawDataset, load_raw
from datm_ray.data.transform import Transform
from datm_ray.errors import CorruptFileError, DatmError, StoreError
from datm_ray.interop.accuracy import Accuracy, accuracy_of
from datm_ray.interop.torch_files import read_torch_file
from datm_ray.stages.experts.train import expert_group, expert_info
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.trajectories import ExpertGroup, Snapshot, epochs_in_words

PUBLISHED_PER_FILE = 10
"""Number of experts in each replay buffer that MTT's authors have published; the default of exports."""

PUBLISHED_PADDING = 3
"""Padding in pixels of the first convolution of MTT's ConvNet for images of one channel; the ConvNet here pads by 1."""

_Trajectory = list[list[NDArray[Any]]]


@dataclass(frozen=True)
class Imported:
    """Result of importing one trajectory of a replay buffer, which is now an expert in the store."""

    group: str
    """Key, as text, of the group of experts in which the trajectory is stored."""

    expert: int
    """Number, within the group, of the expert that holds the trajectory."""

    new: bool
    """True if this import stored the trajectory; False if an earlier import had stored it."""

    accuracy: Accuracy | None
    """Accuracy on test images after the recipe's last epoch, for the first trajectory only; `None` for the others.

    A low accuracy means that the recipe normalises images in another way, or has another order of classes, than the
    program that trained the experts."""


@dataclass(frozen=True)
class Exported:
    """Result of an export to replay buffers."""

    files: tuple[str, ...]
    """Names of the written replay buffers, in the folder of the export."""
    left_out: tuple[int, ...]
    """Stored epochs that were not exported, because an earlier epoch is not stored: a buffer has no gaps.

    The epochs are those of the first expert. All experts of a group store the same epochs."""
    without_statistics: bool
    """True if the experts have running statistics of batch norms, which replay buffers cannot hold."""
    padded_otherwise: bool
    """True for a ConvNet on images of one channel: the published one pads them by 3 pixels, this package's by 1, so the
    published one gives other outputs with these parameters."""


def import_replay_buffers(files: Sequence[str], config: RunConfig, store_uri: str) -> Iterator[Imported]:
    """Store every trajectory of the replay buffers as an expert of the recipe, under the next free numbers.

    Nothing is done before the result is iterated over: each item stores a trajectory. A trajectory that was imported
    before is recognised by its content and not stored again, so an import can be repeated. Only the epochs that the
    recipe keeps are stored, in the format of `experts.storage`. Each file is read twice, and each time whole, so that
    nothing is stored unless all files fit the recipe.

    Args:
        files: paths or URIs of the replay buffers.
        config: recipe of the experts. With several backbones, a trajectory is an expert of the first that it fits.
        store_uri: path or URI of the trajectory store to write to.

    Raises:
        CorruptFileError: a file is not a replay buffer, or its network gives logits that are not finite.
        StoreError: a trajectory does not fit the recipe, the store has other epochs of these experts, or a location
            cannot be read or written.
        DatasetError: the recipe's images cannot be read.
    """
    d = config.dataset
    raw = load_raw(d.source, d.path, resize=d.resize, validation=d.validation, streamed=d.streamed)
    networks = [_Network(backbone, raw, store_uri) for backbone in config.resolved(raw.size).each_backbone()]
    locations = [open_location(file) for file in files]
    for location in locations:  # check all files before anything is written
        for position, trajectory in enumerate(_read(location)):
            _network_of(trajectory, networks, f"Trajectory {position} of {location.uri}", config.name)
    for location in locations:
        trajectories = _read(location)
        for position, trajectory in enumerate(trajectories):
            network = _network_of(trajectory, networks, f"Trajectory {position} of {location.uri}", config.name)
            trajectories[position] = []  # free the trajectory's memory for the next one
            is_first = location == locations[0] and not position
            accuracy = network.accuracy(trajectory, location.uri) if is_first else None
            origin: dict[str, object] = {"file": PurePosixPath(location.path).name, "position": position}
            yield network.store(trajectory, origin, accuracy)


def _network_of(trajectory: _Trajectory, networks: Sequence[_Network], place: str, recipe: str) -> _Network:
    """First network that the trajectory fits. Raises `StoreError` if it fits none of them.

    Args:
        networks: networks of the recipe.
        place: name of the trajectory, for the message.
        recipe: name of the recipe, for the message.
    """
    differences = [network.difference(trajectory) for network in networks]
    if None not in differences:
        settings = networks[0].settings_for(trajectory) if len(networks) == 1 else []
        given = " ".join(f"--set {shlex.quote(each)}" for each in settings)
        remedy = f"give {given or 'the recipe of these experts: their data set, network and epochs'}"
        raise StoreError(f"{place} does not fit {recipe}", str(differences[0]), remedy)
    return networks[differences.index(None)]


def export_replay_buffers(group: ExpertGroup, out: Location, per_file: int = PUBLISHED_PER_FILE) -> Exported:
    """Write all experts of a group as `replay_buffer_<n>.pt`. Existing files of these names are replaced.

    Args:
        group: experts to export.
        out: folder to write to.
        per_file: number of experts in each file; the last file may have fewer.

    Raises:
        StoreError: the group has no experts, or the epoch 0 of an expert is not stored.
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
    """True if MTT's published network pads images otherwise than this package's, so that their outputs differ.

    Args:
        architecture: name of the network's architecture.
        channels: number of the images' channels.
    """
    return architecture == "convnet" and channels == 1


class _Network:
    """Network of the recipe, with the group of its experts."""

    def __init__(self, config: RunConfig, raw: RawDataset, store_uri: str) -> None:
        module = build_network(config.network.for_images(raw.channels, raw.size, raw.classes), seed=0)
        self._config, self._raw, self._store_uri = config, raw, store_uri
        self._flat = FlatNetwork(module)
        self._has_buffers = bool(float_buffers(module))
        self._pads_differently = pads_differently(config.network.architecture, raw.channels)
        self._group = expert_group(store_uri, config, raw.name, raw.fingerprint)
        self._known: dict[str, int] | None = None

    def difference(self, trajectory: _Trajectory) -> str | None:
        """Reason why the trajectory does not fit this network; `None` if it fits."""
        epochs, wanted = len(trajectory) - 1, self._config.experts.epochs
        if self._pads_differently:
            return (
                f"Its images have one channel: the published ConvNet pads them by {PUBLISHED_PADDING} pixels at its "
                "first convolution and this one by 1, so equal parameters give another network"
            )
        if self._has_buffers:
            return "The recipe's network has batch norms, whose running statistics replay buffers do not contain"
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
        """Settings `section.field=value` that make the recipe fit the trajectory; empty if none are found."""
        config, d = self._config, self._config.distill
        epochs = min(len(trajectory) - 1, config.experts.epochs)
        wanted: dict[str, int | str] = {"experts.epochs": epochs}
        if config.latest_matched > epochs:
            span = min(d.expert_epochs, max(1, epochs // 2))
            bound = epochs + 1 - span
            wanted["distill.expert_epochs"] = span
            wanted["distill.start_epochs"] = f"[{min(d.start_epochs.first, bound - 1)},{bound}]"
        if config.network.architecture == "convnet" and config.network.depth and trajectory[0][0].ndim == 4:
            a_block = (len(self._flat.shapes) - 2) // config.network.depth
            wanted["network.width"] = trajectory[0][0].shape[0]
            wanted["network.depth"] = (len(trajectory[0]) - 2) // a_block
        changes = [f"{key}={value}" for key, value in wanted.items() if value != attrgetter(key)(config)]
        try:
            other = _Network(override(config, changes), self._raw, self._store_uri)
        except DatmError:
            return []
        return changes if other.difference(trajectory) is None else []

    def accuracy(self, trajectory: _Trajectory, uri: str) -> Accuracy:
        """Accuracy on test images after the recipe's last epoch, under the transform stored for the group's experts.

        If the group has no transform yet, the transform of the recipe's data set is stored first.

        Args:
            trajectory: snapshots by epoch.
            uri: file of the trajectory, for messages.
        """
        self._store_transform()
        stored = self._group.read_transform()
        transform = Transform.from_arrays(stored.arrays, stored.metadata, self._group.location.uri)
        unflatten_into(self._flat.module, torch.from_numpy(_vector(trajectory[self._config.experts.epochs])))
        return accuracy_of(self._flat.module, self._raw, transform, uri)

    def store(self, trajectory: _Trajectory, origin: dict[str, object], accuracy: Accuracy | None = None) -> Imported:
        """Store one trajectory, whose shapes were checked before, unless it is stored already.

        Args:
            trajectory: snapshots by epoch.
            origin: name of the trajectory's file and its position in it, for the expert's info.
            accuracy: accuracy on test images, for the result; `None` if it was not measured.

        Raises:
            StoreError: experts of the group keep other epochs than the recipe.
        """
        epochs = self._config.kept_epochs
        vectors = [_vector(trajectory[epoch]) for epoch in epochs]
        digest = sha256(b"".join(sha256(vector.tobytes()).digest() for vector in vectors)).hexdigest()
        known = self._imported()
        if digest in known:
            return Imported(str(self._group.key), known[digest], new=False, accuracy=accuracy)
        self._require_same_epochs(epochs)
        self._store_transform()
        nan = math.nan
        snapshots = [Snapshot(epoch, -1, nan, nan, vector) for epoch, vector in zip(epochs, vectors, strict=True)]
        facts, taken = {**origin, "digest": digest}, set(self._group.experts())
        place = (self._config, self._group, self._raw.fingerprint, self._flat.module)
        info_of = partial(expert_info, *place, seed=-1, epochs=epochs, imported=facts)
        free = (expert for expert in count() if expert not in taken)
        # The store refuses a number that another import has taken meanwhile.
        expert = next(each for each in free if self._group.write_expert(each, snapshots, info_of(each)))
        known[digest] = expert
        return Imported(str(self._group.key), expert, new=True, accuracy=accuracy)

    def _require_same_epochs(self, epochs: Sequence[int]) -> None:
        for expert in self._group.experts()[:1]:
            kept = self._group.read_info(expert).epochs
            if tuple(kept) != tuple(epochs):
                raise StoreError(
                    f"{self._group.key} holds {epochs_in_words(kept)}, and these would be {epochs_in_words(epochs)}",
                    "all experts of a group keep the same epochs, so that a recipe can match any of them",
                    "use the same experts.keep_epochs as before, or another --store",
                )

    def _imported(self) -> dict[str, int]:
        """Digest of each trajectory that was imported into the group -> number of its expert."""
        if self._known is None:
            recipes = {expert: self._group.read_info(expert).recipe for expert in self._group.experts()}
            self._known = {
                recipe["imported"]["digest"]: expert for expert, recipe in recipes.items() if "imported" in recipe
            }
        return self._known

    def _store_transform(self) -> None:
        if not self._group.has_transform():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            settings = self._config.dataset
            transform = transform_of(self._raw, settings.kind, settings.statistics, device=device)
            self._group.write_transform(transform.to_arrays(), transform.to_metadata())


def _read(location: Location) -> list[_Trajectory]:
    """Read the trajectories of one file, which together are at most as large as the file.

    Raises:
        CorruptFileError: the file is no replay buffer, or the parameters of a trajectory never change.
        StoreError: the file cannot be read.
    """
    try:
        trajectories = read_torch_file(location)
    except StoreError:
        raise
    except Exception as error:  # archives and pickles raise errors of many classes
        raise CorruptFileError(
            f"{location.uri} is not a replay buffer",
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
        # Before bytes are counted: live weights are in the file only once, and would look like too many bytes.
        _require_training(snapshots, _is_same_view, place)
        tensors = [tensor for snapshot in snapshots for tensor in snapshot]
        left -= sum(getattr(tensor, "nbytes", 0) for tensor in tensors)
        if left < 0 or not all(map(_is_parameter, tensors)):
            raise _no_buffer(location)
        _require_training(snapshots, np.array_equal, place)
    found: list[_Trajectory] = trajectories
    return found


def _items(value: object, location: Location) -> list[Any]:
    """Return the value if it is a non-empty list. Raises `CorruptFileError` otherwise."""
    if not isinstance(value, list) or not value:
        raise _no_buffer(location)
    return value


def _no_buffer(location: Location) -> CorruptFileError:
    return CorruptFileError(
        f"{location.uri} is not a replay buffer",
        "It does not hold trajectories: lists of snapshots, which are lists of finite tensors",
    )


def _require_training(trajectory: list[list[Any]], same: Callable[[Any, Any], bool], place: str) -> None:
    """Raise `CorruptFileError` if all snapshots of a trajectory have the same parameters.

    Args:
        same: compares two tensors.
        place: name of the trajectory, for the message.
    """
    first = trajectory[0]
    still = all(len(snapshot) == len(first) and all(map(same, first, snapshot)) for snapshot in trajectory)
    if still and len(trajectory) > 1:
        raise CorruptFileError(
            f"{place} holds the same parameters {len(trajectory)} times, one for each epoch",
            "It was written on a CPU, where the published code stores references to the live weights and not copies",
            "Train these experts again on a GPU, or with `p.detach().clone().cpu()` in the place of `p.detach().cpu()`",
        )


def _is_same_view(one: object, other: object) -> bool:
    """True if both values are arrays that share memory, shape and type. Their numbers are not compared."""
    if not isinstance(one, np.ndarray) or not isinstance(other, np.ndarray):
        return False
    return one is other or bool(one.__array_interface__ == other.__array_interface__)


def _is_parameter(value: object) -> bool:
    """True if a value is an array of finite numbers."""
    return isinstance(value, np.ndarray) and bool(np.isfinite(value).all())


def _vector(snapshot: list[NDArray[Any]]) -> NDArray[np.float32]:
    """Concatenate a snapshot's parameters to a vector [p]."""
    return np.concatenate([tensor.reshape(-1) for tensor in snapshot], dtype=np.float32, casting="same_kind")


def _trajectory(group: ExpertGroup, expert: int) -> list[list[Tensor]]:
    """Read an expert's parameters as a trajectory: one inner list per epoch, with one tensor per parameter.

    The epochs are 0 to the last one before the first gap in the stored epochs.

    Raises:
        StoreError: epoch 0 is not stored.
    """
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
    """Epochs 0, 1, 2, ... of an ascending list, up to the first missing epoch, exclusive."""
    return [epoch for position, epoch in enumerate(epochs) if position == epoch]
