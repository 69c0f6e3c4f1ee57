"""Tests the label store: rows of any epoch, writers that die, damage, and what is read."""

from __future__ import annotations

import gc
import pickle
import shutil
import signal
import subprocess
import sys
import uuid
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from datm_ray.errors import CorruptFileError, StoreError
from datm_ray.store import labels
from datm_ray.store.files.filesystem import open_location
from datm_ray.store.files.traffic import traffic
from datm_ray.store.labels import LabelInfo, LabelRecords, LabelStore
from datm_ray.store.sealed import SealedWriter, open_sealed
from datm_ray.store.tensors import write_tensors
from tests.store.proxy import Proxy
from tests.store.test_corruption import damages

SAMPLE = Path(__file__).parent / "samples" / "labels-v1"
INFO = LabelInfo(
    set_fingerprint="set",
    teacher_fingerprint="teacher",
    images=50,
    classes=7,
    size=(8, 6),
    epochs=300,
    keep=3,
    seed=1,
    augmentation={"least_share": 0.08, "mix": 1},
)
TOP = replace(INFO, top=3)


def records_of(info: LabelInfo, epoch: int = 0) -> LabelRecords:
    """Records of all images in an epoch."""
    draw, count = np.random.default_rng(epoch), info.images
    values, indices = (draw.permuted(np.tile(np.arange(info.classes), (count, 1)), axis=1) for _ in range(2))
    return LabelRecords(
        boxes=draw.random((count, 4), np.float32),
        flips=draw.random(count) < 0.5,
        partners=draw.integers(0, count, count, dtype=np.int32),
        lambdas=draw.random(count, np.float32),
        mix_boxes=draw.integers(0, 4, (count, 4), dtype=np.uint16),
        values=values[:, : info.widths["values"]].astype(np.float16) + epoch,
        indices=indices[:, : info.top or 0].astype(np.uint16),
    )


def parts_of(records: LabelRecords, size: int) -> Iterator[LabelRecords]:
    for first in range(0, len(records), size):
        yield records.take(slice(first, first + size))


def content(records: LabelRecords) -> list[bytes]:
    return [getattr(records, name).tobytes() for name in labels._COLUMNS]


def assert_equal(found: LabelRecords, expected: LabelRecords) -> None:
    for name in labels._COLUMNS:
        one, two = getattr(found, name), getattr(expected, name)
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
    assert content(found) == content(expected)


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('bucket')}/labels"
    return str(tmp_path / "labels") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 13 images, or of 15 with three kept classes."""
    monkeypatch.setattr(labels, "BLOCK_BYTES", 13 * INFO.record_bits // 8 + 1)


def filled(uri: str, info: LabelInfo = INFO, epochs: int = 3) -> LabelStore:
    store = LabelStore.create(uri, info)
    assert [store.write_epoch(epoch, [records_of(info, epoch)]) for epoch in range(epochs)] == [True] * epochs
    return store


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("info", [INFO, TOP], ids=["all", "top"])
def test_any_rows_of_any_epoch_come_back_to_the_last_bit(uri: str, info: LabelInfo) -> None:
    """Rows come back in the order asked for, repeated ones too, by any reader and in any number."""
    store = filled(uri, info)
    assert LabelStore(uri).info == info
    assert (store.epochs(), store.missing()) == ([0, 1, 2], [])
    draw = np.random.default_rng(0)
    for reader in (store, LabelStore(uri), LabelStore(uri, memory=1), pickle.loads(pickle.dumps(store))):
        for epoch in (2, 0, 1):
            rows = draw.permutation(info.images)
            assert_equal(reader.read(epoch, rows), records_of(info, epoch).take(rows))
            assert_equal(reader.read(epoch, [49, 0, 49]), records_of(info, epoch).take(np.array([49, 0, 49])))
            assert len(reader.read(epoch, [])) == 0
    found = store.read(0, [0])
    found.values[:] = 0  # the caller's own
    assert_equal(store.read(0, [0]), records_of(info).take(slice(1)))
    for epoch in range(3):
        store.verify(epoch)


@pytest.mark.usefixtures("small_blocks")
def test_the_batch_of_the_labelling_does_not_matter(tmp_path: Path) -> None:
    """Records that are written in parts of any size give the same bytes."""
    files = set()
    for size in (1, 7, 13, 26, 49, 50, 1000):
        store = LabelStore.create(str(tmp_path / str(size)), INFO)
        assert store.write_epoch(0, parts_of(records_of(INFO), size))
        files.add((store.location / "epoch-00000.arrow").read_bytes())
    assert len(files) == 1
    table = pa.ipc.open_file(pa.BufferReader(files.pop())).read_all()  # any Arrow program
    flat = [value for row in table["partners"].to_pylist() for value in row]
    assert flat == records_of(INFO).partners.tolist()


def test_blocks_have_about_64_kib(tmp_path: Path) -> None:
    """A block is as large as announced; a record larger than that is a block of its own."""
    for images, classes, blocks in ((2000, 200, 14), (3, 40_000, 3)):
        info = replace(INFO, images=images, classes=classes)
        store = LabelStore.create(str(tmp_path / str(classes)), info)
        store.write_epoch(0, [records_of(info)])
        place = store.location / "epoch-00000.arrow"
        sealed = open_sealed(place, format_name=labels.FORMAT, format_version=1)
        assert sealed.n_batches == blocks
        records = info.images * info.record_bits / 8
        assert records < place.size() < 1.02 * records + 4096


def test_an_epoch_is_written_once(uri: str) -> None:
    """A stored epoch is skipped before any record is made; another writer's epoch is never replaced."""
    store = filled(uri, epochs=1)

    def never() -> Iterator[LabelRecords]:
        raise AssertionError("a record was taken")
        yield

    assert not store.write_epoch(0, never())

    def slowly() -> Iterator[LabelRecords]:
        assert LabelStore(uri).write_epoch(1, [records_of(INFO, 1)])
        yield records_of(INFO, 2)

    assert not store.write_epoch(1, slowly())
    assert_equal(store.read(1, range(50)), records_of(INFO, 1))
    assert store.missing() == [2]


