"""Expert trajectories: parameters of networks trained on the real data, after every stored epoch.

One expert is one sealed Arrow file (see `sealed`), with one record batch per snapshot, so that matching reads only the
two epochs that it needs:

    <uri>/<dataset>/<architecture>/<recipe fingerprint>/expert-00017.arrow
    columns: epoch int32 | step int64 | train_loss f32 | test_accuracy f32
             | params fixed_size_list<f32, f16 or u16>[p] | buffers fixed_size_list<f32>[b]
    schema metadata "info": everything in `TrajectoryInfo`, as JSON

`TrajectoryInfo.storage` names the type of `params` in the file, where bfloat16 is stored as its 16 bits. Readers always
get float32. Files of version 1 have float32 params and no buffers.

Beside the experts, their folder can hold

    transform.arrow         tensor file with the transform that normalises the experts' images
    progress/               saved states of experts whose training is unfinished
    costs/                  records of what the training of the experts has cost
    difficulty-00008.arrow  difficulty of each training image for the first 8 experts; other experts see easy ones first

An expert is written once, whole, and never changes. This module does not know how experts are trained, nor which epochs
are matched. Letters: p = number of parameters of the network, b = number of values in its floating-point buffers.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datm_ray.errors import CorruptFileError, StoreError
from datm_ray.store.cache import configured_cache
from datm_ray.store.files.filesystem import AlreadyExistsError, Location, open_location
from datm_ray.store.precision import from_storage, storage_type, to_storage
from datm_ray.store.sealed import SealedFile, SealedWriter, damaged, open_sealed, reading_again, rejecting_nonsense
from datm_ray.store.tensors import TensorFile, read_tensors, write_tensors

FORMAT = "datm_ray.trajectory"
FORMAT_VERSION = 2
TRANSFORM_KIND = "transform"

_EXPERT_FILE = re.compile(r"expert-(\d{5})\.arrow")
_TRANSFORM_FILE = "transform.arrow"
_DIFFICULTY_FILE = re.compile(r"difficulty-\d{5}\.arrow")
PRIOR_FILE, PRIOR_PROGRESS = "prior.arrow", "progress.arrow"
"""PRIOR_FILE: name of the file of a prior, a trained autoencoder. PRIOR_PROGRESS: name of the file with its unfinished
training. A folder with such a file holds no experts."""
_COSTS = "costs"
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_MAX_EXPERT = 99_999
_MAX_STRETCHES = 6  # most ranges of epochs named in a message
_SCALARS = ("epoch", "step", "train_loss", "test_accuracy")


@dataclass(frozen=True)
class Snapshot:
    """State of one expert (a network trained on real images) after one epoch: parameters, buffers, measurements."""

    epoch: int
    """Number of epochs trained so far; 0 is the initialisation."""

    step: int
    """SGD steps taken so far; -1 if unknown."""

    train_loss: float
    """Mean training loss over the samples of this epoch alone; nan if not measured."""

    test_accuracy: float
    """Accuracy on the test set, from 0 to 1; nan if not measured."""

    params: NDArray[np.float32]
    """All parameters as one vector [p]."""

    buffers: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    """All floating-point buffers (running statistics of batch norms) as one vector [b]; empty if there are none."""


@dataclass(frozen=True)
class TrajectoryInfo:
    """Origin of a stored expert, and the layout of its vectors of parameters and buffers."""

    dataset: str
    dataset_fingerprint: str
    """Fingerprint of the raw data set, before normalisation, on which the expert was trained."""

    architecture: str
    recipe: dict[str, Any]
    """Settings of the expert's network and training, and its origin if imported. JSON-able, so tuples become lists."""

    fingerprint: str
    """Digest of data set, normalisation, network and training, see `config.expert_fingerprint`. It is the name of the
    folder of all experts with this digest."""

    seed: int
    """Seed of the expert's initialisation and batches; -1 if unknown."""

    expert: int
    """Number of the expert within its group (folder), from 0."""

    parameter_names: tuple[str, ...]
    parameter_shapes: tuple[tuple[int, ...], ...]
    """Shapes of the network's parameters, in their order in the flat vector."""

    epochs: tuple[int, ...]
    """Epochs whose snapshots are stored, ascending; 0 is the initialisation. Some epochs may be left out."""

    buffer_names: tuple[str, ...] = ()
    buffer_shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of the network's floating-point buffers, in their order in the vector of buffers."""

    storage: str = "float32"
    """Type of the stored parameters: "float32", "float16" or "bfloat16". Buffers are always stored as float32."""

    format_version: int = FORMAT_VERSION

    @property
    def parameter_count(self) -> int:
        """Length p of the flat vector of parameters."""
        return sum(math.prod(shape) for shape in self.parameter_shapes)

    @property
    def buffer_count(self) -> int:
        """Length b of the vector of floating-point buffers (running statistics of batch norms); 0 without any."""
        return sum(math.prod(shape) for shape in self.buffer_shapes)

    @property
    def key(self) -> GroupKey:
        """Key of the expert's group: all experts of the same data, architecture and recipe."""
        return GroupKey(self.dataset, self.architecture, self.fingerprint)


