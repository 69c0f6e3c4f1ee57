"""Tests where and when a stage's tasks run: order, requests, waits and bad nodes, on a simulated cluster."""

from __future__ import annotations

import itertools
import logging
import random
import re
from typing import Any
from unittest import mock

import pytest
from ray.exceptions import RayActorError, RayTaskError

from datm_ray.config.plugins import imported
from datm_ray.errors import (
    ClusterError,
    GpuMemoryError,
    NoFreeWorkersError,
    PeerLostError,
    PluginError,
    StoreError,
    UnusableGpuError,
)
from datm_ray.runtime.executor import Failed, Lost, Note, Progress, Resized, Stopped, Task
from datm_ray.runtime.ray import executor as ray_executor, ranks
from datm_ray.runtime.ray.pool import PoolWorker
from datm_ray.runtime.retries import MARGIN
from datm_ray.runtime.stopping import Interrupted
from tests.runtime.ray.simulation import Clock, Group, Simulation, Worker

HOUR = 3600.0
GIB = 2**30


def alone(*names: str) -> list[Task]:
    """Tasks of one worker."""
    return [Task(name, ()) for name in names]


# --- bad nodes ---


def test_a_task_waits_for_another_node_while_its_own_command_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose node failed it waits for hours until a task of its command leaves another node; others use both."""
    run = Simulation(monkeypatch, {"bad": 1, "good": 1}, alone("lost", "long", "next"))
    run.turn(turns=2)
    assert (run.places("lost"), run.places("long")) == (["bad"], ["good"])
    run.lose("lost")
    run.turn(60.0, turns=60)
    assert (run.places("lost"), run.places("next")) == ([], ["bad"])
    run.end("next")
    run.turn(60.0, turns=60)
    assert run.places("lost") == []
    assert run.losses("lost") == 1
    run.end("long")
    run.turn(turns=2)
    assert run.places("lost") == ["good"]


def test_every_node_that_failed_a_task_is_avoided_until_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task goes to a third node after losses on two, and may return to them once it has saved new work."""
    run = Simulation(monkeypatch, {"a": 1, "b": 1, "c": 1}, alone("task"), retries=5)
    for node in ("a", "b", "c"):
        run.turn(10.0, turns=3)
        assert run.places("task") == [node]
        if node == "c":
            run.job("task").saved = 7
        run.lose("task")
    assert run.job("task").history.nodes == {"c"}


def test_nodes_are_forgiven_where_others_hold_the_rest_and_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """If another command keeps the other node and no task runs, the node of the loss is used again, with a message."""
    run = Simulation(monkeypatch, {"bad": 1, "good": 1}, alone("task"))
    run.turn(turns=2)
    run.lose("task")
    run.taken["good"] = 1
    run.turn(5.0, turns=11)
    assert run.places("task") == []
    run.turn(5.0, turns=6)
    assert run.places("task") == ["bad"]
    assert run.notes()[-1].startswith("task: no other node became free")


MOUNT = StoreError("cannot write /shared/store: No such file or directory")


def missing_package() -> PluginError:
    """Error of a node that lacks a user's package."""
    with pytest.raises(PluginError) as caught:
        imported("method", "a_package_of_mine:Method")
    return caught.value


SMALL_GPU = GpuMemoryError("a worker that distils birds needs 30 GiB and may take 20 GiB")


@pytest.mark.parametrize("error", [MOUNT, missing_package(), SMALL_GPU], ids=["mount", "package", "small GPU"])
def test_an_error_of_two_nodes_does_not_end_the_run_if_a_third_has_none(
    monkeypatch: pytest.MonkeyPatch, error: ClusterError
) -> None:
    """A mount, package or memory that two nodes lack costs an attempt on each, and the third node runs the task."""
    run = Simulation(monkeypatch, {"a": 1, "b": 1, "c": 1}, alone("task"))
    for node in ("a", "b"):
        run.turn(10.0, turns=3)
        assert run.places("task") == [node]
        run.lose("task", error)
    run.turn(10.0, turns=3)
    assert run.places("task") == ["c"]
    run.end("task")
    assert (run.ended(), run.losses("task")) == (["task"], 2)


@pytest.mark.parametrize(("nodes", "attempts"), [(1, 1), (2, 2), (9, 4)])
def test_an_error_that_every_node_has_is_final(monkeypatch: pytest.MonkeyPatch, nodes: int, attempts: int) -> None:
    """A missing permission ends the stage once no node is left, or after as many nodes as a task has attempts."""
    run = Simulation(monkeypatch, {f"node{number}": 1 for number in range(nodes)}, alone("task"))
    places = []
    for _ in range(attempts):
        run.turn(60.0, turns=3)
        places += run.places("task")
        run.lose("task", MOUNT)
    assert len(set(places)) == attempts
    assert run.stage._failure is MOUNT


def test_an_error_of_the_input_is_final_on_the_first_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the user's input is not tried on another node, and no other task starts."""
    run = Simulation(monkeypatch, {"a": 1, "b": 1}, alone("task", "other", "later"))
    run.turn(turns=2)
    (failed,) = run.lose("task", ray_executor.ConfigError("the recipe is wrong"))
    assert failed == Failed("the recipe is wrong.", 1)
    run.end("other")
    assert run.stage._take_tasks() == []


def test_a_task_that_is_given_up_counts_queued_tasks_apart_from_running_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """After too many losses the stage still starts queued tasks, which its event does not call running."""
    run = Simulation(monkeypatch, {"a": 1, "b": 1}, alone("task", "other", "third", "fourth"), retries=0)
    run.turn(turns=2)
    (failed,) = run.lose("task")
    assert isinstance(failed, Failed)
    assert (failed.running, failed.queued) == (1, 2)


