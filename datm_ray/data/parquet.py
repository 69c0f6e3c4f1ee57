"""Parquet files as Hugging Face writes image data sets.

A row is one image: a struct whose `bytes` field is an encoded JPEG or PNG (or that field on its own), and an
integer label. Class names come from the schema's `huggingface` metadata where it has them. Images kept
outside the file, string labels and nested folders of images are left out.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from datm_ray.data.decode import Encoded
from datm_ray.errors import DatasetError

DECODED_FREE, DECODED_RATIO = 2**26, 20
"""Images may take 64 MiB as they stand in memory, encoded, and 20 times the file's size besides."""

_ROWS = 16  # read at a time
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class ParquetFiles:
    """Which files hold the training and the test images, each sorted by name."""

    name: str
    train: tuple[Path, ...]
    test: tuple[Path, ...]
    """Empty where one set has to serve for both."""


@dataclass(frozen=True)
class ParquetSet:
    """The rows of one or several shards."""

    encoded: Encoded
    class_names: tuple[str, ...] | None
    """None where the schema does not say."""


@dataclass(frozen=True)
class _Shard:
    images: Any  # pyarrow.ChunkedArray of binary [n]
    labels: NDArray[np.int64]  # [n]
    class_names: tuple[str, ...] | None


def find_files(path: str) -> ParquetFiles:
    """Files meant by a folder, by "TRAIN.parquet,TEST.parquet" or by a single file.

    In a folder the relative path tells the role: "train", else "test", else "val" must occur in it. Where
    there are test files those with "val" are left unused.

    Raises:
        DatasetError: nothing is there, or a folder of several files does not say which are for training.
    """
    named = [Path(part.strip()).expanduser() for part in path.split(",")]
    if len(named) == 1 and named[0].is_dir():
        return _in_folder(named[0])
    missing = [file for file in named if not file.is_file()]
    if missing or len(named) > 2:
        raise DatasetError(
            f"no Parquet file at {missing[0]}" if missing else f"the path {path!r} names {len(named)} Parquet files",
            remedy="Set dataset.path to a folder of Parquet files, to one file, or to TRAIN.parquet,TEST.parquet",
        )
    return ParquetFiles(named[0].stem, (named[0],), tuple(named[1:]))


def _in_folder(folder: Path) -> ParquetFiles:
    files = sorted(folder.rglob("*.parquet"))
    roles = {file: _role(file.relative_to(folder).as_posix().lower()) for file in files}
    train, test, val = (tuple(file for file in files if roles[file] == role) for role in ("train", "test", "val"))
    if len(files) == 1:
        train, test, val = tuple(files), (), ()
    if not train:
        raise DatasetError(
            f"the folder {folder} has no Parquet file of training images",
            f"It holds {', '.join(file.name for file in files[:5]) or 'no *.parquet file at all'}",
            "Give them names with 'train' in it, or set dataset.path to TRAIN.parquet,TEST.parquet",
        )
    return ParquetFiles(folder.resolve().name, train, test or val)


def _role(relative: str) -> str | None:
    return next((role for role in ("train", "test", "val") if role in relative), None)


def read_parquet(files: Sequence[Path]) -> ParquetSet:
    """The shards one after another. Keeps the encoded bytes in memory, not the pixels.

    Raises:
        DatasetError: a file cannot be read, lacks a column, or names other classes than the first one.
    """
    shards = [_read_shard(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        if shard.class_names != shards[0].class_names:
            raise DatasetError(
                f"the Parquet files {files[0].name} and {file.name} hold different classes",
                "Files of several data sets lie in one folder",
                "Set dataset.path to TRAIN.parquet,TEST.parquet",
            )
    labels = np.concatenate([shard.labels for shard in shards])
    starts = [0, *accumulate(len(shard.labels) for shard in shards)]

    def place(index: int) -> tuple[int, int]:
        shard = bisect_right(starts, index) - 1
        return shard, index - starts[shard]

    def open_row(index: int) -> BinaryIO:
        shard, row = place(index)
        return BytesIO(shards[shard].images[row].as_py())

    def name(index: int) -> str:
        shard, row = place(index)
        return f"{files[shard]} row {row}"

    return ParquetSet(Encoded(labels, open_row, name), shards[0].class_names)


def _read_shard(file: Path) -> _Shard:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
        image = _column(file, schema.names, _IMAGE_COLUMNS)
        label = _column(file, schema.names, _LABEL_COLUMNS)
        table = _read_columns(file, parquet, (image, label))
        images, labels = table.column(image), table.column(label)
    except (OSError, ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise DatasetError(
            f"the file {file} cannot be read as Parquet ({str(error).splitlines()[0]})",
            "The file is truncated or of another format",
            "Fetch it again",
        ) from error
    return _Shard(
        images=_image_bytes(file, images),
        labels=_labels(file, labels),
        class_names=_class_names(schema.metadata or {}, label),
    )


def _read_columns(file: Path, parquet: Any, columns: Sequence[str]) -> Any:
    """The table of these columns, a few rows at a time, as one value may be said to stand in a million of them.

    Raises:
        ValueError: it takes much more memory than the file has bytes, or the file says that it would.
    """
    import pyarrow as pa

    limit = DECODED_FREE + DECODED_RATIO * file.stat().st_size
    # Not row_group(n).column(n): pyarrow lets an exception of C++ end the process there, whoever wrote the file.
    said = sum(parquet.metadata.row_group(number).total_byte_size for number in range(parquet.num_row_groups))
    batches, size = [], 0
    for batch in parquet.iter_batches(_ROWS, columns=list(columns)) if said <= limit else ():
        batch.validate(full=True)
        batches.append(batch)
        size += batch.nbytes
        if size > limit:
            break
    if max(said, size) > limit:
        raise ValueError(f"its {file.stat().st_size} bytes unpack to {max(said, size)} or more")
    return pa.Table.from_batches(batches, schema=None if batches else parquet.schema_arrow)


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
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DatasetError(
            f"the image column of {file} holds {kind}",
            "Images must be encoded bytes, or structs with a field 'bytes'",
            "Write the data set again with the images embedded",
        )
    if column.null_count:
        raise DatasetError(
            f"the file {file} has {column.null_count} row(s) without image bytes",
            "The images are kept outside the Parquet file",
            "Write the data set again with the images embedded",
        )
    return column


def _labels(file: Path, column: Any) -> NDArray[np.int64]:
    import pyarrow as pa

    if not pa.types.is_integer(column.type) or column.null_count:
        raise DatasetError(
            f"the label column of {file} holds {column.type} with {column.null_count} missing value(s)",
            remedy="Write the labels as integers from 0 to the number of classes - 1",
        )
    labels: NDArray[np.int64] = column.to_numpy().astype(np.int64)
    return labels


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (LookupError, TypeError, ValueError, RecursionError):
        return None  # written by another tool, which is fine
    return tuple(map(str, names)) if isinstance(names, list) else None
