"""Makes workers fail when a test asks for it, and keeps a journal of their steps.

Python imports this module in each process of the soak's cluster. In the folder DATM_RAY_TEST_FAULTS:

    <process id>           written by the test: the kind of fault; removed here
    <process id>.answer    written here: "made" if the fault was made, "idle" if no stage was at work
    journal/<process id>   a line for each event of a stage: time, "resumed", "step" or "end", rank, task, units done
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


class BrokenGpu(RuntimeError):
    """Error of a GPU, as torch words it."""

    def __reduce__(self) -> tuple[type[RuntimeError], tuple[str]]:
        """Arrive at the driver as an error whose class it can import."""
        return RuntimeError, ("CUDA error: uncorrectable ECC error encountered",)


class Stuck(RuntimeError):
    """Error whose constructor calls a C function that does not return and keeps Python's global interpreter lock."""

    def __init__(self) -> None:
        super().__init__()
        ctypes.PyDLL(None).sleep(3600)


ERRORS: dict[str, type[BaseException]] = {"gpu": BrokenGpu, "stuck": Stuck}
BLOCK, MOST_BLOCKS = 64 << 20, 192


def _threads_at_work() -> list[int]:
    """Threads that run a stage of the package."""
    found = []
    for thread, frame in sys._current_frames().items():
        files, each = set(), frame
        while each is not None:
            files.add(each.f_code.co_filename)
            each = each.f_back  # type: ignore[assignment]
        if any("/datm_ray/stages/" in file for file in files):
            found.append(thread)
    return found


def _fill_memory() -> None:
    """Take memory until Ray's memory monitor kills this process, at most 12 GiB."""
    held = []
    while len(held) < MOST_BLOCKS:
        held.append(bytearray(b"\1") * BLOCK)
        time.sleep(0.03)


def _make(kind: str, answer: Path) -> None:
    """Make a fault. The answer comes first, because a stuck process could not give it later."""
    threads = _threads_at_work()
    partial = answer.with_suffix(".partial")
    partial.write_text("made" if threads else "idle")
    partial.rename(answer)
    if threads and kind == "memory":
        _fill_memory()
    for thread in threads if kind in ERRORS else ():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(ERRORS[kind]))


def _journalled(method: Callable[..., Any], folder: Path, name: str) -> Callable[..., Any]:
    """Copy of a stage's method that notes its events in the journal.

    The first progress of a distillation is the iteration from which it resumes; all other progress is of new steps.
    """
    from datm_ray.runtime.executor import Progress

    def noted(self: Any, config: Any, *arguments: Any, **rank: Any) -> Iterator[Any]:
        number = rank["worker_rank"].rank if rank else 0
        task = f"{name}:{config.name}:{'-'.join(map(str, arguments[1])) if name == 'train' else ''}"
        resumes = name == "distill"
        with (folder / str(os.getpid())).open("a", buffering=1) as file:
            for event in method(self, config, *arguments, **rank):
                if isinstance(event, Progress):
                    what, resumes = "resumed" if resumes else "step", False
                    file.write(f"{time.time()} {what} {number} {task} {event.done:g}\n")
                yield event
            file.write(f"{time.time()} end {number} {task} 0\n")

    return noted


class _Hook(importlib.abc.MetaPathFinder):
    """Import hook that makes the worker's stages keep the journal as soon as their module is imported."""

    name = "datm_ray.stages.worker"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Find the module of the worker as Python does, but with this hook at its end."""
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            for method in ("train", "distill", "validate", "evaluate"):
                noted = _journalled(getattr(module.StageWorker, method), self._folder, method)
                setattr(module.StageWorker, method, noted)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _watch(folder: Path) -> None:
    place = folder / str(os.getpid())
    while True:
        time.sleep(0.2)
        if place.exists():
            kind = place.read_text()
            place.unlink()
            _make(kind, place.with_suffix(".answer"))


if folder := os.environ.get("DATM_RAY_TEST_FAULTS"):
    sys.meta_path.insert(0, _Hook(Path(folder) / "journal"))
    threading.Thread(target=_watch, args=(Path(folder),), daemon=True).start()
