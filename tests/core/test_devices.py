"""Tests that every computation stays on its tensors' device; see `tests/other_device.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.epochs import expert_epochs
from datm_ray.config import DistillConfig, ExpertConfig, NetworkSpec, RecoverConfig
from datm_ray.core.images.augment import augment, draw_augmentation, parse_strategy
from datm_ray.core.images.batches import rows_on
from datm_ray.core.metadd import MetaDD
from datm_ray.core.networks.parameters import FlatNetwork, flatten
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import StackFunctions
from datm_ray.core.steps import finished, result_of
from datm_ray.core.synthetic import SyntheticSet, hard_logits, mean_correct_in_steps
from datm_ray.core.training.experts import ExpertState
from datm_ray.core.training.labelling import (
    DrawnLabels,
    apply_views,
    draw_views,
    images_fingerprint,
    pack_logits,
    teacher_logits,
)
from datm_ray.core.training.loop import Schedule, Training
from datm_ray.core.training.teacher import Lessons, StoredLessons, Teacher
from datm_ray.methods.recovery import Recovery
from datm_ray.methods.state import Descent, MetaTerm
from datm_ray.methods.trajectory.iteration import Match, MatchingState, Origin
from datm_ray.methods.trajectory.matching import draw_student_steps, place_steps
from datm_ray.methods.trajectory.step_functions import Order, StepOptions, StudentStepFunctions
from tests.other_device import DEVICE, OtherDevice
from tests.training import accuracy, train

STRATEGY = "color_crop_cutout_flip_scale_rotate"
SPEC = NetworkSpec(channels=3, size=(8, 8), classes=4, width=4, depth=2)


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Flags of values that are not finite must read as zero; a mean over shards must not divide by zero.
    monkeypatch.setattr("datm_ray.methods.trajectory.matching._agreed", lambda loss, all_sum: 1.0)
    with OtherDevice(torch.zeros):
        yield


def there(spec: NetworkSpec = SPEC, seed: int = 0) -> nn.Module:
    return build_network(spec, seed).to(DEVICE)


def tensor(*shape: int) -> Tensor:
    return torch.empty(shape, device=DEVICE)


def classes(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64, device=DEVICE)


def synthetic_set() -> SyntheticSet:
    return SyntheticSet(tensor(6, 3, 8, 8), tensor(6, 4), torch.full((1,), 0.01, device=DEVICE), classes(6))


def failures(cases: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """Errors by case."""

    def failure(case: Callable[[], Any]) -> str:
        try:
            case()
        except Exception as failed:
            return f"{type(failed).__name__}: {failed}"
        return ""

    return {name: wrong for name, case in cases.items() if (wrong := failure(case))}


def test_mixing_is_noticed() -> None:
    """Mixing a CPU tensor with one of the device fails, except for a number in element-wise operations."""
    with pytest.raises(RuntimeError, match="mixes devices"):
        tensor(3) + torch.zeros(3)
    with pytest.raises(RuntimeError, match="mixes devices"):
        tensor(3)[torch.zeros(2, dtype=torch.int64)]
    with pytest.raises(RuntimeError, match="mixes devices"):
        torch.stack([tensor(), torch.zeros(())])
    assert (tensor(3) * torch.ones(())).device == DEVICE
    assert tensor(3).cpu().isfinite().all()


@pytest.mark.parametrize("order", ["reverse-over-forward", "reverse-over-reverse"])
def test_a_distillation_stays_on_its_device(order: Order) -> None:
    """Matching, MetaDD, momentum, limits, and saving and restoring stay on one device."""
    functions = StudentStepFunctions(FlatNetwork(there()), StepOptions(compiled=False, order=order))
    start = flatten(functions.network.module)
    metadd = MetaDD([there(), there(SPEC.model_copy(update={"architecture": "lenet"}))])
    settings = DistillConfig(learning_rate_images=1.0, learning_rate_step_size=0.0, threshold=1e9, gradient_limit=1e-3)
    state = MatchingState(synthetic_set(), settings)
    for _ in range(2):
        steps = place_steps(draw_student_steps(6, 2, 4, STRATEGY, 0, state.iteration), 3, start)
        meta = MetaTerm(metadd, 2, np.arange(5), 6)
        state.step([Match(functions, start, torch.rand_like(start), steps)], [Origin(0, 0)], meta=meta)
        held, shared = state.to_arrays()
        state = MatchingState.from_arrays(held, dict(shared), state.settings, DEVICE)
    assert state.synthetic.images.device == state.momenta["step_sizes"].device == DEVICE


@pytest.mark.parametrize("extra", ["", "MetaDD", "augmented MetaDD"])
def test_an_iteration_waits_for_its_device_twice(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is waited for between the sweeps, for the loss, and once after them; blocking copies to it count too."""
    waits: list[str] = []
    read = OtherDevice._read

    def recorded(self: OtherDevice, tensor: Tensor) -> Tensor:
        waits.append("reverse" if functions.reversed_ else "forward")
        return read(self, tensor)

    def sent(self: OtherDevice, tensor: Tensor) -> None:
        waits.append("sent")

    class Functions(StudentStepFunctions):
        reversed_ = 0

        def reverse(self, *arguments: Tensor) -> Any:
            self.reversed_ += 1
            return super().reverse(*arguments)

    functions = Functions(FlatNetwork(there()), StepOptions(compiled=False))
    start = flatten(functions.network.module)
    settings = DistillConfig(learning_rate_images=1.0, threshold=1e9)
    metadd, draw = MetaDD([there(), there(SPEC.model_copy(update={"architecture": "lenet"}))]), np.random.default_rng(0)
    seen = [draw_augmentation(STRATEGY, 1, draw) for _ in range(6)] if "augmented" in extra else []
    meta = MetaTerm(metadd, 2, np.arange(6), 6, seen, chunk=4) if extra else None
    state, counts = MatchingState(synthetic_set(), settings), []
    monkeypatch.setattr("datm_ray.methods.trajectory.matching._agreed", lambda loss, _: float(loss.tolist() or 1.0))
    monkeypatch.setattr(OtherDevice, "_read", recorded)
    monkeypatch.setattr(OtherDevice, "_sent", sent)
    for steps in (2, 5):
        waits.clear()
        functions.reversed_ = 0
        placed = place_steps(draw_student_steps(6, steps, 4, STRATEGY, 0, 0), 3, start)
        assert set(waits) <= {"sent"}
        waits.clear()
        state.step([Match(functions, start, torch.rand_like(start), placed)], [Origin(0, 0)], meta=meta)
        counts.append([waits.count(each) for each in ("forward", "reverse", "sent")])
    assert counts == [[1, 1, 0]] * 2
    assert len(state.meta_history) == 2 * bool(extra)


