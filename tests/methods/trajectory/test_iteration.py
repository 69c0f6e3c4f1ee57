"""Tests the state of a distillation: its updates, its refusals and its checkpoints."""

from __future__ import annotations

import copy
import math
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datm_ray.config import DistillConfig, MetaLossConfig, NetworkSpec
from datm_ray.core.metadd import MetaDD
from datm_ray.core.networks.parameters import FlatNetwork, flatten
from datm_ray.core.networks.registry import build_network
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.errors import DivergenceError
from datm_ray.methods.state import MetaTerm
from datm_ray.methods.trajectory import iteration
from datm_ray.methods.trajectory.iteration import IterationRecord, Match, MatchingState, Origin
from datm_ray.methods.trajectory.matching import MatchingGradient, draw_student_steps, place_steps
from datm_ray.methods.trajectory.step_functions import StepOptions, StudentStepFunctions

RATES = (3.0, 2.0, 1e-3)
SETTINGS = DistillConfig(
    learning_rate_images=RATES[0],
    learning_rate_labels=RATES[1],
    learning_rate_step_size=RATES[2],
    gradient_limit=None,
)
LEARNED = ("images", "soft_labels", "step_sizes")


def make_state(**changes: Any) -> MatchingState:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(6, 1, 8, 8, generator=draw)
    soft_labels = torch.randn(6, 3, generator=draw)
    return MatchingState(
        SyntheticSet(images, soft_labels, torch.tensor([0.05]), torch.arange(3).repeat_interleave(2)),
        SETTINGS.model_copy(update=changes),
    )


def make_gradient(loss: float = 0.5, seed: int = 0) -> MatchingGradient:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((6, 1, 8, 8), (6, 3), ())
    return MatchingGradient(loss, *(torch.randn(shape, generator=draw) for shape in shapes))


class Scripted:
    """Steps a state with gradients given in advance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, state: MatchingState, gradient: MatchingGradient) -> IterationRecord:
        self.monkeypatch.setattr(iteration, "matching_gradient", lambda *_, **__: copy.deepcopy(gradient))
        nothing = torch.empty(0)
        (record,) = state.step([Match(None, nothing, nothing, [])], [Origin(4, 7)])  # type: ignore[arg-type]
        return record


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    return Scripted(monkeypatch)


def everything(state: MatchingState) -> dict[str, np.ndarray]:
    held, shared = state.to_arrays()
    return {name: array.copy() for name, array in {**held, **shared}.items()}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert list(one) == list(other)
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        assert array.tobytes() == other[name].tobytes(), name


class Spoiled(MetaDD):
    """MetaDD with a finite loss and a gradient that is not finite."""

    def gradient(self, *arguments: Any, **options: Any) -> Any:
        loss, gradient = super().gradient(*arguments, **options)
        gradient[-1] = math.nan
        return loss, gradient


@pytest.mark.parametrize(("kind", "variance"), [(MetaDD, 1e300), (Spoiled, 1.0)], ids=["loss", "gradient"])
def test_metadd_that_is_not_finite_skips_the_iteration(
    kind: type[MetaDD], variance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A MetaDD gradient that is not finite skips the update; repeated, it is an error that names the weights."""
    module = build_network(NetworkSpec(channels=1, size=(8, 8), classes=3, width=2, depth=1), 0)
    other = build_network(NetworkSpec(channels=1, size=(8, 8), classes=3, width=3, depth=1), 1)
    functions = StudentStepFunctions(FlatNetwork(module), StepOptions(compiled=False))
    labels = torch.arange(3)
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    state = MatchingState(
        SyntheticSet(images, torch.zeros(3, 3), torch.tensor([0.1]), labels),
        DistillConfig(threshold=9.0),
    )
    start = flatten(module)
    steps = place_steps(draw_student_steps(3, 1, 3, "", 0, 0), None, start)
    meta = MetaTerm(kind([module, other], MetaLossConfig(variance=variance)), 2, np.arange(3), 3)
    arguments: Any = ([Match(functions, start, start + 1, steps)], [Origin(0, 0)])
    (record,) = state.step(*arguments, meta=meta)
    assert record.skipped
    assert 0 < record.loss < 9
    assert torch.equal(state.synthetic.images, images)
    assert (state.iteration, state.diverged, state.meta_history, state.momenta) == (1, 1, [], {})
    monkeypatch.setattr(iteration, "MOST_DIVERGED", 2)
    with pytest.raises(DivergenceError, match=r"MetaDD's loss or gradient is not finite.*metadd\.variance"):
        state.step(*arguments, meta=meta)


