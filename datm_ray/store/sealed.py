"""Sealed Arrow files: ordinary Arrow IPC files in which digests cover every byte.

Arrow has no checksums, and the footer at the end of a file, which says where everything is, is most easily damaged. So
a *seal* with digests is put between the stream and the footer. Arrow readers do not notice it: they start from the end
and follow the footer's offsets.

    ARROW1 | schema | batch | ... | end mark | seal | footer | footer length | ARROW1
    seal = index, sha256 of (index, footer to end of file), length of index, "DATMSEAL"

The index is JSON. It holds the length and sha256 of each part of the stream: everything before the seal, in order,
without gaps. It also holds a summary, which is known only after the last batch. A reader fetches the end of the file
once, checks it, and then fetches only the batches that it needs. Arrow parses only checked bytes, so a damaged file can
neither yield wrong values nor crash the parser. Any Arrow program can read the file too, without these checks.

The modules `tensors`, `trajectories` and `labels` define schemas and batches. Digests detect accidents. They are no
signatures, so they do not detect changes made on purpose. But even a file changed on purpose cannot crash the reader or
expose memory outside the file: batches must be uncompressed and of one row, and each is validated in full. Validation
takes microseconds for a batch of any size, because it checks only offsets and lengths.
"""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, pairwise
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa

from datm_ray.errors import CorruptFileError, DatmError, StoreError
from datm_ray.store.cache import Cache
from datm_ray.store.files.filesystem import Location, unguarded

_ARROW_MAGIC = b"ARROW1"
_ARROW_HEAD = 8  # bytes: 6 of magic and 2 of padding
_ARROW_END = struct.Struct("<i6s")  # length of the footer, magic
_SEAL_END = struct.Struct("<32sQ8s")  # sha256, length of the index, magic
_SEAL_MAGIC = b"DATMSEAL"
_FIRST_READ = 64 * 1024  # bytes; more than the end of an expert with 400 snapshots
_CHUNK = 1024 * 1024  # bytes hashed at a time while writing
_DIGEST = re.compile(r"[0-9a-f]{64}")
_READS = 12  # most attempts to read a file that looks damaged

T = TypeVar("T")


class SealedWriter:
    """Writes one sealed file (an Arrow file with digests of all its bytes), batch by batch, into an empty binary file.

    The binary file must be open for reading and writing.
    """

    def __init__(
        self,
        file: BinaryIO,
        schema: pa.Schema,
        *,
        format_name: str,
        format_version: int,
        header: Mapping[str, str],
    ) -> None:
        """Start a file.

        Args:
            file: empty binary file, open for reading and writing.
            schema: columns of the batches.
            format_name: name of the file's format, stored in the schema's metadata.
            format_version: version of this format, stored there too.
            header: further metadata of the schema.
        """
        metadata = {"format": format_name, "format_version": str(format_version), **header}
        schema = schema.with_metadata(metadata)
        self._file = file
        self._arrow = pa.ipc.new_file(file, schema)
        self._cuts = [0, _ARROW_HEAD + schema.serialize().size]  # where the parts of the stream begin

    def write(self, batch: pa.RecordBatch) -> None:
        """Append one batch, which must have the schema's columns and exactly one row."""
        self._arrow.write_batch(batch)
        self._cuts.append(self._file.tell())

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write the seal (digests of all bytes) and Arrow's footer. The binary file stays open.

        `summary` is a small mapping for JSON, which readers find in `SealedFile.summary`.
        """
        self._arrow.close()
        size = self._file.tell()
        self._file.seek(size - _ARROW_END.size)
        footer_length, _ = _ARROW_END.unpack(self._file.read())
        self._cuts.append(size - _ARROW_END.size - footer_length)

        self._file.seek(0)
        lengths = [end - start for start, end in pairwise(self._cuts)]
        parts = [[length, _read_digest(self._file, length)] for length in lengths]
        footer = self._file.read()
        index = json.dumps({"parts": parts, "summary": summary}, sort_keys=True).encode()
        index += b" " * (-len(index) % 8)  # Arrow aligns to 8 bytes
        self._file.seek(self._cuts[-1])
        self._file.write(index + _SEAL_END.pack(sha256(index + footer).digest(), len(index), _SEAL_MAGIC) + footer)


@dataclass(frozen=True)
class Part:
    """Byte range of a sealed file's Arrow stream: the head with the schema, one batch, or the end mark."""

    start: int
    """Position of the first byte, from 0 at the start of the file."""

    end: int
    """Position after the last byte (exclusive)."""

    sha256: str
    """Digest of the bytes, in hexadecimal."""


