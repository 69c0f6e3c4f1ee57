"""Recognise a file's kind by its first bytes, for messages about files whose content does not match their name.

Covers Parquet files, archives, HEIC and AVIF images, and what is often found in their place, such as web pages. Other
images count as unknown. Does not check whether a file of the right kind is complete.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import NamedTuple

HEAD_BYTES = 512


class Content(NamedTuple):
    """Kind of a file's content, and advice on how to get a usable file."""

    name: str
    remedy: str
    suffix: str = ""
    """File suffix, such as ".zip", of content that this package can read; "" for other content."""


_AGAIN = "Fetch it again"
_UNPACK = "Unpack it and give the folder"
_CONVERT = "Convert it to PNG or JPEG"
_KINDS: tuple[tuple[bytes, Content], ...] = (
    (rb"\Z", Content("empty", _AGAIN)),
    (rb"\0+\Z", Content("nothing but zero bytes", "Fetch it again: a transfer or a disk failed")),
    (rb"version https://git-lfs", Content("a Git LFS pointer", "Run `git lfs pull` where the files were cloned")),
    (rb"[./]*(\.git|annex)/\S*annex", Content("a git-annex pointer", "Run `git annex get .` where it was cloned")),
    (rb"(?i)\s*<(!doctype html|html|head)", Content("an HTML page", "Fetch it again: a site sent a page instead")),
    (rb"\s*<\?xml|\s*<Error>", Content("an XML text", "Fetch it again: a server may have sent an error instead")),
    (rb"\s*\{\s*\"", Content("a JSON text", "Fetch it again: a server may have sent an error instead")),
    (rb"PK\x03\x04", Content("a zip archive", _UNPACK, ".zip")),
    (rb"\x1f\x8b", Content("packed with gzip", _UNPACK)),
    (rb"BZh\d|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!", Content("an archive of another kind", _UNPACK)),
    (rb"(?s).{257}ustar", Content("a tar archive", _UNPACK)),
    (rb"PARE", Content("an encrypted Parquet file", "Write it again without encryption")),
    (rb"PAR1", Content("a Parquet file", "Give it a name that ends in .parquet (dataset.source parquet)", ".parquet")),
    (rb"(?s).{4}ftyp(hei|hev|mif1|msf1)", Content("a HEIC image", _CONVERT)),
    (rb"(?s).{4}ftypavi", Content("an AVIF image", _CONVERT, ".avif")),
    (rb"%PDF|%!PS", Content("a document", _CONVERT)),
)


def recognise(head: bytes) -> Content | None:
    """Kind of a file from its first `HEAD_BYTES` bytes; `None` if unknown, as for JPEG and PNG."""
    return next((content for pattern, content in _KINDS if re.match(pattern, head)), None)


def recognise_file(path: Path) -> Content | None:
    """Kind of the file at a path; `None` if unknown or unreadable."""
    try:
        with path.open("rb") as file:
            return recognise(file.read(HEAD_BYTES))
    except OSError:
        return None


def unreadable(error: Exception, content: Content | None) -> tuple[str, str, str]:
    """Reason in a few words, likely cause ("" if unknown) and remedy for a file that cannot be read.

    Args:
        error: error that reading the file raised. If the operating system raised it, the reason is its text.
        content: kind of content found in the file, which is otherwise the reason; `None` takes the error's text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        reason = (error.strerror or errno.errorcode.get(error.errno, "")).lower()
        return reason, "", "Check the file, its links and its permissions"
    if content is not None:
        return content.name, "", content.remedy
    text = " ".join(str(error).split())[:200]
    reason = text if " " in text else f"{type(error).__name__}: {text}"
    if isinstance(error, NotImplementedError):
        return reason, "It is written in a way that cannot be read here", "Write it again with another program"
    return reason, "The file is truncated or damaged", _AGAIN