def test_all_processes_blame_metadd_for_a_gradient_that_one_of_them_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes name MetaDD's weights for a bad gradient in one process."""
    monkeypatch.setattr(iteration, "MOST_DIVERGED", 1)
    monkeypatch.setattr(iteration, "matching_gradient", lambda *_, **__: make_gradient())
    barrier, parts, errors = threading.Barrier(2), {}, {}
    nothing = torch.empty(0)

    def process(name: str, matches: Any, is_lost: bool) -> None:
        def all_sum(tensor: Tensor) -> Tensor:
            parts[name] = tensor
            barrier.wait(30)
            total = parts["matching"] + parts["auxiliaries"]
            barrier.wait(30)
            return total

        state: Any = make_state()
        state.meta_gradient = lambda *_: ({}, torch.tensor([0.0] * 5 + [is_lost]))
        try:
            state.step(matches, [Origin(4, 7)], sum_over_backbones=all_sum)
        except DivergenceError as error:
            errors[name] = str(error)

    match: Any = Match(None, nothing, nothing, [])  # type: ignore[arg-type]
    each = (("matching", [match], False), ("auxiliaries", [], True))
    threads = [threading.Thread(target=process, args=arguments) for arguments in each]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors["matching"] == errors["auxiliaries"]
    assert "MetaDD's loss or gradient is not finite" in errors["matching"]


def test_update_is_torchs_sgd_with_the_published_momenta(step: Scripted) -> None:
    """The update equals torch's SGD with momentum 0.5 for images, 0.9 for labels, 0.5 for the step size."""
    state, reference = make_state(), make_state().synthetic
    optimizers = [
        torch.optim.SGD([getattr(reference, name)], rate, momentum)
        for name, rate, momentum in zip(LEARNED, RATES, (0.5, 0.9, 0.5), strict=True)
    ]
    for turn in range(6):
        gradient = make_gradient(seed=turn)
        step(state, gradient)
        for name, optimizer in zip(LEARNED, optimizers, strict=True):
            value = gradient.step_size[None] if name == "step_sizes" else getattr(gradient, name)
            getattr(reference, name).grad = value.clone()
            optimizer.step()
    for name in LEARNED:
        torch.testing.assert_close(getattr(state.synthetic, name), getattr(reference, name), rtol=1e-5, atol=1e-5)
    assert torch.equal(state.synthetic.labels, reference.labels)


def test_hard_labels_stay_fixed(step: Scripted) -> None:
    """Hard labels have learning rate 0 in the update and in the first-order decrease."""
    state, gradient = make_state(labels="hard"), make_gradient()
    labels, images = state.synthetic.soft_labels.clone(), state.synthetic.images.clone()
    record, soft = step(state, gradient), first_order_decrease(gradient) / gradient.loss
    assert torch.equal(state.synthetic.soft_labels, labels)
    assert not torch.equal(state.synthetic.images, images)
    assert record.decrease == pytest.approx(soft - 2.0 * float(gradient.soft_labels.square().sum()) / gradient.loss)


def test_iteration_is_recorded(step: Scripted) -> None:
    """Each iteration is recorded, with the step size after its update."""
    state = make_state()
    record = step(state, make_gradient(0.25))
    step_size, decrease = float(state.synthetic.step_size), first_order_decrease(make_gradient()) / 0.25
    assert record == IterationRecord(0, 0, 4, 7, 0.25, step_size, skipped=False, decrease=pytest.approx(decrease))
    assert record.step_size != pytest.approx(0.05)
    assert step(state, make_gradient(0.5)).iteration == 1
    assert state.history[0] == record
    assert state.iteration == 2


