"""Processes for tests of several ranks: forked from a server that has imported torch and this package once, and kept.

A freshly started interpreter spends seven CPU-seconds on those imports; a forked process starts in milliseconds. A kept
process has also traced the networks of earlier tests.
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["tests.conftest", "torch._dynamo", "torch.distributed", "datm_ray.stages.distill.task"]
)

_KEPT: list[ProcessPoolExecutor] = []
"""One executor for each rank, because an executor that loses its process cannot be used again."""


def until(condition: Callable[[], object], what: str = "the condition", every: float = 0.02) -> None:
    """Wait until a condition holds, for at most four minutes. It is checked at intervals of `every` seconds."""
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end, f"it did not happen: {what}"
        time.sleep(every)


def side_by_side(work: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> list[Future[Any]]:
    """Call `work` once for each tuple of arguments, at the same time, each in a process of its own.

    Returns:
        The calls, all at their end: with a result, the exception that was raised, or a `BrokenProcessPool` where the
        process was killed.
    """
    calls: list[Future[Any]] = []
    for rank, each in enumerate(arguments):
        if rank == len(_KEPT):
            _KEPT.append(ProcessPoolExecutor(1, mp_context=PROCESSES))
        calls.append(_KEPT[rank].submit(work, *each))
    wait(calls)
    for rank in reversed(range(len(calls))):
        if isinstance(calls[rank].exception(), BrokenProcessPool):
            _KEPT.pop(rank).shutdown()
    return calls


def end_all() -> None:
    """End the processes that are kept."""
    while _KEPT:
        _KEPT.pop().shutdown()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens to now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
