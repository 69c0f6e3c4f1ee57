"""Log of a run, by the standard `logging` module: lines of `time level node worker  event key=value ...`, in UTC.

All loggers of the package are below "datm_ray". `writing` adds a log file in each run's folder (see `uploaded_log` for
folders in object stores), and `show` sets what standard error shows. A worker in another process keeps its records in a
`Collector` until the driver takes them. Passwords, keys and tokens are replaced by *** in every line. Tests:
tests/monitor/test_logs.py.
"""

from __future__ import annotations

import json
import logging
import math
import re
import socket
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from logging.handlers import QueueHandler, RotatingFileHandler
from pathlib import Path

from datm_ray.errors import DatmError
from datm_ray.words import one_line

LOG = "log.txt"
"""Name of the log file in a run's folder."""
LARGEST = 8 * 2**20
"""Size in bytes above which a log file is renamed to `log.txt.1`. An earlier `log.txt.1` is replaced."""
KEPT = 1000
"""Number of records that a worker keeps for the driver. Older ones are dropped."""
REPEAT_AFTER = 20.0
"""Seconds after a message on standard error within which it is not repeated, for example if every worker sends it."""

_NODE = socket.gethostname() or "unknown"
_ROOT = logging.getLogger("datm_ray")
_log = logging.getLogger(__name__)
_hidden: set[str] = set()
"""Secret values given to `hide`, in each form in which an error's text may quote them."""
_SECRET = re.compile(
    r"(?i)(?<=://)[^/\s]+(?=@)"  # user and password of an address
    r"|(?<=bearer )\S+|(?<=basic )\S+"
    r"|(?P<name>(?:secret|token|passw|pwd|signature|credential|api_?key|[_-]key)[\w-]{0,40}[\"']?\s?[=:]\s?[\"']?)[^\s\"'&]+"
)


def fields(**values: object) -> str:
    """Values as text `key=value key=value`. `None` is left out; texts with spaces or quotes are in double quotes."""
    return " ".join(f"{key}={_shown(value)}" for key, value in values.items() if value is not None)


def printable(text: str) -> str:
    """Text that every log handler can encode: bytes of a file name that are not UTF-8 become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _shown(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else printable(str(value))
    return text if re.fullmatch(r"[^\s\"'=]+", text) else json.dumps(text, ensure_ascii=False)


def hide(values: Iterable[str]) -> None:
    """Have `masked` replace these secret values too, in each form in which an error's text may quote them.

    Values of at most 5 characters, such as "true", are not replaced, because they may be ordinary words.
    """
    for value in values:
        if len(value) > 5:
            _hidden.update((value, repr(value)[1:-1], json.dumps(value)[1:-1], one_line(value)))


def masked(text: str) -> str:
    """Text with *** in place of passwords, keys and tokens, and of the values given to `hide`."""
    for value in sorted(_hidden, key=len, reverse=True):  # a value may be part of a longer one
        text = text.replace(value, "***")
    return _SECRET.sub(lambda found: f"{found['name'] or ''}***", text)


def verbosity() -> int:
    """Level of what standard error shows: -1 errors; 0 messages and warnings; 1 the log; 2 the log with details."""
    return _terminal.verbosity


def show(level: int) -> None:
    """Set what standard error shows: -1 errors; 0 messages and warnings; 1 the log; 2 details, and Ray's output too."""
    _terminal.verbosity = level
    _ROOT.addHandler(_terminal)
    _ROOT.setLevel(logging.DEBUG if level > 1 else logging.INFO)


def is_raw() -> bool:
    """True if `show` has set level 2, at which Ray and its workers write to standard error too."""
    return _ROOT.isEnabledFor(logging.DEBUG)


@contextmanager
def writing(folders: Sequence[str], uploaded: Sequence[logging.Handler] = ()) -> Iterator[None]:
    """Write the log to `log.txt` in each of the folders while the context lasts. Each line is written at once.

    Args:
        folders: local folders. Missing ones are made.
        uploaded: further handlers, such as `UploadedLog`. All handlers are closed at the end, in parallel.
    """
    before = _ROOT.level
    added = [*([] if _ROOT.hasHandlers() else [_terminal]), *uploaded]  # without a handler no warning would be shown
    for folder in folders:
        Path(folder).mkdir(parents=True, exist_ok=True)
        added.append(_File(Path(folder) / LOG))
    for handler in added:
        _ROOT.addHandler(handler)
    if before == logging.NOTSET:
        _ROOT.setLevel(logging.INFO)
    try:
        yield
    finally:
        _ROOT.setLevel(before)
        for handler in added:
            _ROOT.removeHandler(handler)
        with ThreadPoolExecutor(max(1, len(added))) as closing:  # each may wait for a server that does not answer
            list(closing.map(lambda each: each.close(), added))


