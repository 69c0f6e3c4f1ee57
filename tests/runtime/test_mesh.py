"""Tests sums between processes: right, equal everywhere, and a timely error when a peer is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DistBackendError, DistStoreError

from datm_ray.core.steps import Steps, Work
from datm_ray.core.training.loop import Heartbeat
from datm_ray.errors import ClusterError, ConfigError, PeerLostError
from datm_ray.runtime import mesh as mesh_module
from datm_ray.runtime.executor import Progress, WorkerRank
from datm_ray.runtime.mesh import (
    ALONE,
    Mesh,
    _connect_gpus,
    _peers_needed,
    _settings,
    open_mesh,
    within,
)
from datm_ray.runtime.retries import patience_of, watched
from tests.processes import free_port, side_by_side

CPU = torch.device("cpu")


def take_part(
    work: Callable[..., Any],
    worker_rank: WorkerRank,
    shape: tuple[int, int],
    timeout: float,
    arguments: tuple[Any, ...],
) -> Any:
    """Run work in one process. Returns its result, or the DatmError and the seconds until it was raised."""
    torch.set_num_threads(1)
    with open_mesh(worker_rank, *shape, CPU, timeout) as mesh:
        start = time.monotonic()
        try:
            return work(mesh, *arguments)
        except PeerLostError as failure:
            return failure, time.monotonic() - start


def together(work: Callable[..., Any], rows: int, columns: int, *arguments: Any, timeout: float = 30.0) -> list[Any]:
    """Results of the work on every rank; None for a killed process."""
    size, rendezvous = rows * columns, f"127.0.0.1:{free_port()}"
    ranks = [WorkerRank(rank, size, rendezvous) for rank in range(size)]
    calls = side_by_side(take_part, [(work, worker_rank, (rows, columns), timeout, arguments) for worker_rank in ranks])
    return [None if isinstance(call.exception(), BrokenProcessPool) else call.result() for call in calls]


def part_of(rank: int, size: int = 10_007) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank))


def all_sums(mesh: Mesh) -> dict[str, Any]:
    parts = [part_of(mesh.rank, size) for size in (1, 7, 10_007)]
    before = [part.clone() for part in parts]
    sums = {
        "all": [mesh.sum_over_all(part) for part in parts],
        "classes": [mesh.sum_over_classes(part) for part in parts],
        "backbones": [mesh.sum_over_backbones(part) for part in parts],
    }
    mesh.barrier()
    assert all(torch.equal(part, copy) for part, copy in zip(parts, before, strict=True))
    transposed = mesh.sum_over_all(torch.arange(6.0).reshape(2, 3).t())
    return {"place": (mesh.row, mesh.column, mesh.is_first), "transposed": transposed, **sums}


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 1), (2, 2), (1, 4)])
def test_sums_over_rows_columns_and_all(rows: int, columns: int) -> None:
    """Sums over rows, columns and all processes are right, with equal bits everywhere."""
    results = together(all_sums, rows, columns)
    for rank, result in enumerate(results):
        row, column = divmod(rank, columns)
        assert result["place"] == (row, column, rank == 0)
        assert torch.equal(result["transposed"], rows * columns * torch.arange(6.0).reshape(2, 3).t())
        members = {
            "all": range(rows * columns),
            "classes": range(row * columns, (row + 1) * columns),
            "backbones": range(column, rows * columns, columns),
        }
        for name, ranks in members.items():
            for index, size in enumerate((1, 7, 10_007)):
                expected = torch.stack([part_of(other, size) for other in ranks]).double().sum(0).float()
                torch.testing.assert_close(result[name][index], expected)
                assert all(torch.equal(result[name][index], results[other][name][index]) for other in ranks)


def gathered(mesh: Mesh) -> list[Tensor | None]:
    start, length = 10 * mesh.column, (2, 0, 3)[mesh.column]
    whole = torch.arange(60).reshape(30, 2)
    parts = [whole[start : start + length], whole.double()[start : start + length].t().contiguous().t()]
    return [mesh.gather(part) for part in parts]


def test_gathering_parts_of_different_sizes() -> None:
    """Rank 0 gathers parts in column order, also an empty one and one with strides; others get nothing."""
    first, *others = together(gathered, 1, 3)
    expected = torch.arange(60).reshape(30, 2)[[0, 1, 20, 21, 22]]
    assert torch.equal(first[0], expected)
    assert torch.equal(first[1], expected.double())
    assert others == [[None, None]] * 2


def gathered_of_two_rows(mesh: Mesh) -> Tensor | None:
    return mesh.gather(torch.tensor([mesh.rank]))


def test_gathering_takes_the_first_row() -> None:
    """Gathering takes the first row, because every row has the set's parts."""
    first, *others = together(gathered_of_two_rows, 2, 2)
    assert first.tolist() == [0, 1]
    assert others == [None] * 3


