"""Floor under the time of a computation: its convolutions and matrix products, each timed by itself.

However the rest of the computation is done, it takes longer with the library's kernels and these operations. Sums over
pixels, such as gradients of biases, are left out. Tests: tests/benchmarks/test_matching_bench.py.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from published_matching import Gradient, Problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from turns import timed

from datm_ray.core.compute.precision import Precision, tf32_products

LEAST_SECONDS = 0.02
"""Time for which an operation is repeated."""
ORDERS = (torch.channels_last, torch.contiguous_format)
"""Memory orders of feature maps and filters that torch's convolutions know."""
_FORWARD, _BACKWARD = torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default
_GRADIENTS = {"gradient of the input": (True, False, False), "gradient of the filters": (False, True, False)}


@dataclass(frozen=True)
class Like:
    """A tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_transposed: bool
    """True for a matrix whose columns are contiguous in memory."""

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        """Shape, type and order of a tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.dim() == 2 and tensor.stride(0) == 1 < tensor.stride(1))

    def filled(self, order: torch.memory_format, device: str) -> Tensor:
        """A tensor of ones; maps and filters are in this memory order."""
        ones = torch.ones(self.shape, dtype=self.dtype, device=device)
        if self.is_transposed:
            return ones.t().contiguous().t()
        return ones.contiguous(memory_format=order) if ones.dim() == 4 else ones


@dataclass(frozen=True)
class Operation:
    """A convolution, one of its gradients, or a matrix product, with tensors of certain shapes."""

    function: Any
    arguments: tuple[Any, ...]
    """Arguments of the function, with `Like` in place of tensors."""

    @property
    def is_convolution(self) -> bool:
        """True for a convolution and its gradients."""
        return self.function in (_FORWARD, _BACKWARD)

    def __str__(self) -> str:
        """Kind and shapes."""
        gradients = {mask: kind for kind, mask in _GRADIENTS.items()}
        kind = gradients.get(self.arguments[-1], "convolution" if self.is_convolution else "product")
        shapes = ("x".join(map(str, each.shape)) for each in self.arguments if isinstance(each, Like))
        return f"{kind}: {', '.join(shapes)}"

    def seconds(self, order: torch.memory_format, device: str) -> float:
        """Seconds of one of several warm calls."""
        arguments = [each.filled(order, device) if isinstance(each, Like) else each for each in self.arguments]

        def repeated(times: int) -> float:
            def calls() -> None:
                for _ in range(times):
                    self.function(*arguments)

            return timed(calls, device)[0] / times

        repeated(1)
        return repeated(math.ceil(LEAST_SECONDS / repeated(1)))


class _Listed(TorchDispatchMode):
    """Counts convolutions, each of their gradients, and matrix products while they are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Operation] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in flop_registry:
            # Biases are left out: they change neither kind nor shapes.
            fixed = tuple(tuple(a) if isinstance(a, list) else Like.of(a) if isinstance(a, Tensor) else a for a in args)
            if func is _BACKWARD:
                wanted = [mask for mask, is_wanted in zip(_GRADIENTS.values(), args[-1], strict=False) if is_wanted]
                self.counts.update(Operation(func, (*fixed[:3], None, *fixed[4:-1], mask)) for mask in wanted)
            elif func is _FORWARD:
                self.counts[Operation(func, (*fixed[:2], None, *fixed[3:]))] += 1
            else:
                self.counts[Operation(func, fixed)] += 1
        return func(*args, **(kwargs or {}))


def operations_of(call: Callable[[], Any]) -> Counter[Operation]:
    """How often a call computes each operation. Nothing within compiled code is counted."""
    listed = _Listed()
    with listed:
        call()
    return listed.counts


def operations_of_steps(compute: Callable[[Problem], Gradient], problem: Problem, steps: int) -> Counter[Operation]:
    """Operations of a gradient through `steps` steps, from those of one and of two: all but the first are alike."""
    one, two = (
        operations_of(functools.partial(compute, replace(problem, steps=problem.steps[:count]))) for count in (1, 2)
    )
    return Counter({each: one[each] + (steps - 1) * (two[each] - one[each]) for each in two})


class Alone:
    """Operations of a call, to be timed by themselves."""

    def __init__(self, counts: Mapping[Operation, int], device: str, precision: Precision) -> None:
        """Store how often each operation is computed."""
        self._counts, self._device, self._precision = counts, device, precision
        self._orders: dict[Operation, torch.memory_format] = {}
        """Faster memory order of each operation, once it is known."""

    def seconds(self) -> float:
        """Seconds of all operations, each in the faster memory order. The first call finds the orders."""
        with torch.no_grad(), tf32_products(self._precision == "tf32", torch.device(self._device)):
            return sum(count * self._seconds(each) for each, count in self._counts.items())

    def _seconds(self, operation: Operation) -> float:
        if operation in self._orders:
            return operation.seconds(self._orders[operation], self._device)
        seconds = {order: operation.seconds(order, self._device) for order in ORDERS}
        self._orders[operation] = min(seconds, key=seconds.__getitem__)
        return min(seconds.values())
