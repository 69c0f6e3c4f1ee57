"""Tests the cache of a remote store's snapshots on the local disk."""

from __future__ import annotations

import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import pytest

from datm_ray.errors import CorruptFileError, StoreError
from datm_ray.store.cache import Cache, configured_cache
from datm_ray.store.files.filesystem import open_location
from datm_ray.store.trajectories import ExpertGroup, TrajectoryInfo, TrajectoryStore
from tests.store.contract import KEY, assert_same, make_info, make_snapshots


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()


def open_group(uri: str) -> ExpertGroup:
    return TrajectoryStore(uri).group(KEY.dataset, KEY.architecture, KEY.fingerprint)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder, named by the environment."""
    monkeypatch.setenv("DATM_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def group(folder: Path) -> ExpertGroup:
    """A group in memory, which counts as remote, with an expert 0 that is too large for one read."""
    group = open_group(f"memory://{uuid.uuid4().hex}")
    group.write_expert(0, make_snapshots(make_large_info()), make_large_info())
    return group


def make_large_info() -> TrajectoryInfo:
    """The info of an expert whose snapshots are fetched one by one."""
    return replace(make_info(), parameter_names=("w",), parameter_shapes=((20_000,),))


def test_an_entry_that_cannot_be_touched_is_used(group, folder, monkeypatch):
    """An entry of another user is read although its time of use cannot be set."""
    group.read_params(0, [4])

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr("datm_ray.store.files.filesystem.Location.read_ranges", refuse)
    assert_same(group.read_snapshot(0, 4), make_snapshots(make_large_info())[2])


@pytest.mark.s3
def test_a_second_read_sends_no_request(bucket, s3_proxy, folder):
    """A second read comes from the local disk; another process fetches the end of the file only."""
    uri = f"s3://{bucket}/store"
    group, info = open_group(uri), make_large_info()
    snapshots = make_snapshots(info)
    group.write_expert(0, snapshots, info)
    group.read_params(0, [2, 4])
    del s3_proxy.exchanges[:]
    assert_same(group.read_snapshot(0, 4), snapshots[2])
    assert s3_proxy.exchanges == []
    assert_same(open_group(uri).read_snapshot(0, 2), snapshots[1])
    assert [exchange.method for exchange in s3_proxy.exchanges] == ["HEAD", "GET"]
    group.read_params(0, [4, 6])
    assert s3_proxy.count("GET") == 2


def test_a_damaged_entry_is_fetched_anew(group, folder):
    """A damaged entry is fetched anew instead of giving wrong parameters."""
    snapshots = make_snapshots(make_large_info())
    group.read_params(0, [4])
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    for content in (b"", whole[:-1], whole[:300] + b"\xff" + whole[301:]):
        entry.write_bytes(content)
        assert_same(group.read_snapshot(0, 4), snapshots[2])
        assert entry.read_bytes() == whole


def test_damage_of_the_store_does_not_enter_the_cache(group, folder):
    """Snapshots that fail their check are not cached, and `verify` reads the store itself."""
    group.read_params(0, [2])
    file = group.location / "expert-00000.arrow"
    content = bytearray(file.read_bytes())
    for snapshot in make_snapshots(make_large_info())[1:3]:
        content[content.find(snapshot.params.tobytes())] ^= 1
    file.write_atomic(bytes(content))
    with pytest.raises(CorruptFileError):
        group.read_params(0, [4])
    assert len(list(folder.iterdir())) == 1
    with pytest.raises(CorruptFileError):
        group.verify(0)


@pytest.mark.parametrize("wrong", ["\0", "../x", ["a"], None])
def test_a_digest_that_could_name_no_entry_is_refused(wrong, folder, monkeypatch):
    """A crafted remote file whose parts have no digests is damaged: they become names of files in the cache."""

    def digest_of(file: BinaryIO, length: int) -> object:
        file.read(length)
        return wrong

    monkeypatch.setattr("datm_ray.store.sealed._read_digest", digest_of)
    group = open_group(f"memory://{uuid.uuid4().hex}")
    group.write_expert(0, make_snapshots(make_large_info()), make_large_info())
    with pytest.raises(CorruptFileError, match="makes no sense"):
        group.read_params(0, [4])


def test_a_rewritten_expert_is_not_read_from_the_cache(group, folder):
    """A rewritten expert is read anew, because entries are named by content."""
    group.read_params(0, [4])
    group.remove_expert(0)
    others = make_snapshots(make_large_info(), seed=1)
    group.write_expert(0, others, make_large_info())
    assert_same(group.read_snapshot(0, 4), others[2])


def test_local_stores_are_not_copied(tmp_path, folder):
    """A local store is not cached on the same machine."""
    group = open_group(str(tmp_path / "store"))
    group.write_expert(0, make_snapshots(make_info()), make_info())
    group.read_params(0, [4])
    assert not folder.exists()


def test_what_was_not_used_for_longest_is_dropped(tmp_path):
    """The least recently used entries are dropped to keep the size; other files stay."""
    cache = Cache(str(tmp_path), 1000)
    (tmp_path / "notes.txt").write_bytes(bytes(5000))
    pieces = [bytes([number]) * 300 for number in range(5)]
    for age, piece in enumerate(pieces[:3]):
        cache.put(digest(piece), memoryview(piece))
        os.utime(tmp_path / digest(piece), (age, age))
    assert cache.get(digest(pieces[0])) == pieces[0]  # used now
    for piece in pieces[3:]:
        cache.put(digest(piece), memoryview(piece))
    kept = [cache.get(digest(piece)) is not None for piece in pieces]
    assert kept == [True, False, False, True, True]
    assert (tmp_path / "notes.txt").exists()


def test_writers_of_one_cache_do_not_disturb_each_other(tmp_path):
    """Entries appear whole while several processes write and drop them."""
    pieces = [bytes([number]) * 1000 for number in range(20)]

    def use(_: int) -> int:
        cache, hits = Cache(str(tmp_path), 10_000), 0
        for piece in pieces * 20:
            found = cache.get(digest(piece))
            assert found is None or found == piece
            hits += found is not None
            cache.put(digest(piece), memoryview(piece))
        return hits

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(use, range(4))) > 0
    assert all(len(path.name) == 64 for path in tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_no_cache(tmp_path):
    """A cache folder that cannot be written is ignored, and reads succeed."""
    (tmp_path / "taken").write_text("a file")
    cache = Cache(str(tmp_path / "taken"), 1000)
    cache.put(digest(b"x"), memoryview(b"x"))
    assert cache.get(digest(b"x")) is None


@pytest.mark.parametrize("size", ["much", "0", "-1", "nan", "inf"])
def test_an_invalid_size_is_named(folder, monkeypatch, size):
    """An invalid cache size is an error with the variable and its value."""
    monkeypatch.setenv("DATM_RAY_CACHE_GIB", size)
    with pytest.raises(StoreError, match=f"DATM_RAY_CACHE_GIB is '{size}'"):
        configured_cache()


def test_without_a_folder_there_is_no_cache(monkeypatch):
    """The cache is off unless a folder is given."""
    monkeypatch.delenv("DATM_RAY_CACHE", raising=False)
    assert configured_cache() is None


@pytest.mark.parametrize("cache", ["simplecache", "filecache", "blockcache"])
def test_caches_of_fsspec_are_refused(cache):
    """fsspec's caches, which show incomplete files, are refused with a message that names this package's."""
    with pytest.raises(StoreError, match=f"Cannot open {cache}::memory://x.* set DATM_RAY_CACHE"):
        open_location(f"{cache}::memory://x")