def test_loss_above_its_limit_is_skipped_and_counted(step: Scripted) -> None:
    """A loss above the threshold changes neither set nor momenta; a loss equal to it is taken."""
    state = make_state(threshold=1.0)
    step(state, make_gradient(0.5))
    before = everything(state)
    assert step(state, make_gradient(1.0001)).skipped
    after = everything(state)
    for name in before:
        if not name.startswith("history"):
            assert np.array_equal(before[name], after[name]), name
    assert (state.iteration, state.skipped) == (2, 1)
    assert not step(state, make_gradient(1.0)).skipped
    assert state.skipped == 1


def test_step_size_of_a_backbone_that_is_skipped_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A skipped backbone keeps its step size and momentum while the others change."""
    losses = iter([0.5, 0.5, 0.5, 2.0])
    monkeypatch.setattr(
        "datm_ray.methods.trajectory.iteration.matching_gradient",
        lambda *_, **__: make_gradient(next(losses), seed=0),
    )
    state = make_state()
    state.synthetic = replace(state.synthetic, step_sizes=torch.tensor([0.05, 0.05]))
    matches: list[Any] = [Match(None, None, None, (), number) for number in (0, 1)]  # type: ignore[arg-type]
    origins = [Origin(0, 0)] * 2
    state.step(matches, origins)
    before, momentum = state.synthetic.step_sizes.clone(), state.momenta["step_sizes"].clone()
    assert [record.skipped for record in state.step(matches, origins)] == [False, True]
    assert state.synthetic.step_sizes[1] == before[1]
    assert state.momenta["step_sizes"][1] == momentum[1]
    assert state.synthetic.step_sizes[0] != before[0]


def first_order_decrease(gradient: MatchingGradient) -> float:
    """How far a step of SGD along a gradient lowers the loss to first order."""
    parts = (gradient.images, gradient.soft_labels, gradient.step_size)
    return sum(rate * float((part * part).sum()) for rate, part in zip(RATES, parts, strict=True))


def test_an_update_beyond_the_limit_is_shortened(step: Scripted) -> None:
    """An update beyond the limit keeps its direction and gets the allowed first-order decrease."""
    allowed, gradient = 0.25, make_gradient(0.5)
    factor = allowed * 0.5 / first_order_decrease(gradient)
    assert factor < 0.01
    state, reference = make_state(gradient_limit=allowed), make_state()
    record = step(state, gradient)
    shortened = MatchingGradient(
        0.5, *(part * factor for part in (gradient.images, gradient.soft_labels, gradient.step_size))
    )
    step(reference, shortened)
    for name in LEARNED:
        torch.testing.assert_close(getattr(state.synthetic, name), getattr(reference.synthetic, name))
        torch.testing.assert_close(state.momenta[name], reference.momenta[name])
    assert record.decrease == pytest.approx(first_order_decrease(gradient) / 0.5)
    assert (state.shortened, state.skipped) == (1, 0)


def test_the_longer_a_gradient_the_shorter_its_update(step: Scripted) -> None:
    """An exploded gradient moves the set less than one just within the limit."""
    moved = []
    for length in (1.0, 10.0, 1e4):
        state, gradient = make_state(gradient_limit=1.0), make_gradient(0.5)
        scale = length * math.sqrt(0.5 / first_order_decrease(gradient))  # 1: the update that reaches the limit
        for part in (gradient.images, gradient.soft_labels, gradient.step_size):
            part.mul_(scale)
        before = state.synthetic.images.clone()
        step(state, gradient)
        moved.append(float((state.synthetic.images - before).norm()))
    assert moved[1] == pytest.approx(moved[0] / 10, rel=1e-3)
    assert moved[2] == pytest.approx(moved[0] / 1e4, rel=1e-2)


def test_update_within_its_limit_is_taken_whole(step: Scripted) -> None:
    """An update within the limit equals one without a limit, bit for bit."""
    limited, unlimited = make_state(gradient_limit=1e6), make_state()
    for seed in range(3):
        record = step(limited, make_gradient(seed=seed))
        step(unlimited, make_gradient(seed=seed))
        assert record.decrease == pytest.approx(first_order_decrease(make_gradient(seed=seed)) / 0.5)
    assert_same(everything(limited), everything(unlimited))
    assert limited.shortened == 0


def test_gradient_whose_square_overflows_moves_nothing(step: Scripted) -> None:
    """A gradient whose square overflows counts as infinitely long, so its update is zero."""
    state, gradient = make_state(gradient_limit=1.0), make_gradient()
    gradient.images.fill_(3e38)
    before = state.synthetic.clone()
    assert step(state, gradient).decrease == math.inf
    assert all(torch.equal(getattr(state.synthetic, name), getattr(before, name)) for name in LEARNED)
    assert state.shortened == 1


def test_perfect_match_has_nothing_to_shorten(step: Scripted) -> None:
    """A loss and gradient of zero are not shortened."""
    state, gradient = make_state(gradient_limit=1.0), make_gradient(0.0)
    for part in (gradient.images, gradient.soft_labels, gradient.step_size):
        part.zero_()
    assert step(state, gradient).decrease == 0.0
    assert state.shortened == 0


def test_only_the_backbone_beyond_its_limit_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each backbone is shortened by its own loss, gradient and weight; a skipped one counts no length."""
    exploded = make_gradient(0.5, seed=1)
    for part in (exploded.images, exploded.soft_labels, exploded.step_size):
        part.mul_(100)
    gradients = [make_gradient(0.5), exploded, make_gradient(2.0)]
    scripted = iter(copy.deepcopy(gradients))
    monkeypatch.setattr(iteration, "matching_gradient", lambda *_, **__: next(scripted))
    state = make_state(gradient_limit=2 * first_order_decrease(gradients[0]) / 0.5)
    state.synthetic = replace(state.synthetic, step_sizes=torch.full((3,), 0.05))
    before = state.synthetic.images.clone()
    matches: list[Any] = [Match(None, None, None, (), number, 1.0 + number) for number in range(3)]  # type: ignore[arg-type]
    first, second, third = state.step(matches, [Origin(0, 0)] * 3)
    assert first.decrease == pytest.approx(first_order_decrease(gradients[0]) / 0.5)
    assert second.decrease == pytest.approx(2 * first_order_decrease(exploded) / 0.5)
    assert math.isnan(third.decrease)
    assert third.skipped
    factor = state.settings.gradient_limit / second.decrease
    expected = gradients[0].images + 2 * factor * exploded.images
    torch.testing.assert_close(state.synthetic.images, before - RATES[0] * expected, rtol=1e-4, atol=1e-4)
    assert state.shortened == 1


