"""Every error that a user can meet, one class per cause.

A message is one line of up to three sentences: the fact, the likely cause, what to do next. The command line prints
exactly that line and exits with `exit_code`. It shows the traceback only with DATM_RAY_DEBUG=1. All errors can be
pickled, because they pass between Ray actors and the driver.
"""

from __future__ import annotations

from datm_ray.words import one_line


class DatmError(Exception):
    """Base class of all expected failures.

    Attributes:
        fact: what is wrong, with the value.
        cause: the likely reason; "" if the fact is enough.
        remedy: what to do next; "" if that is obvious.
        exit_code: exit code of the command line; 2 for bad input, 1 for work that failed, 75 for a
            job whose cluster does not answer.
    """

    exit_code = 2

    def __init__(self, fact: str, cause: str = "", remedy: str = "") -> None:
        self.fact, self.cause, self.remedy = fact, cause, remedy
        super().__init__(fact, cause, remedy)

    def __str__(self) -> str:
        # The fact may begin with a user's key, path or command, which is not capitalised.
        sentences = [_ended(self.fact), *(_ended(_capital(part)) for part in (self.cause, self.remedy))]
        return one_line(" ".join(sentence for sentence in sentences if sentence))


def _ended(text: str) -> str:
    text = text.strip()
    return text if not text or text.endswith((".", "?", "!")) else f"{text}."


def _capital(text: str) -> str:
    words = text.split()
    return text[0].upper() + text[1:] if words and words[0].isalpha() else text


class ConfigError(DatmError):
    """What the user asks for cannot be done: for example an unknown key, a value out of range, or too little memory."""


class PluginError(ConfigError):
    """A user's module cannot be imported. Other machines may be able to import it."""


class GpuMemoryError(ConfigError):
    """A GPU has too little memory for a worker. GPUs of other nodes may have more."""


class DatasetError(DatmError):
    """A data set is missing, malformed or too small for the recipe."""


class MissingImagesError(DatasetError):
    """The images of a data set are not on this machine. A plan needs only their size and number."""


class StoreError(DatmError):
    """A file or folder of a store or of a run cannot be opened, read or written."""


class TransientStoreError(StoreError):
    """A disk or object store fails temporarily; another attempt, or one on another machine, may succeed."""

    exit_code = 1


class MissingExpertsError(StoreError):
    """The trajectory store lacks experts, their epochs, scores that order images, or a prior that the recipe needs."""


class CorruptFileError(DatmError):
    """A file is truncated, altered or not of the expected kind."""


class RunDirectoryError(DatmError):
    """A run's folder cannot be used. For example, another command uses it, or it holds a run of another recipe."""


class ClusterError(DatmError):
    """Ray is missing, unreachable, or lacks the resources asked for."""


class UnusableGpuError(ClusterError):
    """torch cannot use the GPU that Ray has assigned to a worker."""


class NoFreeWorkersError(ClusterError):
    """A task's workers did not become free in time. Running the command again later resumes the run."""

    exit_code = 1


class JobNotFoundError(ClusterError):
    """A cluster does not know the job that the user asked for."""


class JobLostError(ClusterError):
    """A job no longer exists, because the cluster on which it ran was lost."""

    exit_code = 1


class JobUnreachableError(ClusterError):
    """The cluster of a followed job has not answered for a long time; the job may still be running."""

    exit_code = 75  # EX_TEMPFAIL: running the command again may succeed


class DivergenceError(DatmError):
    """An expert's or prior's loss is not finite, or a distillation diverged in many iterations without an update.

    A distillation saves its last good state before it raises this.
    """

    exit_code = 1


class ThresholdError(DatmError):
    """Every matching loss exceeds distill.threshold, before the first iteration or in many iterations in a row.

    Without a threshold, no loss is finite. Before the first iteration, the error is also raised if there is nothing to
    match, or the loss has no gradient. Experts are kept, and so is the state of a distillation that had started.
    """

    exit_code = 1


class WorkerLostError(DatmError):
    """A worker died, hung, could not start or ran out of GPU memory.

    Tasks are retried first, so users see this only after the last attempt that `cluster.retries` allows.
    """

    exit_code = 1


class OvertakenError(WorkerLostError):
    """A task or command must end: a newer attempt or command has taken over its files, or the files are missing."""


class PeerLostError(WorkerLostError):
    """A worker waited in vain for another worker of its task."""
