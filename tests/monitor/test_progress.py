"""Tests the progress lines without a terminal, which a job's log keeps."""

from __future__ import annotations

import io
import itertools
import logging
import math
import re
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from datm_ray.cli.ending import adapt_streams
from datm_ray.monitor import progress as telemetry
from datm_ray.monitor.progress import Reporter, Tracker
from datm_ray.runtime.executor import Event, Failed, Finished, Lost, Note, Phase, Progress, Started, Task

ONE = Task("one", ())


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Feed events to a stage of two tasks. Returns the lines written for them."""
    monkeypatch.setattr(telemetry, "LINE_INTERVAL", -1.0)

    def feed(*events: Event) -> list[str]:
        task = Task("digits-ipc1", ())
        with Reporter().stage("Distillation", [task, task]) as stage:
            for event in events:
                stage.event(task, event)
        return capsys.readouterr().err.splitlines()

    return feed


def test_a_line_holds_what_is_worth_knowing_from_afar(lines) -> None:
    """A line has progress, loss, step size, skipped, validation, range, speed and memory, for `job status`."""
    values = {"loss": 0.41236, "step_size": 0.0213, "skipped": 3.0, "validation": 0.9}
    metrics = {
        "datm_ray_distill_upper_bound": 12.0,
        "datm_ray_distill_images_per_second": 12345.6,
        "datm_ray_worker_memory_bytes": 310.0 * 2**20,
        "datm_ray_store_reads_total": 3.0,
    }
    assert lines(Progress(120, 300, values, metrics))[1:] == [
        "Distillation: 0/2 tasks done, 1 running, slowest at 120/300: digits-ipc1  loss 0.4124  step size 0.0213"
        "  skipped 3  validation 0.9  start below 12  12,346 images/s  memory 310 MiB"
    ]


def test_what_was_not_measured_is_left_out(lines) -> None:
    """A line leaves out missing values: experts' range, memory of some systems, another version's measurements."""
    metrics = {"datm_ray_expert_images_per_second": 5000.0, "datm_ray_worker_memory_bytes": math.nan}
    assert lines(Progress(1, 4, {"loss": 1.5}, metrics), Progress(2, 4))[1:] == [
        "Distillation: 0/2 tasks done, 1 running, slowest at 1/4: digits-ipc1  loss 1.5  5,000 images/s",
        "Distillation: 0/2 tasks done, 1 running, slowest at 2/4: digits-ipc1",
    ]


def ends(speed: Callable[[float], float], *, workers: int = 3, tasks: int = 12, steps: int = 20) -> list[float]:
    """Ends that a tracker predicts every 30 s, then the true one, for tasks at `speed` steps a second each."""
    queue, done = [Task(f"task {number}", ()) for number in range(tasks)], {}
    tracker, now, line, foreseen = Tracker(queue, 0.0), 0.0, 30.0, []
    while queue or done:
        while queue and len(done) < workers:
            done[queue.pop(0)] = 0.0
            tracker.take(list(done)[-1], Started(), now)
        now += 1.0
        for place, (task, step) in enumerate(list(done.items())):
            done[task] = step + speed(now) * (0.8 + 0.2 * place)  # workers are not equally fast
            if done[task] >= steps:
                del done[task]
                tracker.take(task, Finished(), now)
            elif int(done[task]) > int(step):
                tracker.take(task, Progress(int(done[task]), steps), now)
        if now >= line and not math.isnan(tracker.seconds_left(now)):
            line += 30.0
            foreseen.append(now + tracker.seconds_left(now))
    return [*foreseen, now]


def test_the_time_left_is_right_where_work_is_even() -> None:
    """With even work the predicted end is within a tenth of the duration from the first lines on."""
    *foreseen, end = ends(lambda now: 0.2)
    assert len(foreseen) > 8
    assert all(abs(each - end) < 0.1 * end for each in foreseen), (foreseen, end)


def test_the_time_left_does_not_jump_where_speed_changes() -> None:
    """After a fall to a third of the speed, the predicted end follows in steps and ends right."""
    *foreseen, end = ends(lambda now: 0.3 if now < 120 else 0.1)
    changes = [abs(late - early) for early, late in itertools.pairwise(foreseen)]
    assert max(changes) < 0.25 * end, (foreseen, end)
    assert all(abs(each - end) < 0.1 * end for each in foreseen[-5:]), (foreseen, end)


def test_a_finished_task_is_logged_with_the_seconds_since_its_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The seconds include compiling, although the speed does not."""
    clock = iter([0.0, 0.0, 60.0, 70.0])
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level(logging.INFO, "datm_ray"), Reporter(quiet=True).stage("Experts", [ONE]) as stage:
        for event in (Started(), Progress(1, 100), Finished()):
            stage.event(ONE, event)
    assert "task finished task=one seconds=70" in caplog.messages


def test_compiling_before_the_first_step_does_not_spoil_the_time_left() -> None:
    """A minute of compiling before steps of a tenth of a second is forgotten at once."""
    tracker, task = Tracker([ONE], 0.0), ONE
    tracker.take(task, Started(), 0.0)
    for done in range(1, 51):
        tracker.take(task, Progress(done, 500), 60 + 0.1 * done)
    assert tracker.seconds_left(65.0) == pytest.approx(45, rel=0.05)


