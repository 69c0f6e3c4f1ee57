"""End of the command line: one line per failure, an exit code, and a log of unexpected failures.

Exit codes: 0 for success, 1 for failed work, 2 for bad input, 75 if the cluster of a followed job no longer answers,
130 for Ctrl-C, 141 if the reader of the output has closed the pipe, 143 for SIGTERM.
DATM_RAY_DEBUG=1 shows the traceback of a failure. Tests: tests/cli/test_cli.py.
"""

from __future__ import annotations

import atexit
import codecs
import errno
import io
import os
import select
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import typer
from typer.core import TyperGroup

from datm_ray.errors import DatmError
from datm_ray.monitor.logs import masked
from datm_ray.words import one_line

INTERRUPTED = 130
"""Exit code after Ctrl-C, by the shell's convention 128 + signal number."""
READER_GONE = 141
"""Exit code if the reader of the output closed the pipe, by the shell's convention 128 + signal number."""
ERROR_LOG = "datm-ray-error.log"
"""Name of the file, in the output folder, with tracebacks of unexpected failures."""
_RESUMED = ("run", "experts", "distill", "evaluate")  # commands that continue where an earlier one was stopped

_home: str | None = None
"""Temporary folder that `find_home` has made for HOME; `None` if the user has a home folder."""


class _Caught(Exception):
    """Wrapper that carries a KeyboardInterrupt or BrokenPipeError past Typer, which would turn it into an exit code."""

    def __init__(self, failure: BaseException, resumes: bool) -> None:
        super().__init__()
        self.failure, self.resumes = failure, resumes


class Commands(TyperGroup):
    """Command group that passes Ctrl-C and closed pipes on to `end_cleanly`."""

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand. Ctrl-C and closed pipes become `_Caught`, which Typer does not turn into an exit code."""
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, KeyboardInterrupt) as failure:
            raise _Caught(failure, ctx.invoked_subcommand in _RESUMED) from failure


def end_cleanly(command: Callable[[], object], out: Callable[[], str | None]) -> None:
    """Run a command and end the process: with 0, or with one line on standard error and another exit code.

    Args:
        command: runs the command line.
        out: returns the folder for the traceback of an unexpected failure, the command's output folder; `None` if the
            command has none or must write nothing there.
    """
    try:
        command()
    except SystemExit as end:
        if end.code == 1 and any([_has_no_reader(sys.__stdout__), _has_no_reader(sys.__stderr__)]):
            sys.exit(READER_GONE)  # the pipe was closed while typer printed its help
        if not end.code:
            _exit_flushed()
        raise
    except _Caught as caught:
        _end_with(caught.failure, out(), resumes=caught.resumes)
    except Exception as failure:
        _end_with(failure, out())


def _exit_flushed() -> None:
    """Flush standard output and error before a successful exit; if that fails, end the process with an error."""
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except OSError as failure:
        _end_with(failure, None)


def _end_with(failure: BaseException, out: str | None, *, resumes: bool = False) -> None:
    if isinstance(failure, KeyboardInterrupt):
        interrupts = list(_interrupts(failure))
        if failed := _failed_before(interrupts[-1]):
            try:
                _end_with(failed, out)
            except SystemExit as end:
                _exit_at_once(int(end.code or 0))
        failure = next((each for each in interrupts if str(each)), failure)
        saved, there = (f" Saved {failure}.", " from there") if str(failure) else ("", "")
        say(f"stopped.{saved}" + (f" Run the same command again to resume{there}." if resumes else ""))
        code = getattr(failure, "exit_code", INTERRUPTED)
        if any(getattr(each, "is_at_once", False) for each in interrupts):
            _exit_at_once(code)
        sys.exit(code)
    if isinstance(failure, BrokenPipeError) and any([_has_no_reader(sys.stdout), _has_no_reader(sys.stderr)]):
        sys.exit(READER_GONE)
    if os.environ.get("DATM_RAY_DEBUG") == "1":
        raise failure
    if isinstance(failure, DatmError):
        say(str(failure))
        sys.exit(failure.exit_code)
    if _is_of_the_locale(failure):
        say(
            f"a path holds characters that this locale cannot encode ({one_line(str(failure))}). "
            "Try: PYTHONUTF8=1 before the command, or a UTF-8 locale such as LC_ALL=C.UTF-8."
        )
        sys.exit(2)
    log = _write_log(failure, out)
    where = f" The traceback is in {log}." if log else " Set DATM_RAY_DEBUG=1 for the traceback."
    say(f"{_in_words(failure)}{where}")
    sys.exit(1)


def _is_of_the_locale(failure: BaseException) -> bool:
    """True if a path cannot be encoded because the locale has another encoding than UTF-8, such as ASCII.

    Such a path usually comes from a recipe, because recipes are read as UTF-8 in any locale. A path from the command
    line can be encoded in any locale.
    """
    if not isinstance(failure, UnicodeEncodeError):
        return False
    names = {codecs.lookup(name).name for name in (failure.encoding, sys.getfilesystemencoding())}
    return len(names) == 1 and names != {"utf-8"}


def _exit_at_once(code: int) -> None:
    """End the process without exit handlers, because Ray's handler takes seconds. Ray's processes end with this one."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    _remove_home()
    os._exit(code)


