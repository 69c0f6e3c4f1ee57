"""Find the data files below a folder or in a zip archive, by one rule for all sources.

Hidden files and folders are left out. Links are followed, except to a folder above, and each file is taken once.
Left-out files are counted and reported: if all files of a class are left out, the labels of the other classes shift.
Not covered: archives of other kinds, and links inside archives.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from datm_ray.data.reading.contents import recognise_file, unreadable
from datm_ray.data.reading.decode import Encoded
from datm_ray.errors import DatasetError, MissingImagesError

UNPACKED_FREE, UNPACKED_RATIO = 2**20, 200
"""Limit on the unpacked size of one file of an archive: 1 MiB plus 200 times its packed size. Compression hardly
shrinks encoded images."""

_TAKEN, _WHERE = "links to data already taken", "Give the path where the data set is (dataset.path)"

_HIDDEN = {
    *("__MACOSX", "__pycache__", "@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "$RECYCLE.BIN"),
    *("System Volume Information", "lost+found"),
}
"""Names of folders that operating systems and network drives add. They are left out as hidden, as are names that begin
with "."."""


@dataclass(frozen=True)
class Listing:
    """Data files found below one root, which is a folder or an archive, and how many other files were left out."""

    files: tuple[str, ...]
    """Paths relative to the root, sorted, with "/" between the parts on every system."""
    folders: tuple[str, ...]
    """Paths of all folders that are not hidden, even without files; relative to the root, sorted."""
    passed_over: Counter[str]
    """Reason -> number of files and folders left out for it. A reason is a suffix such as ".heic", "hidden", ..."""

    def subfolders(self, folder: str) -> list[str]:
        """Names of the direct subfolders of a folder; "" is the root."""
        parts = (name.rpartition("/") for name in self.folders)
        return [name for parent, _, name in parts if parent == folder]

    def notes(self) -> tuple[str, ...]:
        """One line for the user that counts the left-out files and folders by reason; empty if there are none."""
        reasons = sorted(self.passed_over.items(), key=lambda each: (-each[1], each[0]))
        shown = ", ".join(f"{reason} {count}" for reason, count in reasons[:6])
        more = sum(count for _, count in reasons[6:])
        total = self.passed_over.total()
        count = "1 file or folder was" if total == 1 else f"{total:,} files or folders were"
        return (f"{count} not taken: {shown}" + (f", others {more}" if more else ""),) if reasons else ()


def list_folder(root: Path, suffixes: Collection[str]) -> Listing:
    """List the files below a folder whose suffix, changed to lower case, is one of `suffixes`, such as ".png".

    A link to a folder at or above `root`, or above the link itself, is left out. A file or folder with several paths is
    taken once: by the path with the fewest links, and of several such paths by the first in alphabetical order.

    Raises:
        DatasetError: a folder cannot be read.
    """
    walk = _Walk(root, suffixes)
    links = [("", walk.top)]
    while links:  # each round takes the paths with the same number of links
        links = [more for name, target in sorted(links) for more in walk.take(name, target)]
    return Listing(tuple(sorted(walk.files)), tuple(sorted(walk.folders)[1:]), walk.passed_over)


class _Walk:
    """Search for data files below a folder: collects their paths, all folders, and counts of left-out entries."""

    def __init__(self, root: Path, suffixes: Collection[str]) -> None:
        self.top = os.path.realpath(root)
        self.files: list[str] = []
        self.folders: list[str] = []
        self.passed_over: Counter[str] = Counter()
        self._root, self._suffixes = root, suffixes
        self._seen: set[str] = set()  # real paths of the folders that were read, and of files that links point to

    def take(self, name: str, target: str) -> list[tuple[str, str]]:
        """Add the file or folder with the real path `target` as `name`, relative to the root, or count it as left out.

        Returns the name and target of each link that lies in the added folder. The caller takes these links later, so
        that each file is first found under the path with the fewest links.
        """
        if os.path.isdir(target):
            return self._take_folder(name, target)
        if not _has_suffix(name, self._suffixes):
            # A broken link may lead to a class on a disk that is not mounted, so it counts as a folder.
            if not os.path.exists(target):
                self.folders.append(name)
            self.passed_over[_suffix(name) if os.path.exists(target) else "links to nothing"] += 1
        elif target in self._seen or self._is_taken(target):
            self.passed_over[_TAKEN] += 1
        else:
            self.files.append(name)
            self._seen.add(target)
        return []

    def _is_taken(self, target: str) -> bool:
        folder, name = os.path.split(target)
        listed = folder in self._seen and _has_suffix(name, self._suffixes) and not _is_hidden(name)
        return listed and os.path.exists(target)

    def _take_folder(self, name: str, target: str) -> list[tuple[str, str]]:
        links, stack = [], [(name, target)]
        while stack:
            name, target = stack.pop()
            self.folders.append(name)
            if target in self._seen:
                self.passed_over[_TAKEN] += 1
                continue
            self._seen.add(target)
            for entry in self._entries(name, target):
                path, real = posixpath.join(name, entry.name), os.path.join(target, entry.name)
                if _is_hidden(entry.name):
                    self.passed_over["hidden"] += 1
                elif entry.is_symlink():
                    real = os.path.realpath(real)
                    if any(Path(below).is_relative_to(real) for below in (target, self.top)):
                        self.passed_over["links upwards"] += 1
                    else:
                        links.append((path, real))
                elif entry.is_dir():
                    stack.append((path, real))
                elif real in self._seen:
                    self.passed_over[_TAKEN] += 1
                elif entry.is_file() and _has_suffix(path, self._suffixes):
                    self.files.append(path)
                else:
                    self.passed_over[_suffix(path) if entry.is_file() else "special files"] += 1
        return links

    def _entries(self, name: str, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return list(entries)
        except OSError as error:
            raise _damaged(self._root / name, error) from error


def _list_archive(names: Iterable[str], suffixes: Collection[str]) -> Listing:
    """List the data files among the names in an archive, where a folder's name ends in "/"."""
    files: list[str] = []
    folders: set[str] = set()
    hidden: set[str] = set()
    passed_over: Counter[str] = Counter()
    for name in names:
        parts = name.split("/")
        depth = next((depth for depth, part in enumerate(parts) if _is_hidden(part)), len(parts) - 1)
        folders.update("/".join(parts[:end]) for end in range(1, depth + 1))
        if _is_hidden(parts[depth]):
            hidden.add("/".join(parts[: depth + 1]))
        elif parts[-1] and _has_suffix(name, suffixes):
            files.append(name)
        elif parts[-1]:
            passed_over[_suffix(name)] += 1
    passed_over["hidden"] = len(hidden)
    return Listing(tuple(sorted(files)), tuple(sorted(folders)), +passed_over)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _HIDDEN


