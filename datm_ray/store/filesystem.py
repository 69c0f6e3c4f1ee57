"""Places to keep files: one `Location` type for local paths, file://, memory:// and s3:// URIs.

A file appears under its name whole or not at all, whatever happens to its writer, and every failure is a
`StoreError` that names the place without its credentials. What a file contains is not known here, except for
the small JSON files of `write_json`.

S3 is configured as s3fs and botocore are: AWS_ENDPOINT_URL, AWS_PROFILE, AWS_MAX_ATTEMPTS and the like, and
FSSPEC_S3_<ARGUMENT> for any argument of `s3fs.S3FileSystem`. They also retry what fails for the moment: five
attempts by botocore, and five times those by s3fs where the connection broke in mid-answer or the server answered
5xx. A server that cannot be reached at all is given up after botocore's five, less than a minute; one that takes
requests and never answers, after five times five read timeouts, some six minutes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import re
import socket
import time
import uuid
from asyncio import Task, current_task
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, BinaryIO, Protocol
from weakref import WeakKeyDictionary

from fsspec import AbstractFileSystem, filesystem
from fsspec.core import url_to_fs
from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from datm_ray.errors import CorruptFileError, DatmError, StoreError
from datm_ray.store.traffic import count_retry, request

# Of filesystems that do not lie upon another one, with or without the slashes.
_LIKE_URI = re.compile(r"(s3a?|gs|gcs|az|abfs|https?|hdfs|file|memory):(//)?", re.IGNORECASE)
_TEMPORARY = ".tmp-"
_WRITER = "datm-ray-writer"
_CONFLICTS = 5  # times that S3 may ask to repeat an upload because of another one at the same moment
_ABANDONED_AFTER = 24 * 3600.0  # seconds; for temporary files of other machines
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]*@")


class AlreadyExistsError(StoreError):
    """A put-once file is there already; it was left as it is."""


@dataclass(frozen=True)
class Location:
    """A file or folder, which need not exist. Small, picklable, and safe to print."""

    fs: AbstractFileSystem = field(repr=False)
    """The filesystem, connected with the credentials of the environment or of the URI."""

    path: str = field(repr=False)
    """The name of the file or folder within `fs`."""

    uri: str
    """The name shown in messages and records, without credentials."""

    def __truediv__(self, name: str) -> Location:
        return Location(self.fs, f"{self.path.rstrip('/')}/{name}", f"{self.uri.rstrip('/')}/{name}")

    @property
    def parent(self) -> Location:
        """The folder that this file or folder is in; itself where it is in none, as a bucket is."""
        path, uri = self.path.rstrip("/"), self.uri.rstrip("/")
        if "/" not in path:
            return self
        return Location(self.fs, path.rpartition("/")[0] or "/", uri.rpartition("/")[0] or "/")

    @property
    def local_path(self) -> str | None:
        """The path on this machine's filesystem, or None where the file is elsewhere."""
        return self.path if isinstance(self.fs, LocalFileSystem) else None

    def exists(self) -> bool:
        """Whether there is a file or folder. Raises StoreError where that cannot be found out."""
        # Not fs.exists(): it also answers False where access is denied or the server does not answer.
        with self._asking("look for"):
            try:
                self.fs.info(self.path)
            except (FileNotFoundError, NotADirectoryError) as error:
                if _lacks_bucket(error):
                    raise
                return False
            return True

    def require_writable(self) -> None:
        """Raise StoreError where a local folder cannot be made or written, or another place does not answer.

        Elsewhere nothing is written: bucket, network and the right to look are tried, the right to write is not.
        """
        if self.local_path is None:
            self.exists()
            return
        nearest = os.path.abspath(self.local_path)
        while not os.path.lexists(nearest):
            nearest = os.path.dirname(nearest)
        if not os.path.isdir(nearest):
            raise StoreError(f"Cannot write {self.uri}", f"{nearest} is not a folder", "Give another place")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise StoreError(f"Cannot write {self.uri}", f"{nearest} is not yours to write", "Give another place")

    def size(self) -> int:
        """Size of the file in bytes."""
        with self._asking("read"):
            return int(self.fs.info(self.path)["size"])

    def list(self) -> Sequence[str]:
        """Sorted names of the files and folders in this folder; none where it is missing.

        Temporary files of writers at work, or of killed ones, are left out.
        """
        folder = self.path.rstrip("/")
        with self._asking("list"):
            try:
                paths = self.fs.ls(self.path, detail=False)
            except (FileNotFoundError, NotADirectoryError) as error:
                if _lacks_bucket(error):
                    raise
                return []
        # ls() of a file gives the file itself, and of some S3 folders the folder too: neither is a child.
        children = (path.rstrip("/").rpartition("/") for path in paths)
        return sorted(name for parent, _, name in children if parent == folder and not _is_temporary(name))

    def read_bytes(self) -> bytes:
        """The whole file."""
        with self.explaining("read"), request("read") as moved:
            self._watch()
            content = bytes(self.fs.cat_file(self.path))
            moved.bytes = len(content)
            return content

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> Sequence[memoryview]:
        """The bytes [start, end) of each range; shorter where the file ends sooner.

        Local files are memory-mapped: nothing is copied, and a view keeps its file mapped. Elsewhere only
        these ranges are fetched, all at once.
        """
        with self.explaining("read"), request("read") as moved:
            if self.local_path is not None:
                content = _map(self.local_path)
                chunks = [content[start:end] for start, end in ranges]
            else:
                self._watch()
                starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
                fetched = self.fs.cat_ranges([self.path] * len(ranges), starts, ends, on_error="raise")
                failure = next((chunk for chunk in fetched if isinstance(chunk, Exception)), None)
                if failure is not None:  # fsspec 2025.5, for one, returns it whatever on_error is
                    raise failure
                chunks = [memoryview(chunk) for chunk in fetched]
            moved.bytes = sum(map(len, chunks))
            return chunks

    def read_json(self) -> Any:
        """The value written by `write_json`. Raises CorruptFileError if the file is not JSON."""
        try:
            return json.loads(self.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CorruptFileError(f"{self.uri} is not valid JSON", str(error)) from error

    @contextmanager
    def create(self, *, replace: bool = True) -> Iterator[BinaryIO]:
        """Write the file atomically: yields an empty binary file, open for reading and writing.

        The content appears under this name when the block ends, and not at all if it raises. On a local disk
        it is flushed to the device by then. Missing folders are made.

        Raises:
            AlreadyExistsError: `replace` is false and the file is there when the block ends; it stays.
        """
        with self.explaining("write"):
            draft = _Upload(self) if self.local_path is None else _LocalDraft(self.local_path)
        try:
            yield draft.file
            with self.explaining("write"), request("write") as moved:
                size = draft.file.seek(0, os.SEEK_END)
                try:
                    self._watch()
                    draft.commit(replace=replace)
                    moved.bytes = size
                except FileExistsError:
                    raise AlreadyExistsError(f"{self.uri} exists already") from None
        finally:
            draft.discard()

    def link(self, source: Location) -> bool:
        """Give a finished file this second name, without a second copy of its bytes.

        False, and nothing is done, where that cannot be: the two are not on one local disk, or the name is taken.
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
        """Write or replace the whole file; a reader sees the old content or the new, never a part."""
        with self.create() as file, self.explaining("write"):
            file.write(data)

    def write_text(self, text: str) -> None:
        """`write_atomic` of UTF-8 text."""
        self.write_atomic(text.encode())

    def write_json(self, value: object) -> None:
        """`write_atomic` of indented JSON."""
        self.write_text(json.dumps(value, indent=2) + "\n")

    def remove(self) -> None:
        """Delete the file. Raises StoreError if it is not there."""
        with self._asking("delete"):
            if self.local_path is None:
                self.fs.info(self.path)  # object stores delete what is not there without a word
            self.fs.rm_file(self.path)

    def remove_leftovers(self) -> Sequence[str]:
        """Delete the temporary files that killed writers left in this folder, and return their names.

        Those of writers still at work stay. Nothing to do but for local folders: what an upload in parts leaves
        behind (of files from 100 MB on) no listing shows, and a rule of the bucket must remove.
        """
        if self.local_path is None:
            return []
        with self.explaining("clean"):
            try:
                names = sorted(filter(_is_temporary, os.listdir(self.local_path)))
            except FileNotFoundError:
                return []
            return [name for name in names if _remove_if_abandoned(os.path.join(self.local_path, name))]

    @contextmanager
    def _asking(self, action: str) -> Iterator[None]:
        """`explaining`, for a request that moves no content."""
        with self.explaining(action), request("look"):
            self._watch()
            yield

    def _watch(self) -> None:
        """Count what is sent to S3 again, by botocore or by s3fs; may connect."""
        if _is_s3(self.fs):
            self.fs.s3.meta.events.register("before-send.s3", _notice_retry, unique_id="datm-ray")

    @contextmanager
    def explaining(self, action: str) -> Iterator[None]:
        """Turn whatever the filesystem raises in the block into a StoreError: "Cannot <action> <uri>"."""
        try:
            yield
        except DatmError:
            raise
        except Exception as error:  # each filesystem has its own errors; botocore's are not even OSErrors
            raise StoreError(f"Cannot {action} {self.uri}", *_cause_and_remedy(error)) from error


def open_location(uri: str) -> Location:
    """The place named by a local path or by a file://, memory:// or s3:// URI. It need not exist.

    A text without "://" is a local path, whatever else is in it.

    Raises:
        StoreError: an unknown scheme, a missing package, credentials in an s3:// URI, one of fsspec's caches, or a
            text that could be read in two ways.
    """
    shown = _without_credentials(uri)
    scheme, separator, _ = uri.partition("://")
    if not uri:
        raise StoreError("The name of a folder or file is empty", remedy="Give a path or a URI")
    if scheme in ("s3", "s3a") and shown != uri:
        raise StoreError(
            f"The URI {shown} carries credentials",
            "They would end up in logs and records",
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, instead",
        )
    if _is_local(uri):
        return _local(uri)
    _require_one_meaning(uri)
    try:
        # Without the listings cache: files written by other processes must be seen at once.
        fs, path = url_to_fs(uri, use_listings_cache=False)
    except ImportError as error:
        raise StoreError(f"Cannot open {shown}", f"A Python package is missing: {error}") from error
    except ValueError as error:
        raise StoreError(f"Cannot open {shown}", _reason(error), "Use a local path or an s3:// URI") from error
    except Exception as error:
        raise StoreError(f"Cannot open {shown}", *_cause_and_remedy(error)) from error
    if isinstance(fs, CachingFileSystem):
        raise StoreError(
            f"Cannot open {shown}",
            "fsspec's caches show files that another process is still fetching, and cannot write a file just once",
            "Leave the cache out of the URI and set DATM_RAY_CACHE to a local folder instead",
        )
    if _is_s3(fs):
        _retry_server_errors()
    return Location(fs, path, shown if separator else path)


def _is_local(uri: str) -> bool:
    """Whether a text is a path on this machine, and neither a URI nor something that was meant as one."""
    if uri.startswith(("/", "./", "../", "~")):
        return True
    return "://" not in uri and not _LIKE_URI.match(uri) and uri.partition("::")[0] not in known_implementations


def _require_one_meaning(uri: str) -> None:
    """Refuse what looks like a URI and is none, and what fsspec would read as a chain of filesystems and is none."""
    shown = _without_credentials(uri)
    if not (like := _LIKE_URI.match(uri)):
        return
    scheme = like[1].lower()
    if like[0] != f"{scheme}://":
        uri = f"{scheme}://{'/' if scheme == 'file' else ''}{shown[like.end() :].lstrip(':/')}"
        raise StoreError(
            f"{shown!r} is no URI",
            "a URI has a scheme in small letters and two slashes",
            f"write {uri}, or ./{shown} for a local place of that name",
        )
    if scheme == "file" and not uri.startswith("file:///"):
        raise StoreError(
            f"{shown!r} is no URI of a local place",
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
    """The place of a local path, made absolute."""
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    path = os.path.join(os.getcwd(), os.path.expanduser(path) if path not in ("", ".") else "").rstrip("/") or "/"
    return Location(filesystem("file", use_listings_cache=False), path, path)


class _Draft(Protocol):
    """A file being written, not yet visible under its name."""

    file: BinaryIO

    def commit(self, *, replace: bool) -> None: ...

    def discard(self) -> None: ...


class _LocalDraft:
    """A temporary file in the target's own folder, locked while its writer lives."""

    def __init__(self, path: str) -> None:
        self._target = path
        self._folder, name = os.path.split(path)
        os.makedirs(self._folder, exist_ok=True)
        while True:
            unique = f"{_TEMPORARY}{socket.gethostname()}-{uuid.uuid4().hex}-{name}"
            self._temporary = os.path.join(self._folder, unique)
            descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            self.file = os.fdopen(descriptor, "w+b")
            # The kernel drops the lock when the writer dies, however it dies: that is how leftovers are told
            # from files in work. Some network filesystems have no locks; there leftovers stay.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # The race: a cleaner can lock and unlink the file between its creation and our lock. It has no
            # name then, and writing it would lead nowhere.
            if os.fstat(descriptor).st_nlink:
                return
            self.file.close()

    def commit(self, *, replace: bool) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        if replace:
            os.replace(self._temporary, self._target)
        else:
            self._link()
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _link(self) -> None:
        """Put the file under its name unless the name is taken: link() tests and names in one step."""
        try:
            os.link(self._temporary, self._target)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            # No hard links here (FAT, some network filesystems). The race: of two writers that both find the
            # name free, the later one replaces the earlier one's file. Both files are whole.
            if os.path.exists(self._target):
                raise FileExistsError(self._target) from None
            os.replace(self._temporary, self._target)

    def discard(self) -> None:
        """Remove the temporary name, if it is still there, and close the file (which ends the lock)."""
        with suppress(OSError):
            os.unlink(self._temporary)
        with suppress(OSError):  # the disk may be full; what counts was flushed by commit
            self.file.close()


class _Upload:
    """A file kept in memory, then uploaded in one piece: object stores show that whole or not at all."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._content = BytesIO()
        self.file: BinaryIO = self._content
        # Only S3 is told who writes: of the others fsspec does not know how, nor whether it repeats a request.
        self._writer = uuid.uuid4().hex if _is_s3(location.fs) else None

    def commit(self, *, replace: bool) -> None:
        for _ in range(_CONFLICTS):
            if self._try(replace=replace):
                return
            count_retry()
        raise OSError(errno.EBUSY, "Others write it again and again at the same moment")

    def _try(self, *, replace: bool) -> bool:
        """Upload; False where S3 asks to do it again because of another upload at the same moment."""
        try:
            self._put(replace=replace)
        except Exception as error:
            if self._writer is None:
                raise
            # An upload whose answer was lost is sent again, and then finds itself there already, or its parts gone.
            # So whatever the error says, what counts is whose upload lies there now.
            owner = self._owner()
            if owner == self._writer:
                return True
            if owner is not None and not replace:
                raise FileExistsError(self._location.path) from None
            if _code(error) != "ConditionalRequestConflict":
                raise
            return False
        return True

    def _put(self, *, replace: bool) -> None:
        location = self._location
        mode = "overwrite" if replace else "create"
        marked = {"Metadata": {_WRITER: self._writer}} if self._writer else {}
        location.fs.pipe_file(location.path, self._content.getvalue(), mode=mode, **marked)

    def _owner(self) -> str | None:
        """Who wrote the file that is there, "" if that is not said; None where there is none or it is not told."""
        try:
            return str(self._location.fs.metadata(self._location.path, refresh=True).get(_WRITER, ""))
        except Exception:  # the error of the upload is the one to report
            return None

    def discard(self) -> None:
        self._content.close()


def _is_s3(fs: AbstractFileSystem) -> bool:
    return "s3" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


_sent: WeakKeyDictionary[Task[Any], set[tuple[str, ...]]] = WeakKeyDictionary()
"""For every request in work, what was sent for it."""


def _notice_retry(request: Any, **_: Any) -> None:
    """Called by botocore with every message it is about to send, in the asyncio task of the request.

    A task asks for one thing at a time, so what it sends a second time is a retry: by botocore, or by s3fs, which
    repeats what broke in mid-answer without telling anybody.
    """
    task = current_task()
    if task is None:
        return
    message = (request.method, request.url, str(request.headers.get("Range", "")))
    sent = _sent.setdefault(task, set())
    if message in sent:
        count_retry()
    sent.add(message)


def _retry_server_errors() -> None:
    """Let s3fs retry all of a server's own failures; by itself it repeats 503 only where the server says SlowDown.

    Before 2026.2 it cannot be told; a failure that it does not repeat then costs a task an attempt.
    """
    from s3fs import core

    if not hasattr(core, "CUSTOM_ERROR_HANDLER"):
        return
    earlier = core.CUSTOM_ERROR_HANDLER
    if not hasattr(earlier, "retries_server_errors"):

        def handler(error: Exception) -> bool:
            response = getattr(error, "response", None) or {}
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return status in (500, 502, 503, 504) or bool(earlier(error))

        handler.retries_server_errors = True  # type: ignore[attr-defined]
        core.set_custom_error_handler(handler)


def _code(error: BaseException | None) -> str:
    """The code that an S3 server gave for an error, such as "NoSuchBucket"; "" where there is none."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__ or error.__context__
    return ""


def _lacks_bucket(error: Exception) -> bool:
    """Whether S3 answered that the bucket is missing; s3fs says so of a file too, but then without S3's answer."""
    return _code(error) in ("NoSuchBucket", "404")


def _is_temporary(name: str) -> bool:
    return name.startswith(_TEMPORARY)


def _remove_if_abandoned(path: str) -> bool:
    """Delete a temporary file if its writer is dead; whether it did."""
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Locks are certain only among processes of one machine (NFS can be mounted with local ones), so a
            # file of another machine must also have been left alone for long.
            here = os.path.basename(path).startswith(f"{_TEMPORARY}{socket.gethostname()}-")
            if not here and time.time() - os.fstat(file.fileno()).st_mtime < _ABANDONED_AFTER:
                return False
            os.unlink(path)
            return True
    except OSError:  # locked by its writer, already gone, or not ours to delete
        return False


def _map(path: str) -> memoryview:
    """The content of a local file, memory-mapped.

    As with any mapping, a file that another program truncates in place while it is read ends this process
    with SIGBUS. Nothing here does that: files are replaced or deleted, and a mapping outlives both.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _cause_and_remedy(error: Exception) -> tuple[str, str]:
    names = {kind.__name__ for kind in type(error).__mro__}
    if _lacks_bucket(error):
        return "The bucket does not exist", "Check its spelling and AWS_ENDPOINT_URL, or create it"
    if isinstance(error, FileNotFoundError):
        return "It, or its folder or bucket, does not exist", "Check the spelling"
    if isinstance(error, PermissionError):
        return f"Access is denied ({_reason(error)})", "Check the owner of the folder, or the credentials"
    if names & {"HTTPClientError", "ConnectionError"}:
        return f"The server does not answer ({_reason(error)})", "Check the network and AWS_ENDPOINT_URL"
    if names & {"NoCredentialsError", "PartialCredentialsError"}:
        return "No credentials were found", "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _reason(error), "Free some space and start again; nothing finished is lost"
    return _reason(error), ""


def _reason(error: Exception) -> str:
    """The error in words, on one line and without credentials."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return _without_credentials(" ".join(words.split())) or type(error).__name__


def _without_credentials(text: str) -> str:
    return _CREDENTIALS.sub("", text)
