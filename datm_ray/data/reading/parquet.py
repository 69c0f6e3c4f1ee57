"""Read images and labels from Parquet files, in the layout in which Hugging Face writes image data sets.

A row is one image and its label. The image is an encoded JPEG or PNG: a column of bytes, or a struct with a field
`bytes`. An integer label is a class's number; the class's name comes from the schema's `huggingface` metadata if it
exists. A text label is the class's name. Not covered: images stored outside the file, and nested folders of images.
"""

from __future__ import annotations

import json
import os
import re
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from datm_ray.data.reading.contents import recognise_file, unreadable
from datm_ray.data.reading.decode import Encoded
from datm_ray.data.reading.files import list_folder
from datm_ray.data.splits import role_of, went_where
from datm_ray.errors import DatasetError, MissingImagesError
from datm_ray.words import counted

DECODED_FREE, DECODED_RATIO = 2**26, 20
"""Limit on the memory that the columns read from one Parquet file take: 64 MiB plus 20 times the file's size. Images in
these columns are still encoded."""

_ROWS = 16  # rows read at a time
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class ParquetFiles:
    """Parquet files with the training images, and those with the test images, each sorted by path."""

    name: str
    train: tuple[Path, ...]
    test: tuple[Path, ...]
    """Parquet files with the test images; empty if the test set is to be split off the training images."""
    notes: tuple[str, ...] = ()
    """Lines for the user: which files were left out, and which are used for training and for test images."""


@dataclass(frozen=True, eq=False)
class ParquetRows:
    """Images of Parquet files by row, read when they are asked for. Can be sent to workers.

    One group of rows is read at a time, and the last `KEPT_GROUPS` groups are kept. Rows in order are therefore fast,
    and rows in random order slow. To train teachers, which read in random order, use a folder of images.
    """

    files: tuple[Path, ...]
    groups: tuple[tuple[int, ...], ...]
    """Number of rows in each row group, in one tuple per file."""
    sizes: tuple[int, ...]
    """Size of each file in bytes."""

    @cached_property
    def _starts(self) -> list[tuple[int, int, int]]:
        """For each row group with rows: first row, counted over all files; index of the file; group's index in it."""
        found, first = [], 0
        for file, groups in enumerate(self.groups):
            for number, rows in enumerate(groups):
                found += [(first, file, number)] if rows else []
                first += rows
        return found

    def _place(self, index: int) -> tuple[int, int, int]:
        """Index of the file, of the row group in it, and of the row in the group, for a row counted over all files."""
        first, file, group = self._starts[bisect_right(self._starts, index, key=lambda each: each[0]) - 1]
        return file, group, index - first

    def open(self, index: int) -> BinaryIO:
        """Encoded image of row `index`, counted from 0 over all files, as a binary file in memory.

        Raises OSError or DatasetError if the Parquet file cannot be read.
        """
        file, group, row = self._place(index)
        try:
            with _READING:  # else each thread that needs this group would read it
                images = _group(self.files[file], group)
        except DatasetError as error:
            raise (error.__cause__ if isinstance(error.__cause__, OSError) else error) from None
        return BytesIO(images[row].as_py())

    def name(self, index: int) -> str:
        """Path of the file and number of the row in it, for messages."""
        file = self._place(index)[0]
        return f"{self.files[file]} row {index - sum(map(sum, self.groups[:file]))}"

    def mark(self, index: int) -> str:
        """Text with the file's name and size in bytes, and the numbers of the row group and of the row in it."""
        file, group, row = self._place(index)
        return f"{self.files[file].name}:{self.sizes[file]}:{group}:{row}"


KEPT_GROUPS = 2
"""Number of row groups whose encoded images a process keeps in memory."""
_READING = threading.Lock()


@lru_cache(KEPT_GROUPS)
def _group(file: Path, number: int) -> Any:
    """Encoded images of row group `number` of a file, from 0, as an Arrow column of bytes."""
    with _reading(file) as parquet:
        image = _column(file, parquet.schema_arrow.names, _IMAGE_COLUMNS)
        return _image_bytes(file, _read_columns(file, parquet, (image,), [number]).column(image))


