"""Local files: atomic drafts, removal of files left by killed writers, locks, memory mapping, and free space.

Some filesystems lack a safeguard: CIFS and shared folders of virtual machines cannot flush, FAT has no hard links, some
network mounts have no locks, and some FUSE mounts cannot map. Files are still written and read there, without the
safeguard. An input/output error of a device is always reported.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp-"
"""Prefix of the names of temporary files, which are being written or whose writer was killed."""

_ABANDONED_AFTER = 24 * 3600.0  # seconds until a temporary file of another machine counts as abandoned
_LACKING = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # errors of unsupported calls
_NO_LINKS = _LACKING | {errno.EPERM, errno.EMLINK}
_NO_MAPPING = _LACKING | {errno.ENODEV, errno.EACCES, errno.EPERM}
_ATTEMPTS = 10  # attempts to make a folder and a file in it


class LocalDraft:
    """Temporary file beside `path`, which `commit` renames to `path`. Locked while its writer lives."""

    def __init__(self, path: str) -> None:
        self._target = path
        self._folder, name = os.path.split(path)
        while True:
            unique = f"{TEMPORARY}{socket.gethostname()}-{uuid.uuid4().hex}-{name}"
            self._temporary = os.path.join(self._folder, unique)
            descriptor = _open_in(self._folder, self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            self.file: BinaryIO = os.fdopen(descriptor, "w+b")
            # The kernel drops the lock when the writer dies in any way, so an unlocked file is a leftover. On
            # network filesystems without locks, leftovers stay.
            with suppress(OSError):
                _lock(descriptor, wait=True)
            # A race: `remove_if_abandoned` in another process can lock and unlink the file between its creation and
            # our lock. The file then has no name, so another one is made.
            if os.path.lexists(self._temporary):
                return
            self.file.close()

    def commit(self, *, replace: bool, guard: Callable[[], None]) -> None:
        """Flush the file to the device, then give it its name.

        Args:
            replace: True to replace an existing file of this name; False to keep it.
            guard: called between flush and naming. If it raises, an existing file is kept.

        Raises:
            FileExistsError: `replace` is False and the name exists.
        """
        self.file.flush()
        _flush(self.file.fileno())
        guard()
        if replace:
            os.replace(self._temporary, self._target)
        else:
            self._link()
        try:
            folder = os.open(self._folder, os.O_RDONLY)
        except PermissionError:  # the folder is writable but not readable
            return
        try:
            _flush(folder)
        finally:
            os.close(folder)

    def _link(self) -> None:
        """Give the file its name unless the name exists. link() tests and names the file in one step."""
        try:
            os.link(self._temporary, self._target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # No hard links here. A race: if two writers both find the name free, the later one replaces the
            # earlier one's file. Both files are whole.
            if os.path.exists(self._target):
                raise FileExistsError(self._target) from None
            os.replace(self._temporary, self._target)

    def discard(self) -> None:
        """Remove the temporary name if it still exists, and close the file, which ends the lock."""
        with suppress(OSError):
            os.unlink(self._temporary)
        with suppress(OSError):  # the disk may be full; `commit` has flushed a committed file
            self.file.close()


def _open_in(folder: str, path: str, flags: int) -> int:
    """Open `path`, a file in `folder` or `folder` itself, and return its descriptor. Missing folders are made.

    A command that ends removes the empty folders that it made. If another command removes this folder before `path` is
    opened, the folder is made again, and opening is repeated.
    """
    for _ in range(_ATTEMPTS - 1):
        with suppress(FileNotFoundError, FileExistsError):  # `os.makedirs` raises both if a folder goes away
            os.makedirs(folder, exist_ok=True)
            return os.open(path, flags, 0o666)
    os.makedirs(folder, exist_ok=True)
    return os.open(path, flags, 0o666)


def refresh(folder: str) -> None:
    """Make this machine ask the disk again which files a folder has, and whether the folder exists.

    The client of a network disk may remember for a minute that a file is missing. Reading the folder makes it ask.
    """
    try:
        with os.scandir(folder) as entries:
            next(entries, None)
    except OSError:
        parent = os.path.dirname(folder)
        if parent != folder and not os.path.lexists(folder):
            refresh(parent)


def _lock(descriptor: int, *, wait: bool) -> None:
    """Lock a file until it is closed.

    Raises:
        OSError: another process holds the lock and `wait` is False, or locks are not supported, as on Windows.
    """
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOTSUP, "no file locks") from None
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextmanager
def locked(folder: str, on_wait: Callable[[], None]) -> Iterator[None]:
    """Lock a folder while the block runs, so that other processes that lock it wait.

    Has no effect if the filesystem has no locks. `on_wait` is called before waiting for another process.
    """
    descriptor = _open_in(folder, folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                _lock(descriptor, wait=False)
            except BlockingIOError:
                on_wait()
                _lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _flush(descriptor: int) -> None:
    """Flush a file or folder to the device, if its filesystem supports that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _LACKING:
            raise


def remove_if_abandoned(path: str) -> bool:
    """Delete a temporary file if its writer is dead. Returns True if the file was deleted.

    The writer is dead if the file is not locked and, for a file of another machine, is at least 24 hours old.
    """
    try:
        with open(path, "r+b") as file:
            _lock(file.fileno(), wait=False)
            # Other machines may not see a lock (NFS can be mounted with local locks), so a file of another machine
            # must also be old.
            here = os.path.basename(path).startswith(f"{TEMPORARY}{socket.gethostname()}-")
            if not here and time.time() - os.fstat(file.fileno()).st_mtime < _ABANDONED_AFTER:
                return False
            os.unlink(path)
            return True
    except OSError:  # locked by its writer, already gone, or not ours to delete
        return False


def content(path: str) -> memoryview:
    """Content of a file: memory-mapped if its filesystem supports that, otherwise read.

    If another program truncates the file in place while it is mapped, the system ends this process with SIGBUS. This
    package never truncates: it replaces or deletes files, which leaves a mapping intact.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
            return memoryview(b"")
        try:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            if error.errno not in _NO_MAPPING:
                raise
            return memoryview(file.read())


def nearest(path: str) -> Path:
    """The path itself if it exists, otherwise its nearest parent folder that exists."""
    return next(each for each in (Path(path), *Path(path).parents) if each.exists())


def free_space(path: str) -> float:
    """Free bytes of the disk that holds a path, or that would hold it; infinite if the system does not tell.

    Some network disks report a size of 0 bytes, and others an error.
    """
    with suppress(OSError):
        disk = shutil.disk_usage(nearest(path))
        if disk.total > 0:
            return disk.free
    return math.inf