def test_gpus_too_small_for_fewer_workers_wait_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set that does not fit one GPU waits for a node whose GPU makes two, and is not refused."""
    run = Simulation(monkeypatch, {"a": 1}, [Task("set", (), 2, fewer=(1,))], wait_for_nodes=HOUR)
    run.turn(40.0, turns=3)
    assert run.places("set") == ["a"]
    (note,) = run.lose("set", SMALL_GPU)
    assert note == Note(f"waiting for nodes: 1 worker cannot run it: {SMALL_GPU}")
    run.nodes["b"] = 1
    run.turn(turns=3)
    assert run.places("set") == ["a", "b"]


def test_a_rank_that_still_runs_when_its_peers_lost_it_is_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its peers' errors, the node of the rank that has not ended is avoided, and theirs are not."""
    nodes = {"a": 1, "b": 1, "c": 1, "d": 1}
    run = Simulation(monkeypatch, nodes, [Task("set", (), 3)])
    run.turn(turns=2)
    assert run.places("set") == ["a", "b", "c"]
    assert run.job("set").patience.for_peers == 2 * MARGIN, "peers report before their timers end them"
    for rank in (0, 2):
        assert run.lose("set", PeerLostError("worker lost its peers"), rank) == []
    run.turn(10.0)
    assert run.losses("set") == 1
    assert run.job("set").history.nodes == {"b"}
    run.turn(turns=2)
    assert run.places("set") == ["a", "c", "d"]


ADVICE_OF_TORCH = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
"""End of the messages of CUDA's errors, of torch 2.9 for example."""


def gpu_error(text: str = "CUDA error: uncorrectable ECC error encountered") -> RayTaskError:
    """Error of torch in a worker, with torch's advice, as Ray passes it on."""
    return RayTaskError("work", "Traceback of the worker", RuntimeError(text + ADVICE_OF_TORCH))


def test_a_broken_gpu_is_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with an error goes to no other task. Its task waits for another one, also of the same node."""
    run = Simulation(monkeypatch, {"a": 2}, alone("x", "y", "z"))
    run.turn(turns=2)
    (broken,) = run.job("x").workers
    (lost,) = run.lose("x", gpu_error())
    assert isinstance(lost, Lost)
    assert lost.reason.endswith("uncorrectable ECC error encountered; GPU 0 of a is not used again")
    run.turn(60.0, turns=60)
    assert (run.places("x"), run.places("z"), run.free("a"), broken.is_stopped) == ([], [], 0, False)
    for name, following in (("y", "x"), ("x", "z")):
        run.end(name)
        run.turn(turns=2)
        assert run.places(following) == ["a"]
    assert run.losses("x") == 1
    assert not run.stage._executor.faults, "the node's other GPU is a good one"


@pytest.mark.parametrize("rank", [0, 5, 15])
def test_a_broken_gpu_of_a_set_is_set_aside(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """A GPU that fails a set is used by no worker of the command again, and all other GPUs of its node are."""
    tasks = [Task("set", (), 16, fewer=tuple(range(15, 0, -1))), *alone(*map(str, range(15)))]
    run = Simulation(monkeypatch, {"a": 8, "b": 8}, tasks)
    run.turn(turns=4)
    broken, run.start_seconds = run.job("set").workers[rank].used, 20.0
    (lost,) = run.lose("set", gpu_error(), rank)
    assert isinstance(lost, Lost)
    assert lost.reason.endswith(f"{broken} is not used again")
    for attempt in range(3):
        run.turn(6.0, turns=6)
        used = [each.used for each in run.job("set").workers]
        assert (len(set(used)), broken in used) == (15, False)
        run.job("set").saved = attempt + 1
        run.lose("set", rank=3)
    run.turn(6.0, turns=6)
    run.end("set")
    run.turn(6.0, turns=6)
    used = [each.used for job in run.stage._jobs for each in job.workers]
    assert (len(set(used)), broken in used) == (15, False)


@pytest.mark.parametrize("seed", range(6))
def test_no_task_gets_any_of_several_broken_gpus(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """However many GPUs of a node break, substitutes among them, sets and tasks of one worker use all others."""
    rng, broken = random.Random(seed), set[str]()
    tasks = [Task("set", (), 5, fewer=(4, 3, 2, 1)), *alone(*map(str, range(40)))]
    run = Simulation(monkeypatch, {"a": 8}, tasks, retries=99)
    for saved in range(1, 6):
        run.turn(6.0, turns=12)
        at_work = [job for job in run.stage._jobs if job.workers]
        used = [worker.used for job in at_work for worker in job.workers]
        assert (len(used), len(set(used) - broken)) == (8 - len(broken), 8 - len(broken))
        failing = run.job("set") if rng.random() < 0.7 else rng.choice(at_work)
        rank = rng.randrange(len(failing.workers))
        broken.add(gpu := failing.workers[rank].used)
        failing.saved = saved
        (lost,) = run.lose(failing.task.name, gpu_error(), rank)
        assert isinstance(lost, Lost)
        assert lost.reason.endswith(f"{gpu} is not used again")
        for job in [job for job in at_work if job is not failing and job.task.size == 1]:
            run.end(job.task.name)
    assert len(broken) == 5


def test_a_second_broken_gpu_of_a_set_blames_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node with two broken GPUs is left by a set that others can hold; one that others cannot hold keeps its GPU."""
    run = Simulation(monkeypatch, {"a": 4, "b": 4}, [Task("set", (), 4, fewer=(3, 2, 1))])
    for places in ("aaaa", "aaab", "bbbb"):
        run.turn(6.0, turns=6)
        assert "".join(run.places("set")) == places
        run.lose("set", gpu_error())
    assert run.stage._executor.faults == {"a": 1}
    run = Simulation(monkeypatch, {"a": 2}, [Task("set", (), 2)])
    run.turn(turns=4)
    run.lose("set", gpu_error())
    assert not run.stage._executor.set_aside