def test_a_labelling_that_fails_leaves_no_epoch(uri: str) -> None:
    """An error of the labelling passes through, and nothing of its epoch is stored."""
    store = filled(uri, epochs=1)

    def failing() -> Iterator[LabelRecords]:
        yield records_of(INFO).take(slice(20))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_epoch(1, failing())
    assert (store.epochs(), store.missing()) == ([0], [1, 2])
    with pytest.raises(StoreError, match=r"no labels of epoch 1; it has epochs 0\. "):
        store.read(1, [0])
    assert store.write_epoch(1, [records_of(INFO, 1)])
    assert_equal(store.read(1, range(50)), records_of(INFO, 1))


WRITER = """
import sys, time
from datm_ray.store.labels import LabelStore
from tests.store.test_labels import INFO, parts_of, records_of

def slowly(epoch):
    for number, part in enumerate(parts_of(records_of(INFO, epoch), 10)):
        yield part
        if (epoch, number) == (1, 2):
            print("half", flush=True)
            time.sleep(60)

store = LabelStore.create(sys.argv[1], INFO)
for epoch in range(3):
    store.write_epoch(epoch, slowly(epoch))
"""


def test_a_writer_killed_in_an_epoch_leaves_those_before(tmp_path: Path) -> None:
    """After SIGKILL whole epochs are there and no part of one; the next writer completes them and cleans up."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        writer.send_signal(signal.SIGKILL)
    store = LabelStore.create(str(tmp_path), INFO)
    before = (tmp_path / "epoch-00000.arrow").read_bytes()
    assert (store.epochs(), store.missing()) == ([0], [1, 2])
    for epoch in store.missing():
        assert store.write_epoch(epoch, [records_of(INFO, epoch)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"epoch-{epoch:05d}.arrow" for epoch in range(3)),
        "labels.arrow",
    ]
    assert (tmp_path / "epoch-00000.arrow").read_bytes() == before
    for epoch in range(3):
        assert_equal(store.read(epoch, range(50)), records_of(INFO, epoch))


def wide(images: int = 3000) -> LabelInfo:
    """Labels of 1.3 MB an epoch."""
    return replace(INFO, images=images, classes=200)


def test_only_blocks_of_the_rows_are_read_and_kept(tmp_path: Path) -> None:
    """A row costs its block and the file's end once; the whole epoch costs the file, in any batches."""
    store = filled(str(tmp_path), wide(), 1)
    size = (tmp_path / "epoch-00000.arrow").stat().st_size

    def read(reader: LabelStore, rows: Any) -> int:
        before = traffic()
        reader.read(0, rows)
        return (traffic() - before).read_bytes

    fresh = LabelStore(str(tmp_path))
    assert fresh.info.images == 3000
    first = read(fresh, [1234])
    assert first <= 64 * 1024 * 1.02 + 64 * 1024  # the block, and the end of the file
    assert read(fresh, [1235, 1234]) == 0
    assert 60_000 < read(fresh, [0, 1, 1234, 2]) < 64 * 1024 * 1.02
    order = np.random.default_rng(0).permutation(3000)
    whole = sum(read(store, order[first : first + 100]) for first in range(0, 3000, 100))
    assert whole < 1.06 * size
    frugal = LabelStore(str(tmp_path), memory=200_000)
    assert frugal.info.images == 3000
    for first in range(0, 3000, 100):
        frugal.read(0, order[first : first + 100])
        assert sum(block.nbytes for block in frugal._blocks._blocks.values()) <= 200_000


