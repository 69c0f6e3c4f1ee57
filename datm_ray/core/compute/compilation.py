"""Trace functions of tensors into flat graphs of tensor operations, and compile these graphs.

A function is traced once for each shape of its arguments. So the compiled code runs no Python of the network, and has
no graph breaks. Tracing removes additions of zeros. A machine without a compiler runs the functions uncompiled, and
`compiler_problem` says why in one line.

The result of a graph does not depend on the strides of its intermediate values. These strides may differ between
tracing and a call: they depend on the version of torch and on the kernel, and removing a term may change them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from datm_ray.core.compute.torch_compat import (
    UNSAFE_VIEW,
    ZEROS_LIKE_VALUE,
    compile_graph,
    schema_of,
    shapes_only,
    trace,
)
from datm_ray.errors import ConfigError
from datm_ray.words import one_line


class Compiled:
    """A graph as compiled code, for tensors of the shapes and memory orders it was traced with.

    The graph is given to the compiler directly. `torch.compile` would capture the graph again, and check at every call
    that the arguments still fit. On the digits data set, the checks took 5 % of the time of an expert's step
    (benchmarks/LOG.md).
    """

    def __init__(self, graph: fx.GraphModule, device_type: str, *, channels_last: bool = True) -> None:
        """Store the graph. The first call compiles it.

        Args:
            graph: graph from `traced`. A graph with several arguments must be traced within `shapes_only`.
            device_type: type of the device, such as "cpu".
            channels_last: True to let the compiler choose the memory order of feature maps; around convolutions it
                puts channels innermost. False to keep the order that every map had in tracing.
        """
        self._graph = graph
        self._options = {
            # On a CPU, generated C++ code calls the generated kernels. On the digits data set, calls from Python took
            # 20 to 33 % of the reverse step (benchmarks/LOG.md).
            "cpp_wrapper": device_type == "cpu",
            "layout_optimization": channels_last,
        }
        self._expected = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        self._function: Callable[..., Any] | None = None
        self._fitting: set[tuple[Any, ...]] = set()

    def __call__(self, *arguments: Tensor) -> Any:
        """Compute the graph's results, a tensor or a tuple of tensors.

        Raises:
            ValueError: a tensor's shape, type or memory order differs from tracing; compiled code would misread it.
        """
        layout = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in arguments)
        if layout not in self._fitting:
            self._require_fit(arguments)
            self._fitting.add(layout)
        if self._function is None:
            self._function = compile_graph(self._graph, arguments, self._options)
        result = self._function(*arguments)
        return tuple(result) if isinstance(result, list) else result

    def _require_fit(self, arguments: Sequence[Tensor]) -> None:
        for given, expected in zip(arguments, self._expected, strict=True):
            if _layout(given) != _layout(expected):
                raise ValueError(f"compiled for a tensor of {_layout(expected)}, called with {_layout(given)}")


class CompiledForShapes:
    """A function of tensors that is traced and compiled once for each combination of their shapes and types.

    Attributes:
        built: shape and type of every argument -> the compiled function.
    """

    def __init__(self, function: Callable[..., Any], *, channels_last: bool = True) -> None:
        """Store the function. The first call with a new combination of shapes and types compiles it.

        Args:
            function: function of several tensors that writes to none of them.
            channels_last: True to let the compiler choose the memory order of feature maps, False to keep the order
                that every map had in tracing.
        """
        self._function, self._channels_last = function, channels_last
        self.built: dict[tuple[Any, ...], Compiled] = {}

    def __call__(self, *arguments: Tensor) -> Any:
        """Compute the function's result, a tensor or a tuple of tensors.

        Raises:
            NotImplementedError: torch lacks a derivative.
            ConfigError: the function cannot be traced, such as one that branches on values of tensors.
            ValueError: a tensor has gaps in memory, or another memory order than in the first call with these shapes;
                compiled code would misread it.
        """
        key = tuple((tensor.shape, tensor.dtype) for tensor in arguments)
        if key not in self.built:
            with shapes_only():
                graph = traced(self._function, *map(torch.empty_like, arguments))
            self.built[key] = Compiled(graph, arguments[0].device.type, channels_last=self._channels_last)
        return self.built[key](*arguments)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """Memory layout that compiled code relies on: shape, strides of dimensions longer than 1, and type of numbers."""
    strides = tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    return tuple(tensor.shape), strides, tensor.dtype


@functools.cache
def compiler_problem(device_type: str) -> str:
    """Compile a small function as a test. Returns one line on why this fails, or "" if it works.

    The test runs once per process and type of device, such as "cpu"; later calls return its result.
    """
    zeros = torch.zeros(8, device=device_type)
    try:
        Compiled(traced(lambda x: (torch.sin(x),), zeros), device_type)(zeros)
    except Exception as failure:  # a missing or broken toolchain may raise any error
        reason = next(iter(str(failure).strip().splitlines()), type(failure).__name__)
        return f"torch.compile does not work here ({reason[:120]}): running without it, more slowly"
    return ""


def compiled_facts(is_compiled: bool, note: str) -> dict[str, str | bool]:
    """Facts that a worker stores in checkpoints: `is_compiled` as "compiled", and `note` as "not_compiled_because".

    Args:
        is_compiled: True if the worker's functions are compiled.
        note: one line on why compiling fails. "" if it works or was not wanted; the second fact is then left out.
    """
    return {"compiled": is_compiled} | ({"not_compiled_because": note} if note else {})


def traced(function: Callable[..., Any], *arguments: Tensor) -> fx.GraphModule:
    """Trace a function for the shapes of these arguments. Returns the function's graph.

    The arguments' values do not matter, so they may be tensors without memory, made within `shapes_only`.

    Raises:
        NotImplementedError: torch lacks a derivative.
        ConfigError: the function branches on values of tensors, or does something else that a graph cannot express.
    """
    try:
        graph = trace(function, *arguments)
    except NotImplementedError:
        raise
    except Exception as failure:  # networks may do anything
        raise ConfigError(
            "the network cannot be compiled",
            f"it may decide by values of tensors: {one_line(str(failure) or type(failure).__name__)[:160]}",
            "use --set cluster.compile=false",
        ) from failure
    _drop_zero_terms(graph.graph)
    _free_of_strides(graph)
    return graph


def _free_of_strides(graph: fx.GraphModule) -> None:
    """Make the graph independent of the strides seen in tracing, and drop nodes that are unused afterwards.

    A view becomes a reshape, which copies if the strides of a call do not allow a view. Other operations that depend on
    strides, and views of memory that is written to, read a copy of their input that has the traced strides.
    """
    written = {_owner(node) for node in graph.graph.nodes if _writes(node)}
    for node in list(graph.graph.nodes):
        is_view, owner = node.target in (_ATEN.view.default, UNSAFE_VIEW), _owner(node)
        is_fixed = owner.op != "call_function" or owner.target is _ATEN.new_empty_strided.default
        if is_view and owner not in written and not is_fixed:
            node.target = _ATEN.reshape.default
        elif (is_view or node.target in _READS_STRIDES) and not is_fixed:
            _with_traced_strides(owner)
        if node.target in _SAME_ORDER:
            _with_traced_order(node, _SAME_ORDER[node.target])
    _drop_unused(graph)


def _with_traced_strides(owner: fx.Node) -> None:
    """Insert a copy of `owner`'s value with the strides it had in tracing, and let all other nodes read the copy."""
    value = owner.meta["val"]
    with owner.graph.inserting_after(owner):
        memory = owner.graph.call_function(_ATEN.new_empty_strided.default, (owner, value.shape, value.stride()))
    with owner.graph.inserting_after(memory):
        copy = owner.graph.call_function(_ATEN.copy_.default, (memory, owner))
    owner.replace_all_uses_with(copy, delete_user_cb=lambda user: user not in (memory, copy))
    memory.meta["val"] = copy.meta["val"] = value


