"""Tests the student's two functions: every computation of them gives equal numbers, with or without a compiler."""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import conv2d, layer_norm
from torch.utils._pytree import tree_map_only

from datm_ray.config import NetworkSpec
from datm_ray.core.compute.compilation import Compiled, compiler_problem, traced
from datm_ray.core.compute.torch_compat import add_biases_apart, shapes_only
from datm_ray.core.networks.instance_norm import InstanceNorm
from datm_ray.core.networks.parameters import FlatNetwork, flatten
from datm_ray.core.networks.registry import build_network
from datm_ray.errors import ConfigError
from datm_ray.methods.trajectory import step_functions
from datm_ray.methods.trajectory.step_functions import Order, StepOptions, StudentStepFunctions, soft_cross_entropy

BATCH, IMAGE, CLASSES = 5, (3, 8, 8), 4
ORDERS: tuple[Order, Order] = ("reverse-over-forward", "reverse-over-reverse")
EAGER = StepOptions(compiled=False)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def make_network(
    dtype: torch.dtype = torch.float64, norm: Any = "instance", pooling: Any = "avg", depth: int = 2
) -> FlatNetwork:
    """A ConvNet of two blocks, or of `depth`."""
    spec = NetworkSpec(channels=IMAGE[0], size=IMAGE[1:], classes=CLASSES, width=4, norm=norm, pooling=pooling)
    return FlatNetwork(build_network(spec.model_copy(update={"depth": depth}), 0).to(dtype))


def draw(network: FlatNetwork, seed: int = 0, batch: int = BATCH) -> Inputs:
    """theta, x, y, weights and v; one image has weight zero."""
    generator = torch.Generator().manual_seed(seed)
    theta = flatten(network.module)
    shapes = ((network.count,), (batch, *IMAGE), (batch, CLASSES), (network.count,))
    noise, x, y, v = (torch.randn(shape, generator=generator, dtype=theta.dtype) for shape in shapes)
    weights = torch.full((batch,), 1 / batch, dtype=theta.dtype)
    weights[-1] = 0
    return theta + 0.1 * noise, x, 3 * y, weights, v


def arranged(network: FlatNetwork, options: StepOptions, explicit: bool) -> StudentStepFunctions:
    """Functions with or without the compiler's normalisation, whatever the options are."""
    functions = StudentStepFunctions(network, options)
    norms = [part for part in functions.network.module.modules() if isinstance(part, InstanceNorm)]
    assert norms
    for norm in norms:
        norm.explicit = explicit
    return functions


def results(functions: StudentStepFunctions, inputs: Inputs) -> list[Tensor]:
    """g, s, ds/dtheta, ds/dx and ds/dy."""
    return [functions.forward(*inputs[:4]), *functions.reverse(*inputs)]


def plain(network: FlatNetwork, inputs: Inputs) -> list[Tensor]:
    """The results g, s, ds/dtheta, ds/dx and ds/dy by torch.autograd alone, on the unchanged network."""
    theta, x, y, weights, v = inputs
    theta, x, y = (t.clone().requires_grad_() for t in (theta, x, y))
    loss = soft_cross_entropy(network(theta, x), y, weights)
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    s = torch.dot(gradient, v)
    return [gradient.detach(), s.detach(), *torch.autograd.grad(s, (theta, x, y))]


def assert_equal(values: list[Tensor], expected: list[Tensor], bound: float = 1e-12) -> None:
    """Assert that every result has a relative error in norm below the bound."""
    for value, reference in zip(values, expected, strict=True):
        assert value.shape == reference.shape
        assert float((value - reference).norm() / reference.norm()) < bound


class Contiguous(fx.Interpreter):
    """Runs a graph with contiguous strides for the result of every kernel."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one node; views and results with requested strides keep their memory."""
        result = super().call_function(target, args, kwargs)
        schema = getattr(target, "_schema", None)
        if schema is None or any(value.alias_info for value in schema.returns) or "strided" in schema.name:
            return result
        return tree_map_only(Tensor, self.restrided, result)

    def restrided(self, tensor: Tensor) -> Tensor:
        """The values with contiguous strides."""
        return tensor.contiguous()