@pytest.mark.s3
def test_a_row_on_s3_costs_its_block_on_the_wire(bucket: str, s3_proxy: Proxy) -> None:
    """Three requests and two times 64 KiB for a first row, one and 64 KiB for another, and none for a known block."""
    filled(f"s3://{bucket}/labels", wide(), 1)
    store = LabelStore(f"s3://{bucket}/labels")
    assert store.info.images == 3000
    costs = []
    for rows in ([1234], [10], [1240, 11]):
        del s3_proxy.exchanges[:]
        store.read(0, rows)
        costs.append(([each.method for each in s3_proxy.exchanges], sum(each.sent for each in s3_proxy.exchanges)))
    assert [methods for methods, _ in costs] == [["HEAD", "GET", "GET"], ["GET"], []]
    assert costs[0][1] < 2.1 * 64 * 1024
    assert costs[1][1] < 1.05 * 64 * 1024


def test_bytes_are_counted_without_reading(uri: str) -> None:
    """The size is that of the store's files and nothing else, from one listing; plans are a few per cent below."""
    store = filled(uri, replace(wide(), keep=2), 2)
    (store.location / "notes.txt").write_text("not of the store")
    names = [f"epoch-{epoch:05d}.arrow" for epoch in range(2)] + ["labels.arrow"]
    expected = sum((store.location / name).size() for name in names)
    before = traffic()
    assert store.nbytes == expected
    spent = traffic() - before
    assert (spent.reads, spent.looks) == (0, 1)
    assert store.info.planned_bytes < expected < 1.03 * store.info.planned_bytes
    assert LabelStore(f"{uri}-none").nbytes == 0


def test_the_size_of_a_record_is_the_documented_one() -> None:
    """A record takes 32 bytes and a bit and 2 for each class, or 34 and 4 for each kept class."""
    assert INFO.record_bits == 8 * (32 + 2 * 7) + 1
    assert TOP.record_bits == 8 * (34 + 4 * 3) + 1
    assert replace(INFO, images=10_000, classes=200, keep=100).planned_bytes == 10_000 * 100 * (432 + 1 / 8)