@dataclass(frozen=True)
class SealedFile:
    """Sealed file whose index and footer were read and checked. The object holds no open file."""

    location: Location
    schema: pa.Schema
    header: Mapping[str, str]
    """Metadata of the file's Arrow schema: format, version, and what the writer added."""

    parts: Sequence[Part]
    """Parts of the stream, without gaps: head, batches, end mark."""

    summary: Mapping[str, Any]

    whole: bytes | None = None
    """Content of a remote file that was fetched whole on opening, because it is small; `None` for other files."""

    @property
    def n_batches(self) -> int:
        return len(self.parts) - 2

    def batches(self, numbers: Sequence[int], *, cache: Cache | None = None) -> Sequence[pa.RecordBatch]:
        """Read and check the batches with these numbers, from 0. No other bytes are read.

        For a remote file, batches in the `cache` are not fetched, and fetched ones are added to it. A local file is
        mapped and not cached.

        Raises:
            CorruptFileError: a batch does not have its digest, or its content is invalid.
        """
        is_far = self.location.local_path is None and self.whole is None
        chunks = self._read([number + 1 for number in numbers], cache if is_far else None)
        with rejecting_nonsense(self.location):
            return [_record_batch(chunk, self.schema) for chunk in chunks]

    def verify(self) -> None:
        """Read the whole Arrow stream, and raise a CorruptFileError if a part of it does not have its digest."""
        for number in range(len(self.parts)):
            self._read([number])

    def _read(self, numbers: Iterable[int], cache: Cache | None = None) -> Sequence[memoryview]:
        """Bytes of the parts with these numbers, checked by their digests. Fetches, and adds, what `cache` lacks."""
        parts = [self.parts[number] for number in numbers]
        cached = {part: cache.get(part.sha256) for part in parts} if cache else {}
        found = {part: chunk for part, chunk in cached.items() if chunk is not None}
        absent = [part for part in dict.fromkeys(parts) if part not in found]
        ranges = [(part.start, part.end) for part in absent]
        if self.whole is not None:
            fetched: Sequence[memoryview] = [memoryview(self.whole)[start:end] for start, end in ranges]
        else:
            fetched = self.location.read_ranges(ranges) if ranges else []
        for part, chunk in zip(absent, fetched, strict=True):
            if sha256(chunk).hexdigest() != part.sha256:
                raise damaged(self.location, f"Bytes {part.start} to {part.end} are not those written")
            if cache:
                cache.put(part.sha256, chunk)
            found[part] = chunk
        return [found[part] for part in parts]


def open_sealed(location: Location, *, format_name: str, format_version: int) -> SealedFile:
    """Open a sealed file: get its size, then read and check its end. Usually this takes two requests.

    The second request fetches a remote file of up to 64 KiB whole.

    Raises:
        StoreError: the file does not exist.
        CorruptFileError: the file is truncated or altered, of another format, or of a newer version of this format.
    """
    size = location.size()
    index, footer, tail = _read_end(location, size)
    whole = bytes(tail) if len(tail) == size and location.local_path is None else None
    with rejecting_nonsense(location):
        # Arrow can open a footer without the rest of the file, if some bytes precede it.
        arrow = pa.ipc.open_file(pa.BufferReader(bytes(_ARROW_HEAD) + footer))
        header = {key.decode(): value.decode() for key, value in (arrow.schema.metadata or {}).items()}
        content = json.loads(index)
        lengths, digests = [length for length, _ in content["parts"]], [digest for _, digest in content["parts"]]
        if not all(type(length) is int and length >= 0 for length in lengths):
            raise ValueError("a part has no length")
        if not all(_DIGEST.fullmatch(digest) for digest in digests):  # a digest becomes part of a path in the cache
            raise ValueError("a part has no digest")
        ends = list(accumulate(lengths, initial=0))
        parts = tuple(Part(start, end, digest) for (start, end), digest in zip(pairwise(ends), digests, strict=True))
        sealed = SealedFile(location, arrow.schema, header, parts, content["summary"], whole)
        if header.get("format") != format_name:
            raise CorruptFileError(f'{location.uri} is a file of format "{header.get("format")}", not "{format_name}"')
        require_known(location, int(header["format_version"]), format_version)
        announced = ends[-1] + len(index) + _SEAL_END.size + len(footer)
        if sealed.n_batches != arrow.num_record_batches or announced != size:
            raise damaged(location, "Its parts do not add up to its size")
    return sealed


def reading_again(
    location: Location,
    read: Callable[[], T],
    failures: tuple[type[DatmError], ...] = (CorruptFileError,),
    forget: Callable[[], object] = unguarded,
) -> T:
    """Return the result of `read`. If `read` finds the file damaged, repeat it as long as the file keeps changing.

    The reason: a file that is replaced during a read looks damaged too.

    Args:
        location: file that another process may replace.
        read: opens the file anew at each call.
        failures: errors after which `read` may be repeated.
        forget: drops what `read` keeps in memory; called after every error, so that the next call reads anew.

    Raises:
        CorruptFileError: the file is damaged and no longer changes.
        StoreError: the file changed during every attempt.
    """
    stamp = ""
    for attempt in range(_READS):
        try:
            return read()
        except DatmError as error:
            forget()
            if not isinstance(error, failures):
                raise
            before, stamp = stamp, location.stamp()
            if stamp == before:
                raise
        time.sleep(0.02 * attempt)
    raise StoreError(
        f"{location.uri} has changed each of the {_READS} times that it was read",
        "another command writes it again and again",
        "let that one finish, and run the same command again",
    )


