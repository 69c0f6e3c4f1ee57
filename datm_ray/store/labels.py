"""Labels of a synthetic set: for every epoch and image, a view of the image and the teacher's logits for that view.

    <uri>/labels.arrow         origin and settings of the labels, see `LabelInfo`
    <uri>/epoch-00007.arrow    one record for each image in epoch 7

An epoch is one sealed Arrow file (see `sealed`). Its record batches are blocks of consecutive images, each of about 64
KiB. A block is the smallest unit that is read and checked: with one digest per image, the digests would be as large as
the labels. A batch has one row. Each of its columns holds one list, the values of all records of the block in order:

    boxes float32 x 4 | flips bool | partners int32 | lambdas float32 | mix_boxes uint16 x 4
    | values float16 x k, or x (t + 1) | indices uint16 x t, or none

An epoch is written once, whole, by any worker, and never changes. Its content does not depend on how many epochs are
stored or trained. So a store can grow, and a training can use the first epochs of a larger store alone.
core/training/labelling.py defines the views and how logits are packed. Letters: b = number of records, k = number of
classes, t = number of classes whose logits are kept.
"""

from __future__ import annotations

import json
import math
import os
import re
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datm_ray.errors import CorruptFileError, StoreError
from datm_ray.store.cache import configured_cache
from datm_ray.store.files.filesystem import AlreadyExistsError, Location, MissingFileError, open_location
from datm_ray.store.sealed import (
    SealedFile,
    SealedWriter,
    damaged,
    open_sealed,
    reading_again,
    rejecting_nonsense,
    require_known,
)
from datm_ray.store.tensors import read_tensors, write_tensors
from datm_ray.store.trajectories import epochs_in_words

FORMAT = "datm_ray.labels"
FORMAT_VERSION = 1
INFO_KIND = "labels"
INFO_FILE = "labels.arrow"
BLOCK_BYTES = 64 * 1024
"""Largest total size in bytes, inclusive, of the records in a block; a record above it has a block of its own."""
MEMORY = 2**28
"""Default limit on the blocks that a `LabelStore` keeps in memory, in bytes."""

_EPOCH_FILE = re.compile(r"epoch-(\d{5})\.arrow")
_MAX_EPOCH = 99_999
_OPENED = 2  # opened epochs that are kept: the current one of a training, and the next
_FETCHED = 256  # blocks fetched at a time, 16 MiB
_COLUMNS: dict[str, tuple[type[np.generic], pa.DataType]] = {
    "boxes": (np.float32, pa.float32()),
    "flips": (np.bool_, pa.bool_()),
    "partners": (np.int32, pa.int32()),
    "lambdas": (np.float32, pa.float32()),
    "mix_boxes": (np.uint16, pa.uint16()),
    "values": (np.float16, pa.float16()),
    "indices": (np.uint16, pa.uint16()),
}
_VIEW_WIDTHS = {"boxes": 4, "flips": 1, "partners": 1, "lambdas": 1, "mix_boxes": 4}
_SCHEMA = pa.schema(
    [
        pa.field(name, pa.list_(pa.field("item", kind, nullable=False)), nullable=False)
        for name, (_, kind) in _COLUMNS.items()
    ]
)


