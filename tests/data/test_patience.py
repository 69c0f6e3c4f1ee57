"""Tests that computations of minutes answer to Ctrl-C at once, give the same bits, and say how far they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from datm_ray.data import patience
from datm_ray.data.patience import Lines, eigenpairs, slabs
from datm_ray.errors import DatasetError


def covariance(size: int) -> Any:
    rows = np.random.default_rng(0).standard_normal((size, size))
    return rows @ rows.T


def test_another_process_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decomposition in a process of its own has the bits of numpy's, and frees the matrix meanwhile."""
    values, vectors = np.linalg.eigh(covariance(80))
    monkeypatch.setattr(patience, "_HERE", 10)
    matrix = covariance(80)
    found = eigenpairs(matrix)
    assert np.array_equal(found[0], values)
    assert np.array_equal(found[1], vectors)
    assert matrix.size == 0


def test_ctrl_c_ends_a_decomposition_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the process of a long decomposition within seconds; a process that dies is an error with a cause."""
    monkeypatch.setattr(patience, "_HERE", 10)
    monkeypatch.setattr(patience, "_PROGRAM", "import time; time.sleep(60)")
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        return started[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        eigenpairs(covariance(20), lambda text: signal.raise_signal(signal.SIGINT))
    assert time.monotonic() - began < 30
    assert started[0].wait(10) == -signal.SIGKILL
    monkeypatch.setattr(patience, "_PROGRAM", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(DatasetError, match=r"decomposes a 20 x 20 matrix ended with status -9\. .* memory was short"):
        eigenpairs(covariance(20))


def test_a_decomposition_ends_when_its_parent_is_gone() -> None:
    """The process of a decomposition ends within seconds if the one that asked for it was killed."""
    orphan = [sys.executable, "-c", patience._PROGRAM, str(os.getpid() + 1), "5000", "cpu", *sys.path]  # not its parent
    with subprocess.Popen(orphan, stdin=subprocess.PIPE) as process:
        assert process.wait(20) == 1


def test_a_line_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices cover all rows in small steps, and a note is shown at most once in 30 seconds."""
    assert list(slabs(10, 5 * 10**9)) == [slice(start, start + 2) for start in range(0, 10, 2)]
    shown: list[str] = []
    lines = Lines(shown.append)
    lines.note("not yet")
    monkeypatch.setattr(patience, "LINE_INTERVAL", 0)
    lines.note("now")
    assert shown == ["now"]
