"""Saved progress of networks in training, so that a lost worker costs only the training since its last file.

    <group>/progress/<first expert>-<stack size>-<hash of the kept epochs and of the experts to store>/
        <first epoch>-<last epoch>-<attempt>-<attempt before>.arrow
    <group>/progress/stacks/stacks.json     experts of each stack, as bounds [first, last)

Each file of experts holds some epochs of a whole stack: the trajectory's epochs, and the state after the last epoch. A
file is written at the end of an epoch, as often as `WRITE_SHARE` allows, and when the command is stopped. At the end
the trajectories are assembled from the files, one epoch at a time. Networks that evaluation trains keep no epoch, so
each of their files replaces the file before.

Two workers may train the same stack at the same time, such as a hung worker and its successor. Each attempt writes
under its own name and never touches the other's files. On GPUs, whose sums may differ from run to run, the two write
different numbers. A file therefore names the attempt whose state it continues, and a trajectory consists only of files
that continue each other.

Each file also holds the cost since the previous file, or the whole cost if it replaces that file. Epochs that a killed
worker had not written are trained again, and their cost is lost.
Shapes: e epochs, s networks of a stack, p parameters, q buffers.
"""

from __future__ import annotations

import re
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datm_ray.config import stable_hash
from datm_ray.core.training.experts import ExpertState
from datm_ray.core.training.loop import TrainingState
from datm_ray.errors import CorruptFileError, StoreError
from datm_ray.monitor.spent import Account, Spent
from datm_ray.store.files.filesystem import Location, MissingFileError
from datm_ray.store.files.local import nearest
from datm_ray.store.sealed import rejecting_nonsense
from datm_ray.store.tensors import TensorFile, read_tensors, write_tensors
from datm_ray.store.trajectories import ExpertGroup, Snapshot
from datm_ray.words import data_size, duration

WRITE_SHARE = 0.05
"""Largest share of a worker's time for writing progress. A lost worker then loses training of at most about 20
times the duration of a write, or of one epoch if that is longer."""
REPORT_INTERVAL = 1.0
"""Smallest number of seconds between two reports of progress, or heartbeats, of long work."""
LARGEST_WRITE = 256 * 2**20
"""Bytes of epochs' parameters that may wait in memory. After the epoch that exceeds them, a file is written."""
DISK_CHECK_INTERVAL, DISK_CHECKS = 10.0, 60
"""Seconds between two checks of whether a full disk has free space again, and the largest number of checks."""
CHECKS_OF_A_MESSAGE = 6
"""Number of checks from one message about a full disk to the next, which takes a minute. Each message is an event of
the worker, so a worker that waits does not count as stuck."""
SPARE_BYTES = 256 * 2**20
"""Bytes of a disk left free for other programs."""

STACKS, STACKS_FILE = "stacks", "stacks.json"
"""Names of a folder beside the progress folders, and of a file in this folder that lists which experts are trained
together."""
_FOLDER = re.compile(r"(\d+)-(\d+)-[0-9a-f]+")
_FILE = re.compile(r"(\d+)-(\d+)-([0-9a-f]+)-([0-9a-f]+)\.arrow")
_NO_ATTEMPT = "0"
"""Placeholder for the resumed attempt in a file's name, if the training starts at the first epoch."""


