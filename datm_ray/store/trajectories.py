"""Expert trajectories: every stored epoch's parameters of the networks trained on the real data.

One expert is one sealed Arrow file (see `sealed`), with one record batch per snapshot, so that matching reads
the two epochs it needs and nothing else:

    <uri>/<dataset>/<architecture>/<recipe fingerprint>/expert-00017.arrow
    columns: epoch int32 | step int64 | train_loss f32 | test_accuracy f32 | params fixed_size_list<f32>[p]
    schema metadata "info": everything in `TrajectoryInfo`, as JSON

Beside the experts lies `transform.arrow`, the tensor file of the transform their data went through. An expert
is written once, whole, and never changed. How experts are trained, and which epochs are matched, is not known
here. Letters: p = number of parameters of the network.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datm_ray.errors import CorruptFileError, DatmError, StoreError
from datm_ray.store.filesystem import AlreadyExistsError, Location, open_location
from datm_ray.store.sealed import SealedFile, SealedWriter, damaged, open_sealed, rejecting_nonsense
from datm_ray.store.tensors import TensorFile, read_tensors, write_tensors

FORMAT = "datm_ray.trajectory"
FORMAT_VERSION = 1
TRANSFORM_KIND = "transform"

_EXPERT_FILE = re.compile(r"expert-(\d{5})\.arrow")
_TRANSFORM_FILE = "transform.arrow"
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
_MAX_EXPERT = 99_999


@dataclass(frozen=True)
class Snapshot:
    """The state of one expert after one epoch."""

    epoch: int
    """0 is the initialisation."""

    step: int
    """SGD steps taken so far."""

    train_loss: float
    """Mean over the epoch's samples; nan where not measured."""

    test_accuracy: float
    """Share of the test set, 0 to 1; nan where not measured."""

    params: NDArray[np.float32]
    """All parameters as one vector [p]."""


@dataclass(frozen=True)
class TrajectoryInfo:
    """Where an expert comes from and what its vectors mean."""

    dataset: str
    dataset_fingerprint: str
    """Digest of the data and its transform; experts of different fingerprints do not belong together."""

    architecture: str
    recipe: dict[str, Any]
    """The expert recipe, JSON-able; tuples come back as lists."""

    fingerprint: str
    """Digest of the recipe; the name of the group's folder."""

    seed: int
    expert: int
    """Number of the expert, from 0."""

    parameter_names: tuple[str, ...]
    parameter_shapes: tuple[tuple[int, ...], ...]
    """Of the network's parameters, in the order in which they follow one another in the flat vector."""

    epochs: tuple[int, ...]
    """The epochs stored, ascending."""

    format_version: int = FORMAT_VERSION

    @property
    def parameter_count(self) -> int:
        """p, the length of the flat vector."""
        return sum(math.prod(shape) for shape in self.parameter_shapes)

    @property
    def key(self) -> GroupKey:
        """The group the expert belongs to."""
        return GroupKey(self.dataset, self.architecture, self.fingerprint)


@dataclass(frozen=True, order=True)
class GroupKey:
    """Names one set of interchangeable experts."""

    dataset: str
    architecture: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.dataset}/{self.architecture}/{self.fingerprint}"


class Progress(NamedTuple):
    """How the training of one expert went; all three of the same length."""

    epochs: tuple[int, ...]
    train_loss: NDArray[np.float32]
    test_accuracy: NDArray[np.float32]


class TrajectoryStore:
    """All groups of experts under one URI. Nothing is read or written until asked for."""

    def __init__(self, uri: str) -> None:
        """`uri` is a local path, or a file://, memory:// or s3:// URI; it need not exist yet."""
        self.location = open_location(uri)

    def groups(self) -> list[GroupKey]:
        """The groups that have at least one expert, sorted."""
        keys = [
            GroupKey(dataset, architecture, fingerprint)
            for dataset in self.location.list()
            for architecture in (self.location / dataset).list()
            for fingerprint in (self.location / dataset / architecture).list()
        ]
        return [key for key in keys if _is_safe(key) and ExpertGroup(self.location, key).experts()]

    def group(self, dataset: str, architecture: str, fingerprint: str) -> ExpertGroup:
        """The group of this name, which may be empty. Raises StoreError if a name is no name for a folder."""
        return ExpertGroup(self.location, GroupKey(dataset, architecture, fingerprint))


