"""Files by path or URI: one `Location` type for local paths, file://, memory:// and s3:// URIs.

A file appears under its name whole or not at all, whatever happens to its writer. A file that cannot be opened, read
or written raises a `StoreError`, a file without valid JSON a `CorruptFileError`; both name the file without
credentials. This module does not know the content of files, except for the small JSON files of `write_json`.

S3 is configured as for s3fs and botocore: by AWS_ENDPOINT_URL, AWS_PROFILE, AWS_MAX_ATTEMPTS and others, and by
FSSPEC_S3_<ARGUMENT> for any argument of `s3fs.S3FileSystem`. The module `s3` holds what only S3 needs, and `local` what
only local files need.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace as replaced
from io import BytesIO
from tempfile import TemporaryFile, gettempdir
from typing import Any, BinaryIO, TypeVar

from fsspec import AbstractFileSystem, filesystem
from fsspec.core import url_to_fs
from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from datm_ray.errors import ClusterError, CorruptFileError, DatmError, StoreError, TransientStoreError
from datm_ray.store.files import local
from datm_ray.store.files.causes import (
    cause_and_remedy,
    is_beyond_the_end,
    lacks_bucket,
    may_pass,
    reason,
    without_credentials,
)
from datm_ray.store.files.traffic import request

T = TypeVar("T")

_MISSING = (FileNotFoundError, NotADirectoryError)
# Start of a URI, even of one without its slashes. Schemes of filesystems that wrap another one are left out.
_LIKE_URI = re.compile(r"(s3a?|gs|gcs|az|abfs|https?|hdfs|file|memory):(//)?", re.IGNORECASE)

LAG = 60
"""Seconds within which a file that one machine has written on a shared disk normally appears on all others."""


class AlreadyExistsError(StoreError):
    """A file that may be written only once exists already. The existing file was not changed."""


class MissingFileError(StoreError):
    """A file does not exist, or no longer exists."""


def unguarded() -> None:
    """Do nothing: the default `guard` of a `Location`, which allows every write."""


@dataclass(frozen=True)
class Location:
    """Local path or URI of a file or folder, which need not exist. Picklable; its `repr` has no credentials."""

    fs: AbstractFileSystem = field(repr=False)
    """Filesystem, connected with the credentials of the environment or of the URI."""

    path: str = field(repr=False)
    """Path of the file or folder within `fs`."""

    uri: str
    """Path or URI that messages and results show, without credentials."""

    guard: Callable[[], None] = field(default=unguarded, repr=False, compare=False)
    """Called just before a written file gets its name. If the call raises, an existing file stays as it is.

    Locations derived from this one have the same guard."""

    def __truediv__(self, name: str) -> Location:
        return replaced(self, path=f"{self.path.rstrip('/')}/{name}", uri=f"{self.uri.rstrip('/')}/{name}")

    @property
    def parent(self) -> Location:
        """Folder that contains this file or folder. A location without a parent, such as a bucket, gives itself."""
        path, uri = self.path.rstrip("/"), self.uri.rstrip("/")
        if "/" not in path:
            return self
        return replaced(self, path=path.rpartition("/")[0] or "/", uri=uri.rpartition("/")[0] or "/")

    @property
    def local_path(self) -> str | None:
        """Path on this machine's filesystem; `None` if the file is not local."""
        return self.path if isinstance(self.fs, LocalFileSystem) else None

    def exists(self) -> bool:
        """True if a file or folder exists here. Raises StoreError if the filesystem or server does not tell.

        A file that another machine has just written on a shared disk may seem missing for up to `LAG` seconds.
        """
        # Not fs.exists(): it also returns False if access is denied or the server does not answer.
        return self._unless_missing("look for", lambda: self.fs.info(self.path)) is not None

    def require_writable(self) -> None:
        """Raise StoreError if this local folder cannot be made or written, or if the object store does not answer.

        Nothing is written. In an object store only reading is tested, so a missing write permission shows later.
        """
        if self.local_path is None:
            self.exists()
            return
        nearest = os.path.abspath(self.local_path)
        while not os.path.lexists(nearest):
            nearest = os.path.dirname(nearest)
        if not os.path.isdir(nearest):
            raise StoreError(f"Cannot write {self.uri}", f"{nearest} is not a folder", "Give another path")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise StoreError(f"Cannot write {self.uri}", f"{nearest} is not writable for you", "Give another path")

    def size(self) -> int:
        """Size of the file in bytes. Raises StoreError if it is missing or a folder."""
        with self._asking("read"):
            found = self._ask(lambda: self.fs.info(self.path))
            if found["type"] == "directory":
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            return int(found["size"])

    def stamp(self) -> str:
        """Text that changes when the file is replaced, made of the file's metadata. Raises StoreError if missing."""
        with self._asking("read"):
            return str(self._ask(lambda: self.fs.ukey(self.path)))

    def list(self) -> Sequence[str]:
        """Sorted names of the files and folders in this folder; empty if the folder does not exist.

        Temporary files are left out, whether their writers are running or were killed.
        """
        return sorted(self._children(self._listed(detail=False)))

    def sizes(self) -> dict[str, int]:
        """Name -> size in bytes of each file in this folder but temporary ones; empty if the folder does not exist."""
        entries = {entry["name"]: entry for entry in self._listed(detail=True) if entry["type"] == "file"}
        return {name: int(entries[path]["size"]) for name, path in sorted(self._children(entries).items())}

    def _listed(self, *, detail: bool) -> Sequence[Any]:
        return self._unless_missing("list", lambda: self.fs.ls(self.path, detail=detail)) or []

    def _children(self, paths: Iterable[str]) -> dict[str, str]:
        """Direct children of this folder among the listed `paths`: name -> path. Temporary files are left out."""
        folder = self.path.rstrip("/")
        # Entries that are no children: ls() of a file lists the file, and ls() of some S3 folders lists the folder.
        split = ((path, path.rstrip("/").rpartition("/")) for path in paths)
        return {name: path for path, (parent, _, name) in split if parent == folder and not _is_temporary(name)}

    def read_bytes(self) -> bytes:
        """Content of the whole file. Raises MissingFileError if it does not exist, StoreError if it is unreadable."""
        with self.explaining("read"), request("read", self.uri) as moved:
            content = bytes(self._ask(lambda: self.fs.cat_file(self.path)))
            moved.bytes = len(content)
            return content

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> Sequence[memoryview]:
        """Bytes [start, end) of this file for each range; fewer if it ends sooner. Raises StoreError if unreadable.

        A local file is memory-mapped: nothing is copied, and each returned view keeps the file mapped. From a remote
        file only these ranges are fetched, all at once.
        """
        with self.explaining("read"), request("read", self.uri) as moved:
            if self.local_path is not None:
                content = local.content(self.local_path)
                chunks: Sequence[memoryview] = [content[start:end] for start, end in ranges]
            else:
                chunks = self._fetch(ranges)
            moved.bytes = sum(map(len, chunks))
            return chunks

    def _fetch(self, ranges: Sequence[tuple[int, int]]) -> Sequence[memoryview]:
        """Fetch ranges of a remote file. After a temporary failure, only the failed ranges are requested again."""
        found: dict[tuple[int, int], memoryview] = {}

        def fetch_rest() -> None:
            rest = [each for each in dict.fromkeys(ranges) if each not in found]
            starts, ends = [start for start, _ in rest], [end for _, end in rest]
            # Failures are returned, because raising the first one would lose the ranges that were fetched. fsspec
            # 2025.5 returns failures in any case.
            fetched = self.fs.cat_ranges([self.path] * len(rest), starts, ends, on_error="return")
            # A range may begin beyond the end, because the file was replaced by a shorter one.
            fetched = [b"" if isinstance(each, Exception) and is_beyond_the_end(each) else each for each in fetched]
            read = {each: chunk for each, chunk in zip(rest, fetched, strict=True) if not isinstance(chunk, Exception)}
            found.update((each, memoryview(chunk)) for each, chunk in read.items())
            if len(read) < len(rest):
                raise next(chunk for chunk in fetched if isinstance(chunk, Exception))

        self._ask(fetch_rest)
        return [found[each] for each in ranges]

    def read_json(self) -> Any:
        """Value in this JSON file. Raises MissingFileError if there is no file, CorruptFileError if it is not JSON."""
        try:
            return json.loads(self.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"{self.uri} is not valid JSON", str(error)) from error

    @contextmanager
    def create(self, *, replace: bool = True) -> Iterator[BinaryIO]:
        """Write the file atomically: yields an empty binary file, open for reading and writing.

        The content appears under the file's name when the block ends, and never if the block raises. On a local disk
        the content is flushed to the device first. Missing folders are made. By default an existing file is replaced.

        Raises:
            AlreadyExistsError: `replace` is False, and the file exists when the block ends. The existing file stays.
            StoreError: the file cannot be written.
        """
        with self.explaining("write"):
            draft: _Upload | local.LocalDraft = (
                _Upload(self) if self.local_path is None else local.LocalDraft(self.local_path)
            )
        try:
            yield draft.file
            with self.explaining("write"), request("write", self.uri) as moved:
                size = draft.file.seek(0, os.SEEK_END)
                try:
                    draft.commit(replace=replace, guard=self.guard)
                    moved.bytes = size
                except FileExistsError:
                    raise AlreadyExistsError(f"{self.uri} exists already") from None
        finally:
            draft.discard()

    def write_once(self, write: Callable[[BinaryIO], None]) -> bool:
        """Write the file atomically unless it exists. Returns True if this call stored it.

        Args:
            write: writes the content into an empty binary file; not called if the file exists already.
        """
        if self.exists():
            return False
        self.parent.remove_leftovers()
        try:
            with self.create(replace=False) as file:
                write(file)
        except AlreadyExistsError:  # another writer was faster
            return False
        return True

    @contextmanager
    def locked(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Lock this folder while the block runs, so that other processes that lock it wait. A missing folder is made.

        A process that dies unlocks the folder. This has no effect for folders that are not local, or whose filesystem
        has no locks.

        Args:
            on_wait: called once, if another process holds the lock, before waiting for it.
        """
        with nullcontext() if self.local_path is None else local.locked(self.local_path, on_wait):
            yield

    def link(self, source: Location) -> bool:
        """Make this location a hard link to the finished file `source`, so that both share their bytes on disk.

        Returns False if that is impossible: for example, this file exists, or the two are not on one local disk.
        """
        if self.local_path is None or source.local_path is None:
            return False
        try:
            os.makedirs(os.path.dirname(self.local_path), exist_ok=True)
            os.link(source.local_path, self.local_path)
        except OSError:
            return False
        return True

    def write_atomic(self, data: bytes) -> None:
        """Write or replace the whole file. A reader sees the old content or the new one, never a part."""
        with self.create() as file, self.explaining("write"):
            file.write(data)

    def write_text(self, text: str) -> None:
        """Write text as UTF-8, atomically; an existing file is replaced."""
        self.write_atomic(text.encode())

    def write_json(self, value: object) -> None:
        """Write a value as indented JSON, atomically; an existing file is replaced."""
        self.write_text(json.dumps(value, indent=2) + "\n")

    def remove(self) -> None:
        """Delete the file. Raises StoreError if it does not exist."""
        with self._asking("delete"):
            if self.local_path is None:
                self._ask(lambda: self.fs.info(self.path))  # object stores report no error for a missing file
            self._ask(lambda: self.fs.rm_file(self.path))

    def remove_leftovers(self) -> Sequence[str]:
        """Delete temporary files of killed writers in this folder, and return their names.

        Temporary files of running writers stay. Only local folders are cleaned. On S3, an unfinished upload of a file
        above 5 GiB leaves parts, which a lifecycle rule of the bucket can remove.
        """
        if self.local_path is None:
            return []
        with self.explaining("clean"):
            try:
                names = sorted(filter(_is_temporary, os.listdir(self.local_path)))
            except FileNotFoundError:
                return []
            return [name for name in names if local.remove_if_abandoned(os.path.join(self.local_path, name))]

    @contextmanager
    def _asking(self, action: str) -> Iterator[None]:
        """Turn errors in the block into StoreErrors "Cannot ACTION URI". Counts the block as one "look" request."""
        with self.explaining(action), request("look", self.uri):
            yield

    def _unless_missing(self, action: str, call: Callable[[], T]) -> T | None:
        """Return the result of `call`; `None` if the file or folder is missing. A missing bucket is an error."""
        with self._asking(action):
            try:
                return self._ask(call)
            except _MISSING as error:
                if lacks_bucket(error):
                    raise
            if self.local_path is not None:  # the client of a network disk may remember that the file was missing
                local.refresh(os.path.dirname(self.local_path))
                with suppress(*_MISSING):
                    return call()
            return None

    def _ask(self, call: Callable[[], T]) -> T:
        """Return the result of `call`, which sends a request. For S3, `call` is repeated after a temporary failure."""
        if not _is_s3(self.fs):
            return call()
        found: T = self.fs.patiently(self.path, call)
        return found

    @contextmanager
    def explaining(self, action: str) -> Iterator[None]:
        """Turn each exception in the block into a StoreError "Cannot ACTION URI", with its cause.

        The error is a MissingFileError if the file is missing, a TransientStoreError if another attempt may succeed.
        Errors of this package pass unchanged.
        """
        try:
            yield
        except DatmError:
            raise
        except Exception as error:  # each filesystem has its own errors; botocore's are not even OSErrors
            clearer = self.fs.clearer(error, self.path) if _is_s3(self.fs) else error
            is_missing = isinstance(error, FileNotFoundError) and not lacks_bucket(error)
            passes = self.fs.passes(error) if _is_s3(self.fs) else may_pass(error)
            kind = MissingFileError if is_missing else TransientStoreError if passes else StoreError
            cause, remedy = cause_and_remedy(clearer, action)
            if self.local_path is None and isinstance(error, OSError) and error.errno == errno.ENOSPC:
                cause += f" in {gettempdir()}, where uploads are prepared; TMPDIR names another folder"
            raise kind(f"Cannot {action} {self.uri}", cause, remedy) from error


def seconds_to_look(place: Location, limit: float) -> int:
    """Seconds for which a worker waits for a file that another machine wrote; 0 on S3, which shows files at once.

    Args:
        place: the file, or a folder on the same disk.
        limit: seconds without a step after which the worker counts as stuck. The result is a third of `limit`, rounded
            down, but at most `LAG`.
    """
    return int(min(LAG, limit / 3)) if place.local_path is not None else 0


def require_shared(look: Callable[[], bool], seconds: int, fact: str) -> None:
    """Raise a `ClusterError` unless `look`, called once a second, returns True within `seconds` seconds.

    The number of calls depends on their results alone, not on the clock. So `look` may be an operation that several
    workers must call together and equally often.

    Args:
        look: returns True if this machine sees what another machine has written, perhaps just now.
        seconds: time to wait for True; 0 to look once.
        fact: what is not seen, for the message.
    """
    for _ in range(seconds):
        if look():
            return
        time.sleep(1.0)
    if not look():
        raise ClusterError(
            fact,
            "the workers run on machines that do not share this disk",
            "give --out and --store on a shared file system or on s3://",
        )


def open_location(uri: str) -> Location:
    """Location of a local path, or of a file://, memory:// or s3:// URI, which need not exist.

    A text without "://" is a local path, unless it looks like a mistyped URI.

    Raises:
        StoreError: the text is empty or ambiguous, such as s3:/bucket; its scheme is unknown or needs a missing
            package; an s3:// URI holds credentials; or the URI asks for a cache of fsspec, such as simplecache::s3://.
    """
    shown = without_credentials(uri)
    scheme, separator, _ = uri.partition("://")
    if not uri:
        raise StoreError("The name of a folder or file is empty", remedy="Give a path or a URI")
    if scheme in ("s3", "s3a") and re.search("[:@]", uri.partition("://")[2].partition("/")[0]):
        raise StoreError(
            f"The URI {scheme}://{uri.rpartition('@')[2]} carries credentials",
            "They would end up in logs and records",
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, instead",
        )
    if _is_local(uri):
        return _local(uri)
    _require_one_meaning(uri)
    try:
        # Without the listings cache: files written by other processes must be seen at once.
        if scheme in ("s3", "s3a"):
            from datm_ray.store.files.s3 import S3  # imported here, because it takes a second

            fs, path = S3(use_listings_cache=False), S3._strip_protocol(uri)
        else:
            fs, path = url_to_fs(uri, use_listings_cache=False)
    except ImportError as error:
        raise StoreError(f"Cannot open {shown}", f"A Python package is missing: {error}") from error
    except ValueError as error:
        raise StoreError(f"Cannot open {shown}", reason(error), "Use a local path or an s3:// URI") from error
    except Exception as error:
        raise StoreError(f"Cannot open {shown}", *cause_and_remedy(error, "open")) from error
    if isinstance(fs, CachingFileSystem):
        raise StoreError(
            f"Cannot open {shown}",
            "fsspec's caches show files that another process is still fetching, and cannot write a file just once",
            "Leave the cache out of the URI and set DATM_RAY_CACHE to a local folder instead",
        )
    return Location(fs, path, shown if separator else path)


def _is_local(uri: str) -> bool:
    """True if a text is a local path: it is no URI, and it does not look like a mistyped one."""
    if uri.startswith(("/", "./", "../", "~")):
        return True
    return "://" not in uri and not _LIKE_URI.match(uri) and uri.partition("::")[0] not in known_implementations


def _require_one_meaning(uri: str) -> None:
    """Raise StoreError for a mistyped URI, for "::" (a chain in fsspec), or on S3 "?versionId=" or control codes."""
    shown = without_credentials(uri)
    if not (like := _LIKE_URI.match(uri)):
        return
    scheme = like[1].lower()
    if like[0] != f"{scheme}://":
        uri = f"{scheme}://{'/' if scheme == 'file' else ''}{shown[like.end() :].lstrip(':/')}"
        raise StoreError(
            f"{shown!r} is not a URI",
            "a URI has a scheme in small letters and two slashes",
            f"write {uri}, or ./{shown} for a local path of that name",
        )
    if scheme == "file" and not uri.startswith("file:///"):
        raise StoreError(
            f"{shown!r} is not the URI of a local path",
            "a machine's name would come after file://",
            "write file:///folder, or a path",
        )
    if scheme in ("s3", "s3a") and re.search(r"\?versionId=|[\x00-\x1f\x7f]", uri):
        raise StoreError(
            f"cannot open {shown!r}",
            "'?versionId=' and control characters are no part of a name for s3fs",
            "give a name without them",
        )
    if "::" in uri:
        raise StoreError(f"cannot open {shown}", "'::' stands between filesystems", "give a name without it")


def _local(path: str) -> Location:
    """Location of a local path, which is made absolute."""
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    path = os.path.join(os.getcwd(), os.path.expanduser(path) if path not in ("", ".") else "").rstrip("/") or "/"
    return Location(filesystem("file", use_listings_cache=False), path, path)


class _Upload:
    """Temporary local file, which `commit` uploads whole. Object stores show an upload whole or not at all."""

    def __init__(self, location: Location) -> None:
        self._location = location
        try:
            self.file: BinaryIO = TemporaryFile()  # noqa: SIM115 - closed by `discard`
        except OSError:  # a container may have no folder for temporary files
            self.file = BytesIO()

    def commit(self, *, replace: bool, guard: Callable[[], None]) -> None:
        location = self._location
        if _is_s3(location.fs):
            location.fs.put(location.path, self.file, replace=replace, guard=guard)
        else:
            guard()
            self.file.seek(0)
            location.fs.pipe_file(location.path, self.file.read(), mode="overwrite" if replace else "create")

    def discard(self) -> None:
        self.file.close()


def _is_s3(fs: AbstractFileSystem) -> bool:
    return "s3" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _is_temporary(name: str) -> bool:
    return name.startswith(local.TEMPORARY)
