"""Uses of torch's private interfaces, which may change with any version. No other module uses private interfaces.

Tested with the versions in docs/versions.md, from torch 2.9 to 2.15.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.torch_version import TorchVersion

BatchNorm = nn.modules.batchnorm._BatchNorm
"""Base class of every batch normalisation."""

UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
"""Torch operation in traced graphs: a view of a tensor that no other operation uses."""

ZEROS_LIKE_VALUE = torch.ops.aten._new_zeros_with_same_feature_meta.default
"""Torch operation in traced graphs: zeros in a given tensor's memory order. Forward differentiation copies a tangent
into them."""


def shapes_only() -> AbstractContextManager[Any]:
    """Context manager: within it, new tensors have a shape, a type and strides, but no memory ("fake tensors")."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def trace(function: Callable[..., Any], *arguments: Tensor) -> fx.GraphModule:
    """Trace the function. Returns the graph of the tensor operations that the function executes for these arguments."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph: fx.GraphModule = make_fx(lambda *inputs: function(*inputs))(*arguments)  # make_fx miscounts a bound self
    return graph


def compile_graph(graph: fx.GraphModule, arguments: Sequence[Tensor], options: dict[str, Any]) -> Callable[..., Any]:
    """Compile a graph directly, without the capture and guards of `torch.compile`. The graph may be changed in place.

    Args:
        graph: graph from `trace`.
        arguments: tensors of the shapes and memory orders that every later call will have.
        options: settings of torch's compiler (inductor), by name.
    """
    import torch._inductor

    if TorchVersion(torch.__version__) < "2.14":
        add_biases_apart(graph)
    compiled: Callable[..., Any] = torch._inductor.compile(graph, list(arguments), options)
    return compiled


def add_biases_apart(graph: fx.GraphModule) -> None:
    """Replace each convolution with a bias, in the graph, by one without bias and an addition.

    Torch below 2.14 cannot compile a bias that is a view of a computed value, as in stacks of experts. Observed with
    torch 2.8, 2.9 and 2.11 on CPUs. On GPUs torch's compiler itself makes the addition separate.
    """
    aten = torch.ops.aten
    for node in graph.graph.find_nodes(op="call_function", target=aten.convolution.default):
        bias = node.args[2]
        if isinstance(bias, fx.Node):
            node.update_arg(2, None)
            with graph.graph.inserting_after(node):
                total = graph.graph.call_function(aten.add.Tensor, (node, bias))
            node.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)
            shape = [-1] + [1] * (node.meta["val"].dim() - 2)
            with graph.graph.inserting_before(total):
                total.update_arg(1, graph.graph.call_function(aten.reshape.default, (bias, shape)))
    graph.recompile()


def schema_of(node: fx.Node) -> Any:
    """Signature of the node's operation, with its aliases and in-place changes; `None` if it is no tensor operation."""
    return node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None


def storage_id(tensor: Tensor) -> int:
    """Identifier of the tensor's storage: equal for two tensors that exist now if and only if they share a storage.

    Tensors on the meta device have a storage, and so an identifier, too.
    """
    return int(tensor.untyped_storage()._cdata)
