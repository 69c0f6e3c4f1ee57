"""Tests the log: one form of line, files of bounded size, hidden secrets, records of workers in other processes."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from datm_ray.errors import ConfigError, StoreError
from datm_ray.monitor import logs
from datm_ray.monitor.logs import Collector, accept, fields, masked, noting_the_end, writing
from datm_ray.monitor.progress import Reporter
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.executor import SerialExecutor
from tests.conftest import CommandLine, tiny_config

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) \S+ \S+/\d+  \S.*")
log = logging.getLogger("datm_ray.tests")


@pytest.fixture(autouse=True)
def shown() -> Iterator[None]:
    """Standard error shows messages and warnings, as for a command without -v."""
    logs.show(0)
    yield
    logs.show(0)


def test_a_line_has_time_level_node_worker_and_event(tmp_path: Path) -> None:
    """A line has time, level, node, worker and event, and is on disk at once; a message is one line."""
    with writing([str(tmp_path / "run")]):
        log.info("checkpoint saved %s", fields(run="a b", iteration=3, loss=0.123456, left=None, note='say "x"'))
        log.warning("two\nlines\x1b[31m")
        log.debug("a detail")
        lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [bool(LINE.fullmatch(line)) for line in lines] == [True, True]
    assert lines[0].endswith('  checkpoint saved run="a b" iteration=3 loss=0.1235 note="say \\"x\\""')
    assert lines[1].endswith(r"  two lines\x1b[31m")
    log.info("afterwards")
    assert "afterwards" not in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("failure", "end"),
    [
        (None, "INFO run finished"),
        (KeyboardInterrupt(), "INFO run interrupted"),
        (StoreError("no such bucket"), 'ERROR run stopped error=StoreError reason="no such bucket."'),
        (ZeroDivisionError("x"), "ERROR run stopped error=ZeroDivisionError reason=x"),
    ],
)
def test_the_end_of_a_run_is_logged(failure: BaseException | None, end: str, tmp_path: Path) -> None:
    """The last record says how a run ended; only an error that nobody expects has its traceback."""
    with suppress(type(failure) if failure else ()), writing([str(tmp_path)]), noting_the_end():
        if failure:
            raise failure
    content = (tmp_path / "log.txt").read_text()
    level, _, event = end.partition(" ")
    assert f" {level} " in content
    assert f"  {event}\n" in content
    assert ("Traceback" in content) == isinstance(failure, ZeroDivisionError)


def test_names_that_are_not_utf8_can_be_logged() -> None:
    """A byte of a file name that is no UTF-8 becomes an escape, so that every handler can encode the line."""
    assert fields(task="caf\udce9") == "task=caf\\udce9"
    assert fields(task="caf\udce9").encode()


def test_a_log_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has at most two files of a given size; the older one is replaced."""
    monkeypatch.setattr(logs, "LARGEST", 1000)
    with writing([str(tmp_path)]):
        for number in range(100):
            log.info("line %d", number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "log.txt.1"]
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    assert (tmp_path / "log.txt").read_text().rstrip().endswith("line 99")


