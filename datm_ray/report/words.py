"""Numbers and lists as text for readers."""

from __future__ import annotations

from collections.abc import Sequence


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def percent(share: float) -> str:
    """Share in [0, 1] as a percentage: three significant digits from 10 % on, two below."""
    digits = 3 if share >= 0.1 else 2
    return f"{100 * share:.{digits}g}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
