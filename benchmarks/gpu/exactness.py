"""Checks that every path gives the same numbers on the device as elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from epochs import expert_epochs
from published_matching import Problem, make_problem, unrolling
from torch import Tensor
from torch.nn.functional import group_norm

from datm_ray.config import PUBLISHED_AUGMENTATION, DistillConfig, ExpertConfig, NetworkSpec
from datm_ray.core.compute.precision import Precision
from datm_ray.core.images.augment import augment, draw_augmentation, parse_strategy
from datm_ray.core.metadd import MetaDD
from datm_ray.core.networks.instance_norm import instance_norm
from datm_ray.core.networks.registry import build_network, network_names
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.core.randomness import Purpose, generator
from datm_ray.core.training.experts import ExpertState
from datm_ray.core.training.loop import Schedule, Training, predict_logits, together_steps, train_steps
from datm_ray.methods.trajectory.iteration import Match, MatchingState, Origin
from datm_ray.methods.trajectory.matching import matching_gradient
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions
from datm_ray.runtime.machine.devices import restoring_settings
from gpu.machine import Machine, timed_algorithms
from gpu.sections import Clock, Row, Section, Work

LIMIT = 1e-9
"""Largest relative error in float64; rounding gives some 1e-14, a wrong term some 1e-2."""
ROUNDED = {"float32": 5e-2, "tf32": 0.3, "bfloat16": 0.9}
"""Largest relative error in lower precisions. A larger error shows a fault; a smaller one proves nothing. One rectifier
that rounding carries over its kink may add as much as many roundings. A gradient of zeros has an error of 1."""
COSINE = 0.5
"""Smallest cosine, exclusive, of the angle between the first result and the exact one."""

SETTINGS = DistillConfig(
    learning_rate_images=0.1, learning_rate_labels=0.1, learning_rate_step_size=1e-5, threshold=1e9, gradient_limit=10.0
)
"""Settings of the checks' distillations: no iteration is skipped, and the limit keeps random gradients short."""

Tensors = Sequence[Tensor]


def spec_of(machine: Machine) -> NetworkSpec:
    """Network of the checks."""
    if machine.small:
        return NetworkSpec(channels=3, size=(8, 8), classes=4, width=4, depth=2)
    return NetworkSpec(channels=3, size=(16, 16), classes=10, width=32, depth=2)


def error(found: Tensors, exact: Tensors) -> list[float]:
    """Relative norms of the differences."""
    wide = [(a.detach().cpu().double(), b.detach().cpu().double()) for a, b in zip(found, exact, strict=True)]
    return [float((a - b).norm() / b.norm().clamp_min(1e-300)) for a, b in wide]


def compared(found: Tensors, exact: Tensors, limit: float = LIMIT) -> Row:
    """Errors, the cosine of the first pair, and a verdict on both; "ok" where neither says that something is wrong."""
    errors = error(found, exact)
    one, other = (each[0].detach().cpu().double().flatten() for each in (found, exact))
    cosine = float(torch.dot(one, other) / (one.norm() * other.norm()).clamp_min(1e-300))
    fine = all(each <= limit for each in errors)  # false where one is nan
    return {
        "error": " / ".join(f"{each:.1e}" for each in errors),
        "1 - cosine": f"{1 - cosine:.1e}",
        "limit": f"{limit:.0e}",
        "verdict": "TOO LARGE" if not fine else "ok" if cosine > COSINE else "OTHER DIRECTION",
        "errors": errors,
    }


def gradient_of(
    problem: Problem, how: StepOptions | StudentStepFunctions | None = None, chunk: int | None = None
) -> Tensors:
    """The matching gradient in images, soft labels and step size.

    Args:
        how: options, or functions with which others have computed already; None for plain uncompiled steps.
    """
    options = how if isinstance(how, StepOptions) else StepOptions(compiled=False)
    functions = how if isinstance(how, StudentStepFunctions) else StudentStepFunctions(problem.network, options)
    if functions.note:
        raise RuntimeError(functions.note)
    found = matching_gradient(functions, problem.start, problem.target, problem.synthetic, problem.placed(chunk))
    return found.images, found.soft_labels, found.step_size


