"""Tests the GPU benchmark without a GPU: bookkeeping, time budget, failures, tables and imports."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datm_ray.config import DistillConfig, NetworkSpec, RunConfig
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.methods.trajectory.iteration import IterationRecord
from datm_ray.planning.machines import FORWARD_PASSES, SPEED
from datm_ray.stages.methods.recovery import GPU_SPEED
from tests.tapes import Tape

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ABSENT = ("ray", "rich", "s3fs", "fsspec", "typer", "jinja2", "matplotlib")
"""Packages that a machine with a GPU need not have."""

Rows = Iterator[dict[str, Any]]


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The benchmark's modules, imported as when it runs."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        names = {"main": "bench_gpu", "sections": "gpu.sections", "machine": "gpu.machine"}
        names |= {each: f"gpu.{each}" for each in ("exactness", "curve", "steps", "networks", "constants", "experts")}
        yield SimpleNamespace(**{short: importlib.import_module(name) for short, name in names.items()})
    finally:
        sys.path.remove(str(BENCHMARKS))


def section(bench: SimpleNamespace, name: str, measure: Callable[..., Rows], seconds: float = 60.0) -> Any:
    return bench.sections.Section(name, name.capitalize(), "A note.", ("what", "value"), seconds, 1.0, measure)


def test_a_failing_section_is_reported_and_stops_no_other(bench: SimpleNamespace) -> None:
    """A failing section keeps its rows and its error, and every row is saved; the others run."""

    def fails(*_: Any) -> Rows:
        yield {"what": "before", "value": 1.0}
        raise ValueError("no such kernel\nmore")

    def works(*_: Any) -> Rows:
        yield bench.sections.tried({"what": "a row"}, lambda: 1 / 0)
        yield {"what": "after", "value": [1.0, 3.0, 2.0]}

    saved: list[list[int]] = []
    machine = bench.machine.Machine("cpu", small=True)
    first, second = bench.sections.run_sections(
        [section(bench, "one", fails), section(bench, "two", works)],
        machine,
        60.0,
        lambda outcomes: saved.append([len(each.rows) for each in outcomes]),
    )
    assert saved == [[1], [1], [1, 1], [1, 2], [1, 2]]
    assert (first.status, first.failures) == ("failed: ValueError: no such kernel", 1)
    assert "Traceback" in first.error
    assert (second.status, second.failures) == ("done", 1)
    assert "| a row | ZeroDivisionError: division by zero |" in second.lines()
    assert "| after | 2 (1 to 3), n = 3 |" in second.lines()
    assert first.as_json()["rows"] == [{"what": "before", "value": 1.0}]


def test_a_section_is_stopped_when_its_time_is_over_and_skipped_where_there_is_none(bench: SimpleNamespace) -> None:
    """A section is interrupted at the end of its time; one without time is skipped in a line."""

    def hangs(*_: Any) -> Rows:
        yield {"what": "before"}
        while True:
            time.sleep(0.01)

    def looks(_: Any, clock: Any) -> Rows:
        yield {"what": "left", "value": clock.left()}
        time.sleep(60.0)

    sections = [section(bench, "one", hangs, 0.2), section(bench, "two", looks), section(bench, "three", hangs)]
    outcomes = bench.sections.run_sections(sections, None, 1.5, lambda _: None)
    assert outcomes[0].status == "stopped: its 0 s were over"
    assert outcomes[0].rows == [{"what": "before"}]
    assert 0.5 < outcomes[1].rows[0]["value"] < 1.3
    assert outcomes[2].status.startswith("skipped: 0 s are left")
    assert not any(each.failures for each in outcomes), "a lack of time is no failure"


def test_what_is_not_exact_is_a_failure(bench: SimpleNamespace) -> None:
    """A section that is not exact counts as a failure of the program."""
    outcome = bench.sections.Outcome(section(bench, "one", lambda *_: iter(())))
    outcome.rows += [{"verdict": "ok"}, {"verdict": "TOO LARGE"}, {"what": "no verdict"}]
    assert outcome.failures == 1


def test_a_gradient_of_zeros_or_in_another_direction_is_not_exact(bench: SimpleNamespace) -> None:
    """A zero or turned gradient is not exact in any precision; one rounded within the limit is."""
    exact, limits = [torch.tensor([1.0, 0.0])], bench.exactness.ROUNDED
    for found, precisions, verdict in (
        ([0.0, 0.0], limits, "TOO LARGE"),
        ([math.nan, 0.0], limits, "TOO LARGE"),
        ([0.2, 0.4], ["bfloat16"], "OTHER DIRECTION"),
        ([1.0, 0.5], ["bfloat16"], "ok"),
        ([1.0, 0.01], limits, "ok"),
    ):
        for precision in precisions:
            row = bench.exactness.compared([torch.tensor(found)], exact, limits[precision])
            assert row["verdict"] == verdict, (found, precision)


def test_every_point_of_the_curve_has_iterations_of_its_own(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No set is scored twice, also where scoring takes longer than a point's share of the time."""
    now = 0.0

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds

    def iterate(state: Any, *_: Any) -> None:
        work(0.1)
        state.history.append(IterationRecord(state.iteration, 0, 0, 0, 0.5, 0.1, False))

    def scored(machine: Any, images: Any, recipe: Any, held: Any, networks: int) -> list[float]:
        work(1.0 * networks)
        return [50.0]

    held = SyntheticSet(torch.zeros(3, 1, 8, 8), torch.zeros(3, 3), torch.ones(1), torch.arange(3))
    experts = SimpleNamespace(real_set=lambda *_: held, predict=None)
    functions = SimpleNamespace(prepare=lambda *_: None)
    fakes = {"_Experts": lambda *_: experts, "StudentStepFunctions": lambda *_: functions, "scored": scored}
    fakes |= {"_iterate": iterate, "correct_rows": lambda *_, **__: None, "random_rows": lambda *_, **__: None}
    fakes |= {"time": SimpleNamespace(monotonic=lambda: now)}
    for name, fake in fakes.items():
        monkeypatch.setattr(bench.curve, name, fake)
    spec = NetworkSpec(channels=1, size=(8, 8), classes=3, width=3, depth=1)
    images = SimpleNamespace(spec=spec, train_labels=torch.arange(3))
    recipe = SimpleNamespace(starts=2, run=RunConfig(distill=DistillConfig(expert_epochs=1)))
    machine, clock = bench.machine.Machine("cpu", small=False), SimpleNamespace(left=lambda: 14.0 - now)
    rows = list(bench.curve.curve(machine, images, recipe, torch.zeros(1, 4, 2), clock))
    iterations = [row["iterations"] for row in rows[1:]]
    assert iterations == sorted(set(iterations))
    assert len(iterations) > 2


