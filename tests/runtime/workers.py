"""Workers for tests of executors. Most import no torch, which takes four CPU-seconds in each process."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from datm_ray.errors import ConfigError
from datm_ray.runtime.executor import Finished, Progress, WorkerRank
from datm_ray.runtime.stopping import Interrupted, saving


class Squarer:
    """A worker that holds an array and squares its entries."""

    def __init__(self, values: np.ndarray, trap: str = "") -> None:
        if trap == "setup":
            raise ConfigError("the setup is wrong")
        self._values, self._trap = values, trap

    def square(self, index: int) -> Iterator[Progress | Finished]:
        yield Progress(1, 2, {"index": float(index)})
        if self._trap == "raise":
            raise ConfigError("the task is wrong", "a cause", "a remedy")
        if self._trap and Path(self._trap).is_dir():
            self._die_once_each(index)
        yield Progress(2, 2)
        yield Finished(int(self._values[index]) ** 2)

    def _die_once_each(self, index: int) -> None:
        mark = Path(self._trap) / str(index)
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def always_die(self, index: int) -> Iterator[Progress | Finished]:
        yield Progress(1, 2)
        os.kill(os.getpid(), signal.SIGKILL)
        yield Finished()


class Adder:
    """A worker that adds numbers together with others."""

    def __init__(self, folder: str = "") -> None:
        self._folder = folder
        if folder == "no folder":
            raise ConfigError("the setup is wrong")

    def add(
        self, number: float, size: int, trap: str = "", worker_rank: WorkerRank | None = None
    ) -> Iterator[Progress | Finished]:
        import torch

        from datm_ray.runtime.mesh import open_mesh

        rank = worker_rank.rank if worker_rank else 0
        yield Progress(rank, size)
        with open_mesh(worker_rank, 1, size, torch.device("cpu"), timeout=60.0) as mesh:
            mesh.barrier()
            if trap and rank == size - 1:
                self._fall_into(trap)
            total = mesh.sum_over_all(torch.tensor(number + rank))
            yield Progress(size, size)
            yield Finished((float(total), mesh.columns, os.getpid()))

    def _fall_into(self, trap: str) -> None:
        mark = Path(self._folder) / "mark"
        if trap == "raise":
            raise ConfigError("one of them failed")
        if trap == "too few":
            raise ConfigError("it does not fit")
        if trap == "wait":
            time.sleep(5)
            return
        if trap == "die" or not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Hanger:
    """A worker whose second rank hangs before its fifth sum."""

    def __init__(self, folder: str, is_frozen: bool) -> None:
        self._folder, self._is_frozen = Path(folder), is_frozen

    def add(self, timeout: float, worker_rank: WorkerRank) -> Iterator[Progress | Finished]:
        import torch

        from datm_ray.runtime.mesh import open_mesh

        (self._folder / f"rank {worker_rank.rank}").touch()  # importing torch may take longer than the timeout
        while len(list(self._folder.glob("rank *"))) < worker_rank.world_size:
            time.sleep(0.05)
        with open_mesh(worker_rank, 1, worker_rank.world_size, torch.device("cpu"), timeout) as mesh:
            for step in range(6):
                if step == 4 and worker_rank.rank == 1:
                    if self._is_frozen:
                        os.kill(os.getpid(), signal.SIGSTOP)
                    time.sleep(600)
                mesh.barrier()
                yield Progress(step + 1, 6)
            yield Finished("done")


class OutOfMemoryError(RuntimeError):
    """Error with the name of torch's, in a process that does not import torch."""


class Greedy:
    """A worker whose GPU is full."""

    def work(self) -> Iterator[Finished]:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        yield


