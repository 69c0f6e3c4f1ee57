"""Progress and messages for the user: bars on a terminal, otherwise a line every 30 seconds. Both are logged too."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datm_ray.monitor.logs import fields, printable, verbosity
from datm_ray.runtime.executor import (
    Event,
    Failed,
    Finished,
    Lost,
    Note,
    Phase,
    Progress,
    Resized,
    Started,
    Stopped,
    Task,
)
from datm_ray.words import counted, data_size, duration, listed, one_line

if TYPE_CHECKING:
    from rich.progress import Progress as Bars, TaskID

LINE_INTERVAL = 30.0
"""Seconds between progress lines, in the log and on an output that cannot show bars."""
TICK = 1.0
"""Seconds between two checks whether a line is due, even while no event arrives."""
SILENCE = 30.0
"""Seconds after a step of the slowest task from which a progress line says for how long no step has followed."""
SHORTEST_MEMORY, MEMORY = 60.0, 1 / 3
"""Time over which a stage's speed is averaged: at least SHORTEST_MEMORY seconds, and MEMORY times the stage's time so
far if that is longer."""

_log = logging.getLogger(__name__)
_SHOWN = {"is_shown": True}
"""Attribute of log records that the progress display prints itself; the terminal's log handler skips them."""


class Reporter:
    """Display of messages and of stages' progress on standard error. Standard output is reserved for results."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    def message(self, text: str) -> None:
        """Log a message, and show it on a line of its own."""
        _log.info("%s", printable(text), extra=_SHOWN)
        self.show(text)

    def show(self, text: str) -> None:
        """Show a line, unless standard error shows the log or `quiet` is set."""
        if not self._quiet and verbosity() < 1:
            print(one_line(text), file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, title: str, tasks: Sequence[Task]) -> Iterator[Stage]:
        """Show the progress of tasks, below a title, in a block. It must pass their events to the yielded `Stage`."""
        if not self._quiet and verbosity() < 1 and sys.stderr.isatty():
            with _bars() as bars, _ticking(_BarStage(self, title, tasks, bars)) as stage:
                yield stage
        else:
            with _ticking(Stage(self, title, tasks)) as stage:
                yield stage


@contextmanager
def _ticking(stage: Stage) -> Iterator[Stage]:
    """Call the stage's `tick` from a thread every `TICK` seconds while the context lasts."""
    ended = threading.Event()

    def repeat() -> None:
        with suppress(OSError, ValueError):  # standard error is closed
            while not ended.wait(TICK):
                stage.tick()

    thread = threading.Thread(target=repeat, name="progress", daemon=True)
    thread.start()
    try:
        yield stage
    finally:
        ended.set()
        thread.join()


@dataclass
class _Running:
    """Progress of one running task."""

    since: float
    """Time of the task's start, in seconds of the monotonic clock."""
    weight: float = 1.0
    """Expected work of the whole task, relative to the other tasks of its stage."""
    timed_from: float = 0.0
    timed_to: float = 0.0
    """Times of the task's first and last `Progress` events (`timed_from` and `timed_to`), in seconds of the monotonic
    clock. The task's speed is measured between them."""
    first: float = 0.0
    """Share of the whole task, in [0, 1], that was already done at its first `Progress` event.

    A resumed task starts above 0. The speed is measured from this share on."""
    share: float = 0.0
    """Share of the whole task, in [0, 1], that was done at its last `Progress` event."""
    last: Progress | None = None
    phase: str = ""
    """Work between steps, such as compiling, until the next `Progress`; "" during steps."""
    changed: float = 0.0
    """Time of the task's last `Progress`, or of the start of a later phase, in seconds of the monotonic clock."""

    def doing(self, now: float) -> str:
        """Text with the phase, or "no step" once none has come for `SILENCE` seconds, and its duration; else ""."""
        seconds = now - self.changed
        return f", {self.phase or 'no step'} for {duration(seconds)}" if self.phase or seconds > SILENCE else ""

    def seconds_left(self, now: float) -> float:
        """Seconds for the rest of the task at its own speed; 0 until a tenth of the task has been timed."""
        own = self.share - self.first
        if self.last is None or own < 0.1:
            return 0.0
        step, silent = 1 / max(1, self.last.total), now - self.timed_to
        return max(0.0, _seconds_left(1 - self.share, own, self.timed_to - self.timed_from, step, silent))


