"""Sections of a measurement: each with its share of the time, written down row by row, none able to stop the others.

A section lists its works before the first begins. So a page names those that the time did not reach.
"""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tables import spread, table

from gpu.machine import Machine

Row = dict[str, Any]
"""Values by column; further keys go to the JSON file only."""


class OutOfTime(BaseException):
    """Raised when a section's time is over. Not an Exception, so that libraries do not catch it as a failure."""


@dataclass(frozen=True)
class Clock:
    """Time that a section has."""

    end: float
    """Time of the end, in seconds of the monotonic clock."""

    @classmethod
    def of(cls, seconds: float) -> Clock:
        """A clock that ends this many seconds from now."""
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds until the end; negative after it."""
        return self.end - time.monotonic()


class NotHere(Exception):
    """Raised by a work that this machine lacks something for; it counts as not reached, with this reason."""


@contextmanager
def needed_packages() -> Iterator[None]:
    """Turn a missing package into `NotHere`."""
    try:
        yield
    except ImportError as absent:
        raise NotHere(f"it needs the package {absent.name}" if absent.name else str(absent)) from None


@dataclass(frozen=True)
class Work:
    """A part of a section, which gives a row or several."""

    what: Row
    """Columns that name the work, which also begin its row."""
    run: Callable[[], Row | Iterator[Row]]
    """Returns the other columns of its row, or yields whole rows."""

    def rows(self) -> Iterator[Row]:
        """Run the work; an error is a row as well, so that the others still run.

        Raises:
            NotHere: this machine lacks something that the work needs.
        """
        try:
            found = self.run()
            if isinstance(found, dict):
                yield {**self.what, **found}
            else:
                yield from found
        except NotHere:
            raise
        except Exception as failure:
            yield {**self.what, "failed": in_a_line(failure), "error": traceback.format_exc()}


@dataclass(frozen=True)
class Section:
    """One question, with its measurement and its table."""

    name: str
    title: str
    note: str
    """Text for readers about how the section is measured."""
    columns: tuple[str, ...]
    """Keys of the rows that the table shows."""
    seconds: float
    """Share of the time that is left, relative to the shares of the sections after this one."""
    least: float
    """Fewest seconds with which it is worth starting."""
    works: Callable[[Machine, Clock], Iterable[Work]]
    """Lists its works, the most important ones first; it may be stopped in any of them."""

    @property
    def is_check(self) -> bool:
        """True if its rows are checks, which nobody may take as passed if they were not reached."""
        return "verdict" in self.columns


@dataclass
class Outcome:
    """Rows and errors of a section so far."""

    section: Section
    rows: list[Row] = field(default_factory=list)
    unreached: list[Row] = field(default_factory=list)
    """Columns that name the works that did not end, in order; `reason` says why, where it is not the time."""
    status: str = "running"
    """Status: running, done, or stopped, skipped or failed with the reason."""
    seconds: float = 0.0
    error: str = ""
    """The traceback of a failure."""

    @property
    def failures(self) -> int:
        """Number of failures: the section's own, and rows that say `failed` or whose `verdict` is not ok."""
        bad = sum("failed" in row or row.get("verdict", "ok") != "ok" for row in self.rows)
        return bad + self.status.startswith("failed")

    @property
    def unchecked(self) -> int:
        """Number of checks that were not reached."""
        return len(self.unreached) if self.section.is_check and self.status != "running" else 0

    @property
    def remark(self) -> str:
        """Status, and how many works were not reached, in words."""
        missing = f"; {len(self.unreached)} not reached" if self.unreached and self.status != "running" else ""
        return f"{self.status}{missing}"

    def lines(self) -> list[str]:
        """The section as lines of Markdown."""
        took = f"{self.remark}; {self.seconds:.0f} s" if self.seconds else self.remark
        cells = [_cells(row, self.section.columns, row.get("failed", "")) for row in self.rows]
        if self.status != "running":
            cells += [_cells(row, self.section.columns, row.get("reason", "not reached")) for row in self.unreached]
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
            "not reached": self.unreached,
        }


def run_sections(
    sections: Sequence[Section], machine: Machine, seconds: float, save: Callable[[Sequence[Outcome]], None]
) -> list[Outcome]:
    """Run all sections, one after the other.

    Each gets its share of the time that is left, so what one leaves over goes to those after it.

    Args:
        seconds: longest time in seconds of all sections together.
        save: called after every row and every section with everything so far.
    """
    whole, outcomes = Clock.of(seconds), list[Outcome]()
    for place, section in enumerate(sections):
        outcome = Outcome(section)
        outcomes.append(outcome)
        left = whole.left()
        share = section.seconds / sum(each.seconds for each in sections[place:])
        if left < section.least:
            outcome.status = f"skipped: {max(0.0, left):.0f} s are left, it takes {section.least:.0f} s or more"
            with suppress(Exception):  # what cannot be listed can be run no more than the rest
                outcome.unreached = [work.what for work in section.works(machine, Clock.of(0.0))]
        else:
            _run(outcome, machine, max(share * left, section.least), lambda: save(outcomes))
        save(outcomes)
    return outcomes


def _run(outcome: Outcome, machine: Machine, seconds: float, save: Callable[[], None]) -> None:
    clock, started = Clock.of(seconds), time.monotonic()
    lacking = list[Row]()
    try:
        with _stopped_after(seconds):
            works = list(outcome.section.works(machine, clock))
            outcome.unreached = [work.what for work in works]
            for work in works:
                try:
                    for row in work.rows():
                        outcome.rows.append(row)
                        save()
                except NotHere as reason:
                    lacking.append({**work.what, "reason": f"not reached: {reason}"})
                outcome.unreached = outcome.unreached[1:]
        outcome.status = "done"
    except OutOfTime:
        outcome.status = f"stopped: its {seconds:.0f} s were over"
    except Exception as failure:
        outcome.status, outcome.error = f"failed: {in_a_line(failure)}", traceback.format_exc()
    outcome.unreached = [*lacking, *outcome.unreached]
    outcome.seconds = time.monotonic() - started


@contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after so many seconds; code outside Python is interrupted when it returns."""

    def stop(*_: object) -> None:
        raise OutOfTime

    started, handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    before, _ = signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, max(0.01, before - (time.monotonic() - started)) if before else 0)
        signal.signal(signal.SIGALRM, handler)


def in_a_line(failure: BaseException) -> str:
    """Kind of an error and its first line."""
    first = next((line.strip() for line in str(failure).splitlines() if line.strip()), "")
    return f"{type(failure).__name__}: {first}"[:200].replace("|", "/")


def _cells(row: Row, columns: Sequence[str], remark: str) -> list[str]:
    """Cells of a row, with the remark in the first column that it lacks."""
    lacking = next((column for column in columns if column not in row), "")
    return [_shown(row.get(column, remark if column == lacking else "")) for column in columns]


def _shown(value: Any) -> str:
    """Format a cell: numbers with three digits, a list as median (smallest to largest), n."""
    if isinstance(value, (list, tuple)) and value:
        return f"{spread(value)}, n = {len(value)}" if len(value) > 1 else f"{value[0]:.3g}, n = 1"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)
