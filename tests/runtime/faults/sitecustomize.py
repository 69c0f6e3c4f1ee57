"""Makes a worker fail when a test asks for it: Python imports this in each process of the soak's cluster.

A file named by the process id in the folder DATM_RAY_TEST_FAULTS says how, and is removed.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from pathlib import Path


class BrokenGpu(RuntimeError):
    """Error of a GPU, as torch words it."""

    def __reduce__(self) -> tuple[type[RuntimeError], tuple[str]]:
        """Arrive at the driver as an error whose class it can import."""
        return RuntimeError, ("CUDA error: uncorrectable ECC error encountered",)


def _error(kind: str) -> type[BaseException]:
    if kind == "gpu":
        return BrokenGpu
    from datm_ray.errors import TransientStoreError

    class BusyStore(TransientStoreError):
        def __init__(self) -> None:
            super().__init__("s3://bucket answers with 503, and has for a long time")

        def __reduce__(self) -> tuple[type[TransientStoreError], tuple[str]]:
            return TransientStoreError, (self.fact,)

    return BusyStore


def _raise_in_workers(kind: str) -> None:
    """Raise the error in each thread that is at work in a stage."""
    for thread, frame in sys._current_frames().items():
        files, each = set(), frame
        while each is not None:
            files.add(each.f_code.co_filename)
            each = each.f_back  # type: ignore[assignment]
        if any("/datm_ray/stages/" in file for file in files):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_error(kind)))


BLOCK, MOST_BLOCKS = 64 << 20, 192


def _fill_memory() -> None:
    """Take memory until Ray's memory monitor kills this process, at most 12 GiB."""
    held = []
    while len(held) < MOST_BLOCKS:
        held.append(bytearray(b"\1") * BLOCK)
        time.sleep(0.03)


def _watch(place: Path) -> None:
    while True:
        time.sleep(0.2)
        if place.exists():
            kind = place.read_text()
            place.unlink()
            if kind == "memory":
                _fill_memory()
            else:
                _raise_in_workers(kind)


if folder := os.environ.get("DATM_RAY_TEST_FAULTS"):
    threading.Thread(target=_watch, args=(Path(folder) / str(os.getpid()),), daemon=True).start()
