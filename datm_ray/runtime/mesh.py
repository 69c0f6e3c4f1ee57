"""Collective sums between the workers that run one task together.

Workers form a grid. The workers of a row compute the same networks (see `RunConfig.roles`), each for a shard of the
classes. The workers of a column have the same shard, each for other networks. Workers communicate through
torch.distributed. A worker that waits for a dead, hung or unreachable peer gets a `PeerLostError` after the timeout.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from datm_ray.core.steps import Steps, Work, finished
from datm_ray.core.training.loop import Heartbeat
from datm_ray.errors import ClusterError, PeerLostError
from datm_ray.runtime.executor import WorkerRank
from datm_ray.runtime.variables import variables

Result = TypeVar("Result")

HEARTBEAT_INTERVAL = 0.5
"""Minimum seconds between two heartbeats of a worker that works while others wait for it."""
ROW_HEARTBEAT_SHARE = 0.25
"""Shortest time between two heartbeats of a row of workers, as a share of `cluster.peer_timeout`.

A row is the workers of the same networks. The share is large, because fast rows wait for slow ones each time."""
EAGER_POLLING = 0.01
"""Longest time in seconds to poll without pause for the end of a sum on GPUs. NCCL then polls, once per millisecond."""
SIOCGIFADDR = 0x8915
"""Linux's request code for the address of a network interface."""
_LOST_PEER = re.compile(
    r"connect|clos(?:ed|ure)|reset|socket|time[d ]*out|pipe|peer|abort|remote|network|unreachable|system error", re.I
)
"""Words in the messages of gloo, NCCL and torch about a peer that died, hangs or is unreachable."""
_OWN_DEVICE = re.compile(r"cuda (?:error|failure|function|out of memory)", re.I)
"""Words in messages about a failure of this worker's own GPU. Such messages may contain words of `_LOST_PEER` too."""

_SHARED_MEMORY = re.compile(r"shared memory|/dev/shm|no space left", re.I)
"""Words of NCCL about this machine's shared memory, in messages that blame a "system error" first."""


