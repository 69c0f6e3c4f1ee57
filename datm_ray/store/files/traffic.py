"""Totals of this process's file access: requests, bytes, seconds and retries; counted by `filesystem`.

A request is one call of a `Location`, however many messages it needs. Reads that the local cache answers are no
requests. A retry is a request to S3 that failed temporarily and was sent again; connections that broke while idle are
renewed by the HTTP client and not counted. Totals only grow, so the traffic of some work is the difference between the
totals after and before it.
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
    """Totals of a process's file access: requests, bytes, seconds and retries, summed over all threads.

    Each request counts its own seconds, so requests that overlap count more seconds than pass on a clock.
    """

    reads: int = 0
    """Number of requests that read content."""
    read_bytes: int = 0
    """Bytes given to readers. Local files are mapped, so the disk may have read fewer bytes."""
    read_seconds: float = 0.0
    """Seconds of the requests that read content."""
    writes: int = 0
    """Number of requests that write content."""
    write_bytes: int = 0
    """Bytes written."""
    write_seconds: float = 0.0
    """Seconds from the moment when the content is complete until the file has its name."""
    looks: int = 0
    """Number of requests without content: exists, size, stamp, list and delete."""
    look_seconds: float = 0.0
    """Seconds of the requests without content."""
    retries: int = 0
    """Number of requests to S3 that were sent again after a temporary failure."""

    def __sub__(self, earlier: Traffic) -> Traffic:
        """Traffic between an earlier total and this one, field by field."""
        return Traffic(**{each.name: getattr(self, each.name) - getattr(earlier, each.name) for each in fields(self)})


class Size:
    """Size of one request. Code in a block of `request` sets `bytes` to the number of bytes read or written."""

    bytes = 0


_NAMES = {each.name for each in fields(Traffic)}
_lock = threading.Lock()
_log = logging.getLogger(__name__)
_sums = Traffic()


def traffic() -> Traffic:
    """Requests, bytes, seconds and retries of this process's file access since its start."""
    return _sums


@contextmanager
def request(kind: Literal["read", "write", "look"], uri: str) -> Iterator[Size]:
    """Count the block as one request, even if it fails. The block sets `bytes` of the yielded `Size`.

    `kind` chooses the totals; "look" moves no content. `uri` is only logged.
    """
    size, started = Size(), time.monotonic()
    try:
        yield size
    finally:
        seconds = time.monotonic() - started
        _log.debug("file request kind=%s uri=%s bytes=%d seconds=%.3f", kind, uri, size.bytes, seconds)
        _add({f"{kind}s": 1, f"{kind}_bytes": size.bytes, f"{kind}_seconds": seconds})


def count_retry() -> None:
    """Count one request to S3 that is sent again after a temporary failure."""
    _add({"retries": 1})


def _add(amounts: Mapping[str, float]) -> None:
    global _sums
    with _lock:
        known = _NAMES & set(amounts)  # `Traffic` counts no bytes of looks
        _sums = replace(_sums, **{name: getattr(_sums, name) + amounts[name] for name in known})