class Recorded(StudentStepFunctions):
    """Functions of a student step that record as CUDA graphs what others have compiled, so that it is compiled once."""

    def __init__(self, others: StudentStepFunctions, graphs: bool | None = True) -> None:
        """Keep the others, which use no graphs. `graphs`: see `StepOptions`."""
        super().__init__(others.network, replace(others._options, graphs=graphs))
        self._others = others

    def _compiled_for(self, x: Tensor, y: Tensor) -> Any:
        return self._others._functions(x, x, y)  # of the parameters it reads the type alone


class _Matching:
    """One problem on any device and in any precision. Its number of images is not a multiple of a minibatch's."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.batch, self._steps = (6, 2) if machine.small else (20, 4)
        self._kept = dict[Precision, StudentStepFunctions]()

    def problem(self, device: str | None = None, dtype: torch.dtype = torch.float64) -> Problem:
        spec, device = spec_of(self._machine), device or self._machine.device
        return make_problem(
            spec,
            self.batch,
            self._steps,
            dtype=dtype,
            device=device,
            strategy=PUBLISHED_AUGMENTATION,
            images=self.batch + 3,
        )

    @functools.cached_property
    def exact(self) -> Tensors:
        return unrolling(self.problem())[1]

    def eager(self, device: str | None = None, chunk: int | None = None) -> Row:
        return compared(
            gradient_of(self.problem(), chunk=chunk), gradient_of(self.problem(device)) if device else self.exact
        )

    def compiled(self, chunk: int | None = None, **options: Any) -> Row:
        how = StepOptions(self._machine.compiled, **options)
        return compared(gradient_of(self.problem(), how, chunk or self.batch), self.exact)

    def replayed(self, precision: Precision) -> Row:
        """Compare CUDA graphs with the same compiled functions without; augmentation has a fixed order of sums."""
        with reproducible():
            problem, plain = self.problem(dtype=torch.float32), self._functions(precision)
            graphs = Recorded(plain)
            row = compared(*(gradient_of(problem, each, self.batch) for each in (graphs, plain)), limit=0.0)
        if not graphs.are_replayed:
            raise RuntimeError("the step functions were not recorded as CUDA graphs, see the warning")
        return row

    def _functions(self, precision: Precision) -> StudentStepFunctions:
        """Functions of all checks in a precision, which are compiled once."""
        if precision not in self._kept:
            options = StepOptions(self._machine.compiled, precision=precision)
            self._kept[precision] = StudentStepFunctions(self.problem(dtype=torch.float32).network, options)
        return self._kept[precision]

    def repeated(self) -> Row:
        with reproducible():
            return compared(*(gradient_of(self.problem()) for _ in range(2)), limit=0.0)

    def rounded(self, precision: Precision) -> Row:
        found = gradient_of(self.problem(dtype=torch.float32), self._functions(precision), self.batch)
        return compared(found, self.exact, ROUNDED[precision])

    def unrolled(self) -> Row:
        return compared(unrolling(self.problem(dtype=torch.float32))[1], self.exact, ROUNDED["float32"])


@contextmanager
def reproducible() -> Iterator[None]:
    """Compute sums in a fixed order, as with `cluster.deterministic`. `gpu/__init__.py` fixed cuBLAS's workspace."""
    with restoring_settings(), timed_algorithms(False):
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        yield


Checks = list[tuple[str, Callable[[], Row]]]


def matching_checks(machine: Machine) -> Checks:
    """Check the matching gradient without a compiler."""
    matching = _Matching(machine)
    return [
        ("matching gradient, float64, against full unrolling", matching.eager),
        ("the same against the CPU", partial(matching.eager, "cpu")),
        ("in micro-batches of 4", partial(matching.eager, chunk=4)),
        ("float32 full unrolling, against float64", matching.unrolled),
        ("twice with deterministic algorithms, equal bits", matching.repeated),
    ]


