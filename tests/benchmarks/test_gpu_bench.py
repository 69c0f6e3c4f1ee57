"""Tests the GPU benchmark without a GPU: bookkeeping, time budget, failures, tables and imports."""

from __future__ import annotations

import ast
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datm_ray.config import ClusterConfig, DistillConfig, NetworkSpec, RunConfig, override
from datm_ray.core.compute.gpu import CONTEXT_BYTES
from datm_ray.core.networks.image_cost import image_cost
from datm_ray.core.networks.registry import build_network
from datm_ray.core.networks.stacked import cost_and_stacking
from datm_ray.core.steps import finished
from datm_ray.core.synthetic import SyntheticSet
from datm_ray.core.training.loop import scoring_schedule, would_gain_together
from datm_ray.methods.trajectory.iteration import IterationRecord
from datm_ray.methods.trajectory.step_functions import REPLAYED_FLOP
from datm_ray.planning.machines import BANDWIDTH, FORWARD_PASSES, LATENCY, SPEED
from datm_ray.planning.memory import GPU_PROCESS_BYTES
from datm_ray.stages.methods.recovery import GPU_SPEED
from tests.tapes import Tape

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ABSENT = ("ray", "rich", "s3fs", "fsspec", "typer", "jinja2", "matplotlib")
"""Packages that a machine with a GPU need not have."""

BENCH = {"main": "bench_gpu", "sections": "gpu.sections", "machine": "gpu.machine"}
BENCH |= {
    name: f"gpu.{name}"
    for name in ("exactness", "curve", "steps", "networks", "constants", "experts", "workers", "sums", "peaks")
}
Rows = Iterator[dict[str, Any]]


def section(bench: SimpleNamespace, name: str, works: Mapping[str, Callable[[], Any]], share: float = 1.0) -> Any:
    def listed(*_: Any) -> list[Any]:
        return [bench.sections.Work({"what": what}, run) for what, run in works.items()]

    return bench.sections.Section(name, name.capitalize(), "A note.", ("what", "value"), share, 1.0, listed)


def rows_of(bench: SimpleNamespace, works: Callable[..., Any], machine: Any) -> list[dict[str, Any]]:
    """Rows of all works, without a limit of time."""
    return [row for work in works(machine, bench.sections.Clock.of(60.0)) for row in work.rows()]


def test_a_failing_row_is_reported_and_stops_no_other(bench: SimpleNamespace) -> None:
    """A failing row has its error, after rows that it gave before; every row is saved, and the others run."""

    def fails() -> Rows:
        yield {"what": "before", "value": 1.0}
        raise ValueError("no such kernel\nmore")

    def unlisted(*_: Any) -> list[Any]:
        raise RuntimeError("nothing to list")

    saved: list[list[int]] = []
    works = {"a row": lambda: 1 / 0, "after": lambda: {"value": [1.0, 3.0, 2.0]}}
    sections = [section(bench, "one", {"first": fails}), section(bench, "two", works), section(bench, "three", {})]
    sections[2] = replace(sections[2], works=unlisted)
    first, second, third = bench.sections.run_sections(
        sections,
        bench.machine.Machine("cpu", small=True),
        60.0,
        lambda outcomes: saved.append([len(each.rows) for each in outcomes]),
    )
    assert saved == [[1], [2], [2], [2, 1], [2, 2], [2, 2], [2, 2, 0]]
    assert (first.status, first.failures, second.status, second.failures) == ("done", 1, "done", 1)
    assert "Traceback" in first.rows[1]["error"]
    assert "| first | ValueError: no such kernel |" in first.lines()
    assert "| a row | ZeroDivisionError: division by zero |" in second.lines()
    assert "| after | 2 (1 to 3), n = 3 |" in second.lines()
    assert first.as_json()["rows"][0] == {"what": "before", "value": 1.0}
    assert (third.status, third.failures) == ("failed: RuntimeError: nothing to list", 1)


