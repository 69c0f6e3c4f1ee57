"""Tests that damaged files never yield wrong values: every single byte of small files is altered, and more.

A reader may raise CorruptFileError or return exactly what was written (where the damage is in a byte it does not
use); anything else, a crash of the interpreter included, is a failure.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from datm_ray.errors import CorruptFileError
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.sealed import open_sealed
from datm_ray.store.tensors import read_tensors, write_tensors
from datm_ray.store.trajectories import FORMAT, FORMAT_VERSION, ExpertGroup, Snapshot, TrajectoryStore
from tests.store.contract import (
    KEY,
    assert_same,
    make_info,
    make_snapshots,
    make_snapshots_with_buffers,
    with_buffers,
)

ARRAYS = {"images": np.arange(12, dtype=np.float32).reshape(3, 4), "labels": np.array([1, 0], np.int64)}


@pytest.fixture(autouse=True)
def one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read each file once, because nobody replaces files here; this halves the time."""
    for module in ("tensors", "trajectories"):
        monkeypatch.setattr(f"datm_ray.store.{module}.reading_again", lambda location, read, **_: read())


@pytest.fixture
def group() -> ExpertGroup:
    store = TrajectoryStore(f"memory://{uuid.uuid4().hex}")
    group = store.group(KEY.dataset, KEY.architecture, KEY.fingerprint)
    for expert in (0, 1):
        info = make_info(expert, epochs=3)
        group.write_expert(expert, make_snapshots(info), info)
    return group


@pytest.fixture
def expert(group: ExpertGroup) -> Location:
    return group.location / "expert-00000.arrow"


@pytest.fixture
def tensor_file() -> Location:
    location = open_location(f"memory://{uuid.uuid4().hex}") / "set.arrow"
    write_tensors(location, ARRAYS, kind="synthetic-set", metadata={"step": 3})
    return location


def damages(content: bytes, every: int = 1) -> Iterator[bytes]:
    """Contents with every n-th byte altered by a bit pattern of its own, then cuts, gaps, insertions and additions."""
    draw = np.random.default_rng(0)
    patterns = draw.integers(1, 256, len(content))
    for position, pattern in list(enumerate(patterns))[::every]:
        yield content[:position] + bytes([content[position] ^ int(pattern)]) + content[position + 1 :]
    for length in draw.choice(len(content), 100, replace=False):
        yield content[:length]
    for position, length in zip(draw.integers(0, len(content), 100), draw.integers(1, 200, 100), strict=True):
        yield content[:position] + bytes(length) + content[position + length :]  # overwritten with zeros
        yield content[:position] + content[position + length :]
        yield content[:position] + draw.bytes(length) + content[position:]
    yield content + b"\0"
    yield content + content


def reads_the_truth(group: ExpertGroup) -> bool:
    """True if expert 0 can be read, False if it is refused; fails on wrong values."""
    expected = make_snapshots(make_info(0, epochs=3))
    # A fresh group, which has not read the footer before the damage.
    fresh = TrajectoryStore(group.location.uri.removesuffix(f"/{KEY}")).group(
        KEY.dataset, KEY.architecture, KEY.fingerprint
    )
    try:
        found = fresh.read_params(0, [0, 2, 4])
        progress, info = fresh.read_progress(0), fresh.read_info(0)
    except CorruptFileError:
        return False
    assert [params.tobytes() for params in found] == [snapshot.params.tobytes() for snapshot in expected]
    np.testing.assert_array_equal(progress.train_loss, [snapshot.train_loss for snapshot in expected])
    assert info == make_info(0, epochs=3)
    return True


def test_a_damaged_expert_never_yields_wrong_parameters(group, expert):
    """Each of thousands of damages to an expert is found or harmless; verify finds all."""
    content = expert.read_bytes()
    harmless = 0
    for damaged in damages(content):
        if damaged == content:
            continue
        expert.write_atomic(damaged)
        harmless += reads_the_truth(group)
        with pytest.raises(CorruptFileError):
            group.verify(0)
    # The head with the leading schema and the end mark are the only bytes not needed for reading.
    assert 0 < harmless < 0.4 * len(content)


