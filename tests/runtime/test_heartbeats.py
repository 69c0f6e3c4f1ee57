"""Heartbeats of long work. No stage may compute for long without an event, or its worker counts as stuck."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from datm_ray.config import ClusterConfig
from datm_ray.core.steps import Steps
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.executor import Event, Phase, Progress, SerialExecutor, Task
from datm_ray.runtime.heartbeats import interval_between_epochs, interval_in_epochs, reporting, with_heartbeats
from datm_ray.runtime.retries import patience_of
from datm_ray.stages.experts.train import TESTING
from tests.conftest import tiny_config

SLOW = 100_000.0
"""Seconds that pass at each reading of the clock, more than any time limit."""


def clock_of(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let `seconds` pass at each look of the heartbeats at the clock."""
    clock = SimpleNamespace(monotonic=itertools.count(step=seconds).__next__)
    monkeypatch.setattr("datm_ray.runtime.heartbeats.time", clock)


def counting(to: int) -> Steps[int]:
    for _ in range(to):
        yield
    return to


@pytest.mark.parametrize(("seconds", "beats"), [(0.0, 0), (4.0, 2), (10.0, 8)])
def test_a_heartbeat_comes_where_nothing_came_for_long(
    seconds: float, beats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps take 0, 4 or 10 s each, and the interval is 10 s. The items of two epochs are passed on."""
    items = [None, None, None, None, "first"] * 2
    clock_of(monkeypatch, seconds)
    found = list(with_heartbeats(items, 10.0))
    assert [each for each in found if each] == ["first", "first"]
    assert found.count(None) == beats


@pytest.mark.parametrize(("seconds", "at_once", "phases"), [(0.0, True, 6), (0.0, False, 0), (9.0, False, 6)])
def test_work_is_reported_as_phases(
    seconds: float, at_once: bool, phases: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phases come at pauses, at once or after the interval, and the work's result is returned."""
    clock_of(monkeypatch, seconds)
    found = list[int]()

    def events() -> Iterator[Event]:
        found.append((yield from reporting(counting(6), "scoring", 0.0 if at_once else 9.0, at_once=at_once)))

    assert list(events()) == [Phase("scoring")] * phases
    assert found == [6]


@pytest.mark.parametrize("peer_timeout", [0.5, 60.0, 300.0, 5000.0])
@pytest.mark.parametrize("progress_timeout", [10.0, 600.0, 3600.0])
def test_heartbeats_come_within_every_time_limit(peer_timeout: float, progress_timeout: float) -> None:
    """Between epochs, heartbeats come within half of the limit that very short epochs set; within epochs, of theirs."""
    cluster = ClusterConfig(peer_timeout=peer_timeout, progress_timeout=progress_timeout)
    patience = patience_of(1, peer_timeout, progress_timeout)
    assert 2 * interval_in_epochs(cluster) <= patience.limit
    for _ in range(5):
        patience.take(Progress(1, 2), 1e-3)
    assert 2 * interval_between_epochs(cluster) <= patience.limit


@contextmanager
def passes_counted() -> Iterator[list[int]]:
    """Context that counts passes of whole networks in its list's only number."""
    depth, passes = [0], [0]

    def enter(*_: Any) -> None:
        passes[0] += depth[0] == 0
        depth[0] += 1

    def leave(*_: Any) -> None:
        depth[0] -= 1

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield passes
    finally:
        for each in hooks:
            each.remove()


class Counting(SerialExecutor):
    """Executor that notes the most passes of a network between two events of each stage."""

    most: dict[str, int]

    def run(self, *arguments: Any, **options: Any) -> Iterator[tuple[Task, Event]]:
        with passes_counted() as passes:
            for task, event in super().run(*arguments, **options):
                kind = task.method or task.stage
                self.most[kind] = max(self.most.get(kind, 0), passes[0])
                yield task, event
                passes[0] = 0


DATM = (
    "evaluate.full=true",
    "evaluate.real_epochs=1",
    "experts.test_every=1",
    "distill.validate_every=6",
)
SRE2L = (
    "method=sre2l",
    "network={architecture: convnet, width: 4, depth: 2, norm: batch}",
    "distill={ipc: 5, iterations: 2, initial: correct}",
    "recover.block=50",
    "recover.shift=1",
    "evaluate.labels=stored",
    "evaluate.keep_labels=2",
)
PRIOR = ("prior={kind: trained, width: 4, epochs: 2, batch_size: 50}",)
INVERTED = ("prior={kind: untrained, width: 4, inversion_steps: 20}",)
METADD = (
    "metadd={auxiliaries: [{architecture: convnet, width: 3}], share: 0.05, experts: {epochs: 1}}",
    *("distill.ipc=3", "distill.iterations=1", "distill.validate_every=0"),
)


@pytest.mark.parametrize("settings", [DATM, SRE2L, PRIOR, INVERTED, METADD])
def test_no_stage_computes_for_long_without_an_event(
    settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that take hours each are all reported, in every loop over images, steps or networks."""
    clock_of(monkeypatch, SLOW)
    for module in ("distill.validation", "evaluate.progress", "distill.task", "distill.pieces", "experts.difficulty"):
        monkeypatch.setattr(f"datm_ray.stages.{module}.REPORT_INTERVAL", -1.0)
    for module in ("core.training.loop", "stages.methods.first_images.initial"):
        monkeypatch.setattr(f"datm_ray.{module}.SCORING_BATCH", 10)
    monkeypatch.setattr("datm_ray.stages.labels.LABELLED", 5)
    config = tiny_config("evaluate.full=false", "evaluate.epochs=2", *settings, "evaluate.seeds=1")
    most: dict[str, int] = {}

    def start() -> SerialExecutor:
        executor = Counting(config.cluster)
        executor.most = most
        return executor

    Pipeline([config], str(tmp_path)).run_all(start, Reporter(quiet=True))
    limits = dict.fromkeys(most, 5) | {"distillation": 12}  # one iteration has several student steps
    assert {kind: count for kind, count in most.items() if count > limits[kind]} == {}


def test_the_time_of_several_short_tests_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that are tested one after another, each in less than a heartbeat's interval, are reported together."""
    config = tiny_config("experts.count=4", "cluster.experts_at_a_time=4", "experts.test_every=1")
    clock_of(monkeypatch, 0.3 * interval_between_epochs(config.cluster))  # a test has two batches
    reported = list[str]()

    class Noting(SerialExecutor):
        def run(self, *arguments: Any, **options: Any) -> Iterator[tuple[Task, Event]]:
            for task, event in super().run(*arguments, **options):
                reported.extend([event.text] if isinstance(event, Phase) else [])
                yield task, event

    Pipeline([config], str(tmp_path)).train_experts(lambda: Noting(config.cluster), Reporter(quiet=True))
    assert TESTING in reported