def accept(records: Sequence[logging.LogRecord]) -> None:
    """Pass records that workers collected to this process's loggers, with their original time, node and worker."""
    for record in records:
        logging.getLogger(record.name).handle(record)


class Collector(QueueHandler):
    """Log handler in a worker's process, which keeps the package's records until the driver takes them."""

    queue: deque[logging.LogRecord]  # type: ignore[assignment]

    def __init__(self, worker: str, level: int) -> None:
        """Keep the records of this process.

        Args:
            worker: name of the worker in the log.
            level: lowest level of the records to keep.
        """
        super().__init__(deque(maxlen=KEPT))  # type: ignore[arg-type]
        self._worker = worker
        _ROOT.addHandler(self)
        _ROOT.setLevel(level)

    def enqueue(self, record: logging.LogRecord) -> None:
        """Keep a record until `take`. If `KEPT` records are kept already, the oldest is dropped."""
        record.node, record.worker = _NODE, self._worker
        self.queue.append(record)

    def take(self) -> list[logging.LogRecord]:
        """Return the records kept since the last call of `take`, and forget them. Several threads may call this."""
        with self.lock or nullcontext():  # held while a record is added, too
            taken = list(self.queue)
            self.queue.clear()
        return taken


class LineFormatter(logging.Formatter):
    """Format of a record: one line, and below it the traceback if there is one."""

    converter = staticmethod(time.gmtime)
    default_msec_format = "%s.%03dZ"
    default_time_format = "%Y-%m-%dT%H:%M:%S"

    def format(self, record: logging.LogRecord) -> str:
        node, worker = getattr(record, "node", _NODE), getattr(record, "worker", f"driver/{record.process}")
        line = f"{self.formatTime(record)} {record.levelname} {node} {worker}  {one_line(record.getMessage())}"
        return masked(f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line)


class _Terminal(logging.Handler):
    """Log handler that prints to the current standard error."""

    verbosity = 0

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(LineFormatter())
        self._last: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Print the whole line if `verbosity` is above 0, else only the message, of warnings and errors.

        Below 0, messages of warnings are left out too. At both levels, messages that the progress display shows itself
        are left out, and those that were printed within the last `REPEAT_AFTER` seconds.
        """
        if self.verbosity > 0:
            print(self.format(record), file=sys.stderr, flush=True)
            return
        least = logging.WARNING if self.verbosity == 0 else logging.ERROR
        text, now = masked(one_line(record.getMessage())), time.monotonic()
        kind = text.partition(" (")[0]  # workers may give different reasons, in brackets, for one warning
        is_repeated = now - self._last.get(kind, -math.inf) < REPEAT_AFTER
        if record.levelno < least or hasattr(record, "is_shown") or is_repeated:
            return
        self._last[kind] = now
        print(text, file=sys.stderr, flush=True)


class _File(RotatingFileHandler):
    """Log file of a limited size. On a full disk the run continues, and only one message is printed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=LARGEST, backupCount=1, encoding="utf-8", delay=True, errors="backslashreplace")
        self.setFormatter(LineFormatter())
        self._has_failed = False

    def close(self) -> None:
        """Close the file, even on a full disk."""
        with suppress(OSError):
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        """Print that the file cannot be written, at the first failure only."""
        if not self._has_failed:
            self._has_failed = True
            reason = one_line(str(sys.exc_info()[1]))
            print(f"cannot write {self.baseFilename} ({reason}); the run continues", file=sys.stderr, flush=True)


_terminal = _Terminal()


@contextmanager
def noting_the_end() -> Iterator[None]:
    """Log how the run in the block ended: finished, interrupted or stopped by an error.

    An error that is not a `DatmError` is logged with its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        _log.info("run interrupted", extra={"is_shown": True})
        raise
    except BaseException as failure:
        reason, unexpected = fields(error=type(failure).__name__, reason=str(failure)), isinstance(failure, Exception)
        unexpected = unexpected and not isinstance(failure, DatmError)
        _log.error("run stopped %s", reason, exc_info=unexpected, extra={"is_shown": True})
        raise
    _log.info("run finished")