class TrainingProgress:
    """Progress folder of one stack: networks that one worker trains together."""

    kind = "training progress"
    """Kind of tensor file, stored in the files of the progress folder and checked when they are read."""

    def __init__(
        self,
        folder: Location,
        networks: int,
        account: Account | None = None,
        *,
        kept: Collection[int] = (),
        interval: float = 0.0,
    ) -> None:
        """Open the progress folder of a stack (networks that one worker trains together).

        Args:
            folder: folder that belongs to the stack alone.
            networks: number of networks in the stack.
            account: measures the cost of the worker that trains the stack; `None` for a reader.
            kept: epochs whose parameters the files keep. If empty, each file replaces the file before.
            interval: smallest number of seconds between two files, and before the first file.
        """
        self._folder, self._networks, self._kept = folder, networks, frozenset(kept)
        self._account, self.spent = account, Spent()
        self._attempt, self._before, self._latest = uuid.uuid4().hex, _NO_ATTEMPT, ""
        self.at_a_time = networks
        """Number of networks that one call of the training step computes. Saved, because it affects rounding."""
        self._pending: list[dict[str, NDArray[Any]]] = []
        """For each kept epoch that is not in a file yet, its arrays by name, see `_epoch`."""
        self._first: int | None = None
        """First epoch that was added but is not in a file yet; `None` if all added epochs are in files."""
        self._measured = (torch.empty(0), torch.empty(0))
        self._interval, self._next_write = interval, time.monotonic() + interval

    @property
    def last_epoch(self) -> int:
        """Latest saved epoch, according to the names of the files; 0 if none is saved."""
        chain = self._chain()
        return chain[-1].last if chain else 0

    def resume(self, device: torch.device) -> ExpertState | None:
        """Latest saved state, on `device`; `None` if there is no progress. Removes damaged files.

        Also restores `spent`, the cost so far, and `at_a_time`, the number of networks that one call of the training
        step computes. The cost is partial if a file was damaged.
        """
        state, self.spent, self._before = None, Spent(is_partial=self.spent.is_partial), _NO_ATTEMPT
        for part in self._chain():
            file = self._readable(part.name)
            if file is None:  # the file is gone; other files may reach a later epoch
                return self.resume(device)
            state, self._before = _state(file.arrays, device), part.attempt
            self.at_a_time = _at_a_time(file, self._networks)
            self.spent += Spent.from_json(file.metadata["spent"])
        return state

    def _readable(self, name: str) -> TensorFile | None:
        """Content of a progress file; `None` if the file is damaged or gone. A damaged file is removed."""
        try:
            return self._read(name)
        except CorruptFileError:
            (self._folder / name).remove()
            self.spent += Spent(is_partial=True)  # what its epochs had cost is lost
        except MissingFileError:
            pass
        return None

    def _read(self, name: str) -> TensorFile:
        """Content of a progress file.

        Raises:
            CorruptFileError: the file is damaged, or its arrays do not fit the number of networks or its name.
            MissingFileError: the file is gone.
        """
        place = self._folder / name
        file = read_tensors(place, kind=self.kind)
        with rejecting_nonsense(place):
            arrays, stack = file.arrays, (len(file.arrays["epoch"]), self._networks)
            shapes = [arrays[key].shape for key in ("loss", "accuracy", "parameters", "buffers", "step")]
            fitting = 0 not in stack and shapes[:2] == [stack, stack] and shapes[4] == stack[:1]
            fitting = fitting and all(len(shape) == 3 and shape[:2] == stack for shape in shapes[2:4])
            velocity = arrays.get("velocity", arrays["parameters"][-1]).shape
            fitting = fitting and velocity in [(stack[1], vectors * shapes[2][2]) for vectors in (1, 2)]
            last = _FILE.fullmatch(name)
            if not fitting or last is None or int(arrays["epoch"][-1]) != int(last[2]):
                raise ValueError(f"it does not hold {stack[1]} networks, or its epochs differ from its name")
            Spent.from_json(file.metadata["spent"])
            _at_a_time(file, self._networks)
        return file

    def add(
        self,
        state: TrainingState,
        losses: Tensor | None = None,
        accuracies: Tensor | None = None,
        *,
        last: bool = False,
    ) -> Iterator[str]:
        """Add the state after an epoch, and write it if due. Returns messages, empty unless the disk is full.

        The state is added by the call, but a due file is written while the caller iterates over the messages.

        Args:
            state: state of all networks of the stack after the epoch.
            losses: [s] mean loss of each network in the epoch; `None` if unknown.
            accuracies: [s] test accuracy of each network after the epoch, in [0, 1]; `None` if unknown.
            last: True if the training ends with this epoch.

        Raises:
            StoreError: while iterating: the disk stays full, or the file cannot be written.
        """
        unknown = torch.full((self._networks,), float("nan"))
        self._measured = (unknown if losses is None else losses, unknown if accuracies is None else accuracies)
        self._first = state.epoch if self._first is None else self._first
        if state.epoch in self._kept:
            self._pending.append(self._epoch(state))
        size = sum(epoch["parameters"].nbytes for epoch in self._pending)
        is_due = last or time.monotonic() > self._next_write or size > LARGEST_WRITE
        return self.write(state) if is_due else iter(())

    def _epoch(self, state: TrainingState) -> dict[str, NDArray[Any]]:
        """Arrays, by name, that a file holds of the last epoch of `state`, without the file's axis of epochs."""
        losses, accuracies = self._measured
        return {
            "epoch": np.array(state.epoch, np.int64),
            "step": np.array(state.step, np.int64),
            "loss": losses.numpy(),
            "accuracy": accuracies.numpy(),
            "parameters": _to_numpy(state.parameters),
            "buffers": _to_numpy(state.buffers),
        }

    @property
    def is_written(self) -> bool:
        """True if all epochs so far are on disk, so that a resuming worker trains none of them again."""
        return self._first is None

    def write(self, state: TrainingState) -> Iterator[str]:
        """Write the epochs that were added since the last file. Yields a message if the disk is full.

        Args:
            state: state after the last epoch that was added, from which a training can resume.

        Raises:
            StoreError: the disk stays full, or the file cannot be written.
        """
        if self._first is None:
            return
        started = time.monotonic()
        rows = self._pending
        if not rows or rows[-1]["epoch"] != state.epoch:  # needed to resume, even if no trajectory keeps this epoch
            rows = [*rows, self._epoch(state)]
        yield from wait_for_disk_space(self._folder, 2 * sum(row["parameters"].nbytes for row in rows))
        arrays = {name: _stacked([row[name] for row in rows]) for name in rows[0]}
        velocity = state.velocity
        if velocity is not None:
            arrays["velocity"] = _to_numpy(velocity)
        lap = Spent(is_partial=self.spent.is_partial) + (self._account.lap() if self._account else Spent())
        self.spent, first = self.spent + lap, self._first if self._kept else 0
        name = f"{first:05d}-{state.epoch:05d}-{self._attempt}-{self._before}.arrow"
        metadata: dict[str, Any] = {"spent": (lap if self._kept else self.spent).to_json()}
        metadata |= {"at_a_time": self.at_a_time} if self.at_a_time != self._networks else {}
        write_tensors(self._folder / name, arrays, kind=self.kind, metadata=metadata)
        if not self._kept:
            self._remove_earlier(name)
        ended = time.monotonic()
        self._pending, self._first, self._before = [], None, self._attempt
        self._next_write = ended + max(self._interval, (ended - started) / WRITE_SHARE)

    def _remove_earlier(self, name: str) -> None:
        """Remove the progress file that this attempt wrote before the file `name`, if there is one."""
        if self._latest:
            with suppress(StoreError):  # another process has removed it
                (self._folder / self._latest).remove()
        self._latest = name

    def remove(self) -> None:
        """Remove the progress folder, which a finished training no longer needs."""
        remove_folder(self._folder)

    def _chain(self) -> list[_Part]:
        """Files of one training from epoch 0 to the latest epoch that any attempt has reached, in order.

        Each file continues the state at the end of the file before. If several attempts have reached the latest epoch,
        the files of this attempt are preferred.
        """
        parts = self._found()
        by_end = {(part.last, part.attempt): part for part in parts}
        chains = [chain for part in parts if (chain := part.chain(by_end))]
        return max(chains, key=lambda chain: (chain[-1].last, chain[-1].attempt == self._attempt), default=[])

    def _found(self) -> list[_Part]:
        matches = [_FILE.fullmatch(name) for name in sorted(self._folder.list())]
        return [_Part(int(m[1]), int(m[2]), m[3], m[4], m.string) for m in matches if m]


