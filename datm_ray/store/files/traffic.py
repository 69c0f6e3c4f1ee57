"""Totals of a process's file access by `Location`: requests, bytes, seconds, and retries of requests to S3.

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
    """Total bytes of content that reads returned. Local files are mapped, so the disk may have read fewer bytes."""
    read_seconds: float = 0.0
    """Total seconds that the requests that read content took."""
    writes: int = 0
    """Number of requests that write content."""
    write_bytes: int = 0
    """Total bytes of the files that were written successfully."""
    write_seconds: float = 0.0
    """Total seconds that writes took to flush or upload complete content and to give the files their names."""
    looks: int = 0
    """Number of requests that move no content: existence, size and stamp of a file, listing, and deletion."""
    look_seconds: float = 0.0
    """Total seconds that the requests that move no content took."""
    retries: int = 0
    """Number of requests to S3 that were sent again after a temporary failure."""

    def __sub__(self, earlier: Traffic) -> Traffic:
        """Traffic since the total `earlier` of the same process: the difference of each field."""
        return Traffic(**{each.name: getattr(self, each.name) - getattr(earlier, each.name) for each in fields(self)})


class Size:
    """Size of one request: `bytes` is 0 until the block of `request` sets it to the number of bytes read or written."""

    bytes = 0


_NAMES = {each.name for each in fields(Traffic)}
_lock = threading.Lock()
_log = logging.getLogger(__name__)
_sums = Traffic()


def traffic() -> Traffic:
    """Total requests, bytes, seconds and retries of this process's file access since the process started."""
    return _sums


@contextmanager
def request(kind: Literal["read", "write", "look"], uri: str) -> Iterator[Size]:
    """Count the block as one request of this process, even if it fails. The block sets `bytes` of the yielded `Size`.

    `kind` chooses the totals to add to; "look" is a request that moves no content. `uri` is only logged.
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