@dataclass(frozen=True)
class LabelInfo:
    """Origin and settings of a store's labels: images, teacher and views. Raises ValueError for impossible numbers."""

    set_fingerprint: str
    """Digest of the synthetic images. The labels are valid for these images only."""

    teacher_fingerprint: str
    """Digest of everything that determines the teacher's logits."""

    images: int
    """Number of images in the set."""

    classes: int
    """Number k of classes, so that the teacher gives k logits for each image."""

    size: tuple[int, int]
    """Height and width in pixels, of the images and of their views."""

    epochs: int
    """Number of epochs of the longest training on the set for which the store was made."""

    keep: int
    """Number of epochs to label and store, from 1 to `epochs`. A longer training repeats their labels in order."""

    seed: int
    """Seed of the random views."""

    top: int | None = None
    """Number t of the largest logits that are stored for each view; `None` stores all k."""

    temperature: float = 1.0
    """Softmax temperature at which the `top` stored logits give exact probabilities; no effect if `top` is `None`."""

    augmentation: Mapping[str, float] = field(default_factory=dict)
    """Settings of the random views (crop, mirroring and CutMix), by name."""

    def __post_init__(self) -> None:
        if min(self.images, self.classes, *self.size) < 1 or not 1 <= self.keep <= self.epochs:
            raise ValueError(f"{self.images} images, {self.classes} classes, {self.keep} of {self.epochs} epochs")
        if max(self.size) >= 2**16 or self.images >= 2**31 or self.keep > _MAX_EPOCH + 1:
            raise ValueError(f"{self.images} images of {self.size} pixels or {self.keep} epochs are too many")
        if self.top is not None and not 1 <= self.top < self.classes <= 2**16:
            raise ValueError(f"the {self.top} largest of {self.classes} logits cannot be kept")

    def to_json(self) -> dict[str, Any]:
        """All fields as plain data for JSON."""
        return {**asdict(replace(self, augmentation=dict(self.augmentation))), "size": [*self.size]}

    @property
    def origin(self) -> dict[str, Any]:
        """Fields that decide what an epoch's labels are, as plain data: all but `epochs` and `keep`."""
        return {name: value for name, value in self.to_json().items() if name not in ("epochs", "keep")}

    def pool_epoch(self, epoch: int) -> int:
        """Number of the stored epoch whose labels epoch `epoch` of a training uses: `epoch` modulo `keep`, from 0."""
        return epoch % self.keep

    @property
    def widths(self) -> dict[str, int]:
        """Column name -> number of its values in one record, which is one view and its logits."""
        top = self.top or 0
        values = self.classes if self.top is None else top + 1
        return {**_VIEW_WIDTHS, "values": values, "indices": top}

    @property
    def record_bits(self) -> int:
        """Size in bits of one record: the kept logits of one view, and the view's crop, flip and mixture."""
        return sum(width * _COLUMNS[name][1].bit_width for name, width in self.widths.items())

    @property
    def planned_bytes(self) -> int:
        """Total bytes of the records of all `keep` epochs. The files are 2 to 3 % larger, small files more."""
        return math.ceil(self.keep * self.images * self.record_bits / 8)


@dataclass(frozen=True, eq=False)
class LabelRecords:
    """Labels of b images in one epoch: for each image a view of it, and the teacher's logits for that view."""

    boxes: NDArray[np.float32]
    """Crop [b 4] of each image for its view: top, left, height and width as shares of the image's sides."""

    flips: NDArray[np.bool_]
    """[b], True for views that are mirrored left and right."""

    partners: NDArray[np.int32]
    """Index [b], in the set, of each view's partner: the image that CutMix pastes a rectangle from, into the view."""

    lambdas: NDArray[np.float32]
    """Share [b] of each view's area that shows its own image, not its partner, in [0, 1]."""

    mix_boxes: NDArray[np.uint16]
    """Rectangle [b 4] of each view that shows the partner image: top, left, height and width in pixels."""

    values: NDArray[np.float16]
    """Teacher's logits [b k] of all classes. With `LabelInfo.top`: [b t+1], the t largest in descending order, then one
    that stands for each of the other classes."""

    indices: NDArray[np.uint16]
    """Classes [b t] of the t largest logits of each view; [b 0] if all logits are stored."""

    def __len__(self) -> int:
        return len(self.flips)

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in _COLUMNS)

    def take(self, places: slice | NDArray[np.int64]) -> LabelRecords:
        """Select the records at these positions, counted from 0."""
        return LabelRecords(**{name: getattr(self, name)[places] for name in _COLUMNS})

    def require(self, info: LabelInfo) -> None:
        """Raise ValueError if shapes, types or ranges do not agree with `info`."""
        for name, width in info.widths.items():
            array, shape = getattr(self, name), _shape(name, len(self), width)
            if array.shape != shape or array.dtype != _COLUMNS[name][0]:
                expected = f"{np.dtype(_COLUMNS[name][0])} {list(shape)}"
                raise ValueError(f"{name} are {array.dtype} {list(array.shape)} instead of {expected}")
        for name, is_sound in self._ranges(info).items():
            if not is_sound:
                raise ValueError(f"{name} are outside of their range")

    def _ranges(self, info: LabelInfo) -> dict[str, bool]:
        far = self.mix_boxes[:, :2].astype(np.int64) + self.mix_boxes[:, 2:]
        return {
            "boxes": bool(((self.boxes >= 0) & (self.boxes <= 1)).all()),
            "partners": bool(((self.partners >= 0) & (self.partners < info.images)).all()),
            "lambdas": bool(((self.lambdas >= 0) & (self.lambdas <= 1)).all()),
            "mix_boxes": bool((far <= np.array(info.size)).all()),
            "values": bool(np.isfinite(self.values).all()),
            "indices": bool((self.indices < info.classes).all()),
        }