@dataclass(frozen=True, order=True)
class GroupKey:
    """Key of a group of experts that differ only in their seeds: the last three parts of its folder's path."""

    dataset: str
    architecture: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.dataset}/{self.architecture}/{self.fingerprint}"


class StoredEpochs(NamedTuple):
    """Stored epochs of one expert, and for each its mean training loss and its test accuracy, which is in [0, 1].

    The three fields have the same length. A loss or accuracy that was not measured is nan.
    """

    epochs: tuple[int, ...]
    train_loss: NDArray[np.float32]
    test_accuracy: NDArray[np.float32]


class TrajectoryStore:
    """Store of experts under one path or URI, with a folder for each group. Opening it reads and writes nothing."""

    def __init__(self, uri: str) -> None:
        """Open the store at a local path, or a file://, memory:// or s3:// URI, which need not exist."""
        self.location = open_location(uri)

    def groups(self, *, unfinished: bool = False) -> list[GroupKey]:
        """Keys of the groups with at least one finished expert, sorted.

        Args:
            unfinished: True to include groups without a finished expert that hold something else: a prior (trained
                autoencoder), difficulty scores of images, or unfinished training.
        """
        keys = [
            GroupKey(dataset, architecture, fingerprint)
            for dataset in self.location.list()
            for architecture in (self.location / dataset).list()
            for fingerprint in (self.location / dataset / architecture).list()
        ]
        found = [(key, ExpertGroup(self.location, key)) for key in keys if _is_safe(key)]
        return [key for key, group in found if group.experts() or (unfinished and group.holds_more())]

    def group(self, dataset: str, architecture: str, fingerprint: str) -> ExpertGroup:
        """Group with these three names; it may hold nothing. Raises StoreError if a name cannot be a folder's."""
        return ExpertGroup(self.location, GroupKey(dataset, architecture, fingerprint))