def rounding_checks(machine: Machine) -> Checks:
    """Check what runs compute by default: the matching gradient in every precision, and by CUDA graphs."""
    matching, how = _Matching(machine), machine.how
    found: Checks = []
    for each in machine.precisions:  # each with its graphs, which run what the row before compiled
        found.append((f"{each}, {how}, against float64", partial(matching.rounded, each)))
        if machine.device == "cuda":
            found.append((f"{each}, CUDA graphs, {how}, equal bits without", partial(matching.replayed, each)))
    return found


def compiled_checks(machine: Machine) -> Checks:
    """Check the compiled matching gradient in other ways, and experts, which take longest and come last."""
    matching, how = _Matching(machine), machine.how
    return [
        compiled_experts(machine),
        (f"{how}, float64", matching.compiled),
        (f"{how}, reverse over reverse", partial(matching.compiled, order="reverse-over-reverse")),
        (f"{how}, channels first, micro-batches of 4", partial(matching.compiled, 4, channels_last=False)),
        *(
            [(f"three networks trained together, {how}, float64", partial(together_check, machine, True))]
            if machine.compiled  # else `other_checks` has this row
            else []
        ),
    ]


def architecture_checks(machine: Machine) -> Checks:
    """Check the matching gradient of the other architectures."""

    def check(name: str) -> Row:
        spec = NetworkSpec(architecture=name, channels=3, size=(16, 16), classes=10, width=16, depth=2)
        problem = make_problem(spec, 4, 2, dtype=torch.float64, device=machine.device)
        return compared(gradient_of(problem), unrolling(problem)[1])

    names = [name for name in network_names() if name != "convnet"]
    if machine.small:
        names = ["lenet"]
    return [(f"matching gradient of {name}, float64", partial(check, name)) for name in names]


def distilled(machine: Machine, device: str) -> Tensors:
    """The set and its saved momenta after three iterations with momentum."""
    problem = _Matching(machine).problem(device)
    functions = StudentStepFunctions(problem.network, StepOptions(compiled=False))
    state = MatchingState(problem.synthetic, SETTINGS)
    for _ in range(3):
        state.step([Match(functions, problem.start, problem.target, problem.placed())], [Origin(0, 0)])
    held, shared = state.to_arrays()
    names = ("synthetic.images", "momentum.images", "momentum.soft_labels")
    return [*(torch.tensor(held[name]) for name in names), torch.tensor(shared["synthetic.step_sizes"])]


def trained_experts(
    machine: Machine,
    device: str,
    spec: NetworkSpec,
    *,
    gsam: bool,
    dtype: torch.dtype = torch.float64,
    compiled: bool = False,
) -> Tensors:
    """Parameters and losses of two experts after an epoch of three steps."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(20, spec.channels, *spec.size, generator=draw)
    labels = torch.randint(spec.classes, (20,), generator=draw).to(device)
    networks = [build_network(spec, seed).to(device, dtype) for seed in range(2)]
    functions = StackFunctions(networks[0], stacked=2, compile_=compiled)
    settings = ExpertConfig(
        epochs=1,
        batch_size=8,
        learning_rate=0.02,
        momentum=0.9,
        weight_decay=5e-4,
        optimiser="gsam" if gsam else "sgd",
    )
    state = ExpertState.initial(networks)
    (losses,) = expert_epochs(functions, images.to(device, dtype), labels, settings, [0, 1], state)
    return state.parameters, losses


def expert_checks(machine: Machine) -> Checks:
    """Check experts' steps side by side, vectorised and with batch statistics, by SGD and GSAM."""
    chain = spec_of(machine)
    branched = NetworkSpec(architecture="resnet18", channels=3, size=(8, 8), classes=4, width=4)
    kinds = {
        "stacked": chain,
        "with batch statistics": chain.model_copy(update={"norm": "batch"}),
        "vectorised (resnet18)": branched,
    }

    def check(spec: NetworkSpec, gsam: bool) -> Row:
        return compared(*(trained_experts(machine, each, spec, gsam=gsam) for each in (machine.device, "cpu")))

    return [
        (f"experts {kind}, {'GSAM' if gsam else 'SGD'}, float64, against the CPU", partial(check, spec, gsam))
        for kind, spec in kinds.items()
        for gsam in (False, True)
        if not machine.small or kind == "stacked"
    ]