@pytest.mark.parametrize("method", ["DM", "SRe2L"])
def test_an_iteration_of_another_method_waits_for_its_device_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An iteration of DM, or an update of recovered images, waits for a GPU once, with MetaDD or without."""
    read, reads = OtherDevice._read, list[Tensor]()
    monkeypatch.setattr(OtherDevice, "_read", lambda self, tensor: reads.append(tensor) or read(self, tensor))
    metadd = MetaDD([there(), there(SPEC.model_copy(update={"architecture": "lenet"}))])
    meta, settings = MetaTerm(metadd, 2, np.arange(6), 6), DistillConfig(learning_rate_images=1.0)
    monkeypatch.setattr(OtherDevice, "_sent", lambda *_: pytest.fail("the device was waited for"))

    def case(meta: MetaTerm | None) -> int:
        reads.clear()
        if method == "DM":
            own = iter([tensor(), tensor(6, 3, 8, 8)])
            state = Descent(synthetic_set(), settings)
            state.step(lambda: (next(own), next(own)), meta=meta)
        else:
            state, values = Recovery(synthetic_set(), settings), (tensor(),) * 5 if meta else ()
            bounds = (tensor(3, 1, 1), tensor(3, 1, 1))
            state.follow(tensor(6, 3, 8, 8), tensor(), tensor(), RecoverConfig(), bounds, values)
        assert len(state.meta_history) == bool(meta)
        return len(reads)

    assert case(meta) == case(None) == 1


def test_images_are_gathered_where_they_lie() -> None:
    """Images are gathered on their device, named with its index or without, and those of main memory are copied."""
    rows, index = torch.tensor([2, 0, 0]), torch.device(DEVICE.type, 0)
    assert index != DEVICE  # as `cuda:0` and `cuda`
    for images, device in ((tensor(5, 3, 8, 8), DEVICE), (tensor(5, 3, 8, 8), index), (torch.rand(5, 3, 8, 8), index)):
        found = rows_on(images, rows, device)
        assert (tuple(found.shape), found.device.type) == ((3, 3, 8, 8), DEVICE.type), (images.device, device)
    here = torch.rand(5, 3, 8, 8)
    assert torch.equal(rows_on(here, rows, torch.device("cpu")), here[rows])


def test_every_operation_of_augmentation_stays_on_its_device() -> None:
    """Every augmentation and its derivative stay on the device of the images."""

    def case(operation: str) -> None:
        images = tensor(5, 3, 8, 8).requires_grad_()
        result = augment(images, draw_augmentation(operation, 5, np.random.default_rng(0)))
        torch.autograd.grad(result.sum(), images)

    assert not failures({name: lambda name=name: case(name) for name in parse_strategy(STRATEGY)})  # type: ignore[misc]


def test_labelling_stays_on_its_device() -> None:
    """Views and the teacher's logits stay on the device of the images, and are packed from there."""
    images, views = tensor(7, 3, 8, 8), draw_views(0, 0, 7, (8, 8))
    logits = teacher_logits(there(), images, views.take(slice(5)), 3)
    assert (logits.device, logits.shape) == (DEVICE, (5, 4))
    values, indices = pack_logits(logits, 2)
    assert (values.shape, indices.shape) == ((5, 3), (5, 2))
    assert len(images_fingerprint(images)) == 16


