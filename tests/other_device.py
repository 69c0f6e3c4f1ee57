"""A device without a card: code that would mix it with the CPU fails here as on a GPU.

The meta device plays the part. Its tensors have no values, so the tests check devices and not results. A read returns
the values copied to a tensor, if no operation has changed it since; else any numbers, or True.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("meta")
_ATEN = torch.ops.aten
_MOVES = {_ATEN._to_copy, _ATEN.copy_, _ATEN.copy}
"""Operations that may read from one device and write to the other."""
_OF_VALUES = {_ATEN.nonzero, _ATEN._unique2, _ATEN.unique_dim}
"""Operations whose result's size depends on values. They are given made-up values."""


class _Built(TorchFunctionMode):
    """Makes tensors of Python's numbers on the CPU and copies them, so that the copy is recorded."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


class OtherDevice(TorchDispatchMode):
    """Within this mode, `DEVICE` is a device of its own."""

    def __init__(self, made_up: Callable[..., Tensor] = torch.rand) -> None:
        """Make the mode.

        Args:
            made_up: function that makes up numbers of a shape, such as `torch.zeros`.
        """
        super().__init__()
        self._made_up = made_up
        self._copied: dict[int, tuple[Tensor, Tensor]] = {}
        """Storage -> the tensor copied to the device, which keeps the storage alive, and its source."""
        self._built = _Built()

    def __enter__(self) -> OtherDevice:
        """Enter the mode."""
        self._built.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        """Leave the mode."""
        super().__exit__(*raised)
        self._built.__exit__(*raised)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse to mix devices, and make up what is read."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        is_here = isinstance(first, Tensor) and first.device == DEVICE
        if is_here and func is _ATEN._local_scalar_dense.default:
            return self._read(first).item()
        if is_here and func is _ATEN._to_copy.default and (kwargs.get("device") or DEVICE).type != DEVICE.type:
            return self._read(first).to(kwargs.get("dtype") or first.dtype)
        if func.overloadpacket not in _MOVES:
            _require_one_device(func, [args, kwargs])
        if func.overloadpacket in _OF_VALUES:
            args, kwargs = tree_map_only(Tensor, self._read, (args, kwargs))
            return tree_map_only(Tensor, lambda result: result.to(DEVICE), func(*args, **kwargs))
        if func is _ATEN.copy_.default and not is_here and args[1].device == DEVICE:
            return first.copy_(self._read(args[1]))
        result = func(*args, **kwargs)
        if is_here and func._schema.is_mutable:
            self._copied.pop(first.untyped_storage()._cdata, None)
        if func is _ATEN._to_copy.default and not is_here and result.device == DEVICE:
            if not kwargs.get("non_blocking"):
                self._sent(first)
            self._copied[result.untyped_storage()._cdata] = result, first.detach().clone()
        return result

    def _sent(self, tensor: Tensor) -> None:
        """A copy to the device for which a GPU is waited for; tests may record it."""

    def _read(self, tensor: Tensor) -> Tensor:
        _, values = self._copied.get(tensor.untyped_storage()._cdata, (None, None))
        if values is not None and values.shape == tensor.shape:
            return values.to(tensor.dtype)
        if tensor.dtype == torch.bool:
            return torch.ones(tensor.shape, dtype=torch.bool)
        return self._made_up(tensor.shape).to(tensor.dtype)


def _require_one_device(func: Any, arguments: Any) -> None:
    pointwise = torch.Tag.pointwise in func.tags
    devices = {each.device.type for each in _tensors(arguments) if not (pointwise and each.dim() == 0)}
    if len(devices) > 1:
        shapes = [(each.device.type, tuple(each.shape)) for each in _tensors(arguments)]
        raise RuntimeError(f"{func} mixes devices: {shapes}")


def _tensors(arguments: Any) -> Iterator[Tensor]:
    return (each for each in tree_leaves(arguments) if isinstance(each, Tensor))
