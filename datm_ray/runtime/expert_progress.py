"""What is kept of experts that are still in training, so that nothing but the last seconds is ever trained twice.

    <group>/progress/<first expert>-<stack size>-<what is kept>/<first epoch>-<last epoch>.arrow

Each file holds some epochs of a whole stack: those that the trajectory will keep, and the state after the last of them.
Files are written whole, at the end of an epoch, as often as `WRITE_SHARE` allows; the trajectories are assembled from
them at the end, an epoch at a time. Shapes: e epochs, s experts, p parameters, q buffers.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.config import stable_hash
from datm_ray.core.experts import ExpertState
from datm_ray.errors import CorruptFileError, StoreError
from datm_ray.store.filesystem import Location
from datm_ray.store.tensors import read_tensors, write_tensors
from datm_ray.store.trajectories import ExpertGroup, Snapshot

WRITE_SHARE = 0.05
"""Of a worker's time that may go into writing progress: a lost worker costs some twenty times what a write takes."""
LARGEST_WRITE = 256 * 2**20
"""Bytes of epochs that are kept in memory at most before they are written, but for one epoch."""
ROOM_INTERVAL, ROOM_ATTEMPTS = 10.0, 60
"""Seconds between looks at a full disk, and how many looks."""
SPARE_BYTES = 256 * 2**20
"""Room that is left to others on a disk."""

KIND = "expert progress"
FOLDER = "progress"
_FILE = re.compile(r"(\d+)-(\d+)\.arrow")


class ExpertProgress:
    """The progress folder of one stack."""

    def __init__(self, group: ExpertGroup, experts: Sequence[int], kept: Sequence[int]) -> None:
        self._experts, self._kept = list(experts), frozenset(kept)
        what = stable_hash({"kept": sorted(kept)})
        self._folder = group.location / FOLDER / f"{experts[0]:05d}-{len(experts)}-{what}"
        self._pending: list[_Epoch] = []
        self._due = time.monotonic()

    def resume(self, device: torch.device) -> ExpertState | None:
        """The state to go on from; None at the beginning. A damaged file and those behind it are removed."""
        state, damaged = None, False
        for name in self._names():
            if not damaged:
                try:
                    state = _state(read_tensors(self._folder / name, kind=KIND).arrays, device)
                    continue
                except CorruptFileError:
                    damaged = True
            (self._folder / name).remove()
        return state

    def add(
        self, state: ExpertState, losses: Tensor, accuracies: Tensor | None = None, *, last: bool = False
    ) -> Iterator[str]:
        """Take the state after an epoch, and write when it is time; yields why it has to wait for the disk.

        Args:
            losses, accuracies: [s] of the epoch.
            last: whether the training is over.
        """
        measured = torch.full_like(losses, float("nan")) if accuracies is None else accuracies
        self._pending.append(
            _Epoch(
                state.epoch,
                state.step,
                losses.numpy(),
                measured.numpy(),
                _to_numpy(state.parameters),
                _to_numpy(state.buffers),
            )
        )
        return self._write_if_due(state, last)

    def snapshots(self, expert: int) -> Iterator[Snapshot]:
        """One expert's kept epochs, in order."""
        place = self._experts.index(expert)
        for name in self._names():
            arrays = read_tensors(self._folder / name, kind=KIND).arrays
            for row, epoch in enumerate(arrays["epoch"].tolist()):
                if epoch in self._kept:
                    yield Snapshot(
                        epoch,
                        int(arrays["step"][row]),
                        float(arrays["loss"][row, place]),
                        float(arrays["accuracy"][row, place]),
                        arrays["parameters"][row, place],
                        arrays["buffers"][row, place],
                    )

    @staticmethod
    def remove_all(group: ExpertGroup, experts: Sequence[int]) -> None:
        """Remove what is left of a stack that is finished, whatever epochs it kept."""
        for name in (group.location / FOLDER).list():
            if name.startswith(f"{experts[0]:05d}-"):
                folder = group.location / FOLDER / name
                for file in folder.list():
                    (folder / file).remove()
                if folder.local_path is not None:
                    shutil.rmtree(folder.local_path, ignore_errors=True)

    def _write_if_due(self, state: ExpertState, last: bool) -> Iterator[str]:
        size = sum(epoch.parameters.nbytes for epoch in self._pending)
        started = time.monotonic()
        if not (last or started > self._due or size > LARGEST_WRITE):
            return
        yield from _wait_for_room(self._folder, 2 * size)
        # The state must be there after the last epoch; of the others only what is kept.
        rows = [epoch for epoch in self._pending[:-1] if epoch.number in self._kept] + self._pending[-1:]
        first, newest = self._pending[0].number, self._pending[-1].number
        arrays: dict[str, NDArray[Any]] = {
            "epoch": np.array([row.number for row in rows], np.int64),
            "step": np.array([row.step for row in rows], np.int64),
            "loss": np.stack([row.losses for row in rows]),
            "accuracy": np.stack([row.accuracies for row in rows]),
            "parameters": np.stack([row.parameters for row in rows]),
            "buffers": np.stack([row.buffers for row in rows]),
        }
        if state.velocity is not None:
            arrays["velocity"] = _to_numpy(state.velocity)
        write_tensors(self._folder / f"{first:05d}-{newest:05d}.arrow", arrays, kind=KIND, metadata={})
        ended = time.monotonic()
        self._pending, self._due = [], ended + (ended - started) / WRITE_SHARE

    def _names(self) -> list[str]:
        """The files that follow one another from the first epoch on; others are removed."""
        names, following = [], 0
        for name, first, last in sorted(self._found()):
            if first == following:
                names.append(name)
                following = last + 1
            else:
                (self._folder / name).remove()
        return names

    def _found(self) -> list[tuple[str, int, int]]:
        matches = [(name, _FILE.fullmatch(name)) for name in self._folder.list()]
        return [(name, int(match[1]), int(match[2])) for name, match in matches if match]


def _state(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> ExpertState:
    """After the last epoch of a file."""
    return ExpertState(
        parameters=torch.tensor(arrays["parameters"][-1], device=device),
        buffers=torch.tensor(arrays["buffers"][-1], device=device),
        velocity=torch.tensor(arrays["velocity"], device=device) if "velocity" in arrays else None,
        epoch=int(arrays["epoch"][-1]),
        step=int(arrays["step"][-1]),
    )


@dataclass(frozen=True)
class _Epoch:
    """A stack after one epoch."""

    number: int
    step: int
    losses: NDArray[np.float32]
    accuracies: NDArray[np.float32]
    parameters: NDArray[np.float32]
    buffers: NDArray[np.float32]


def _wait_for_room(place: Location, size: int) -> Iterator[str]:
    """Wait while a disk has no room for so many bytes; yields why, once.

    Raises:
        StoreError: it stays full.
    """
    if place.local_path is None:
        return
    for attempt in range(ROOM_ATTEMPTS):
        free = shutil.disk_usage(_existing(place.local_path)).free
        if free > size + SPARE_BYTES:
            return
        if attempt == 0:
            yield f"the disk of {place.uri} has {free / 2**20:,.0f} MiB left: waiting until there is room"
        time.sleep(ROOM_INTERVAL)
    raise StoreError(
        f"the disk of {place.uri} has no room for {size / 2**20:,.0f} MiB",
        f"it has been full for {ROOM_INTERVAL * ROOM_ATTEMPTS / 60:.0f} minutes",
        "free some space, or give another --store; the same command again goes on from the last epoch written",
    )


def _existing(path: str) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(each for each in (Path(path), *Path(path).parents) if each.exists())


def _to_numpy(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().cpu().numpy()
    return array