def test_a_set_in_main_memory_is_labelled_and_trained_on_elsewhere() -> None:
    """Only the images of a batch are copied to the device of the teacher and of the network in training."""
    images, teacher, views = torch.rand(7, 3, 8, 8), there(), draw_views(0, 0, 7, (8, 8))
    shown = apply_views(images, views, DEVICE)
    assert (shown.device, shown.shape) == (DEVICE, images.shape)
    assert teacher_logits(teacher, images, views, 3).device == DEVICE
    labels = DrawnLabels(teacher, images, 0, 1, views={}, at_once=2)
    lessons = {"drawn": StoredLessons(labels), "teacher": Teacher(teacher, cutmix=1.0, at_once=2), "none": None}

    def case(lessons: Lessons | None) -> None:
        schedule = Schedule(1, 4, 0.1, augmentation="resized+flip", micro_batch=3)
        train(Training(there(seed=1), images, classes(7), schedule, 0), lessons)

    assert not failures({name: lambda each=each: case(each) for name, each in lessons.items()})  # type: ignore[misc]


def test_experts_stay_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts stay on their device, alone or stacked, by SGD or GSAM, in parts of a batch."""
    monkeypatch.setattr(StackFunctions, "_in_cache", lambda *_: 2)

    def case(spec: NetworkSpec, stacked: int, gsam: bool, images: Tensor | None = None) -> None:
        images = tensor(5, 3, 8, 8) if images is None else images
        networks = [there(spec, seed) for seed in range(stacked)]
        functions = StackFunctions(networks[0], stacked=stacked, compile_=False)
        settings = ExpertConfig(
            epochs=1,
            batch_size=3,
            learning_rate=0.1,
            momentum=0.9,
            weight_decay=1e-4,
            augmentation=STRATEGY,
            optimiser="gsam" if gsam else "sgd",
            rho=0.1,
        )
        state = ExpertState.initial(networks)
        for losses in expert_epochs(functions, images, classes(5), settings, range(stacked), state):
            assert losses.device == state.parameters.device == state.buffers.device == DEVICE

    cases: dict[str, Callable[[], Any]] = {
        "one, SGD": lambda: case(SPEC, 1, False),
        "side by side, GSAM": lambda: case(SPEC, 2, True),
        "images in main memory": lambda: case(SPEC, 2, False, torch.rand(5, 3, 8, 8)),
        "batch statistics, GSAM": lambda: case(SPEC.model_copy(update={"norm": "batch"}), 2, True),
        "vectorised, SGD": lambda: case(SPEC.model_copy(update={"architecture": "mlp"}), 2, False),
    }
    assert not failures(cases)


def test_evaluation_stays_on_its_device() -> None:
    """Evaluation stays on its device with either optimiser, scoring, hard labels and soft labels."""
    images, network = tensor(5, 3, 8, 8), there()

    def case(schedule: Schedule, targets: Tensor) -> None:
        train(Training(network, images, targets, schedule, 0))

    schedule = Schedule(2, 3, 0.1, momentum=0.9, augmentation=STRATEGY, decay_epoch=1)
    cases: dict[str, Callable[[], Any]] = {
        "SGD": lambda: case(schedule, tensor(5, 4)),
        "AdamW": lambda: case(replace(schedule, optimiser="adamw"), classes(5)),
        "accuracy": lambda: accuracy(network, images, classes(5)),
        "accuracy on images in main memory": lambda: accuracy(network, torch.rand(5, 3, 8, 8), classes(5)),
        "attention": lambda: accuracy(there(SPEC.model_copy(update={"architecture": "vit-small"})), images, classes(5)),
        "hard labels": lambda: hard_logits(classes(5), 4),
        "soft labels": lambda: result_of(
            mean_correct_in_steps([finished(tensor(5, 4)), finished(tensor(5, 4))], classes(5))
        ),
    }
    assert not failures(cases)


def test_a_compiled_step_makes_no_tensor_elsewhere() -> None:
    """A traced graph names no device but that of its arguments, and holds no constant of another."""
    functions = StudentStepFunctions(FlatNetwork(there()), StepOptions(compiled=False, order="reverse-over-forward"))
    for graph in functions.graphs(2, (3, 8, 8), 4):
        assert not {node.kwargs["device"] for node in graph.graph.nodes if "device" in node.kwargs} - {DEVICE}
        assert not [node for node in graph.graph.nodes if node.op == "get_attr"]
