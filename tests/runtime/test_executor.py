"""Tests the executors' contract: every task once, in parallel or not, whatever happens to workers."""

from __future__ import annotations

import importlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RuntimeEnvSetupError
from torch import nn

import datm_ray.runtime
from datm_ray.config import ClusterConfig, NetworkSpec, WorkerShape
from datm_ray.core.networks.registry import build_network
from datm_ray.errors import ClusterError, ConfigError, TransientStoreError, WorkerLostError
from datm_ray.monitor import logs
from datm_ray.runtime.create import create_executor
from datm_ray.runtime.executor import (
    Executor,
    Failed,
    Finished,
    Lost,
    Note,
    Phase,
    Progress,
    Resized,
    SerialExecutor,
    Started,
    Task,
    WorkerRank,
    multiplies_bfloat16,
)
from datm_ray.runtime.machine.devices import (
    channels_last_on,
    images_on,
    network_on,
    precision_on,
    prepare_device,
    set_on,
    uses_gpu,
)
from datm_ray.runtime.ray.compat import idle_resources, requests_without_place
from datm_ray.runtime.ray.executor import _Stage
from datm_ray.runtime.ray.pool import PoolWorker
from datm_ray.runtime.stopping import by_signals
from tests.processes import until
from tests.runtime.workers import (
    Adder,
    Deaf,
    Greedy,
    Hanger,
    Idler,
    Leaver,
    Looker,
    Neighbour,
    Saver,
    Slow,
    Squarer,
    Warner,
)

FURTHER = (pytest.mark.slow, pytest.mark.exhaustive)

OPEN: list[Executor] = []


def on_ray(cluster: ClusterConfig) -> Executor:
    """Executor on Ray that is closed after the test, so that its actors leave their CPUs to the next one."""
    OPEN.append(create_executor("ray", cluster))
    return OPEN[-1]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def added(executor: Executor, tasks: list[Task], folder: Path | str = "") -> dict[str, list[Any]]:
    """Events of every task of `Adder`, in their order, without phases."""
    events: dict[str, list[Any]] = {task.name: [] for task in tasks}
    for task, event in executor.run(Adder, (str(folder),), "add", tasks):
        events[task.name] += [] if isinstance(event, Phase) else [event]
    return events


def results(executor: Executor, *setup: Any, method: str = "square", count: int = 5) -> dict[str, list[Any]]:
    """Events of every task, in their order, without phases."""
    shared = executor.share(np.arange(count))
    tasks = [Task(f"task {index}", (index,)) for index in range(count)]
    events: dict[str, list[Any]] = {task.name: [] for task in tasks}
    for task, event in executor.run(Squarer, (shared, *setup), method, tasks):
        events[task.name] += [] if isinstance(event, Phase) else [event]
    return events


def test_every_task_finishes_once_with_its_progress_in_order(executor: Executor) -> None:
    """Every task yields its progress in order and one result, serially and on Ray."""
    for index, (_, events) in enumerate(results(executor).items()):
        assert [type(event) for event in events] == [Started, Progress, Progress, Finished]
        assert events[1].values == {"index": float(index)}
        assert events[-1].result == index**2


def test_no_tasks_are_no_work(executor: Executor) -> None:
    """An empty stage starts no worker."""
    assert list(executor.run(Squarer, ("not even valid", "setup"), "square", [])) == []


@pytest.mark.parametrize("trap", ["raise", "setup"])
def test_expected_errors_reach_the_caller_as_they_were_raised(executor: Executor, trap: str) -> None:
    """A DatmError in a task or in a worker's setup keeps its class and message."""
    with pytest.raises(ConfigError) as caught:
        results(executor, trap)
    assert str(caught.value).startswith("the task is wrong" if trap == "raise" else "the setup is wrong")


@pytest.mark.ray
def test_killed_workers_cost_one_attempt_each(ray_cluster: Any, tmp_path: Path) -> None:
    """Killing every task's first worker is reported, and every task still finishes."""
    events = results(on_ray(ClusterConfig()), str(tmp_path), count=3)
    for index, task_events in enumerate(events.values()):
        assert [event.attempt for event in task_events if isinstance(event, Lost)] == [1]
        assert task_events[-1] == Finished(index**2)


@pytest.mark.ray
def test_a_task_that_always_kills_its_worker_is_given_up(ray_cluster: Any) -> None:
    """A task that always kills its worker is one clear error after the policy's retries."""
    with pytest.raises(WorkerLostError, match="lost its worker 2 times"):
        results(on_ray(ClusterConfig(retries=1)), method="always_die", count=1)


@pytest.mark.ray
@pytest.mark.parametrize("wish", [{"workers": 99}, {"gpus_per_worker": 1.0}, {"threads_per_worker": 64}])
def test_more_than_the_cluster_has_is_refused_before_anything_starts(ray_cluster: Any, wish: dict[str, Any]) -> None:
    """Workers that can never be placed are an error before anything starts."""
    with pytest.raises(ClusterError, match="the cluster has 2 CPU"):
        on_ray(ClusterConfig(**wish))


def test_a_task_for_several_workers_is_done_alone_where_there_is_one_process() -> None:
    """The serial executor passes no rank, so the worker works alone."""
    events = added(SerialExecutor(ClusterConfig()), [Task("sum", (5.0, 2), size=2)])
    assert events["sum"] == [Started(), Progress(0, 2), Progress(2, 2), Finished((5.0, 1, os.getpid()))]


@pytest.mark.slow
@pytest.mark.ray
def test_tasks_of_several_workers_and_of_one_take_turns(ray_cluster: Any) -> None:
    """Three tasks for pairs and one for a single worker all finish, and pairs are reused."""
    tasks = [Task("a", (1.0, 2), 2), Task("b", (2.0, 2), 2), Task("c", (3.0, 1)), Task("d", (4.0, 2), 2)]
    events = added(on_ray(ClusterConfig()), tasks)
    assert all(isinstance(task_events[0], Started) for task_events in events.values())
    progress = {name: [(event.done, event.total) for event in found[1:-1]] for name, found in events.items()}
    assert progress == {name: [(0, size), (size, size)] for name, size in zip("abcd", (2, 2, 1, 2), strict=True)}
    found = {name: task_events[-1].result for name, task_events in events.items()}
    assert {name: result[:2] for name, result in found.items()} == {"a": (3, 2), "b": (5, 2), "c": (3, 1), "d": (9, 2)}
    assert found["a"][2] == found["b"][2]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray
