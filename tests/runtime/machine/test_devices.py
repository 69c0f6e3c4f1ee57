"""Tests what a worker sets for the device that it computes on."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from datm_ray.config import ClusterConfig
from datm_ray.core.compute.gpu import CONTEXT_BYTES
from datm_ray.core.networks.image_cost import ImageCost
from datm_ray.core.networks.stack_trial import fitting
from datm_ray.errors import ClusterError
from datm_ray.runtime.executor import SerialExecutor
from datm_ray.runtime.machine import assigned
from datm_ray.runtime.machine.devices import images_on, prepare_device, reading_threads, restoring_settings, set_on


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch say that it has a GPU, whose settings can then be made."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(("deterministic", "expected"), [(False, True), (True, False)])
def test_cudnn_times_its_algorithms_unless_sums_must_be_reproducible(deterministic: bool, expected: bool) -> None:
    """A GPU's worker lets cuDNN time its algorithms, but not with `deterministic`; a user's own setting is restored."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    try:
        for own in (False, True):
            cudnn.benchmark = own
            with restoring_settings():
                prepare_device(ClusterConfig(deterministic=deterministic))
                assert cudnn.benchmark is expected
            assert cudnn.benchmark is own
            with restoring_settings():
                prepare_device(ClusterConfig(device="cpu", deterministic=deterministic))
                assert cudnn.benchmark is own, "a CPU has none"
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def _settings(*, is_newer: bool = False) -> dict[str, object]:
    """Torch's settings of this process that a run may change, with the former or the newer switches for TF32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if is_newer:
        switches = (matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)
    else:
        switches = (matmul.allow_tf32, torch.get_float32_matmul_precision(), cudnn.allow_tf32)
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "benchmark": cudnn.benchmark,
        "switches": switches,
    }


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("own", ["inherited", "highest", "high", "medium", "newer switches"])
def test_a_call_in_a_notebook_leaves_torch_as_it_was(own: str, deterministic: bool) -> None:
    """Threads, TF32, timing and determinism are the caller's again once the call's executor is closed."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    threads = torch.get_num_threads() + 1
    cluster = ClusterConfig(precision="tf32", deterministic=deterministic, threads_per_worker=threads)
    with restoring_settings():
        if own == "newer switches":
            matmul.fp32_precision, cudnn.conv.fp32_precision = "tf32", "ieee"
        elif own == "inherited":
            matmul.fp32_precision = "none"
        else:
            torch.set_float32_matmul_precision(own)
            cudnn.allow_tf32 = False
        kinds = (True,) if own == "newer switches" else (False, True)
        before = [_settings(is_newer=is_newer) for is_newer in kinds]
        executor = SerialExecutor(cluster)
        during = _settings(is_newer=True)
        executor.close()
        assert [_settings(is_newer=is_newer) for is_newer in kinds] == before
        assert during["threads"] != before[0]["threads"]
        assert during["switches"] == ("tf32",) * 3


def test_a_call_that_is_refused_leaves_torch_as_it_was() -> None:
    """A missing GPU is reported after the number of threads was set, which is the caller's again."""
    before = _settings()
    with pytest.raises(ClusterError, match="no GPU"):
        SerialExecutor(ClusterConfig(device="cuda", threads_per_worker=torch.get_num_threads() + 1))
    assert _settings() == before


@pytest.mark.parametrize(
    ("cpus", "settings", "threads"),
    [
        (12, {}, 12),  # Ray: a GPU's share of a node
        (0, {"threads_per_worker": 2}, 2),  # Ray: no GPU
        (12, {"threads_per_worker": 20}, 20),
        (96, {}, 32),
        (None, {"gpus_per_worker": 1}, 24),  # one process, on a machine of four GPUs and 96 CPUs
        (None, {"device": "cpu"}, 1),
    ],
)
def test_a_worker_with_a_gpu_reads_images_in_its_share_of_the_cpus(
    cpus: int | None, settings: dict[str, Any], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPUs that would wait for GPUs decode images for them. A worker without a GPU takes its own threads."""
    monkeypatch.setattr(assigned, "cpus", cpus)
    monkeypatch.setattr("os.cpu_count", lambda: 96)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert reading_threads(ClusterConfig(**settings)) == threads


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Shares that torch was given of a GPU of 64 free contexts (`CONTEXT_BYTES` each): 0.9, and those of the test."""
    shares, contexts = [0.9], 64
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name, value in {
        "is_available": True,
        "is_initialized": True,
        "current_device": 0,
        "mem_get_info": (contexts * CONTEXT_BYTES, contexts * CONTEXT_BYTES),
        "memory_reserved": 0,
        "memory_snapshot": (),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: shares[-1])
    return shares


@pytest.mark.parametrize("share", [0.25, 0.125])
def test_a_worker_takes_its_share_of_a_gpu_and_no_more(
    card: list[float], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images, sets and stacks get what fits into the worker's share, and torch refuses the worker more than that.

    A caller's own limit holds again afterwards.
    """
    monkeypatch.setattr(assigned, "share", share)
    mine = int(64 * share) - 1  # contexts, without the process's own
    with restoring_settings():
        device = prepare_device(ClusterConfig(gpus_per_worker=share))
        assert card[-1] == share - 1 / 64
        moved = list[str]()
        monkeypatch.setattr(
            "datm_ray.runtime.machine.devices.to_device", lambda images, device: moved.append(device.type)
        )
        for size in (mine * CONTEXT_BYTES // 2, mine * CONTEXT_BYTES // 2 + 4):
            images_on(np.broadcast_to(np.float32(0), size // 4), device)
            stays = Mock(nbytes=size)
            moved.append("cpu" if set_on(stays, device) is stays else "cuda")
        assert moved == ["cuda", "cuda", "cpu", "cpu"]
        cost = ImageCost(maps=CONTEXT_BYTES // 2, largest=1, flop=1, functions=1, parameters=0)
        assert fitting(64, 1, cost) == 2 ** int(math.log2(0.9 * mine))
    assert card[-1] == 0.9


@pytest.mark.parametrize("place", [{}, {"gpus_per_worker": 1.0}, {"device": "cpu"}])
def test_a_process_with_a_gpu_of_its_own_has_no_limit(card: list[float], place: dict[str, Any]) -> None:
    """torch gets no share where no other worker has the GPU, and a caller's own limit stays."""
    with restoring_settings():
        prepare_device(ClusterConfig(**place))
    assert card == [0.9]
