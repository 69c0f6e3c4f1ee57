"""Device that a worker computes on: choosing it, copying arrays to it, and measuring its memory."""

from __future__ import annotations

import math
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from datm_ray.config import ClusterConfig
from datm_ray.core.compute.gpu import free_gpu_memory, limit_tensors, tensor_share
from datm_ray.core.compute.precision import Precision, has_tf32, restoring_tf32
from datm_ray.core.images.batches import ImageReader, Images
from datm_ray.errors import ClusterError, UnusableGpuError
from datm_ray.runtime.machine import assigned


def prepare_device(cluster: ClusterConfig) -> torch.device:
    """Choose this process's device, and set torch's thread count, determinism and TF32. Every worker calls this first.

    On a GPU that Ray's workers share, this process can then take its worker's share of the memory only. A GPU is
    returned with its index, as `Tensor.device` has it. To torch, `cuda` and `cuda:0` are different devices.

    Raises:
        ClusterError: the settings require a GPU, and this worker has none; or torch cannot use the worker's GPU; or
            `cluster.deterministic` is true, but the process has used its GPU already (`fix_workspace`).
    """
    torch.set_num_threads(cluster.threads_per_worker)
    if assigned.gpus and cluster.device != "cpu" and not torch.cuda.is_available():
        raise _unusable()
    takes_one = torch.cuda.is_available() and cluster.gpus_per_worker != 0
    if cluster.device == "cuda" and not takes_one:
        raise ClusterError(
            "cluster.device is 'cuda', but this worker has no GPU",
            "its node has none, torch is built without CUDA, or cluster.gpus_per_worker is 0",
            "set cluster.gpus_per_worker=1, or cluster.device=cpu",
        )
    is_on_cpu = not takes_one or cluster.device == "cpu"
    if cluster.deterministic:
        if not fix_workspace() and not is_on_cpu:
            raise ClusterError(
                "cluster.deterministic is true, but this process used its GPU before it started the run",
                "torch reads CUBLAS_WORKSPACE_CONFIG at its first product on a GPU, and never again",
                "restart the process (in a notebook, its kernel), and set CUBLAS_WORKSPACE_CONFIG=:4096:8 in its "
                "environment or start the run first",
            )
        torch.use_deterministic_algorithms(True)
        # torch would also fill all new memory, one kernel for each tensor. No code here reads memory before writing it.
        _set_filling(False)
    if is_on_cpu:
        return torch.device("cpu")
    # Training of experts and of scored networks uses these switches. Student steps set their own.
    # TF32 is used with bfloat16 too: whoever lets student steps round to 8 bits does not want experts in full float32.
    is_rounded = cluster.precision != "float32"
    # torch 2.9 asks for newer names of the switches, but its own compiler reads these and refuses a mixture.
    warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_rounded
    # Nearly all steps have the same shapes, so cuDNN may time its algorithms at the first. They round differently.
    torch.backends.cudnn.benchmark = not cluster.deterministic
    if assigned.share < 1:
        limit_tensors(assigned.share)
    return torch.device("cuda", torch.cuda.current_device())


def fix_workspace() -> bool:
    """Fix the workspace of cuBLAS by CUBLAS_WORKSPACE_CONFIG, so that cuBLAS always chooses the same kernels.

    Returns True if the variable is set, or was set by the user, whose value stays. Returns False, and sets nothing, if
    CUDA runs in this process already: torch reads the variable only once, at its first product on a GPU.
    """
    if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
        if torch.cuda.is_initialized():
            return False
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return True


def _unusable() -> UnusableGpuError:
    """Error for a GPU that torch cannot use. Without this error, the worker would silently compute on its CPU."""
    version = torch.version.cuda
    driver = f"its driver is older than torch's CUDA {version}, or its container was started without the driver"
    return UnusableGpuError(
        f"torch cannot use the GPU that Ray has assigned to a worker on {socket.gethostname()}",
        driver if version else "torch is built without CUDA on this node",
        "update the node's driver or torch, or set cluster.device=cpu",
    )


@contextmanager
def restoring_settings() -> Iterator[None]:
    """Restore torch's settings that `prepare_device` may change for the whole process, when the block ends.

    These are the number of threads, deterministic algorithms, cuDNN's timing of algorithms, TF32, and the share of the
    GPU that tensors may fill. The environment variable of `fix_workspace` stays, because torch reads it only once.
    """
    before, is_timed = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    threads, share = torch.get_num_threads(), tensor_share()
    try:
        with restoring_tf32() if torch.cuda.is_available() else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode(before)
        torch.backends.cudnn.benchmark = is_timed
        _set_filling(fills)
        if tensor_share() != share:
            torch.cuda.set_per_process_memory_fraction(share)


def _set_filling(fills: bool) -> None:
    """Choose whether torch fills the memory of new tensors, in its mode of deterministic algorithms."""
    torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def precision_on(cluster: ClusterConfig, device: torch.device) -> Precision:
    """Precision of a student step on this device: `cluster.precision`; "auto" is tf32 on GPUs with it, else float32."""
    if cluster.precision == "auto":
        return "tf32" if has_tf32(device) else "float32"
    return cluster.precision


