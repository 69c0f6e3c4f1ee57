"""Progress and messages for the user: bars on a terminal, otherwise a line every 30 seconds; and their log records."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from datm_ray.errors import one_line
from datm_ray.monitor.logs import fields, printable, verbosity
from datm_ray.runtime.executor import Event, Failed, Finished, Lost, Note, Progress, Resized, Started, Task, counted
from datm_ray.store.trajectories import size_in_words

if TYPE_CHECKING:
    from rich.progress import Progress as Bars, TaskID

WORKER_LOST = "worker lost"
TASKS_DONE = (" tasks done", "  progress stage=")
"""Parts of the lines about a lost worker and about progress, as shown and as logged; `cli.jobs` finds lines by them."""

LINE_INTERVAL = 30.0
"""Seconds between progress lines in the log, and where no terminal shows bars."""
FEW_STEPS = 10
"""Largest number of steps of a task whose first step counts for the speed."""
SHORTEST_MEMORY, MEMORY = 60.0, 1 / 3
"""Time over which the speed of a stage is averaged: at least so many seconds, and this share of its time so far."""

_log = logging.getLogger(__name__)
_SHOWN = {"is_shown": True}
"""Attribute of log records that the progress display prints already; the terminal's log handler skips them."""


class Stage(Protocol):
    """Display of one stage's events."""

    def event(self, task: Task, event: Event) -> None:
        """Show an event of a task."""


class Reporter:
    """Display of messages and stages on standard error. Standard output is reserved for results."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    def message(self, text: str) -> None:
        """Log a message, and show it on a line of its own."""
        _log.info("%s", printable(text), extra=_SHOWN)
        self.show(text)

    def show(self, text: str) -> None:
        """Show a line, where standard error does not show the log."""
        if not self._quiet and verbosity() < 1:
            print(one_line(text), file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, title: str, tasks: int) -> Iterator[Stage]:
        """Show a stage of `tasks` tasks while the context lasts."""
        if not self._quiet and verbosity() < 1 and sys.stderr.isatty():
            try:
                from rich.progress import Progress as Bars
            except ImportError:
                pass
            else:
                with _bars(Bars) as bars:
                    yield _BarStage(self, title, tasks, bars)
                return
        yield _LineStage(self, title, tasks)


@dataclass
class _Running:
    """Task that has started and not ended."""

    since: float
    """Time of its start, in seconds of the monotonic clock."""
    timed_from: float
    """Time from which its speed is measured."""
    first: float = 0.0
    """Share that was done at `timed_from`."""
    share: float = 0.0
    last: Progress | None = None

    def seconds_left(self, now: float) -> float:
        """Time that the rest takes at the task's own speed; 0 before a tenth of the task has shown that speed."""
        own = self.share - self.first
        return (1 - self.share) * (now - self.timed_from) / own if own >= 0.1 else 0.0


class Tracker:
    """Finished and running tasks of a stage, and the time that the rest takes.

    Speed is the tasks' own progress over time. Older progress counts exponentially less, so that the estimate follows a
    change of speed without jumping. What a resumed task has brought along is no progress, and the first of many steps,
    which compiles, is no measure of the speed.
    """

    def __init__(self, tasks: int, now: float) -> None:
        self.tasks, self.finished = tasks, 0
        self.running: dict[str, _Running] = {}
        self._started = self._last = now
        self._work = self._seconds = 0.0

    def take(self, task: Task, event: Event, now: float) -> None:
        """Count an event, at a time of the monotonic clock."""
        if isinstance(event, Started):
            self.running[task.name] = _Running(now, now)
        elif isinstance(event, Lost | Failed):
            self.running.pop(task.name, None)
        elif isinstance(event, Progress):
            running, total = self.running.setdefault(task.name, _Running(now, now)), max(1, event.total)
            if running.last is None:
                running.first = running.share = max(0, event.done - 1) / total
                if total > FEW_STEPS:  # the first of many steps compiles, and says nothing of the speed
                    running.timed_from, running.first = now, event.done / total
                    if not self._work:
                        running.share, self._started, self._last = running.first, now, now
            self._advance(event.done / total - running.share, now)
            running.share, running.last = event.done / total, event
        elif isinstance(event, Finished):
            self.finished += 1
            self._advance(1 - self.running.pop(task.name, _Running(now, now)).share, now)

    def _advance(self, work: float, now: float) -> None:
        kept = math.exp((self._last - now) / max(SHORTEST_MEMORY, MEMORY * (now - self._started)))
        self._work = kept * self._work + max(0.0, work)
        self._seconds, self._last = kept * self._seconds + now - self._last, now

    def slowest(self, now: float) -> tuple[str, _Running] | None:
        """Running task that ends last at its present speed; while no speed is known, the one that started first."""
        return max(self.running.items(), key=lambda each: (each[1].seconds_left(now), -each[1].since), default=None)

    def seconds_left(self, now: float) -> float:
        """Estimated time for the remaining work; nan while no speed is known."""
        left = self.tasks - self.finished - sum(each.share for each in self.running.values())
        slowest = self.slowest(now)
        seconds = left * self._seconds / self._work if self._work and self._seconds > 1 else math.nan
        return max(seconds, slowest[1].seconds_left(now) if slowest else 0.0)


