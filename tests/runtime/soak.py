"""Runs on two nodes with faults at random moments, and what each fault cost.

The faults are made in the workers, nodes, commands and the S3 server of real runs; see `KINDS`. The journal that
workers keep (`faults/sitecustomize.py`) says which of them are at work, when work resumes and which steps are repeated.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.tables import table
from datm_ray.config import RunConfig, to_yaml
from datm_ray.store.files.filesystem import Location
from tests.runtime.nodes import Nodes
from tests.store.proxy import BUSY, Proxy

KINDS = {
    "worker": "a worker's process: SIGKILL",
    "node": "a node's raylet: SIGKILL; another node is added",
    "driver": "the command itself: SIGKILL; it is given again",
    "gpu": "a worker's step raises `RuntimeError: CUDA error: uncorrectable ECC error`",
    "memory": "a worker fills the memory until Ray's monitor kills it",
    "stuck": "a worker's step calls a library that never returns; its process lives",
    "frozen": "a worker's process stands still: SIGSTOP",
    "store": "the S3 server answers 503 to everyone until a worker has given up",
    "second": "a second command on the same folder, which is refused",
}
"""Kind of fault -> what is done."""
GROWTH = 8 << 30
"""Bytes by which memory use may grow from the start of the soak before Ray kills workers. The soak's own processes take
about four GiB."""
LONGEST_PAUSE = 8.0
"""Longest time in seconds from the end of a fault to the next one."""
LONGEST_WAIT = 900.0
"""Longest time in seconds until work resumes after a fault."""
AT_WORK = 20.0
"""Seconds since a worker's last step during which it counts as at work."""
OUTAGE = 60.0
"""Longest time in seconds for which the S3 server answers 503."""
FINISHED = re.compile(
    r"experts/.*/expert-\d+\.arrow|[^/]+/synthetic\.arrow|([^/]+/evaluation|controls/[^/]+)/[^/]+\.json"
)
"""Files of finished work, which must never be written again."""


def memory_limit(growth: int) -> dict[str, str]:
    """Environment of a cluster that kills workers if memory use grows by `growth` bytes.

    The test is skipped if the machine has too little free memory.
    """
    memory = {line.split(":")[0]: int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines()}
    threshold = 1 - (memory["MemAvailable"] - growth) / memory["MemTotal"]
    if not 0 < threshold < 0.9:
        pytest.skip(f"needs {(growth >> 30) + 3} GiB of free memory")
    return {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "100"}


@dataclass(frozen=True)
class Step:
    """A line of a worker's journal."""

    at: float
    """Time in seconds since 1970."""
    process: int
    what: str
    """"step", "resumed" (the iteration from which a distillation resumes) or "end" of a task."""
    rank: int
    task: str
    """Stage, recipe and experts of the task, with colons between them."""
    done: float
    """Units (iterations, epochs) of the task that are done."""


class Journal:
    """Steps of all workers so far, read from the files that they append to."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._read = folder, dict[Path, int]()
        self._steps: list[Step] = []
        folder.mkdir(parents=True)

    def steps(self) -> list[Step]:
        """Steps in order of time."""
        for path in self._folder.iterdir():
            with path.open() as file:
                file.seek(self._read.get(path, 0))
                whole = file.read().rpartition("\n")[0]
            if whole:
                self._read[path] = self._read.get(path, 0) + len(whole) + 1
                self._steps += [_step(int(path.name), line) for line in whole.splitlines()]
        self._steps.sort(key=lambda each: each.at)
        return self._steps

    def at_work(self, now: float) -> dict[str, set[int]]:
        """Unfinished task -> processes that have made a step of it within the last `AT_WORK` seconds."""
        found = dict[str, set[int]]()
        for each in self.steps():
            if each.what == "end":
                found.pop(each.task, None)
            elif each.at > now - AT_WORK:
                found.setdefault(each.task, set()).add(each.process)
        return found

    def repeated(self) -> list[Step]:
        """Steps of experts and sets that an earlier attempt had made too."""
        seen, again = set[tuple[str, float]](), []
        for each in self.steps():
            if each.what == "step" and not each.rank and each.task.startswith(("train:", "distill:")):
                again += [each] * ((each.task, each.done) in seen)
                seen.add((each.task, each.done))
        return again


def _step(process: int, line: str) -> Step:
    at, what, rank, task, done = line.split(" ")
    return Step(float(at), process, what, int(rank), task, float(done))


@dataclass
class Fault:
    """One fault and its cost."""

    kind: str
    at: float
    """Time of the fault in seconds since 1970."""
    run: int
    """Number of the run, from 0."""
    during: str
    """Stages at work at the time of the fault, separated by commas."""
    shards: int
    """Workers of each set of the run."""
    seconds: float = 0.0
    """Seconds until all tasks that were at work had made another step or were finished."""
    lost: list[str] = field(default_factory=list)
    """Reasons of lost workers in the command's log, up to the next fault."""
    repeated: list[Step] = field(default_factory=list)
    """Steps that were repeated before the next fault."""