class ExpertGroup:
    """Group of the experts of one recipe, in one folder. Picklable. It holds no open file.

    The index at the end of an expert's file is read once and kept.
    """

    def __init__(self, root: Location, key: GroupKey) -> None:
        if not _is_safe(key):
            raise StoreError(
                f"{str(key)!r} cannot be a group's folder",
                remedy="Use letters, digits and . _ + = - only, and begin with a letter or digit",
            )
        self.key = key
        self.location = root / key.dataset / key.architecture / key.fingerprint
        self._opened: dict[int, _OpenedExpert] = {}

    def experts(self) -> list[int]:
        """Numbers of the stored experts, sorted. Experts that are still being written are left out."""
        matches = (_EXPERT_FILE.fullmatch(name) for name in self.location.list())
        return [int(match[1]) for match in matches if match]

    def other_files(self) -> list[str]:
        """Names of the files in the group's folder that hold difficulty scores of images or a trained prior."""
        return [name for name in self.location.list() if name == PRIOR_FILE or _DIFFICULTY_FILE.fullmatch(name)]

    def holds_more(self) -> bool:
        """True if the group's folder holds a prior, difficulty scores, or unfinished training of experts or a prior."""
        return bool(self.other_files() or self.progress.list() or PRIOR_PROGRESS in self.location.list())

    def write_expert(self, expert: int, snapshots: Iterable[Snapshot], info: TrajectoryInfo) -> bool:
        """Store one expert atomically; never replace a stored one. Returns True if this call stored it.

        Returns False if the expert is stored already, or if another writer stores it during the call. In the first
        case, `snapshots` is not read. Snapshots are read one at a time and must have the order of `info.epochs`. On a
        local disk each is written at once; elsewhere a local temporary file holds them until the upload. If `snapshots`
        raises an error, nothing is stored. The file has the current format, whatever `info.format_version` is.

        Raises:
            ValueError: the snapshots do not agree with `info`, `info` is of another expert, or `expert` is above 99999.
            StoreError: the file cannot be written, or a parameter is too large for `info.storage`.
        """
        if (info.key, info.expert) != (self.key, expert):
            raise ValueError(f"the info of expert {info.expert} of {info.key} given for expert {expert} of {self.key}")
        place, info = self.expert_file(expert), replace(info, format_version=FORMAT_VERSION)
        is_new = place.write_once(lambda file: _write(place, file, snapshots, info))
        if is_new:
            self._opened.pop(expert, None)
        return is_new

    def read_info(self, expert: int) -> TrajectoryInfo:
        """Read the origin of an expert and the layout of its vectors, but not its parameters.

        Raises (as all methods that read an expert):
            StoreError: the expert is not stored.
            CorruptFileError: its file is damaged, of a newer format, or of another expert.
        """
        return self._open(expert).info

    def size(self, expert: int) -> int:
        """Size of the expert's file in bytes. Raises StoreError if the expert is not stored."""
        return self.expert_file(expert).size()

    def remove_expert(self, expert: int) -> None:
        """Delete one expert's file; other files stay. Raises StoreError if the expert is not stored."""
        self._opened.pop(expert, None)
        self.expert_file(expert).remove()

    @property
    def progress(self) -> Location:
        """Folder with the saved states of experts whose training is unfinished; it may be missing."""
        return self.location / "progress"

    def write_cost(self, name: str, value: Mapping[str, object]) -> None:
        """Write what training some experts took (time, memory) to the JSON file `name`; replace an earlier file."""
        (self.location / _COSTS / f"{name}.json").write_json(value)

    def costs(self) -> list[Location]:
        """Locations of the JSON files written by `write_cost`."""
        folder = self.location / _COSTS
        return [folder / name for name in folder.list() if name.endswith(".json")]

    def remove(self) -> None:
        """Delete the group's experts (damaged ones too), transform, costs, scores, prior and unfinished training."""
        for expert in self.experts():
            self.remove_expert(expert)
        folders = [self.location / _COSTS, *(self.progress / name for name in self.progress.list())]
        files = [folder / name for folder in folders for name in folder.list()]
        known = (_TRANSFORM_FILE, PRIOR_PROGRESS, *self.other_files())
        files += [self.location / name for name in self.location.list() if name in known]
        for file in files:
            file.remove()
        for folder in (self.location / _COSTS, self.progress):
            if folder.local_path is not None:
                shutil.rmtree(folder.local_path, ignore_errors=True)  # empty folders; object stores have none

    def read_params(self, expert: int, epochs: Sequence[int]) -> list[NDArray[np.float32]]:
        """Parameters [p] after each of these epochs, exactly as stored; the caller may change the arrays.

        Only the batches of these epochs are read, each checked against its digest.

        Raises:
            StoreError: the expert or an epoch is not stored.
            CorruptFileError: the file is damaged, of a newer format, or of another expert.
        """
        return [snapshot.params for snapshot in self._read(expert, epochs)]

    def read_snapshot(self, expert: int, epoch: int) -> Snapshot:
        """Parameters, buffers, loss and accuracy of an expert after one stored epoch.

        Raises StoreError if the expert or epoch is not stored, and CorruptFileError if the file is damaged.
        """
        return self._read(expert, [epoch])[0]

    def read_progress(self, expert: int) -> StoredEpochs:
        """Training loss and test accuracy of an expert in each stored epoch. Only the end of its file is read."""
        return self._open(expert).progress

    def verify(self, expert: int) -> TrajectoryInfo:
        """Check every byte of an expert's file, and return its info. Raises CorruptFileError if a byte is wrong."""

        def verify() -> TrajectoryInfo:
            opened = _open_expert(self.expert_file(expert), self.key, expert)
            opened.sealed.verify()
            return opened.info

        return reading_again(self.expert_file(expert), verify)

    def verify_other(self, name: str) -> None:
        """Check every byte of the file `name`, one of `other_files`. Raises CorruptFileError if a byte is wrong."""
        read_tensors(self.location / name, kind=name.removesuffix(".arrow").partition("-")[0])

    def write_transform(
        self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, object], twin: Location | None = None
    ) -> bool:
        """Store the normalisation of the experts' images, unless one is stored. Returns True if this call stored it.

        Args:
            arrays: arrays of the transform, as `Transform.to_arrays` returns them.
            metadata: its metadata, as `Transform.to_metadata` returns it.
            twin: file that holds the same transform; `None` without one. If both lie on one local disk, a hard link to
                `twin` is made, which takes no space.
        """
        place = self.transform_file
        try:
            if twin is None or not place.link(twin):
                write_tensors(place, arrays, kind=TRANSFORM_KIND, metadata=metadata, replace=False)
        except AlreadyExistsError:
            return False
        return True

    @property
    def transform_file(self) -> Location:
        """File of the transform that normalises the experts' images; the file may be missing."""
        return self.location / _TRANSFORM_FILE

    def difficulty_file(self, experts: int) -> Location:
        """File of the training images' difficulty scores by the first `experts` experts; the file may be missing."""
        return self.location / f"difficulty-{experts:05d}.arrow"

    def has_transform(self) -> bool:
        """True if the transform that normalises the experts' images is stored."""
        return self.transform_file.exists()

    def read_transform(self) -> TensorFile:
        """Read the transform of the experts' images. Raises StoreError if missing, CorruptFileError if damaged."""
        return read_tensors(self.transform_file, kind=TRANSFORM_KIND)

    def expert_file(self, expert: int) -> Location:
        """File of an expert, which may be missing. Raises ValueError unless `expert` is from 0 to 99999."""
        if not 0 <= expert <= _MAX_EXPERT:
            raise ValueError(f"experts are numbered from 0 to {_MAX_EXPERT}, not {expert}")
        return self.location / f"expert-{expert:05d}.arrow"

    def _open(self, expert: int) -> _OpenedExpert:
        """Open the file of an expert. The object is kept, because a stored expert never changes until it is deleted."""
        if expert not in self._opened:
            file = self.expert_file(expert)
            self._opened[expert] = reading_again(file, lambda: _open_expert(file, self.key, expert))
        return self._opened[expert]

    def _read(self, expert: int, epochs: Sequence[int]) -> list[Snapshot]:
        return reading_again(
            self.expert_file(expert),
            lambda: self._open(expert).snapshots(epochs),
            forget=lambda: self._opened.pop(expert, None),
        )


