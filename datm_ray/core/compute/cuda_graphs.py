"""Functions of tensors as CUDA graphs: all kernels of a call are launched together.

A student step on a few images takes a GPU less time than launching its kernels one by one. A graph records the kernels
of one call, with the memory that they read and write. Replaying the graph launches all these kernels at once. Each call
copies its arguments into this memory, and the results out of it. The tests (tests/core/compute/test_cuda_graphs.py)
simulate the recording on a CPU. No GPU has run this code yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 2
"""Number of unrecorded calls before a recording. In these calls libraries allocate memory and compilers compile."""

_log = logging.getLogger(__name__)


class Replayed:
    """A function of tensors that is recorded as a CUDA graph at the first call. Every call replays the graph.

    All calls must have arguments of the same shapes. The results have the same bits as without a graph. The function
    must launch kernels only: its Python code must not read a tensor's value. If the function cannot be recorded, one
    line is logged, and every call runs the function without a graph.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        """Store the function. The first call, whose tensors must be on a GPU, records it."""
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: tuple[Tensor, ...] = ()
        self._is_single = self._has_failed = False

    @property
    def is_recorded(self) -> bool:
        """True if calls replay a recorded graph; False before the first call, and if recording failed."""
        return self._graph is not None

    def __call__(self, *arguments: Tensor) -> Any:
        """Compute the function's results, a tensor or a tuple of tensors. Later calls do not overwrite them.

        Raises:
            torch.OutOfMemoryError: the GPU's memory is too small for a recording.
        """
        if self._graph is None and not self._has_failed:
            self._try_to_record(arguments)
        if self._graph is None:
            return self._function(*arguments)
        for held, given in zip(self._inputs, arguments, strict=True):
            held.copy_(given)
        self._graph.replay()
        copies = tuple(output.clone() for output in self._outputs)  # the next replay overwrites the originals
        return copies[0] if self._is_single else copies

    def _try_to_record(self, arguments: tuple[Tensor, ...]) -> None:
        try:
            self._record(arguments)
        except torch.OutOfMemoryError:  # the caller may retry with fewer images
            self._inputs = []
            raise
        except Exception as failure:  # a kernel or library that cannot be recorded may raise anything
            self._has_failed, self._inputs = True, []
            reason = next(iter(str(failure).strip().splitlines()), type(failure).__name__)
            _log.warning("no CUDA graphs, each kernel is launched by itself: %s", reason[:200])

    def _record(self, arguments: tuple[Tensor, ...]) -> None:
        self._inputs = [argument.detach().clone() for argument in arguments]
        aside, present = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(present)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._function(*self._inputs)
        present.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # "thread_local" lets other threads copy to the GPU during the recording. After a recording that failed,
        # torch.cuda.graph leaves this thread on its own stream; the outer context restores the present one.
        with torch.cuda.stream(present), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = self._function(*self._inputs)
        self._is_single = isinstance(results, Tensor)
        self._outputs, self._graph = (results,) if self._is_single else tuple(results), graph
