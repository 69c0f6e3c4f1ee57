"""Tensor files: a few named arrays and their metadata in one self-describing Arrow file.

Synthetic sets, checkpoints and transforms, among others, are tensor files. Each array is one row, in a record batch
of its own, with the columns

    name string | dtype string | shape list<int64> | data large_binary (C order, little-endian)

The schema metadata holds the kind and the metadata of the file. The files are sealed (see `sealed`): a read returns
what was written, or raises an error. All arrays together are no larger than the file. Equal arrays and metadata give
equal bytes. Trajectories have another format, see `trajectories`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datm_ray.errors import CorruptFileError
from datm_ray.store.files.filesystem import Location
from datm_ray.store.sealed import SealedWriter, damaged, open_sealed, reading_again, rejecting_nonsense

FORMAT = "datm_ray.tensors"
FORMAT_VERSION = 1
DTYPES = ("float16", "float32", "float64", "int32", "int64", "uint8", "bool")

_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("dtype", pa.string(), nullable=False),
        pa.field("shape", pa.list_(pa.int64()), nullable=False),
        pa.field("data", pa.large_binary(), nullable=False),
    ]
)


@dataclass(frozen=True)
class TensorFile:
    """Content of a tensor file: named arrays, metadata and the kind of file."""

    arrays: dict[str, NDArray[Any]]
    """Arrays by name, in the order written; writable and independent of the file."""

    metadata: dict[str, Any]
    """Metadata after a round trip through JSON: tuples come back as lists."""

    kind: str
    """Purpose of the file, such as "synthetic-set"."""


def write_tensors(
    location: Location,
    arrays: Mapping[str, NDArray[Any]],
    *,
    kind: str,
    metadata: Mapping[str, object],
    replace: bool = True,
) -> None:
    """Write named arrays of any shape, and metadata, to a file, atomically.

    Args:
        kind: purpose of the file, such as "synthetic-set". Readers must give the same text.
        metadata: any facts about the arrays that JSON can hold.
        replace: True to replace an existing file.

    Raises:
        AlreadyExistsError: `replace` is False and the file exists. The existing file stays.
        StoreError: the file cannot be written.
        TypeError: an array has a dtype that is not in DTYPES, or the metadata is not JSON-able.
    """
    header, batches = _encoded(arrays, kind, metadata)
    with location.create(replace=replace) as file, location.explaining("write"):
        _write(file, header, batches, list(arrays))


def dump_tensors(
    file: BinaryIO, arrays: Mapping[str, NDArray[Any]], *, kind: str, metadata: Mapping[str, object]
) -> None:
    """Write what `write_tensors` writes into an empty binary file, which is open for reading and writing.

    Raises TypeError if an array has a dtype that is not in DTYPES, or the metadata is not JSON-able.
    """
    _write(file, *_encoded(arrays, kind, metadata), list(arrays))


def _encoded(
    arrays: Mapping[str, NDArray[Any]], kind: str, metadata: Mapping[str, object]
) -> tuple[dict[str, str], list[pa.RecordBatch]]:
    header = {"kind": kind, "metadata": json.dumps(metadata, sort_keys=True)}
    return header, [_batch(name, np.asarray(array)) for name, array in arrays.items()]


def _write(file: BinaryIO, header: dict[str, str], batches: list[pa.RecordBatch], names: list[str]) -> None:
    writer = SealedWriter(file, _SCHEMA, format_name=FORMAT, format_version=FORMAT_VERSION, header=header)
    for batch in batches:
        writer.write(batch)
    writer.close(summary={"names": names})


def read_tensors(location: Location, *, kind: str) -> TensorFile:
    """Read all arrays of a tensor file.

    Raises:
        StoreError: the file is missing or cannot be read.
        CorruptFileError: the file is damaged, of another kind than `kind`, or of a newer format.
    """
    return reading_again(location, lambda: _read(location, kind))


def _read(location: Location, kind: str) -> TensorFile:
    sealed = open_sealed(location, format_name=FORMAT, format_version=FORMAT_VERSION)
    with rejecting_nonsense(location):
        if sealed.header["kind"] != kind:
            raise CorruptFileError(f'{location.uri} is a "{sealed.header["kind"]}", not a "{kind}"')
        metadata = json.loads(sealed.header["metadata"])
        if not isinstance(metadata, dict) or not sealed.schema.equals(_SCHEMA):
            raise damaged(location, "It has other columns or metadata than a file of tensors")
        named = [_array(batch) for batch in sealed.batches(range(sealed.n_batches))]
        if [name for name, _ in named] != sealed.summary["names"] or len(dict(named)) != len(named):
            raise damaged(location, "Its arrays are not those it announces")
    return TensorFile(dict(named), metadata, kind)


def _batch(name: str, array: NDArray[Any]) -> pa.RecordBatch:
    if array.dtype.name not in DTYPES:
        raise TypeError(f'array "{name}" has dtype {array.dtype}; a tensor file holds {", ".join(DTYPES)}')
    data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    offsets = np.array([0, data.nbytes], np.int64)
    # From buffers, because pa.array() would copy the data.
    column = pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(data.reshape(-1).view(np.uint8))]
    )
    columns = [
        pa.array([name]),
        pa.array([array.dtype.name]),
        pa.array([array.shape], pa.list_(pa.int64())),
        column,
    ]
    return pa.record_batch(columns, schema=_SCHEMA)


def _array(batch: pa.RecordBatch) -> tuple[str, NDArray[Any]]:
    name, dtype, shape = (batch.column(key)[0].as_py() for key in ("name", "dtype", "shape"))
    data = batch.column("data")[0].as_buffer()
    if dtype not in DTYPES or any(size < 0 for size in shape):
        raise ValueError(f"the array {name!r} is {dtype} {shape}")
    if dtype == "bool" and np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise ValueError(f"the array {name!r} holds bytes that are neither true nor false")
    return name, np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).reshape(shape).copy()