@dataclass(frozen=True)
class _OpenedExpert:
    """File of an expert whose end, which lists the snapshots, was read and checked. No file is held open."""

    sealed: SealedFile
    info: TrajectoryInfo
    progress: StoredEpochs

    def snapshots(self, epochs: Sequence[int]) -> list[Snapshot]:
        location = self.sealed.location
        missing = set(epochs) - set(self.info.epochs)
        if missing:
            raise StoreError(
                f"{location.uri} has no epoch {min(missing)}; it has {epochs_in_words(self.info.epochs)}",
                cause="experts.keep_epochs and experts.epochs decide which epochs are stored",
                remedy="Match stored epochs, or train experts again with other values",
            )
        numbers = [self.info.epochs.index(epoch) for epoch in epochs]
        batches = self.sealed.batches(numbers, cache=configured_cache())
        with rejecting_nonsense(location):
            snapshots = [_snapshot(batch, self.info) for batch in batches]
        if [snapshot.epoch for snapshot in snapshots] != list(epochs):
            raise damaged(location, "Its batches are not in the order it announces")
        return snapshots


def _open_expert(location: Location, key: GroupKey, expert: int) -> _OpenedExpert:
    sealed = open_sealed(location, format_name=FORMAT, format_version=FORMAT_VERSION)
    with rejecting_nonsense(location):
        info = _info_from_json(sealed.header["info"])
        if (info.key, info.expert) != (key, expert):
            raise CorruptFileError(
                f"{location.uri} holds expert {info.expert} of {info.key}",
                "It was renamed or copied from another group",
                "Put it back where it belongs",
            )
        measured = (np.array(sealed.summary[name], np.float32) for name in ("train_loss", "test_accuracy"))
        progress = StoredEpochs(info.epochs, *measured)
        shapes = {(sealed.n_batches,), progress.train_loss.shape, progress.test_accuracy.shape}
        if shapes != {(len(info.epochs),)} or not sealed.schema.equals(_schema(info)):
            raise damaged(location, "Its batches are not those it announces")
    return _OpenedExpert(sealed, info, progress)


def _write(location: Location, file: BinaryIO, snapshots: Iterable[Snapshot], info: TrajectoryInfo) -> None:
    if list(info.epochs) != sorted(set(info.epochs)):
        raise ValueError(f"the epochs are not in ascending order: {list(info.epochs)}")
    schema = _schema(info)
    header = {"info": json.dumps(asdict(info), sort_keys=True)}
    summary: dict[str, list[float]] = {"train_loss": [], "test_accuracy": []}
    writer = SealedWriter(file, schema, format_name=FORMAT, format_version=FORMAT_VERSION, header=header)
    written: list[int] = []
    for snapshot in snapshots:
        batch = _batch(snapshot, schema, info.storage)
        # Not around the whole loop: `snapshots` may run the training, whose errors are no errors of the store.
        with location.explaining("write"):
            writer.write(batch)
        written.append(snapshot.epoch)
        for name, values in summary.items():
            values.append(float(np.float32(getattr(snapshot, name))))
    if tuple(written) != info.epochs:
        raise ValueError(f"{epochs_in_words(written)} given, {epochs_in_words(info.epochs)} announced")
    with location.explaining("write"):
        writer.close(summary)


