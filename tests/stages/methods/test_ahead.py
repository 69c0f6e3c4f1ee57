"""Tests that iterations prepared ahead, in a thread, have the bits of those prepared when they are asked for."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datm_ray.config import RunConfig, to_yaml
from datm_ray.errors import StoreError
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.ahead import Ahead
from datm_ray.runtime.executor import Progress, WorkerRank
from datm_ray.stages.distill.checkpoint import read_curves
from datm_ray.stages.distill.task import DistillWorker
from datm_ray.stages.methods import trajectory
from datm_ray.store.files.filesystem import open_location
from tests.conftest import run_here, set_of, tiny_config
from tests.processes import side_by_side
from tests.stages.distill.test_task import as_rank

SET = ("distill.ipc=2", "distill.batch_size=7", "distill.augmentation=crop_flip", "distill.checkpoint_every=1")


@pytest.fixture
def in_thread(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[str]]:
    """Function that turns the thread on or off. Returns names of the threads that prepare iterations from then on."""
    names: list[str] = []
    match_of = trajectory.TrajectoryMatching._match

    def recorded(*arguments: Any) -> Any:
        names.append(threading.current_thread().name)
        return match_of(*arguments)

    def turn(is_on: bool) -> list[str]:
        names.clear()
        monkeypatch.setattr(trajectory, "Ahead", _with_thread if is_on else _without_thread)
        return names

    monkeypatch.setattr(trajectory.TrajectoryMatching, "_match", recorded)
    return turn


def _with_thread(compute: Any, end: int, **_: Any) -> Ahead[Any]:
    return Ahead(compute, end, in_thread=True)


def _without_thread(compute: Any, end: int, **_: Any) -> Ahead[Any]:
    return Ahead(compute, end, in_thread=False)


def distil(config: RunConfig, out: Path, store: Path | str, stop_at: int | None = None) -> list[int]:
    """Distil to the end or up to an iteration. Returns the numbers of the iterations that were done."""
    dataset, done = Pipeline([config], str(out)).runs.dataset(config.dataset), []
    worker = DistillWorker(dataset, config.cluster)
    for event in worker.distill(config, str(store), str(out / config.name)):
        if isinstance(event, Progress):
            done.append(event.done)
            if event.done == stop_at:
                break
    return done


def assert_same(one: Path, other: Path) -> None:
    first, second = set_of(one), set_of(other)
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.soft_labels, second.soft_labels)
    assert first.step_size == second.step_size
    curves = [read_curves(open_location(str(out / "tiny"))) for out in (one, other)]
    assert all(np.array_equal(curves[0][name], curves[1][name], equal_nan=True) for name in curves[0])


def ahead_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("ahead")]


def test_a_thread_changes_no_bit_also_of_skipped_iterations(
    tiny_experts: Path, tmp_path: Path, in_thread: Callable[[bool], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs prepared by the thread give the same set and curves, and half of the iterations are skipped."""
    monkeypatch.setattr(trajectory.TrajectoryMatching, "refuses", False)
    distil(tiny_config(*SET), tmp_path / "all", tiny_experts)
    losses = read_curves(open_location(str(tmp_path / "all/tiny")))["history.loss"]
    config = tiny_config(*SET, f"distill.threshold={float(np.median(losses))}")
    for is_on in (False, True):
        names = in_thread(is_on)
        distil(config, tmp_path / str(is_on), tiny_experts)
        assert sum(name.startswith("ahead") for name in names) == 5 * is_on
    assert_same(tmp_path / "False", tmp_path / "True")
    assert 0 < read_curves(open_location(str(tmp_path / "True/tiny")))["history.skipped"].sum() < 6
    assert not ahead_threads()


@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_a_run_resumes_at_any_iteration(
    tiny_experts: Path, tmp_path: Path, in_thread: Callable[[bool], list[str]], stop_at: int
) -> None:
    """A run stopped while the next iteration is prepared ends its thread, and resumes with the same bits."""
    in_thread(False)
    distil(tiny_config(*SET), tmp_path / "whole", tiny_experts)
    in_thread(True)
    assert distil(tiny_config(*SET), tmp_path / "parts", tiny_experts, stop_at)[-1] == stop_at
    assert not ahead_threads()
    assert distil(tiny_config(*SET), tmp_path / "parts", tiny_experts)[-1] == 6
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_an_error_of_the_thread_is_that_of_its_iteration(
    tiny_experts: Path, tmp_path: Path, in_thread: Callable[[bool], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the store ends the run at the iteration that needs the file, after the checkpoint before it."""
    in_thread(True)
    match_of = trajectory.TrajectoryMatching._match

    def failing(self: Any, backbone: Any, origin: Any, iteration: int) -> Any:
        if iteration == 4 and ahead_threads():
            raise StoreError("the store is away")
        return match_of(self, backbone, origin, iteration)

    monkeypatch.setattr(trajectory.TrajectoryMatching, "_match", failing)
    seen = []
    with pytest.raises(StoreError, match="the store is away"):
        seen += distil(tiny_config(*SET), tmp_path, tiny_experts)
    assert not ahead_threads()
    assert len(read_curves(open_location(str(tmp_path / "tiny")))["history.loss"]) == 4


def rank_with_thread(config_file: str, out: str, worker_rank: WorkerRank, is_on: bool) -> None:
    """One process of a mesh, with or without a thread."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trajectory, "Ahead", _with_thread if is_on else _without_thread)
        as_rank(config_file, out, worker_rank, None)


def test_shards_with_threads_of_their_own_change_no_bit(tiny_experts: Path, tmp_path: Path) -> None:
    """Two shards in processes of their own prepare the same iterations ahead, with the bits of shards without."""
    config = tiny_config(*SET, "cluster.shards=2")
    for is_on in (False, True):
        out = tmp_path / str(is_on)
        out.mkdir()
        (out / "experts").symlink_to(tiny_experts)
        (out / "config.yaml").write_text(to_yaml(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        ranks = [(str(out / "config.yaml"), str(out), WorkerRank(rank, 2, address), is_on) for rank in range(2)]
        assert not [call.exception() for call in side_by_side(rank_with_thread, ranks) if call.exception()]
    assert_same(tmp_path / "False", tmp_path / "True")


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_thread_runs_where_there_is_something_to_wait_for(
    tiny_experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_remote: bool
) -> None:
    """Remote stores are read in the thread; with a local store on a CPU there is nothing to wait for."""
    made: list[bool] = []

    class Recorded(Ahead[Any]):
        def __init__(self, *arguments: Any, in_thread: bool) -> None:
            made.append(in_thread)
            super().__init__(*arguments, in_thread=in_thread)

    store = f"memory://{uuid.uuid4().hex}" if is_remote else str(tiny_experts)
    config = tiny_config(*SET)
    run_here(tmp_path, config, stage="train_experts", store=store)
    monkeypatch.setattr(trajectory, "Ahead", Recorded)
    distil(config, tmp_path, store, stop_at=1)
    assert made == [is_remote]
