"""Tests a GPU's free memory, and copies to it for which the host does not wait."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datm_ray.core.compute.gpu import CONTEXT_BYTES, free_gpu_memory, gpu_size, limit_tensors, reusable, uploaded


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


def segment(total: int, used: int, pool: tuple[int, int] = (0, 0), device: int = 0) -> dict[str, Any]:
    """Segment of reserved memory with those of its entries that count, as in `torch.cuda.memory_snapshot`."""
    return {"device": device, "total_size": total, "allocated_size": used, "segment_pool_id": pool}


COMMON, PRIVATE = [segment(100, 30), segment(50, 50)], [segment(1000, 10, (0, 7)), segment(400, 0, (3, 0))]
SEGMENTS = [*COMMON, *PRIVATE, segment(8, 1, device=1)]


def test_memory_of_cuda_graphs_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unused memory in the common pool of the GPU counts as free; that of private pools and of other GPUs does not."""
    assert (reusable(SEGMENTS, 0), reusable(SEGMENTS, 1), reusable([], 0)) == (70, 7, 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5, 2000))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: SEGMENTS)
    assert free_gpu_memory() == 5 + 70
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10)
    assert free_gpu_memory() == 5 + 20


@pytest.mark.parametrize(
    ("share", "free", "segments", "expected"),
    [
        (1.0, 60, [], 60),
        (0.25, 60, [], 15),  # the CUDA context is part of the share
        (0.25, 7, [], 7),  # other processes have taken more than their shares
        (0.25, 60, [(8, 3)], 12),  # memory that torch keeps unused may be taken again
        (0.25, 7, [(8, 3)], 12),
        (0.25, 5, [(8, 3)], 10),
        (0.25, 60, [(8, 3), (4, 1, (0, 7))], 8),  # memory of CUDA graphs may not
        (0.25, 60, [(16, 16)], 0),
        (0.01, 60, [], 0),  # less than a context
    ],
)
def test_a_process_with_a_share_of_a_gpu_has_no_more_than_that(
    share: float, free: int, segments: list[Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of a share counts as free, with the process's own unused memory, if so much of the GPU is free."""
    found = [segment(each[0] * CONTEXT_BYTES, each[1] * CONTEXT_BYTES, *each[2:]) for each in segments]
    shares = [1.0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * CONTEXT_BYTES, 64 * CONTEXT_BYTES))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: found)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: sum(each["total_size"] for each in found))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: shares[-1])
    if share < 1:
        limit_tensors(share)
    assert free_gpu_memory() == expected * CONTEXT_BYTES


@pytest.mark.parametrize("failing", ["", "cuInit", "cuDeviceGet", "cuDeviceTotalMem_v2", "no driver"])
def test_the_size_of_a_gpu_is_read_from_the_driver(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's driver says how much memory the first visible GPU has. Without it or after an error this is unknown."""
    called = list[str]()

    class Driver:
        """Library of CUDA's driver with one GPU, number 5."""

        def __init__(self, name: str) -> None:
            if failing == "no driver":
                raise OSError(name)

        def cuInit(self, flags: int) -> int:
            return self._called("cuInit")

        def cuDeviceGet(self, device: Any, number: int) -> int:
            device._obj.value = 5 + number
            return self._called("cuDeviceGet")

        def cuDeviceTotalMem_v2(self, size: Any, device: ctypes.c_int) -> int:
            assert device.value == 5
            size._obj.value = 80 * 2**30
            return self._called("cuDeviceTotalMem_v2")

        def _called(self, name: str) -> int:
            called.append(name)
            return 999 if name == failing else 0

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    assert gpu_size() == (None if failing else 80 * 2**30)
    steps = ["cuInit", "cuDeviceGet", "cuDeviceTotalMem_v2"]
    assert called == ([] if failing == "no driver" else steps[: steps.index(failing or steps[-1]) + 1])


def test_a_machine_without_cuda_has_no_gpu_of_known_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that cannot be loaded is no error."""
    monkeypatch.setattr("datm_ray.core.compute.gpu.DRIVER", "libnone.so.7")
    assert gpu_size() is None
