"""Progress and messages for the user: bars on a terminal, otherwise a log line every few seconds."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from datm_ray.errors import one_line
from datm_ray.runtime.executor import Event, Failed, Finished, Lost, Note, Progress, Resized, Task, counted
from datm_ray.store.trajectories import size_in_words

if TYPE_CHECKING:
    from rich.progress import Progress as Bars, TaskID

WORKER_LOST = ": worker lost ("
TASKS_DONE = " tasks done; "
"""Parts of the log lines about a lost worker and about progress, by which `cli.jobs` finds them."""

LINE_INTERVAL = 15.0
"""Seconds between progress lines where no terminal shows bars."""


class Stage(Protocol):
    """Display of one stage's events."""

    def event(self, task: Task, event: Event) -> None:
        """Show an event of a task."""


class Reporter:
    """Display of messages and stages on standard error. Standard output is reserved for results."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet

    def message(self, text: str) -> None:
        """Print a message on a line of its own."""
        if not self._quiet:
            print(one_line(text), file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, title: str, tasks: int) -> Iterator[Stage]:
        """Show a stage of `tasks` tasks while the context lasts."""
        if not self._quiet and sys.stderr.isatty():
            try:
                from rich.progress import Progress as Bars
            except ImportError:
                pass
            else:
                with _bars(Bars) as bars:
                    yield _BarStage(bars, title, tasks)
                return
        yield _LineStage(self, title, tasks)


class _LineStage:
    """Display by lines: when a stage starts or ends, when a worker is lost, and every `LINE_INTERVAL` seconds."""

    def __init__(self, reporter: Reporter, title: str, tasks: int) -> None:
        self._reporter, self._title, self._tasks = reporter, title, tasks
        self._finished = 0
        self._started = self._last = time.monotonic()
        reporter.message(f"{title}: {counted(tasks, 'task')} to run")

    def event(self, task: Task, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Lost | Failed | Resized | Note):
            self._reporter.message(_line(task, event))
        elif isinstance(event, Finished):
            self._finished += 1
            if self._finished == self._tasks:
                self._reporter.message(f"{self._title}: done in {now - self._started:.0f} s")
        elif now - self._last > LINE_INTERVAL:
            self._last = now
            self._reporter.message(
                f"{self._title}: {self._finished}/{self._tasks}{TASKS_DONE}{self._left(now)}{task.name} "
                f"{event.done}/{event.total}{_values(event.values)}{_measured(event.metrics)}"
            )

    def _left(self, now: float) -> str:
        """Estimated time for the remaining tasks, if they take as long as the finished ones on average."""
        if not self._finished:
            return ""
        seconds = (now - self._started) / self._finished * (self._tasks - self._finished)
        return f"about {seconds / 60:.0f} min left; " if seconds >= 60 else "a minute left; "


class _BarStage:
    """Display by bars: one for the stage and one for each running task."""

    def __init__(self, bars: Bars, title: str, tasks: int) -> None:
        self._bars = bars
        self._whole = bars.add_task(title, total=tasks, values="")
        self._rows: dict[str, TaskID] = {}

    def event(self, task: Task, event: Event) -> None:
        if isinstance(event, Lost | Failed | Resized | Note):
            self._bars.console.print(one_line(_line(task, event)), markup=False, highlight=False)
        if isinstance(event, Resized | Note):
            return
        if isinstance(event, Progress):
            if task.name not in self._rows:
                self._rows[task.name] = self._bars.add_task(f"  {task.name}", total=event.total, values="")
            self._bars.update(
                self._rows[task.name], completed=event.done, total=event.total, values=_values(event.values)
            )
            return
        if task.name in self._rows:
            self._bars.remove_task(self._rows.pop(task.name))
        if isinstance(event, Finished):
            self._bars.advance(self._whole)


def _bars(bars: type[Bars]) -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        """Column with the steps per second."""

        def render(self, task: object) -> Text:
            speed = getattr(task, "speed", None)
            return Text(f"{speed:.1f}/s" if speed else "", style="dim")

    return bars(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
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


def _line(task: Task, event: Lost | Failed | Resized | Note) -> str:
    if isinstance(event, Note):
        return f"{task.name}: {event.text}"
    if isinstance(event, Failed):
        return f"{task.name} failed: {event.reason} Finishing {counted(event.others, 'running task')}, then stopping."
    if isinstance(event, Resized):
        why = " (the cluster can hold no more)" if event.size < event.wanted else ""
        return f"{task.name}: runs with {event.size} of {counted(event.wanted, 'worker')}{why}"
    return f"{task.name}{WORKER_LOST}{event.reason}); starting attempt {event.attempt + 1} on another one"