def test_what_the_time_does_not_reach_is_listed_by_name(bench: SimpleNamespace) -> None:
    """Works that a section is stopped in or before are listed by name; checks among them are not passed."""

    def hangs() -> Rows:
        yield {"what": "a row of it", "value": 1.0}
        while True:
            time.sleep(0.01)

    def lacking() -> Any:
        raise bench.sections.NotHere("it takes two cards")

    works = {"before": lambda: {"value": 2.0}, "elsewhere": lacking, "long": hangs, "after": lambda: {"value": 3.0}}
    cut, late = section(bench, "one", works), section(bench, "two", {"late": lambda: {}, "later": lambda: {}}, 2.0)
    check = replace(cut, columns=("what", "verdict"))
    for first, unchecked in ((cut, 0), (check, 3)):
        stopped, skipped = bench.sections.run_sections([first, late], None, 1.3, lambda _: None)
        assert stopped.status == "stopped: its 1 s were over"
        assert [row["what"] for row in stopped.rows] == ["before", "a row of it"]
        assert [row["what"] for row in stopped.unreached] == ["elsewhere", "long", "after"]
        lines = stopped.lines()
        for what, remark in (("elsewhere", "not reached: it takes two cards"), ("after", "not reached")):
            assert f"| {what} | {remark} |" in lines
        assert "(stopped: its 1 s were over; 3 not reached; 1 s)" in lines
        assert stopped.as_json()["not reached"] == stopped.unreached
        assert skipped.status.startswith("skipped: 0 s are left")
        assert [row["what"] for row in skipped.unreached] == ["late", "later"]
        assert (stopped.unchecked, skipped.unchecked) == (unchecked, 0)
        assert not stopped.failures + skipped.failures, "a lack of time is no failure"