class Reversed(Contiguous):
    """Runs a graph with the first dimension innermost in the result of every kernel."""

    def restrided(self, tensor: Tensor) -> Tensor:
        """The values with reversed strides."""
        dims = tuple(reversed(range(tensor.dim())))
        return tensor.permute(dims).contiguous().permute(dims)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list of the graphs compiled from now on; the trial of the compiler is over."""
    assert compiler_problem("cpu") == ""
    graphs: list[Any] = []
    original = torch._inductor.compile

    def counted(graph: Any, *arguments: Any) -> Any:
        graphs.append(graph)
        return original(graph, *arguments)

    monkeypatch.setattr(torch._inductor, "compile", counted)
    return graphs


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", ["instance", "group", "none"])
def test_both_orders_of_differentiation_are_exact(order: Order, norm: str) -> None:
    """Either order of differentiation equals torch.autograd on the plain network."""
    network = make_network(norm=norm)
    inputs = draw(network)
    functions = StudentStepFunctions(network, StepOptions(compiled=False, order=order))
    assert_equal(results(functions, inputs), plain(network, inputs))


def every_graph() -> list[Any]:
    """All combinations of what shapes a graph; a quarter, with every pair of values, is quick."""
    kinds = [("instance", True), ("instance", False), ("group", True), ("none", True)]
    cases = []
    for row, (pooling, kind) in enumerate(itertools.product(("avg", "max", "none"), kinds)):
        for column, (order, channels_last) in enumerate(itertools.product(ORDERS, (True, False))):
            is_quick = (row + row // 4) % 4 == column
            marks = () if is_quick else (pytest.mark.slow, pytest.mark.exhaustive)
            cases.append(pytest.param(order, channels_last, pooling, *kind, marks=marks))
    return cases


@pytest.mark.parametrize(("order", "channels_last", "pooling", "norm", "explicit"), every_graph())
def test_traced_graphs_are_exact(order: Order, channels_last: bool, pooling: str, norm: str, explicit: bool) -> None:
    """Traced graphs, run operation by operation, are exact for any strides of the results."""
    network = make_network(pooling=pooling, norm=norm)
    options = StepOptions(compiled=False, order=order, channels_last=channels_last)
    functions = arranged(network, options, explicit) if norm == "instance" else StudentStepFunctions(network, options)
    forward, reverse = functions.graphs(BATCH, IMAGE, CLASSES)
    for seed, run in enumerate((fx.Interpreter, Contiguous, Reversed)):
        inputs = draw(network, seed)
        theta, x, y, weights, v = inputs
        x = functions.layout(x)
        found = [run(forward).run(theta, x, y, weights), *run(reverse).run(theta, x, y, weights, v)]
        assert_equal(found, plain(network, inputs))


def test_what_reads_strides_finds_them_as_traced() -> None:
    """Views written through and `as_strided` are exact, whatever strides a kernel gives."""

    def read_through_strides(x: Tensor) -> Tensor:
        return (x.exp() + 1).transpose(0, 1).exp().as_strided((3,), (4,)) * 2

    def write_through_views(x: Tensor) -> Tensor:
        total = torch.zeros_like(x).exp()
        first, second = total.view(-1).split(6)
        first.add_(x.flatten()[:6])
        second.mul_(2)
        return total.view(3, 4) + x.sum()

    x = torch.arange(12.0).view(3, 4)
    for function in (read_through_strides, write_through_views):
        with shapes_only():
            graph = traced(function, torch.empty(3, 4))
        for run in (fx.Interpreter, Contiguous, Reversed):
            assert torch.equal(run(graph).run(x), function(x)), (function.__name__, run.__name__)


class _Normalised(nn.Module):
    """A user's network with a normalisation of torch's."""

    def __init__(self, norm: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 3), norm, nn.Linear(4 * 6 * 6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.tanh(self.norm(self.first(images))).flatten(1))
        return logits


@pytest.mark.parametrize(
    ("norm", "order"),
    [
        (nn.LayerNorm((4, 6, 6)), "reverse-over-reverse"),
        (lambda maps: layer_norm(maps, (4, 6, 6)), "reverse-over-reverse"),
        (nn.InstanceNorm2d(4, affine=True), "reverse-over-reverse"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), "reverse-over-reverse"),
        (nn.GroupNorm(2, 4), "reverse-over-forward"),
        (nn.RMSNorm((4, 6, 6)), "reverse-over-forward"),
    ],
)
def test_a_users_network_with_a_norm_of_torchs_is_exact(norm: Callable[[Tensor], Tensor], order: Order) -> None:
    """A user's network with torch's norm is exact; the faster order is dropped only where torch's tangent fails."""
    network = FlatNetwork(_Normalised(norm).double())
    inputs = draw(network)
    functions = StudentStepFunctions(network, StepOptions(compiled=False, order="reverse-over-forward"))
    forward, reverse = functions.graphs(BATCH, IMAGE, CLASSES)
    found = [fx.Interpreter(forward).run(*inputs[:4]), *fx.Interpreter(reverse).run(*inputs)]
    assert_equal(found, plain(network, inputs), 1e-10)
    assert functions.facts["order"] == order