class Soak:
    """Runs of recipes on one cluster of two nodes, disturbed until a number of faults has been made."""

    def __init__(
        self, recipes: Callable[[int], list[RunConfig]], folder: Path, out: Location, proxy: Proxy, seed: int
    ) -> None:
        """Prepare the soak.

        Args:
            recipes: the recipes of run 0, 1, ..., each run a command of its own.
            folder: local folder for recipes, journal and logs.
            out: folder of the runs, on S3.
            proxy: server between the runs and S3.
            seed: decides kinds, victims and moments of the faults.
        """
        self._recipes, self._folder, self._out, self._proxy = recipes, folder, out, proxy
        self._draw = random.Random(seed)
        self._names = (f"node{number}" for number in itertools.count())
        self._finished: dict[str, str] = {}
        self._faults = folder / "faults"
        self._journal = Journal(self._faults / "journal")
        self._log = folder / "log"
        self.faults: list[Fault] = []
        self.failures: list[str] = []
        """Descriptions of what went wrong; empty at the end of a soak that succeeds."""
        self.runs: list[list[RunConfig]] = []
        """Recipes of the runs so far, all finished at the end."""
        self.seconds = 0.0
        """Seconds of the whole soak."""
        self.on_fault: Callable[[Fault], None] = lambda fault: None
        """Called after each fault."""

    def run(self, kinds: Sequence[str], share: int, limit: float) -> None:
        """Make faults of these kinds, and let every run end.

        Args:
            kinds: kind of each fault, a key of `KINDS`.
            share: largest number of faults in a run; there are as many runs as it takes.
            limit: seconds after which no more faults are made.
        """
        began, self._left = time.monotonic(), list(kinds)
        self._end = began + limit
        path = os.pathsep.join([str(Path(__file__).with_name("faults")), os.environ.get("PYTHONPATH", "")])
        environment = {"DATM_RAY_TEST_FAULTS": str(self._faults), "PYTHONPATH": path, **memory_limit(GROWTH)}
        # Workers give a silent server up after four attempts; commands wait for it for minutes.
        environment["AWS_MAX_ATTEMPTS"] = "4"
        with Nodes(environment) as self._nodes, self._log.open("a") as self._output:
            self._alive = [self._add(), self._add()]
            while self._left and time.monotonic() < self._end:
                self._run(share)
            self._note_costs()
        self.seconds = time.monotonic() - began

    def _run(self, share: int) -> None:
        configs = self._recipes(len(self.runs))
        self.runs.append(configs)
        self._files = [self._folder / f"{config.name}.yaml" for config in configs]
        for file, config in zip(self._files, configs, strict=True):
            file.write_text(to_yaml(config))
        self._start()
        self._wait(lambda: self._is_done() or self._journal.at_work(time.time()), "work starts")
        left = max(0, len(self._left) - share)
        while len(self._left) > left and time.monotonic() < self._end:
            time.sleep(self._draw.uniform(0.0, LONGEST_PAUSE))
            if self._is_done() or not self._disturb(self._left[-1], configs[0].cluster.shards):
                break
            self._left.pop()
        assert self._process.wait(1800) == 0, self._log.read_text()
        self._note_finished()

    def _disturb(self, kind: str, shards: int) -> bool:
        """Make a fault and wait until work resumes. Returns False if the run ended before the fault could be made."""
        self._note_costs()
        if self._victim() is None:
            return False
        alive, at, clock = set(self._nodes.worker_processes()), time.time(), time.monotonic()
        before = {task: found & alive for task, found in self._journal.at_work(at).items() if found & alive}
        stages = sorted({task.partition(":")[0] for task in before})
        fault = Fault(kind, at, len(self.runs) - 1, ", ".join(stages), shards)
        victims: set[int] | None = getattr(self, f"_make_{kind}")()
        if victims is None:
            return False
        made, alive = time.time(), set(self._nodes.worker_processes())
        for task, processes in before.items():
            gone = processes if processes & (victims | (processes - alive)) else set()
            self._wait(
                lambda task=task, gone=gone: self._is_done() or self._resumes(task, made, gone),
                f"{task} resumes",
            )
        fault.seconds = time.monotonic() - clock
        self.faults.append(fault)
        self._note_finished()
        self._note_costs()
        self.on_fault(fault)
        return True

    def _resumes(self, task: str, since: float, gone: set[int]) -> bool:
        """True if a process that is not `gone` has made a step of a task, or has ended it, after a time."""
        later = (each for each in reversed(self._journal.steps()) if each.task == task and each.at > since)
        return any(each.what == "end" or (each.what == "step" and each.process not in gone) for each in later)

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        """Wait until a condition holds. After `LONGEST_WAIT` seconds, note a failure, so that later faults are made."""
        end = time.monotonic() + LONGEST_WAIT
        while not condition():
            if time.monotonic() > end:
                self.failures.append(f"fault {len(self.faults)}: it did not happen: {what}")
                return
            time.sleep(0.25)

    # --- faults: each returns the processes that it has hit, or None if the run ended before -------------------------

    def _victim(self) -> int | None:
        """Process id of a worker at work, drawn at random; `None` if the run ends before there is one."""
        found = list[int]()

        def look() -> bool:
            alive = set(self._nodes.worker_processes())
            found[:] = sorted(alive.intersection(*[set().union(*self._journal.at_work(time.time()).values())]))
            return bool(found) or self._is_done()

        self._wait(look, "a worker is at work")
        return self._draw.choice(found) if found else None

    def _make_worker(self, signal_: signal.Signals = signal.SIGKILL) -> set[int] | None:
        victim = self._victim()
        if victim is None:
            return None
        os.kill(victim, signal_)
        return {victim}

    def _make_frozen(self) -> set[int] | None:
        return self._make_worker(signal.SIGSTOP)

    def _make_node(self) -> set[int]:
        before = set(self._nodes.worker_processes())
        self._nodes.kill(self._alive.pop(self._draw.randrange(2)))
        self._alive.append(self._add())
        return before - set(self._nodes.worker_processes())

    def _make_driver(self) -> set[int]:
        workers = set(self._nodes.worker_processes())
        self._process.kill()
        self._process.wait()
        self._start()
        return workers

    def _make_gpu(self, kind: str = "gpu") -> set[int] | None:
        """Have a worker at work make a fault in itself. If the worker has just finished, another one is asked."""
        while (victim := self._victim()) is not None:
            answer = self._faults / f"{victim}.answer"
            (self._faults / str(victim)).write_text(kind)
            self._wait(lambda path=answer, victim=victim: path.exists() or not _lives(victim), "the fault is made")
            if answer.exists() and answer.read_text() == "made":
                answer.unlink()
                return {victim}
            answer.unlink(missing_ok=True)
        return None

    def _make_stuck(self) -> set[int] | None:
        return self._make_gpu("stuck")

    def _make_memory(self) -> set[int] | None:
        before = self._log.read_text().count("ran out of memory")
        victims = self._make_gpu("memory")

        def is_over() -> bool:
            is_full = self._log.read_text().count("ran out of memory") > before
            return self._is_done() or (is_full and not any(map(_lives, victims or ())))

        self._wait(lambda: victims is None or is_over(), "memory is full")
        return victims

    def _make_store(self) -> set[int]:
        before, end = self._log.read_text().count("worker lost (Cannot "), time.monotonic() + OUTAGE
        self._proxy.plan = lambda method, path: BUSY
        while time.monotonic() < end and self._log.read_text().count("worker lost (Cannot ") == before:
            time.sleep(0.1)
        self._proxy.plan = lambda method, path: None
        return set()

    def _make_second(self) -> set[int] | None:
        second = subprocess.run(self._command(), capture_output=True, text=True, timeout=LONGEST_WAIT, check=False)
        if self._is_done():  # the second command may have found everything finished
            return None
        if (second.returncode, "is in use by process" in second.stderr) != (2, True):
            self.failures.append(f"a second command ends with {second.returncode}: {second.stderr}")
        return set()

    # --- the cluster, the command and its files ----------------------------------------------------------------------

    def _add(self) -> str:
        name = next(self._names)
        self._nodes.add(name)
        return name

    def _command(self) -> list[str]:
        settings = ("wait_for_nodes=60", "peer_timeout=10", "progress_timeout=150", "retries=5")
        command = [sys.executable, "-m", "datm_ray", "run", *map(str, self._files), "--out", self._out.uri]
        return [*command, "--address", self._nodes.address, *(f"--set=cluster.{each}" for each in settings)]

    def _start(self) -> None:
        self._process = subprocess.Popen(self._command(), stdout=self._output, stderr=self._output)

    def _is_done(self) -> bool:
        return self._process.poll() is not None

    def _note_finished(self) -> None:
        """Note who wrote the files of finished work, which must never be written again."""
        root = self._out.path.rstrip("/") + "/"
        for path in self._out.fs.find(self._out.path):
            if FINISHED.fullmatch(path.removeprefix(root)):
                writer = self._out.fs.metadata(path)["datm-ray-writer"]
                if self._finished.setdefault(path, writer) != writer:
                    self.failures.append(f"{path} was written twice")

    def _note_costs(self) -> None:
        """Attribute lost workers and repeated steps to the latest fault before them."""
        if not self.faults:
            return
        text, repeated = self._log.read_text(), self._journal.repeated()
        known = sum(len(each.lost) for each in self.faults[:-1])
        self.faults[-1].lost = re.findall(r"worker lost \((.*)\); starting attempt", text)[known:]
        bounds = [each.at for each in self.faults[1:]] + [float("inf")]
        for fault, end in zip(self.faults, bounds, strict=True):
            fault.repeated = [each for each in repeated if fault.at <= each.at < end]