@pytest.fixture
def card(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with a GPU of a generation that has TF32."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return bench.machine.Machine("cuda", small=False)


def test_what_a_run_does_by_default_is_measured(bench: SimpleNamespace, card: Any) -> None:
    """On a GPU, steps and experts are those of a run without settings: TF32, channels last, graphs where they gain."""
    options = card.options()
    assert (options.precision, options.channels_last, options.graphs, options.compiled) == ("tf32", True, None, True)
    name, way = next(iter(bench.experts.ways(card).items()))
    assert name == "8 at a time"
    assert (way.precision, way.channels_last, way.compiled, way.one_by_one) == ("tf32", True, True, False)
    others = {"8 one by one, CUDA graph", "8 at a time, channels first", "8 at a time, float32"}
    assert others <= bench.experts.ways(card).keys()


def test_an_iteration_is_measured_as_in_a_run_and_with_what_it_may_change(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows have inputs prepared ahead, the other memory order, and deterministic algorithms, which are really on."""
    modes: list[bool] = []
    original = bench.steps.matching_gradient

    def gradient(*arguments: Any, **options: Any) -> Any:
        modes.append(torch.are_deterministic_algorithms_enabled())
        return original(*arguments, **options)

    monkeypatch.setattr(bench.steps, "matching_gradient", gradient)
    machine = bench.machine.Machine("cpu", small=True)
    rows = list(bench.steps.measure(machine, bench.sections.Clock.of(60.0)))
    methods = [row["method"].removesuffix(", uncompiled") for row in rows if "method" in row]
    wanted = [f"iterations of a run, inputs {ahead}" for ahead in ("ahead", "not ahead")]
    wanted += ["ours", "full unrolling", "ours, channels first", "ours, deterministic", "TESLA"]
    assert set(wanted) == set(methods)
    assert not any("failed" in row for row in rows), rows
    assert {True, False} == set(modes)
    assert not torch.are_deterministic_algorithms_enabled()


def test_networks_are_scored_together_as_in_a_run(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation trains a stack of networks together, and one alone beside it."""
    stacks: list[int] = []
    original = bench.networks.train_together

    def together(functions: Any, stack: Any, *more: Any) -> Any:
        stacks.append(len(stack))
        return original(functions, stack, *more)

    monkeypatch.setattr(bench.networks, "train_together", together)
    machine = bench.machine.Machine("cpu", small=True)
    rows = list(bench.networks.evaluation(machine, bench.sections.Clock.of(60.0)))
    assert [(row["together"], "failed" in row) for row in rows] == [(2, False), (1, False)]
    assert stacks == [2]


def test_what_plans_assume_is_shown_beside_what_the_card_has(bench: SimpleNamespace) -> None:
    """The constants' rows have names, places, the values that plans use, and numbers that were measured."""
    machine = bench.machine.Machine("cpu", small=True)
    rows = list(bench.constants.measure(machine, bench.sections.Clock.of(60.0)))
    shown = {row["constant"]: row["assumed"] for row in rows}
    assert shown['SPEED["GPU"], FLOP/s'] == SPEED["GPU"]
    assert shown['FORWARD_PASSES["training"]'] == FORWARD_PASSES["training"]
    assert shown["GPU_SPEED, of a core"] == GPU_SPEED
    assert all(row["measured"] > 0 for row in rows), rows


def test_bits_of_cuda_graphs_are_compared_with_sums_in_a_fixed_order(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tapes: list[Tape]
) -> None:
    """Graphs are compared under deterministic algorithms: augmentation adds in any order without them."""
    matching, modes = bench.exactness._Matching(bench.machine.Machine("cpu", small=True)), set[bool]()
    original = bench.exactness.matching_gradient

    def gradient(*arguments: Any, **options: Any) -> Any:
        modes.add(torch.are_deterministic_algorithms_enabled())
        return original(*arguments, **options)

    monkeypatch.setattr(bench.exactness, "matching_gradient", gradient)
    row = matching.replayed("float32")
    assert (row["verdict"], row["errors"]) == ("ok", [0.0, 0.0, 0.0])
    assert len(tapes) == 2, "forward and reverse"
    assert modes == {True}, "sums of the augmentation's derivative have a fixed order"


def test_the_workspace_of_cublas_is_fixed_before_torch_is_used() -> None:
    """The package of the benchmark fixes the workspace when it is imported, and a user's own stays."""
    program = "import gpu, os, sys; assert 'torch' not in sys.modules; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    for own, expected in ({}, ":4096:8"), ({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, ":16:8"):
        kept = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
        command = [sys.executable, "-c", program]
        found = subprocess.run(command, cwd=BENCHMARKS, env=kept | own, check=True, capture_output=True, text=True)
        assert found.stdout.strip() == expected


def test_options_that_cannot_be_had_are_one_line(
    bench: SimpleNamespace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown section, or a missing GPU, is one line of error."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for words, wanted in ((["--only", "speed"], "speed is no section"), ([], "torch sees no GPU here")):
        with pytest.raises(SystemExit) as ended:
            bench.main.parsed(words)
        assert ended.value.code == 2
        assert wanted in capsys.readouterr().err


def test_it_needs_neither_ray_nor_commands() -> None:
    """All sections import where neither Ray nor typer is installed."""
    program = (
        f"import sys\nfor name in {ABSENT!r}: sys.modules[name] = None\n"
        "import bench_gpu, facts, datm_ray.data\nassert len(bench_gpu.SECTIONS) == 8\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=BENCHMARKS, check=True, timeout=120)
