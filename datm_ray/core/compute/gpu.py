"""A GPU's free memory, and copies to it for which the host does not wait.

Tests: tests/core/compute/test_gpu.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def free_gpu_memory() -> int:
    """Bytes that this process can still take on its GPU, including memory that torch has reserved but does not use."""
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def uploaded(arrays: Sequence[NDArray[np.generic]], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Concatenate arrays to one tensor of type `dtype` on the device, see `sent`; `None` keeps the arrays' type."""
    whole = torch.from_numpy(np.concatenate(arrays)) if arrays else torch.empty(0)
    return sent(whole.to(dtype) if dtype else whole, device)


def sent(whole: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor in main memory to the device.

    A copy to a GPU goes through pinned memory, because from other memory it would wait until the GPU is idle.
    """
    return whole.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else whole.to(device)
