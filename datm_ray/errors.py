"""Every error a user can meet, one class per cause.

A message is one line of up to three sentences: the fact, the likely cause, what to do next. The command line
prints exactly that line and exits with `exit_code`; the traceback is shown only with DATM_RAY_DEBUG=1.
All errors survive pickling, because they cross process borders between Ray actors and the driver.
"""

from __future__ import annotations

import re
import unicodedata


class DatmError(Exception):
    """Base of all expected failures.

    Attributes:
        fact: what is wrong, with the offending value.
        cause: the likely reason, or "" where the fact says it all.
        remedy: what to do next, or "" where there is only one thing to do.
        exit_code: of the command line; 2 for bad input, 1 for work that failed, 75 for a job that is out of sight.
    """

    exit_code = 2

    def __init__(self, fact: str, cause: str = "", remedy: str = "") -> None:
        self.fact, self.cause, self.remedy = fact, cause, remedy
        super().__init__(fact, cause, remedy)

    def __str__(self) -> str:
        # The fact may begin with a user's key, path or command, which stays as it was typed.
        sentences = [_ended(self.fact), *(_ended(_capital(part)) for part in (self.cause, self.remedy))]
        return one_line(" ".join(sentence for sentence in sentences if sentence))


def one_line(text: str) -> str:
    """The text without line breaks, and with control characters, which a terminal would obey, as escapes."""
    text = re.sub(r"[^\S\r\n]*[\r\n]\s*", " ", text.strip())
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def _ended(text: str) -> str:
    text = text.strip()
    return text if not text or text.endswith((".", "?", "!")) else f"{text}."


def _capital(text: str) -> str:
    words = text.split()
    return text[0].upper() + text[1:] if words and words[0].isalpha() else text


class ConfigError(DatmError):
    """A recipe or override that cannot be run: unknown key, wrong type, impossible range."""


class DatasetError(DatmError):
    """A data set that is missing, malformed or too small for what is asked of it."""


class StoreError(DatmError):
    """A trajectory store that cannot be opened, read or written."""


class MissingExpertsError(StoreError):
    """The store has no experts, or too few, for the recipe at hand."""


class CorruptFileError(DatmError):
    """A file whose content is truncated, altered or not of the expected kind."""


class RunDirectoryError(DatmError):
    """A run directory that cannot be used: unwritable, or holding another recipe's run."""


class ClusterError(DatmError):
    """Ray is missing, unreachable, or has not the resources asked for."""


class JobNotFoundError(ClusterError):
    """A cluster does not know the job that is asked for."""


class JobLostError(ClusterError):
    """A job is gone with the cluster that it ran on."""

    exit_code = 1


class JobUnreachableError(ClusterError):
    """The cluster of a job that is followed has not answered for long; the job may be at work all the same."""

    exit_code = 75  # EX_TEMPFAIL: the same command again may succeed


class DivergenceError(DatmError):
    """An expert's loss is not finite, or a distillation diverged in too many iterations without an update between.

    The last good state has been saved before this is raised.
    """

    exit_code = 1


class WorkerLostError(DatmError):
    """A worker died more often than the retry policy allows."""

    exit_code = 1


class PeerLostError(WorkerLostError):
    """A worker waits in vain for another one of the same task."""