@pytest.mark.parametrize("workers", [None, 2])
def test_a_group_gets_what_tasks_of_one_worker_free(ray_cluster: Any, workers: int | None) -> None:
    """A pair that is added while tasks of one worker run starts before those that wait, with a limit or without."""
    tasks = [Task(f"tick {number}", (4,), method="tick") for number in range(6)]
    executor, started = on_ray(ClusterConfig(workers=workers)), list[str]()
    for task, event in executor.run(Ticker, (), "tick_together", tasks):
        started += [task.name] * isinstance(event, Started)
        if len(started) == 2 and len(tasks) == 6:
            tasks.append(Task("pair", (3,), 2))
    assert started.index("pair") <= 4
    assert len(started) == 7


@pytest.mark.ray
def test_ray_says_what_waits_and_what_is_idle(ray_cluster: Any) -> None:
    """Ray counts this command's actors that wait for resources, and resources that nobody holds.

    Other tests simulate both answers.
    """

    def answers() -> tuple[float, float]:
        return requests_without_place(), sum(each.get("CPU", 0.0) for each in idle_resources().values())

    def is_settled() -> bool:  # workers of the test before may still be ending
        found = answers()
        time.sleep(2)
        return found == answers() and found[1] >= 1

    until(is_settled, "a cluster with an idle CPU")
    waited, idle = answers()
    running = ray_cluster.remote(num_cpus=1)(Idler).remote()
    others = [ray_cluster.remote(num_cpus=0, resources={"none": 1})(Idler).remote() for _ in range(2)]
    waiting = PoolWorker.start({"num_cpus": 0.0, "resources": {"none": 1.0}})
    ray_cluster.get(running.here.remote())
    until(lambda: answers() == (waited + 1, idle - 1), "one actor waits, and one runs", every=0.5)
    for each in (running, *others, waiting.actor):
        ray_cluster.kill(each)
    until(lambda: answers() == (waited, idle), "the cluster as before", every=0.5)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray
@pytest.mark.parametrize("workers", [None, 2])
def test_a_group_that_others_keep_waiting_delays_no_other_task(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch, workers: int | None
) -> None:
    """While another job holds what a pair needs, tasks of one worker run; the pair starts when the job ends."""
    monkeypatch.setattr("datm_ray.runtime.ray.executor.SHORT_WAIT", 1.0)
    other = ray_cluster.remote(num_cpus=1)(Idler).remote()
    ray_cluster.get(other.here.remote())
    started = list[str]()
    tasks = [Task("pair", (3,), 2), *(Task(f"tick {number}", (3,), method="tick") for number in range(3))]
    try:
        for task, event in on_ray(ClusterConfig(workers=workers)).run(Ticker, (), "tick_together", tasks):
            started += [task.name] * isinstance(event, Started)
            if isinstance(event, Finished) and len(started) == 3:
                ray_cluster.kill(other)
    finally:
        ray_cluster.kill(other)
    assert started[-1] == "pair"


@pytest.mark.slow
@pytest.mark.ray
def test_the_loss_of_one_of_several_workers_costs_an_attempt_of_all(ray_cluster: Any, tmp_path: Path) -> None:
    """The killed worker alone is reported, not its waiting peers, and the task finishes."""
    events = added(on_ray(ClusterConfig()), [Task("sum", (1.0, 2, "die once"), 2)], tmp_path)["sum"]
    (lost,) = [event for event in events if isinstance(event, Lost)]
    assert lost.attempt == 1
    assert "exit" in lost.reason
    assert events[-1].result[:2] == (3, 2)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.ray
def test_several_workers_with_one_that_always_dies_are_given_up(ray_cluster: Any, tmp_path: Path) -> None:
    """A group whose one worker always dies is one clear error in the end."""
    executor = on_ray(ClusterConfig(retries=1))
    with pytest.raises(WorkerLostError, match=r"sum lost its worker 2 times without .* last reason: Worker"):
        added(executor, [Task("sum", (1.0, 2, "die"), 2)], tmp_path)


@pytest.mark.ray
def test_expected_error_in_the_setup_of_several_workers_reaches_the_caller(ray_cluster: Any) -> None:
    """An expected error in a setup reaches the caller before the workers connect."""
    with pytest.raises(ConfigError, match="the setup is wrong"):
        added(on_ray(ClusterConfig()), [Task("sum", (1.0, 2), 2)], "no folder")


@pytest.mark.ray
def test_expected_error_of_any_of_several_workers_reaches_the_caller(ray_cluster: Any) -> None:
    """One worker's expected error precedes its peers' loss, and costs no attempt."""
    with pytest.raises(ConfigError, match="one of them failed"):
        added(on_ray(ClusterConfig()), [Task("sum", (1.0, 2, "raise"), 2)])


@pytest.mark.slow
@pytest.mark.ray
def test_what_runs_beside_a_task_that_fails_is_finished(ray_cluster: Any) -> None:
    """Running tasks finish before another task's error is raised; queued tasks do not start."""
    tasks = [Task("fails", (1.0, 1, "raise")), Task("runs", (1.0, 1, "wait")), Task("waits", (1.0, 1))]
    logged: list[tuple[Task, Any]] = []
    with pytest.raises(ConfigError, match="one of them failed"):
        logged.extend(on_ray(ClusterConfig(workers=2)).run(Adder, (), "add", tasks))
    events = {task.name: event for task, event in logged}  # the last of each
    assert events["fails"] == Failed("one of them failed.", 1)
    assert isinstance(events["runs"], Finished)
    assert "waits" not in events