def _with_traced_order(node: fx.Node, places: Sequence[int]) -> None:
    """Give all arguments at these positions one memory order, either contiguous or with channels last.

    The chosen order is the one that the argument at the last position had in tracing.
    """
    last = node.args[places[-1]]
    assert isinstance(last, fx.Node)
    order = torch.contiguous_format if last.meta["val"].is_contiguous() else torch.channels_last
    for place in places:
        with node.graph.inserting_before(node):
            ordered = node.graph.call_function(_ATEN.contiguous.default, (node.args[place],), {"memory_format": order})
        ordered.meta["val"] = node.args[place].meta["val"]  # type: ignore[union-attr]
        node.update_arg(place, ordered)


def _drop_unused(graph: fx.GraphModule) -> None:
    for node in reversed(list(graph.graph.nodes)):
        # This also drops the shape checks of automatic differentiation: the compiler cannot handle their bool result.
        if node.op == "call_function" and not node.users and not _writes(node):
            graph.graph.erase_node(node)
    graph.recompile()


def _writes(node: fx.Node) -> bool:
    """True if the node changes a tensor in place, so that the node is needed even if no other node reads its result."""
    schema = schema_of(node)
    return schema is not None and bool(schema.is_mutable)


def _drop_zero_terms(graph: fx.Graph) -> None:
    """Let the graph skip additions of tensors known to be zero, and copies that only change a tangent's memory order.

    A student step is differentiated along a direction of the parameters, so the images' tangent is zero. Automatic
    differentiation writes this tangent as a map of zeros and convolves the zeros. In the first layer, which has the
    largest maps, this convolution took 7 % of the time in which a student step is differentiated.
    """
    for node in list(graph.nodes):
        if _is_needless_copy(node):
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
    zeros: set[fx.Node] = set()
    written = {_owner(node) for node in graph.nodes if _writes(node)}
    for node in graph.nodes:
        if _is_zero(node, zeros) and _owner(node) not in written:
            zeros.add(node)
        elif node.target is _ATEN.add.Tensor and not node.kwargs:
            for term, other in (node.args, node.args[::-1]):
                if term in zeros and isinstance(other, fx.Node) and _same_shape(node, other):
                    node.replace_all_uses_with(other)
                    break


