"""What this process has read from and written to its files so far: a few sums, kept by `filesystem`.

A request is what one call of a `Location` asks for, however many messages that takes. A retry is a request to S3 that
failed for the moment and was sent again; a connection that broke while idle is mended below and not seen.
What a local cache answers is no request. Sums only ever grow, so the traffic of a piece of work is the difference of
two looks at them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Literal


@dataclass(frozen=True)
class Traffic:
    """Sums over all threads of a process; seconds of requests that overlap add up."""

    reads: int = 0
    read_bytes: int = 0
    """Handed to readers. Of a local file they are mapped, so the disk may have been asked for fewer."""
    read_seconds: float = 0.0
    writes: int = 0
    write_bytes: int = 0
    write_seconds: float = 0.0
    """From the moment at which the content is complete until it has its name."""
    looks: int = 0
    """Number of requests without content: exists, size, list and delete."""
    look_seconds: float = 0.0
    retries: int = 0

    def __sub__(self, earlier: Traffic) -> Traffic:
        """What came since an earlier look."""
        return Traffic(**{each.name: getattr(self, each.name) - getattr(earlier, each.name) for each in fields(self)})


class Size:
    """How many bytes a request has moved; filled in where it is known."""

    bytes = 0


_NAMES = {each.name for each in fields(Traffic)}
_lock = threading.Lock()
_log = logging.getLogger(__name__)
_sums = Traffic()


def traffic() -> Traffic:
    """Requests, bytes, seconds and retries of this process's file access so far; subtract an earlier value."""
    return _sums


@contextmanager
def request(kind: Literal["read", "write", "look"], uri: str) -> Iterator[Size]:
    """Count the block as one request, also where it fails; its bytes are what the block enters."""
    size, started = Size(), time.monotonic()
    try:
        yield size
    finally:
        seconds = time.monotonic() - started
        _log.debug("file request kind=%s uri=%s bytes=%d seconds=%.3f", kind, uri, size.bytes, seconds)
        _add({f"{kind}s": 1, f"{kind}_bytes": size.bytes, f"{kind}_seconds": seconds})


def count_retry() -> None:
    """Count a request that is sent again."""
    _add({"retries": 1})


def _add(amounts: Mapping[str, float]) -> None:
    global _sums
    with _lock:
        known = _NAMES & set(amounts)  # existence checks transfer no bytes
        _sums = replace(_sums, **{name: getattr(_sums, name) + amounts[name] for name in known})