def _seconds_left(left: float, done: float, seconds: float, due: float, silent: float) -> float:
    """Estimated seconds for the remaining work. The estimate counts down, and grows while the next step is overdue.

    Args:
        left: remaining work, in any unit.
        done: work that took `seconds`, in the unit of `left`.
        due: work of the next step, in the unit of `left`.
        silent: seconds since the last step.
    """
    return max(left * seconds / done - silent, (left - due) * (seconds + silent) / (done + due))


class Tracker:
    """Finished and running tasks of a stage, and the estimated time for the rest.

    The work of a task is its weight, an estimate of its cost. The speed is the work done per second. Older work counts
    exponentially less, so that the estimate follows a change of speed without jumping. Work that a resumed task had
    done before is not counted. Time before the stage's first `Progress`, for example for compiling, is not counted
    either.
    """

    def __init__(self, tasks: Sequence[Task], now: float) -> None:
        self.tasks, self.finished = len(tasks), 0
        self.running: dict[str, _Running] = {}
        self._left = sum(task.weight for task in tasks)
        self._started = self._last = now
        self._work = self._seconds = 0.0

    def add(self, task: Task) -> None:
        """Count a task that was created after the stage's start."""
        self.tasks += 1
        self._left += task.weight

    def take(self, task: Task, event: Event, now: float) -> None:
        """Update the state of a task by an event that came at the time `now`, in seconds of the monotonic clock."""
        if isinstance(event, Lost | Failed | Stopped):
            self.running.pop(task.name, None)
            return
        running = self.running.setdefault(task.name, _Running(now, task.weight, changed=now))
        if isinstance(event, Phase):
            running.changed = running.changed if event.text == running.phase else now
            running.phase = event.text
        elif isinstance(event, Progress):
            total = max(1, event.total)
            if running.last is None:
                running.timed_from, running.first = now, event.done / total
                running.share = max(0, event.done - 1) / total
                if not self._work:
                    running.share, self._started, self._last = running.first, now, now
            self._advance(task.weight * (event.done / total - running.share), now)
            running.share, running.last = event.done / total, event
            running.phase, running.changed, running.timed_to = "", now, now
        elif isinstance(event, Finished):
            del self.running[task.name]
            self.finished += 1
            self._left -= task.weight
            self._advance(task.weight * (1 - running.share), now)

    def _advance(self, work: float, now: float) -> None:
        kept = math.exp((self._last - now) / max(SHORTEST_MEMORY, MEMORY * (now - self._started)))
        self._work = kept * self._work + max(0.0, work)
        self._seconds, self._last = kept * self._seconds + now - self._last, now

    def slowest(self, now: float) -> tuple[str, _Running]:
        """Name and state of the running task expected to end last; "" and an empty state if no task runs.

        While no speed is known, returns the task that started first.
        """
        none = "", _Running(now)
        return max(self.running.items(), key=lambda each: (each[1].seconds_left(now), -each[1].since), default=none)

    def seconds_left(self, now: float) -> float:
        """Estimated seconds for the remaining work; nan while no speed is known."""
        if not self._work or self._seconds <= 1:
            return math.nan
        left = self._left - sum(each.weight * each.share for each in self.running.values())
        due = sum(each.weight / max(1, each.last.total) for each in self.running.values() if each.last)
        seconds = _seconds_left(left, self._work, self._seconds, due, now - self._last)
        return max(seconds, self.slowest(now)[1].seconds_left(now))