def test_a_worker_whose_substitute_is_no_longer_held_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the actor that holds a substitute dies, Ray gives that GPU to others, so the worker on it starts again."""
    run = Simulation(monkeypatch, {"a": 4}, [Task("set", (), 4, fewer=(3, 2, 1))])
    run.turn(turns=4)
    run.lose("set", gpu_error(), rank=1)
    run.turn(6.0, turns=6)
    (held,) = run.stage._executor.set_aside.values()
    assert held.gpu in [each.used for each in run.job("set").workers]
    held.is_stopped = True
    for _ in range(6):
        run.turn(6.0)
        used = [each.used for job in run.stage._jobs for each in job.workers]
        assert len(set(used)) == len(used)
    assert run.losses("set") == 2
    assert run.places("set")


@pytest.mark.parametrize("is_lost", [True, False], ids=["lost its peers", "ended"])
def test_a_substitute_is_given_up_after_its_rank(monkeypatch: pytest.MonkeyPatch, is_lost: bool) -> None:
    """If the rank on a substitute has lost its peers or ended, the task is tried again and no node is blamed."""
    run = Simulation(monkeypatch, {"a": 4}, [Task("set", (), 4, fewer=(3, 2, 1))])
    run.turn(turns=4)
    run.lose("set", gpu_error(), rank=1)
    run.turn(6.0, turns=6)
    (held,) = run.stage._executor.set_aside.values()
    job = run.job("set")
    rank = next(number for number, each in enumerate(job.workers) if each.used == held.gpu)
    if is_lost:
        assert run.lose("set", PeerLostError("worker lost its peers"), rank) == []
    else:
        job.streams = {each: number for each, number in job.streams.items() if number != rank}
    held.is_stopped = True
    run.turn(6.0)
    assert run.losses("set") == 2
    assert not run.stage._executor.faults
    run.turn(6.0, turns=6)
    assert run.places("set")


def test_other_nodes_work_on_while_a_substitute_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors of other nodes take further tasks, and none of them is replaced, until the substitute has started."""
    run = Simulation(monkeypatch, {"a": 3, "b": 1}, [Task("set", (), 3), *alone("x", "y")])
    run.turn(turns=4)
    run.lose("set", gpu_error())
    run.nodes["a"] = run.taken["a"] = 2  # too few for the set, and held by another command
    (before,) = run.job("x").workers
    run.end("x")
    run.turn(turns=3)
    assert run.job("y").workers == [before]
    asked = len(run.requests)
    run.turn(6.0, turns=6)
    assert len(run.requests) <= asked + 1
    assert not before.is_stopped


def test_a_set_keeps_what_is_reserved_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set whose resources are there shrinks no further while it waits for the substitute of a broken GPU."""
    run = Simulation(monkeypatch, {"a": 8}, [Task("set", (), 8, fewer=tuple(range(7, 0, -1)))])
    run.turn(turns=4)
    run.start_seconds = 90.0
    run.lose("set", gpu_error())
    run.turn(6.0, turns=20)
    assert len(run.places("set")) >= 7
    assert not [each for each in run.notes() if "fewer" in each]


def test_a_node_that_is_new_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of the nodes may be a second old when a rank is placed on one that has just joined."""
    run = Simulation(monkeypatch, {"a": 1}, [Task("set", (), 2)], wait_for_nodes=HOUR)
    run.turn(4.0)
    run.nodes["b"] = 1
    run.turn(0.5)
    rank = run.job("set").workers[1]
    rank.starting = object()
    del run.nodes["b"]
    run.turn(1.0)
    run.nodes["b"], rank.starting = 1, None
    run.turn(6.0, turns=3)
    assert (run.losses("set"), run.places("set")) == (0, ["a", "b"])


def test_a_substitute_that_another_command_takes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set does without a GPU in place of the broken one if other commands have kept all of them for a minute."""
    run = Simulation(monkeypatch, {"a": 4}, [Task("set", (), 4, fewer=(3, 2, 1))])
    run.turn(turns=4)
    run.lose("set", gpu_error())
    run.taken["a"] = 4
    run.turn(6.0, turns=12)
    assert not run.stage._executor.set_aside
    run.taken["a"] = 2
    run.turn(6.0, turns=2)
    assert run.places("set")


@pytest.mark.parametrize(
    ("first_line", "is_broken"),
    [
        ("CUDA error: uncorrectable NVLink error detected during the execution", True),
        ("CUDA error: unspecified launch failure", True),
        ("CUDA error: unknown error", True),
        ("CUDA error: hardware stack error", True),
        ("CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle, opa, opb)`", True),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", False),
        ("CUDA error: operation not permitted when stream is capturing", False),
        ("CUDA error: no kernel image is available for execution on the device", False),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: device-side assert triggered", False),
        ("CUDA error: out of memory", False),
        ("[Errno 523] Unknown error 523: '/shared/store'", False),
        ("the sizes do not match", False),
    ],
)
def test_only_a_fault_of_the_hardware_sets_a_gpu_aside(
    monkeypatch: pytest.MonkeyPatch, first_line: str, is_broken: bool
) -> None:
    """A GPU whose error may be memory's, the software's or the work's own stays in use."""
    run = Simulation(monkeypatch, {"a": 2}, alone("x"))
    run.turn(turns=2)
    run.lose("x", gpu_error(first_line))
    assert run.free("a") == 2 - is_broken