def _failed_before(first: KeyboardInterrupt) -> Exception | None:
    """Exception that had ended the command before its first interrupt; `None` if the command had not failed.

    After a failure, Ctrl-C or SIGTERM only interrupts the closing of Ray.

    Args:
        first: first of the command's interrupts.
    """
    before = first.__context__ if getattr(first, "is_at_once", False) else None
    return before if isinstance(before, Exception) else None


def _interrupts(end: KeyboardInterrupt) -> Iterator[KeyboardInterrupt]:
    """Yield all interrupts of the command, latest first. The text of one interrupt may say what was saved.

    Args:
        end: latest interrupt. Each interrupt leads to the one before by `__context__`.
    """
    each: BaseException | None = end
    while each:
        if isinstance(each, KeyboardInterrupt):
            yield each
        each = each.__context__


def _in_words(failure: BaseException) -> str:
    """One line about an unexpected exception, without secrets, and with a remedy for the known kinds."""
    kinds = {each.__name__ for each in type(failure).__mro__}
    words = one_line(masked(str(failure))).rstrip(". ")  # masked, then cut: no half of a secret stays
    shown = type(failure).__name__ + (f": {words[:300]}" if words else "")
    if kinds & {"MemoryError", "OutOfMemoryError"} or "t allocate memory" in words.replace("Cannot", "can't"):
        return (
            f"there is not enough memory ({shown}). "
            "Try: `datm-ray plan` with the same recipe, fewer workers, or a machine with more memory."
        )
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"a disk or a quota is full ({shown}). Try: free some space, then run the same command again."
    if isinstance(failure, RuntimeError) and "home directory" in words:
        return f"this user has no home folder ({shown}). Try: give dataset.path, or set HOME to a folder of yours."
    return f"unexpected {shown}."


def _write_log(failure: BaseException, out: str | None) -> str | None:
    """Append a failure's traceback to `ERROR_LOG` in the output folder, or write it to a temporary file.

    Returns the path of the file, or `None` if no file could be written.

    Args:
        out: output folder; `None`, or a folder that does not exist on this machine, for the temporary file.
    """
    lines = [time.strftime("%Y-%m-%d %H:%M:%S "), _command(), "\n", *traceback.format_exception(failure), "\n"]
    text = masked("".join(lines)).encode(errors="backslashreplace")
    with suppress(OSError, ValueError):
        if out is not None and Path(out).is_dir():
            with open(Path(out) / ERROR_LOG, "ab") as file:
                file.write(text)
            return str(Path(out) / ERROR_LOG)
    with suppress(OSError):
        with tempfile.NamedTemporaryFile(prefix="datm-ray-error-", suffix=".log", delete=False) as kept:
            kept.write(text)
        return kept.name
    return None


def _command() -> str:
    """Command line of this process, with *** in place of the values of environment variables (--env KEY=VALUE)."""
    words = [*sys.argv]
    for place, word in enumerate(words[1:], 1):
        option = "--env=" if word.startswith("--env=") else ""
        if option or words[place - 1] == "--env":
            words[place] = f"{option}{word.removeprefix(option).partition('=')[0]}=***"
    return shlex.join(words)


def say(text: str) -> None:
    """Print a line to stderr, after the program's name."""
    if sys.stderr is not None:
        with suppress(OSError):  # the reader has closed the stream
            print(f"datm-ray: {text}", file=sys.stderr, flush=True)


def _has_no_reader(stream: TextIO | None) -> bool:
    """True if the stream is a pipe without a reader. If so, its remaining output is discarded."""
    if stream is None:
        return False
    try:
        number, poll = stream.fileno(), select.poll()
        poll.register(number, 0)
        if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            return False
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
    except (OSError, ValueError):  # the stream has no descriptor
        return False
    return True


def adapt_streams() -> None:
    """Make standard output and error print escapes for characters that they cannot encode, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def find_home() -> None:
    """Set HOME to a temporary folder if the user has no home folder, as in some containers."""
    global _home
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = _home = tempfile.mkdtemp(prefix="datm-ray-home-")
        atexit.register(_remove_home)


def _remove_home() -> None:
    if _home is not None:
        shutil.rmtree(_home, ignore_errors=True)


def note(context: typer.Context, option: typer.CallbackParam, value: Any) -> Any:
    """Store an option's value in the root command's context, under the option's name. Returns the value.

    For use as the callback of an option. When a command fails, `main` reads there the output folder, and if it was a
    dry run.
    """
    context.find_root().ensure_object(dict)[option.name] = value
    return value