class Stage:
    """Display of a stage by lines: at start and end, every `LINE_INTERVAL` seconds, and for events such as `Lost`."""

    def __init__(self, reporter: Reporter, title: str, tasks: Sequence[Task]) -> None:
        self._reporter, self._title = reporter, title
        self._lock = threading.RLock()  # reentrant: a signal handler of the thread that holds it may show a line
        self._phases: set[str] = set()
        self._started = self._last = time.monotonic()
        self._tracker = Tracker(tasks, self._started)
        _log.info("stage started %s", fields(stage=title, tasks=len(tasks)), extra=_SHOWN)
        self._show_state(f"{title}: {counted(len(tasks), 'task')} to run")

    def add(self, task: Task) -> None:
        """Add a task that was created after the stage's start."""
        with self._lock:
            self._tracker.add(task)
        _log.info("task added %s", fields(task=task.name), extra=_SHOWN)

    def event(self, task: Task, event: Event) -> None:
        """Log an event of a task, and show it or count it in the next progress line."""
        with self._lock:
            self._take(task, event, time.monotonic())

    def tick(self) -> None:
        """Show a progress line if the last one is `LINE_INTERVAL` seconds old, even if no event has arrived."""
        with self._lock:
            self._show_if_due(time.monotonic())

    def _take(self, task: Task, event: Event, now: float) -> None:
        running = self._tracker.running.get(task.name)
        self._tracker.take(task, event, now)
        _record(task, event, None if running is None else now - running.since)
        if isinstance(event, Lost | Failed | Resized | Note | Stopped):
            self._show(_line(task, event))
        elif isinstance(event, Phase):
            self._show_phase(task, event)
        elif isinstance(event, Finished) and self._tracker.finished == self._tracker.tasks:
            _log.info("stage finished %s", fields(stage=self._title, seconds=now - self._started), extra=_SHOWN)
            self._show_state(f"{self._title}: done in {duration(now - self._started)}")
        elif isinstance(event, Progress | Finished):
            self._show_if_due(now)

    def _show_if_due(self, now: float) -> None:
        if now - self._last > LINE_INTERVAL and self._tracker.finished < self._tracker.tasks:
            self._last = now
            self._log_progress(now)
            last = self._tracker.slowest(now)[1].last
            measured = f"{_values(last.values)}{_measured(last.metrics)}" if last else ""
            self._show_state(f"{self._summary(now)}{measured}")

    def _show_phase(self, task: Task, event: Phase) -> None:
        """Show what a task does before or between steps, unless the stage has shown the same text already."""
        if event.text not in self._phases:
            self._phases.add(event.text)
            self._show(f"{task.name}: {event.text} ...")

    def _show(self, text: str) -> None:
        self._reporter.show(text)

    def _show_state(self, text: str) -> None:
        """Show a line about the whole stage. A display with bars replaces the stage's earlier line."""
        self._show(text)

    def _log_progress(self, now: float) -> None:
        tracker, (name, slowest) = self._tracker, self._tracker.slowest(now)
        left, event = tracker.seconds_left(now), slowest.last
        values = {
            "done": tracker.finished,
            "tasks": tracker.tasks,
            "running": len(tracker.running),
            "seconds_left": None if math.isnan(left) else round(left),
            "slowest": name or None,
            "phase": slowest.phase or None,
            **({"step": event.done, "steps": event.total, **event.values} if event else {}),
        }
        _log.info("progress %s", fields(stage=self._title, **values), extra=_SHOWN)

    def _summary(self, now: float) -> str:
        """Text with the numbers of finished and running tasks, the estimated time left, and the slowest task."""
        tracker, left = self._tracker, self._tracker.seconds_left(now)
        name, slowest = tracker.slowest(now)
        done = f"{self._title}: {tracker.finished}/{tracker.tasks} tasks done"
        parts = [done, f"{len(tracker.running)} running"]
        parts += [] if math.isnan(left) else [f"about {duration(left)} left"]
        if name:
            step = f" at {slowest.last.done}/{slowest.last.total}" if slowest.last else ""
            parts.append(f"slowest{step}: {name}{slowest.doing(now)}")
        return ", ".join(parts)


class _BarStage(Stage):
    """Display of a stage by one line, and a bar for each running task."""

    def __init__(self, reporter: Reporter, title: str, tasks: Sequence[Task], bars: Bars) -> None:
        self._bars = bars
        self._rows: dict[str, TaskID] = {}
        super().__init__(reporter, title, tasks)

    def tick(self) -> None:
        """Show the stage's state at the current time."""
        with self._lock:
            super().tick()
            self._show_present_state()

    def _show_present_state(self) -> None:
        if self._tracker.finished < self._tracker.tasks:
            self._show_state(self._summary(time.monotonic()))

    def _take(self, task: Task, event: Event, now: float) -> None:
        super()._take(task, event, now)
        if isinstance(event, Progress):
            if task.name not in self._rows:
                self._rows[task.name] = self._bars.add_task(task.name, total=event.total, values="")
            self._bars.update(
                self._rows[task.name], completed=event.done, total=event.total, values=_values(event.values)
            )
        elif isinstance(event, Finished | Lost | Failed | Stopped) and task.name in self._rows:
            self._bars.remove_task(self._rows.pop(task.name))
        self._show_present_state()

    def _show_phase(self, task: Task, event: Phase) -> None:
        if task.name in self._rows:
            self._bars.update(self._rows[task.name], values=event.text)

    def _show(self, text: str) -> None:
        self._bars.console.print(one_line(text), markup=False, highlight=False)

    def _show_state(self, text: str) -> None:
        self._bars.headline = one_line(text)  # type: ignore[attr-defined]