def test_what_a_resumed_task_brings_along_is_no_progress() -> None:
    """A task resumed at three quarters is predicted by its own new steps, also after a loss."""
    tracker, task = Tracker([ONE, Task("other", ())], 0.0), ONE
    for now, event in ((0.0, Started()), (10.0, Progress(751, 1000)), (20.0, Progress(752, 1000))):
        tracker.take(task, event, now)
    assert tracker.seconds_left(20.0) == pytest.approx(10 * (248 + 1000), rel=0.01)
    tracker.take(task, Lost("its node died", 1), 20.0)
    assert tracker.running == {}
    for now, event in ((20.0, Started()), (30.0, Progress(701, 1000))):
        tracker.take(task, event, now)
    assert tracker.seconds_left(30.0) == pytest.approx(10 * (299 + 1000), rel=0.01)


def test_a_line_says_who_runs_how_long_and_who_is_slowest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The slowest task ends last at its own speed; a task without reports counts as running."""
    clock = iter([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 100.0, 100.0, 200.0, 36200.0])
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    names = ("fast", "slow", "late", "last", "fifth")
    with Reporter().stage("Experts", [Task(name, ()) for name in names]) as stage:
        for name, event in (
            ("fast", Started()),
            ("slow", Started()),
            ("late", Started()),
            ("last", Started()),
            ("fast", Progress(0, 2)),
            ("slow", Progress(0, 4)),
            ("late", Progress(0, 2)),
            ("fast", Progress(1, 2)),
            ("slow", Progress(1, 4)),
            ("late", Progress(1, 2)),
            ("last", Finished()),
        ):
            stage.event(Task(name, ()), event)
    assert capsys.readouterr().err.splitlines() == [
        "Experts: 5 tasks to run",
        "Experts: 0/5 tasks done, 4 running, about 15 min left, slowest at 1/2: fast",
        "Experts: 0/5 tasks done, 4 running, about 11 min left, slowest at 1/4: slow, no step for 100 s",
        "Experts: 1/5 tasks done, 3 running, about 26 h 36 min left, slowest at 1/4: slow, no step for 10 h 2 min",
    ]


def unequal(weights: dict[str, float], workers: int = 2) -> dict[float, float]:
    """Seconds left that a tracker predicts every 10 s for tasks of these many seconds, by time; the end has 0."""
    queue, running, now, left = [Task(name, (), weight=each) for name, each in weights.items()], {}, 0.0, {}
    tracker = Tracker(queue, 0.0)
    while queue or running:
        while queue and len(running) < workers:
            task = queue.pop(0)
            running[task] = 0.0
            for event in (Started(), Progress(0, 20)):
                tracker.take(task, event, now)
        now += 1.0
        for task, done in list(running.items()):
            running[task] = step = done + 20 / task.weight
            if step >= 20:
                del running[task]
                tracker.take(task, Finished(), now)
            elif int(step) > int(done):
                tracker.take(task, Progress(int(step), 20), now)
        if now % 10 == 0:
            left[now] = tracker.seconds_left(now)
    return {**left, now: 0.0}


def test_the_time_left_weighs_tasks_by_their_work() -> None:
    """Fifteen short networks and six long ones at the end are predicted within a tenth of the whole time."""
    left = unequal({f"short {n}": 20.0 for n in range(15)} | {f"long {n}": 200.0 for n in range(6)})
    end = max(left)
    assert all(abs(now + each - end) < 0.1 * end for now, each in left.items() if now >= 20), (left, end)


def test_the_time_left_grows_while_a_step_is_overdue() -> None:
    """An estimate counts down until the next step is due, and grows from then on."""
    tracker = Tracker([ONE], 0.0)
    for done in range(6):
        tracker.take(ONE, Progress(done, 10), 10.0 * done)
    left = [tracker.seconds_left(now) for now in (50.0, 55.0, 60.0, 120.0, 600.0)]
    assert left[:3] == pytest.approx([50.0, 45.0, 40.0])
    assert left[3] > 60
    assert left[4] > 300


def test_a_closed_standard_error_ends_the_display_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tick whose output has gone ends the display's thread, and no traceback of it is printed."""
    failed: list[object] = []
    ticks = threading.Event()

    def tick(self: object) -> None:
        ticks.set()
        raise BrokenPipeError

    monkeypatch.setattr(threading, "excepthook", failed.append)
    monkeypatch.setattr(telemetry, "TICK", 0.001)
    monkeypatch.setattr(telemetry.Stage, "tick", tick)
    with Reporter(quiet=True).stage("Distillation", [ONE]):
        assert ticks.wait(10)
    assert failed == []