def test_damage_after_the_footer_was_read_is_found(group, expert, monkeypatch):
    """A group that keeps the footer of a large file still checks each batch."""
    monkeypatch.setattr("datm_ray.store.sealed._FIRST_READ", 256)
    content = expert.read_bytes()
    expected = [snapshot.params.tobytes() for snapshot in make_snapshots(make_info(0, epochs=3))]
    for damaged in damages(content, every=3):
        expert.write_atomic(content)
        group.read_info(0)
        expert.write_atomic(damaged)
        try:
            found = group.read_params(0, [0, 2, 4])
        except CorruptFileError:
            continue
        assert [params.tobytes() for params in found] == expected


def test_parts_of_one_file_do_not_pass_in_another(group, expert):
    """Batches or ends from another expert, or in another order, are found."""
    sealed = open_sealed(expert, format_name=FORMAT, format_version=FORMAT_VERSION)
    content, other = expert.read_bytes(), (group.location / "expert-00001.arrow").read_bytes()
    batches = sealed.parts[1:-1]
    assert len({part.end - part.start for part in batches}) == 1
    for part in batches:
        expert.write_atomic(content[: part.start] + other[part.start : part.end] + content[part.end :])
        assert not reads_the_truth(group)
    for one, two in pairwise(batches):
        swapped = content[two.start : two.end] + content[one.start : one.end]
        expert.write_atomic(content[: one.start] + swapped + content[two.end :])
        assert not reads_the_truth(group)
    end = sealed.parts[-1].end
    expert.write_atomic(content[:end] + other[end:])
    assert not reads_the_truth(group)


def test_a_damaged_tensor_file_never_yields_wrong_arrays(tensor_file):
    """Each of thousands of damages to a tensor file is found or harmless."""
    content = tensor_file.read_bytes()
    for damaged in damages(content):
        tensor_file.write_atomic(damaged)
        try:
            found = read_tensors(tensor_file, kind="synthetic-set")
        except CorruptFileError:
            continue
        assert found.metadata == {"step": 3}
        assert list(found.arrays) == list(ARRAYS)
        for name, array in ARRAYS.items():
            assert found.arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(found.arrays[name], array)


def reads_as(uri: str, expected: Snapshot) -> bool:
    """True if a snapshot of expert 0 can be read afresh, False if it is refused; fails on wrong values."""
    group = TrajectoryStore(uri).group(KEY.dataset, KEY.architecture, KEY.fingerprint)
    try:
        found = group.read_snapshot(0, expected.epoch)
    except CorruptFileError:
        return False
    assert_same(found, expected)
    return True


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_flipped_bytes_and_cuts_of_a_mapped_file_are_found_or_harmless(tmp_path, storage):
    """250 changed bytes and 50 truncations of a mapped file of real size yield no wrong value."""
    info = replace(with_buffers(make_info()), parameter_names=("w",), parameter_shapes=((20_000,),), storage=storage)
    group = TrajectoryStore(str(tmp_path)).group(KEY.dataset, KEY.architecture, KEY.fingerprint)
    group.write_expert(0, make_snapshots_with_buffers(info), info)
    expected = [group.read_snapshot(0, epoch) for epoch in info.epochs]
    path = tmp_path / str(KEY) / "expert-00000.arrow"
    content, draw = path.read_bytes(), np.random.default_rng(17)
    damages = [
        content[:position] + bytes([content[position] ^ int(pattern)]) + content[position + 1 :]
        for position, pattern in zip(draw.integers(0, len(content), 250), draw.integers(1, 256, 250), strict=True)
    ]
    damages += [content[:length] for length in draw.integers(0, len(content), 50)]
    found = 0
    for damaged in damages:
        path.unlink()  # not in place: earlier mappings may still be open
        path.write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=r"expert-00000\.arrow"):
            group.verify(0)
        found += sum(not reads_as(str(tmp_path), snapshot) for snapshot in expected)
    assert found > 250