class LabelStore:
    """Folder with one teacher's labels for one synthetic set. Picklable, usable after a fork; opening reads nothing."""

    def __init__(self, place: str | Location, *, keep: int | None = None, memory: int = MEMORY) -> None:
        """Open the store in a folder, which need not exist.

        Args:
            place: local path, or a file://, memory:// or s3:// URI, or a `Location`, whose `guard` is called before
                each file that is written.
            keep: number of epochs to use, the first ones, as if the store had no others; `None` uses all.
            memory: limit in bytes on the blocks kept in memory for later reads. Blocks of local files are mapped, so
                they lie mostly in the page cache.
        """
        self._place = open_location(place) if isinstance(place, str) else place
        self._keep, self._memory = keep, memory
        self._forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(LabelStore, keep=self._keep, memory=self._memory), (self._place,)

    @classmethod
    def create(cls, place: str | Location, info: LabelInfo) -> LabelStore:
        """Open the store for labels as `info` describes them, and create it if it is missing.

        Several workers may call this at the same time. If the store was made with a smaller `keep` or `epochs` than
        `info` has, the larger number is stored, and the labels stay. If the store has more epochs, only the first
        `info.keep` epochs are used.

        Raises:
            StoreError: the folder holds labels of other images, of another teacher or with other settings.
        """
        store = cls(place, keep=info.keep)
        if not (store.location / INFO_FILE).exists():
            with suppress(AlreadyExistsError):  # another worker was faster
                store._write_info(info, replace=False)
        found = store._read_info()
        store._require(info, found)
        grown = replace(found, epochs=max(info.epochs, found.epochs), keep=max(info.keep, found.keep))
        if grown != found:
            # If two commands with different numbers do this at once, the smaller numbers may be stored. No stored
            # epoch is lost, and the next command that needs the larger numbers writes them again.
            store._write_info(grown, replace=True)
        store.info = replace(grown, keep=info.keep)  # saves the property `info` from reading it again
        return store

    def _write_info(self, info: LabelInfo, *, replace: bool) -> None:
        metadata = {"version": FORMAT_VERSION, "info": info.to_json()}
        write_tensors(self.location / INFO_FILE, {}, kind=INFO_KIND, metadata=metadata, replace=replace)

    def _require(self, info: LabelInfo, found: LabelInfo) -> None:
        ours, theirs = info.origin, found.origin
        differing = [
            f"{name} {theirs[name]!r} instead of {ours[name]!r}" for name in ours if ours[name] != theirs[name]
        ]
        if differing:
            raise StoreError(
                f"{self.location.uri} holds other labels: {', '.join(differing)}",
                "they were made with other settings, images or another teacher",
                "Give another folder, or remove this one",
            )

    @property
    def location(self) -> Location:
        """Folder of the store, with a connection that belongs to this process."""
        if self._process != os.getpid():  # a fork inherits connections that it must not use
            self._place = replace(open_location(self._place.uri), guard=self._place.guard)
            self._forget()
        return self._place

    def _forget(self) -> None:
        """Drop all opened epochs and blocks. After a fork, they may hold connections of the parent process."""
        self._process = os.getpid()
        store = weakref.proxy(self)  # a cycle would keep the blocks in memory until a garbage collection
        self._open = lru_cache(_OPENED)(lambda epoch: _open_epoch(store._file(epoch), store.info, epoch))
        self._blocks = _RecentBlocks(self._memory)

    @cached_property
    def info(self) -> LabelInfo:
        """Origin and settings of the labels. `keep` is the number of epochs that this object uses.

        Raises:
            StoreError: the folder holds no labels, or the store is for fewer epochs than this object should use.
            CorruptFileError: the file `labels.arrow` is damaged or of a newer version.
        """
        found = self._read_info()
        if self._keep is None:
            return found
        if not 1 <= self._keep <= found.keep:
            raise StoreError(
                f"{self.location.uri} is for labels of {found.keep} epochs, and {self._keep} are to be used",
                "fewer epochs were labelled than this training repeats",
                f"Use at most {found.keep}, or label the epochs that are missing",
            )
        return replace(found, keep=self._keep)

    def _read_info(self) -> LabelInfo:
        file = self.location / INFO_FILE
        metadata = read_tensors(file, kind=INFO_KIND).metadata
        with rejecting_nonsense(file):
            require_known(file, int(metadata["version"]), FORMAT_VERSION)
            return _info_from_json(metadata["info"])

    def epochs(self) -> list[int]:
        """Numbers of the stored epochs, sorted, including epochs beyond `info.keep`. Unfinished epochs are left out."""
        matches = (_EPOCH_FILE.fullmatch(name) for name in self.location.list())
        return [int(match[1]) for match in matches if match]

    def holds(self, epoch: int) -> bool:
        """True if an epoch is stored. Raises ValueError unless `epoch` is from 0 to `info.keep` - 1, inclusive."""
        return self._file(epoch).exists()

    def missing(self) -> list[int]:
        """Numbers of the epochs below `info.keep` that are not stored yet, sorted."""
        return sorted(set(range(self.info.keep)) - set(self.epochs()))

    @property
    def nbytes(self) -> int:
        """Bytes of all files in the store now. If the store was opened with `keep`, later epochs are not counted."""
        sizes = self.location.sizes()
        epochs = {name: int(match[1]) for name in sizes if (match := _EPOCH_FILE.fullmatch(name))}
        used = [name for name, epoch in epochs.items() if self._keep is None or epoch < self._keep]
        return sum(sizes[name] for name in used) + sizes.get(INFO_FILE, 0)

    def write_epoch(self, epoch: int, records: Iterable[LabelRecords]) -> bool:
        """Store the labels of one epoch atomically; never replace stored ones. Returns True if this call stored them.

        Returns False if the epoch is stored already. If it was stored before the call, `records` is not read. Records
        are written as they arrive, so memory holds no more than one block and one element of `records`.

        Args:
            epoch: from 0 to `info.keep` - 1, inclusive.
            records: groups of any number of records; together one record for each image, in the order of the images.

        Raises:
            ValueError: the records do not agree with `info`, or `epoch` is out of range.
            StoreError: the file cannot be written, or a logit cannot be stored as float16.
        """
        place = self._file(epoch)
        return place.write_once(lambda file: _write(place, file, records, self.info, epoch))

    def read(self, epoch: int, images: Sequence[int] | NDArray[np.int64]) -> LabelRecords:
        """Read the labels of some images in a stored epoch, in the order of `images`; the caller may change the arrays.

        Only the blocks of these images are read, and each is checked against its digest. Blocks in memory are not read
        again.

        Raises:
            IndexError: an image is not in the set.
            ValueError: `epoch` is not from 0 to `info.keep` - 1.
            StoreError: the epoch is not stored.
            CorruptFileError: the file is damaged, or belongs to other labels.
        """
        chosen = np.asarray(images, np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < self.info.images:
            raise IndexError(f"the set has images 0 to {self.info.images - 1}")
        try:
            return reading_again(self._file(epoch), lambda: self._gathered(epoch, chosen), forget=self._forget)
        except MissingFileError as error:
            raise StoreError(
                f"{self.location.uri} has no labels of epoch {epoch}; it has {epochs_in_words(self.epochs())}",
                f"{self.info.keep} epochs are to be labelled, and the labelling has not finished",
                "Label the epochs that are missing",
            ) from error

    def verify(self, epoch: int) -> None:
        """Check all bytes and records of a stored epoch. Raises CorruptFileError, or StoreError if it is not stored."""

        def verify() -> None:
            opened = _open_epoch(self._file(epoch), self.info, epoch)
            opened.sealed.verify()
            for block in range(opened.sealed.n_batches):
                opened.blocks([block], self.info)

        reading_again(self._file(epoch), verify)

    def _gathered(self, epoch: int, images: NDArray[np.int64]) -> LabelRecords:
        found: LabelRecords | None = None
        blocks, places = np.divmod(images, self._open(epoch).block)
        order = np.argsort(blocks, kind="stable")
        needed, firsts = np.unique(blocks[order], return_index=True)
        rows = np.split(order, firsts[1:])  # rows of the result, for each block
        for first in range(0, len(needed), _FETCHED):
            group = slice(first, first + _FETCHED)
            read = self._read_blocks(epoch, needed[group].tolist())
            found = found or _empty(len(images), self.info)  # now that the blocks prove the sizes in `info`
            for own, block in zip(rows[group], read, strict=True):
                for name in _COLUMNS:
                    getattr(found, name)[own] = getattr(block, name)[places[own]]
        return found or _empty(0, self.info)

    def _read_blocks(self, epoch: int, numbers: Sequence[int]) -> list[LabelRecords]:
        """Blocks (consecutive records) of an epoch, by number. Blocks that are not in memory are fetched together."""
        kept = {number: self._blocks.get((epoch, number)) for number in numbers}
        found = {number: block for number, block in kept.items() if block is not None}
        absent = [number for number in numbers if number not in found]
        for number, block in zip(absent, self._open(epoch).blocks(absent, self.info), strict=True):
            found[number] = block
            self._blocks.put((epoch, number), block)
        return [found[number] for number in numbers]

    def _file(self, epoch: int) -> Location:
        if not 0 <= epoch < self.info.keep:
            raise ValueError(f"epochs are numbered from 0 to {self.info.keep - 1}, not {epoch}")
        return self.location / f"epoch-{epoch:05d}.arrow"


class _RecentBlocks:
    """Cache in memory of blocks of label records, by epoch and number of the block.

    Beyond `limit` bytes it drops the least recently used blocks, but keeps at least one.
    """

    def __init__(self, limit: int) -> None:
        self._blocks = OrderedDict[tuple[int, int], LabelRecords]()
        self._limit, self._held = limit, 0

    def get(self, key: tuple[int, int]) -> LabelRecords | None:
        if key in self._blocks:
            self._blocks.move_to_end(key)
        return self._blocks.get(key)

    def put(self, key: tuple[int, int], block: LabelRecords) -> None:
        """Add a block under a new key, and drop the least recently used blocks beyond the limit."""
        self._blocks[key] = block
        self._held += block.nbytes
        while self._held > self._limit and len(self._blocks) > 1:
            self._held -= self._blocks.popitem(last=False)[1].nbytes


@dataclass(frozen=True)
class _OpenedEpoch:
    """File of an epoch whose end, which lists the blocks, was read and checked. No file is held open."""

    sealed: SealedFile
    block: int
    """Number of images in a block; the last block may have fewer."""

    def blocks(self, numbers: Sequence[int], info: LabelInfo) -> list[LabelRecords]:
        """Read the blocks with these numbers, from 0, and check them against their digests and the sizes in `info`."""
        batches = self.sealed.batches(numbers, cache=configured_cache())
        with rejecting_nonsense(self.sealed.location):
            counts = [min(self.block, info.images - self.block * number) for number in numbers]
            return [_records(batch, count, info) for batch, count in zip(batches, counts, strict=True)]


def _open_epoch(location: Location, info: LabelInfo, epoch: int) -> _OpenedEpoch:
    sealed = open_sealed(location, format_name=FORMAT, format_version=FORMAT_VERSION)
    with rejecting_nonsense(location):
        written = _info_from_json(json.loads(sealed.header["info"]))
        if (written.origin, int(sealed.header["epoch"])) != (info.origin, epoch):
            raise CorruptFileError(
                f"{location.uri} holds another epoch, or labels of another store",
                "It was renamed or copied",
                "Put it back where it belongs, or remove it and label the epoch again",
            )
        block = int(sealed.header["block"])
        if block < 1 or sealed.n_batches != -(-info.images // block) or not sealed.schema.equals(_SCHEMA):
            raise damaged(location, "Its blocks are not those it announces")
    return _OpenedEpoch(sealed, block)


def _write(place: Location, file: BinaryIO, records: Iterable[LabelRecords], info: LabelInfo, epoch: int) -> None:
    block, count = max(1, 8 * BLOCK_BYTES // info.record_bits), 0
    header = {"info": json.dumps(info.to_json(), sort_keys=True), "epoch": str(epoch), "block": str(block)}
    writer = SealedWriter(file, _SCHEMA, format_name=FORMAT, format_version=FORMAT_VERSION, header=header)
    for part in _in_blocks(_checked(records, info), block):
        count += len(part)
        # Not around the whole loop: `records` runs the labelling, whose errors are no errors of the store.
        with place.explaining("write"):
            writer.write(_batch(part))
    if count != info.images:
        raise ValueError(f"{count} records given for {info.images} images")
    with place.explaining("write"):
        writer.close({"images": count})


def _checked(records: Iterable[LabelRecords], info: LabelInfo) -> Iterator[LabelRecords]:
    for each in records:
        if not np.isfinite(each.values).all():
            raise StoreError(
                "a logit cannot be stored as float16",
                "it is not finite or beyond 65504: the teacher diverged, or was given images in another normalisation",
                "Check the teacher's accuracy on these images",
            )
        each.require(info)
        yield each


def _in_blocks(records: Iterable[LabelRecords], size: int) -> Iterator[LabelRecords]:
    """Yield all records in order, `size` at a time; the last group may be smaller."""
    held: list[LabelRecords] = []
    for each in records:
        held.append(each)
        while sum(map(len, held)) >= size:
            joined = _joined(held)
            yield joined.take(slice(size))
            held = [joined.take(slice(size, None))]
    if sum(map(len, held)):
        yield _joined(held)


def _joined(parts: Sequence[LabelRecords]) -> LabelRecords:
    if len(parts) == 1:
        return parts[0]
    return LabelRecords(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS})


def _empty(count: int, info: LabelInfo) -> LabelRecords:
    shapes = {name: _shape(name, count, width) for name, width in info.widths.items()}
    return LabelRecords(**{name: np.empty(shape, _COLUMNS[name][0]) for name, shape in shapes.items()})


def _shape(name: str, count: int, width: int) -> tuple[int, ...]:
    return (count,) if name in ("flips", "partners", "lambdas") else (count, width)


def _batch(records: LabelRecords) -> pa.RecordBatch:
    columns = []
    for name, (_, kind) in _COLUMNS.items():
        items = pa.array(np.ascontiguousarray(getattr(records, name)).reshape(-1), kind)
        offsets = pa.array([0, len(items)], pa.int32())
        columns.append(pa.ListArray.from_arrays(offsets, items, type=_SCHEMA.field(name).type))
    return pa.record_batch(columns, schema=_SCHEMA)


def _records(batch: pa.RecordBatch, count: int, info: LabelInfo) -> LabelRecords:
    arrays = {}
    for name, width in info.widths.items():
        items = batch.column(name).flatten()
        if items.null_count:
            raise ValueError(f"{name} are missing")
        arrays[name] = items.to_numpy(zero_copy_only=False).reshape(_shape(name, count, width))
    records = LabelRecords(**arrays)
    records.require(info)
    return records


def _info_from_json(content: Mapping[str, Any]) -> LabelInfo:
    """Inverse of `LabelInfo.to_json`. Other content raises KeyError, TypeError or ValueError."""
    info = LabelInfo(**{**content, "size": tuple(content["size"])})
    height, width = info.size
    whole = (info.images, info.classes, height, width, info.epochs, info.keep, info.seed, info.top or 0)
    numbers = (info.temperature, *info.augmentation.values())
    if not all(type(number) is int for number in whole) or not all(type(n) in (int, float) for n in numbers):
        raise TypeError("a number is of another type")
    if not all(isinstance(text, str) for text in (info.set_fingerprint, info.teacher_fingerprint)):
        raise TypeError("a fingerprint is no text")
    return info
