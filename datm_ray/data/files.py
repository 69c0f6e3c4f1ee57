"""A folder or a zip archive as one list of files, so that a source need not know which it reads."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from datm_ray.data.decode import Encoded
from datm_ray.errors import DatasetError

UNPACKED_FREE, UNPACKED_RATIO = 2**20, 200
"""A member of an archive may unpack to 1 MiB and to 200 times its packed size besides; encoded images hardly shrink."""

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")


@dataclass(frozen=True)
class FileTree:
    """All files below one root."""

    root: Path
    names: tuple[str, ...]
    """Sorted, relative to the root, with "/" between the parts on every system."""
    open: Callable[[str], BinaryIO]

    def images(self) -> list[tuple[str, ...]]:
        """Path parts of every image file, hidden files and folders left out."""
        split = [tuple(name.split("/")) for name in self.names if name.lower().endswith(_IMAGE_SUFFIXES)]
        return [parts for parts in split if not any(part.startswith((".", "__MACOSX")) for part in parts)]

    def lines(self, name: str) -> list[str]:
        """Non-empty lines of a UTF-8 text file.

        Raises:
            DatasetError: there is no such file.
        """
        if name not in self.names:
            raise DatasetError(
                f"the data set {self.root} has no file {name}",
                "The folder or archive is incomplete, or is not the one meant",
                "Check the path, or fetch the data set again",
            )
        try:
            with self.open(name) as file:
                return [line for line in file.read().decode("utf-8").splitlines() if line.strip()]
        except (*_DAMAGED, UnicodeDecodeError) as error:
            raise _damaged(self.root / name, error) from error

    def encoded(self, files: Sequence[tuple[str, int]]) -> Encoded:
        """The named files with their labels, ready to be decoded while the tree is open."""
        return Encoded(
            labels=np.array([label for _, label in files], dtype=np.int64),
            open=lambda i: self.open(files[i][0]),
            name=lambda i: str(self.root / files[i][0]),
        )


@contextmanager
def file_tree(root: Path) -> Iterator[FileTree]:
    """The files below a folder, or in a zip archive, which stays open inside the `with` block.

    Raises:
        DatasetError: there is nothing at `root`, or it is neither a folder nor a zip archive.
    """
    if root.is_dir():
        names = tuple(sorted(_walk(root)))
        yield FileTree(root, names, lambda name: (root / name).open("rb"))
    elif zipfile.is_zipfile(root):
        with _opened(root) as archive:
            names = tuple(sorted(name for name in archive.namelist() if not name.endswith("/")))
            yield FileTree(root, names, lambda name: BytesIO(_unpacked(root, archive, name)))
    else:
        problem = "is neither a folder nor a zip archive" if root.exists() else "does not exist"
        raise DatasetError(f"data set path {root} {problem}", remedy="Set dataset.path to where the data set is")


def _opened(root: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(root)
    except _DAMAGED as error:
        raise _damaged(root, error) from error


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
"""What zipfile raises for archives that are damaged, encrypted or of another kind."""


def _damaged(file: Path, error: Exception) -> DatasetError:
    return DatasetError(
        f"{file} cannot be read ({type(error).__name__}: {error})",
        "It is truncated, damaged or packed in another way",
        "Fetch it again, or unpack it and give the folder",
    )


def _unpacked(root: Path, archive: zipfile.ZipFile, name: str) -> bytes:
    """A member's content, which may not be larger than some multiple of what it takes in the archive.

    Raises:
        DatasetError: it would be, or it is packed by a method that cannot be unpacked bit by bit.
    """
    member = archive.getinfo(name)
    if member.file_size > UNPACKED_FREE + UNPACKED_RATIO * member.compress_size:
        raise DatasetError(
            f"{root / name} cannot be read ({member.compress_size} bytes that unpack to {member.file_size})",
            "No image shrinks so much, but what is made to fill the memory does",
            "Delete it from the archive, or unpack the archive and give the folder",
        )
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DatasetError(
            f"{root / name} cannot be read (it is packed by another method than deflate)",
            remedy="Unpack the archive and give the folder",
        )
    with archive.open(member) as file:
        return file.read(member.file_size)  # with a size, zipfile unpacks no more than it, whatever the header says


def _walk(root: Path) -> Iterator[str]:
    # Class folders are often links to where the pixels are kept, hence followlinks.
    for folder, _, files in os.walk(root, followlinks=True):
        for name in files:
            yield (Path(folder) / name).relative_to(root).as_posix()