@pytest.mark.parametrize(("held", "settings"), [(1, {}), (4, {"gpus_per_worker": 0.25})], ids=["last", "shares"])
def test_no_gpu_is_set_aside_without_need(monkeypatch: pytest.MonkeyPatch, held: int, settings: dict[str, Any]) -> None:
    """The last GPU is tried again, and so is a share of one, because an actor cannot keep the other shares."""
    run = Simulation(monkeypatch, {"a": held}, alone("x"), **settings)
    run.turn(turns=2)
    (worker,) = run.job("x").workers
    (lost,) = run.lose("x", gpu_error())
    assert isinstance(lost, Lost)
    assert "is not used again" not in lost.reason
    assert worker.is_stopped
    assert run.free("a") == held


def test_a_node_with_two_broken_gpus_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first broken GPU of a node does not blame the node, and the second one does, also for other tasks."""
    run, places = Simulation(monkeypatch, {"a": 8, "b": 8}, alone("x")), list[str]()
    for _ in range(4):
        run.turn(60.0, turns=3)
        places += run.places("x")
        run.lose("x", gpu_error())
    assert places == ["a", "a", "b", "b"]
    assert run.stage._executor.faults == {"a": 1, "b": 1}


@pytest.mark.parametrize(("is_lost", "places"), [(False, 4), (True, 8)])
def test_gpus_that_are_set_aside_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, is_lost: bool, places: int
) -> None:
    """A set takes fewer workers at once and holds no task back, unless the GPU went away with its node."""
    run = Simulation(monkeypatch, {"a": 8}, alone("x"))
    run.turn(turns=2)
    run.lose("x", gpu_error())
    run.turn(turns=2)
    if is_lost:
        run.nodes = {"b": 9}
    run.stage._tasks += [Task("set", (), 8, fewer=(4,)), *alone("y", "z")]
    run.stage._take_tasks()
    run.turn(turns=6)
    assert [len(run.places(name)) for name in ("set", "x")] == [places, 1]
    assert len(run.stage._executor.set_aside) == (not is_lost)
    if not is_lost:
        assert run.places("y") == run.places("z") == ["a"]


def test_a_broken_gpu_is_tried_again_if_no_other_becomes_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """If another command keeps the other GPU and no task runs, the GPU of the loss is used again, with a message."""
    run = Simulation(monkeypatch, {"a": 2}, alone("x"))
    run.turn(turns=2)
    run.lose("x", gpu_error())
    run.taken["a"] = 1
    run.turn(5.0, turns=11)
    assert run.places("x") == []
    run.turn(5.0, turns=6)
    assert run.places("x") == ["a"]
    assert run.notes()[-1].startswith("x: no other node became free: trying again on nodes and GPUs")


def test_a_set_aside_gpu_whose_actor_ends_is_no_longer_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor that keeps a broken GPU and is killed, as for memory, keeps nothing: the GPU counts as there again."""
    run = Simulation(monkeypatch, {"a": 2}, alone("x", "y"))
    run.turn(turns=2)
    run.lose("x", gpu_error())
    run.turn(6.0)
    assert run.stage._capacity(run.job("y")) == 1
    (held,) = run.stage._executor.set_aside.values()
    held.is_stopped = True
    run.turn(6.0, turns=2)
    assert run.stage._capacity(run.job("y")) == 2
    assert run.places("x") == ["a"]


@pytest.mark.parametrize(("nodes", "attempts"), [({"a": 1}, 1), ({"a": 2}, 2), ({"a": 8}, 4), ({"a": 4, "b": 1}, 2)])
def test_a_gpu_that_torch_cannot_use_costs_an_attempt(
    monkeypatch: pytest.MonkeyPatch, nodes: dict[str, int], attempts: int
) -> None:
    """A task is tried on other nodes first, then on the node's other GPUs; the last error ends the command."""
    run, error = Simulation(monkeypatch, nodes, alone("x")), UnusableGpuError("torch cannot use the GPU")
    places = list[str]()
    for _ in range(attempts):
        run.turn(60.0, turns=3)
        places += run.places("x")
        run.lose("x", error)
    assert len(places) == attempts
    assert places[-1] == max(nodes)
    if len(nodes) == 1:
        assert (run.stage._failure or run.stage._given_up) is error