def spoiled(what: str, value: float) -> MatchingGradient:
    """A gradient with one bad value, or with a bad loss."""
    gradient = make_gradient()
    if what == "loss":
        return replace(gradient, loss=value)
    getattr(gradient, what).view(-1)[-1] = value
    return gradient


SPOILED = [
    *((what, value) for what in ("loss", "images", "soft_labels", "step_size") for value in (math.nan, math.inf)),
    ("images", 3e38),  # finite, but the update is not
    ("step_size", 100.0),  # it would become -0.05
    ("step_size", 60.0),  # -0.01
]


def assert_skipped(before: dict[str, np.ndarray], after: dict[str, np.ndarray], case: object) -> None:
    """Assert that only the history has changed."""
    for name in before:
        if not name.startswith("history"):
            assert before[name].tobytes() == after[name].tobytes(), (name, case)


def test_what_is_not_finite_or_not_positive_is_skipped_and_counted(step: Scripted) -> None:
    """A bad value changes neither set nor momenta, is counted, and does not disturb the next iteration."""
    for what, value in SPOILED:
        for updates in (0, 1):
            state, undisturbed = make_state(), make_state()
            for seed in range(updates):
                step(state, make_gradient(seed=seed))
                step(undisturbed, make_gradient(seed=seed))
            before = everything(state)
            record = step(state, spoiled(what, value))
            assert record.skipped, (what, value)
            assert math.isnan(record.decrease), (what, value)
            assert_skipped(before, everything(state), (what, value))
            assert (state.iteration, state.skipped, state.diverged) == (updates + 1, 1, 1), (what, value)
            step(state, make_gradient(seed=5))
            step(undisturbed, make_gradient(seed=5))
            assert_skipped(everything(undisturbed), everything(state), (what, value))


