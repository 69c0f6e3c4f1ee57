"""How much memory distilling takes, told beforehand from shapes alone.

What grows with the network, the student steps and the set is counted by hand (`Footprint`). The one thing that grows
with the images of a call, its activations, is read from the call's graph (`step_functions.py`): which values the
compiled call writes to memory, and from when until when each is needed.

    external   convolutions, matrix products and their derivatives: torch's own kernels; they write their results
    inlined    element by element: computed where it is read, unless an external kernel reads it or it is worth keeping
    others     reductions and the like write their results, but run in one fused kernel with what is around them

Within a fused kernel nothing is given back, so memory is summed over stages: an external kernel is one, all between
two of them is one. In every stage it is affine in the number of images (`CallCost`), so a trace at two small sizes
tells any size.

Measured against peak resident memory of a call in a fresh process on a CPU: see `COMPILED_SHARE`, `UNCOMPILED_SHARE`.
Scoring, which is not compiled: 1,000 images of 64x64 with ConvNet-4 4,001 MiB, predicted 4,001; training on 256 of
them 2,128, predicted 2,052. Nothing was measured on a GPU.

Tests: tests/core/test_footprint.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from datm_ray.core.parameters import FlatNetwork
from datm_ray.core.step_functions import StudentStepFunctions
from datm_ray.core.torch_compat import schema_of, shapes_only, storage_id, trace

KEEP_ABOVE_READS = 4
"""A value with several uses is kept when it is made from more values than this, and else computed for each use; the
compiler's own threshold (`torch._inductor.config.realize_reads_threshold`)."""

CACHE_BYTES = 80 * 2**20
"""Activations of a call that a CPU computes fastest: about 20 images of 32x32 with ConvNet-3 of width 128, measured
with 32 MiB of L3 cache. Calls of 100 images took 1.3 times as long for each image: their maps come from main memory."""

SET_COPIES = 5
"""Of images and labels: the set, its momentum, its gradient, the updated set, the set chosen on validation data."""

WORKSPACE_BYTES = 1 * 2**20
"""Of a call beside the values in its graph: what kernels and the allocator need. Measured at digits size."""

COMPILED_SHARE = 1.2
"""Of the values that a compiled call holds at its peak, how much it takes: convolutions reorder their arguments, and
freed memory is not always the memory that is needed next. Measured for `reverse`, with this factor: ConvNet-3 32x32,
20 images 82 MiB, predicted 83; 100 images 402 and 398; ConvNet-4 64x64, 5 images 82 and 87; digits, 100 images 6.2 and
6.7."""

UNCOMPILED_SHARE = 0.65
"""Of all values that an uncompiled call ever writes, how much it holds at its peak: derivatives of derivatives keep
most of their graph until the end. Measured: ConvNet-3 32x32, 20 images 328 MiB, predicted 359; ConvNet-4 64x64, 5
images 362 and 372; digits, 100 images 29 and 28."""

NETWORK_VECTORS = 8
"""Of p numbers beside the trace: two networks, target, v, the sums of a step's gradient over micro-batches and over
shards, and a call's own result on its way into them."""

FROZEN_VECTORS = 2
"""Of the numbers of a network of MetaDD: as it was restored, and the copy that looks at images."""

IMAGE_COPIES = 6
"""Of a call's images beside the set: raw, augmented, what augmentation keeps for its derivative, and the gradients."""

_EXTERNAL = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm"}
_INLINED = {"avg_pool2d", "avg_pool2d_backward", "_to_copy", "constant_pad_nd"}
"""Besides everything that torch itself calls pointwise."""
_SHAPE_ONLY = {
    "zeros_like": (0,),
    "ones_like": (0,),
    "full_like": (0,),
    "_new_zeros_with_same_feature_meta": (0, 1),
    "avg_pool2d_backward": (1,),
    "max_pool2d_with_indices_backward": (1,),
}
"""Arguments of which only the shape is read."""
_SIZES = (2, 4)
"""Images of the two traces; not 1, at which memory orders cannot be told apart."""


@dataclass
class _Life:
    """A piece of memory, and the first and last stage that needs it."""

    size: int
    first: int
    last: int