def _is_needless_copy(node: fx.Node) -> bool:
    """True if the node only copies a tangent into another memory order and leaves its numbers unchanged."""
    if node.target is not _ATEN.copy_.default:
        return False
    into, source = node.args[0], node.args[1]
    if not isinstance(into, fx.Node) or not isinstance(source, fx.Node):
        return False
    return into.target is ZEROS_LIKE_VALUE and list(into.users) == [node] and _same_shape(node, source)


def _owner(node: fx.Node) -> fx.Node:
    """Node whose output owns the memory of this node's value, traced through views and in-place operations."""
    while True:
        maker = node.args[0] if node.target is operator.getitem else node  # getitem picks one of several results
        assert isinstance(maker, fx.Node)
        schema = schema_of(maker)
        if schema is None or not schema.returns or schema.returns[0].alias_info is None:
            return node
        (node,) = maker.all_input_nodes[:1]


def _is_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    """True if the node's value is known to be zero everywhere for all arguments of the graph.

    Args:
        zeros: nodes that are known to be zero so far.
    """
    if node.target in (_ATEN.zeros.default, _ATEN.zeros_like.default):
        return True
    if node.target in (_ATEN.expand.default, _ATEN.view.default, _ATEN.alias.default):
        return node.args[0] in zeros
    if node.target is _ATEN.convolution.default:
        return node.args[0] in zeros and node.args[2] is None
    if node.target is operator.getitem and node.args[1] == 1:  # weight gradient of an input of zeros
        backward = node.args[0]
        return (
            isinstance(backward, fx.Node)
            and backward.target is _ATEN.convolution_backward.default
            and backward.args[1] in zeros
        )
    return False


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    return bool(one.meta["val"].shape == other.meta["val"].shape and one.meta["val"].dtype == other.meta["val"].dtype)


_ATEN = torch.ops.aten
_READS_STRIDES = (_ATEN.as_strided.default, _ATEN.as_strided_copy.default, _ATEN.as_strided_scatter.default)
"""Operations whose result depends on the strides of their input."""
_SAME_ORDER = {_ATEN.native_group_norm.default: (0,), _ATEN.native_group_norm_backward.default: (0, 1)}
"""Operation -> positions of the arguments that must all have the same memory order: channels innermost, or outermost.

With different orders torch 2.11 computes a wrong gradient, without an error."""
