"""A GPU's free memory, a process's share of it, and copies to it for which the host does not wait.

Tests: tests/core/compute/test_gpu.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GPU_SHARE = 0.9
"""Largest share of a GPU's free memory, or of a worker's part of the GPU's memory, that tensors may fill. The rest is a
margin for workspaces of libraries and for fragmented memory."""
CONTEXT_BYTES = 2**29
"""Bytes of GPU memory that a process's CUDA context takes beside its tensors. Assumed, not measured."""

DRIVER = "libcuda.so.1"
"""File name of the library of CUDA's driver, from which `gpu_size` reads how much memory a GPU has."""


def free_gpu_memory() -> int:
    """Bytes that this process can still take on its GPU, including memory that torch has reserved but does not use.

    Reserved memory of CUDA graphs does not count, because other tensors cannot use it. If `limit_tensors` limits this
    process to a share of the GPU, the result is at most what is left of this share.
    """
    free, total = torch.cuda.mem_get_info()
    reserved, share = torch.cuda.memory_reserved(), torch.cuda.get_per_process_memory_fraction()
    if share < 1:
        free = min(free, max(0, int(share * total) - reserved))
    if torch.cuda.get_allocator_backend() != "native":  # CUDA's own allocator has no segments
        return free + reserved - torch.cuda.memory_allocated()
    return free + reusable(torch.cuda.memory_snapshot(), torch.cuda.current_device())


def gpu_size() -> int | None:
    """Total memory, in bytes, of the first GPU that this process can use; `None` if CUDA's driver gives none.

    The size comes from the driver, because asking torch would create a CUDA context. A context takes memory until the
    process ends, and keeps all other processes from a GPU in exclusive mode.
    """
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    device, size = ctypes.c_int(), ctypes.c_size_t()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    )
    return None if failed else size.value


def tensor_share() -> float:
    """Largest share, in [0, 1], of the GPU's memory for tensors of this process: 1 without `limit_tensors`."""
    return torch.cuda.get_per_process_memory_fraction() if torch.cuda.is_initialized() else 1.0


def limit_tensors(share: float) -> None:
    """Limit the GPU memory that torch takes in this process: tensors, CUDA graphs, and memory that it keeps unused.

    The limit is `share`, in (0, 1], of the GPU's total memory, less `CONTEXT_BYTES`. If this process needs more, it
    runs out of memory itself. Without a limit, another process on the GPU might, although its tensors fit into its own
    share.
    """
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(max(0.0, share - CONTEXT_BYTES / total))


def reusable(segments: Iterable[Mapping[str, Any]], device: int) -> int:
    """Bytes that torch has reserved on a GPU, that no tensor uses, and that any new tensor may take.

    Private pools of CUDA graphs do not count: only their graph gets a pool's memory, even after its tensors are freed.

    Args:
        segments: reserved segments of all GPUs, see `torch.cuda.memory_snapshot`.
        device: index of the GPU.
    """
    common = (each for each in segments if each["device"] == device and tuple(each["segment_pool_id"]) == (0, 0))
    return sum(each["total_size"] - each["allocated_size"] for each in common)


def uploaded(arrays: Sequence[NDArray[np.generic]], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Concatenate arrays along their first axis, and copy them to the device as one tensor without waiting for a GPU.

    The tensor has the type `dtype`; `None` keeps the arrays' type. Without any array it is empty.
    """
    whole = torch.from_numpy(np.concatenate(arrays)) if arrays else torch.empty(0)
    return sent(whole.to(dtype) if dtype else whole, device)


def sent(whole: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor in main memory to the device; on the CPU, return the tensor itself.

    A copy to a GPU goes through pinned memory, because from other memory it would wait until the GPU is idle.
    """
    pinned = whole.pin_memory() if device.type == "cuda" else whole
    return pinned.to(device, non_blocking=device.type != "cpu")