@dataclass(frozen=True)
class CallCost:
    """What calls of `forward` and `reverse` take, for any number of images.

    Bytes are the largest of fixed + per image * images over the stages of both; operations are proportional.
    """

    stages: tuple[tuple[float, float], ...]
    """(fixed, per image), bytes."""
    forward_flop: int
    """Floating point operations of `forward` for each image."""
    reverse_flop: int
    """Of `reverse`."""

    def bytes(self, images: int) -> int:
        """Peak bytes of a call of so many images."""
        return max((math.ceil(fixed + each * images) for fixed, each in self.stages), default=0)

    def largest(self, budget: float, beside: int = 0) -> int:
        """The most images of which a call, and `beside` bytes for each image, take at most `budget` bytes, or 0."""
        most = 2**31  # where nothing limits it; no infinities, which cannot be divided
        for fixed, each in self.stages:
            if fixed > budget:
                return 0
            if each + beside > 0:
                most = min(most, int((min(budget, 2.0**60) - fixed) // (each + beside)))
        return most


@dataclass(frozen=True)
class Footprint:
    """Bytes that one distilling worker takes, by part."""

    process: int
    """The interpreter, torch and compiled code; nothing where the budget is a GPU's."""
    synthetic: int
    """The worker's share of the synthetic set, `SET_COPIES` times."""
    network: int
    """The network, v, sums of gradients."""
    trace: int
    """The student's parameters before and after every step."""
    call: int
    """Activations and images of one micro-batch."""
    scoring: int = 0
    """Activations of training a network on the set and scoring it, at validation, when there is no trace or call."""
    gathered: int = 0
    """The whole set, which the first of several shards holds for validation and saving."""
    meta: int = 0
    """Activations of the networks of MetaDD, one after the other, before there is a trace or call."""

    @property
    def total(self) -> int:
        """The most at any time."""
        validating = self.scoring + self.gathered
        return self.process + self.synthetic + self.network + max(self.trace + self.call, validating, self.meta)

    @property
    def largest_part(self) -> str:
        """Name of the part that takes most of the total."""
        names = {field.name for field in fields(self)}
        phases = (("trace", "call"), ("scoring", "gathered"), ("meta",))
        longest = max(phases, key=lambda phase: sum(getattr(self, name) for name in phase))
        names -= {name for phase in phases if phase != longest for name in phase}
        return max(sorted(names), key=lambda name: int(getattr(self, name)))


def footprint(
    *,
    parameters: int,
    steps: int,
    images: int,
    image: tuple[int, int, int],
    classes: int,
    call: int,
    chunk: int,
    process: int = 0,
    scoring: int = 0,
    gathered: int = 0,
    beside: int = 0,
    frozen: int = 0,
    meta: int = 0,
) -> Footprint:
    """The footprint of a worker.

    Args:
        parameters: of the network.
        steps: of the student in one iteration.
        images: of the synthetic set that this worker holds.
        image: channels, height, width.
        call: bytes of a call's activations, as from `CallCost.bytes`.
        chunk: images of a call.
        process, scoring, meta: see `Footprint`.
        gathered: images of the whole set, if this worker gathers it.
        beside: parameters of the other networks that this worker matches in turn with this one.
        frozen: parameters of the networks of MetaDD that this worker holds.
    """
    each = 4 * (math.prod(image) + classes)
    copies = SET_COPIES + (beside > 0)  # the sum of the networks' gradients, beside the gradient of one
    return Footprint(
        process=process,
        trace=4 * (steps + 1) * parameters,
        synthetic=copies * images * each,
        network=4 * NETWORK_VECTORS * (parameters + beside) + 4 * FROZEN_VECTORS * frozen,
        call=call + IMAGE_COPIES * chunk * each,
        scoring=scoring,
        gathered=gathered * each,
        meta=meta,
    )


def call_bytes(graph: fx.GraphModule, *, compiled: bool = True) -> int:
    """Predicted peak bytes of one call of a graph with fake or real tensors in its nodes' `meta`; inputs not counted.

    Args:
        compiled: element-wise values are fused; without, every value is written to memory and given back after its
            last use, as in ordinary training.
    """
    return max(stage_bytes(graph, compiled=compiled), default=0)


def stage_bytes(graph: fx.GraphModule, *, compiled: bool = True) -> list[int]:
    """Bytes in use at each stage of a call, in order; see `call_bytes`."""
    lives, stages = _Lifetimes(compiled).of(graph)
    changes = [0] * (stages + 1)
    for life in lives:
        changes[life.first] += life.size
        changes[life.last + 1] -= life.size
    used, total = [], 0
    for change in changes[:-1]:
        total += change
        used.append(total)
    return used


def call_cost(
    functions: StudentStepFunctions, image: tuple[int, int, int], classes: int, *, compiled: bool = True
) -> CallCost:
    """What calls of `forward` and `reverse` take, for any number of images. Takes seconds, and no memory."""
    few, more = (functions.graphs(size, image, classes) for size in _SIZES)
    stages = set()
    for graphs in zip(few, more, strict=True):
        used = (
            [COMPILED_SHARE * used for used in stage_bytes(graph)] if compiled else [_uncompiled_bytes(graph)]
            for graph in graphs
        )
        for small, large in zip(*used, strict=True):
            each = (large - small) / (_SIZES[1] - _SIZES[0])
            stages.add((WORKSPACE_BYTES + small - each * _SIZES[0], each))
    forward, reverse = (flop(graph) // _SIZES[0] for graph in few)
    return CallCost(tuple(sorted(stages)), forward, reverse)


def choose_chunk(
    cost: CallCost,
    image: tuple[int, int, int],
    classes: int,
    batch: int,
    budget: float,
    cache: int | None = CACHE_BYTES,
) -> int:
    """Images of one micro-batch: as many as fit, in parts of a batch that are as even as can be.

    Args:
        batch: images of a student step on this worker.
        budget: bytes for a call's activations and images.
        cache: bytes of activations beyond which a CPU slows down; none on a GPU, which likes large calls.

    Returns:
        At least 1 and at most `batch`; 0 if not even one image fits.
    """
    beside = 4 * IMAGE_COPIES * (math.prod(image) + classes)
    chunk = min(batch, cost.largest(budget, beside))
    if chunk < 1:
        return 0
    if cache is not None:
        # Only what grows with the images: parameters are read for every call, however few images it has.
        steepest = max(each for _, each in cost.stages)
        chunk = min(chunk, max(1, int(cache // steepest)))
    return math.ceil(batch / math.ceil(batch / chunk))


def scoring_bytes(
    network: FlatNetwork, image: tuple[int, int, int], classes: int, training_batch: int, scoring_batch: int
) -> int:
    """Peak bytes of activations while a network is trained on batches of one size and scored on those of another.

    Neither is compiled.
    """
    graphs = _derivative_and_scoring(network, image, classes, training_batch, scoring_batch, argument=0)
    return max(call_bytes(graph, compiled=False) for graph in graphs)


def looking_cost(network: FlatNetwork, image: tuple[int, int, int], classes: int, images: int) -> tuple[int, int]:
    """What MetaDD takes of one frozen network: bytes for so many images at a time, and operations for each image.

    It looks at every image twice, once for what all see and once more for the derivative in the image.
    """
    derivative, forward = _derivative_and_scoring(network, image, classes, images, images, argument=1)
    return call_bytes(derivative, compiled=False), (flop(derivative) + flop(forward)) // images


def training_cost(network: FlatNetwork, image: tuple[int, int, int], classes: int) -> tuple[int, int]:
    """Operations for each image of a training step's gradient, and of scoring."""
    few = _SIZES[0]
    derivative, forward = _derivative_and_scoring(network, image, classes, few, few, argument=0)
    return flop(derivative) // few, flop(forward) // few


def _derivative_and_scoring(
    network: FlatNetwork, image: tuple[int, int, int], classes: int, batch: int, scored: int, *, argument: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The loss's derivative in the parameters (argument 0) or images (1), and the logits, each of so many images."""

    def loss(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(network(theta, x), y)

    with shapes_only():
        theta = torch.empty(network.count)
        x, y = theta.new_empty(batch, *image), theta.new_empty(batch, classes)
        derivative = trace(torch.func.grad(loss, argnums=argument), theta, x, y)
        with torch.no_grad():
            scoring = trace(network, theta, theta.new_empty(scored, *image))
    return derivative, scoring


def flop(graph: fx.GraphModule) -> int:
    """Floating point operations of the graph's convolutions and matrix products; a multiply-add is two."""
    total = 0
    for node in graph.graph.nodes:
        count = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if count is not None:
            arguments = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
            total += int(count(*arguments[0], **arguments[1], out_val=node.meta["val"]))
    return total


class _Lifetimes:
    """One walk through a graph: which values are written to memory, and the stages that need them."""

    def __init__(self, compiled: bool) -> None:
        self._compiled = compiled
        self._lives: dict[int, _Life] = {}  # by storage
        self._inputs: set[int] = set()
        self._sources: dict[fx.Node, frozenset[tuple[int, int]]] = {}
        self._copies: list[_Life] = []
        self._stage = 0

    def of(self, graph: fx.GraphModule) -> tuple[list[_Life], int]:
        """Every piece of memory of a call, and the number of stages."""
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                self._inputs |= set(_storages(node))
                self._sources[node] = self._own_sources(node)
            elif node.op == "output":
                self._stage += 1
                self._read(self._sources_of(node.all_input_nodes))
            else:
                self._visit(node)
        return [*self._lives.values(), *self._copies], self._stage + 1

    def _visit(self, node: fx.Node) -> None:
        reads = self._sources_of(_read_inputs(node))
        known = all(storage in self._lives or storage in self._inputs for storage in _storages(node))
        if known and _storages(node):  # a view, or written into memory that is there
            self._read(reads if _is_written_in_place(node) else frozenset())
            self._sources[node] = self._own_sources(node)
        elif _is_view(node) or self._is_inlined(node, reads):
            self._sources[node] = reads
        else:
            self._write(node, reads)

    def _write(self, node: fx.Node, reads: frozenset[tuple[int, int]]) -> None:
        alone = not self._compiled or _name(node) in _EXTERNAL
        self._stage += alone
        for storage, size in _storages(node).items():
            self._lives[storage] = _Life(size, self._stage, self._stage)
        self._read(reads)
        if self._compiled and _name(node) in _EXTERNAL:
            self._copy_weight(node)
        self._sources[node] = self._own_sources(node)
        self._stage += alone

    def _is_inlined(self, node: fx.Node, reads: frozenset[tuple[int, int]]) -> bool:
        worth_keeping = len(node.users) > 1 and len(reads) > KEEP_ABOVE_READS
        return self._compiled and _is_elementwise(node) and not worth_keeping and not _is_demanded(node)

    def _copy_weight(self, node: fx.Node) -> None:
        """A convolution of maps with channels innermost wants its weight so too; all are copied at the start."""
        values = [value for value in (_value(argument) for argument in node.args) if isinstance(value, Tensor)]
        maps = [value for value in values if value.dim() == 4]
        if not maps or "convolution" not in _name(node):
            return
        weight = maps[-1]
        if _channels_innermost(maps[0]) and not _channels_innermost(weight):
            self._copies.append(_Life(weight.numel() * weight.element_size(), 0, self._stage))

    def _read(self, sources: frozenset[tuple[int, int]]) -> None:
        for storage, _ in sources:
            if storage in self._lives:
                self._lives[storage].last = self._stage

    def _sources_of(self, nodes: Iterable[fx.Node]) -> frozenset[tuple[int, int]]:
        return frozenset().union(*(self._sources.get(node, frozenset()) for node in nodes))

    def _own_sources(self, node: fx.Node) -> frozenset[tuple[int, int]]:
        """The memory that the node's value lies in, with the place in it: two layers of one vector are two reads."""
        return frozenset((storage_id(tensor), int(tensor.storage_offset())) for tensor in _tensors(_value(node)))


def _uncompiled_bytes(graph: fx.GraphModule) -> int:
    lives, _ = _Lifetimes(compiled=False).of(graph)
    return int(UNCOMPILED_SHARE * sum(life.size for life in lives))


def _name(node: fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return str(getattr(packet, "__name__", ""))


def _is_elementwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or _name(node) in _INLINED or not _read_inputs(node)


def _is_written_in_place(node: fx.Node) -> bool:
    schema = schema_of(node)
    return bool(schema is not None and schema.is_mutable)


def _is_view(node: fx.Node) -> bool:
    """Whether the node's value lies in the memory of an input."""
    own = set(_storages(node))
    return bool(own) and any(own <= set(_storages(source)) for source in node.all_input_nodes)


def _is_demanded(node: fx.Node) -> bool:
    """Whether the value must lie in memory: an external kernel, the caller or an operation in place takes it."""
    for user in node.users:
        if user.op == "output" or _name(user) in _EXTERNAL or _is_written_in_place(user):
            return True
        if _is_view(user) and _is_demanded(user):
            return True
    return False


def _read_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs of which more than the shape is read."""
    unread = _SHAPE_ONLY.get(_name(node), ())
    read: list[fx.Node] = []
    for position, argument in enumerate((*node.args, *node.kwargs.values())):
        if position not in unread:
            fx.map_arg(argument, read.append)
    return read


def _value(argument: Any) -> Any:
    return argument.meta.get("val") if isinstance(argument, fx.Node) else None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for tensor in value if isinstance(tensor, Tensor)] if isinstance(value, (list, tuple)) else []


def _storages(node: fx.Node) -> dict[int, int]:
    """Storages of the node's tensors, and the bytes of each."""
    return {storage_id(tensor): int(tensor.untyped_storage().nbytes()) for tensor in _tensors(_value(node))}


def _channels_innermost(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)
