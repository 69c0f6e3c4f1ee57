"""Tests the counts of reads and writes: every request and byte once, on every kind of filesystem."""

from __future__ import annotations

import threading
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from datm_ray.errors import StoreError
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.files.traffic import Traffic, request, traffic
from tests.store.proxy import BUSY, Proxy


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A new folder on every kind of filesystem."""
    if request.param == "s3":
        return open_location(f"s3://{request.getfixturevalue('bucket')}/folder")
    return open_location(str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}")


def test_requests_and_bytes_are_counted_once(folder: Location) -> None:
    """A write, two reads and three looks count their requests, bytes and seconds, and no retries."""
    before, file = traffic(), folder / "file"
    file.write_atomic(b"x" * 1000)
    assert len(file.read_bytes()) == 1000
    assert [len(part) for part in file.read_ranges([(0, 10), (500, 600), (990, 2000)])] == [10, 100, 10]
    assert (file.exists(), file.size(), folder.list()) == (True, 1000, ["file"])
    moved = traffic() - before
    assert (moved.writes, moved.write_bytes) == (1, 1000)
    assert (moved.reads, moved.read_bytes) == (2, 1120)
    assert (moved.looks, moved.retries) == (3, 0)
    assert min(moved.read_seconds, moved.write_seconds, moved.look_seconds) > 0


def test_what_fails_is_a_request_without_bytes(folder: Location) -> None:
    """Reading a missing file counts one request without bytes; an abandoned draft counts none."""
    before = traffic()
    with pytest.raises(StoreError):
        (folder / "missing").read_bytes()
    with suppress(RuntimeError), (folder / "abandoned").create() as file:
        file.write(b"x")
        raise RuntimeError
    moved = traffic() - before
    assert (moved.reads, moved.read_bytes, moved.writes, moved.write_bytes) == (1, 0, 0, 0)


@pytest.mark.s3
@pytest.mark.parametrize("failures", [1, 7])
def test_every_message_that_is_sent_again_is_one_retry(bucket: str, s3_proxy: Proxy, failures: int) -> None:
    """Every message sent again counts as one retry, after one 503 answer or seven."""
    file = open_location(f"s3://{bucket}/folder") / "file"
    file.write_atomic(b"x" * 1000)
    left = [BUSY] * failures
    s3_proxy.plan = lambda method, path: left.pop() if method == "GET" and left else None
    before = traffic()
    assert len(file.read_bytes()) == 1000
    moved = traffic() - before
    assert s3_proxy.faults == {BUSY: failures}
    assert (moved.reads, moved.read_bytes, moved.retries) == (1, 1000, failures)


def test_threads_count_together() -> None:
    """Counts of many threads are complete."""

    def work() -> None:
        for _ in range(500):
            with request("read", "file:///x") as moved:
                moved.bytes = 3

    before = traffic()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    moved = traffic() - before
    assert moved == Traffic(reads=4000, read_bytes=12000, read_seconds=moved.read_seconds)