class _LineStage:
    """Display by lines: when a stage starts or ends, when a worker is lost, and every `LINE_INTERVAL` seconds."""

    def __init__(self, reporter: Reporter, title: str, tasks: int) -> None:
        self._reporter, self._title = reporter, title
        self._started = self._last = time.monotonic()
        self._tracker = Tracker(tasks, self._started)
        _log.info("stage started %s", fields(stage=title, tasks=tasks), extra=_SHOWN)
        self._show_state(f"{title}: {counted(tasks, 'task')} to run")

    def event(self, task: Task, event: Event) -> None:
        """Log an event, and show it."""
        now = time.monotonic()
        running = self._tracker.running.get(task.name)
        self._tracker.take(task, event, now)
        _record(task, event, None if running is None else now - running.since)
        if isinstance(event, Lost | Failed | Resized | Note):
            self._show(_line(task, event))
        elif isinstance(event, Finished) and self._tracker.finished == self._tracker.tasks:
            _log.info("stage finished %s", fields(stage=self._title, seconds=now - self._started), extra=_SHOWN)
            self._show_state(f"{self._title}: done in {now - self._started:.0f} s")
        elif isinstance(event, Progress | Finished) and now - self._last > LINE_INTERVAL:
            self._last = now
            self._log_progress(now)
            slowest = self._tracker.slowest(now)
            last = slowest[1].last if slowest else None
            measured = f"{_values(last.values)}{_measured(last.metrics)}" if last else ""
            self._show_state(f"{self._summary(now)}{measured}")

    def _show(self, text: str) -> None:
        """Show a line."""
        self._reporter.show(text)

    def _show_state(self, text: str) -> None:
        """Show a line that replaces earlier ones about the stage, where lines can be replaced."""
        self._show(text)

    def _log_progress(self, now: float) -> None:
        tracker, slowest = self._tracker, self._tracker.slowest(now)
        left, event = tracker.seconds_left(now), slowest[1].last if slowest else None
        values = {
            "done": tracker.finished,
            "tasks": tracker.tasks,
            "running": len(tracker.running),
            "seconds_left": None if math.isnan(left) else round(left),
            "slowest": slowest[0] if slowest else None,
            **({"step": event.done, "steps": event.total, **event.values} if event else {}),
        }
        _log.info("progress %s", fields(stage=self._title, **values), extra=_SHOWN)

    def _summary(self, now: float) -> str:
        """Numbers of finished and running tasks, estimated time left, and the slowest task."""
        tracker, slowest, left = self._tracker, self._tracker.slowest(now), self._tracker.seconds_left(now)
        done = f"{self._title}: {tracker.finished}/{tracker.tasks}{TASKS_DONE[0]}"
        parts = [done, f"{len(tracker.running)} running"]
        parts += [] if math.isnan(left) else [f"{_duration(left)} left"]
        if slowest:
            step = f" at {slowest[1].last.done}/{slowest[1].last.total}" if slowest[1].last else ""
            parts.append(f"slowest{step}: {slowest[0]}")
        return ", ".join(parts)