@dataclass(frozen=True)
class _Shard:
    images: Any  # pyarrow.ChunkedArray of encoded images [n]; None if images are streamed
    groups: tuple[int, ...]  # rows of each row group
    labels: NDArray[np.int64] | list[str]  # labels [n]; texts are names of classes
    class_names: tuple[str, ...] | None


def find_files(path: str) -> ParquetFiles:
    """Find the files given by a folder, by "TRAIN.parquet,TEST.parquet" or by a single file.

    In a folder, the words train, test and val in the names of files and folders decide how files are used. If no test
    file has labels, the validation files become the test set.

    Raises:
        MissingImagesError: a file does not exist.
        DatasetError: more than two files are given. Or a folder has no Parquet files, or none of several is named as
            training data; a numbered file is missing or was written twice; training or test files lie in two places.
    """
    whole = Path(path).expanduser()
    if whole.is_dir():
        return _in_folder(whole)
    named = parts_of(path)
    missing = [file for file in named if not file.is_file()]
    if missing or len(named) > 2:
        raise (MissingImagesError if missing else DatasetError)(
            f"no Parquet file at {missing[0]}" if missing else f"the path {path!r} names {len(named)} Parquet files",
            remedy="Give the path (dataset.path) of a folder of Parquet files, one file, or TRAIN.parquet,TEST.parquet",
        )
    notes = [f"{file.name} is one of {total} numbered files" for file in named if (total := _shards_of(file.name)) > 1]
    return ParquetFiles(named[0].stem, (named[0],), tuple(named[1:]), tuple(notes))


def parts_of(path: str) -> list[Path]:
    """Paths in a text such as "TRAIN.parquet,TEST.parquet"; one path if the whole text is an existing path."""
    whole = Path(path).expanduser()
    if os.path.exists(whole):
        return [whole]
    parts = re.split(r"(?<=\.parquet)\s*,", path, flags=re.IGNORECASE)  # a comma may be in a folder's name too
    return [Path(part.strip()).expanduser() for part in (parts if len(parts) > 1 else path.split(","))]


_SHARD = re.compile(r"(?P<stem>.*-)(?P<number>\d+)-of-(?P<total>\d+)(-[0-9a-f]+)?\.parquet", re.IGNORECASE)
"""Name of a numbered file, such as train-00000-of-00002.parquet. Older files have a checksum before the suffix."""


def _shards_of(file: str) -> int:
    """Number of files that a numbered file's name announces, such as 2 for train-00000-of-00002.parquet; else 1."""
    shard = _SHARD.fullmatch(file)
    return int(shard["total"]) if shard else 1


def _require_all_shards(folder: Path, files: Iterable[str]) -> None:
    """Raise a `DatasetError` if a numbered file is missing, or if a folder has numbered files that were written twice.

    Args:
        files: paths relative to `folder`.
    """
    stems: dict[str, list[re.Match[str]]] = defaultdict(list)
    for shard in filter(None, map(_SHARD.fullmatch, files)):
        stems[shard["stem"]].append(shard)
    for stem, shards in stems.items():
        numbers, total = {int(shard["number"]) for shard in shards}, shards[0]["total"]
        if len(numbers) < len(shards) or {shard["total"] for shard in shards} != {total}:
            raise DatasetError(
                f"the files {stem}*.parquet in {folder} were written twice, as their numbers show",
                f"They are {', '.join(shard[0] for shard in shards[:4])}",
                "Move away those of one writing",
            )
        first = 1 if int(total) in numbers else 0
        missing = next((number for number in range(first, first + int(total)) if number not in numbers), None)
        if missing is not None:
            raise DatasetError(
                f"{stem}{missing:0{len(total)}}-of-{total}.parquet is missing in {folder}",
                f"{len(numbers)} of {int(total)} files are there; a download may have stopped",
                "Fetch the missing files; or rename those that you have, or give the path of one, to use them alone",
            )


