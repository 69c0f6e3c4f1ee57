"""Tests the log of a run in an object store. Needs moto."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from unittest import mock

import pytest

from datm_ray.errors import ConfigError
from datm_ray.monitor import logs, uploaded_log
from datm_ray.monitor.logs import hide, writing
from datm_ray.monitor.progress import Reporter
from datm_ray.monitor.uploaded_log import UploadedLog
from datm_ray.pipeline import Pipeline
from datm_ray.runtime.executor import SerialExecutor
from datm_ray.store.files.filesystem import Location, open_location
from tests.conftest import tiny_config
from tests.store.proxy import Proxy, refusal

pytestmark = pytest.mark.s3
log = logging.getLogger("datm_ray.tests")


@pytest.fixture
def folder(bucket: str) -> Location:
    """A run's folder on S3."""
    return open_location(f"s3://{bucket}/runs/tiny")


def events(folder: Location, name: str = logs.LOG) -> list[str]:
    """Events in a log, without time, level, node and worker; empty without a log."""
    place = folder / name
    return [line.partition("  ")[2] for line in place.read_bytes().decode().splitlines()] if place.exists() else []


def until(holds: Callable[[], bool]) -> None:
    """Wait for an upload; the test's time limit ends a wait without one."""
    while not holds():
        time.sleep(0.01)


def test_a_log_on_s3_grows_during_the_run(folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """New lines are uploaded while a run works, and the last ones at its end."""
    monkeypatch.setattr(uploaded_log, "INTERVAL", 0.02)
    with writing([], [UploadedLog(folder)]):
        for number in range(3):
            log.info("line %d", number)
            until(lambda number=number: f"line {number}" in events(folder))  # type: ignore[misc]
        monkeypatch.setattr(uploaded_log, "INTERVAL", 60.0)
        log.info("the last one")
    assert events(folder) == ["line 0", "line 1", "line 2", "the last one"]


def test_a_log_on_s3_has_the_lines_of_earlier_commands(folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second command adds its lines, and a log above the largest size becomes log.txt.1."""
    for number in range(3):
        with writing([], [UploadedLog(folder)]):
            log.info("command %d", number)
    assert events(folder) == ["command 0", "command 1", "command 2"]
    monkeypatch.setattr(uploaded_log, "LARGEST", (folder / logs.LOG).size())
    with writing([], [UploadedLog(folder)]):
        log.info("command 3")
    assert events(folder) == ["command 3"]
    assert events(folder, "log.txt.1") == ["command 0", "command 1", "command 2"]


def test_no_secret_is_uploaded(folder: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passwords, tokens and the values of a job's environment are *** in a log on S3, also in tracebacks."""
    monkeypatch.setattr(logs, "_hidden", set())
    hide(["hidden-value"])
    with writing([], [UploadedLog(folder)]):
        log.info("failed at http://user:hidden@host with AWS_SECRET_ACCESS_KEY=hidden")
        try:
            raise ValueError("password=hidden and hidden-value")
        except ValueError:
            log.exception("failed")
    content = (folder / logs.LOG).read_bytes().decode()
    assert "hidden" not in content
    assert "ValueError: password=*** and ***" in content


def test_a_log_that_cannot_be_uploaded_stops_no_run(
    folder: Location, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store that refuses the log is reported once. The next upload has all lines."""
    monkeypatch.setattr(uploaded_log, "INTERVAL", 0.02)
    s3_proxy.plan = lambda method, path: refusal(403, "AccessDenied") if method == "PUT" else None
    with writing([], [UploadedLog(folder)]):
        log.info("one")
        until(lambda: s3_proxy.count("PUT") > 1)
        log.info("two")
        s3_proxy.plan = lambda method, path: None
        until(lambda: "two" in events(folder))
    assert events(folder) == ["one", "two"]
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "cannot write" in each]
    assert line.startswith(f"cannot write {folder.uri}/log.txt (Cannot write {folder.uri}/log.txt. Access is denied")
    assert line.endswith("; the run continues")


def test_an_upload_delays_neither_the_run_nor_its_end(
    folder: Location, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run logs and ends while an upload waits for a server that does not answer."""
    monkeypatch.setattr(uploaded_log, "INTERVAL", 0.0)
    monkeypatch.setattr(uploaded_log, "CLOSE_TIMEOUT", 0.1)
    is_uploading, may_end = threading.Event(), threading.Event()

    def wait(location: Location, data: bytes) -> None:
        is_uploading.set()
        may_end.wait()

    monkeypatch.setattr(Location, "write_atomic", wait)
    with writing([], [handler := UploadedLog(folder)]):
        log.info("one")
        is_uploading.wait()
        log.info("two")  # does not wait for the upload
    assert not may_end.is_set()
    assert "(no answer within 0.1 s); the run continues" in capsys.readouterr().err
    may_end.set()
    handler._thread.join()


def test_logs_of_several_runs_are_closed_at_the_same_time() -> None:
    """Each may wait for a server, and these times do not add up."""
    meeting = threading.Barrier(3)
    handlers = [mock.Mock(spec=logging.Handler, level=0, close=lambda: meeting.wait(timeout=30)) for _ in range(3)]
    with writing([], handlers):
        pass
    assert not meeting.broken


def test_the_log_of_a_run_on_s3_ends_with_its_error(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run with its output on S3 names its log there, whose last line is the error that ended the run."""

    class Failing(SerialExecutor):
        def run(self, *_: object) -> Iterator[object]:  # type: ignore[override]
            raise ConfigError("it does not work", remedy="use another one")
            yield

    config, out = tiny_config(), f"s3://{bucket}/runs"
    configs = [tiny_config(f"name={name}") for name in ("tiny", "second", "third", "fourth")]
    with pytest.raises(ConfigError):
        Pipeline(configs, out).train_experts(lambda: Failing(config.cluster), Reporter())
    line = f"Log: {out}/tiny/log.txt, {out}/second/log.txt and 2 more, uploaded every minute"
    assert line in capsys.readouterr().err
    found = events(open_location(f"{out}/tiny"))
    assert found[0].startswith("run started version=")
    assert found[-1] == 'run stopped error=ConfigError reason="it does not work. Use another one."'
