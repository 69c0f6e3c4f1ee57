"""Pieces of remote files kept on a local disk, so that a store elsewhere sends each snapshot once.

Off unless the environment names a folder: DATM_RAY_CACHE=/local/folder, and DATM_RAY_CACHE_GIB=10 for its size.
A piece is named by the sha256 of its content, which the file it belongs to tells. So an entry can be neither stale
nor somebody else's, a damaged one is noticed and fetched anew, and any number of processes and stores may share a
folder: entries appear whole, by a rename. A folder that cannot be written is no cache, and no error either.
"""

from __future__ import annotations

import os
import re
import uuid
from contextlib import suppress
from functools import cache
from hashlib import sha256

from datm_ray.errors import StoreError

FOLDER, SIZE = "DATM_RAY_CACHE", "DATM_RAY_CACHE_GIB"

_DEFAULT_SIZE = "10"  # GiB
_SWEEP = 0.05  # share of the size that a process may write between two sweeps of the folder
_ENTRY = re.compile(r"[0-9a-f]{64}|\.tmp-[0-9a-f]{32}")  # nothing else in the folder is touched


class Cache:
    """Folder of pieces with a limited size: the least recently used pieces are dropped first."""

    def __init__(self, folder: str, size: int) -> None:
        """`size` in bytes; each process that writes may exceed it by a twentieth for a while."""
        self._folder, self._size = folder, size
        self._unseen: float = size  # bytes written since the last sweep; the first write sweeps

    def get(self, digest: str) -> memoryview | None:
        """The piece with this sha256, checked; None where it is not there."""
        path = os.path.join(self._folder, digest)
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError:
            return None
        with suppress(OSError):  # another user's entry is readable, but its time cannot be set
            os.utime(path)  # marks the entry as just used
        return memoryview(content) if sha256(content).hexdigest() == digest else None

    def put(self, digest: str, content: memoryview) -> None:
        """Keep the piece with this sha256, and drop old ones where there are too many."""
        temporary = os.path.join(self._folder, f".tmp-{uuid.uuid4().hex}")
        with suppress(OSError):  # a full disk, for example: a run works without the cache
            try:
                os.makedirs(self._folder, exist_ok=True)
                with open(temporary, "wb") as file:
                    file.write(content)
                os.replace(temporary, os.path.join(self._folder, digest))
            except OSError:
                os.unlink(temporary)
            self._unseen += len(content)
            if self._unseen > _SWEEP * self._size:
                self._sweep()

    def _sweep(self) -> None:
        """Drop what was not used for longest until the rest fits. Others may do the same at the same time."""
        self._unseen = 0
        entries = []
        for entry in os.scandir(self._folder):
            if _ENTRY.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    entries.append((status.st_mtime_ns, status.st_size, entry.path))
        excess = sum(size for _, size, _ in entries) - self._size
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            with suppress(FileNotFoundError):
                os.unlink(path)
            excess -= size


def configured_cache() -> Cache | None:
    """The cache that the environment names, if it names one. Raises StoreError where its size is no size."""
    folder = os.environ.get(FOLDER)
    return _cache(os.path.abspath(folder), os.environ.get(SIZE, _DEFAULT_SIZE)) if folder else None


@cache
def _cache(folder: str, gibibytes: str) -> Cache:
    """One for each folder, because a cache counts what it writes."""
    try:
        size = int(float(gibibytes) * 2**30)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise StoreError(
            f"{SIZE} is {gibibytes!r}", "It is not a size in GiB", f"Give a number above 0, such as {SIZE}=10"
        )
    return Cache(folder, size)