def test_tracing_takes_no_memory_for_the_maps() -> None:
    """Tracing a graph for a million images allocates no maps."""
    functions = StudentStepFunctions(make_network(), EAGER)
    _, reverse = functions.graphs(10**6, IMAGE, CLASSES)
    largest = max(node.meta["val"].numel() for node in reverse.graph.nodes if isinstance(node.meta.get("val"), Tensor))
    assert largest >= 10**6 * 4 * 8 * 8


def test_what_is_written_in_place_stays_in_a_graph() -> None:
    """A write in place stays in the graph though nothing reads its result; its target is not taken for zeros."""

    def add_to_a_part(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        total[1:] += x[1:]
        return total

    def add_what_was_written(x: Tensor) -> Tensor:
        return x + add_to_a_part(x)

    x = torch.tensor([1.0, 2.0, 3.0])
    for function in (add_to_a_part, add_what_was_written):
        assert torch.equal(traced(function, torch.ones(3))(x), function(x))


def test_channels_last_changes_rounding_only() -> None:
    """Channels innermost or outermost change rounding only, for either layout of the input."""
    network = make_network()
    inputs = draw(network)
    swapped = (inputs[0], inputs[1].contiguous(memory_format=torch.channels_last), *inputs[2:])
    for channels_last in (True, False):
        functions = StudentStepFunctions(network, StepOptions(compiled=False, channels_last=channels_last))
        assert functions.layout(inputs[1]).is_contiguous(memory_format=torch.channels_last) is channels_last
        for given in (inputs, swapped):
            assert_equal(results(functions, given), plain(network, inputs))


def test_the_reported_and_compiled_memory_order_is_that_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts and compiler get the memory order of `layout`, also where a group norm keeps channels outermost."""
    asked: list[bool] = []

    class Recorder:
        def __init__(self, graph: None, device_type: str, *, channels_last: bool) -> None:
            asked.append(channels_last)

        def __call__(self, *arguments: Tensor) -> None: ...

    monkeypatch.setattr(step_functions, "Compiled", Recorder)
    monkeypatch.setattr(StudentStepFunctions, "graphs", lambda *_: (None, None))
    monkeypatch.setattr(step_functions, "compiler_problem", lambda device_type: "")
    found = set()
    for norm, order, channels_last in itertools.product(("instance", "group"), ORDERS, (True, False)):
        network = make_network(norm=norm)
        theta, x, y, weights, _ = draw(network)
        functions = StudentStepFunctions(network, StepOptions(order=order, channels_last=channels_last))
        functions.forward(theta, x, y, weights)
        innermost = functions.layout(x).is_contiguous(memory_format=torch.channels_last)
        assert (functions.facts["channels_last"], *asked) == (innermost,) * 3, (norm, order, channels_last)
        asked.clear()
        found.add((channels_last, innermost))
    assert found == {(True, True), (True, False), (False, False)}


@pytest.mark.parametrize(("capability", "expected"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_facts_say_tf32_only_of_gpus_that_have_it(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V100 and T4 cannot round to TF32, so no record says that they did; neither does that of a CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    functions = StudentStepFunctions(make_network(), StepOptions(compiled=False, precision="tf32"))
    assert functions.facts["tf32"] is False
    monkeypatch.setattr(FlatNetwork, "device", torch.device("cuda"))
    assert functions.facts["tf32"] is expected


@pytest.mark.parametrize(
    ("order", "explicit", "compiled"),
    [
        *((order, explicit, False) for order in ORDERS for explicit in (True, False)),
        pytest.param(ORDERS[0], True, True, marks=pytest.mark.slow),
    ],
)
def test_bfloat16_layers_keep_the_direction_of_every_derivative(order: Order, explicit: bool, compiled: bool) -> None:
    """bfloat16 results stay within 12 % and a cosine of 0.99 of the exact ones, and are float32, compiled or not."""
    depth = 1 if compiled else 2  # compiling two blocks takes 20 s
    inputs = draw(make_network(depth=depth))
    exact = plain(make_network(depth=depth), inputs)
    options = StepOptions(compiled=compiled, order=order, precision="bfloat16")
    functions = arranged(make_network(torch.float32, depth=depth), options, explicit)
    assert functions.note == ""
    theta, x, y, weights, v = (t.float() for t in inputs)
    for value, expected in zip(results(functions, (theta, x, y, weights, v)), exact, strict=True):
        assert value.dtype is torch.float32
        error = float((value.double() - expected).norm() / expected.norm())
        assert 1e-3 < error < 0.12  # measured: 0.05 to 0.09
        assert float(torch.cosine_similarity(value.double().flatten(), expected.flatten(), dim=0)) > 0.99


def test_the_given_network_is_left_alone() -> None:
    """The step functions rearrange a copy of the network and leave the given one unchanged."""
    network = make_network()
    before = flatten(network.module)
    functions = StudentStepFunctions(network, EAGER)
    assert functions.network.module is not network.module
    results(functions, draw(network))
    assert torch.equal(flatten(network.module), before)
    assert all(parameter.grad is None for parameter in network.module.parameters())


def test_batch_norm_backbone_is_refused() -> None:
    """A backbone with batch normalisation is refused, because its samples are coupled."""
    with pytest.raises(ConfigError, match=r"network\.norm=instance"):
        StudentStepFunctions(make_network(norm="batch"), EAGER)


@pytest.mark.slow
@pytest.mark.parametrize(("order", "channels_last"), [(ORDERS[0], True)])
def test_compiled_functions_are_exact_and_compiled_once(
    order: Order, channels_last: bool, compilations: list[Any]
) -> None:
    """Compiled functions are exact to 1e-12 in float64, each from one whole graph compiled once."""
    network = make_network()
    functions = StudentStepFunctions(network, StepOptions(order=order, channels_last=channels_last))
    assert functions.note == ""
    for seed in range(3):
        inputs = draw(network, seed)
        assert_equal(results(functions, inputs), plain(network, inputs))
    assert len(compilations) == 2


def test_biases_added_after_convolutions_change_nothing() -> None:
    """Adding biases after convolutions, as earlier versions of torch need it, changes nothing."""
    draw_ = torch.Generator().manual_seed(0)
    maps, kernel, bias = (torch.randn(*shape, generator=draw_) for shape in ((2, 3, 5, 5), (4, 3, 3, 3), (2, 2)))

    def convolve(maps: Tensor, kernel: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        found = conv2d(maps, kernel, bias.exp().reshape(4))
        return found, found.relu()

    with shapes_only():
        graph = traced(convolve, *map(torch.empty_like, (maps, kernel, bias)))
    add_biases_apart(graph)
    (convolution,) = (node for node in graph.graph.nodes if "convolution" in node.name)
    assert convolution.args[2] is None
    torch.testing.assert_close(graph(maps, kernel, bias), convolve(maps, kernel, bias))


@pytest.mark.slow
def test_maps_keep_their_order_of_memory_if_asked_to() -> None:
    """Compiled convolutions that keep the maps' order equal torch's own to the bit."""
    draw_ = torch.Generator().manual_seed(0)
    maps, kernel = torch.randn(4, 64, 16, 16, generator=draw_), torch.randn(64, 64, 3, 3, generator=draw_)

    def convolve_twice(maps: Tensor, kernel: Tensor) -> Tensor:
        return conv2d(conv2d(maps, kernel, padding=1).relu(), kernel, padding=1)

    with shapes_only():
        graph = traced(convolve_twice, torch.empty_like(maps), torch.empty_like(kernel))
    function = Compiled(graph, "cpu", channels_last=False)
    assert torch.equal(function(maps, kernel), convolve_twice(maps, kernel))


@pytest.mark.slow
def test_another_number_of_images_is_another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of images gets a graph of its own, compiled once."""
    assert compiler_problem("cpu") == ""
    compilations: list[Any] = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *_: compilations.append(graph) or graph)
    network = make_network()
    functions = StudentStepFunctions(network, StepOptions())
    for batch in (2, 3, 2):
        inputs = draw(network, batch=batch)
        assert_equal([functions.forward(*inputs[:4])], plain(network, inputs)[:1])
    assert len(compilations) == 2