def _has_suffix(name: str, suffixes: Collection[str]) -> bool:
    return PurePosixPath(name.lower()).suffix in suffixes


def _suffix(name: str) -> str:
    suffix = PurePosixPath(name.lower()).suffix
    return suffix if re.fullmatch(r"\.\w{1,12}", suffix) else "without a suffix"


@dataclass(frozen=True, eq=False)
class FolderFiles:
    """Some files of a folder, numbered from 0. Picklable, so that workers can read them, unlike files of an archive."""

    root: Path
    names: NDArray[np.bytes_]
    """Paths relative to the root, as the file system encodes them."""

    @classmethod
    def of(cls, root: Path, names: Sequence[str]) -> FolderFiles:
        """Number the files of a folder, given by paths relative to it, in this order from 0."""
        return cls(root.absolute(), np.array([os.fsencode(name) for name in names], dtype=np.bytes_))

    def path(self, index: int) -> Path:
        """Path of the file with this number, from 0."""
        return self.root / os.fsdecode(bytes(self.names[index]))

    def open(self, index: int) -> BinaryIO:
        """Open the file with this number to read bytes."""
        return self.path(index).open("rb")

    def name(self, index: int) -> str:
        """Path of the file with this number, for messages."""
        return str(self.path(index))

    def mark(self, index: int) -> str:
        """Text with the relative path and the size in bytes of the file with this number."""
        return f"{os.fsdecode(bytes(self.names[index]))}:{self.path(index).stat().st_size}"


@dataclass(frozen=True)
class FileTree:
    """Data files below one root, with a function that opens them by name."""

    root: Path
    listing: Listing
    open: Callable[[str], BinaryIO]
    is_folder: bool = False
    """True for a folder, whose files stay readable after the `with` block of `file_tree`; False for an archive."""

    def lines(self, name: str) -> list[str]:
        """Non-empty lines of the UTF-8 text file `name`.

        Raises:
            DatasetError: the file does not exist or cannot be read.
        """
        if name not in self.listing.files:
            raise DatasetError(
                f"the data set {self.root} has no file {name}",
                "The folder or archive is incomplete, or is another one",
                "Check the path, or fetch the data set again",
            )
        try:
            with self.open(name) as file:
                return [line for line in file.read().decode("utf-8").splitlines() if line.strip()]
        except (*_DAMAGED, UnicodeDecodeError) as error:
            raise _damaged(self.root / name, error) from error

    def encoded(self, files: Sequence[tuple[str, int]]) -> Encoded:
        """Image files, given as (name, label), as an `Encoded`; those of an archive are readable while it is open."""
        labels = np.array([label for _, label in files], dtype=np.int64)
        if self.is_folder:
            found = FolderFiles.of(self.root, [name for name, _ in files])
            return Encoded(labels, found.open, found.name, found.mark)
        return Encoded(labels, lambda i: self.open(files[i][0]), lambda i: str(self.root / files[i][0]))