def test_workers_without_an_answer_are_all_suspected(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no rank of a group answers, its next attempt avoids all their nodes, where others can hold it."""
    run = Simulation(monkeypatch, dict.fromkeys("abcd", 1), [Task("set", (), 2)], progress_timeout=60.0)
    run.turn(turns=2)
    workers = run.job("set").workers
    run.turn(6.0, turns=20)
    assert all(worker.has_ended for worker in workers)
    assert run.job("set").history.nodes == {"a", "b"}
    assert run.places("set") == ["c", "d"]


def test_a_group_that_loses_twice_prefers_fewer_workers_to_a_bad_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """On as many nodes as it wants workers, a set takes all nodes again, and then leaves out the one that fails it."""
    run = Simulation(monkeypatch, dict.fromkeys("abc", 1), [Task("set", (), 3, fewer=(2, 1))])
    for places in (["a", "b", "c"], ["a", "b", "c"], ["a", "c"]):
        run.turn(5.0, turns=3)
        assert run.places("set") == places
        run.lose("set", RayActorError(), rank=1 if len(places) == 3 else 0)


# --- requests ---


def test_from_zero_nodes_everything_is_requested_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is asked for the workers of all sets and all tasks of one worker before the first node, sets first."""
    tasks = [*alone("one", "two"), Task("a", (), 2), Task("b", (), 4, fewer=(2,))]
    run = Simulation(monkeypatch, {}, tasks, wait_for_nodes=HOUR)
    run.turn(turns=2)
    assert [each.size if isinstance(each, Group) else 1 for each in run.waiting] == [2, 4, 1, 1]
    run.turn(60.0, turns=20)
    assert len(run.requests) == 4


def test_as_many_actors_are_requested_as_there_are_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of 64 tasks ask for an actor at once, or as many as `cluster.workers` allows, with those of groups."""
    tasks = [Task("set", (), 2), *alone(*map(str, range(64)))]
    for limit, actors in ((None, 64), (16, 14)):
        run = Simulation(monkeypatch, {}, tasks, workers=limit, wait_for_nodes=HOUR)
        run.turn()
        assert sum(isinstance(each, Worker) for each in run.waiting) == actors


def test_a_group_that_waits_for_a_group_delays_no_other_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a set runs, the next one waits for its nodes, and a third node works on tasks of one worker meanwhile."""
    tasks = [Task("first", (), 2), Task("second", (), 2), *alone("one")]
    run = Simulation(monkeypatch, dict.fromkeys("abc", 1), tasks)
    run.turn(turns=3)
    assert (run.places("first"), run.places("second"), run.places("one")) == (["a", "b"], [], ["c"])


@pytest.mark.parametrize("ends", [True, False])
def test_a_group_gets_what_tasks_of_its_command_free(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    """No task of one worker starts while a set waits for what running ones free, for ten minutes at most."""
    run = Simulation(monkeypatch, {"a": 1, "b": 1}, alone("one", "two", "three"))
    run.turn(turns=2)
    run.stage._tasks.append(Task("set", (), 2))
    run.stage._take_tasks()
    run.turn()
    run.end("one")
    run.turn(100.0, turns=5)
    assert (run.places("three"), run.places("set")) == ([], [])
    if ends:
        run.end("two")
        run.turn(turns=2)
        assert (run.places("three"), run.places("set")) == ([], ["a", "b"])
    else:
        run.turn(101.0, turns=3)
        assert (run.places("three"), run.places("set")) == (["a"], [])


def test_a_placed_group_waits_only_for_the_limit_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set that has its resources starts as soon as `cluster.workers` allows it, and nothing starts before it."""
    run = Simulation(monkeypatch, {"a": 4}, alone("one", "two", "three"), workers=2)
    run.turn(turns=2)
    run.stage._tasks.append(Task("set", (), 2))
    run.stage._take_tasks()
    run.end("one")
    run.turn(turns=3)
    assert [run.places(name) for name in ("two", "three", "set")] == [["a"], [], []]
    run.end("two")
    run.turn(turns=3)
    assert (run.places("set"), run.places("three")) == (["a", "a"], [])


def test_sets_keep_their_order_after_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set that lost a worker gets its nodes back before sets that come later in the list."""
    run = Simulation(monkeypatch, {"a": 1, "b": 1}, [Task("first", (), 2), Task("second", (), 2)])
    run.turn(turns=2)
    run.lose("first")
    run.turn(turns=2)
    assert (run.places("first"), run.places("second")) == (["a", "b"], [])


def test_a_set_shrinks_only_where_others_hold_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set keeps its size while it waits for a set of its command. Where another command has a node, it shrinks."""
    tasks = [Task("first", (), 3), Task("second", (), 2, fewer=(1,))]
    run = Simulation(monkeypatch, dict.fromkeys("abc", 1), tasks)
    run.turn(60.0, turns=60)
    assert [each.size for each in run.waiting if isinstance(each, Group)] == [2]
    run.taken = {"a": 1, "c": 1}
    run.end("first")
    run.turn(20.0, turns=8)
    assert run.places("second") == ["b"]
    assert "second: 2 workers did not become free; trying with fewer" in run.notes()
    assert ("second", Resized(1, 2)) in run.log


def test_a_set_shrinks_to_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set takes the fourteen GPUs of sixteen that others leave, and one more as soon as it becomes free."""
    run = Simulation(monkeypatch, dict.fromkeys("abcdefgh", 2), [Task("set", (), 16, fewer=tuple(range(15, 0, -1)))])
    run.taken = {"h": 1, "b": 1}
    run.turn(5.0, turns=15)
    assert len(run.places("set")) == 14
    run.taken = {"h": 1}
    run.job("set").group.possible = 15
    run.grow("set")
    run.turn(turns=3)
    assert len(run.places("set")) == 15


def test_a_node_that_ends_soon_holds_no_new_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set that leaves a node resumes at once on the nodes that stay, and asks for no more than they hold."""
    run = Simulation(monkeypatch, dict.fromkeys("abcdefgh", 2), [Task("set", (), 16, fewer=tuple(range(15, 0, -1)))])
    run.turn(turns=3)
    assert len(run.places("set")) == 16
    run.draining = {"h"}
    run.turn(6.0)
    run.job("set").result = Stopped("iteration 7")
    run.end("set")
    run.turn(turns=3)
    assert len(run.places("set")) == 14


@pytest.mark.parametrize(("memory", "size"), [(0, 4), (3, 4), (4, 2), (7, 2), (8, 1), (99, 1)])
def test_a_set_asks_for_no_more_workers_than_memory_allows(
    monkeypatch: pytest.MonkeyPatch, memory: int, size: int
) -> None:
    """A set starts at once with as many workers as the nodes' memory allows, however many CPUs and GPUs they have."""
    run = Simulation(monkeypatch, {"a": 4, "b": 1}, [Task("set", (), 4, fewer=(2, 1), memory=memory), *alone("one")])
    run.memory = {"a": 14, "b": 0}
    run.turn(turns=2)
    assert run.places("set") == ["a"] * size
    run.turn(turns=2)
    assert len(run.places("one")) == 1
    assert run.notes() == []


def test_a_set_for_which_memory_is_short_is_given_up_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """If nodes on demand do not bring the memory for a set, messages name memory, and not other jobs."""
    run = Simulation(monkeypatch, {"a": 4}, [Task("set", (), 2, memory=3 * GIB)], wait_for_nodes=120.0)
    run.memory = {"a": 5 * GIB}
    run.turn(10.0, turns=6)
    held = "1 node can hold 1 with 3 GiB of memory each (4 by CPUs and GPUs alone)"
    assert run.notes() == [f"set: waiting for 2 workers for 20 s: {held}, if nobody else uses them"]
    end = re.escape(f"within 120 s; {held}. The nodes have too little memory for more.")
    with pytest.raises(NoFreeWorkersError, match=end):
        run.turn(10.0, turns=20)


def test_waits_count_only_while_nothing_of_the_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task waits for hours beside a running one, and is given up a minute after it, if others hold what it needs."""
    run = Simulation(monkeypatch, {"a": 1}, alone("one", "two"))
    run.turn(turns=2)
    run.turn(60.0, turns=100)
    run.end("one")
    run.stage._pool[0].stop()
    run.stage._pool.clear()
    run.taken["a"] = 1
    run.turn(10.0, turns=6)
    with pytest.raises(NoFreeWorkersError, match="1 worker did not become free within 60 s") as caught:
        run.turn(10.0, turns=2)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(("wait", "start"), [(None, 200.0), (0.0, 20.0), (2.0, 20.0)])
def test_the_start_of_a_process_is_no_wait(monkeypatch: pytest.MonkeyPatch, wait: float | None, start: float) -> None:
    """However long Ray takes for a worker's environment on a free CPU, no run is ended; only others' use ends it."""
    run = Simulation(monkeypatch, {"a": 1}, alone("x"), wait_for_nodes=wait)
    run.start_seconds = start
    run.turn(0.5, turns=int(2 * start) + 5)
    assert run.places("x") == ["a"]
    notes = ["x: waiting for the first worker's process to start"] * (4 if wait is None else 1)
    assert run.notes() == notes
    run = Simulation(monkeypatch, {"a": 1}, alone("x"), wait_for_nodes=wait)
    run.taken["a"] = 1
    with pytest.raises(NoFreeWorkersError, match="Other jobs use their CPUs"):
        run.turn(0.5, turns=200)


@pytest.mark.parametrize(("wait", "waiting"), [(HOUR, 1), (3.0, 0)], ids=["for a place", "for a process"])
def test_ray_is_asked_rarely_about_a_long_wait(monkeypatch: pytest.MonkeyPatch, wait: float, waiting: int) -> None:
    """While a task waits for half an hour, Ray is asked about it every five seconds, and for messages every minute."""
    run, ask = Simulation(monkeypatch, {"a": 1}, alone("x"), wait_for_nodes=wait), mock.Mock(return_value=waiting)
    monkeypatch.setattr(ray_executor, "requests_without_place", ask)
    run.taken = {"a": 1}
    run.turn(0.5, turns=3600)
    assert 0 < ask.call_count <= 1800 / 5 + 1800 / 60


def test_no_node_is_forgiven_while_a_process_starts_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task whose worker takes long to start on another node does not return to the one that failed it."""
    run = Simulation(monkeypatch, {"bad": 1, "good": 1}, alone("task"))
    run.turn(turns=2)
    run.lose("task")
    run.start_seconds = 200.0
    run.turn(5.0, turns=45)
    assert run.places("task") == ["good"]
    assert not any("trying again" in note for note in run.notes())


def test_tasks_that_a_waiting_group_keeps_back_are_not_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of one worker that waits for a group is given up only after it has asked Ray for a worker in vain."""
    run = Simulation(monkeypatch, {"a": 1, "b": 1}, [*alone("one"), Task("pair", (), 2, fewer=(1,))])
    run.taken = {"a": 1, "b": 1}
    with pytest.raises(ClusterError, match=r"^1 worker did not become free within 60 s"):
        run.turn(5.0, turns=100)
    assert "pair: 2 workers did not become free; trying with fewer" in run.notes()
    assert sorted(type(each).__name__ for each in run.requests) == ["Group", "Group", "Worker"]


@pytest.mark.parametrize("size", [1, 2])
def test_requests_for_the_memory_of_a_head_are_replaced(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A request for more memory than the nodes of workers have is made again with theirs, once there are some."""
    run = Simulation(monkeypatch, {}, [Task("large", (), size, memory=40)], wait_for_nodes=HOUR)
    found = [{"NodeID": "head", "Alive": True, "Labels": {}, "Resources": {"CPU": 0.0, "memory": 64.0}}]
    monkeypatch.setattr(ray_executor.ray, "nodes", lambda: found)
    run.turn(turns=2)
    assert [(each.options["memory"], each.is_stopped) for each in run.requests] == [(40, False)]
    found.append({"NodeID": "worker", "Alive": True, "Labels": {}, "Resources": {"CPU": 8, "GPU": 8, "memory": 16.0}})
    run.turn(turns=2)
    assert [(each.options["memory"], each.is_stopped) for each in run.requests] == [(40, True), (16, False)]


def test_waiting_groups_are_checked_twice_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's head is asked for the state of a waiting group twice a second, and not at every event."""
    run = Simulation(monkeypatch, {"a": 1, "b": 1}, [Task("first", (), 2), Task("second", (), 2)])
    run.turn(turns=2)
    (second,) = run.waiting
    assert isinstance(second, Group)
    before = second.checks
    run.turn(0.01, turns=100)
    assert second.checks - before in (1, 2)


# --- growth ---


def test_a_group_grows_rarely_or_to_its_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set takes in more workers at a checkpoint every ten minutes at most, but the last ones at once."""
    run = Simulation(monkeypatch, {"a": 1}, [Task("set", (), 8, fewer=tuple(range(7, 0, -1)))])
    run.turn(turns=3)
    assert list(run.job("set").group.larger) == list(range(2, 9))
    sizes = []
    for minutes, free in ((1, 2), (1, 3), (10, 4), (1, 5), (1, 8)):
        run.turn(60.0, turns=minutes)
        run.nodes["a"] = run.job("set").group.possible = free
        run.grow("set")
        run.turn(turns=3)
        sizes.append(len(run.places("set")))
    assert sizes == [1, 1, 4, 4, 8]
    assert run.notes() == ["set: checkpoint saved; restarting with more workers"] * 2


def test_a_set_that_takes_over_a_group_gives_back_what_the_larger_one_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A set of two workers that takes over those of a set of four keeps no resources for four."""
    run = Simulation(monkeypatch, {"a": 2}, [Task("first", (), 4, fewer=(2,)), Task("second", (), 2)])
    run.turn(turns=4)
    group = run.job("first").group
    assert list(group.larger) == [4]
    run.end("first")
    assert (run.job("second").group, list(group.larger)) == (group, [])


# --- ranks ---


class Placements:
    """Ray's placement groups, with the node of each bundle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *nodes: str) -> None:
        self.nodes, self.sizes, self.placed = iter(nodes), list[int](), set[int]()
        self.removed, self._tables = list[int](), list[dict[str, Any]]()
        monkeypatch.setattr(ranks, "placement_group", self._reserve)
        monkeypatch.setattr(ranks, "placement_group_table", self._table)
        monkeypatch.setattr(ranks, "remove_placement_group", self.removed.append)
        monkeypatch.setattr(PoolWorker, "start", lambda options, place: Worker(options, Clock(), "?"))

    def _reserve(self, bundles: list[Any], **_: Any) -> int:
        self.sizes.append(len(bundles))
        self._tables.append({"bundles_to_node_id": dict(enumerate(itertools.islice(self.nodes, len(bundles))))})
        return len(self.sizes) - 1

    def _table(self, placement: int) -> dict[str, Any]:
        state = "CREATED" if placement in self.placed else "PENDING"
        return {**self._tables[placement], "state": state}


def test_ranks_of_a_node_are_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are ordered by node, full nodes first, whatever the order in which Ray has placed their bundles."""
    Placements(monkeypatch, *"abcabcbc")
    group = ranks.RankGroup(8, {"num_cpus": 1.0})
    group.start()
    assert [worker.node for worker in group.workers] == list("bbbcccaa")


def test_a_group_reserves_what_its_next_size_needs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resources for more ranks are reserved in steps of whole rows, so that no part of a row is kept idle."""
    ray_groups = Placements(monkeypatch, *"aabbcc")
    group = ranks.RankGroup(2, {"num_cpus": 1.0})
    assert not group.is_reserved()
    ray_groups.placed.add(0)
    assert group.is_reserved()
    group.start([4, 6])
    assert (ray_groups.sizes, group.possible) == ([2, 2, 2], 2)
    ray_groups.placed.add(1)
    assert group.possible == 4
    group.give_back()
    assert (ray_groups.removed, group.possible) == ([2, 1], 2)
    group.stop()
    assert ray_groups.removed == [2, 1, 0]


# --- starts, stops and silence ---


def test_actors_that_cannot_start_are_logged_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Failed starts are logged while another task runs; actors that were requested together count once."""
    run = Simulation(monkeypatch, {"a": 1}, alone("runs", "one", "two", "three"))
    run.turn(turns=2)

    def fail(_: object) -> None:
        raise RayActorError(error_msg="The actor is dead because its library is missing")

    monkeypatch.setattr(ray_executor.ray, "get", fail)
    with caplog.at_level(logging.WARNING):
        for worker in list(run.waiting):
            run.stage._note_start(worker)
    assert [record.getMessage() for record in caplog.records] == [
        "Ray cannot start workers: its library is missing; trying again"
    ]
    assert run.stage._failed_starts == 1
    assert run.waiting == []
    run.clock.now += 1.0
    list(run.stage._start())
    assert len(run.waiting) == 3


def test_an_actor_that_hangs_in_its_start_is_requested_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is not served within the progress timeout is made again, because its process may be stuck."""
    run = Simulation(monkeypatch, {"a": 1, "b": 1}, alone("runs", "hangs"), progress_timeout=HOUR)
    run.taken["b"] = 1
    run.turn(turns=2)
    (first,) = run.waiting
    run.turn(60.0, turns=50)
    assert not first.is_stopped
    run.turn(60.0, turns=20)
    assert first.is_stopped
    assert len(run.waiting) == 1


def test_a_worker_with_nothing_to_save_yet_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker on a node that ends soon is asked to save until it does, as it may have nothing to save at first."""
    run = Simulation(monkeypatch, {"a": 1}, alone("task"))
    run.turn(turns=2)
    (worker,) = run.job("task").workers
    run.draining = {"a"}
    run.turn(6.0, turns=3)
    assert (worker.asked, run.notes()) == (3, [])
    run.job("task").result = Stopped("iteration 7")
    run.end("task")
    assert run.notes() == ["task: its node ends soon: saved iteration 7, to resume elsewhere"]
    assert run.job("task").is_waiting


def test_a_loss_after_which_nothing_starts_announces_no_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error in the input, and while the command stops, a loss starts no other attempt and delays no end."""
    run = Simulation(monkeypatch, {"a": 1, "b": 1}, alone("wrong", "other"))
    run.turn(turns=2)
    run.lose("wrong", ray_executor.ConfigError("the recipe is wrong"))
    (lost,) = run.lose("other")
    assert isinstance(lost, Lost)
    assert not lost.is_retried
    run = Simulation(monkeypatch, {"a": 1}, alone("task"))
    run.turn(turns=2)
    monkeypatch.setattr("ray.wait", lambda asked, **_: (asked, []))
    monkeypatch.setattr(ray_executor, "_answer", lambda _: True)
    monkeypatch.setattr(run.stage, "_next_events", lambda: run.stage._lose(run.job("task"), RayActorError()))
    before = run.clock.now
    with pytest.raises(Interrupted):
        run._take(run.stage._save_and_stop())
    assert [event.is_retried for _, event in run.log if isinstance(event, Lost)] == [False]
    assert run.clock.now == before


def test_a_rank_whose_node_dies_before_it_starts_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A set whose rank cannot start, because its node died meanwhile, is started again on others."""
    run = Simulation(monkeypatch, {"a": 1, "b": 1, "c": 1}, [Task("set", (), 2)])
    run.turn(turns=2)
    run.job("set").workers[1].starting = object()
    del run.nodes["b"]
    run.turn(6.0, turns=3)
    assert (run.losses("set"), run.places("set")) == (1, ["a", "c"])


def test_time_in_which_the_command_stood_still_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is stuck after many silent checks, however much time has passed between two of them."""
    run = Simulation(monkeypatch, {"a": 1, "b": 1}, alone("task"), progress_timeout=60.0)
    run.turn(turns=2)
    run.turn(HOUR)
    run.turn(6.0, turns=3)
    assert run.losses("task") == 0
    run.turn(6.0, turns=20)
    assert run.losses("task") == 1


def test_time_in_which_the_command_stood_still_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that ends after an hour of standstill makes no later step's limit longer."""
    run = Simulation(monkeypatch, {"a": 1}, alone("task"), progress_timeout=2 * HOUR)
    run.turn(turns=2)
    job = run.job("task")
    run.clock.sleep(HOUR)
    run.read("task", Progress(1, 9))
    assert job.patience.slowest < 60


@pytest.mark.parametrize("other", [Progress(1, 9), None], ids=["event", "log records"])
def test_steps_are_measured_where_they_are_reported(monkeypatch: pytest.MonkeyPatch, other: Progress | None) -> None:
    """A set whose steps take long is not stuck, though other ranks report before rank 0, or log records come first."""
    run = Simulation(monkeypatch, {"a": 1, "b": 1}, [Task("set", (), 2)])
    run.turn(turns=2)
    job = run.job("set")
    for step in range(1, 8):
        run.turn(6.0, turns=66)
        assert (step, run.losses("set")) == (step, 0)
        run.read("set", other, rank=1 if other else 0)
        run.clock.sleep(0.01)
        run.read("set", Progress(step, 9))
    assert job.patience.slowest > 390


# --- all together ---


@pytest.mark.parametrize("seed", range(12))
def test_every_task_ends_whatever_happens(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Tasks of all sizes end, within `cluster.workers`, whatever workers, GPUs and other commands do.

    No two workers use the same GPU at any time.
    """
    rng = random.Random(seed)
    nodes = {f"node{number}": rng.randint(1, 3) for number in range(rng.randint(2, 4))}
    limit, total = rng.choice([None, rng.randint(2, 6)]), sum(nodes.values())
    sizes = [rng.randint(1, min(4, total, limit or total)) * (rng.random() < 0.5) or 1 for _ in range(10)]
    fewer = [tuple(range(size - 1, 0, -1)) if rng.random() < 0.5 else () for size in sizes]
    tasks = [Task(f"task {number}", (), *each) for number, each in enumerate(zip(sizes, fewer, strict=True))]
    run = Simulation(monkeypatch, nodes, tasks[:5], workers=limit, retries=1000, wait_for_nodes=HOUR)
    run.start_seconds = rng.choice([0.0, 3.0, 20.0])
    run.stage._tasks += tasks[5:]
    for turn in range(1500):
        run.turn(rng.choice([0.3, 1.0, 5.0]))
        if not run.stage._take_tasks():
            break
        at_work = [job for job in run.stage._jobs if job.workers]
        assert sum(len(job.workers) for job in at_work) <= (limit or total)
        used = [worker.used for job in at_work for worker in job.workers]
        assert len(set(used)) == len(used)
        for job in at_work:
            drawn = rng.random()
            if drawn < 0.05:
                run.end(job.task.name)
            elif drawn < 0.08 and turn < 500 and job.workers:
                run.lose(job.task.name, rng.choice([None, gpu_error()]), rank=rng.randrange(len(job.workers)))
        if rng.random() < 0.02:
            node = rng.choice(list(nodes))
            run.taken[node] = rng.randint(0, run.free(node) + run.taken.get(node, 0)) if turn < 500 else 0
    assert sorted(run.ended()) == sorted(task.name for task in tasks)