def test_a_full_disk_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk under the log is reported once and stops no run."""
    (tmp_path / "log.txt").symlink_to("/dev/full")
    monkeypatch.setattr(logs, "LARGEST", 0)  # /dev/full cannot be renamed
    with writing([str(tmp_path)]):
        log.info("one")
        log.info("two")
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "No space left" in each]
    assert line == f"cannot write {tmp_path / 'log.txt'} ([Errno 28] No space left on device); the run continues"


def test_secrets_are_not_logged(tmp_path: Path) -> None:
    """Passwords in addresses, keys and tokens are masked in messages and tracebacks; other words stay."""
    for text in (
        "http://user:hidden@host/x",
        "http://user:p@hidden@host/x",
        "password=a,hidden",
        "AWS_SECRET_ACCESS_KEY=hidden",
        "aws_session_token: hidden",
        "'password': 'hidden'",
        "https://bucket/x?X-Amz-Signature=hidden&X-Amz-Security-Token=hidden",
        "Authorization: Bearer hidden",
        "--api-key=hidden",
        "apikey=hidden",
        "pwd: hidden",
        "Authorization: Basic hidden",
    ):
        assert "hidden" not in masked(text), masked(text)
    for text in ("s3://bucket/key", "epoch=3 loss=0.5", "a@b", "s3://bucket/a@b", "task=x token", "keyboard=qwerty"):
        assert masked(text) == text
    masked("0a-_" * 50_000)  # a pattern that is not linear would run into the test's timeout
    with writing([str(tmp_path)]):
        try:
            raise ValueError("password=hidden")
        except ValueError:
            log.exception("failed at http://user:hidden@host")
    content = (tmp_path / "log.txt").read_text()
    assert "hidden" not in content
    assert "ValueError: password=***" in content


def test_a_worker_in_another_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remote worker's records keep its time, node and name; the latest ones are kept for its loss."""
    monkeypatch.setattr(logs, "KEPT", 2)
    root = logging.getLogger("datm_ray")
    level, collector = root.level, Collector("DistillWorker/1/4711", logging.INFO)
    try:
        for number in range(3):
            log.info("checkpoint saved iteration=%d", number)
    finally:
        root.removeHandler(collector)
        root.setLevel(level)
    records = pickle.loads(pickle.dumps(collector.take()))
    assert collector.take() == []
    with writing([str(tmp_path)]):
        accept(records)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.rpartition("=")[2] for line in lines] == ["1", "2"]
    assert all(" DistillWorker/1/4711  " in line for line in lines)


def test_a_terminal_shows_what_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal shows errors, messages, the log or details, as chosen, and nothing twice."""

    def lines(level: int) -> list[str]:
        logs.show(level)
        Reporter(quiet=level < 0).message("3 tasks to run")
        for level_, text in ((10, "detail"), (20, "event"), (30, f"warning {level}"), (40, f"error {level}")):
            log.log(level_, text)
        log.warning("warning %d", level)  # a record such as another worker's
        return [line.rpartition("  ")[2] for line in capsys.readouterr().err.splitlines()]

    assert lines(-1) == ["error -1"]
    assert lines(0) == ["3 tasks to run", "warning 0", "error 0"]
    assert lines(1) == ["3 tasks to run", "event", "warning 1", "error 1", "warning 1"]
    assert lines(2) == ["3 tasks to run", "detail", "event", "warning 2", "error 2", "warning 2"]


def test_a_run_s_folder_has_its_log(tmp_path: Path, finished_run: Path) -> None:
    """A run's folder has its log from command to end, with each worker's records and a final error."""
    lines = (finished_run / "tiny" / "log.txt").read_text().splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    events = [line.partition("  ")[2] for line in lines]
    assert events[0].startswith("run started version=")
    assert events[-1] == "run finished"
    for event in (
        "task started task=tiny workers=1",
        "checkpoint saved run=tiny iteration=4",
        "task finished task=tiny",
    ):
        assert any(each.startswith(event) for each in events), event
    assert sum(each.startswith("network scored run=tiny") for each in events) == 8

    class Failing(SerialExecutor):
        def run(self, *_: object) -> Iterator[object]:  # type: ignore[override]
            raise ConfigError("it does not work", remedy="use another one")
            yield

    config = tiny_config()
    with pytest.raises(ConfigError):
        Pipeline([config], str(tmp_path)).train_experts(lambda: Failing(config.cluster), Reporter(quiet=True))
    last = (tmp_path / "tiny" / "log.txt").read_text().splitlines()[-1]
    assert last.endswith('run stopped error=ConfigError reason="it does not work. Use another one."')


def test_the_options_choose_what_is_shown(datm_ray: CommandLine, finished_run: Path) -> None:
    """-v shows the log, -v -v store requests too, -q the result alone; commands do not affect each other."""
    run = ("experts", str(finished_run.parent / "tiny.yaml"), "-o", str(finished_run), "--executor", "serial")
    for options, expected in (
        ((), "Experts: nothing to do, all finished"),
        (("-v",), "run finished"),
        (("-v", "-v"), "file request kind=look"),
        (("--verbose",), "run started"),
    ):
        code, _, err = datm_ray(*run, *options)
        assert code == 0
        assert expected in err
        assert all(LINE.fullmatch(line) for line in err.splitlines()) == bool(options)
    assert datm_ray(*run, "-q")[::2] == (0, "")