def test_stored_epochs_are_repeated_in_turn() -> None:
    """Epoch e of a training has the labels of stored epoch e mod keep, each equally often."""
    assert [INFO.pool_epoch(epoch) for epoch in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [sum(INFO.pool_epoch(epoch) == own for epoch in range(300)) for own in range(3)] == [100] * 3


def test_other_labels_are_not_mixed_in(uri: str) -> None:
    """A folder with labels of other images or settings is refused with the differences; equal ones are opened."""
    LabelStore.create(uri, INFO)
    LabelStore.create(uri, replace(INFO, augmentation={"mix": 1.0, "least_share": 0.08}))
    with pytest.raises(StoreError, match=r"set_fingerprint 'set' instead of 'other', seed 1 instead of 2"):
        LabelStore.create(uri, replace(INFO, set_fingerprint="other", seed=2, keep=4))
    assert LabelStore(uri).info == INFO
    with pytest.raises(StoreError, match=r"labels\.arrow"):
        _ = LabelStore(f"{uri}-none").info


def test_a_store_grows_and_its_first_epochs_can_be_used_alone(uri: str) -> None:
    """More epochs or a longer training add to what is labelled; fewer epochs use the first ones, and remove none."""
    filled(uri)
    longer = LabelStore.create(uri, replace(INFO, epochs=400, keep=5))
    assert (longer.info.epochs, longer.info.keep, longer.missing()) == (400, 5, [3, 4])
    assert not longer.write_epoch(0, [records_of(INFO, 9)])  # stored already
    assert longer.write_epoch(3, [records_of(INFO, 3)])
    assert [longer.info.pool_epoch(epoch) for epoch in (2, 5, 6)] == [2, 0, 1]
    shorter = LabelStore.create(uri, replace(INFO, epochs=20, keep=2))
    assert (shorter.info.keep, shorter.missing(), shorter.info.pool_epoch(3)) == (2, [], 1)
    with pytest.raises(ValueError, match="from 0 to 1"):
        shorter.read(2, [0])
    for reader in (LabelStore(uri), longer, pickle.loads(pickle.dumps(longer))):
        assert (reader.info.epochs, reader.info.keep, reader.missing()) == (400, 5, [4])
        for epoch in range(4):
            assert_equal(reader.read(epoch, [0, 49]), records_of(INFO, epoch).take(np.array([0, 49])))
    sizes = shorter.location.sizes()
    assert longer.nbytes == LabelStore(uri).nbytes == sum(sizes.values())
    two = sizes["labels.arrow"] + sizes["epoch-00000.arrow"] + sizes["epoch-00001.arrow"]
    assert shorter.nbytes == pickle.loads(pickle.dumps(shorter)).nbytes == two
    for keep in (0, 6):
        with pytest.raises(StoreError, match=f"of 5 epochs, and {keep} are to be used"):
            _ = LabelStore(uri, keep=keep).info


def test_a_store_of_an_earlier_version_is_read_and_grows(tmp_path: Path) -> None:
    """Labels that version 0.1.0 stored, whose epochs name their number, are read, and further epochs are added."""
    shutil.copytree(SAMPLE, tmp_path / "labels")
    earlier = replace(TINY, keep=2, epochs=3)
    assert LabelStore(str(tmp_path / "labels")).info == earlier
    store = LabelStore.create(str(tmp_path / "labels"), replace(earlier, keep=3, epochs=5))
    assert store.missing() == [2]
    assert store.write_epoch(2, [records_of(TINY, 2)])
    for epoch in range(3):
        store.verify(epoch)
        assert_equal(store.read(epoch, range(9)), records_of(TINY, epoch))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("boxes", np.zeros((50, 3), np.float32), r"boxes are float32 \[50, 3\] instead of float32 \[50, 4\]"),
        ("values", np.zeros((50, 8), np.float16), r"values are float16 \[50, 8\] instead of float16 \[50, 7\]"),
        ("indices", np.zeros((50, 1), np.uint16), r"indices are uint16 \[50, 1\] instead of uint16 \[50, 0\]"),
        ("boxes", np.full((50, 4), np.nan, np.float32), "boxes are outside"),
        ("partners", np.full(50, 50, np.int32), "partners are outside"),
        ("partners", np.full(50, -1, np.int32), "partners are outside"),
        ("lambdas", np.full(50, 1.5, np.float32), "lambdas are outside"),
        ("mix_boxes", np.full((50, 4), 4, np.uint16), "mix_boxes are outside"),
    ],
)
def test_records_of_another_shape_type_or_range_are_refused(
    name: str, value: Any, message: str, tmp_path: Path
) -> None:
    """What the labels cannot be is refused when written, and is a damaged file when read."""
    store, wrong = LabelStore.create(str(tmp_path), INFO), replace(records_of(INFO), **{name: value})
    with pytest.raises(ValueError, match=message):
        store.write_epoch(0, [wrong])
    assert store.epochs() == []
    write_unchecked(store, wrong)
    with pytest.raises(CorruptFileError, match=r"epoch-00000\.arrow is damaged\. Its content makes no sense"):
        store.read(0, [3])


def write_unchecked(store: LabelStore, records: LabelRecords) -> None:
    """Write an epoch with a right seal, whatever is in it, as another program might."""
    info = labels.json.dumps(store.info.to_json(), sort_keys=True)
    header = {"info": info, "epoch": "0", "block": "50"}
    with (store.location / "epoch-00000.arrow").create() as file:
        writer = SealedWriter(file, labels._SCHEMA, format_name=labels.FORMAT, format_version=1, header=header)
        writer.write(labels._batch(records))
        writer.close({})


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    """Too few records, logits that are no float16, and images or epochs that do not exist are errors."""
    store = filled(str(tmp_path), epochs=1)
    for count in (0, 49):
        with pytest.raises(ValueError, match=f"{count} records given for 50 images"):
            store.write_epoch(1, [records_of(INFO).take(slice(count))])
    with pytest.raises(ValueError, match=r"flips are uint8 \[50\] instead of bool \[50\]"):
        store.write_epoch(1, [replace(records_of(INFO), flips=np.zeros(50, np.uint8))])
    for value in (np.inf, np.nan):
        wrong = replace(records_of(INFO), values=np.full((50, 7), value, np.float16))
        with pytest.raises(StoreError, match="cannot be stored as float16"):
            store.write_epoch(1, [wrong])
    for rows in ([-1], [50], [0, 50]):
        with pytest.raises(IndexError, match="images 0 to 49"):
            store.read(0, rows)
    for epoch in (-1, 3):
        with pytest.raises(ValueError, match="from 0 to 2"):
            store.read(epoch, [0])
    for change in ({"keep": 0}, {"keep": 301}, {"top": 7}, {"top": 0}, {"size": (70_000, 8)}, {"images": 0}):
        with pytest.raises(ValueError, match=r"classes|many|kept"):
            replace(INFO, **change)