@pytest.mark.parametrize("really", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_code_refuses_tensors_it_was_not_compiled_for(really: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code refuses another shape, type or memory order; a dimension of one entry has no order."""
    if not really:  # a first compilation on a machine takes half a minute
        monkeypatch.setattr(torch._inductor, "compile", lambda graph, *_: graph)
    images = torch.randn(2, 3, 1, 4)
    function = Compiled(traced(lambda x: x.exp(), images), "cpu")
    assert torch.allclose(function(images), images.exp())
    same = images.as_strided(images.shape, (12, 4, 99, 1))
    assert torch.allclose(function(same), images.exp())
    for wrong in (images[:1], images.double(), images.transpose(1, 3).contiguous().transpose(1, 3)):
        with pytest.raises(ValueError, match=r"compiled for a tensor of .* called with"):
            function(wrong)


def step_with(compiler: str, cache: str, pipe: Connection) -> None:
    """Take a student step with another C++ compiler, in a process that has not searched for one yet."""
    # The cache is empty, because this machine's real compiler may have filled the usual one.
    os.environ |= {"CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": cache}
    module = build_network(NetworkSpec(channels=1, size=(8, 8), classes=3, width=2, depth=1), 0)
    functions = StudentStepFunctions(FlatNetwork(module))
    gradient = functions.forward(flatten(module), torch.ones(2, 1, 8, 8), torch.eye(3)[:2], torch.ones(2))
    pipe.send((functions.note, bool(gradient.isfinite().all())))


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["absent", "broken"])
def test_without_a_working_compiler_the_step_runs_eagerly_and_says_so(compiler: str, tmp_path: Path) -> None:
    """A missing or failing compiler costs speed and one log line; the step still runs."""
    cxx = tmp_path / "g++"
    if compiler == "broken":
        cxx.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 12.0 && exit\nexit 1\n')
        cxx.chmod(0o755)
    fresh = multiprocessing.get_context("spawn")
    ours, theirs = fresh.Pipe()
    process = fresh.Process(target=step_with, args=(str(cxx), str(tmp_path / "cache"), theirs))
    process.start()
    theirs.close()
    note, is_finite = ours.recv()
    process.join()
    assert is_finite
    assert note.startswith("torch.compile does not work here (")
    assert len(note.splitlines()) == 1