class ExpertGroup:
    """The experts of one recipe, in one folder. Picklable; keeps the footers it has read, no open file."""

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
        """Numbers of the committed experts, sorted. Experts being written are not among them."""
        matches = (_EXPERT_FILE.fullmatch(name) for name in self.location.list())
        return [int(match[1]) for match in matches if match]

    def write_expert(self, expert: int, snapshots: Iterable[Snapshot], info: TrajectoryInfo) -> bool:
        """Store one expert, atomically and once; whether this call stored it.

        Where the expert is there already, by another writer, it stays and False is returned: at once and
        without taking a single snapshot if it was there from the start, after the last one if it came
        meanwhile. Snapshots are taken one at a time, in the order of `info.epochs`, and written at once to a
        local disk; elsewhere they are kept in memory until the upload. If `snapshots` raises, nothing is
        stored.

        Raises:
            ValueError: the snapshots are not those that `info` announces, or `info` is not of this expert.
            StoreError: the place cannot be written.
        """
        if (info.key, info.expert) != (self.key, expert):
            raise ValueError(f"the info of expert {info.expert} of {info.key} given for expert {expert} of {self.key}")
        file_location = self._file(expert)
        if file_location.exists():
            return False
        self.location.remove_leftovers()
        try:
            with file_location.create(replace=False) as file:
                _write(file_location, file, snapshots, info)
        except AlreadyExistsError:
            return False
        self._opened.pop(expert, None)
        return True

    def read_info(self, expert: int) -> TrajectoryInfo:
        """What is known about the expert, without its parameters.

        Raises (as all that reads):
            StoreError: the expert is not there.
            CorruptFileError: its file is damaged, of a newer format or of another expert.
        """
        return self._open(expert).info

    def read_params(self, expert: int, epochs: Sequence[int]) -> list[NDArray[np.float32]]:
        """The parameters [p] after each of these epochs, exactly as written; the caller owns them.

        Only the batches of these epochs are read, each checked against its digest.

        Raises (besides):
            StoreError: an epoch is not stored.
        """
        return [snapshot.params for snapshot in self._read(expert, epochs)]

    def read_snapshot(self, expert: int, epoch: int) -> Snapshot:
        """Parameters and measurements after one epoch; cost and errors as `read_params`."""
        return self._read(expert, [epoch])[0]

    def read_progress(self, expert: int) -> Progress:
        """Loss and accuracy after each stored epoch, from the end of the file alone."""
        return self._open(expert).progress

    def verify(self, expert: int) -> TrajectoryInfo:
        """Check every byte of the file, read afresh, and return its info. Raises CorruptFileError."""
        opened = _open_expert(self._file(expert), self.key, expert)
        opened.sealed.verify()
        return opened.info

    def write_transform(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, object]) -> bool:
        """Store the transform of the experts' data, once; False if there is one already, which stays."""
        try:
            write_tensors(
                self.location / _TRANSFORM_FILE, arrays, kind=TRANSFORM_KIND, metadata=metadata, replace=False
            )
        except AlreadyExistsError:
            return False
        return True

    def has_transform(self) -> bool:
        """Whether the transform of the experts' data is stored."""
        return (self.location / _TRANSFORM_FILE).exists()

    def read_transform(self) -> TensorFile:
        """The stored transform. Raises StoreError if there is none, CorruptFileError if it is damaged."""
        return read_tensors(self.location / _TRANSFORM_FILE, kind=TRANSFORM_KIND)

    def _file(self, expert: int) -> Location:
        if not 0 <= expert <= _MAX_EXPERT:
            raise ValueError(f"experts are numbered from 0 to {_MAX_EXPERT}, not {expert}")
        return self.location / f"expert-{expert:05d}.arrow"

    def _open(self, expert: int) -> _OpenedExpert:
        """The expert's footer, read once: a committed file does not change."""
        if expert not in self._opened:
            self._opened[expert] = _open_expert(self._file(expert), self.key, expert)
        return self._opened[expert]

    def _read(self, expert: int, epochs: Sequence[int]) -> list[Snapshot]:
        opened = self._open(expert)
        try:
            return opened.snapshots(epochs)
        except DatmError:
            # The file may have been deleted and written anew: let the next call look again.
            self._opened.pop(expert, None)
            raise