def _require_one_place(folder: Path, files: Sequence[str], images: str) -> None:
    """Raise a `DatasetError` if training images, or test images, come from several folders.

    The reason: a repository may hold the same images several times, at different sizes in folders such as 320px and
    160px. A file comes from the folder above the name that states its role, see `_place_of`. So 320px/train-0.parquet
    and 320px/train/0.parquet both come from 320px. All files below one folder `train` come from one folder, whatever
    their names.

    Args:
        files: paths relative to `folder`.
        images: name of these images for the message, such as "training images".
    """
    places = sorted({_place_of(file) for file in files})
    if len(places) > 1:
        raise DatasetError(
            f"the folders {' and '.join(place or '.' for place in places[:3])} in {folder} all hold {images}",
            "They may be configurations of one repository, with the same images in each",
            "Give the path of one of them, or move the other files away",
        )


def _place_of(file: str) -> str:
    """Folder above the name in a path that states the file's role, see `role_of`: `a` for `a/train/0.parquet`.

    If several names in the path state the role, folders whose whole name is the role, such as `train`, are preferred to
    names such as `train-0`. Among the preferred names, the innermost counts. If no name states a role, the result is
    the folder of the file. "" means the root.
    """
    parts = file.split("/")
    role = role_of(*reversed(parts))
    plain = [depth for depth, name in enumerate(parts[:-1]) if name.isalpha() and role_of(name) == role]
    stating = plain or [depth for depth, name in enumerate(parts) if role_of(name)] or [len(parts) - 1]
    return "/".join(parts[: stating[-1]])


def _in_folder(folder: Path) -> ParquetFiles:
    listing = list_folder(folder, {".parquet"})
    files = listing.files
    roles = {file: role_of(*reversed(file.split("/"))) for file in files}
    train, test, val = ([file for file in files if roles[file] == role] for role in ("train", "test", "val"))
    if len(files) == 1:
        train, test, val = list(files), [], []
    if not train:
        raise DatasetError(
            f"the folder {folder} has no Parquet file of training images",
            f"It holds {', '.join(files[:5])}" if files else " ".join(("It holds no *.parquet file", *listing.notes())),
            "Give them names with the word 'train' in it, or the path TRAIN.parquet,TEST.parquet (dataset.path)",
        )
    _require_one_place(folder, train, "training images")
    held_out = next((part for part in (test, val) if any(_is_labelled(folder / file) for file in part)), [])
    _require_one_place(folder, held_out, "test images")
    _require_all_shards(folder, (*train, *held_out))
    unused = [
        file if held_out or file not in test + val else f"{file} (without labels)"
        for file in files
        if file not in (*train, *held_out)
    ]
    return ParquetFiles(
        folder.resolve().name,
        tuple(folder / file for file in train),
        tuple(folder / file for file in held_out),
        (*listing.notes(), went_where(train, held_out, unused)),
    )


def _is_labelled(file: Path) -> bool:
    """True if any row of a Parquet file has a label other than -1. Labels of test images are often -1 or missing."""
    import pyarrow as pa

    with _reading(file) as parquet:
        label = next((name for name in _LABEL_COLUMNS if name in parquet.schema_arrow.names), None)
        if label is None:
            return False
        column = _read_columns(file, parquet, (label,)).column(label).drop_null()
        return len(column) > 0 and not (pa.types.is_integer(column.type) and (column.to_numpy() == -1).all())