@pytest.mark.parametrize("name", ["serial", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_gpu_without_memory_is_one_line(name: str, request: pytest.FixtureRequest) -> None:
    """A GPU out of memory is one line with a remedy; on Ray after attempts on other workers."""
    if name == "ray":
        request.getfixturevalue("ray_cluster")
    cluster = ClusterConfig(retries=0)
    executor = on_ray(cluster) if name == "ray" else SerialExecutor(cluster)
    with pytest.raises(WorkerLostError, match=r"out of memory: CUDA out of memory. Tried .* --memory"):
        list(executor.run(Greedy, (), "work", [Task("greedy", ())]))


@pytest.mark.ray
def test_several_workers_leave_when_nobody_wants_the_rest(ray_cluster: Any) -> None:
    """A caller that stops half way leaves no actors and no placement group."""
    events = on_ray(ClusterConfig()).run(Adder, (), "add", [Task("sum", (1.0, 2), 2)])
    next(iter(events))
    del events
    end = time.monotonic() + 30
    while ray_cluster.available_resources().get("CPU") != 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert ray_cluster.available_resources().get("CPU") == 2
    assert {group["state"] for group in ray_cluster.util.placement_group_table().values()} == {"REMOVED"}


@pytest.mark.ray
def test_a_task_for_more_workers_than_there_are_is_refused(ray_cluster: Any) -> None:
    """A task for too many workers is refused before another starts, with the setting to change."""
    with pytest.raises(ClusterError, match=r"sum: 3 workers with 1 CPU.* do not fit: the cluster has 2 CPU"):
        added(on_ray(ClusterConfig()), [Task("first", (1.0, 1)), Task("sum", (1.0, 3), 3)])


@pytest.mark.ray
def test_a_store_that_does_not_answer_a_worker_is_reported(
    ray_cluster: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The terminal has one line for two workers that wait for one store; the log has both, with names."""
    monkeypatch.setattr("datm_ray.runtime.ray.executor.CHECK_INTERVAL", 0.2)
    executor = on_ray(ClusterConfig())
    logs.show(0)
    with logs.writing([str(tmp_path)]):
        for _, event in executor.run(Warner, (), "wait", [Task("one", ()), Task("two", ())]):
            if isinstance(event, Finished):
                assert "does not answer" in (tmp_path / "log.txt").read_text()
    message = "s3://bucket does not answer (it is down); trying again"
    assert capsys.readouterr().err.splitlines() == [message]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.partition("  ")[2] for line in lines] == [message] * 2
    with logs.writing([str(tmp_path)]), pytest.raises(ConfigError):
        list(executor.run(Warner, (), "fail", [Task("three", ())]))
    assert (tmp_path / "log.txt").read_text().rstrip().endswith("  about to fail")
    assert len({re.search(r" WARNING \S+ (Worker/\d+)  ", line)[1] for line in lines}) == 2  # type: ignore[index]


@pytest.mark.ray
def test_idle_workers_that_died_cost_no_attempt(ray_cluster: Any, tmp_path: Path) -> None:
    """Idle workers that died with a lost node cost no attempt of the task."""
    executor = on_ray(ClusterConfig(retries=1))
    tasks = [Task("quick", ("quick",)), Task("long", ("long",))]
    events: list[tuple[str, Any]] = []
    for task, event in executor.run(Neighbour, (str(tmp_path),), "work", tasks):
        if isinstance(event, Finished) and task.name == "quick":
            (tmp_path / "quick is done").touch()
        events.append((task.name, event))
    lost = [event for name, event in events if isinstance(event, Lost)]
    assert [event.attempt for event in lost] == [1]
    assert events[-1] == ("long", Finished("done"))


@pytest.mark.ray
def test_a_wait_for_free_resources_is_reported_and_has_a_limit(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait for resources that another job holds is reported, and ends after the time allowed."""
    monkeypatch.setattr("datm_ray.runtime.ray.executor.WAIT_INTERVAL", 1.0)
    logged: list[tuple[Task, Any]] = []
    others = [ray_cluster.remote(num_cpus=1)(Idler).remote() for _ in range(2)]
    ray_cluster.get([other.here.remote() for other in others])
    work = on_ray(ClusterConfig(wait_for_nodes=3.0)).run(Adder, (), "add", [Task("sum", (1.0, 1))])
    try:
        with pytest.raises(ClusterError, match=r"1 worker did not become free within 3 s.*Other jobs use"):
            logged.extend(work)
    finally:
        for other in others:
            ray_cluster.kill(other)
    phase, *notes = [event for _, event in logged]
    assert phase == Phase("starting workers")
    assert len(notes) in (2, 3)
    for note in notes:
        assert re.fullmatch(r"waiting for 1 worker for \d s: 1 node can hold 2, if nobody else uses them", note.text)


@pytest.mark.ray
@pytest.mark.parametrize("trap", ["freeze_once", "sleep_once", "sleep in the setup"])
def test_a_worker_that_is_stuck_is_found(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trap: str
) -> None:
    """A worker that takes no step is lost, and another gets its task, also if its process cannot end itself."""
    monkeypatch.setattr("datm_ray.runtime.ray.executor.CHECK_INTERVAL", 0.2)
    monkeypatch.setattr("datm_ray.runtime.ray.executor.MARGIN", 1.0 if trap == "freeze_once" else 20.0)
    executor = on_ray(ClusterConfig(peer_timeout=0.2, progress_timeout=2.0))
    worker, method = (Slow, "work") if trap == "sleep in the setup" else (Saver, trap)
    events = [event for _, event in executor.run(worker, (str(tmp_path),), method, [Task("stuck", ())])]
    (lost,) = [event for event in events if isinstance(event, Lost)]
    ending = "and no answer" if trap == "freeze_once" else "its log in Ray's dashboard says where it was stuck"
    assert re.fullmatch(rf"no step for \d+ s[,;] {ending}", lost.reason)
    assert isinstance(events[-1], Finished)
    executor.close()
    until(lambda: ray_cluster.available_resources().get("CPU") == 2, "the stuck worker's CPU is free")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("is_frozen", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_a_rank_that_hangs_is_blamed_by_its_peers(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_frozen: bool
) -> None:
    """The rank that waits reports its peer before its own timer ends it, so the rank that hangs is known and ended.

    A step is short here, so the timer's limit is the shortest one, as in most real runs.
    """
    blamed: list[list[int]] = []

    class Watched(_Stage):
        def _blame(self, job: Any, cause: BaseException, stream: Any) -> set[str]:
            blamed.append([*job.streams.values()] if stream is None else [job.streams[stream]])
            return super()._blame(job, cause, stream)

    monkeypatch.setattr("datm_ray.runtime.ray.executor._Stage", Watched)
    timeout = 20.0
    tasks = [Task("hung", (timeout,), 2)]
    executor = on_ray(ClusterConfig(peer_timeout=timeout, retries=0))
    with pytest.raises(WorkerLostError, match="last reason: worker 1 of 2 lost its peers: "):
        list(executor.run(Hanger, (str(tmp_path), is_frozen), "add", tasks))
    assert blamed == [[1]]
    executor.close()
    until(lambda: ray_cluster.available_resources().get("CPU") == 2, "the hung worker's CPU is free")


class BrokenAtFirst:
    """A worker whose first attempts raise an error."""

    def __init__(self, folder: str, error: Exception) -> None:
        self._folder, self._error = Path(folder), error

    def work(self, failures: int) -> Iterator[Progress | Finished]:
        yield Progress(1, 2)
        marks = len(list(self._folder.iterdir()))
        if marks < failures:
            (self._folder / str(marks)).touch()
            raise self._error
        yield Finished("done")


BROKEN_GPU = RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be ...")
BUSY = TransientStoreError("Cannot write s3://bucket/set", "The server does not answer (503)")


@pytest.mark.ray
@pytest.mark.parametrize(
    ("error", "reason", "words"),
    [
        (
            BROKEN_GPU,
            "RuntimeError: CUDA error: uncorrectable ECC error encountered",
            r"^broken lost its worker 2 times .* CUDA error: uncorrectable ECC error",
        ),
        (
            BUSY,
            "Cannot write s3://bucket/set: The server does not answer (503)",
            r"^Cannot write s3://bucket/set\. The server does not answer \(503\)",
        ),
    ],
    ids=["GPU", "store"],
)
def test_an_error_that_nobody_expects_costs_an_attempt(
    ray_cluster: Any, tmp_path: Path, error: Exception, reason: str, words: str
) -> None:
    """A CUDA error or a busy store is a loss; a task that always has one is given up after all others, in its words."""
    executor = on_ray(ClusterConfig(retries=1))
    tasks = [Task("broken", (99,)), Task("other", (1,))]
    events: list[tuple[str, Any]] = []
    with pytest.raises((WorkerLostError, TransientStoreError), match=words):
        events.extend(
            (task.name, event) for task, event in executor.run(BrokenAtFirst, (str(tmp_path), error), "work", tasks)
        )
    finished = [name for name, event in events if isinstance(event, Finished)]
    assert finished == ["other"]
    lost = [event.reason for _, event in events if isinstance(event, Lost)]
    assert set(lost) == {reason}


BROKEN_GPU = """
import json, ray, sys
from datm_ray.config import ClusterConfig
from datm_ray.runtime.executor import Finished, Lost, Task
from datm_ray.runtime.ray.executor import RayExecutor
from tests.runtime.workers import BrokenGpu

gpus, size, broken = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
ray.init("local", num_cpus=gpus, num_gpus=gpus, **quiet)
executor = RayExecutor(ClusterConfig())
fewer = tuple(range(size - 1, 0, -1))
stages = [[Task(name, (), size, fewer), Task(f"{name}1", ()), Task(f"{name}2", ())] for name in "ab"]
events = [
    event.reason if isinstance(event, Lost) else event.result
    for tasks in stages
    for _, event in executor.run(BrokenGpu, (broken,), "work", tasks)
    if isinstance(event, Lost | Finished)
]
print(json.dumps(events))
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("gpus", "size", "broken"),
    [pytest.param(2, 1, "0", id="alone", marks=pytest.mark.exhaustive), pytest.param(3, 3, "1", id="set")],
)
def test_ray_gives_a_broken_gpu_to_no_other_task(gpus: int, size: int, broken: str) -> None:
    """A broken GPU costs one attempt in a whole command; its node's others do all tasks.

    To later workers of a set Ray may give the broken GPU again. Each of them uses the one that is kept for it.
    """
    command = [sys.executable, "-c", BROKEN_GPU, str(gpus), str(size), broken]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    events = json.loads(done.stdout.splitlines()[-1])
    (lost,) = [event for event in events if isinstance(event, str)]
    pattern = rf"RuntimeError: CUDA error: uncorrectable ECC .*; GPU {broken} of \S+ is not used again"
    assert re.fullmatch(pattern, lost)
    places = [event for event in events if event != lost]
    assert len(places) == 6
    assert broken not in [used for _, used in places]
    others = {used for given, used in places if given != used}
    assert len(others) <= (size > 1)
    assert not others.intersection(given for given, _ in places)


class Holder:
    """An actor that puts an array into Ray's object store."""

    def hold(self) -> list[Any]:
        import ray

        return [ray.put(np.arange(10**6))]


def is_lost(ray: Any, shared: Any) -> bool:
    """True once Ray has lost a shared value."""
    try:
        ray.get(shared, timeout=5)
    except ObjectLostError:
        return True
    except GetTimeoutError:
        pass
    return False


@pytest.mark.ray
def test_data_that_is_lost_from_the_object_store_costs_attempts(ray_cluster: Any) -> None:
    """Workers whose data set is lost from Ray's object store are losses, and the last line says so."""
    owner = ray_cluster.remote(num_cpus=0)(Holder).remote()
    (shared,) = ray_cluster.get(owner.hold.remote())
    ray_cluster.kill(owner)
    until(lambda: is_lost(ray_cluster, shared), "the data is lost")
    events: list[Any] = []
    lost = "shared data was lost from Ray's object store (OwnerDiedError)"
    work = on_ray(ClusterConfig(retries=1)).run(Squarer, (shared,), "square", [Task("one", (1,))])
    with pytest.raises(WorkerLostError, match=rf"one lost its worker 2 times .* last reason: {re.escape(lost)}"):
        events.extend(event for _, event in work)
    assert [event for event in events if isinstance(event, Lost)] == [Lost(lost, 1)]


@pytest.mark.ray
def test_an_environment_that_ray_cannot_set_up_is_one_line(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers whose runtime environment fails are one line with Ray's reason, after some attempts."""
    monkeypatch.setattr("datm_ray.runtime.ray.executor.MOST_FAILED_STARTS", 1)
    gone = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip"}, "num_cpus": 1.0}
    monkeypatch.setattr("datm_ray.runtime.ray.executor.worker_options", lambda *_: gone)
    work = on_ray(ClusterConfig(retries=0)).run(Squarer, (np.arange(3),), "square", [Task("one", (1,))])
    words = r"^Ray cannot start workers: the runtime environment cannot be set up: .*Failed to download runtime_env"
    with pytest.raises(WorkerLostError, match=words) as caught:
        list(work)
    assert len(str(caught.value).splitlines()) == 1


class Ticker:
    """A worker that takes a step every tenth of a second."""

    def tick(self, steps: int) -> Iterator[Progress | Finished]:
        for step in range(steps):
            time.sleep(0.1)
            yield Progress(step + 1, steps)
        yield Finished()

    def tick_together(self, steps: int, worker_rank: WorkerRank | None = None) -> Iterator[Progress | Finished]:
        return self.tick(steps)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.ray
def test_time_in_which_the_command_stood_still_is_no_silence_of_workers(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that is suspended for a while loses no worker for it."""
    for name, value in {"CHECK_INTERVAL": 0.1, "ABSENCE": 0.2, "MARGIN": 0.5}.items():
        monkeypatch.setattr(f"datm_ray.runtime.ray.executor.{name}", value)
    limit = property(lambda patience: 1.0 if patience.steps > 2 else 60.0)
    monkeypatch.setattr("datm_ray.runtime.retries.Patience.limit", limit)
    executor, events = on_ray(ClusterConfig()), list[Any]()
    seen = set[str]()
    for task, event in executor.run(Ticker, (), "tick", [Task("a", (10,)), Task("b", (10,))]):
        events.append(event)
        if isinstance(event, Progress) and event.done > 3 and len(seen) < 2:
            seen.add(task.name)
            if len(seen) == 2:
                time.sleep(3.0)
    assert [event for event in events if isinstance(event, Lost)] == []


ANOTHER_COMMAND = """
import sys
from datm_ray.config import ClusterConfig
from datm_ray.runtime.create import create_executor
from datm_ray.runtime.executor import Task
from tests.runtime.test_executor import Ticker

executor = create_executor("ray", ClusterConfig(), sys.argv[1])
for task, event in executor.run(Ticker, (), "tick", [Task(f"tick {number}", (20,)) for number in range(3)]):
    print(task.name, type(event).__name__, flush=True)
executor.close()
"""


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.ray
def test_two_commands_share_a_cluster(ray_cluster: Any) -> None:
    """Two commands on one cluster finish all their tasks without a loss, also after one of them has ended."""
    address = ray_cluster.get_runtime_context().gcs_address
    command = [sys.executable, "-c", ANOTHER_COMMAND, address]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    executor = on_ray(ClusterConfig())
    events = [event for _, event in executor.run(Ticker, (), "tick", [Task("a", (20,)), Task("b", (20,))])]
    executor.close()
    output, _ = other.communicate(timeout=120)
    assert other.returncode == 0
    assert sum(isinstance(event, Finished) for event in events) == 2
    assert output.count("Finished") == 3
    assert "Lost" not in output
    assert not any(isinstance(event, Lost) for event in events)


@pytest.mark.ray
def test_a_worker_leaves_a_node_that_is_about_to_end(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A worker whose node is about to end saves, and another resumes from there; that costs no attempt."""
    nodes = {node["NodeID"] for node in ray_cluster.nodes()}
    monkeypatch.setattr("datm_ray.runtime.ray.executor.CHECK_INTERVAL", 0.2)
    monkeypatch.setattr(
        "datm_ray.runtime.ray.executor.draining_nodes", lambda: set() if (tmp_path / "count").exists() else nodes
    )
    work = on_ray(ClusterConfig()).run(Leaver, (str(tmp_path),), "count", [Task("count", (20,))])
    events = [event for _, event in work if not isinstance(event, Phase)]
    saved = int((tmp_path / "count").read_text())
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes == [f"its node ends soon: saved number {saved}, to resume elsewhere"]
    assert [event.done for event in events if isinstance(event, Progress)] == list(range(1, 21))
    assert sum(isinstance(event, Started) for event in events) == 2
    assert [event for event in events if isinstance(event, Lost)] == []
    assert isinstance(events[-1], Finished)


@pytest.mark.ray
def test_a_second_ctrl_c_stops_without_waiting_for_the_workers(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first Ctrl-C waits until the workers have saved, the second one does not; their CPUs are free after it."""
    monkeypatch.setattr("datm_ray.runtime.ray.executor.SAVE_TIMEOUT", math.inf)
    messages: list[str] = []

    def press(seconds: float) -> None:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()

    def work() -> None:
        for _, event in on_ray(ClusterConfig()).run(Deaf, (), "work", [Task("deaf", ())]):
            if isinstance(event, Progress | Note):  # the note follows the first Ctrl-C
                press(0.5)

    with pytest.raises(KeyboardInterrupt), by_signals(messages.append):
        work()
    assert messages == ["Stopping. Ctrl-C again stops at once."]
    until(lambda: ray_cluster.available_resources().get("CPU") == 2, "the worker's CPU is free")


@pytest.mark.ray
def test_tasks_that_are_added_meanwhile_are_run(executor: Executor) -> None:
    """Tasks that the caller appends while a stage runs are run too, serially and on Ray."""
    tasks = [Task("first", (0,))]
    done = []
    for task, event in executor.run(Squarer, (executor.share(np.arange(9)),), "square", tasks):
        if isinstance(event, Finished):
            done.append((task.name, event.result))
            tasks += [Task(f"task {len(tasks)}", (len(tasks),))] if len(tasks) < 4 else []
    assert done == [("first", 0), ("task 1", 1), ("task 2", 4), ("task 3", 9)]


def test_nodes_that_start_on_demand_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few workers are refused, unless the recipe says to wait for nodes."""
    ray = pytest.importorskip("ray")
    from datm_ray.runtime.ray import cluster as ray_cluster

    monkeypatch.setattr(ray, "nodes", list)
    with pytest.raises(ClusterError, match=r"4 workers .* do not fit: the cluster has 0 CPU"):
        ray_cluster.Nodes(ClusterConfig()).require(4)
    assert ray_cluster.Nodes(ClusterConfig()).patience() == ray_cluster.SHORT_WAIT
    ray_cluster.Nodes(ClusterConfig(wait_for_nodes=600.0)).require(4)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "a", "Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}])
    shapes = ClusterConfig(gpus_per_worker=1.0, light=WorkerShape(gpus_per_worker=0.25))
    assert [ray_cluster.Nodes(shapes, light=light).capacity() for light in (False, True)] == [2, 8]
    assert ray_cluster.with_gpus(ClusterConfig()).gpus_per_worker == 1.0
    with pytest.raises(ClusterError, match="do not fit"):
        ray_cluster.Nodes(ClusterConfig(threads_per_worker=16)).require(1)


@pytest.mark.slow
@pytest.mark.ray
def test_a_task_makes_do_with_fewer_workers_and_grows_when_it_has_saved(
    ray_cluster: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A task starts with fewer workers, grows after saving once another job ends, and counts nothing twice."""
    monkeypatch.setattr("datm_ray.runtime.ray.executor.SHORT_WAIT", 3.0)
    other = ray_cluster.remote(num_cpus=1)(Idler).remote()
    ray_cluster.get(other.here.remote())
    events = []
    executor = on_ray(ClusterConfig(peer_timeout=2.0))
    try:
        # A second worker takes long to start on a busy machine.
        for _, event in executor.run(Saver, (str(tmp_path),), "count", [Task("count", (1000,), 2, fewer=(1,))]):
            if isinstance(event, Progress) and event.done == 3:
                ray_cluster.kill(other)
            events.append(event)
    finally:
        ray_cluster.kill(other)  # later tests need its CPU, even if this one fails
    assert [event for event in events if isinstance(event, Resized)] == [Resized(1, 2), Resized(2, 2)]
    assert [event for event in events if isinstance(event, Lost)] == []
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in progress] == list(range(1, len(progress) + 1))
    sizes = [event.values["size"] for event in progress]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (1.0, 2.0)


@pytest.mark.slow
@pytest.mark.ray
def test_a_task_too_large_for_fewer_workers_waits_for_more(ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that two workers can hold and one cannot waits after a loss, and is not refused."""
    monkeypatch.setattr("datm_ray.runtime.ray.executor.SHORT_WAIT", 2.0)
    monkeypatch.setattr("datm_ray.runtime.ray.executor.WAIT_INTERVAL", 4.0)
    other = ray_cluster.remote(num_cpus=1)(Idler).remote()
    ray_cluster.get(other.here.remote())
    executor = on_ray(ClusterConfig(peer_timeout=1.0, wait_for_nodes=5.0))
    logged: list[tuple[Task, Any]] = []
    try:
        with pytest.raises(ClusterError, match="2 workers did not become free"):
            logged.extend(executor.run(Adder, (), "add", [Task("sum", (1.0, 1, "too few"), 2, (1,))]))
    finally:
        ray_cluster.kill(other)
    notes = [event.text for _, event in logged if isinstance(event, Note)]
    first = notes.index("2 workers did not become free; trying with fewer")
    assert notes[first + 1] == "waiting for nodes: 1 worker cannot run it: it does not fit."
    assert re.fullmatch(r"waiting for 2 workers for \d s: 1 node can hold 2.*", notes[first + 2])


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http"])
def test_an_address_that_is_not_rays_own_is_reported_at_once(address: str) -> None:
    """An address of Ray Client or of a dashboard is reported as such at once."""
    pytest.importorskip("ray")
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    from datm_ray.runtime.ray import cluster as ray_cluster

    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ClusterError, match="datm-ray job submit"):
            ray_cluster.connect(f"127.0.0.1:{server.server_port}" if address == "http" else address)
    finally:
        server.shutdown()
        server.server_close()


REFUSED = {
    "a dashboard": (
        None,
        "http://127.0.0.1:8265/",
        r"RAY_ADDRESS 'http://127.0.0.1:8265/' is the address of a dashboard",
    ),
    "a slash": (None, "127.0.0.1:1/", r"Connection refused\. Check RAY_ADDRESS; or"),
    "nothing that listens": ("127.0.0.1:1", None, r"Connection refused\. Check --address; or"),
    "a folder of another user": (
        PermissionError(13, "Permission denied", "/.ray"),
        None,
        r"cannot use /\.ray \(Permission denied\)\. Ray writes to RAY_TMPDIR .* HOME \(/\)\. Free some space, or set",
    ),
    "a slow start": (
        Exception("The current node timed out during startup. This could happen because some raylet failed"),
        None,
        r"did not answer in time\. The machine is busy.*--executor serial",
    ),
    "a long path": (OSError("AF_UNIX path length cannot exceed 107 bytes"), None, r"with a shorter path, or use"),
    "its environment": (
        RuntimeEnvSetupError("no space"),
        None,
        r"does not start .*Failed to set up runtime environment",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_why_ray_is_missing_is_reported(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line has the reason, with the variables of folders or the variable or option of the address."""
    ray = pytest.importorskip("ray")
    from datm_ray.runtime.ray import cluster as ray_cluster

    given, variable, expected = REFUSED[case]
    monkeypatch.setenv("HOME", "/")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)

    def refuse(**_: Any) -> None:
        assert isinstance(given, Exception), "Ray was asked"
        raise given

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ClusterError, match=expected) as caught:
        ray_cluster.connect(given if isinstance(given, str) else None)
    assert "RAY_AUTH_MODE" not in str(caught.value)


@pytest.mark.parametrize("before", [None, "1"])
def test_ray_packs_no_folder_under_uv_unless_it_is_asked_to(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray uploads no folder under uv, unless the user's setting says so."""
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", before or "")
    if before is None:
        monkeypatch.delenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV")
    importlib.reload(datm_ray.runtime)
    assert os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == (before or "0")


def test_another_version_on_the_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's long message on another version becomes one line."""
    ray = pytest.importorskip("ray")
    from datm_ray.runtime.ray import cluster as ray_cluster

    def refuse(**_: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1.0\n    Python: 3.9.1\n")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(
        ClusterError, match=r"other versions than this machine: .*Ray: 2\.1\.0 Python: 3\.9\.1"
    ) as caught:
        ray_cluster.connect("auto")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("resources", "wish", "memory", "count"),
    [
        ({"CPU": 7.0}, {"threads_per_worker": 2}, 0, 3),
        ({"CPU": 8.0, "GPU": 2.0}, {"gpus_per_worker": 0.4}, 0, 4),
        ({"CPU": 8.0, "GPU": 4.0}, {"gpus_per_worker": 0.75}, 0, 4),
        ({"CPU": 2.0, "GPU": 4.0}, {"gpus_per_worker": 1.0}, 0, 2),
        ({"memory": 1.0}, {}, 0, 0),
        ({"CPU": 32.0, "GPU": 2.0, "memory": 13.0}, {"gpus_per_worker": 0.125}, 4, 3),
        ({"CPU": 32.0, "GPU": 2.0, "memory": 13.0}, {"gpus_per_worker": 0.125}, 0, 16),
        ({"CPU": 2.0, "GPU": 2.0, "memory": 8.0}, {"gpus_per_worker": 1.0}, 4, 2),
        ({"CPU": 2.0}, {}, 4, 0),
    ],
)
def test_workers_that_fit_into_a_node(
    resources: dict[str, float], wish: dict[str, Any], memory: int, count: int
) -> None:
    """Counts of workers split neither a node's CPUs nor a GPU nor its memory beyond what Ray can place."""
    pytest.importorskip("ray")
    from datm_ray.runtime.ray.cluster import fitting

    assert fitting(resources, ClusterConfig(**wish), memory) == count


@pytest.mark.parametrize(
    ("wish", "found", "gpus"),
    [
        ({}, 4.0, 1.0),
        ({}, 0.0, 0.0),
        ({"device": "cpu"}, 4.0, 0.0),
        ({"gpus_per_worker": 0.0}, 4.0, 0.0),
        ({"gpus_per_worker": 0.5}, 0.0, 0.5),  # nodes with GPUs may come on demand
    ],
)
def test_workers_have_a_gpu_each_where_there_are_some(
    wish: dict[str, Any], found: float, gpus: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker gets a GPU if nodes have some, so that none shares a node's first one."""
    ray = pytest.importorskip("ray")
    from datm_ray.runtime.ray.cluster import bundle_of, with_gpus, worker_options

    there = {"NodeID": "a", "Alive": True, "Resources": {"CPU": 8.0, "GPU": found}}
    monkeypatch.setattr(ray, "nodes", lambda: [there])
    cluster = with_gpus(ClusterConfig(**wish))
    assert cluster.gpus_per_worker == gpus
    assert bundle_of(worker_options(cluster)).get("GPU", 0.0) == gpus


@pytest.mark.parametrize("wish", [{"device": "cuda"}, {"precision": "tf32"}])
def test_what_needs_a_gpu_is_refused_on_a_cluster_without(
    wish: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that needs a GPU is refused before work on a cluster without one."""
    ray = pytest.importorskip("ray")
    from datm_ray.runtime.ray.cluster import with_gpus

    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "a", "Alive": True, "Resources": {"CPU": 8.0}}])
    with pytest.raises(ClusterError, match="GPU"):
        with_gpus(ClusterConfig(**wish))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model name\t: bf16\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu avx512f amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx512f avx512_vnni\nbugs\t: bf16\n", False),
        ("", False),
    ],
)
def test_cpus_that_multiply_bfloat16_are_known_by_their_flags(
    text: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flags of x86 and features of ARM tell whether a CPU multiplies bfloat16; without either it does not."""
    monkeypatch.setattr("builtins.open", lambda *args, **more: io.StringIO(text))
    assert multiplies_bfloat16.__wrapped__() is expected


@pytest.mark.ray
def test_a_worker_that_was_given_no_gpu_sees_none(ray_cluster: Any) -> None:
    """A worker without a GPU sees none in any version of Ray."""
    events = [event for _, event in on_ray(ClusterConfig()).run(Looker, (), "look", [Task("look", ())])]
    assert events == [Phase("starting workers"), Started(), Finished("")]


def test_no_gpus_per_worker_means_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero GPUs per worker means the CPU, also in one process; a contradicting device is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not uses_gpu(ClusterConfig(gpus_per_worker=0.0))
    assert uses_gpu(ClusterConfig())
    assert not uses_gpu(ClusterConfig(device="cpu", gpus_per_worker=1.0))
    assert prepare_device(ClusterConfig(gpus_per_worker=0.0)) == torch.device("cpu")
    with pytest.raises(ClusterError, match="gpus_per_worker=1"):
        prepare_device(ClusterConfig(gpus_per_worker=0.0, device="cuda"))


@pytest.mark.parametrize(
    ("precision", "is_rounded"), [("auto", True), ("tf32", True), ("bfloat16", True), ("float32", False)]
)
def test_products_on_gpus_are_rounded_as_the_recipe_says(
    monkeypatch: pytest.MonkeyPatch, precision: Any, is_rounded: bool
) -> None:
    """Networks use TF32 on GPUs by default, as published, and none with float32; CPUs and older GPUs never round."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = not is_rounded
        cluster = ClusterConfig(precision=precision)
        assert prepare_device(cluster) == torch.device("cuda", 1), "with its index, as tensors have it"
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (is_rounded, is_rounded)
        assert precision_on(cluster, torch.device("cuda")) == ("tf32" if precision == "auto" else precision)
        assert precision_on(ClusterConfig(), torch.device("cpu")) == "float32"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert precision_on(ClusterConfig(), torch.device("cuda")) == "float32"
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def test_torchs_advice_about_tf32_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker on a GPU shows no advice of torch 2.9 about names of switches, which its user cannot follow."""
    advice = (
        "Please use the new API settings to control TF32 behavior, such as torch.backends.cudnn.conv.fp32_precision = "
        "'tf32' or torch.backends.cuda.matmul.fp32_precision = 'ieee'."
    )

    class Advising:
        def __setattr__(self, name: str, value: bool) -> None:
            warnings.warn(advice, UserWarning, stacklevel=1)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.cuda, "matmul", Advising())
    before = torch.backends.cudnn.allow_tf32
    try:
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            prepare_device(ClusterConfig())
            warnings.warn("another", UserWarning, stacklevel=1)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert [str(each.message) for each in shown] == ["another"]


@pytest.mark.parametrize(
    ("precision", "is_new", "expected"),
    [
        ("auto", True, True),
        ("tf32", True, True),
        ("bfloat16", True, True),
        ("float32", True, False),
        ("auto", False, False),
        ("tf32", False, False),
    ],
)
def test_maps_are_stored_as_the_device_and_the_precision_need(
    precision: Any, is_new: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps are channels-last on CPUs, and on GPUs where tensor cores multiply; a given value holds everywhere."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if is_new else (7, 0))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert channels_last_on(ClusterConfig(precision=precision), gpu) is expected
    assert channels_last_on(ClusterConfig(precision=precision), cpu)
    assert channels_last_on(ClusterConfig(precision="float32"), gpu, "bfloat16")
    for given in (True, False):
        own = ClusterConfig(precision=precision, channels_last=given)
        assert [channels_last_on(own, device) for device in (gpu, cpu)] == [given, given]


def test_images_that_would_fill_a_gpu_stay_in_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of more than half of a GPU's free memory, or without free memory for other work, stay in main memory."""
    images = np.zeros((4, 1, 8, 8), np.float32)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", list)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)
    copied: list[torch.device] = []
    monkeypatch.setattr("datm_ray.runtime.machine.devices.to_device", lambda images, device: copied.append(device))
    for free in (1, 3):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free * images.nbytes, 0))
        images_on(images, torch.device("cuda"))
    images_on(images, torch.device("cpu"))
    for beside in (2, 3):
        images_on(images, torch.device("cuda"), beside * images.nbytes)
    assert [device.type for device in copied] == ["cpu", "cuda", "cpu", "cuda", "cpu"], "a GPU with three times as much"


def test_a_set_that_would_fill_a_gpu_stays_in_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set takes at most half of a GPU's free memory, and leaves what a step needs."""
    images, free = mock.Mock(nbytes=1000), {"GPU": 0}
    monkeypatch.setattr("datm_ray.runtime.machine.devices.free_gpu_memory", lambda: free["GPU"])
    gpu = torch.device("cuda")
    for size, beside, is_moved in ((1999, 0, False), (2000, 0, True), (2000, 1001, False), (3000, 2000, True)):
        free["GPU"] = size
        assert (set_on(images, gpu, beside) is not images) is is_moved, (size, beside)
    assert set_on(images, torch.device("cpu"), 10**9) is images.to.return_value


def test_networks_on_gpus_are_channels_last() -> None:
    """Packaged networks get the layout of their device; CPUs, and networks of the user's own, keep the usual one."""

    class Own(nn.Sequential):
        """A network of the user's own."""

    def is_moved(network: nn.Module, device: str, cluster: ClusterConfig) -> bool:
        weight = next(
            each for each in network_on(network, torch.device(device), cluster).parameters() if each.dim() == 4
        )
        return weight.is_contiguous(memory_format=torch.channels_last)

    def packaged() -> nn.Module:
        return build_network(NetworkSpec(channels=3, size=(8, 8), classes=4, width=4, depth=2), 0)

    usual, chosen, refused = ClusterConfig(), ClusterConfig(channels_last=True), ClusterConfig(channels_last=False)
    found = [is_moved(packaged(), *each) for each in (("meta", usual), ("meta", refused), ("cpu", chosen))]
    own = [is_moved(Own(nn.Conv2d(3, 4, 3)), "meta", each) for each in (usual, chosen)]
    assert (found, own) == ([True, False, False], [False, True])


def test_unknown_executor_is_named() -> None:
    """An unknown executor is an error that lists the known ones."""
    with pytest.raises(ClusterError, match="ray, serial"):
        create_executor("dask", ClusterConfig())


def test_serial_executor_needs_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray the serial executor works, and the ray executor says what to install."""
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "datm_ray.runtime.ray.executor", raising=False)
    assert results(create_executor("serial", ClusterConfig()))["task 2"][-1] == Finished(4)
    with pytest.raises(ClusterError, match="pip install"):
        on_ray(ClusterConfig())
