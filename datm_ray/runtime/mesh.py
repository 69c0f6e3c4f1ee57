"""Sums between the workers that do one task together.

The workers stand in a grid: a row for every backbone, a column for every shard of the classes. They talk through
torch.distributed, and a worker that waits for a dead, hung or unreachable peer gets a `PeerLostError` in time.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from datm_ray.core.training import Pulse
from datm_ray.errors import PeerLostError
from datm_ray.runtime.executor import Seat

Result = TypeVar("Result")

SIGN_OF_LIFE = 0.5
"""Seconds of work after which the others are told that it goes on."""
ROWS_MEET = 0.25
"""Share of the timeout after which rows at work hear from each other. Seldom, for the fast wait there for the slow."""
EAGER_WAIT = 0.01
"""Seconds for which the end of a sum on GPUs is looked for more often than NCCL does, which is once a millisecond."""
READ_ADDRESS = 0x8915
"""Linux's SIOCGIFADDR."""


@dataclass(frozen=True)
class Mesh(ABC):
    """This worker's place in the grid, and what it can do with the others.

    All of them must make the same calls in the same order. Results carry no gradient; where there is nobody to sum
    with, a result may be the argument itself.
    """

    rank: int = 0
    rows: int = 1
    """Backbones."""
    columns: int = 1
    """Shards of the classes."""

    @property
    def row(self) -> int:
        """Of the backbone that this worker has."""
        return self.rank // self.columns

    @property
    def column(self) -> int:
        """Of the classes that this worker has."""
        return self.rank % self.columns

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that reports and writes."""
        return self.rank == 0

    @abstractmethod
    def sum_over_classes(self, tensor: Tensor) -> Tensor:
        """The sum over this row; every worker in it gets the same bits."""

    @abstractmethod
    def sum_over_backbones(self, tensor: Tensor) -> Tensor:
        """The sum over this column; every worker in it gets the same bits."""

    @abstractmethod
    def sum_over_all(self, tensor: Tensor) -> Tensor:
        """The sum over all workers; every one gets the same bits."""

    @abstractmethod
    def gather(self, tensor: Tensor) -> Tensor | None:
        """Join the parts of row 0 along their first dimension, in which they may differ, in the order of columns.

        Returns:
            The whole on rank 0, None elsewhere.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Wait until all workers are here."""

    @abstractmethod
    def until_all_are_done(self, work: Callable[[Pulse], Result]) -> Result:
        """Do this worker's own work, and wait until every worker has done its.

        They hear from each other while they work, so only one bit of work must fit into the timeout.
        """

    @abstractmethod
    def in_rows(self, work: Callable[[Callable[[Tensor], Tensor]], None]) -> None:
        """Do this row's own work, and wait until every row has done its.

        Only one student step, or whatever else lies between two sums, must fit into the timeout.

        Args:
            work: gets `sum_over_classes` in a form that tells the other rows now and then that the work goes on. It
                talks to nobody but through this, which all workers of its row call equally often.
        """

    def from_first(self, work: Callable[[Pulse], float]) -> float:
        """A number that rank 0 works out while the others wait."""
        number = self.until_all_are_done(work if self.is_first else lambda pulse: 0.0)
        return float(self.sum_over_all(torch.tensor([number], dtype=torch.float64)))


class Alone(Mesh):
    """One worker that does a whole task."""

    def sum_over_classes(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def sum_over_backbones(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def sum_over_all(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor | None:
        """The tensor itself."""
        return tensor

    def barrier(self) -> None:
        """Nobody is waited for."""

    def until_all_are_done(self, work: Callable[[Pulse], Result]) -> Result:
        """Nobody is waited for."""
        return work(lambda: None)

    def in_rows(self, work: Callable[[Callable[[Tensor], Tensor]], None]) -> None:
        """Nobody is waited for."""
        work(self.sum_over_classes)


@dataclass(frozen=True)
class ProcessMesh(Mesh):
    """One of several processes, all of which are in torch's default process group."""

    row_group: dist.ProcessGroup | None = None
    """None where there is one column."""
    column_group: dist.ProcessGroup | None = None
    """None where there is one row."""
    timeout: float = 300.0
    """Seconds for which a peer is waited for."""

    def sum_over_classes(self, tensor: Tensor) -> Tensor:
        """See `Mesh.sum_over_classes`."""
        return self._sum(tensor, self.row_group) if self.row_group else tensor

    def sum_over_backbones(self, tensor: Tensor) -> Tensor:
        """See `Mesh.sum_over_backbones`."""
        return self._sum(tensor, self.column_group) if self.column_group else tensor

    def sum_over_all(self, tensor: Tensor) -> Tensor:
        """See `Mesh.sum_over_all`."""
        return self._sum(tensor, dist.group.WORLD)

    def gather(self, tensor: Tensor) -> Tensor | None:
        """See `Mesh.gather`. The parts travel through the CPU, for this is rare and NCCL is not needed."""
        if self.is_first:
            return self._receive_parts(tensor.detach())
        if self.row == 0:
            with self._peers_needed():
                dist.send(torch.tensor([tensor.shape[0]]), 0)
                if tensor.numel():
                    dist.send(tensor.detach().cpu().contiguous(), 0)
        return None

    def barrier(self) -> None:
        """See `Mesh.barrier`."""
        self.sum_over_all(torch.zeros(1))

    def until_all_are_done(self, work: Callable[[Pulse], Result]) -> Result:
        """See `Mesh.until_all_are_done`."""
        last = time.monotonic()

        def pulse() -> None:
            nonlocal last
            if time.monotonic() - last >= SIGN_OF_LIFE:
                self._count_working(True)
                last = time.monotonic()

        result = work(pulse)
        while self._count_working(False):
            pass
        return result

    def in_rows(self, work: Callable[[Callable[[Tensor], Tensor]], None]) -> None:
        """See `Mesh.in_rows`."""
        if self.rows == 1:
            work(self.sum_over_classes)
            return
        last = time.monotonic()

        def sum_and_tell(tensor: Tensor) -> Tensor:
            nonlocal last
            total = self.sum_over_classes(tensor)
            # Clocks differ, and a row in which one worker met the other rows and one went on would wait for ever.
            is_time = torch.tensor([int(time.monotonic() - last >= ROWS_MEET * self.timeout)])
            if int(self.sum_over_classes(is_time)):
                self._count_working(True)
                last = time.monotonic()
            return total

        work(sum_and_tell)
        while self._count_working(False):
            pass

    def _count_working(self, working: bool) -> int:
        """How many workers are at work still; all who take part in this sum say whether they are."""
        return int(self.sum_over_all(torch.tensor([int(working)])))

    def _sum(self, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        with self._peers_needed():
            work = dist.all_reduce(total, group=group, async_op=True)
            if total.is_cuda:
                _look_often(work)
            work.wait()
        return total

    def _receive_parts(self, own: Tensor) -> Tensor:
        """The whole, for which no more memory is taken than it has."""
        lengths = [own.shape[0]]
        for rank in range(1, self.columns):
            length = torch.zeros(1, dtype=torch.int64)
            with self._peers_needed():
                dist.recv(length, rank)
            lengths.append(int(length))
        whole = own.new_empty((sum(lengths), *own.shape[1:]))
        mine, *others = whole.split(lengths)
        mine.copy_(own)
        for rank, part in enumerate(others, start=1):
            received = part if part.device.type == "cpu" else torch.empty(part.shape, dtype=part.dtype)
            if part.numel():
                with self._peers_needed():
                    dist.recv(received, rank)
                if received is not part:
                    part.copy_(received)
        return whole

    def _peers_needed(self) -> AbstractContextManager[None]:
        return _peers_needed(self.rank, self.rows * self.columns)


@contextmanager
def open_mesh(
    seat: Seat | None, rows: int, columns: int, device: torch.device, timeout: float
) -> Generator[Mesh, None, None]:
    """Meet the other workers of a task for as long as the context lasts.

    Args:
        seat: this worker's place; None for a worker that does the task alone, whatever rows and columns are.
        rows: backbones.
        columns: shards of the classes.
        device: where this worker computes.
        timeout: seconds to wait for a peer, when meeting and in every call.

    Raises:
        PeerLostError: a peer does not come, dies, or does not answer in time.
    """
    if seat is None:
        yield Alone()
        return
    if seat.size != rows * columns:
        raise ValueError(f"{seat.size} workers cannot stand in a grid of {rows} x {columns}")
    with _settings(seat.meeting):
        backend = "gloo"
        try:
            with _peers_needed(seat.rank, seat.size):
                backend = _join(seat, device, timedelta(seconds=timeout))
                groups = _groups(rows, columns, timedelta(seconds=timeout))
            yield ProcessMesh(seat.rank, rows, columns, *groups, timeout)
        except BaseException:
            # A peer may be in the midst of a sum that will never end; NCCL waits for it unless it is told not to.
            if dist.is_initialized() and "nccl" in backend:
                dist.distributed_c10d._abort_process_group(dist.group.WORLD)
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _join(seat: Seat, device: torch.device, timeout: timedelta) -> str:
    """Form the process group of all workers. Returns its backend."""
    # Half, for torch sleeps between its attempts, which may double the time.
    store, _, _ = next(rendezvous(f"tcp://{seat.meeting}", seat.rank, seat.size, timeout=timeout / 2))
    store.set_timeout(timeout)
    backend = _backend(store, seat, device)
    dist.init_process_group(backend, store=store, rank=seat.rank, world_size=seat.size, timeout=timeout)
    return backend


def _backend(store: Store, seat: Seat, device: torch.device) -> str:
    """NCCL if every worker has a GPU to itself, which it insists on; otherwise gloo, whose sums pass the CPU."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    store.set(f"gpu of {seat.rank}", gpu)
    gpus = {store.get(f"gpu of {rank}") for rank in range(seat.size)}
    return "cpu:gloo,cuda:nccl" if len(gpus) == seat.size and b"" not in gpus else "gloo"


def _groups(rows: int, columns: int, timeout: timedelta) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """This worker's row and column; None for those that it has to itself."""
    every_row = [[row * columns + column for column in range(columns)] for row in range(rows)]
    every_column = [list(ranks) for ranks in zip(*every_row, strict=True)]
    return _group_of(every_row, timeout), _group_of(every_column, timeout)


def _group_of(parts: list[list[int]], timeout: timedelta) -> dist.ProcessGroup | None:
    if len(parts) == 1:
        return dist.group.WORLD if len(parts[0]) > 1 else None
    if len(parts[0]) == 1:
        return None
    # Every worker has to make all groups, its own or not, in the same order.
    groups = [dist.new_group(ranks, timeout=timeout) for ranks in parts]
    return next(group for group in groups if isinstance(group, dist.ProcessGroup))  # a number stands for the others'


@contextmanager
def _peers_needed(rank: int, size: int) -> Generator[None, None, None]:
    """Turns torch's ways of saying that a peer is lost into one."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too, but not the peers' doing
        raise
    except RuntimeError as failure:
        raise PeerLostError(
            f"worker {rank + 1} of {size} lost its peers: {_first_line(failure)}",
            "a worker died or hangs, or its machine cannot be reached",
            "give the same command again: it resumes; raise cluster.peer_timeout if the others are only slow",
        ) from None


def _first_line(failure: BaseException) -> str:
    """What torch says, without the place in its sources that it puts before."""
    lines = [re.sub(r"^\[[^\]]*\.(cc|cpp):\d+\] *", "", line.strip()) for line in str(failure).splitlines()]
    return next((line.partition(". ")[0].rstrip(".") for line in lines if line), type(failure).__name__)


@contextmanager
def _settings(meeting: str) -> Generator[None, None, None]:
    """Environment variables that torch reads, where the user has not set them."""
    # Without the first, NCCL ends the whole process when a peer is lost, where an error can still be told.
    wanted = {"TORCH_NCCL_BLOCKING_WAIT": "1", "GLOO_SOCKET_IFNAME": _interface_towards(*_split(meeting))}
    ours = {name: value for name, value in wanted.items() if value and name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _split(meeting: str) -> tuple[str, int]:
    host, _, port = meeting.rpartition(":")
    return host.strip("[]"), int(port)


def _interface_towards(host: str, port: int) -> str:
    """The network interface with the way to a host, or "" where this cannot be found out.

    Left to itself, gloo takes the one of this machine's own name, which often is one that peers cannot reach.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing, but chooses the way
            address = probe.getsockname()[0]
            names = [name for _, name in socket.if_nameindex()]
            return next((name for name in names if _address_of(probe, name) == address), "")
    except OSError:
        return ""


def _address_of(any_socket: socket.socket, interface: str) -> str:
    try:
        import fcntl  # not on Windows

        answer = fcntl.ioctl(any_socket.fileno(), READ_ADDRESS, struct.pack("256s", interface.encode()))
        return socket.inet_ntoa(answer[20:24])
    except (ImportError, OSError):
        return ""


def _look_often(work: dist.Work) -> None:
    """Wait for a short time, in small steps."""
    end = time.monotonic() + EAGER_WAIT
    while time.monotonic() < end and not work.is_completed():
        time.sleep(0)