class _BarStage(_LineStage):
    """Display by a line about the stage and bars of its running tasks."""

    def __init__(self, reporter: Reporter, title: str, tasks: int, bars: Bars) -> None:
        self._bars = bars
        self._rows: dict[str, TaskID] = {}
        super().__init__(reporter, title, tasks)

    def event(self, task: Task, event: Event) -> None:
        """Log an event, and show it in the bars."""
        super().event(task, event)
        if isinstance(event, Progress):
            if task.name not in self._rows:
                self._rows[task.name] = self._bars.add_task(task.name, total=event.total, values="")
            self._bars.update(
                self._rows[task.name], completed=event.done, total=event.total, values=_values(event.values)
            )
        elif isinstance(event, Finished | Lost | Failed) and task.name in self._rows:
            self._bars.remove_task(self._rows.pop(task.name))
        if self._tracker.finished < self._tracker.tasks:
            self._show_state(self._summary(time.monotonic()))

    def _show(self, text: str) -> None:
        self._bars.console.print(one_line(text), markup=False, highlight=False)

    def _show_state(self, text: str) -> None:
        self._bars.headline = one_line(text)  # type: ignore[attr-defined]


def _bars(bars: type[Bars]) -> Bars:
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Column with the steps per second."""

        def render(self, task: object) -> Text:
            speed = getattr(task, "speed", None)
            return Text(f"{speed:.1f}/s" if speed else "", style="dim")

    class Headed(bars):  # type: ignore[valid-type,misc]
        """Bars below a line of text."""

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
    """Further measurements of a progress line: start epoch, speed and memory."""
    shown = ""
    if (bound := metrics.get("datm_ray_distill_upper_bound")) is not None:
        shown += f"  start below {bound:.0f}"
    for stage in ("distill", "expert"):
        if (rate := metrics.get(f"datm_ray_{stage}_images_per_second")) is not None:
            shown += f"  {rate:,.0f} images/s"
    memory = metrics.get("datm_ray_worker_memory_bytes", math.nan)
    return shown if math.isnan(memory) else f"{shown}  memory {size_in_words(memory)}"


def _duration(seconds: float) -> str:
    """Rounded duration, such as "about 12 min" or "about 2.5 h"."""
    if seconds < 90:
        return "about a minute"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


def _record(task: Task, event: Event, seconds: float | None) -> None:
    """Log an event of a task that has run for so many seconds."""
    if isinstance(event, Progress) and not _log.isEnabledFor(logging.DEBUG):
        return  # one for each iteration
    level, what = logging.INFO, ""
    values: dict[str, object] = {}
    match event:
        case Started():
            what, values = "task started", {"workers": event.workers}
        case Progress():
            level, what = logging.DEBUG, "task progress"
            values = {"step": event.done, "steps": event.total, "saved": event.saved, **event.values}
        case Finished():
            what, values = "task finished", {"seconds": seconds}
        case Lost():
            level, what, values = logging.WARNING, WORKER_LOST, {"attempt": event.attempt, "reason": event.reason}
        case Failed():
            level, what, values = logging.ERROR, "task failed", {"reason": event.reason}
        case Resized():
            what, values = "workers changed", {"workers": event.size, "wanted": event.wanted}
        case Note():
            what, values = "note", {"text": event.text}
    _log.log(level, "%s %s", what, fields(task=task.name, **values), extra=_SHOWN)


def _line(task: Task, event: Lost | Failed | Resized | Note) -> str:
    if isinstance(event, Note):
        return f"{task.name}: {event.text}"
    if isinstance(event, Failed):
        return f"{task.name} failed: {event.reason} Finishing {counted(event.others, 'running task')}, then stopping."
    if isinstance(event, Resized):
        why = " (the cluster can hold no more)" if event.size < event.wanted else ""
        return f"{task.name}: runs with {event.size} of {counted(event.wanted, 'worker')}{why}"
    return f"{task.name}: {WORKER_LOST} ({event.reason}); starting attempt {event.attempt + 1} on another one"