def slow_work(mesh: Mesh, steps: int) -> tuple[float, bool]:
    worked = []

    def work() -> Steps[float]:
        for _ in range(steps):
            time.sleep(0.2)
            worked.append(True)
            yield
        return 1 / 3

    shared = Work(mesh.from_first(work))
    pauses = len(list(shared))
    assert pauses >= min(steps, 2)  # a worker that waits pauses too, and can report that it is not stuck
    return shared.result, bool(worked)


def test_work_of_the_first_outlasts_the_timeout() -> None:
    """Work of rank 0 may outlast the timeout; all get its number to the last bit."""
    first, second = together(slow_work, 1, 2, 15, timeout=2.0)
    assert first == (1 / 3, True)
    assert second == (1 / 3, False)


def test_work_without_steps() -> None:
    """Work without steps gives its number to all at once."""
    assert together(slow_work, 1, 2, 0) == [(1 / 3, False)] * 2


def unlike_work(mesh: Mesh) -> tuple[int, float]:
    """Work that takes each rank a second longer than the one before."""
    started = time.monotonic()

    def work(heartbeat: Heartbeat) -> int:
        for _ in range(5 * mesh.rank):
            time.sleep(0.2)
            heartbeat()
        return mesh.rank

    return mesh.until_all_are_done(work), time.monotonic() - started


def test_workers_wait_for_the_slowest_beyond_the_timeout() -> None:
    """Four workers with 0 to 3 s of work wait beyond a timeout of 1.5 s and keep their results."""
    results = together(unlike_work, 2, 2, timeout=1.5)
    assert [own for own, _ in results] == [0, 1, 2, 3]
    assert all(seconds >= 3.0 for _, seconds in results)


def unlike_rows(mesh: Mesh, bits: int) -> tuple[list[float], float]:
    """Steps of work that end in a sum in the first row, one of whose workers is slower."""
    started, sums = time.monotonic(), []

    def work(sum_over_classes: Callable[[Tensor], Tensor]) -> None:
        for bit in range(bits if mesh.row == 0 else 1):
            time.sleep(0.1 * (1 + mesh.column))
            sums.append(float(sum_over_classes(torch.tensor([10.0 * mesh.row + bit]))))

    mesh.in_rows(work)
    mesh.sum_over_backbones(torch.zeros(1))
    return sums, time.monotonic() - started


@pytest.mark.parametrize("columns", [1, 2])
def test_rows_wait_for_the_slowest_beyond_the_timeout(columns: int) -> None:
    """Four seconds of work in steps pass a timeout of 1.5 s, and sums within rows are right."""
    bits = 40 // columns
    results = together(unlike_rows, 2, columns, bits, timeout=1.5)
    for rank, (sums, seconds) in enumerate(results):
        expected = [columns * float(bit) for bit in range(bits)] if rank < columns else [columns * 10.0]
        assert sums == expected
        assert seconds >= 3.5


def sum_until_one_is_gone(mesh: Mesh, signal_to_self: int, folder: str) -> None:
    mesh.sum_over_classes(part_of(0))
    if mesh.rank == 1:
        (Path(folder) / "process").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal_to_self)
    while True:
        mesh.sum_over_classes(part_of(0))


def test_killed_peer_is_an_error_at_once(tmp_path: Path) -> None:
    """A peer killed between two sums is an error long before the timeout."""
    (failure, seconds), killed = together(sum_until_one_is_gone, 1, 2, signal.SIGKILL, str(tmp_path), timeout=60.0)
    assert killed is None
    assert str(failure).startswith("worker 1 of 2 lost its peers: ")
    assert seconds < 10


def stop_and_be_killed_later(mesh: Mesh, folder: str) -> None:
    try:
        sum_until_one_is_gone(mesh, signal.SIGSTOP, folder)
    finally:
        if mesh.is_first:
            os.kill(int((Path(folder) / "process").read_text()), signal.SIGKILL)


