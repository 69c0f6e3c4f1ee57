"""Tests what a worker sets for the device that it computes on."""

from __future__ import annotations

import pytest
import torch

from datm_ray.config import ClusterConfig
from datm_ray.runtime.devices import prepare_device, restoring_determinism


@pytest.mark.parametrize(("deterministic", "expected"), [(False, True), (True, False)])
def test_cudnn_times_its_algorithms_unless_sums_must_be_reproducible(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool, expected: bool
) -> None:
    """A GPU's worker lets cuDNN time its algorithms, but not with `deterministic`; a user's own setting is restored."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    try:
        for own in (False, True):
            cudnn.benchmark = own
            with restoring_determinism():
                prepare_device(ClusterConfig(deterministic=deterministic))
                assert cudnn.benchmark is expected
            assert cudnn.benchmark is own
            with restoring_determinism():
                prepare_device(ClusterConfig(device="cpu", deterministic=deterministic))
                assert cudnn.benchmark is own, "a CPU has none"
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