@dataclass(frozen=True)
class _OpenedExpert:
    """What the end of an expert's file tells."""

    sealed: SealedFile
    info: TrajectoryInfo
    progress: Progress

    def snapshots(self, epochs: Sequence[int]) -> list[Snapshot]:
        location = self.sealed.location
        missing = set(epochs) - set(self.info.epochs)
        if missing:
            raise StoreError(
                f"{location.uri} has no epoch {min(missing)}; it has {_in_words(self.info.epochs)}",
                remedy="Match earlier epochs, or train the experts for longer",
            )
        batches = self.sealed.batches([self.info.epochs.index(epoch) for epoch in epochs])
        with rejecting_nonsense(location):
            snapshots = [_snapshot(batch) for batch in batches]
        if [snapshot.epoch for snapshot in snapshots] != list(epochs):
            raise damaged(location, "Its batches are not in the order it announces")
        return snapshots


def _open_expert(location: Location, key: GroupKey, expert: int) -> _OpenedExpert:
    sealed = open_sealed(location, format_name=FORMAT, format_version=FORMAT_VERSION)
    with rejecting_nonsense(location):
        info = _info_from_json(sealed.header["info"])
        measured = (np.array(sealed.summary[name], np.float32) for name in ("train_loss", "test_accuracy"))
        progress = Progress(info.epochs, *measured)
    if (info.key, info.expert) != (key, expert):
        raise CorruptFileError(
            f"{location.uri} holds expert {info.expert} of {info.key}",
            "It was renamed or copied from another group",
            "Put it back where it belongs",
        )
    if sealed.n_batches != len(info.epochs) or not sealed.schema.equals(_schema(info)):
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
        batch = _batch(snapshot, schema)
        # Not around the whole loop: errors of the training behind `snapshots` are not errors of the store.
        with location.explaining("write"):
            writer.write(batch)
        written.append(snapshot.epoch)
        for name, values in summary.items():
            values.append(float(np.float32(getattr(snapshot, name))))
    if tuple(written) != info.epochs:
        raise ValueError(f"{_in_words(written)} given, {_in_words(info.epochs)} announced")
    with location.explaining("write"):
        writer.close(summary)


def _schema(info: TrajectoryInfo) -> pa.Schema:
    columns = [
        ("epoch", pa.int32()),
        ("step", pa.int64()),
        ("train_loss", pa.float32()),
        ("test_accuracy", pa.float32()),
        ("params", pa.list_(pa.float32(), info.parameter_count)),
    ]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])


def _batch(snapshot: Snapshot, schema: pa.Schema) -> pa.RecordBatch:
    kind = schema.field("params").type
    if snapshot.params.shape != (kind.list_size,) or snapshot.params.dtype != np.float32:
        raise ValueError(
            f"the parameters are {snapshot.params.dtype} {list(snapshot.params.shape)} "
            f"instead of float32 [{kind.list_size}]"
        )
    params = pa.FixedSizeListArray.from_arrays(pa.array(snapshot.params), type=kind)
    scalars = [pa.array([getattr(snapshot, column.name)], column.type) for column in schema if column.name != "params"]
    return pa.record_batch([*scalars, params], schema=schema)


def _snapshot(batch: pa.RecordBatch) -> Snapshot:
    scalars = {name: batch.column(name)[0].as_py() for name in ("epoch", "step", "train_loss", "test_accuracy")}
    return Snapshot(**scalars, params=batch.column("params").flatten().to_numpy().copy())


def _info_from_json(text: str) -> TrajectoryInfo:
    """The inverse of `json.dumps(asdict(info))`: JSON has no tuples."""
    fields = json.loads(text)
    fields["parameter_names"] = tuple(fields["parameter_names"])
    fields["parameter_shapes"] = tuple(tuple(shape) for shape in fields["parameter_shapes"])
    fields["epochs"] = tuple(fields["epochs"])
    return TrajectoryInfo(**fields)


def _is_safe(key: GroupKey) -> bool:
    return all(_SAFE_NAME.fullmatch(name) for name in (key.dataset, key.architecture, key.fingerprint))


def _in_words(epochs: Sequence[int]) -> str:
    if not epochs:
        return "no epochs"
    return f"{len(epochs)} epochs from {min(epochs)} to {max(epochs)}"