def test_a_step_size_that_its_momentum_would_turn_negative_is_skipped(step: Scripted) -> None:
    """An update whose momentum makes the step size negative is skipped."""
    state, gradient = make_state(), make_gradient()
    gradient.step_size.fill_(30.0)
    assert not step(state, gradient).skipped  # 0.05 - 0.03
    before = everything(state)
    for value in (10.0, 1.5):  # 0.02 - 0.01 - 0.015
        gradient.step_size.fill_(value)
        assert step(state, gradient).skipped == (value == 10.0)
        if value == 10.0:
            assert_skipped(before, everything(state), value)


def test_only_the_backbone_that_diverges_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A diverging backbone is skipped; the others learn bit for bit as without it."""
    matches: list[Any] = [Match(None, None, None, (), number) for number in range(3)]  # type: ignore[arg-type]
    for what, value in SPOILED:
        if value == 3e38:  # the sum over backbones overflows
            continue
        states = []
        for middle in (spoiled(what, value), make_gradient(2.0)):  # not finite, or above the limit
            scripted = iter([make_gradient(seed=1), copy.deepcopy(middle), make_gradient(seed=2)] * 2)
            monkeypatch.setattr(iteration, "matching_gradient", lambda *_, s=scripted, **__: copy.deepcopy(next(s)))
            state = make_state()
            state.synthetic = replace(state.synthetic, step_sizes=torch.full((3,), 0.05))
            for _ in range(2):
                records = state.step(matches, [Origin(0, 0)] * 3)
                assert [record.skipped for record in records] == [False, True, False], (what, value)
            assert (state.synthetic.step_sizes != 0.05).tolist() == [True, False, True]
            states.append(state)
        assert_skipped(everything(states[1]), everything(states[0]), (what, value))
        assert [state.diverged for state in states] == [2, 0], (what, value)


def test_shards_skip_what_one_of_them_cannot_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is not finite in one shard makes every shard skip the iteration."""
    for what, value in (("images", math.nan), ("soft_labels", math.inf), ("images", 3e38)):
        gradients = {"good": make_gradient(), "bad": spoiled(what, value)}
        monkeypatch.setattr(
            iteration, "matching_gradient", lambda functions, *_, g=gradients, **__: copy.deepcopy(g[functions])
        )
        barrier, parts, states = threading.Barrier(2), {}, {name: make_state() for name in gradients}

        def shard(name: str, barrier: threading.Barrier = barrier, parts: dict = parts, states: dict = states) -> None:
            def all_sum(tensor: Tensor) -> Tensor:
                parts[name] = tensor
                barrier.wait(30)
                total = parts["good"] + parts["bad"]
                barrier.wait(30)
                return total

            nothing = torch.empty(0)
            states[name].step([Match(name, nothing, nothing, [])], [Origin(4, 7)], all_sum=all_sum)  # type: ignore[arg-type]

        threads = [threading.Thread(target=shard, args=(name,)) for name in gradients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for state in states.values():
            assert (state.iteration, state.diverged, state.momenta) == (1, 1, {}), (what, value)
            assert torch.equal(state.synthetic.images, make_state().synthetic.images), (what, value)


def test_many_divergences_without_an_update_stop_the_run(step: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many divergences in a row stop the run; losses above the limit do not count, an update resets the count."""
    monkeypatch.setattr(iteration, "MOST_DIVERGED", 3)
    bad, above = spoiled("loss", math.inf), make_gradient(2.0)
    state = make_state()
    for gradient in (make_gradient(), bad, above, above, bad):
        step(state, gradient)
    before = everything(state)
    with pytest.raises(
        DivergenceError, match=r"diverged 3 times without an update up to iteration 6: its matching loss is not finite"
    ):
        step(state, bad)
    assert_skipped(before, everything(state), "stopped")
    resumed = MatchingState.from_arrays(*state.to_arrays(), state.settings, torch.device("cpu"))
    assert (resumed.iteration, resumed.diverged) == (6, 3)
    step(resumed, bad)
    step(resumed, bad)
    with pytest.raises(DivergenceError, match="diverged 6 times without an update up to iteration 9"):
        step(resumed, bad)
    for gradient in (make_gradient(), bad, bad, make_gradient(), bad, above, bad):
        step(resumed, gradient)
    with pytest.raises(DivergenceError, match="its gradient, an updated value or a step size is not finite, or not"):
        step(resumed, spoiled("step_size", 100.0))


class Appended(list[IterationRecord]):
    """A history that is never read from its start again."""

    def __iter__(self) -> Any:
        """Refuse."""
        raise AssertionError("the whole history is read")


def test_counts_read_new_records_alone(step: Scripted) -> None:
    """Numbers of skipped, diverged and shortened updates read each record once, also after resuming."""
    state = make_state(gradient_limit=0.25, threshold=0.75)
    gradients = [make_gradient(), spoiled("loss", math.inf), make_gradient(1.0), make_gradient(seed=3)]
    for gradient in gradients:
        step(state, gradient)
    for resumed in (state, MatchingState.from_arrays(*state.to_arrays(), state.settings, torch.device("cpu"))):
        assert (resumed.skipped, resumed.diverged, resumed.shortened) == (2, 1, 2)
        resumed.history, found = Appended(resumed.history), []
        for gradient in gradients:
            step(resumed, gradient)
            found.append((resumed.skipped, resumed.diverged, resumed.shortened))
        assert found == [(2, 1, 3), (3, 2, 3), (4, 2, 3), (4, 2, 4)]


def test_last_set_not_clearly_worse_than_the_best_is_chosen(step: Scripted) -> None:
    """The chosen set is the latest within one standard error of the best validation accuracy."""
    state, kept = make_state(), []
    for accuracy in (0.5, 0.7, 0.65, 0.6):
        step(state, make_gradient())
        kept.append(state.record_validation(accuracy, standard_error=0.06))
        if kept[-1]:
            expected = state.synthetic.images.clone()
    assert kept == [True, True, True, False]
    assert state.validations == [(1, 0.5), (2, 0.7), (3, 0.65), (4, 0.6)]
    assert state.chosen is not None
    assert state.chosen_at == 3
    assert torch.equal(state.chosen.images, expected)
    assert not torch.equal(state.synthetic.images, expected)


def test_images_are_averaged_over_the_updates(step: Scripted) -> None:
    """The average starts from the first images, follows every update, rests if one is skipped, and is what is kept."""
    state, plain = make_state(average_decay=0.75), make_state()
    expected = state.synthetic.images.double()
    for seed in range(3):
        step(state, make_gradient(seed=seed))
        step(plain, make_gradient(seed=seed))
        expected = 0.75 * expected + 0.25 * state.synthetic.images.double()
    assert state.averaged is not None
    torch.testing.assert_close(state.averaged.double(), expected, rtol=1e-5, atol=1e-5)
    before = state.averaged.clone()
    step(state, make_gradient(loss=5.0))
    assert state.history[-1].skipped
    assert torch.equal(state.averaged, before)
    state.record_validation(0.5)
    assert state.chosen is not None
    assert torch.equal(state.chosen.images, before)
    for name in LEARNED:  # what is learned does not depend on the average
        assert torch.equal(getattr(state.synthetic, name), getattr(plain.synthetic, name))
        assert name == "images" or torch.equal(getattr(state.chosen, name), getattr(state.synthetic, name))
    assert plain.averaged is None
    assert plain.result is plain.synthetic


def run(state: MatchingState, iterations: int) -> None:
    """Run iterations of a tiny network, with a validation after every third."""
    spec = NetworkSpec(channels=1, size=(8, 8), classes=3, width=3, depth=2)
    module = build_network(spec, 0)
    functions = StudentStepFunctions(FlatNetwork(module), StepOptions(compiled=False))
    start = flatten(module)
    for _ in range(iterations):
        k = state.iteration
        target: Tensor = start + 0.05 * torch.randn(start.shape, generator=torch.Generator().manual_seed(k))
        steps = place_steps(draw_student_steps(6, 3, 4, "crop_flip", 1, k), None, start)
        state.step([Match(functions, start, target, steps)], [Origin(k % 2, k)])
        if state.iteration % 3 == 0:
            state.record_validation(float(state.synthetic.images.mean()))


@pytest.mark.parametrize(("done", "decay"), [(0, None), (1, None), (5, None), (0, 0.9), (1, 0.9), (5, 0.9)])
def test_resumed_distillation_equals_an_undisturbed_one(done: int, decay: float | None) -> None:
    """A distillation resumed at any iteration equals an uninterrupted one, bit for bit."""
    undisturbed, first = (
        make_state(threshold=1.005, gradient_limit=1.5e-3, average_decay=decay),
        make_state(threshold=1.005, gradient_limit=1.5e-3, average_decay=decay),
    )
    run(undisturbed, 8)
    run(first, done)
    arrays = everything(first)
    resumed = MatchingState.from_arrays(*first.to_arrays(), first.settings, torch.device("cpu"))
    assert_same(everything(resumed), arrays)
    run(resumed, 8 - done)
    assert_same(everything(resumed), everything(undisturbed))
    assert repr(resumed.history) == repr(undisturbed.history)  # nan is not equal to itself
    assert 0 < resumed.skipped < 8
    assert 0 < resumed.shortened < 8 - resumed.skipped
    assert resumed.chosen is not None


def test_saved_arrays_do_not_change_in_the_next_iteration(step: Scripted) -> None:
    """Saved arrays stay unchanged while the next iteration runs, so that a checkpoint can be written then."""
    state = make_state()
    step(state, make_gradient())
    state.record_validation(0.5)
    held, shared = state.to_arrays()
    before = everything(state)
    step(state, make_gradient(seed=1))
    assert_same({**held, **shared}, before)


def test_restored_state_does_not_write_into_its_file() -> None:
    """A state restored from read-only arrays, such as a memory map, does not write into them."""
    arrays = make_state().to_arrays()
    for array in (*arrays[0].values(), *arrays[1].values()):
        array.flags.writeable = False
    run(MatchingState.from_arrays(*arrays, SETTINGS, torch.device("cpu")), 1)


def test_column_that_every_version_saves_is_not_made_up() -> None:
    """A checkpoint without a column that every version saves is damaged."""
    held, shared = make_state().to_arrays()
    with pytest.raises(KeyError, match=r"history\.expert"):
        MatchingState.from_arrays(
            held,
            {name: array for name, array in shared.items() if name != "history.expert"},
            SETTINGS,
            torch.device("cpu"),
        )


def test_state_that_an_earlier_version_saved_resumes() -> None:
    """A checkpoint of an earlier version, with former names or without first-order decreases, resumes."""
    state = make_state()
    run(state, 2)
    held, shared = state.to_arrays()
    former = {**shared, "history.overshoot": np.array([0.25, 4.0])}  # former name
    former.pop("history.decrease")
    resumed = MatchingState.from_arrays(held, former, SETTINGS, torch.device("cpu"))
    assert [record.decrease for record in resumed.history] == [0.25, 4.0]
    shared = {name: array for name, array in shared.items() if name != "history.decrease"}
    resumed = MatchingState.from_arrays(held, shared, SETTINGS, torch.device("cpu"))
    assert [math.isnan(record.decrease) for record in resumed.history] == [True, True]
    run(resumed, 1)
    assert not math.isnan(resumed.history[-1].decrease)