def _bars() -> Bars:
    # Imported here because most commands show no bars.
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bars, ProgressColumn, TextColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Column with the steps per second."""

        def render(self, task: object) -> Text:
            speed = getattr(task, "speed", None)
            return Text(f"{speed:.1f}/s" if speed else "", style="dim")

    class Headed(Bars):
        """Progress bars below one line of text, `headline`."""

        headline = ""

        def get_renderables(self) -> Iterator[RenderableType]:
            yield Text(self.headline, no_wrap=True, overflow="ellipsis")
            yield self.make_tasks_table(self.tasks)

    return Headed(
        TextColumn("  {task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TextColumn("{task.fields[values]}", style="dim", markup=False),
        console=Console(stderr=True),
    )


def _values(values: Mapping[str, float]) -> str:
    return "".join(f"  {name.replace('_', ' ')} {value:.4g}" for name, value in values.items())


def _measured(metrics: Mapping[str, float]) -> str:
    """Text at the end of a progress line: start epochs, images per second, and memory.

    A value that `metrics` lacks is left out. Of start epochs, the exclusive upper bound is shown.
    """
    shown = ""
    if (bound := metrics.get("datm_ray_distill_upper_bound")) is not None:
        shown += f"  start below {bound:.0f}"
    for stage in ("distill", "expert"):
        if (rate := metrics.get(f"datm_ray_{stage}_images_per_second")) is not None:
            shown += f"  {rate:,.0f} images/s"
    memory = metrics.get("datm_ray_worker_memory_bytes", math.nan)
    return shown if math.isnan(memory) else f"{shown}  memory {data_size(memory)}"


def _record(task: Task, event: Event, seconds: float | None) -> None:
    """Log an event. `seconds` is the time for which its task has run; `None` if the task has not started."""
    if isinstance(event, Progress) and not _log.isEnabledFor(logging.DEBUG):
        return  # every iteration sends a `Progress`
    level, what = logging.INFO, ""
    values: dict[str, object] = {}
    match event:
        case Started():
            what, values = "task started", {"workers": event.workers}
        case Phase():
            what, values = "task phase", {"phase": event.text}
        case Stopped():
            what, values = "task stopped", {"saved": event.saved}
        case Progress():
            level, what = logging.DEBUG, "task progress"
            values = {"step": event.done, "steps": event.total, "saved": event.saved, **event.values}
        case Finished():
            what, values = "task finished", {"seconds": seconds}
        case Lost():
            level, what, values = logging.WARNING, "worker lost", {"attempt": event.attempt, "reason": event.reason}
        case Failed():
            level, what, values = logging.ERROR, "task failed", {"reason": event.reason}
        case Resized():
            what, values = "workers changed", {"workers": event.size, "wanted": event.wanted}
        case Note():
            what, values = "note", {"text": event.text}
    _log.log(level, "%s %s", what, fields(task=task.name, **values), extra=_SHOWN)


def _line(task: Task, event: Lost | Failed | Resized | Note | Stopped) -> str:
    if isinstance(event, Note):
        return f"{task.name}: {event.text}"
    if isinstance(event, Stopped):
        return f"{task.name}: saved {event.saved}"
    if isinstance(event, Failed):
        kinds = (event.running, "running task"), (event.queued, "queued task")
        left = listed(counted(number, noun) for number, noun in kinds if number)
        return f"{task.name} failed: {event.reason} Finishing {left}, then stopping."
    if isinstance(event, Resized):
        why = " (no more can start now)" if event.size < event.wanted else ""
        return f"{task.name}: runs with {event.size} of {counted(event.wanted, 'worker')}{why}"
    following = f"; starting attempt {event.attempt + 1} on another one" if event.is_retried else ""
    return f"{task.name}: worker lost ({event.reason}){following}"