def _schema(info: TrajectoryInfo) -> pa.Schema:
    columns = [
        ("epoch", pa.int32()),
        ("step", pa.int64()),
        ("train_loss", pa.float32()),
        ("test_accuracy", pa.float32()),
        ("params", pa.list_(storage_type(info.storage), info.parameter_count)),
    ]
    if info.format_version > 1:
        columns.append(("buffers", pa.list_(pa.float32(), info.buffer_count)))
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def _batch(snapshot: Snapshot, schema: pa.Schema, storage: str) -> pa.RecordBatch:
    params = _checked("parameters", snapshot.params, schema.field("params").type.list_size)
    buffers = _checked("buffers", snapshot.buffers, schema.field("buffers").type.list_size)
    columns = [pa.array([getattr(snapshot, name)], schema.field(name).type) for name in _SCALARS]
    columns.append(_vector(to_storage(params, storage), schema.field("params").type))
    columns.append(_vector(buffers, schema.field("buffers").type))
    return pa.record_batch(columns, schema=schema)


def _checked(name: str, vector: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    if vector.shape != (length,) or vector.dtype != np.float32:
        raise ValueError(f"the {name} are {vector.dtype} {list(vector.shape)} instead of float32 [{length}]")
    return vector


def _vector(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    """Arrow array whose only entry is the vector `values` of type `kind`, made without copying the values."""
    return pa.Array.from_buffers(kind, 1, [None], children=[pa.array(values, kind.value_type)])


def _snapshot(batch: pa.RecordBatch, info: TrajectoryInfo) -> Snapshot:
    scalars = {name: batch.column(name)[0].as_py() for name in _SCALARS}
    params = from_storage(batch.column("params").flatten().to_numpy(), info.storage)
    if info.format_version == 1:
        return Snapshot(**scalars, params=params)
    return Snapshot(**scalars, params=params, buffers=batch.column("buffers").flatten().to_numpy().copy())


def _info_from_json(text: str) -> TrajectoryInfo:
    """Restore an info from its fields as JSON, with lists as tuples. Other text raises TypeError or ValueError."""
    fields = json.loads(text)
    for name in ("parameter_names", "buffer_names", "epochs"):
        fields[name] = tuple(fields.get(name, ()))
    for name in ("parameter_shapes", "buffer_shapes"):
        fields[name] = tuple(tuple(shape) for shape in fields.get(name, ()))
    info = TrajectoryInfo(**fields)
    texts = (info.dataset, info.dataset_fingerprint, info.architecture, info.fingerprint, info.storage)
    sizes = [size for shape in (*info.parameter_shapes, *info.buffer_shapes) for size in shape]
    if not all(isinstance(text, str) for text in (*texts, *info.parameter_names, *info.buffer_names)):
        raise TypeError("a name is no text")
    if not all(type(number) is int for number in (info.seed, info.expert, info.format_version, *info.epochs, *sizes)):
        raise TypeError("a number is not whole")
    if min(sizes, default=0) < 0 or list(info.epochs) != sorted(set(info.epochs)):
        raise ValueError("a size is negative, or the epochs are not in order")
    if not isinstance(info.recipe, dict):
        raise TypeError("the recipe is no mapping")
    return info


def _is_safe(key: GroupKey) -> bool:
    return all(_SAFE_NAME.fullmatch(name) for name in (key.dataset, key.architecture, key.fingerprint))


def epochs_in_words(epochs: Sequence[int]) -> str:
    """Text for ascending epochs, such as "epochs 0-10, 40": consecutive epochs form one range. Long texts are cut."""
    stretches: list[list[int]] = []
    for epoch in epochs:
        if stretches and epoch == stretches[-1][-1] + 1:
            stretches[-1] = [stretches[-1][0], epoch]
        else:
            stretches.append([epoch])
    words = ["-".join(map(str, stretch)) for stretch in stretches]
    if len(words) > _MAX_STRETCHES:
        words = [*words[: _MAX_STRETCHES - 2], "...", words[-1]]
    return f"epochs {', '.join(words)}" if epochs else "no epochs"