def read_parquet(
    files: Sequence[Path], class_names: tuple[str, ...] | None = None, *, streamed: bool = False
) -> tuple[Encoded, tuple[str, ...] | None]:
    """Read images and labels from Parquet files, in order. Images stay encoded (such as JPEG) in memory.

    Returns the images with their labels, and the names of the classes. The names are `None` if labels are integers and
    the schema names no classes.

    Args:
        class_names: the classes of the training files in the order of their numbers, for files with text labels.
            `None` takes the distinct texts of these files in alphabetical order.
        streamed: True to read only the labels now, and each image whenever it is needed: none stays in memory.

    Raises:
        DatasetError: a file cannot be read, lacks a column, has other classes than the first file, or has a class that
            is not in `class_names`.
    """
    import pyarrow as pa

    shards = [_read_shard(file, streamed) for file in files]
    for file, shard in zip(files, shards, strict=True):
        if (shard.class_names, type(shard.labels)) != (shards[0].class_names, type(shards[0].labels)):
            raise DatasetError(
                f"the Parquet files {files[0].name} and {file.name} hold different classes",
                "Files of several data sets lie in one folder",
                "Give the path TRAIN.parquet,TEST.parquet (dataset.path)",
            )
    names = shards[0].class_names
    if isinstance(shards[0].labels, list):
        names = class_names or tuple(sorted({label for shard in shards for label in shard.labels}))
    labels = np.concatenate([_numbered(file, shard, names) for file, shard in zip(files, shards, strict=True)])
    files = [file.absolute() for file in files]
    rows = ParquetRows(tuple(files), tuple(each.groups for each in shards), tuple(f.stat().st_size for f in files))
    if streamed:
        return Encoded(labels, rows.open, rows.name, rows.mark), names
    chunks = [chunk for shard in shards for chunk in shard.images.cast(pa.large_binary()).chunks]
    images = pa.chunked_array(chunks, pa.large_binary())
    return Encoded(labels, lambda row: BytesIO(images[row].as_py()), rows.name), names


def _numbered(file: Path, shard: _Shard, names: tuple[str, ...] | None) -> NDArray[np.int64]:
    """Labels [n] of a file as class numbers from 0. Labels that are class names become their index in `names`.

    Args:
        names: class names in the order of their numbers; `None` if there are none.

    Raises:
        DatasetError: a label is a name that is not in `names`.
    """
    if not isinstance(shard.labels, list):
        return shard.labels
    number = {name: label for label, name in enumerate(names or ())}
    unknown = next((label for label in shard.labels if label not in number), None)
    if unknown is not None:
        raise DatasetError(
            f"the file {file} has a class {unknown!r} that the training files lack",
            f"They have {', '.join((names or ())[:8])}",
            "Give both the same classes",
        )
    return np.array([number[label] for label in shard.labels], dtype=np.int64)


@contextmanager
def _reading(file: Path) -> Iterator[Any]:
    """Open `file`, yield it as a `pyarrow.parquet.ParquetFile`, and close it. Reading errors become a DatasetError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            yield parquet
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        content = recognise_file(file)
        is_other = content is not None and content.suffix != ".parquet"
        reason, cause, remedy = unreadable(error, content if is_other else None)
        raise DatasetError(f"the file {file} cannot be read as Parquet ({reason})", cause, remedy) from error


def _read_shard(file: Path, streamed: bool) -> _Shard:
    with _reading(file) as parquet:
        schema = parquet.schema_arrow
        image = _column(file, schema.names, _IMAGE_COLUMNS)
        label = _column(file, schema.names, _LABEL_COLUMNS)
        table = _read_columns(file, parquet, (label,) if streamed else (image, label))
        groups = tuple(parquet.metadata.row_group(number).num_rows for number in range(parquet.num_row_groups))
    return _Shard(
        images=None if streamed else _image_bytes(file, table.column(image)),
        groups=groups,
        labels=_labels(file, table.column(label)),
        class_names=_class_names(schema.metadata or {}, label),
    )


def _plain(data: Any) -> Any:
    """Copy of an Arrow table or batch in which every column has a plain type: no dictionary, struct or view."""
    return type(data).from_arrays([_values(column) for column in data.columns], names=data.schema.names)


def _values(column: Any) -> Any:
    """Arrow column with a plain type.

    Dictionary codes are replaced by their values, a struct with a field `bytes` by this field, and Arrow's view
    types (binary_view, string_view) by ordinary ones.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return _values(pc.struct_field(column, "bytes"))
    if pa.types.is_dictionary(kind):
        return _values(column.cast(kind.value_type))
    if pa.types.is_binary_view(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.large_binary() if pa.types.is_binary_view(kind) else pa.large_string())
    return column


