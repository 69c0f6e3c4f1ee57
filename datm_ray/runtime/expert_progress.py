"""What is kept of experts that are still in training, so that nothing but the last seconds is ever trained twice.

    <group>/progress/<first expert>-<stack size>-<what is kept>/<first epoch>-<last epoch>-<writer>.arrow

Each file holds some epochs of a whole stack: those that the trajectory will keep, and the state after the last of them.
Files are written whole, at the end of an epoch, as often as `WRITE_SHARE` allows; the trajectories are assembled from
them at the end, an epoch at a time. Two who train one stack at the same moment write under names of their own, and
neither touches the other's; on processors they write the same numbers. On GPUs, whose sums may differ from run to run,
they do not: there a worker that was given up but lives on, and its successor, may each have a part of one trajectory.
Each file tells too what was spent since the one before it; what a killed worker had not written yet is trained again,
and its cost is not counted.
Shapes: e epochs, s experts, p parameters, q buffers.
"""

from __future__ import annotations

import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
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
from datm_ray.runtime.spent import Account, Spent
from datm_ray.store.filesystem import Location
from datm_ray.store.sealed import rejecting_nonsense
from datm_ray.store.tensors import TensorFile, read_tensors, write_tensors
from datm_ray.store.trajectories import ExpertGroup, Snapshot, size_in_words

WRITE_SHARE = 0.05
"""Of a worker's time that may go into writing progress: a lost worker costs some twenty times what a write takes."""
LARGEST_WRITE = 256 * 2**20
"""Bytes of epochs that are kept in memory at most before they are written, but for one epoch."""
ROOM_INTERVAL, ROOM_ATTEMPTS = 10.0, 60
"""Seconds between looks at a full disk, and how many looks."""
SPARE_BYTES = 256 * 2**20
"""Room that is left to others on a disk."""

KIND = "expert progress"
_FOLDER = re.compile(r"(\d+)-(\d+)-[0-9a-f]+")
_FILE = re.compile(r"(\d+)-(\d+)-[0-9a-f]+\.arrow")