def compiled_experts(machine: Machine) -> tuple[str, Callable[[], Row]]:
    """Check compiled experts' steps by GSAM."""

    def check() -> Row:
        how = {"spec": spec_of(machine), "gsam": True}
        found = trained_experts(machine, machine.device, dtype=torch.float32, compiled=machine.compiled, **how)
        return compared(found, trained_experts(machine, "cpu", **how), ROUNDED["float32"])

    return f"experts stacked, GSAM, float32, {machine.how}, against the CPU in float64", check


def augmented(operation: str, device: str) -> Tensors:
    """Images after an operation, and its derivative in them."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 16, 16, generator=draw, dtype=torch.float64).to(device).requires_grad_()
    weights = torch.randn(8, 3, 16, 16, generator=draw, dtype=torch.float64).to(device)
    drawn = draw_augmentation(operation, 8, generator(0, Purpose.TRAINING_AUGMENTATION, 0, 0))
    result = augment(images, drawn)
    return result, torch.autograd.grad((weights * result).sum(), images)[0]


def worst_augmentation(devices: Sequence[str], limit: float = LIMIT) -> Row:
    """Compare all DSA operations on two devices; returns the row of the worst."""
    rows = []
    for operation in parse_strategy(PUBLISHED_AUGMENTATION):
        row = compared(*(augmented(operation, device) for device in devices), limit=limit)
        rows.append({**row, "operation": operation})
    return max(rows, key=lambda row: float("inf") if row["verdict"] != "ok" else max(row["errors"]))


def repeated_augmentation(machine: Machine) -> Row:
    """Check that all DSA operations give equal bits twice if sums have a fixed order."""
    with reproducible():
        return worst_augmentation((machine.device, machine.device), 0.0)


def metadd_gradient(machine: Machine, device: str) -> Tensors:
    """MetaDD's gradient in the images, and its loss."""
    draw = torch.Generator().manual_seed(0)
    specs = [
        NetworkSpec(architecture=name, channels=3, size=(16, 16), classes=4, width=16, depth=2)
        for name in ("convnet", "resnet18", "vit-small")
    ]
    specs = specs[:2] if machine.small else specs
    networks = [build_network(spec, seed).to(device, torch.float64) for seed, spec in enumerate(specs)]
    images = torch.randn(6, 3, 16, 16, generator=draw, dtype=torch.float64).to(device)
    loss, gradient = MetaDD(networks).gradient(images, torch.arange(6, device=device) % 4, chunk=4)
    return gradient, loss.total


def normalised(device: str, *, explicit: bool) -> Tensors:
    """Instance normalisation, its derivative along a direction, and the derivatives of that."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((4, 6, 8, 8), (6,), (6,))
    values, directions = (
        tuple(torch.randn(shape, generator=draw, dtype=torch.float64).to(device) for shape in shapes) for _ in range(2)
    )

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return instance_norm(x, weight, bias, 1e-5, explicit=True) if explicit else group_norm(x, 6, weight, bias)

    def along(*values: Tensor) -> Tensor:
        if explicit:
            _, tangent = torch.func.jvp(norm, values, directions)
            return tangent.square().sum()
        # Reverse over reverse, which torch differentiates by itself.
        like = torch.zeros_like(values[0]).requires_grad_()
        pulled = torch.autograd.grad(norm(*values), values, like, create_graph=True)
        (tangent,) = torch.autograd.grad(
            sum((p * d).sum() for p, d in zip(pulled, directions, strict=True)), like, create_graph=True
        )
        return tangent.square().sum()

    given = tuple(value.requires_grad_() for value in values)
    return [norm(*given), *torch.autograd.grad(along(*given), given[:2])]


def evaluated(machine: Machine, device: str) -> Tensors:
    """Logits of a network after some epochs of the evaluation's training loop."""
    spec, draw = spec_of(machine), torch.Generator().manual_seed(0)
    images = torch.randn(20, spec.channels, *spec.size, generator=draw, dtype=torch.float64).to(device)
    labels = torch.randn(20, spec.classes, generator=draw, dtype=torch.float64).to(device)
    network = build_network(spec, 0).to(device, torch.float64)
    schedule = Schedule(4, 8, 0.01, momentum=0.9, weight_decay=5e-4, augmentation=PUBLISHED_AUGMENTATION, decay_epoch=2)
    list(train_steps(Training(network, images, labels, schedule, 0)))
    return [predict_logits(network, images, batch_size=7)]