def damaged(location: Location, cause: str) -> CorruptFileError:
    """Error for a file whose content is not what was written."""
    return CorruptFileError(f"{location.uri} is damaged", cause, _MEND)


_MEND = "Restore a copy; or, if no other command writes it, move it away and run the step that wrote it again"


@contextmanager
def rejecting_nonsense(location: Location) -> Iterator[None]:
    """Turn errors that meaningless content causes in the block, such as a TypeError, into a `CorruptFileError`.

    The digests of such content match. So the file was not damaged later: it was written wrongly, or by another
    program.
    """
    try:
        yield
    except _NONSENSE as error:
        raise damaged(location, f"Its content makes no sense ({type(error).__name__}: {error})") from error


_NONSENSE = (
    pa.ArrowException,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,  # raised by Arrow for an invalid flatbuffer; errors of the storage are StoreErrors already
    RecursionError,
    TypeError,
    ValueError,
    struct.error,
)
"""Exceptions that are raised while content with values of unexpected types, sizes or depths is read."""


def _record_batch(chunk: memoryview, schema: pa.Schema) -> pa.RecordBatch:
    """Batch in the bytes `chunk`. It must have one row, no nulls, and offsets and lengths inside the chunk.

    Otherwise an error in `_NONSENSE` is raised. Without `validate`, Arrow would read memory beyond the chunk.
    """
    message = pa.ipc.read_message(pa.py_buffer(chunk))
    if _is_compressed(memoryview(message.metadata)):
        raise ValueError("a batch is compressed")
    batch = pa.ipc.read_record_batch(message, schema)
    batch.validate(full=True)
    if batch.num_rows != 1 or any(column.null_count for column in batch.columns):
        raise ValueError(f"a batch has {batch.num_rows} rows or missing values")
    return batch


def _is_compressed(message: memoryview) -> bool:
    """True if an Arrow message declares a compressed body, which could unpack to any size.

    pyarrow has no function for this. So this function reads two fields of the message's flatbuffer, which pyarrow has
    verified: Message.header, then RecordBatch.compression.
    """

    def number(layout: str, place: int) -> int:
        return int(struct.unpack_from(layout, message, place)[0])

    def field(table: int, index: int) -> int:
        """Position in the message of field `index` of the table at position `table`; 0 if the table lacks the field."""
        entries = table - number("<i", table)
        entry = 4 + 2 * index
        offset = number("<H", entries + entry) if entry < number("<H", entries) else 0
        return table + offset if offset else 0

    header = field(number("<I", 0), 2)
    return bool(header) and bool(field(header + number("<I", header), 3))


def _read_end(location: Location, size: int) -> tuple[bytes, bytes, memoryview]:
    """Read the end of a file. Returns the index, the Arrow footer (up to the end of the file), and all bytes read.

    The index holds the digests of the file's parts. Index and footer are checked against the digest that stands
    between them. Raises CorruptFileError.
    """
    tail = memoryview(b"")

    def last(count: int) -> memoryview:
        nonlocal tail
        if count > size:
            raise _unknown(location)
        if count > len(tail):
            (tail,) = location.read_ranges([(max(0, size - max(count, _FIRST_READ)), size)])
            if len(tail) < count:  # the file has become shorter since its size was read
                raise _unknown(location)
        return tail[-count:]

    footer_length, magic = _ARROW_END.unpack(last(_ARROW_END.size))
    if magic != _ARROW_MAGIC or footer_length < 0:
        raise _unknown(location)
    footer_size = footer_length + _ARROW_END.size
    digest, index_size, magic = _SEAL_END.unpack_from(last(footer_size + _SEAL_END.size))
    if magic != _SEAL_MAGIC:
        raise _unknown(location)
    end = last(index_size + _SEAL_END.size + footer_size)
    index, footer = bytes(end[:index_size]), bytes(end[-footer_size:])
    if sha256(index + footer).digest() != digest:
        raise damaged(location, "Its footer is not the one written")
    return index, footer, tail


def _unknown(location: Location) -> CorruptFileError:
    return CorruptFileError(
        f"{location.uri} has no seal at its end",
        "It is truncated, or was not written by datm_ray",
        f"Check the name. {_MEND}",
    )


def require_known(location: Location, version: int, known: int) -> None:
    """Raise a `CorruptFileError` if the version of a file's format is newer than the newest `known` one."""
    if version > known:
        raise CorruptFileError(
            f"{location.uri} has version {version} of its format; this program knows up to {known}",
            "It was written by a newer release",
            "Upgrade datm-ray",
        )


def _read_digest(file: BinaryIO, length: int) -> str:
    """Hexadecimal sha256 of the next `length` bytes."""
    digest = sha256()
    while length:
        chunk = file.read(min(length, _CHUNK))
        digest.update(chunk)
        length -= len(chunk)
    return digest.hexdigest()
