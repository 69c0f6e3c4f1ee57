"""CUDA graphs without a GPU: a fake records the operations of a call and plays them on the same memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from datm_ray.core.compute.torch_compat import storage_id


class Tape(TorchDispatchMode):
    """Plays a CUDA graph's part: `replay` runs the recorded operations again, on the memory of the recording."""

    def __init__(self) -> None:
        super().__init__()
        self.replays = 0
        self._recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it unless its result shares memory with its arguments."""
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        held = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(results) if isinstance(each, Tensor)]
        storages = {storage_id(each) for each in held}
        is_view = not func._schema.is_mutable and any(storage_id(each) in storages for each in made)
        if not is_view and torch.Tag.inplace_view not in func.tags:
            # Aliases keep the present shapes, because torch 2.11 later changes those of the originals in place.
            args, kwargs, made = tree_map_only(Tensor, _alias, (args, kwargs, made))
            self._recorded.append((func, args, kwargs, [] if func._schema.is_mutable else made))
        return results

    def replay(self) -> None:
        """Compute all recorded results again, each into the memory that it had in the recording."""
        self.replays += 1
        for func, args, kwargs, made in self._recorded:
            found = [each for each in tree_leaves(func(*args, **kwargs)) if isinstance(each, Tensor)]
            for into, value in zip(made, found, strict=False):
                if not into._is_zerotensor():
                    into.copy_(value)


def _alias(tensor: Tensor) -> Tensor:
    return tensor if tensor._is_zerotensor() else tensor.detach()


class Stream:
    """Stands for a CUDA stream."""

    def wait_stream(self, other: Stream) -> None:
        """Do nothing: a CPU computes in order."""


def recorded_tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Replace torch's CUDA graphs by tapes. Returns a list that gets every tape recorded from now on."""
    made: list[Tape] = []

    def new() -> Tape:
        made.append(Tape())
        return made[-1]

    @contextmanager
    def graph(tape: Tape, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        with tape:
            yield

    @contextmanager
    def stream(_: Stream) -> Iterator[None]:
        yield

    fakes = {"CUDAGraph": new, "graph": graph, "Stream": Stream, "current_stream": Stream, "stream": stream}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return made
