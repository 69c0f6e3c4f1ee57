"""Tests the floor under the time of the matching gradient: what it counts, how it is timed, and where it is shown."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCH = {"matching": "bench_matching", "published": "published_matching", "floor": "floor"}
LAYERS, STEPS, BATCH, CHUNK = 2, 3, 8, 4
FORWARD = {"convolution": LAYERS, "gradient of the filters": LAYERS, "gradient of the input": LAYERS - 1}
"""Convolutions for a student's gradient. Nothing needs the gradient in the first layer's input."""
REVERSE = {
    "convolution": LAYERS + 2 * LAYERS - 1,
    "gradient of the filters": 2 * LAYERS - 1,
    "gradient of the input": 3 * LAYERS - 1,
}
"""Convolutions for the derivative of <v, g>. Along v each layer also convolves its input with v's filters, and all but
the first layer, whose images do not move, the movement of their input. Each convolution then has its gradients, but
for those in v's filters."""
UNROLLED = 9 * LAYERS - 3
"""Convolutions of a step that is unrolled: three for g, then two gradients of each layer's convolution, and four of the
derivatives of its two gradients. The first layer has no gradient in its input, which spares it three."""


@pytest.fixture(autouse=True)
def _without_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    # Steps are only traced.
    monkeypatch.setattr("datm_ray.methods.trajectory.step_functions.compiler_problem", lambda _: "")


def tiny(bench: SimpleNamespace, **given: Any) -> Any:
    shape = bench.matching.Shape("tiny", LAYERS, 4, (3, 8, 8), 4, BATCH, CHUNK, (BATCH, 2))
    return bench.matching.Method(shape, STEPS, **given)


@pytest.mark.parametrize("shards", [1, 2])
def test_our_floor_counts_every_chunk_of_every_step(bench: SimpleNamespace, shards: int) -> None:
    """Our convolutions are those of the compiled steps, for each chunk of a shard's part of the minibatch."""
    method = tiny(bench, shards=shards)
    problem = bench.published.make_problem(method.shape.spec, BATCH, 1)
    counts, of_a_step = bench.matching.Ours(method, problem.network, shards - 1).operations()
    kinds: Counter[str] = Counter()
    for each, count in counts.items():
        kinds[str(each).partition(":")[0]] += count
        assert not each.is_convolution or each.arguments[0].shape[0] == CHUNK
    calls = STEPS * BATCH // shards // CHUNK
    assert {kind: kinds[kind] for kind in FORWARD} == {k: calls * (FORWARD[k] + REVERSE[k]) for k in FORWARD}
    assert of_a_step == 11 * LAYERS - 4 == sum(FORWARD.values()) + sum(REVERSE.values())
    assert kinds["product"] == calls * (3 + 8)  # a layer of its own kind, whose input needs a gradient


@pytest.mark.parametrize("name", ["unrolling", "tesla"])
def test_published_floors_are_counted_from_two_steps(bench: SimpleNamespace, name: str) -> None:
    """Convolutions of many steps follow from those of one and of two, and equal those of a whole call."""
    compute = getattr(bench.published, name)
    problem = bench.published.make_problem(tiny(bench).shape.spec, BATCH, STEPS)
    counts = bench.floor.operations_of_steps(compute, problem, STEPS)
    assert counts == bench.floor.operations_of(lambda: compute(problem))
    # Unrolling needs no gradient in the first step's filters, and spares one a layer. TESLA spares these in all
    # steps, and has each step's gradient once more.
    expected = UNROLLED * STEPS - LAYERS if name == "unrolling" else (UNROLLED - LAYERS + 3 * LAYERS - 1) * STEPS
    assert bench.matching.convolutions(counts) == expected


def test_each_operation_is_timed_in_its_faster_order(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor adds count times seconds of the faster memory order, which later turns no longer search."""
    problem = bench.published.make_problem(tiny(bench).shape.spec, BATCH, 1)
    counts = bench.floor.operations_of(lambda: bench.published.tesla(problem))
    seconds = bench.floor.Alone(counts, "cpu", "float32").seconds()
    assert 0 < seconds < 60
    tried = []

    def timed(operation: Any, order: torch.memory_format, device: str) -> float:
        tried.append(order)
        return 2.0 if operation.is_convolution == (order == torch.channels_last) else 3.0

    monkeypatch.setattr(bench.floor.Operation, "seconds", timed)
    alone = bench.floor.Alone(counts, "cpu", "float32")
    assert alone.seconds() == alone.seconds() == 2 * sum(counts.values())
    assert len(tried) == 3 * len(counts)


def test_the_table_has_the_floor_and_the_best_ratio(bench: SimpleNamespace) -> None:
    """A line has a cell for every column, also if a method failed, or was measured before there was a floor."""
    report = {"convolutions": 29.0, "trace": 0, "warm_up": 1.0}

    def worker(name: str, seconds: float, alone: dict[str, float]) -> Any:
        calls = [{"seconds": seconds, "loss": 1.0, "peak": 2.0**20, **alone}] * 2
        return SimpleNamespace(method=tiny(bench, name=name), calls=calls, report=report)

    ours = worker("ours", 2.0, {"alone": 1.5})
    rows = [bench.matching.summary(each, ours) for each in (worker("unrolling", 4.5, {"alone": 3.0}), ours)]
    failed = {**rows[0], "calls": [], "failed": "out of memory"}
    before = {**rows[0], "calls": worker("unrolling", 4.5, {}).calls, "best_ratios": []}
    cells = [
        dict(zip(bench.matching.COLUMNS, bench.matching.table_line(row).split("|")[1:-1], strict=True))
        for row in (*rows, failed, before)
    ]
    shown = [[line[name].strip().split(" ")[0] for name in ("alone, s", "share", "best ratio")] for line in cells]
    assert shown == [["3", "0.667", "3"], ["1.5", "0.75", "1.33"], ["", "", ""], ["", "", ""]]