class Saver:
    """A worker that counts slowly and saves after every number."""

    def __init__(self, folder: str) -> None:
        self._file = Path(folder) / "count"

    def count(
        self, numbers: int, worker_rank: WorkerRank | None = None, by_two: int = 5
    ) -> Iterator[Progress | Finished]:
        """Count to `numbers` and save each number. A group of two ranks ends after `by_two` numbers."""
        start = int(self._file.read_text()) if self._file.exists() else 0
        end = min(numbers, start + by_two) if worker_rank and worker_rank.world_size == 2 else numbers
        for number in range(start, end):
            time.sleep(0.1)
            if worker_rank is None or worker_rank.rank == 0:
                self._file.write_text(str(number + 1))
            yield Progress(
                number + 1, numbers, {"size": float(worker_rank.world_size if worker_rank else 1)}, saved=True
            )
        yield Finished()

    def freeze_once(self) -> Iterator[Progress | Finished]:
        yield Progress(1, 2)
        if not self._file.exists():
            self._file.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)  # this thread may get some way before the signal stops it
        yield Finished(os.getpid())

    def sleep_once(self) -> Iterator[Progress | Finished]:
        yield Progress(1, 2)
        if not self._file.exists():
            self._file.touch()
            time.sleep(600)
        yield Finished(os.getpid())


class Leaver:
    """A worker that counts, and saves its number when it is asked to stop."""

    def __init__(self, folder: str) -> None:
        self._file = Path(folder) / "count"

    def count(self, numbers: int) -> Iterator[Progress | Finished]:
        start = int(self._file.read_text()) if self._file.exists() else 0
        with saving() as is_asked:
            for number in range(start, numbers):
                time.sleep(0.1)
                yield Progress(number + 1, numbers)
                if is_asked():
                    self._file.write_text(str(number + 1))
                    raise Interrupted(f"number {number + 1}")
        yield Finished(os.getpid())


class Deaf:
    """A worker that could save itself, but takes for ever to notice that it is asked to."""

    def work(self) -> Iterator[Progress]:
        with saving():
            yield Progress(1, 2)
            time.sleep(1000)


class Slow:
    """A worker whose first setup takes for ever."""

    def __init__(self, folder: str) -> None:
        mark = Path(folder) / "mark"
        if not mark.exists():
            mark.touch()
            time.sleep(1000)

    def work(self) -> Iterator[Finished]:
        yield Finished("done")


class Warner:
    """A worker whose store does not answer for a while."""

    def wait(self) -> Iterator[Progress | Finished]:
        logging.getLogger("datm_ray.store.files.s3").warning(
            "s3://bucket does not answer (it is %s); trying again", "down"
        )
        time.sleep(3)
        yield Finished()

    def fail(self) -> Iterator[Finished]:
        logging.getLogger("datm_ray.tests").info("about to fail")
        raise ConfigError("it failed")
        yield


class Neighbour:
    """A worker whose node is lost with another worker on it, which is idle."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        (self._folder / f"process {os.getpid()}").touch()

    def work(self, name: str) -> Iterator[Progress | Finished]:
        yield Progress(1, 2)
        mark = self._folder / "lost"
        if name == "long" and not mark.exists():
            while not (self._folder / "quick is done").exists():
                time.sleep(0.05)
            mark.touch()
            processes = [int(path.name.split()[1]) for path in self._folder.glob("process *")]
            for process in sorted(processes, key=lambda process: process == os.getpid()):
                os.kill(process, signal.SIGKILL)
        yield Finished("done")


class Idler:
    """An actor of another job."""

    def here(self) -> bool:
        return True


class BrokenGpu:
    """A worker that fails on one GPU of its node, and else returns the GPU that Ray has given and the one in use."""

    def __init__(self, broken: str) -> None:
        self._broken = broken

    def work(self, worker_rank: WorkerRank | None = None) -> Iterator[Progress | Finished]:
        import ray

        yield Progress(1, 2)
        gpu = os.environ["CUDA_VISIBLE_DEVICES"]
        if gpu == self._broken:
            advice = "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
            raise RuntimeError(f"CUDA error: uncorrectable ECC error encountered\n{advice}\n")
        time.sleep(1)
        yield Finished([*map(str, ray.get_gpu_ids()), gpu])


class Looker:
    """A worker that returns its visible GPUs."""

    def look(self) -> Iterator[Finished]:
        yield Finished(os.environ.get("CUDA_VISIBLE_DEVICES"))


class Hog:
    """A worker that takes more memory in its first attempt than its node has left."""

    def __init__(self, folder: str) -> None:
        self._mark = Path(folder) / "mark"

    def work(self, size: int) -> Iterator[Progress | Finished]:
        yield Progress(1, 2)
        if not self._mark.exists():
            self._mark.touch()
            held = [np.ones(2**26, dtype=np.uint8) for _ in range(size >> 26)]
            time.sleep(600 if held else 0)
        yield Finished("done")