def test_hung_peer_is_an_error_after_the_timeout(tmp_path: Path) -> None:
    """A hanging peer is an error after the timeout."""
    (failure, seconds), killed = together(stop_and_be_killed_later, 1, 2, str(tmp_path), timeout=2.0)
    assert killed is None
    assert isinstance(failure, PeerLostError)
    assert 1 < seconds < 8


def steps_until_one_hangs(mesh: Mesh, folder: str, timeout: float) -> None:
    noticed = Path(folder) / "noticed"

    def steps() -> Iterator[Progress]:
        for step in range(5):
            while step == 4 and mesh.rank == 1 and not noticed.exists():
                time.sleep(0.05)
            if not noticed.exists():
                mesh.barrier()
            yield Progress(step, 5)

    try:
        list(watched(steps(), patience_of(2, timeout, 300.0)))
    finally:
        noticed.touch()


def test_a_hung_peer_is_reported_before_the_timer_of_the_worker_that_waits(tmp_path: Path) -> None:
    """A worker whose last step ended before the sum reports its hung peer, and is not ended as stuck itself."""
    (failure, _), hung = together(steps_until_one_hangs, 1, 2, str(tmp_path), 2.0, timeout=2.0)
    assert isinstance(failure, PeerLostError)
    assert hung is None  # it went on, and found nothing left to do


def fail_alone(mesh: Mesh) -> None:
    if mesh.rank == 1:
        raise ConfigError("this one failed")
    mesh.barrier()


def test_error_of_one_releases_the_others() -> None:
    """One worker's error releases the others before the timeout."""
    start = time.monotonic()
    with pytest.raises(ConfigError, match="this one failed"):
        together(fail_alone, 1, 2, timeout=60.0)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("rank", [0, 1])
def test_rendezvous_without_peers_times_out(rank: int) -> None:
    """A rank without peers, the first or another, waits no longer than the timeout."""
    start = time.monotonic()
    mesh = open_mesh(WorkerRank(rank, 2, f"127.0.0.1:{free_port()}"), 1, 2, CPU, timeout=4.0)
    with pytest.raises(PeerLostError, match=f"worker {rank + 1} of 2 lost its peers: .*[a-z]"), mesh:
        pass
    assert time.monotonic() - start < 20  # not the half hour that torch waits by itself


