"""Tests reading ahead."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator

import pytest

from datm_ray.errors import CorruptFileError, StoreError
from datm_ray.store.prefetch import Prefetcher
from datm_ray.store.trajectories import ExpertGroup, TrajectoryStore
from tests.store.contract import KEY, make_info, make_snapshots

EXPECTED = [snapshot.params.tobytes() for snapshot in make_snapshots(make_info())]


def make_group(uri: str) -> ExpertGroup:
    group = TrajectoryStore(uri).group(KEY.dataset, KEY.architecture, KEY.fingerprint)
    group.write_expert(0, make_snapshots(make_info()), make_info())
    return group


@pytest.fixture
def group() -> ExpertGroup:
    """A group in memory, which counts as remote."""
    return make_group(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def reads(group: ExpertGroup, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], str]]:
    """Reads of the group: the epochs, and the name of the thread."""
    read_params, seen = group.read_params, []

    def recording(expert, epochs):
        seen.append((tuple(epochs), threading.current_thread().name))
        return read_params(expert, epochs)

    monkeypatch.setattr(group, "read_params", recording)
    return seen


@pytest.fixture
def prefetcher(group: ExpertGroup) -> Iterator[Prefetcher]:
    prefetcher = Prefetcher(group)
    yield prefetcher
    prefetcher.close()


def test_what_was_announced_is_read_in_the_background(prefetcher, reads):
    """Announced snapshots are read once, in the background, and equal a direct read."""
    prefetcher.announce(0, [2, 4])
    assert [params.tobytes() for params in prefetcher.read_params(0, [2, 4])] == EXPECTED[1:3]
    ((epochs, thread),) = reads
    assert epochs == (2, 4)
    assert thread.startswith("prefetch")


def test_what_was_not_announced_is_read_all_the_same(prefetcher, reads):
    """Snapshots that were not announced, or are read a second time, are read directly."""
    prefetcher.announce(0, [2, 4])
    assert [params.tobytes() for params in prefetcher.read_params(0, [0, 8])] == [EXPECTED[0], EXPECTED[4]]
    for _ in range(2):
        assert [params.tobytes() for params in prefetcher.read_params(0, [2, 4])] == EXPECTED[1:3]
    assert sorted(epochs for epochs, _ in reads) == [(0, 8), (2, 4), (2, 4)]


def test_errors_surface_where_the_snapshots_are_asked_for(prefetcher, group):
    """Announcing never fails; the later read raises the error of a direct one."""
    file = group.location / "expert-00000.arrow"
    file.write_atomic(file.read_bytes()[:-100])
    prefetcher.announce(0, [2, 4])
    prefetcher.announce(7, [2, 4])
    with pytest.raises(CorruptFileError, match=r"expert-00000\.arrow"):
        prefetcher.read_params(0, [2, 4])
    with pytest.raises(StoreError, match=r"expert-00007\.arrow"):
        prefetcher.read_params(7, [2, 4])


def test_no_more_is_held_than_asked_for(group, monkeypatch):
    """Beyond the depth the oldest announcement is dropped, and not read if it is still queued."""
    read_params, started, busy, seen = group.read_params, threading.Event(), threading.Event(), []

    def waiting(expert, epochs):
        started.set()
        if threading.current_thread().name.startswith("prefetch"):
            assert busy.wait(60)
        seen.append(tuple(epochs))
        return read_params(expert, epochs)

    monkeypatch.setattr(group, "read_params", waiting)
    prefetcher = Prefetcher(group, depth=2)
    prefetcher.announce(0, [0])
    assert started.wait(60)
    for epoch in (2, 4, 6):
        prefetcher.announce(0, [epoch])
    assert list(prefetcher._announced) == [(0, (4,)), (0, (6,))]
    busy.set()
    assert prefetcher.read_params(0, [6])[0].tobytes() == EXPECTED[3]
    prefetcher.close()
    assert (2,) not in seen


def test_local_stores_are_read_when_asked_for(tmp_path):
    """A local store is read on request, without a thread."""
    prefetcher = Prefetcher(make_group(str(tmp_path)))
    before = threading.active_count()
    prefetcher.announce(0, [2, 4])
    assert threading.active_count() == before
    assert [params.tobytes() for params in prefetcher.read_params(0, [2, 4])] == EXPECTED[1:3]
    prefetcher.close()


def test_closing_forgets_what_was_announced(prefetcher):
    """A prefetcher can be closed twice and with reads outstanding; later reads are direct."""
    prefetcher.announce(0, [2, 4])
    prefetcher.close()
    prefetcher.close()
    prefetcher.announce(0, [2, 4])
    assert [params.tobytes() for params in prefetcher.read_params(0, [2, 4])] == EXPECTED[1:3]