def channels_last_on(cluster: ClusterConfig, device: torch.device, precision: Precision | None = None) -> bool:
    """True if feature maps are stored channels-last on this device.

    `cluster.channels_last` decides. If it is null: True on CPUs, and on GPUs for bfloat16 and TF32. The vector units of
    CPUs and the tensor cores of GPUs read channels that lie side by side in memory. Tensor cores compute TF32 and
    bfloat16, and not plain float32. The choice for GPUs is assumed; `make gpu` measures it.

    Args:
        precision: precision of the products; `None` for that of student steps, see `precision_on`.
    """
    if cluster.channels_last is not None or device.type != "cuda":
        return cluster.channels_last is not False
    precision = precision or precision_on(cluster, device)
    return precision == "bfloat16" or (precision == "tf32" and has_tf32(device))


def network_on(network: nn.Module, device: torch.device, cluster: ClusterConfig) -> nn.Module:
    """Move a network to the device, and return it. On a GPU, store it channels-last if `channels_last_on` is True.

    On CPUs the layout stays, so that rounding does not change. The layout also stays for a network of the user's own,
    unless `cluster.channels_last` is true: `Tensor.view` of feature maps, common there, needs the usual layout.
    """
    is_packaged = type(network).__module__.partition(".")[0] == __name__.partition(".")[0]
    suits = device.type != "cpu" and channels_last_on(cluster, device) and (is_packaged or cluster.channels_last)
    network = network.to(device)
    return network.to(memory_format=torch.channels_last) if suits else network


def uses_gpu(cluster: ClusterConfig) -> bool:
    """True if workers compute on GPUs. If `device` and `gpus_per_worker` leave this open: if this machine has a GPU."""
    if cluster.device == "cpu" or cluster.gpus_per_worker == 0:
        return False
    return cluster.device == "cuda" or cluster.gpus_per_worker is not None or torch.cuda.is_available()


def workers_here(cluster: ClusterConfig) -> int:
    """Number of CPU workers on this machine: `cluster.workers`; if null, the CPUs divided by `threads_per_worker`."""
    return cluster.workers or max(1, (os.cpu_count() or 1) // cluster.threads_per_worker)


MOST_READERS = 32
"""Most threads in which a worker with a GPU decodes images, unless `cluster.threads_per_worker` is larger."""


def reading_threads(cluster: ClusterConfig) -> int:
    """Number of threads in which a worker of this machine decodes streamed images. The images do not depend on it.

    A worker takes `cluster.threads_per_worker`. A worker with a GPU takes its share of the machine's CPUs if that is
    more, but at most `MOST_READERS` of them: these CPUs would wait for GPUs otherwise.
    """
    cpus = assigned.cpus
    if cpus is None:
        cpus = (os.cpu_count() or 1) // max(1, torch.cuda.device_count()) if uses_gpu(cluster) else 0
    return max(cluster.threads_per_worker, min(MOST_READERS, cpus))


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Turn an array into a tensor. On the CPU both share memory, so callers must not write to the tensor.

    Arrays from Ray's object store or a memory map are read-only. torch has no read-only tensors, and warns that such
    arrays should be copied; the warning is hidden here. With a copy in each worker, a node would hold as many copies as
    it has workers.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.as_tensor(array, device=device)


def images_on(images: NDArray[np.float32] | ImageReader, device: torch.device, beside: int = 0) -> Images:
    """Move a data set's images to the device, or keep them in main memory if a GPU has too little free memory.

    On a GPU, images may take up to half of the free memory.

    Args:
        images: array in main memory. Streamed images, an `ImageReader`, are returned unchanged.
        beside: bytes that must stay free on the GPU beside the images.
    """
    if not isinstance(images, np.ndarray):
        return images
    return to_device(images, device if _fits(images.nbytes, device, beside) else torch.device("cpu"))


def set_on(images: Tensor, device: torch.device, beside: int = 0) -> Tensor:
    """Move images to train on, such as a synthetic set's, to the device or keep them, as `images_on` does.

    Training on images in main memory copies those of each batch, see `core.images.batches.rows_on`.

    Args:
        images: [n c h w] in main memory.
        beside: bytes that must stay free on the GPU beside the images.
    """
    return images.to(device) if _fits(images.nbytes, device, beside) else images


def _fits(size: int, device: torch.device, beside: int = 0) -> bool:
    """True if `size` bytes take at most half of a GPU's free memory, and leave `beside` bytes; True on a CPU."""
    if device.type != "cuda":
        return True
    free = free_gpu_memory()
    return size <= min(free // 2, free - beside)


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in bytes, since the peak was last reset; nan if unknown.

    On a GPU it is torch's GPU memory, on a CPU main memory.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    try:
        # getrusage is not used, because it returns the parent process's peak if that was larger.
        with open("/proc/self/status", encoding="ascii") as file:
            return next(1024.0 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return math.nan
