"""The device, and how seconds and memory are measured on it."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from turns import timed

from datm_ray.config import ClusterConfig
from datm_ray.core.compute.precision import Precision, has_tf32, tf32_products
from datm_ray.methods.trajectory.step_functions import StepOptions
from datm_ray.runtime.machine.devices import channels_last_on, precision_on


@dataclass(frozen=True)
class Machine:
    """Device of all measurements, and sizes that fit it."""

    device: str
    """Name of the device: cuda or cpu."""
    small: bool
    """True for tiny sizes, which try the program and measure nothing."""
    data: str | None = None
    """Folder of cifar10-train.parquet and cifar10-test.parquet; `None` takes scikit-learn's digits."""

    compiles: bool = False
    """Compile in small too, where it takes longer than all the rest."""
    noted: dict[tuple[str, ...], float] = field(default_factory=dict, compare=False)
    """What a section found and a later one shows: names -> value."""

    @property
    def compiled(self) -> bool:
        """True if student and expert steps are compiled."""
        return self.compiles or not self.small

    @property
    def how(self) -> str:
        """Text for a table: "compiled" or "not compiled"."""
        return "compiled" if self.compiled else "not compiled"

    @property
    def place(self) -> torch.device:
        """Device as torch's object."""
        return torch.device(self.device)

    @property
    def precision(self) -> Precision:
        """Precision that a run takes if its recipe does not name one."""
        return precision_on(ClusterConfig(), self.place)

    @property
    def channels_last(self) -> bool:
        """True if a run stores maps with their channels innermost, unless its recipe says otherwise."""
        return channels_last_on(ClusterConfig(), self.place)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Precisions of student steps, that of a run first."""
        return ("tf32", "float32", "bfloat16") if has_tf32(self.place) else ("float32", "bfloat16")

    def options(self, **changes: Any) -> StepOptions:
        """Options of a run's student steps, with some of them changed."""
        graphs = None if self.device == "cuda" else False
        run = {"compiled": self.compiled, "channels_last": self.channels_last, "graphs": graphs}
        return StepOptions(**{"precision": self.precision, **run, **changes})

    @contextmanager
    def as_in_a_run(self) -> Iterator[None]:
        """Round the products of experts and of scored networks as a run does."""
        with tf32_products(self.precision == "tf32", self.place):
            yield


@contextmanager
def timed_algorithms(is_on: bool) -> Iterator[None]:
    """Let cuDNN time its algorithms at the first step of each shape, or not, within the context."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = is_on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass(frozen=True)
class Measured:
    """Timed calls of one function."""

    seconds: list[float]
    peak: int
    """Peak bytes of the device's allocator beyond those held before; 0 on a CPU, where they are not counted."""
    result: Any

    @property
    def median(self) -> float:
        """Median seconds of a call."""
        return statistics.median(self.seconds)


def measured(call: Callable[[], Any], device: str, calls: int, *, warm: int = 1) -> Measured:
    """Measure this many calls, after some that are not counted.

    Raises:
        torch.OutOfMemoryError: the device's memory is too small.
    """
    for _ in range(warm):
        timed(call, device)
    before = 0
    if device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds: list[float] = []
    result = None
    for _ in range(calls):
        took, result = timed(call, device)
        seconds.append(took)
    return Measured(seconds, torch.cuda.max_memory_allocated() - before if device == "cuda" else 0, result)


def free_memory(device: str) -> None:
    """Give unused memory back, after a failure or a large problem."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def freeing(device: str, call: Callable[[], Any]) -> Any:
    """Result of a call, after which unused memory is given back."""
    try:
        return call()
    finally:
        free_memory(device)


def ceiling(machine: Machine, precision: Precision) -> float:
    """Floating-point operations per second of a large product of random matrices; a multiply-add is two."""
    side = 256 if machine.small else 8192
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(side, side, device=machine.device).to(dtype) for _ in range(2))
    with tf32_products(precision == "tf32", torch.device(machine.device)):
        found = measured(lambda: a @ b, machine.device, 2 if machine.small else 10, warm=2)
    return float(2 * side**3 / found.median)