def test_sections_share_the_time_and_one_alone_has_it_all(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A section has its share of the time that is left: all of it alone, and what earlier ones leave over."""
    now, given = 0.0, list[float]()

    def runs(outcome: Any, machine: Any, seconds: float, save: Any) -> None:
        nonlocal now
        given.append(seconds)
        now += seconds / 2
        outcome.status = "done"

    monkeypatch.setattr(bench.sections, "_run", runs)
    monkeypatch.setattr(bench.sections, "time", SimpleNamespace(monotonic=lambda: now))
    sections = [section(bench, str(share), {}, share) for share in (10.0, 20.0, 30.0)]
    for chosen, minutes, expected in (
        (sections, 1, [10.0, 22.0, 44.0]),
        (sections, 2, [20.0, 44.0, 88.0]),
        (sections[1:2], 2, [120.0]),
    ):
        given.clear()
        bench.sections.run_sections(chosen, None, 60.0 * minutes, lambda _: None)
        assert given == pytest.approx(expected)


def test_what_is_not_exact_is_a_failure(bench: SimpleNamespace) -> None:
    """A section that is not exact counts as a failure of the program."""
    outcome = bench.sections.Outcome(section(bench, "one", {}))
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
    fakes |= {
        "_iterate": iterate,
        "correct_rows_in_steps": lambda *_, **__: finished(None),
        "random_rows": lambda *_, **__: None,
    }
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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
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
    rows = rows_of(bench, bench.steps.works, machine)
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
    original = bench.networks.together_steps

    def together(functions: Any, stack: Any, *more: Any) -> Any:
        stacks.append(len(stack))
        return original(functions, stack, *more)

    monkeypatch.setattr(bench.networks, "together_steps", together)
    machine = bench.machine.Machine("cpu", small=True)
    rows = rows_of(bench, bench.networks.evaluation, machine)
    assert [(row["together"], "failed" in row) for row in rows] == [(2, False), (1, False)]
    assert stacks == [2]


def test_two_processes_have_a_gpu_each_where_there_are_two(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process sees one of the GPUs that this one sees, by its own name; fewer GPUs are shared."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for visible, expected in ((None, ["0", "1"]), ("", ["0", "1"]), ("3,GPU-5a", ["3", "GPU-5a"])):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [bench.sums.own_gpu(rank, 2)["CUDA_VISIBLE_DEVICES"] for rank in range(2)] == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert bench.sums.own_gpu(1, 2) == {}


def test_a_sum_that_takes_no_longer_than_its_latency_has_no_speed(
    bench: SimpleNamespace, card: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cell is empty, and no bandwidth is noted; a longer sum has the speed of its bytes beyond the latency."""
    assert bench.sums.speed(16_000_000, 0.5, 0.1) == pytest.approx(0.04)
    assert bench.sums.speed(16_000_000, 0.1, 0.1) == bench.sums.speed(16_000_000, 0.1, 0.2) == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for shown, noted in (("", set()), (0.04, {("sums", "bandwidth")})):
        row = {"latency, s": 0.1, "GB/s": shown, "seconds": [0.2]}
        monkeypatch.setattr(bench.sums, "together", lambda machine, size, row=row: row)
        bench.sums.noted(card, card, 2)
        assert card.noted.keys() == {("sums", "latency"), *noted}


def test_metadd_is_timed_with_as_many_images_as_fit(bench: SimpleNamespace, card: Any) -> None:
    """On a GPU all images are tried, then half of them until they fit; one that does not fit is an error."""
    tried: list[int] = []

    def call(count: int, most: int) -> None:
        tried.append(count)
        if count > most:
            raise torch.OutOfMemoryError

    assert bench.networks.most_that_fit(card, partial(call, most=30), 100) == 25
    assert tried == [100, 50, 25]
    with pytest.raises(torch.OutOfMemoryError):
        bench.networks.most_that_fit(card, partial(call, most=0), 4)


def test_what_plans_assume_is_shown_beside_what_the_card_has(bench: SimpleNamespace, card: Any) -> None:
    """The constants' rows have names, places, the values that plans use, and numbers that were measured or noted."""
    machine = bench.machine.Machine("cpu", small=True)
    works = {work.what["constant"]: work for work in bench.constants.works(machine, bench.sections.Clock.of(60.0))}
    shown = {name: work.what["assumed"] for name, work in works.items()}
    assert shown['SPEED["GPU"], FLOP/s'] == SPEED["GPU"]
    assert shown['FORWARD_PASSES["training"]'] == FORWARD_PASSES["training"]
    assert shown["GPU_SPEED, of a core"] == GPU_SPEED
    assert (shown["CONTEXT_BYTES"], shown["GPU_PROCESS_BYTES"]) == (CONTEXT_BYTES, GPU_PROCESS_BYTES)
    assert (shown['LATENCY["GPU"], s'], shown['BANDWIDTH["GPU"], bytes/s']) == (LATENCY["GPU"], BANDWIDTH["GPU"])
    assert shown["REPLAYED_FLOP"] == REPLAYED_FLOP
    passes = ('FORWARD_PASSES["training"]', 'FORWARD_PASSES["experts"]')
    for name in ('SPEED["GPU"], FLOP/s', "GPU_SPEED, of a core", *passes):
        (row,) = works[name].rows()
        assert row["measured"] > 0, row
    for name in ("CONTEXT_BYTES", "REPLAYED_FLOP", 'LATENCY["GPU"], s'):
        with pytest.raises(bench.sections.NotHere):
            list(works[name].rows())
    pairs = {("CIFAR-10 IPC 10", "no "): 3.0, ("CIFAR-10 IPC 10", ""): 2.0}
    pairs |= {("CIFAR-100 IPC 50", "no "): 5.05, ("CIFAR-100 IPC 50", ""): 5.0}
    for (shape, graphs), seconds in pairs.items():
        card.noted["steps", shape, f"ours, {graphs}CUDA graphs", "tf32"] = seconds
    assert bench.constants.graphs_gain(card) == "1e+10: 1.50 times as fast; 5.1e+10: 1.01 times as fast"


def test_every_assumed_constant_has_a_row_or_a_reason(bench: SimpleNamespace) -> None:
    """Each constant whose docstring names an assumption is measured by `make gpu`, or is listed with why it is not."""
    package, found = BENCHMARKS.parent / "datm_ray", set[tuple[str, str]]()
    for path in package.rglob("*.py"):
        body = ast.parse(path.read_text()).body
        for statement, after in pairwise(body):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(statement, ast.Assign) and is_text and "assumed" in str(after.value.value).lower():
                names = [each.id for each in ast.walk(statement.targets[0]) if isinstance(each, ast.Name)]
                found |= {(name, path.relative_to(package).as_posix()) for name in names}
    works = bench.constants.works(bench.machine.Machine("cpu", small=True), bench.sections.Clock.of(60.0))
    rows = {(re.split(r"\W", work.what["constant"])[0], work.what["where"]) for work in works}
    unmeasured = {(name, where) for name, where in found if name in bench.constants.NO_ROW}
    assert found - rows == unmeasured
    assert {name for name, _ in unmeasured} == bench.constants.NO_ROW.keys()
    assert {"COMPILED_STEPS", "BLOCK_COPIES", "STATE_VECTORS", "SPEED"} < {name for name, _ in found & rows}


def test_peaks_of_blocks_and_stacks_are_multiples_of_what_plans_count(
    bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peaks are divided by the bytes of a block, of a stack's maps, and of its parameters; blocks by their speed."""
    machine, peaks = bench.machine.Machine("cpu", small=True), bench.peaks
    assert peaks.block_bytes(machine) in (2**14, 2**16)
    found = bench.machine.measured(lambda: None, "cpu", 1)
    sizes = iter([5.0, 7.0, 6.0, 1.0, 2.0, 3.0])

    def measured(call: Callable[[], Any], *_: Any) -> Any:
        call()
        return replace(found, peak=int(2**14 * next(sizes)))

    monkeypatch.setattr(peaks, "measured", measured)
    assert peaks.block_copies(machine, 2**14) == 7
    cost, by_rows = (
        image_cost(build_network(peaks.setting(machine).spec, 0), (3, 8, 8)),
        {1: 1_000, 32: 1_000 + 2 * 31 * 3},
    )
    monkeypatch.setattr(peaks, "call_peak", lambda machine, way, spec, rows: by_rows[rows] * cost.maps)
    assert peaks.kept_maps(machine) == pytest.approx(3)
    monkeypatch.setattr(peaks, "call_peak", lambda *_: 2**12)
    monkeypatch.setattr(peaks, "measured", lambda call, *_: replace(found, peak=2**14, result=call()))
    each = peaks.vectors(machine)
    assert each["training"] == pytest.approx(3 * each["step"])


def test_steps_that_pay_for_compiling_follow_from_the_rows_of_evaluation(bench: SimpleNamespace, card: Any) -> None:
    """The faster way of a stack is compared with one network alone; without its rows the constant is not reached."""
    with pytest.raises(bench.sections.NotHere):
        bench.constants.steps_until_compiled(card)
    rows = {"5 of 5": (0.004, 30.0), "1 of 5": (0.003, 20.0), "1 of 1": (0.005, 1.0)}
    for way, values in rows.items():
        for what, value in zip(("step", "first"), values, strict=True):
            card.noted["evaluation", "10 images per class", f"{way} in a call", what] = value
    assert bench.constants.steps_until_compiled(card) == pytest.approx(10_000)
    card.noted["evaluation", "10 images per class", "1 of 1 in a call", "step"] = 0.002
    assert bench.constants.steps_until_compiled(card) == "a stack saves no time"


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


def test_cuda_graphs_are_timed_and_checked_with_what_was_compiled_once(bench: SimpleNamespace, card: Any) -> None:
    """Graphs of small and large calls are timed; they, and checks of their bits, record functions that exist."""
    timed = [work.what for work in bench.steps.works(card, bench.sections.Clock.of(60.0))]
    for shape in ("CIFAR-10 IPC 10", "CIFAR-100 IPC 50"):
        for graphs in ("", "no "):
            assert {"shape": shape, "method": f"ours, {graphs}CUDA graphs", "precision": "tf32"} in timed
    names = [work.what["what"] for work in bench.exactness.works(card, bench.sections.Clock.of(60.0))]
    for precision in ("tf32", "float32", "bfloat16"):
        place = names.index(f"{precision}, compiled, against float64")
        assert names[place + 1] == f"{precision}, CUDA graphs, compiled, equal bits without"
        assert place < len(names) / 2
    matching = bench.exactness._Matching(bench.machine.Machine("cpu", small=True))
    compiled = bench.exactness.StudentStepFunctions(matching.problem(dtype=torch.float32).network)
    recorded = bench.exactness.Recorded(compiled)
    pair = (lambda *_: torch.zeros(1), lambda *_: torch.zeros(1))
    x, y = torch.zeros(2, 3, 8, 8), torch.zeros(2, 4)
    compiled._built[x.shape, y.shape, x.dtype] = pair
    assert recorded._compiled_for(x, y) == pair


def test_stage_workers_run_with_the_settings_of_a_recipe(bench: SimpleNamespace) -> None:
    """Experts, a distillation with MetaDD and a row of the table run on the device, with the defaults of `cluster`."""
    machine = bench.machine.Machine("cpu", small=True)
    threads = torch.get_num_threads()
    rows = rows_of(bench, bench.workers.works, machine)
    assert [row.get("verdict") for row in rows] == ["ok"] * 4, rows
    assert [row["what"].partition(":")[0] for row in rows] == [
        *("ExpertWorker", "ExpertWorker", "DistillWorker", "EvaluateWorker")
    ]
    assert torch.get_num_threads() == threads
    whole = override(RunConfig(), bench.workers.SETTINGS)
    assert whole.cluster == ClusterConfig()
    spec = whole.resolved((32, 32)).network.for_images(3, (32, 32), 10)
    schedule = scoring_schedule(whole.evaluate, 0.01)
    arguments = (lambda: cost_and_stacking(spec)[0], whole.evaluate.seeds, 10, schedule)
    with bench.workers.short_trainings_together():
        assert would_gain_together(*arguments, on_gpu=True)
    assert not would_gain_together(*arguments, on_gpu=True)


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
        "import bench_gpu, facts, datm_ray.data\nassert len(bench_gpu.SECTIONS) == 9\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=BENCHMARKS, check=True, timeout=120)
