"""Local disk cache for byte ranges of remote files (record batches), so that each is fetched only once.

The cache is off by default. DATM_RAY_CACHE=/local/folder turns it on. DATM_RAY_CACHE_GIB=20 sets its size in GiB; the
default is 10. An entry is named by the sha256 of its content, which the remote file states. So an entry is never stale,
and a damaged entry is detected and fetched again. Processes and stores can share a folder, because a rename makes each
entry appear whole. If the folder cannot be written, nothing is cached, and no error is raised.
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
_SWEEP = 0.05  # share of the cache size that a process may write between two sweeps of the folder
_ENTRY = re.compile(r"[0-9a-f]{64}|\.tmp-[0-9a-f]{32}")  # other files in the folder are never deleted


class Cache:
    """Local folder that caches byte ranges of remote files, within a limited size; the least recently used go first."""

    def __init__(self, folder: str, size: int) -> None:
        """Open a cache of `size` bytes, more than 0, in a folder, which need not exist.

        A process deletes the excess each time it has written a twentieth of `size`; until then the folder is larger.
        """
        self._folder, self._size = folder, size
        self._unseen: float = size  # bytes written since the last sweep; starts large, so that the first write sweeps

    def get(self, digest: str) -> memoryview | None:
        """Content whose sha256 in hex digits is `digest`; `None` if the entry is missing, unreadable or damaged."""
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
        """Store content under `digest`, which must be its sha256 in hex digits. Disk errors are ignored.

        Whenever a twentieth of the cache size was written, the least recently used entries beyond it are deleted.
        """
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
        """Delete the least recently used entries beyond the cache size. Several processes may do this at once."""
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
    """Cache in the folder that the environment variable DATM_RAY_CACHE names; `None` if it is not set.

    Raises StoreError if the environment variable DATM_RAY_CACHE_GIB is set to something else than a size above 0.
    """
    folder = os.environ.get(FOLDER)
    return _cache(os.path.abspath(folder), os.environ.get(SIZE, _DEFAULT_SIZE)) if folder else None


@cache
def _cache(folder: str, gibibytes: str) -> Cache:
    """Open a cache, or return the one that this process has already opened with the same arguments.

    If a process had two caches of one folder, each would count only its own bytes, and the folder could grow larger.
    `gibibytes` is the cache size as text. Raises StoreError if it is no number above 0.
    """
    try:
        size = int(float(gibibytes) * 2**30)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise StoreError(
            f"{SIZE} is {gibibytes!r}", "It is not a size in GiB", f"Give a number above 0, such as {SIZE}=10"
        )
    return Cache(folder, size)