def _read_columns(file: Path, parquet: Any, columns: Sequence[str], groups: Sequence[int] | None = None) -> Any:
    """Read columns as a table in small batches, and stop if it takes more memory than the file's size allows.

    The limit is `DECODED_FREE` bytes plus `DECODED_RATIO` times the file's size. Columns get plain types, without
    dictionaries. Dictionary codes are replaced batch by batch: each batch has the whole dictionary, whose size would
    otherwise be counted again for every batch.

    The limit is needed because a small file can hold one value repeated in millions of rows. Not covered: one page, of
    up to 2 GiB, is unpacked before its size is known. A file of 33 KB with a wrong footer took 2 GiB. PyArrow has no
    limit for pages, and reading page headers without PyArrow would need a decoder for the footer too.

    Args:
        file: path of the Parquet file, for its size.
        parquet: the same file, open, as a `pyarrow.parquet.ParquetFile`.
        columns: names of the columns to read.
        groups: numbers of the row groups to read, from 0; `None` for all.

    Raises:
        ValueError: the table exceeds the limit, or the footer announces that these row groups do.
    """
    import pyarrow as pa

    limit = DECODED_FREE + DECODED_RATIO * file.stat().st_size
    # Not row_group(n).column(n), in which a file can cause a C++ exception that ends the process.
    groups = range(parquet.num_row_groups) if groups is None else groups
    stated = sum(parquet.metadata.row_group(number).total_byte_size for number in groups)
    batches, size = [], 0
    for batch in parquet.iter_batches(_ROWS, groups, columns=list(columns)) if stated <= limit else ():
        batch.validate(full=True)
        batches.append(_plain(batch))
        size += batches[-1].nbytes
        if size > limit:
            break
    if max(stated, size) > limit:
        raise ValueError(f"its {file.stat().st_size} bytes unpack to {max(stated, size)} or more")
    empty = parquet.schema_arrow.empty_table().select(list(columns))
    return pa.Table.from_batches(batches) if batches else _plain(empty)


def _column(file: Path, present: Sequence[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        if name in present:
            return name
    raise DatasetError(
        f"the file {file} has no column {' or '.join(map(repr, wanted))}",
        f"Its columns are {', '.join(map(repr, present)) or 'none'}",
        "Rename the column that holds them",
    )


def _image_bytes(file: Path, column: Any) -> Any:
    import pyarrow as pa

    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DatasetError(
            f"the image column of {file} holds {column.type}",
            "Images must be encoded bytes, or structs with a field 'bytes'",
            "Write the data set again with the images embedded",
        )
    if column.null_count:
        raise DatasetError(
            f"the file {file} has {counted(column.null_count, 'row')} without image bytes",
            "The images are kept outside the Parquet file",
            "Write the data set again with the images embedded",
        )
    return column


def _labels(file: Path, column: Any) -> NDArray[np.int64] | list[str]:
    import pyarrow as pa

    kind = column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_text or pa.types.is_integer(kind)) or column.null_count:
        raise DatasetError(
            f"the label column of {file} holds {kind} with {counted(column.null_count, 'missing value')}",
            remedy="Write the labels as names of classes, or as integers from 0 to the number of classes - 1",
        )
    if is_text:
        names: list[str] = column.to_pylist()
        return names
    labels: NDArray[np.int64] = column.to_numpy().astype(np.int64)
    return labels


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (LookupError, TypeError, ValueError, RecursionError):
        return None  # written by another tool, which is fine
    return tuple(map(str, names)) if isinstance(names, list) else None
