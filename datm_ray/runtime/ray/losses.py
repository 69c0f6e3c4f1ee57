"""Errors of Ray's workers: which errors end a run, and the text for the user about each loss."""

from __future__ import annotations

import re
from typing import TypeGuard

from ray.exceptions import (
    ActorUnavailableError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from datm_ray.errors import (
    ClusterError,
    DatmError,
    GpuMemoryError,
    MissingExpertsError,
    PluginError,
    StoreError,
    TransientStoreError,
    UnusableGpuError,
    WorkerLostError,
)
from datm_ray.monitor.logs import masked
from datm_ray.runtime.ray.cluster import first_line

_BROKEN_GPU = re.compile(
    r"cuda.*(uncorrectable|hardware (stack )?error|unknown error|unspecified launch failure)|_status_execution_failed",
    re.I,
)
"""Pattern of the first lines of errors from a broken GPU: those of torch, cuDNN and cuBLAS. Most other CUDA errors are
faults of the program, and would occur on any GPU."""


def unwrapped(failure: BaseException) -> BaseException:
    """Remove Ray's wrapper from an actor's error if it holds a `DatmError` or the error of a dead actor.

    Other errors are unexpected, and keep the wrapper, which has the traceback.
    """
    inner = failure.cause if isinstance(failure, RayTaskError) else next(iter(failure.args), None)
    if isinstance(failure, RayTaskError):
        return unwrapped(inner) if isinstance(inner, DatmError | RayActorError) else failure
    # A task's error inside an actor's error was raised by the actor's constructor.
    return unwrapped(inner) if isinstance(inner, RayTaskError) else failure


def is_final(failure: BaseException) -> TypeGuard[DatmError]:
    """True for an error in the user's input: another attempt would fail too. Tasks are retried after other errors."""
    return isinstance(failure, DatmError) and not isinstance(failure, WorkerLostError | TransientStoreError)


def may_be_the_nodes(failure: DatmError) -> bool:
    """True for an error that may concern single nodes only, such as a missing mount or package, or a small GPU."""
    kinds = StoreError | ClusterError | PluginError | GpuMemoryError
    return isinstance(failure, kinds) and not isinstance(failure, MissingExpertsError)


def may_be_the_gpu(failure: BaseException) -> bool:
    """True for an error that a broken GPU may cause. False for too little memory and faults of programs."""
    text = first_line(failure.cause) if isinstance(failure, RayTaskError) else ""  # advice follows in all of them
    return isinstance(failure, UnusableGpuError) or bool(_BROKEN_GPU.search(text))


def reason(failure: BaseException) -> str:
    """Describe in one line why a worker was lost, without Ray's identifiers."""
    if isinstance(failure, StoreError) and failure.cause:
        return f"{failure.fact}: {failure.cause}"
    if isinstance(failure, DatmError):
        return failure.fact
    if isinstance(failure, ActorUnavailableError):
        return "its process or its node is unreachable"
    if isinstance(failure, RayTaskError) and isinstance(failure.cause, ObjectLostError):
        return f"shared data was lost from Ray's object store ({type(failure.cause).__name__})"
    if isinstance(failure, RayTaskError):
        return f"{type(failure.cause).__name__}: {first_line(failure.cause)}"
    if isinstance(failure, RuntimeEnvSetupError):
        why = (failure.error_message or "").strip().rpartition("\n")[2]  # after Ray's traceback
        return f"the runtime environment cannot be set up{': ' * bool(why)}{masked(first_line(why))}"
    text = " ".join(str(failure).split())
    if isinstance(failure, OutOfMemoryError):
        used = re.search(r"[\d.]+GB used / [\d.]+GB limit", text)
        return "its node ran out of memory" + (f": {used[0]}" if used else "")
    for mark in ("Worker exit detail: ", "The actor is dead because "):
        if mark in text:
            return re.split(" Some common causes| Traceback ", text.partition(mark)[2])[0]
    return first_line(failure)