@dataclass(frozen=True)
class _Part:
    """Facts that the name of a progress file holds: its epochs, who wrote it, and which training it continues."""

    first: int
    last: int
    """Last epoch in the file, inclusive."""
    attempt: str
    """Identifier of the attempt (one worker's training of the networks) that wrote the file."""
    before: str
    """Identifier of the attempt whose state at epoch `first` - 1 the epochs of this file continue."""
    name: str

    def chain(self, by_end: Mapping[tuple[int, str], _Part]) -> list[_Part]:
        """Files from epoch 0 up to this file, each the continuation of the file before; empty if a file is missing.

        Args:
            by_end: (last epoch, attempt) -> file, for all files of the folder.
        """
        chain: list[_Part] = [self]
        while chain[-1].first > 0:
            before = by_end.get((chain[-1].first - 1, chain[-1].before))
            if before is None:
                return []
            chain.append(before)
        return chain[::-1]


class ExpertProgress(TrainingProgress):
    """Progress folder of one stack: experts that one worker trains together.

    Attributes:
        experts: numbers of the experts that are trained together.
        wanted: those of `experts` that will be stored.
    """

    kind = "expert progress"

    def __init__(
        self,
        group: ExpertGroup,
        experts: Sequence[int],
        kept: Sequence[int],
        wanted: Collection[int],
        account: Account | None = None,
    ) -> None:
        """Open the progress folder of a stack (experts that one worker trains together).

        Args:
            group: folder of the experts in the store.
            experts: numbers of the experts that are trained together.
            kept: epochs that the trajectories keep.
            wanted: those of `experts` that will be stored.
            account: measures the cost of the worker that trains the stack; `None` for a reader.
        """
        what = stable_hash({"kept": sorted(kept), "wanted": sorted(wanted)})
        self._name = f"{experts[0]:05d}-{len(experts)}-{what}"
        self._group, self.experts, self.wanted = group, list(experts), set(wanted)
        super().__init__(group.progress / self._name, len(experts), account, kept=kept)

    def snapshots(self, expert: int) -> Iterator[Snapshot]:
        """Snapshots of one expert's kept epochs, in order. Raises CorruptFileError if a progress file is damaged."""
        place = self.experts.index(expert)
        for part in self._chain():
            arrays = self._read(part.name).arrays
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

    def require_whole(self, epochs: int) -> None:
        """Raise a `StoreError` unless the files reach the last epoch, number `epochs`.

        Files are missing if another process has finished the stack, or deleted them.
        """
        if [part.last for part in self._chain()][-1:] != [epochs]:
            raise StoreError(
                f"files disappeared from {self._folder.uri} during expert training",
                "another command trains the same experts, or somebody deleted the files",
                "run the same command again",
            )

    def note_cost(self) -> None:
        """Write the cost of training all epochs, over all attempts, into the folder of the experts in the store."""
        spent = self.spent + (self._account.spent() if self._account else Spent())
        self._group.write_cost(self._name, {"experts": sorted(self.wanted), "spent": spent.to_json()})

    @staticmethod
    def clear_up(group: ExpertGroup) -> None:
        """Remove every progress folder whose experts are all stored."""
        stored = set(group.experts())
        for name in group.progress.list():
            match = _FOLDER.fullmatch(name)
            if match and set(range(int(match[1]), int(match[1]) + int(match[2]))) <= stored:
                remove_folder(group.progress / name)


