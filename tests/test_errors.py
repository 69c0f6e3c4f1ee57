"""Tests that errors are one line of whole sentences and survive pickling."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from datm_ray.errors import (
    ClusterError,
    ConfigError,
    DatmError,
    DivergenceError,
    JobLostError,
    JobUnreachableError,
    NoFreeWorkersError,
    OvertakenError,
    PeerLostError,
    ThresholdError,
    TransientStoreError,
    WorkerLostError,
)
from datm_ray.store.files.filesystem import AlreadyExistsError


def all_errors(base: type[DatmError] = DatmError) -> Iterator[type[DatmError]]:
    yield base
    for error in base.__subclasses__():
        yield from all_errors(error)


ERRORS = sorted(set(all_errors()), key=lambda error: error.__name__)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_error_survives_pickling_with_all_its_fields(error: type[DatmError]) -> None:
    """A pickled error keeps class, fact, cause, remedy, exit code and message."""
    original = error("the fact", "the cause", remedy="the remedy")
    copy = pickle.loads(pickle.dumps(original))
    assert type(copy) is error
    assert (copy.fact, copy.cause, copy.remedy) == ("the fact", "the cause", "the remedy")
    assert str(copy) == str(original) == "the fact. The cause. The remedy."
    assert copy.exit_code == original.exit_code


def test_every_error_is_here() -> None:
    """Every error class of the package is tested here, also those defined beside their code."""
    assert {DatmError, ConfigError, ClusterError, AlreadyExistsError} <= set(ERRORS)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (("it failed",), "it failed."),
        (("it failed", "", "try again"), "it failed. Try again."),
        (("Who?", "nobody knows!", "ask again."), "Who? Nobody knows! Ask again."),
        (("two\n  lines", "and\ta tab"), "two lines. And\\ta tab."),
        (("a  b is gone",), "a  b is gone."),
        (("\x1b[31mred\r\u2028is gone",), "\\x1b[31mred is gone."),
    ],
)
def test_message_is_one_line_of_sentences(parts: tuple[str, ...], message: str) -> None:
    """Each part of a message ends in one punctuation mark, and control characters are escaped."""
    assert str(ConfigError(*parts)) == message


@pytest.mark.parametrize(
    "fact",
    [
        "distill.ipc is 0",
        "o holds no experts",
        "s3://bucket/x is gone",
        "runs/a.arrow is gone",
        "my.yaml: unknown key 'x'",
    ],
)
def test_keys_and_paths_stay_as_they_are_written(fact: str) -> None:
    """A sentence that starts with a key or path keeps its lower case."""
    assert str(ConfigError(fact)) == f"{fact}."


def test_exit_code_tells_bad_input_from_failed_work() -> None:
    """Exit codes: 2 for what the user can mend, 1 for failed work, 75 for work in an unknown state."""
    failed = {error for error in ERRORS if error.exit_code == 1}
    lost = {JobLostError, WorkerLostError, PeerLostError, OvertakenError, TransientStoreError, NoFreeWorkersError}
    assert failed == {DivergenceError, ThresholdError, *lost}
    assert JobUnreachableError.exit_code == 75
    assert all(error.exit_code == 2 for error in set(ERRORS) - failed - {JobUnreachableError})