def test_a_line_comes_also_while_nothing_progresses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a task does is printed at once and every 30 seconds, with the task's name and since when."""
    clock = iter([0.0, 0.0, 1.0, 2.0, 20.0, 40.0, 41.0, 75.0, 76.0, 140.0])
    monkeypatch.setattr(telemetry, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    other = Task("other", ())
    with Reporter().stage("Distillation", [ONE, other]) as stage:
        stage.event(ONE, Started())
        stage.event(ONE, Phase("starting 2 workers"))
        stage.event(ONE, Phase("compiling student steps"))
        stage.tick()
        stage.tick()
        stage.event(other, Phase("compiling student steps"))
        stage.tick()
        stage.event(ONE, Progress(0, 60))
        stage.tick()
    assert capsys.readouterr().err.splitlines() == [
        "Distillation: 2 tasks to run",
        "one: starting 2 workers ...",
        "one: compiling student steps ...",
        "Distillation: 0/2 tasks done, 1 running, slowest: one, compiling student steps for 38 s",
        "Distillation: 0/2 tasks done, 2 running, slowest: one, compiling student steps for 73 s",
        "Distillation: 0/2 tasks done, 2 running, slowest at 0/60: one, no step for 64 s",
    ]


def test_a_thread_prints_the_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines come while the process that drives the run waits for an event."""
    monkeypatch.setattr(telemetry, "TICK", 0.01)
    monkeypatch.setattr(telemetry, "LINE_INTERVAL", 0.05)
    shown = ""
    with Reporter().stage("Distillation", [ONE]) as stage:
        stage.event(ONE, Started())
        end = time.monotonic() + 10
        while "1 running" not in shown and time.monotonic() < end:
            time.sleep(0.01)
            shown += capsys.readouterr().err
    assert "Distillation: 0/1 tasks done, 1 running, slowest: one" in shown


def test_losses_notes_and_ends_are_always_printed(lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, notes and ends are printed at once, whatever the interval of lines."""
    monkeypatch.setattr(telemetry, "LINE_INTERVAL", math.inf)
    losses = Lost("its node died", 1), Lost("killed", 2, is_retried=False)
    ends = *losses, Failed("It diverged.", 2), Finished(), Finished()
    written = lines(Progress(1, 2), Note("compiled"), *ends)
    assert written[:5] == [
        "Distillation: 2 tasks to run",
        "digits-ipc1: compiled",
        "digits-ipc1: worker lost (its node died); starting attempt 2 on another one",
        "digits-ipc1: worker lost (killed)",
        "digits-ipc1 failed: It diverged. Finishing 2 running tasks, then stopping.",
    ]
    assert written[5].startswith("Distillation: done in")


@pytest.mark.parametrize(
    ("left", "named"),
    [((1, 0), "1 running task"), ((0, 3), "3 queued tasks"), ((2, 1), "2 running tasks and 1 queued task")],
)
def test_only_running_tasks_are_called_running(left: tuple[int, int], named: str, lines) -> None:
    """A line on a failed task names the running and the queued tasks that are finished, each by its number."""
    written = lines(Progress(1, 2), Failed("It diverged.", *left))
    assert f"digits-ipc1 failed: It diverged. Finishing {named}, then stopping." in written


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_bars_show_names_as_they_are_on_any_terminal(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names in brackets are no markup, and signs that a terminal lacks stop no work."""

    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    terminal = Terminal(io.BytesIO(), encoding=encoding)
    for name, value in (("TERM", "xterm"), ("COLUMNS", "200")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", terminal)
    adapt_streams()
    task = Task("[bold] a=b [/x] {c}", ())
    with Reporter().stage("[red] stage", [task, task]) as stage:
        for event in (Progress(1, 3, {"loss": 0.5}), Note("caf\udce9 ± [/y]"), Finished()):
            stage.event(task, event)
    terminal.flush()
    shown = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", terminal.buffer.getvalue())  # type: ignore[attr-defined]
    assert b"[red] stage" in shown
    assert b"[bold] a=b [/x] {c}" in shown
    assert rb"caf\udce9 " + "±".encode(encoding, "backslashreplace") + b" [/y]" in shown


def test_tasks_that_are_added_count_and_move_the_end_by_no_more_than_their_own_time() -> None:
    """A task of 100 s that adds a task of 5 s every 10 s, run beside it, is foreseen to end within these 5 s."""
    one, tracker = Task("one", (), weight=100.0), Tracker([Task("one", (), weight=100.0)], 0.0)
    tracker.take(one, Progress(0, 100), 0.0)
    beside: dict[Task, int] = {}
    for now in range(1, 100):
        tracker.take(one, Progress(now, 100), float(now))
        for task in list(beside):
            beside[task] += 1
            tracker.take(task, Progress(beside[task], 5) if beside[task] < 5 else Finished(), float(now))
            if beside[task] == 5:
                del beside[task]
        if now % 10 == 0:
            added = Task(f"added {now}", (), weight=5.0)
            tracker.add(added)
            tracker.take(added, Progress(0, 5), float(now))
            beside[added] = 0
        if now > 10:
            assert 100 - 1 <= now + tracker.seconds_left(now) <= 100 + 5 + 1, now
    assert (tracker.tasks, tracker.finished) == (10, 9)