@dataclass(frozen=True)
class Mesh:
    """Position of this worker in a grid of workers, and collective operations with the other workers.

    Workers of a row compute the same networks, workers of a column the same shard of the classes. A worker without
    process groups is alone: a sum is the tensor itself, and no method waits.

    All workers must make the same calls in the same order. Results carry no gradient. A worker that has nobody to sum
    with may get the argument itself as the result. Methods that communicate raise a `PeerLostError` if another worker
    dies or does not answer within `timeout`, and a `ClusterError` if this machine has too little shared memory.
    """

    rank: int = 0
    rows: int = 1
    """Number of rows: one per role of `RunConfig.roles`, or 1 for a worker that is alone."""
    columns: int = 1
    """Number of columns: one per shard of the classes, or 1 for a worker that is alone."""
    row_group: dist.ProcessGroup | None = None
    """Process group of the ranks in this rank's row; `None` if there is one column."""
    column_group: dist.ProcessGroup | None = None
    """Process group of the ranks in this rank's column; `None` if there is one row."""
    everyone: dist.ProcessGroup | None = None
    """Process group of all ranks, torch's default group; `None` for a worker that is alone."""
    timeout: float = 300.0
    """Seconds to wait for other workers in each sum or transfer."""

    @property
    def row(self) -> int:
        """Number of this worker's row, from 0: index in `RunConfig.roles` of the networks that the worker computes."""
        return self.rank // self.columns

    @property
    def column(self) -> int:
        """Number of this worker's column, from 0: the index of its shard of the classes."""
        return self.rank % self.columns

    @property
    def is_first(self) -> bool:
        """True if this worker has rank 0; only this rank reports and writes."""
        return self.rank == 0

    def sum_over_classes(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over this row: the workers of the same networks, each with a shard of the classes.

        Every worker of the row gets the same bits.
        """
        return self._sum(tensor, self.row_group)

    def sum_over_backbones(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over this column: the workers of the same shard of the classes, each with other networks.

        Every worker of the column gets the same bits.
        """
        return self._sum(tensor, self.column_group)

    def sum_over_all(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all workers. Every worker gets the same bits."""
        return self._sum(tensor, self.everyone)

    def gather(self, tensor: Tensor) -> Tensor | None:
        """Concatenate the tensors of the first row of workers along dimension 0, in the order of columns.

        The tensors may differ in dimension 0 only. Every worker calls this; tensors of other rows are ignored. Tensors
        pass through the CPU, so this needs no NCCL.

        Returns:
            The whole tensor on rank 0, `None` on other ranks.
        """
        if self.columns == 1:
            return tensor if self.is_first else None
        own = torch.zeros(self.columns, dtype=torch.int64)
        own[self.column] = len(tensor)
        lengths = self.sum_over_classes(own).tolist()
        if self.is_first:
            return self._receive_parts(tensor.detach(), lengths)
        if self.row == 0 and tensor.numel():
            with self._peers_needed():
                dist.send(tensor.detach().cpu().contiguous(), 0)
        return None

    def barrier(self) -> None:
        """Wait until all workers have called this method."""
        self.sum_over_all(torch.zeros(1))

    def until_all_are_done(self, work: Callable[[Heartbeat], Result]) -> Result:
        """Do this worker's own work, then wait until every worker has finished its work. Returns the work's result.

        Workers exchange heartbeats meanwhile, so only the time between two heartbeats must stay below
        `cluster.peer_timeout`.

        Args:
            work: function that does the work and regularly calls its argument, the heartbeat.
        """
        result = work(self._heartbeat())
        self._wait_for_others()
        return result

    def in_steps(self, steps: Steps[Result]) -> Steps[Result]:
        """Do this worker's own work in steps, then wait until every worker has finished. Returns the work's result.

        Workers exchange heartbeats meanwhile, as in `until_all_are_done`. Yields after each step or exchange.
        """
        work, heartbeat = Work(steps), self._heartbeat()
        for _ in work:
            heartbeat()
            yield
        while self._count_working(False):
            yield
        return work.result

    def from_first(self, work: Callable[[], Steps[float]]) -> Steps[float]:
        """Do the steps of `work()` on rank 0 alone while the other ranks wait.

        Returns, on all ranks, the number that the work returned on rank 0.
        """
        number = yield from self.in_steps(work() if self.is_first else finished(0.0))
        return float(self.sum_over_all(torch.tensor([number], dtype=torch.float64)))

    def in_rows(self, work: Callable[[Callable[[Tensor], Tensor]], None]) -> None:
        """Do the work of this row of workers (those of the same networks), then wait until every row has finished.

        Only the time between two sums, usually one student step, must stay below `cluster.peer_timeout`.

        Args:
            work: function that does the work. Its argument is a `sum_over_classes` that also sends heartbeats to the
                other rows. The work must communicate through this argument only. All workers of the row must call it
                equally often.
        """
        if self.rows == 1:
            work(self.sum_over_classes)
            return
        last = time.monotonic()

        def sum_with_heartbeat(tensor: Tensor) -> Tensor:
            nonlocal last
            total = self.sum_over_classes(tensor)
            # All workers of the row decide together. Their clocks differ, and the row would hang if only some of them
            # exchanged heartbeats with the other rows.
            is_time = torch.tensor([int(time.monotonic() - last >= ROW_HEARTBEAT_SHARE * self.timeout)])
            if int(self.sum_over_classes(is_time)):
                self._count_working(True)
                last = time.monotonic()
            return total

        work(sum_with_heartbeat)
        self._wait_for_others()

    def _heartbeat(self) -> Heartbeat:
        """Make a function that tells the others, at most every `HEARTBEAT_INTERVAL` s, that this worker is at work."""
        last = time.monotonic()

        def heartbeat() -> None:
            nonlocal last
            if time.monotonic() - last >= HEARTBEAT_INTERVAL:
                self._count_working(True)
                last = time.monotonic()

        return heartbeat

    def _wait_for_others(self) -> None:
        while self._count_working(False):
            pass

    def _count_working(self, working: bool) -> int:
        """Count the workers that are still at work. Waits until every worker has called this method.

        Args:
            working: True if this worker is still at work.
        """
        return int(self.sum_over_all(torch.tensor([int(working)])))

    def _sum(self, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        if group is None:
            return tensor
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        with self._peers_needed():
            # The sum is waited for here, and not only where it is used: gloo's sums are used at once, and for NCCL's
            # only this wait notices a lost peer. Queued behind the sum, a later read would never return.
            work = dist.all_reduce(total, group=group, async_op=True)
            if total.is_cuda:
                _poll_eagerly(work)
            work.wait()
        return total

    def _receive_parts(self, own: Tensor, lengths: list[int]) -> Tensor:
        """Receive the tensors of row 0's other workers, and concatenate them after `own`, rank 0's tensor.

        On a CPU this needs no memory beyond the result; on a GPU, it needs main memory for one received tensor.

        Args:
            lengths: length of each worker's tensor in dimension 0, by column.
        """
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


ALONE = Mesh()
"""Mesh of one worker, which runs the whole task alone."""


@contextmanager
def open_mesh(
    worker_rank: WorkerRank | None, rows: int, columns: int, device: torch.device, timeout: float
) -> Generator[Mesh, None, None]:
    """Connect to the other workers of a task while the context lasts. Yields this worker's mesh.

    Args:
        worker_rank: rank of this worker; `None` for a worker that runs the task alone, which ignores rows and columns.
        rows: number of groups of networks that have workers of their own, see `RunConfig.roles`.
        columns: number of shards of the classes.
        device: device on which this worker computes.
        timeout: seconds to wait for a peer, at the rendezvous and in every call.

    Raises:
        PeerLostError: a peer does not connect, dies, or does not answer in time.
        ClusterError: this machine has too little shared memory.
        ValueError: the number of workers is not `rows` x `columns`.
    """
    if worker_rank is None:
        yield ALONE
        return
    if worker_rank.world_size != rows * columns:
        raise ValueError(f"{worker_rank.world_size} workers do not form a grid of {rows} x {columns}")
    with _settings(worker_rank.rendezvous):
        backend, is_stuck = "gloo", False
        try:
            with _peers_needed(worker_rank.rank, worker_rank.world_size):
                backend = _join(worker_rank, device, timedelta(seconds=timeout))
                groups = _groups(rows, columns, timedelta(seconds=timeout))
                if "nccl" in backend:
                    is_stuck = True  # until the communicators exist
                    within(timeout, lambda: _connect_gpus(groups, device), "connecting the GPUs")
                    is_stuck = False
            yield Mesh(worker_rank.rank, rows, columns, *groups, dist.group.WORLD, timeout)
        except BaseException:
            # A peer may be in a sum that never ends. NCCL would wait for this peer unless the group is aborted.
            if dist.is_initialized() and "nccl" in backend and not is_stuck:
                dist.distributed_c10d._abort_process_group(dist.group.WORLD)
            raise
        finally:
            # Aborting and destroying may both wait for ever for a communicator. The driver ends this process.
            if dist.is_initialized() and not is_stuck:
                dist.destroy_process_group()


def _connect_gpus(groups: Iterable[dist.ProcessGroup | None], device: torch.device) -> None:
    """Make NCCL create the communicators of these groups now. By default it does so in the first sum on GPUs."""
    for group in filter(None, groups):
        dist.all_reduce(torch.zeros(1, device=device), group=group, async_op=True).wait()


def within(timeout: float, work: Callable[[], None], name: str) -> None:
    """Do work in a thread, and wait for it for at most `timeout` seconds.

    It is for work that may never end and knows no timeout, such as the creation of a communicator by NCCL. An error of
    the work is raised.

    Args:
        name: the work in words, for the error.

    Raises:
        RuntimeError: the time is over. The thread is left behind until the process ends.
    """
    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            work()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout)
    if failures:
        raise failures[0]
    if thread.is_alive():
        raise RuntimeError(f"{name} timed out after {timeout:g} s")


def _join(worker_rank: WorkerRank, device: torch.device, timeout: timedelta) -> str:
    """Create the process group of all workers. Returns the name of its backend."""
    # Half of the timeout, because torch's sleeps between attempts may double the time.
    store, _, _ = next(
        rendezvous(f"tcp://{worker_rank.rendezvous}", worker_rank.rank, worker_rank.world_size, timeout=timeout / 2)
    )
    store.set_timeout(timeout)
    backend = _backend(store, worker_rank, device)
    dist.init_process_group(
        backend, store=store, rank=worker_rank.rank, world_size=worker_rank.world_size, timeout=timeout
    )
    return backend


def _backend(store: Store, worker_rank: WorkerRank, device: torch.device) -> str:
    """Choose torch's backend: NCCL if every worker has its own GPU, which NCCL requires, else gloo on the CPU."""
    gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
    store.set(f"gpu of {worker_rank.rank}", gpu)
    gpus = {store.get(f"gpu of {rank}") for rank in range(worker_rank.world_size)}
    return "cpu:gloo,cuda:nccl" if len(gpus) == worker_rank.world_size and b"" not in gpus else "gloo"


def _groups(rows: int, columns: int, timeout: timedelta) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Process groups of this worker's row and column; `None` for a group that contains only this worker."""
    every_row = [[row * columns + column for column in range(columns)] for row in range(rows)]
    every_column = [list(ranks) for ranks in zip(*every_row, strict=True)]
    return _group_of(every_row, timeout), _group_of(every_column, timeout)


def _group_of(parts: list[list[int]], timeout: timedelta) -> dist.ProcessGroup | None:
    if len(parts) == 1:
        return dist.group.WORLD if len(parts[0]) > 1 else None
    if len(parts[0]) == 1:
        return None
    # Every worker must create all groups in the same order, also the groups that it does not belong to.
    groups = [dist.new_group(ranks, timeout=timeout) for ranks in parts]
    # torch returns a number for a group that this worker does not belong to.
    return next(group for group in groups if isinstance(group, dist.ProcessGroup))


@contextmanager
def _peers_needed(rank: int, size: int) -> Generator[None, None, None]:
    """Turn torch's various errors about a lost peer into `PeerLostError`. Other errors pass unchanged.

    An error about too little shared memory on this machine becomes a `ClusterError`.
    """
    try:
        yield
    except RuntimeError as failure:
        if _SHARED_MEMORY.search(str(failure)):
            raise ClusterError(
                f"worker {rank + 1} of {size} lacks shared memory on {socket.gethostname()}: {_last_error(failure)}",
                "a container has 64 MB of /dev/shm unless it is given more",
                "start it with --ipc=host or --shm-size=16g; or set NCCL_SHM_DISABLE=1",
            ) from None
        if _OWN_DEVICE.search(str(failure)) or not _LOST_PEER.search(str(failure)):
            raise
        raise PeerLostError(
            f"worker {rank + 1} of {size} lost its peers: {_first_line(failure)}",
            "a worker died or hangs, or its node is unreachable",
            "run the same command again: it resumes; raise cluster.peer_timeout if the other workers are only slow",
        ) from None


def _first_line(failure: BaseException) -> str:
    """First sentence of torch's message, without the source location before it."""
    lines = [re.sub(r"^\[[^\]]*\.(cc|cpp):\d+\] *", "", line.strip()) for line in str(failure).splitlines()]
    return next((line.partition(". ")[0].rstrip(".") for line in lines if line), type(failure).__name__)


def _last_error(failure: BaseException) -> str:
    """Line of NCCL's message after "Last error:", which names the cause; the first sentence if there is none."""
    after = str(failure).partition("Last error:")[2].strip()
    return after.splitlines()[0].rstrip(".") if after else _first_line(failure)


def _settings(rendezvous_address: str) -> AbstractContextManager[None]:
    """Set the network interface and error handling of gloo and NCCL in environment variables, for a block.

    The interface is the one that leads to the rendezvous address. Variables that the user has set stay as they are.
    """
    where = urlsplit(f"//{rendezvous_address}")
    interface = _interface_towards(where.hostname or "", where.port or 0)
    # Without TORCH_NCCL_BLOCKING_WAIT, NCCL kills the process when a peer is lost, instead of raising an error.
    wanted = {"TORCH_NCCL_BLOCKING_WAIT": "1"}
    if interface:  # NCCL takes a name without "=" as a prefix of names
        wanted |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    return variables(wanted)


def _interface_towards(host: str, port: int) -> str:
    """Name of the network interface that leads to a host; "" if it is unknown.

    By default gloo uses the interface of this machine's host name, and NCCL the first interface it finds. Peers often
    cannot reach either.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing, but selects the route
            address = probe.getsockname()[0]
            names = [name for _, name in socket.if_nameindex()]
            return next((name for name in names if _address_of(probe, name) == address), "")
    except OSError:
        return ""


def _address_of(any_socket: socket.socket, interface: str) -> str:
    try:
        import fcntl  # not on Windows

        answer = fcntl.ioctl(any_socket.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()))
        return socket.inet_ntoa(answer[20:24])
    except (ImportError, OSError):
        return ""


def _poll_eagerly(work: dist.Work) -> None:
    """Poll a sum without pause for at most `EAGER_POLLING` seconds."""
    end = time.monotonic() + EAGER_POLLING
    while time.monotonic() < end and not work.is_completed():
        time.sleep(0)