class ExpertProgress:
    """The progress folder of one stack."""

    def __init__(
        self,
        group: ExpertGroup,
        experts: Sequence[int],
        kept: Sequence[int],
        wanted: Sequence[int],
        account: Account | None = None,
    ) -> None:
        """Of a stack.

        Args:
            kept: epochs of the trajectories.
            wanted: those of the experts that will be stored.
            account: of who trains it; none does not train.
        """
        self._group, self._account, self._spent = group, account, Spent()
        self._experts, self._kept = list(experts), frozenset(kept)
        what = stable_hash({"kept": sorted(kept), "wanted": sorted(wanted)})
        self._name = f"{experts[0]:05d}-{len(experts)}-{what}"
        self._folder, self._wanted = group.progress / self._name, list(wanted)
        self._writer = uuid.uuid4().hex
        self._pending: list[_Epoch] = []
        self._due = time.monotonic()

    def resume(self, device: torch.device) -> ExpertState | None:
        """The state to go on from; None at the beginning. Damaged files are removed."""
        state, self._spent = None, Spent()
        for name, _ in self._chain():
            file = self._readable(name)
            if file is None:  # without it another file may reach as far
                return self.resume(device)
            state = _state(file.arrays, device)
            self._spent += _spent(file)
        return state

    def _readable(self, name: str) -> TensorFile | None:
        """A file; None where it was damaged, and is removed."""
        try:
            return self._read(name)
        except CorruptFileError:
            (self._folder / name).remove()
            return None

    def _read(self, name: str) -> TensorFile:
        """A file whose arrays fit the stack. Raises CorruptFileError."""
        place = self._folder / name
        file = read_tensors(place, kind=KIND)
        with rejecting_nonsense(place):
            arrays, stack = file.arrays, (len(file.arrays["epoch"]), len(self._experts))
            shapes = [arrays[key].shape for key in ("loss", "accuracy", "parameters", "buffers", "step")]
            fitting = 0 not in stack and shapes[:2] == [stack, stack] and shapes[4] == stack[:1]
            fitting = fitting and all(len(shape) == 3 and shape[:2] == stack for shape in shapes[2:4])
            fitting = fitting and arrays.get("velocity", arrays["parameters"][-1]).shape == shapes[2][1:]
            last = _FILE.fullmatch(name)
            if not fitting or last is None or int(arrays["epoch"][-1]) != int(last[2]):
                raise ValueError(f"it is not of {stack[1]} experts, or of other epochs than its name says")
            _spent(file)
        return file

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
        for name, start in self._chain():
            arrays = self._read(name).arrays
            for row, epoch in enumerate(arrays["epoch"].tolist()):
                if epoch >= start and epoch in self._kept:
                    yield Snapshot(
                        epoch,
                        int(arrays["step"][row]),
                        float(arrays["loss"][row, place]),
                        float(arrays["accuracy"][row, place]),
                        arrays["parameters"][row, place],
                        arrays["buffers"][row, place],
                    )

    def require_whole(self, epochs: int) -> None:
        """Raise a `StoreError` where not all epochs are there: somebody else has finished the stack, or cleared up."""
        names = [name for name, _ in self._chain()]
        match = _FILE.fullmatch(names[-1]) if names else None
        if match is None or int(match[2]) != epochs:
            raise StoreError(
                f"{self._folder.uri} lost what was in it while experts were trained",
                "another command trains them too, or somebody deleted it",
                "give the same command again",
            )

    def note_cost(self) -> None:
        """Write down, beside the experts, what the training of all epochs has cost."""
        spent = self._spent + (self._account.spent() if self._account else Spent())
        self._group.write_cost(self._name, {"experts": self._wanted, "spent": spent.to_json()})

    def remove(self) -> None:
        """Remove the folder of a stack that is finished."""
        _remove_folder(self._folder)

    @staticmethod
    def clear_up(group: ExpertGroup) -> None:
        """Remove the folders of stacks, of whatever size, whose experts are all stored by now."""
        stored = set(group.experts())
        for name in group.progress.list():
            match = _FOLDER.fullmatch(name)
            if match and set(range(int(match[1]), int(match[1]) + int(match[2]))) <= stored:
                _remove_folder(group.progress / name)

    def _write_if_due(self, state: ExpertState, last: bool) -> Iterator[str]:
        size = sum(epoch.parameters.nbytes for epoch in self._pending)
        started = time.monotonic()
        if not (last or started > self._due or size > LARGEST_WRITE):
            return
        yield from wait_for_room(self._folder, 2 * size)
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
        lap = self._account.lap() if self._account else Spent()
        self._spent, metadata = self._spent + lap, {"spent": lap.to_json()}
        name = f"{first:05d}-{newest:05d}-{self._writer}.arrow"
        write_tensors(self._folder / name, arrays, kind=KIND, metadata=metadata)
        ended = time.monotonic()
        self._pending, self._due = [], ended + (ended - started) / WRITE_SHARE

    def _chain(self) -> list[tuple[str, int]]:
        """Files that follow one another from the first epoch on, and of each the first epoch that is not before it.

        Where two writers' files overlap, either will do; the one that reaches further is taken.
        """
        chain: list[tuple[str, int]] = []
        following, found = 0, self._found()
        while True:
            fitting = [(last, name) for name, first, last in found if first <= following <= last]
            if not fitting:
                return chain
            last, name = max(fitting)
            chain.append((name, following))
            following = last + 1

    def _found(self) -> list[tuple[str, int, int]]:
        matches = [(name, _FILE.fullmatch(name)) for name in self._folder.list()]
        return [(name, int(match[1]), int(match[2])) for name, match in matches if match]


def _remove_folder(folder: Location) -> None:
    for name in folder.list():
        with suppress(StoreError):  # somebody else was faster
            (folder / name).remove()
    if folder.local_path is not None:
        shutil.rmtree(folder.local_path, ignore_errors=True)


def _spent(file: TensorFile) -> Spent:
    """What a file says was spent on it; nothing in files of earlier versions."""
    return Spent.from_json(file.metadata["spent"]) if "spent" in file.metadata else Spent()


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


def wait_for_room(place: Location, size: int) -> Iterator[str]:
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
            yield f"the disk of {place.uri} has {size_in_words(free)} left: waiting until there is room"
        time.sleep(ROOM_INTERVAL)
    raise StoreError(
        f"the disk of {place.uri} has no room for {size_in_words(size)}",
        f"it has been full for {ROOM_INTERVAL * ROOM_ATTEMPTS / 60:.0f} minutes",
        "free some space, or give another --store; the same command again goes on from the last epoch written",
    )


def _existing(path: str) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(each for each in (Path(path), *Path(path).parents) if each.exists())


def _to_numpy(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().cpu().numpy()
    return array
