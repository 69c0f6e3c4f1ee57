"""Sections of a measurement: each with its own time, written down row by row, none able to stop the others."""

from __future__ import annotations

import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tables import table

from gpu.machine import Machine

Row = dict[str, Any]
"""Values by column; further keys go to the JSON file only."""


class OutOfTime(BaseException):
    """Raised when a section's time is over. Not an Exception, so that libraries do not catch it as a failure."""


@dataclass(frozen=True)
class Clock:
    """Time that a section has."""

    end: float
    """On the monotonic clock."""

    @classmethod
    def of(cls, seconds: float) -> Clock:
        """A clock that ends this many seconds from now."""
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds until the end; negative after it."""
        return self.end - time.monotonic()


@dataclass(frozen=True)
class Section:
    """One question, with its measurement and its table."""

    name: str
    title: str
    note: str
    """How it is measured, for readers."""
    columns: tuple[str, ...]
    """Keys of the rows that the table shows."""
    seconds: float
    """Most that it may take."""
    least: float
    """Fewest with which it is worth starting."""
    measure: Callable[[Machine, Clock], Iterator[Row]]
    """Yields rows, the most important ones first; it may be stopped after any of them."""


@dataclass
class Outcome:
    """Rows and errors that a section has so far."""

    section: Section
    rows: list[Row] = field(default_factory=list)
    status: str = "running"
    """done; stopped, skipped or failed with the reason."""
    seconds: float = 0.0
    error: str = ""
    """The traceback of a failure."""

    @property
    def failures(self) -> int:
        """Number of failures: the section's own, and rows that say `failed` or whose `verdict` is not ok."""
        bad = sum("failed" in row or row.get("verdict", "ok") != "ok" for row in self.rows)
        return bad + self.status.startswith("failed")

    def lines(self) -> list[str]:
        """The section as lines of Markdown."""
        took = f"{self.status}; {self.seconds:.0f} s" if self.seconds else self.status
        cells = [
            [
                _shown(row.get(column, row.get("failed", "") if place == 1 else ""))
                for place, column in enumerate(self.section.columns)
            ]
            for row in self.rows
        ]
        return [
            f"## {self.section.title}",
            "",
            self.section.note,
            "",
            f"({took})",
            "",
            *(table(self.section.columns, cells) if cells else []),
            "",
        ]

    def as_json(self) -> dict[str, Any]:
        """The section as plain data for JSON."""
        return {
            "name": self.section.name,
            "status": self.status,
            "seconds": round(self.seconds, 2),
            **({"error": self.error} if self.error else {}),
            "rows": self.rows,
        }


def run_sections(
    sections: Sequence[Section], machine: Machine, seconds: float, save: Callable[[Sequence[Outcome]], None]
) -> list[Outcome]:
    """Run all sections, one after the other.

    Args:
        seconds: that they may take together.
        save: called after every row and every section with everything so far.
    """
    whole, outcomes = Clock.of(seconds), list[Outcome]()
    for section in sections:
        outcome = Outcome(section)
        outcomes.append(outcome)
        left = whole.left()
        if left < section.least:
            outcome.status = f"skipped: {max(0.0, left):.0f} s are left, it takes {section.least:.0f} s or more"
        else:
            _run(outcome, machine, min(section.seconds, left), lambda: save(outcomes))
        save(outcomes)
    return outcomes


def _run(outcome: Outcome, machine: Machine, seconds: float, save: Callable[[], None]) -> None:
    clock, started = Clock.of(seconds), time.monotonic()
    try:
        with _stopped_after(seconds):
            for row in outcome.section.measure(machine, clock):
                outcome.rows.append(row)
                save()
        outcome.status = "done"
    except OutOfTime:
        outcome.status = f"stopped: its {seconds:.0f} s were over"
    except Exception as failure:
        outcome.status, outcome.error = f"failed: {in_a_line(failure)}", traceback.format_exc()
    outcome.seconds = time.monotonic() - started


@contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in the block when its time is over; code outside Python is interrupted when it returns."""

    def stop(*_: object) -> None:
        raise OutOfTime

    started, handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    before, _ = signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(0.01, before - (time.monotonic() - started)) if before else 0)
        signal.signal(signal.SIGALRM, handler)


def tried(what: Mapping[str, Any], work: Callable[[], Row]) -> Row:
    """A row of results, or a row with the error if its work fails, so that the others still run."""
    try:
        return {**what, **work()}
    except Exception as failure:
        return {**what, "failed": in_a_line(failure), "error": traceback.format_exc()}


def in_a_line(failure: BaseException) -> str:
    """Kind of an error and its first line."""
    first = next((line.strip() for line in str(failure).splitlines() if line.strip()), "")
    return f"{type(failure).__name__}: {first}"[:200].replace("|", "/")


def _shown(value: Any) -> str:
    """Format a cell: numbers with three digits, a list as median (smallest to largest), n."""
    if isinstance(value, (list, tuple)) and value:
        spread = f"{statistics.median(value):.3g} ({min(value):.3g} to {max(value):.3g})"
        return f"{spread}, n = {len(value)}" if len(value) > 1 else f"{value[0]:.3g}, n = 1"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)