def _lives(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def drawn(faults: int, seed: int) -> list[str]:
    """Kinds of so many faults in random order; all kinds come about equally often."""
    kinds = [kind for kind, _ in zip(itertools.cycle(KINDS), range(faults), strict=False)]
    random.Random(seed).shuffle(kinds)
    return kinds


def counted_steps(steps: Sequence[Step]) -> str:
    """Number of repeated iterations and epochs, such as "2 iterations"; "-" if there are none."""
    names = {"distill": "iterations", "train": "epochs"}
    counts = {name: sum(each.task.startswith(stage) for each in steps) for stage, name in names.items()}
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "-"


def lines(faults: Sequence[Fault]) -> list[str]:
    """Tables of the faults: by kind, and each."""
    began = min((each.at for each in faults), default=0.0)
    kinds = [(kind, [each for each in faults if each.kind == kind]) for kind in KINDS]
    by_kind = [
        [
            KINDS[kind],
            str(len(found)),
            f"{statistics.median(each.seconds for each in found):.1f}",
            f"{min(each.seconds for each in found):.1f} to {max(each.seconds for each in found):.1f}",
            str(sum(len(each.lost) for each in found)),
            counted_steps([step for each in found for step in each.repeated]),
        ]
        for kind, found in kinds
        if found
    ]
    each_one = [
        [
            each.kind,
            f"{each.at - began:.0f}",
            f"{each.run}, {each.shards} worker(s) a set: {each.during or 'starting'}",
            f"{each.seconds:.1f}",
            counted_steps(each.repeated),
            "; ".join(each.lost) or "-",
        ]
        for each in faults
    ]
    head = ("fault", "times", "median", "all", "workers lost", "repeated")
    return [
        *table(head, by_kind),
        "",
        *table(("fault", "second", "run and stage", "recovered after s", "repeated", "workers lost"), each_one),
    ]
