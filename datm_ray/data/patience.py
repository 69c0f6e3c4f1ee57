"""Computations that take minutes: a line every 30 seconds reports progress, and Ctrl-C ends them in about a second.

Tests: tests/data/test_patience.py.
"""

from __future__ import annotations

import io
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from datm_ray.errors import DatasetError

_log = logging.getLogger(__name__)

Say = Callable[[str], None]
"""Function that shows a line to the user."""
Matrix = NDArray[np.float64]

LINE_INTERVAL = 30.0
"""Shortest time between two progress lines of a computation, in seconds."""
_AT_ONCE = 1e10  # multiplications in a slab: at most a second on one CPU core
_HERE = 1000  # largest side of a matrix that this process decomposes itself, in less than a second
_FAILURE_BYTES = 200  # length of the program's first output: what the device has failed with, or spaces
_PROGRAM = """
import os, sys, threading, time
parent, size, device, sys.path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]
def watch():
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
import numpy
matrix = numpy.empty((size, size))
sys.stdin.buffer.readinto(matrix)
found, failure = None, ""
if device != "cpu":  # numpy takes half as long as torch there
    try:
        import torch
        found = [each.cpu().numpy() for each in torch.linalg.eigh(torch.from_numpy(matrix).to(device))]
    except Exception as error:
        failure = " ".join(str(error).split()) or type(error).__name__
sys.stdout.buffer.write(failure.encode()[:200].ljust(200))
sys.stdout.flush()
for each in found or numpy.linalg.eigh(matrix):
    sys.stdout.buffer.write(numpy.ascontiguousarray(each))
"""


def silent(text: str) -> None:
    """Ignore the text: a `Say` for callers that want no lines."""


class Lines:
    """Progress notes of a computation: at most one every `LINE_INTERVAL` seconds is shown, by calling `say`."""

    def __init__(self, say: Say) -> None:
        self._say, self._last = say, time.monotonic()

    def note(self, text: str) -> None:
        """Show the note, unless this object was made, or showed a note, less than `LINE_INTERVAL` seconds ago."""
        if (now := time.monotonic()) - self._last >= LINE_INTERVAL:
            self._last = now
            self._say(text)


def slabs(rows: int, multiplications: int) -> Iterator[slice]:
    """Divide the rows of a matrix product into slices that take at most a second each, so that Ctrl-C works soon.

    Args:
        rows: number of rows of the product.
        multiplications: number of multiplications in each row.
    """
    step = max(1, int(_AT_ONCE // max(1, multiplications)))
    return (slice(start, start + step) for start in range(0, rows, step))


def eigenpairs(matrix: Matrix, note: Say = silent, device: str = "cpu") -> tuple[Matrix, Matrix]:
    """Eigenvalues [n], ascending, and eigenvectors [n n], as columns, of a symmetric matrix [n n].

    A large matrix is decomposed in a process of its own, because LAPACK delays Ctrl-C for minutes. The given matrix is
    then emptied to free its memory. A GPU is used by such a process too: a CUDA context here would stay on the GPU, and
    this process may live for days beside workers that need the GPU. If the device fails, for example because other
    processes use its memory, the CPU computes the result.

    Args:
        device: torch device that decomposes a large matrix; the CPU always decomposes a small one.
        note: called about every second with a progress note.

    Raises:
        DatasetError: the process that decomposes a large matrix has died.
    """
    size = len(matrix)
    if size <= _HERE:  # also for a GPU, where starting a process would take longer
        found = np.linalg.eigh(matrix)
        return found.eigenvalues, found.eigenvectors
    values, vectors, began = np.empty(size), np.empty((size, size)), time.monotonic()
    command = [sys.executable, "-c", _PROGRAM, str(os.getpid()), str(size), device, *sys.path]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL

    def wait(output: io.BufferedReader) -> None:
        while not select.select([output], [], [], 1.0)[0]:
            note(f"zca: eigenvectors of {size:,} x {size:,}: {time.monotonic() - began:.0f} s so far")

    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, start_new_session=True) as process:
        assert process.stdin is not None
        assert isinstance(process.stdout, io.BufferedReader)
        try:
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(matrix.data)
            matrix.resize(0, refcheck=False)
            wait(process.stdout)
            if failure := process.stdout.read(_FAILURE_BYTES).decode(errors="replace").strip():
                _log.warning("zca is fitted on the CPU instead of the GPU: %s", failure)
            wait(process.stdout)
            read = sum(process.stdout.readinto(each.data) for each in (values, vectors))
            if read < values.nbytes + vectors.nbytes:
                raise DatasetError(
                    f"the process that decomposes a {size:,} x {size:,} matrix ended with status {process.wait()}",
                    "The system has probably ended it because memory was short",
                    "Use --set dataset.normalisation=standard, or a smaller dataset.resize",
                )
        finally:
            process.kill()
    return values, vectors