def test_gpus_that_never_connect_are_a_lost_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL may wait for ever for a peer when it connects GPUs. That is a lost peer after the timeout, not a hang."""
    join, released = mesh_module._join, threading.Event()

    def join_with_gpus(*arguments: Any) -> str:
        assert join(*arguments) == "gloo"
        return "cpu:gloo,cuda:nccl"

    def never(why: str) -> Callable[..., None]:
        return lambda *_: pytest.fail(f"it waits for ever: {why}")

    monkeypatch.setattr(mesh_module, "_join", join_with_gpus)
    monkeypatch.setattr(mesh_module, "_connect_gpus", lambda *_: released.wait())
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", never("abort"))
    mesh = open_mesh(WorkerRank(0, 1, f"127.0.0.1:{free_port()}"), 1, 1, CPU, timeout=4.0)
    with monkeypatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", never("destroy"))
        with pytest.raises(PeerLostError, match=r"worker 1 of 1 lost its peers: connecting the GPUs timed out"), mesh:
            pass
    released.set()
    dist.destroy_process_group()


def connected(mesh: Mesh) -> float:
    within(30.0, lambda: _connect_gpus((mesh.row_group, mesh.column_group), CPU), "connecting")
    with pytest.raises(ZeroDivisionError):
        within(30.0, lambda: [][1 // 0], "dividing")
    return float(mesh.sum_over_all(torch.ones(1)))


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 2)])
def test_connecting_reaches_the_peers_of_every_group(rows: int, columns: int) -> None:
    """The sums that connect GPUs end in every group, with gloo here. An error of theirs keeps its type."""
    assert together(connected, rows, columns) == [rows * columns] * (rows * columns)


def test_a_process_joins_a_new_mesh_after_leaving_one() -> None:
    """A process can join a new mesh after leaving one, also after a failed one."""
    environment = dict(os.environ)
    for value in (1.0, 2.0):
        with open_mesh(WorkerRank(0, 1, f"127.0.0.1:{free_port()}"), 1, 1, CPU, timeout=10.0) as mesh:
            assert mesh.sum_over_all(torch.tensor(value)) == value
            assert mesh.sum_over_classes(torch.tensor(value)) == value
        with (
            pytest.raises(ConfigError),
            open_mesh(WorkerRank(0, 1, f"127.0.0.1:{free_port()}"), 1, 1, CPU, timeout=10.0),
        ):
            raise ConfigError("failed within")
    assert dict(os.environ) == environment


def test_other_errors_in_a_sum_keep_their_name() -> None:
    """An error in a sum is a lost peer's only if its message says so; a GPU's or a type's keeps its name."""
    mesh = open_mesh(WorkerRank(0, 1, f"127.0.0.1:{free_port()}"), 1, 1, CPU, timeout=10.0)
    with pytest.raises(RuntimeError, match="Invalid scalar type"), mesh as alone:
        alone.sum_over_all(torch.zeros(2, dtype=torch.uint16))
    own = (
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        torch.AcceleratorError("CUDA error: the launch timed out and was terminated"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        DistBackendError("NCCL error in: x.cpp:7, unhandled cuda error\nLast error:\nCuda failure 'peer access'"),
    )
    peers = (
        RuntimeError("[pair.cc:545] Read error [10.0.0.1]:27058: Connection reset by peer"),
        RuntimeError("[pair.cc:561] Connection closed by peer [10.0.0.1]:62105"),
        RuntimeError("[unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete"),
        RuntimeError("[pair.cc:144] Application timeout caused pair closure"),
        RuntimeError("Gloo connectFullMesh failed with [device.cc:252] no error"),
        DistBackendError("NCCL communicator was aborted on rank 1."),
        DistBackendError("NCCL error in: x.cpp:7, remote process exited or there was a network error"),
        DistBackendError("Work WorkNCCL(SeqNum=7) timed out in blocking wait."),
        DistStoreError("wait timeout after 2000ms, keys: /gpu of 1"),
    )
    for failure in (*own, *peers):
        with pytest.raises(RuntimeError if failure in own else PeerLostError) as raised, _peers_needed(0, 2):
            raise failure
        assert (raised.value is failure) == (failure in own), failure


def test_too_little_shared_memory_is_no_lost_peer() -> None:
    """A machine without shared memory for NCCL, as a container has, is named with the cause and what to do."""
    shared = DistBackendError(
        "NCCL error in: x.cpp:7, unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.30.7\n"
        "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n"
        "Last error:\nError while creating shared memory segment /dev/shm/nccl-8f (size 9637888), error: No space left"
    )
    with pytest.raises(ClusterError, match=r"--ipc=host") as raised, _peers_needed(0, 2):
        raise shared
    assert "worker 1 of 2 lacks shared memory on " in str(raised.value)
    assert "shared memory segment /dev/shm/nccl-8f (size 9637888), error: No space left. A cont" in str(raised.value)


def test_sums_use_the_interface_of_the_rendezvous_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo and NCCL use the interface that leads to the other workers, unless the user has named one."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "users")
    with _settings("127.0.0.1:1"):
        assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "users")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    with _settings("127.0.0.1:1"):
        assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo"
    assert not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} & set(os.environ)


def test_grid_that_does_not_fit_the_workers() -> None:
    """A grid that does not fit the workers is an error before anybody waits."""
    mesh = open_mesh(WorkerRank(0, 3, "127.0.0.1:1"), 2, 2, CPU, timeout=1.0)
    with pytest.raises(ValueError, match="3 workers do not form a grid of 2 x 2"), mesh:
        pass


def test_alone_everything_is_as_it_was() -> None:
    """Without a rank nothing connects and sums are unchanged, for a grid of any size."""
    tensor = torch.randn(3)
    with open_mesh(None, 3, 4, CPU, timeout=1.0) as mesh:
        assert mesh is ALONE
        assert (mesh.rank, mesh.row, mesh.column, mesh.rows, mesh.columns, mesh.is_first) == (0, 0, 0, 1, 1, True)
        for same in (mesh.sum_over_all, mesh.sum_over_classes, mesh.sum_over_backbones, mesh.gather):
            assert same(tensor) is tensor
        mesh.barrier()
        assert slow_work(mesh, 1) == (1 / 3, True)
        assert unlike_work(mesh)[0] == 0
