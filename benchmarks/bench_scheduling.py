"""Scheduling on Ray with simulated work: start-up, tasks, events and ranks on one machine.

python benchmarks/bench_scheduling.py [--quick] [--workers 64] [--tasks 1000] [--ranks 64]    (make bench-scheduling)

The workers sleep, so that many of them fit on few cores: Ray is given one CPU for each worker, whatever the machine
has. So the time of Ray and of the driver is measured. Start-up is the exception: all processes share the real cores.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from facts import common_facts, head, parsed, present, sizes_and_places
from program import positive, start
from tables import table

from datm_ray.config import ClusterConfig
from datm_ray.runtime.executor import Executor, Finished, Progress, Started, Task, WorkerRank
from datm_ray.runtime.ray.executor import RayExecutor

SECONDS = 2.0
"""Duration of a simulated task."""
TIMEOUT = 1200.0
"""Seconds for which ranks wait for each other. Many that import torch on few cores at once take minutes."""


class Sleeper:
    """A worker that sleeps, counts or sums."""

    def sleep(self, seconds: float) -> Iterator[Progress | Finished]:
        """Sleep in four steps."""
        for step in range(4):
            time.sleep(seconds / 4)
            yield Progress(step + 1, 4)
        yield Finished()

    def count(self, events: int) -> Iterator[Progress | Finished]:
        """Yield events as fast as possible."""
        for step in range(events):
            yield Progress(step + 1, events)
        yield Finished()

    def sum(self, sums: int, worker_rank: WorkerRank | None = None) -> Iterator[Progress | Finished]:
        """Make sums over all ranks."""
        import torch

        from datm_ray.runtime.mesh import open_mesh

        size = worker_rank.world_size if worker_rank else 1
        with open_mesh(worker_rank, 1, size, torch.device("cpu"), TIMEOUT) as mesh:
            for step in range(sums):
                mesh.sum_over_all(torch.ones(1))
                yield Progress(step + 1, sums)
        yield Finished()


def timed(executor: Executor, method: str, tasks: list[Task], seen: Callable[[Task, Any, float], None]) -> float:
    """Run tasks, and call `seen` with every event and its time in seconds. Returns the driver's CPU seconds."""
    began, cpu = time.monotonic(), time.process_time()
    for task, event in executor.run(Sleeper, (), method, tasks):
        seen(task, event, time.monotonic() - began)
    return time.process_time() - cpu


def of_tasks(executor: Executor, workers: int, count: int) -> dict[str, float]:
    """Start-up of the workers, and the overhead and tail of many tasks."""
    starts: list[float] = []
    timed(executor, "sleep", [Task(f"warm {n}", (SECONDS,)) for n in range(workers)], _collect(starts, Started))
    ends: list[float] = []
    cpu = timed(executor, "sleep", [Task(f"task {n}", (SECONDS,)) for n in range(count)], _collect(ends, Finished))
    wall, ideal = max(ends), SECONDS * math.ceil(count / workers)
    last = sorted(ends)[-workers:]
    return {
        "first worker after s": min(starts),
        "all workers after s": max(starts),
        "tasks: wall s": wall,
        "tasks: ideal s": ideal,
        "overhead %": 100 * (wall / ideal - 1),
        "driver CPU %": 100 * cpu / wall,
        "tail: last round's ends are apart s": max(last) - min(last),
    }


def of_events(executor: Executor, workers: int, count: int) -> dict[str, float]:
    """Events that the driver takes per second."""
    times: list[float] = []
    cpu = timed(executor, "count", [Task(f"count {n}", (count,)) for n in range(workers)], _collect(times, Progress))
    return {"events per s": len(times) / (max(times) - min(times)), "driver CPU ms per event": 1000 * cpu / len(times)}


def of_ranks(executor: Executor, workers: int) -> dict[str, float]:
    """Start of one group of ranks, until its first sum."""
    started: list[float] = []
    sums: list[float] = []

    def seen(task: Task, event: Any, at: float) -> None:
        started.extend([at] if isinstance(event, Started) else [])
        sums.extend([at] if isinstance(event, Progress) else [])

    timed(executor, "sum", [Task("ranks", (20,), size=workers)], seen)
    return {
        "ranks started after s": started[0],
        "first sum after s": sums[0],
        "ms per sum": 1000 * (sums[-1] - sums[0]) / (len(sums) - 1),
    }


def _collect(times: list[float], kind: type[Any]) -> Callable[[Task, Any, float], None]:
    return lambda task, event, at: times.extend([at] if isinstance(event, kind) else [])


def measure(workers: int, tasks: int, events: int, ranks: int) -> dict[str, float]:
    """Measure everything once, on a new Ray cluster. Returns the name of each figure -> its value."""
    cpus = max(workers, ranks)
    ray.init("local", num_cpus=cpus, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    executor = RayExecutor(ClusterConfig(peer_timeout=TIMEOUT))
    try:
        found = of_tasks(executor, workers, tasks) | of_events(executor, workers, events)
        return found | (of_ranks(executor, ranks) if ranks > 1 else {})
    finally:
        executor.close()
        ray.shutdown()


def main() -> None:
    """Measure and write the table."""
    parser = sizes_and_places(__doc__)
    parser.add_argument("--workers", type=positive, default=64)
    parser.add_argument("--tasks", type=positive, default=1000)
    parser.add_argument("--events", type=positive, default=200, help="of each worker")
    parser.add_argument("--ranks", type=positive, help="of the group; as many as workers")
    parser.add_argument("--repeats", type=positive, default=3)
    arguments = parsed(parser)
    if arguments.quick:
        arguments.workers, arguments.tasks, arguments.events, arguments.repeats = 4, 12, 50, 1
    ranks = arguments.ranks or arguments.workers
    goes = [measure(arguments.workers, arguments.tasks, arguments.events, ranks) for _ in range(arguments.repeats)]
    rows = []
    for name in goes[0]:
        values = [go[name] for go in goes]
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        rows.append([name, f"{statistics.mean(values):.2f}", f"{spread:.2f}", str(len(values))])
    sizes = f"{arguments.workers} workers, {arguments.tasks} tasks of {SECONDS:g} s, {ranks} ranks"
    lines = [
        *head(f"Scheduling: {sizes}", common_facts(__file__, sys.argv[1:])),
        *table(["", "mean", "std", "n"], rows),
    ]
    present(arguments.out, "scheduling", lines, {"goes": goes, "sizes": sizes})


if __name__ == "__main__":
    start(main)
