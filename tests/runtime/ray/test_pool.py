"""Tests what one of Ray's actors does with the GPUs that Ray has assigned to it, without a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import ray

from datm_ray.runtime import assigned
from datm_ray.runtime.ray import pool


class Records:
    """Stand-in for the collector of log records, which changes no logger."""

    def take(self) -> list[object]:
        """Return no records."""
        return []


Start = Callable[[list[int]], pool.Worker]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Function that starts an actor in this process, with the given GPUs. All GPUs were visible before."""

    def worker(gpus: list[int]) -> pool.Worker:
        monkeypatch.setattr(ray, "get_gpu_ids", lambda: gpus)
        return pool.Worker(0)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all")
    monkeypatch.delenv(pool.SHOW_ALL_GPUS, raising=False)
    monkeypatch.setattr(pool, "Collector", lambda *_: Records())
    monkeypatch.setattr(assigned, "gpus", ())
    return worker


@pytest.mark.parametrize(
    ("given", "shows_all", "visible"),
    [([3], "1", "3"), ([2, 5], "true", "2,5"), ([], "1", ""), ([], "", ""), ([3], "", "all")],
)
def test_a_worker_sees_its_own_gpus(
    start: Start, monkeypatch: pytest.MonkeyPatch, given: list[int], shows_all: str, visible: str
) -> None:
    """A worker sees its own GPUs only, also on nodes where Ray shows all; elsewhere Ray's choice stays."""
    monkeypatch.setenv(pool.SHOW_ALL_GPUS, shows_all)
    start(given)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible
    assert assigned.gpus == [str(gpu) for gpu in given]
