"""Tests copies to a GPU for which the host does not wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datm_ray.core.compute.gpu import uploaded


def test_arrays_arrive_as_one_tensor() -> None:
    """Arrays are joined in order, and converted only if asked to be."""
    rows = [np.array([3, 1]), np.array([2])]
    assert uploaded(rows, torch.device("cpu")).equal(torch.tensor([3, 1, 2]))
    assert uploaded(rows, torch.device("cpu"), torch.float64).equal(torch.tensor([3.0, 1, 2], dtype=torch.float64))
    assert uploaded([], torch.device("cpu")).numel() == 0


def test_a_copy_to_a_gpu_goes_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU gets one copy from pinned memory, for which the host does not wait."""
    pinned, copies = list[Tensor](), list[tuple[bool, Any]]()

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    def copy(tensor: Tensor, device: Any, *, non_blocking: bool = False) -> Tensor:
        copies.append((tensor is pinned[-1] and non_blocking, device))
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", copy)
    found = uploaded([np.array([1]), np.array([2])], torch.device("cuda", 1))
    assert found.tolist() == [1, 2]
    assert copies == [(True, torch.device("cuda", 1))]
