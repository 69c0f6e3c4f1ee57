"""What is said while work goes on, where there is no terminal: the lines that a job's log keeps."""

from __future__ import annotations

import io
import itertools
import math
import re

import pytest

from datm_ray.cli.ending import adapt_streams
from datm_ray.monitor import progress as telemetry
from datm_ray.monitor.progress import Reporter
from datm_ray.runtime.executor import Event, Failed, Finished, Lost, Note, Progress, Task


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Feeds events to a stage of two tasks, and gives what was written for them."""
    monkeypatch.setattr(telemetry, "LINE_INTERVAL", -1.0)

    def feed(*events: Event) -> list[str]:
        with Reporter().stage("Distillation", 2) as stage:
            for event in events:
                stage.event(Task("digits-ipc1", ()), event)
        return capsys.readouterr().err.splitlines()

    return feed


def test_a_line_holds_what_is_worth_knowing_from_afar(lines) -> None:
    """Progress, loss, step size, skipped, validation, range, speed, memory: `job status` shows the last one."""
    values = {"loss": 0.41236, "step_size": 0.0213, "skipped": 3.0, "validation": 0.9}
    metrics = {
        "datm_ray_distill_upper_bound": 12.0,
        "datm_ray_distill_images_per_second": 12345.6,
        "datm_ray_worker_memory_bytes": 310.0 * 2**20,
        "datm_ray_store_reads_total": 3.0,
    }
    assert lines(Progress(120, 300, values, metrics))[1:] == [
        "Distillation: 0/2 tasks done; digits-ipc1 120/300  loss 0.4124  step size 0.0213  skipped 3  validation 0.9"
        "  start below 12  12,346 images/s  memory 310.0 MiB"
    ]


def test_what_was_not_measured_is_not_said(lines) -> None:
    """Experts have no range, some systems tell no memory, and a worker of another version may tell nothing."""
    metrics = {"datm_ray_expert_images_per_second": 5000.0, "datm_ray_worker_memory_bytes": math.nan}
    assert lines(Progress(1, 4, {"loss": 1.5}, metrics), Progress(2, 4))[1:] == [
        "Distillation: 0/2 tasks done; digits-ipc1 1/4  loss 1.5  5,000 images/s",
        "Distillation: 0/2 tasks done; digits-ipc1 2/4",
    ]


@pytest.mark.parametrize(("passed", "left"), [(90.0, "about 2 min left; "), (30.0, "a minute left; ")])
def test_a_line_says_how_long_the_rest_may_take(
    passed: float, left: str, lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the tasks that are finished."""
    times = itertools.chain([0.0], itertools.repeat(passed))
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: next(times))
    assert lines(Finished(), Progress(1, 4))[1:] == [f"Distillation: 1/2 tasks done; {left}digits-ipc1 1/4"]


def test_losses_notes_and_ends_are_always_said(lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the interval between lines."""
    monkeypatch.setattr(telemetry, "LINE_INTERVAL", math.inf)
    ends = Lost("its node died", 1), Failed("It diverged.", 2), Finished(), Finished()
    said = lines(Progress(1, 2), Note("compiled"), *ends)
    assert said[:4] == [
        "Distillation: 2 tasks to run",
        "digits-ipc1: compiled",
        "digits-ipc1: worker lost (its node died); starting attempt 2 on another one",
        "digits-ipc1 failed: It diverged. Finishing 2 running tasks, then stopping.",
    ]
    assert said[4].startswith("Distillation: done in")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_bars_show_names_as_they_are_on_any_terminal(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name in brackets is no markup, and what a terminal cannot show does not stop the work."""
    pytest.importorskip("rich")

    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    terminal = Terminal(io.BytesIO(), encoding=encoding)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "200")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", terminal)
    adapt_streams()
    task = Task("[bold] a=b [/x] {c}", ())
    with Reporter().stage("[red] stage", 2) as stage:
        for event in (Progress(1, 3, {"loss": 0.5}), Note("caf\udce9 ± [/y]"), Finished()):
            stage.event(task, event)
    terminal.flush()
    shown = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", terminal.buffer.getvalue())  # type: ignore[attr-defined]
    assert b"[red] stage" in shown
    assert b"[bold] a=b [/x] {c}" in shown
    assert b"caf\xe9 " + "±".encode(encoding, "datm-ray") + b" [/y]" in shown