def reads_the_truth(uri: str) -> bool:
    """True if all can be read afresh, False if it is refused; fails on wrong values."""
    try:
        store = LabelStore(uri)
        info, found = store.info, store.read(0, range(9))
    except CorruptFileError:
        return False
    assert info == TINY
    assert_equal(found, records_of(TINY))
    return True


TINY = replace(INFO, images=9, classes=4, keep=1, epochs=1)


def test_a_store_frees_its_blocks_at_once(tmp_path: Path) -> None:
    """Blocks that a store keeps in memory do not wait for a garbage collection when the store is dropped."""
    store = filled(str(tmp_path), TINY, 1)
    store.read(0, [1])
    gone = weakref.ref(store)
    gc.disable()
    try:
        del store
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["epoch-00000.arrow", "labels.arrow"])
def test_damage_is_found_or_harmless(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of thousands of damages to either file is refused, or changes nothing that is read."""
    for module in ("tensors", "labels"):  # nobody replaces files here; this halves the time
        monkeypatch.setattr(f"datm_ray.store.{module}.reading_again", lambda location, read, **_: read())
    monkeypatch.setattr(labels, "BLOCK_BYTES", 4 * TINY.record_bits // 8)
    uri = f"memory://{uuid.uuid4().hex}"
    store = filled(uri, TINY, 1)
    place = open_location(uri) / name
    before, harmless, count = place.read_bytes(), 0, 0
    for damaged in damages(before, every=3):
        if damaged == before:
            continue
        place.write_atomic(damaged)
        count += 1
        harmless += reads_the_truth(uri)
        if name.startswith("epoch"):
            with pytest.raises(CorruptFileError):
                store.verify(0)
    assert harmless < 0.4 * count


def test_files_in_the_wrong_place_are_found(tmp_path: Path) -> None:
    """An epoch under another number, from another store, or of another kind is refused."""
    store = filled(str(tmp_path / "one"))
    other = filled(str(tmp_path / "two"), replace(INFO, teacher_fingerprint="other"))
    place = store.location / "epoch-00000.arrow"
    for file in (store.location / "epoch-00001.arrow", other.location / "epoch-00000.arrow"):
        place.write_atomic(file.read_bytes())
        with pytest.raises(CorruptFileError, match="holds another epoch, or labels of another store"):
            store.read(0, [0])
    place.write_atomic((store.location / "labels.arrow").read_bytes())
    with pytest.raises(CorruptFileError, match=r'of format "datm_ray\.tensors"'):
        store.read(0, [0])
    write_tensors(store.location / "labels.arrow", {}, kind="checkpoint", metadata={})
    with pytest.raises(CorruptFileError, match='is a "checkpoint"'):
        _ = LabelStore(store.location).info
    newer = {"version": 2, "info": {**INFO.to_json(), "colour": True}}
    write_tensors(store.location / "labels.arrow", {}, kind="labels", metadata=newer)
    with pytest.raises(CorruptFileError, match=r"version 2 of its format.*Upgrade"):
        _ = LabelStore(store.location).info


def test_a_replaced_epoch_is_read_anew(tmp_path: Path) -> None:
    """A reader that knows a file's parts finds that it was removed and written again."""
    monkey = LabelStore(str(tmp_path))
    store = filled(str(tmp_path), wide(), 1)
    monkey.read(0, [0])
    (store.location / "epoch-00000.arrow").remove()
    changed = replace(records_of(wide()), lambdas=np.zeros(3000, np.float32))
    assert store.write_epoch(0, [changed])
    assert_equal(monkey.read(0, [2999]), changed.take(slice(2999, 3000)))