def read_stacks(group: ExpertGroup) -> list[tuple[int, ...]]:
    """Numbers of the experts in each stack (experts trained together), from `note_stacks`' file; empty without it.

    Raises:
        CorruptFileError: the file is damaged.
    """
    place = group.progress / STACKS / STACKS_FILE
    if not place.exists():
        return []
    with rejecting_nonsense(place):
        return [tuple(range(int(first), int(last))) for first, last in place.read_json()]


def note_stacks(group: ExpertGroup, stacks: Sequence[Sequence[int]]) -> None:
    """Record in a file which missing experts are trained together, so that a resumed command trains the same stacks.

    An empty sequence deletes the file. Stacks of different sizes round differently, so a stack resumes only from
    progress of the same stack.

    Args:
        stacks: numbers of the experts in each stack, consecutive.
    """
    if not stacks:
        remove_folder(group.progress / STACKS)
    elif [tuple(stack) for stack in stacks] != read_stacks(group):
        bounds = [[stack[0], stack[-1] + 1] for stack in stacks]
        (group.progress / STACKS / STACKS_FILE).write_json(bounds)


def remove_folder(folder: Location) -> None:
    """Remove a folder of files, which other processes may remove at the same time."""
    for name in folder.list():
        with suppress(StoreError):  # another process has removed it
            (folder / name).remove()
    if folder.local_path is not None:
        shutil.rmtree(folder.local_path, ignore_errors=True)


def _at_a_time(file: TensorFile, networks: int) -> int:
    """Number of networks that one call of the training step computed, as recorded in a progress file.

    Returns `networks`, the number of all networks of the stack, if the file does not give the number. Raises ValueError
    if the number is not between 1 and `networks`.
    """
    found = int(file.metadata.get("at_a_time", networks))
    if not 1 <= found <= networks:
        raise ValueError(f"it has calls of {found} networks, and {networks} in all")
    return found


def _state(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> ExpertState:
    """State after the last epoch in the arrays of a progress file, on `device`."""
    return ExpertState(
        parameters=torch.tensor(arrays["parameters"][-1], device=device),
        buffers=torch.tensor(arrays["buffers"][-1], device=device),
        velocity=torch.tensor(arrays["velocity"], device=device) if "velocity" in arrays else None,
        epoch=int(arrays["epoch"][-1]),
        step=int(arrays["step"][-1]),
    )


def wait_for_disk_space(place: Location, size: int) -> Iterator[str]:
    """Wait until the disk of `place` has more than `size` free bytes besides `SPARE_BYTES`.

    Yields a message every minute while it waits. Does not wait for an object store.

    Raises:
        StoreError: the disk stays full, for ten minutes.
    """
    if place.local_path is None:
        return
    for attempt in range(DISK_CHECKS):
        free = shutil.disk_usage(nearest(place.local_path)).free
        if free > size + SPARE_BYTES:
            return
        if attempt % CHECKS_OF_A_MESSAGE == 0:
            yield f"waiting for disk space: the disk of {place.uri} has {data_size(free)} left"
        time.sleep(DISK_CHECK_INTERVAL)
    raise StoreError(
        f"the disk of {place.uri} has no space for {data_size(size)}",
        f"it has been full for {duration(DISK_CHECK_INTERVAL * DISK_CHECKS)}",
        "free some space, or give another --store; then run the same command again: it resumes",
    )


def _stacked(epochs: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Stack the arrays of e epochs into one array, with e as its first axis. A single array is not copied."""
    return epochs[0][None] if len(epochs) == 1 else np.stack(epochs)


def _to_numpy(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().cpu().numpy()
    return array