def scored_together(machine: Machine, device: str, *, together: bool, compiled: bool = False) -> Tensors:
    """Logits of three networks after some epochs of the evaluation's training, together or one after another."""
    spec, draw = spec_of(machine), torch.Generator().manual_seed(0)
    images = torch.randn(20, spec.channels, *spec.size, generator=draw, dtype=torch.float64).to(device)
    labels = torch.randn(20, spec.classes, generator=draw, dtype=torch.float64).to(device)
    schedule = Schedule(4, 8, 0.01, momentum=0.9, weight_decay=5e-4, augmentation=PUBLISHED_AUGMENTATION, decay_epoch=2)
    networks = [build_network(spec, seed).to(device, torch.float64) for seed in range(3)]
    stack = [Training(network, images, labels, schedule, seed) for seed, network in enumerate(networks)]
    if together:
        list(together_steps(StackFunctions(networks[0], stacked=3, compile_=compiled), stack))
    else:
        for each in stack:
            list(train_steps(each))
    return [predict_logits(network, images, batch_size=7) for network in networks]


def together_check(machine: Machine, compiled: bool) -> Row:
    """Compare networks that the device trains together with the CPU's, trained one after another."""
    found = scored_together(machine, machine.device, together=True, compiled=compiled)
    return compared(found, scored_one_by_one(machine))


@functools.cache
def scored_one_by_one(machine: Machine) -> Tensors:
    """Logits of networks that the CPU has trained one after another, see `scored_together`."""
    return scored_together(machine, "cpu", together=False)


def other_checks(machine: Machine) -> Checks:
    """Check all parts other than matching gradients and experts."""
    both = (machine.device, "cpu")
    return [
        (
            "three iterations with momentum and limits, float64, against the CPU",
            lambda: compared(*(distilled(machine, device) for device in both)),
        ),
        ("augmentation, the worst operation, float64, against the CPU", lambda: worst_augmentation(both)),
        ("augmentation twice with deterministic algorithms, equal bits", lambda: repeated_augmentation(machine)),
        (
            "MetaDD's gradient, float64, against the CPU",
            lambda: compared(*(metadd_gradient(machine, device) for device in both)),
        ),
        (
            "instance norm and its derivatives, float64, against torch's",
            lambda: compared(normalised(machine.device, explicit=True), normalised(machine.device, explicit=False)),
        ),
        (
            "training for evaluation, float64, against the CPU",
            lambda: compared(*(evaluated(machine, device) for device in both)),
        ),
        (
            "three networks trained together for evaluation, float64, against the CPU one by one",
            partial(together_check, machine, False),
        ),
    ]


EVERY = (matching_checks, rounding_checks, other_checks, expert_checks, architecture_checks, compiled_checks)
"""What runs do by default comes first: compiled steps in every precision, and their CUDA graphs."""


def works(machine: Machine, _: Clock) -> list[Work]:
    """List every check."""
    return [Work({"what": what}, check) for checks in EVERY for what, check in checks(machine)]


SECTION = Section(
    "exactness",
    "1. Is it exact?",
    "Relative norm of the difference: of images / soft labels / step size where it is a matching gradient, else of "
    "what is named. Everything is augmented where it can be. The limit says that something is wrong, not how good it "
    "is.",
    ("what", "error", "1 - cosine", "limit", "verdict"),
    seconds=125,
    least=5,
    works=works,
)
