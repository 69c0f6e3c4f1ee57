"""Tests claims and leases: who may write, on local disks, in memory and on S3."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from datm_ray.errors import OvertakenError, RunDirectoryError
from datm_ray.store import claims
from datm_ray.store.claims import Claim, lease
from datm_ray.store.files.filesystem import Location, open_location


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path) -> Location:
    """A place for a lease in a folder that does not exist yet."""
    root = str(tmp_path) if request.param == "local" else f"s3://{request.getfixturevalue('bucket')}"
    return open_location(root) / "out" / "tiny" / "lease.json"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute takes a second."""
    for name, seconds in {"HEARTBEAT": 0.1, "DEAD_AFTER": 1.0, "POLL": 0.05, "SETTLE": 0.1}.items():
        monkeypatch.setattr(claims, name, seconds)


@pytest.fixture
def messages() -> list[str]:
    """Messages to the user."""
    return []


@pytest.fixture
def held(place, messages) -> Callable[..., AbstractContextManager[None]]:
    """A lease of the place."""
    return lambda wait=0.0, on_loss=lambda: None: lease(place, wait, messages.append, on_loss)


def leave(place: Location, **changes: object) -> None:
    """Leave the lease of another process."""
    claim = Claim(place)
    claim.owner |= {"machine": claims._machine(), "started": claims._start_of(os.getpid()), **changes}
    claim.take()


def test_a_second_command_is_refused_while_the_first_lives(place, held, messages):
    """A held lease is refused in one line that names process, host and time; it is given back, also after errors."""
    caught: pytest.ExceptionInfo[RunDirectoryError]

    def work() -> None:
        nonlocal caught
        before = place.parent.list()
        with pytest.raises(RunDirectoryError) as caught, held():
            pass
        assert place.parent.list() == before
        time.sleep(0.25)  # heartbeats
        with pytest.raises(RunDirectoryError), held():
            pass
        raise failure

    for failure in (ZeroDivisionError, KeyboardInterrupt):
        with pytest.raises(failure), held():
            work()
    line = str(caught.value)
    assert f"is in use by process {os.getpid()} on {claims.socket.gethostname()}, since 20" in line
    assert "--set cluster.wait_for_run=" in line
    assert messages == []
    with held():
        pass
    assert not place.parent.exists()  # as it was


def test_a_second_command_may_wait(held, messages):
    """A command that waits gets the lease when it is given back; if that takes too long, it is refused."""
    holds, ended = threading.Event(), threading.Event()

    def work() -> None:
        with held():
            holds.set()
            ended.wait(10)

    first = threading.Thread(target=work)
    first.start()
    assert holds.wait(10)
    with pytest.raises(RunDirectoryError), held(wait=0.1):
        pass
    messages.clear()
    threading.Timer(0.3, ended.set).start()
    with held(wait=10):
        first.join()
    assert [line.partition(" for process")[0] for line in messages] == ["waiting up to 10 s"]


def test_the_lease_of_a_dead_process_of_this_machine_is_taken_over_at_once(place, held, messages):
    """A process that ended, or whose id another process has now, holds nothing; a defunct one has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    until = time.monotonic() + 5
    while claims._start_of(ended.pid) and time.monotonic() < until:
        time.sleep(0.02)  # it stays as a defunct process until it is waited for
    for process, started in ((ended.pid, "5"), (os.getpid(), "5")):
        leave(place, process=process, started=started)
        with held():
            pass
    ended.wait()
    assert messages == []  # a wait would be reported


def test_the_lease_of_another_machine_is_taken_over_once_it_has_not_changed_for_a_while(place, held, messages):
    """A command elsewhere is dead if its file does not change; one heartbeat is enough to refuse the lease."""
    for machine in ("another", None):
        leave(place, machine=machine)
        began = time.monotonic()
        with held():
            assert time.monotonic() - began >= 1.0
    assert "checking up to 1 s for a heartbeat" in messages[0]
    leave(place, machine="another", heartbeats=1)
    threading.Timer(0.3, lambda: place.write_json({**place.read_json(), "heartbeats": 2})).start()
    with pytest.raises(RunDirectoryError, match="is in use by process"), held():
        pass


def test_of_commands_that_take_a_dead_ones_lease_at_one_moment_one_holds_it(place, held, monkeypatch):
    """One of four commands that take over at once works, and the others are refused."""
    monkeypatch.setattr(claims, "SETTLE", 0.5)  # as it is
    leave(place, process=os.getpid(), started="5")
    outcomes, all_ready, ended = list[str](), threading.Barrier(4), threading.Event()

    def work() -> None:
        all_ready.wait()
        try:
            with held():
                outcomes.append("holds")
                ended.wait(3)
        except RunDirectoryError:
            outcomes.append("refused")
            if outcomes.count("refused") == 3:
                ended.set()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["holds", "refused", "refused", "refused"]


def test_a_command_whose_lease_was_taken_over_ends_and_leaves_the_new_one(place, held):
    """A command that was suspended and counted as dead ends with a clear error, and the new lease stays."""
    warned = threading.Event()

    def work() -> None:
        with held(on_loss=warned.set):
            leave(place, process=4711)
            assert warned.wait(5)
            raise KeyboardInterrupt  # what `warned` leads to

    with pytest.raises(OvertakenError, match=r"out/tiny was taken over by process 4711 on .*writes nothing more"):
        work()
    assert place.read_json()["process"] == 4711


def test_an_owner_knows_that_another_one_came_or_that_its_file_is_gone(place):
    """The later of two claims is the owner; without the file nobody is."""
    first, second = Claim(place), Claim(place)
    first.take()
    first.require()
    second.take()
    second.require()
    with pytest.raises(OvertakenError, match="was taken over by process"):
        first.require()
    place.remove()
    with pytest.raises(OvertakenError, match=r"lease\.json is missing"):
        second.require()
