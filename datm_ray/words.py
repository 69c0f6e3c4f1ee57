"""Numbers and lists as text for readers: one format for each, in every message, table and page.

Tests: tests/test_words.py.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable


def counted(number: float, noun: str) -> str:
    """Number with its noun, given in the singular, such as "1 image", "1,234 images" or "2 classes"."""
    plural = "es" if noun.endswith(("s", "x")) else "s"
    return f"{number:,.12g} {noun}{plural * (number != 1)}"


def duration(seconds: float) -> str:
    """Duration in one unit or two, such as "0.4 s", "95 s", "4.4 min", "12 min", "1 h 5 min" or "3 days 4 h"."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 119.5:
        return f"{_rounded(seconds)} s"
    if minutes < 60:
        return f"{_rounded(seconds / 60)} min"
    if hours < 48:
        return f"{minutes // 60} h" + f" {minutes % 60} min" * (minutes % 60 > 0)
    return f"{hours // 24:,} days" + f" {hours % 24} h" * (hours % 24 > 0)


def _rounded(number: float) -> str:
    return f"{round(number, 1 if number < 10 else 0):g}"


def data_size(size: float) -> str:
    """Number of bytes to about three digits, such as "310 MiB". `config.parse_bytes` can read the text again."""
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{round(size, 2 if size < 10 else 1 if size < 100 else 0):g} {units[0]}"


def dimensions(shape: Iterable[int]) -> str:
    """Shape as text, such as "3x32x32"."""
    return "x".join(map(str, shape))


def percent(share: float) -> str:
    """Share in [0, 1] as a percentage: three significant digits from 10 % on, two below."""
    digits = 3 if share >= 0.1 else 2
    return f"{100 * share:.{digits}g}\N{NO-BREAK SPACE}%"


def listed(names: Iterable[str], most: int | None = None) -> str:
    """Names as "a, b and c". Only the first `most` are named, as "a, b and 2 more"; `None` names all."""
    named = list(names)
    if most is not None and len(named) > most:
        named = [", ".join(named[:most]), f"{len(named) - most:,} more"]
    return " and ".join(filter(None, (", ".join(named[:-1]), *named[-1:])))


def one_line(text: str) -> str:
    """Join the text's lines, and replace control characters, which a terminal would obey, by escapes."""
    text = re.sub(r"[^\S\r\n]*[\r\n]\s*", " ", text.strip())
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)