@contextmanager
def file_tree(root: Path, suffixes: Collection[str]) -> Iterator[FileTree]:
    """Files with one of the `suffixes` below a folder, or in a zip archive that stays open inside the `with` block.

    If everything in an archive lies in one folder, the names of files do not include this folder.

    Raises:
        MissingImagesError: `root` does not exist.
        DatasetError: `root` is neither a folder nor a readable zip archive.
    """
    if root.is_dir():
        yield FileTree(root, list_folder(root, suffixes), lambda name: (root / name).open("rb"), is_folder=True)
    elif zipfile.is_zipfile(root):
        with _opened(root) as archive:
            members = _members(archive)
            links = [name for name, own in members.items() if stat.S_ISLNK(archive.getinfo(own).external_attr >> 16)]
            listing = _list_archive(members.keys() - links, suffixes)
            listing.passed_over.update({"links in an archive": len(links)} if links else {})
            yield FileTree(root, listing, lambda name: BytesIO(_unpacked(root, archive, members[name])))
    elif root.exists():
        content = recognise_file(root)
        known = f"is {content.name}" if content else "is neither a folder nor a zip archive"
        raise DatasetError(
            f"data set path {root} {known}",
            "Its end is missing" if content and content.suffix == ".zip" else "",
            content.remedy if content else _WHERE,
        )
    else:
        raise MissingImagesError(f"data set path {root} does not exist", remedy=_WHERE)


def _opened(root: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(root)
    except _DAMAGED as error:
        raise _damaged(root, error) from error
    if any(member.flag_bits & 1 for member in archive.infolist()):
        archive.close()
        raise DatasetError(f"the archive {root} is encrypted", remedy="Unpack it with its password and give the folder")
    return archive


_DAMAGED = (
    OSError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    EOFError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
"""Exceptions of zipfile for archives that are damaged, encrypted or of another kind."""


def _damaged(file: Path, error: Exception) -> DatasetError:
    reason, cause, remedy = unreadable(error, recognise_file(file))
    return DatasetError(f"{file} cannot be read ({reason})", cause, remedy)


def _members(archive: zipfile.ZipFile) -> dict[str, str]:
    r"""Normalised name of each file and folder -> its name in the archive.

    Normalised names have the form "a/b.png", although some programs write "./a/b.png" or "a\b.png". If one folder holds
    the whole archive, normalised names do not include this folder. If a name occurs twice in the archive, the last
    entry counts, as for the program `unzip`.
    """
    members = {}
    for own in archive.namelist():
        name = own.replace("\\", "/")
        members[posixpath.normpath(name).lstrip("/") + "/" * name.endswith("/")] = own
    visible = [name for name in members if not any(map(_is_hidden, name.split("/")))]
    around = {name.split("/")[0] for name in visible}
    if len(around) != 1 or not any(name.count("/") > 1 for name in visible):
        return members
    (top,) = around
    return {name.removeprefix(f"{top}/"): own for name, own in members.items() if name != f"{top}/"}


def _unpacked(root: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    """Content of the archive's file `name`, whose size is limited in proportion to its packed size.

    Raises:
        DatasetError: the content is too large, or packed by another method than deflate.
    """
    member = archive.getinfo(name)
    if member.file_size > UNPACKED_FREE + UNPACKED_RATIO * member.compress_size:
        raise DatasetError(
            f"{root / name} cannot be read ({member.compress_size} bytes that unpack to {member.file_size})",
            "No image compresses so well. The file may be crafted to fill the memory",
            "Delete it from the archive, or unpack the archive and give the folder",
        )
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DatasetError(
            f"{root / name} cannot be read (it is packed by another method than deflate)",
            remedy="Unpack the archive and give the folder",
        )
    with archive.open(member) as file:
        return file.read(member.file_size)  # zipfile unpacks no more than this size, whatever the header says
