"""Tests of the trajectory store's contract, inherited by the tests of every kind of place.

A subclass provides the fixture `uri`: a place of its own for each test, empty and writable.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from datm_ray.errors import CorruptFileError, StoreError
from datm_ray.store.files.filesystem import Location
from datm_ray.store.tensors import write_tensors
from datm_ray.store.trajectories import ExpertGroup, GroupKey, Snapshot, TrajectoryInfo, TrajectoryStore

KEY = GroupKey("digits", "ConvNetD2", "5f2a9c")
NAMES, SHAPES = ("conv.weight", "conv.bias", "scale"), ((4, 3, 2), (4,), ())  # 29 parameters


def make_info(expert: int = 0, epochs: int = 5, key: GroupKey = KEY) -> TrajectoryInfo:
    """Info of an expert with 29 parameters that stores `epochs` epochs: 0, 2, 4, ..."""
    return TrajectoryInfo(
        dataset=key.dataset,
        dataset_fingerprint="d1",
        architecture=key.architecture,
        recipe={"lr": 0.01, "batch": 256, "augment": ["flip", "größer"]},
        fingerprint=key.fingerprint,
        seed=11,
        expert=expert,
        parameter_names=NAMES,
        parameter_shapes=SHAPES,
        epochs=tuple(range(0, 2 * epochs, 2)),
    )


def make_snapshots(info: TrajectoryInfo, seed: int = 0) -> list[Snapshot]:
    """Random snapshots; the accuracy is measured at every other one."""
    draw = np.random.default_rng([seed, info.expert])
    return [
        Snapshot(
            epoch=epoch,
            step=2**33 + epoch,
            train_loss=float(np.float32(draw.random())),
            test_accuracy=float(np.float32(draw.random())) if epoch % 4 == 0 else math.nan,
            params=draw.standard_normal(info.parameter_count).astype(np.float32),
        )
        for epoch in info.epochs
    ]


def assert_same(found: Snapshot, expected: Snapshot) -> None:
    """Assert equality to the last bit, nan included."""
    assert (found.epoch, found.step) == (expected.epoch, expected.step)
    np.testing.assert_array_equal(
        [found.train_loss, found.test_accuracy], [expected.train_loss, expected.test_accuracy]
    )
    assert found.params.dtype == np.float32
    assert found.params.tobytes() == expected.params.tobytes()
    assert found.buffers.dtype == np.float32
    assert found.buffers.tobytes() == expected.buffers.tobytes()


def with_buffers(info: TrajectoryInfo) -> TrajectoryInfo:
    """Copy of an expert's info for a network with a batch norm: 8 values in buffers."""
    return replace(info, buffer_names=("norm.running_mean", "norm.running_var"), buffer_shapes=((4,), (4,)))


def make_snapshots_with_buffers(info: TrajectoryInfo) -> list[Snapshot]:
    """Random snapshots of a network with a batch norm."""
    draw = np.random.default_rng(1)
    buffers = draw.standard_normal((len(info.epochs), info.buffer_count)).astype(np.float32)
    return [replace(snapshot, buffers=row) for snapshot, row in zip(make_snapshots(info), buffers, strict=True)]


class TrajectoryStoreContract:
    altered_bytes = 60
    """About how many bytes of a file are altered, one at a time, to see that a digest covers each."""

    @pytest.fixture
    def store(self, uri: str) -> TrajectoryStore:
        return TrajectoryStore(uri)

    @pytest.fixture
    def group(self, store: TrajectoryStore) -> ExpertGroup:
        return store.group(KEY.dataset, KEY.architecture, KEY.fingerprint)

    @pytest.fixture
    def info(self) -> TrajectoryInfo:
        return make_info()

    @pytest.fixture
    def snapshots(self, group: ExpertGroup, info: TrajectoryInfo) -> list[Snapshot]:
        """The snapshots of expert 0, which is in the store."""
        snapshots = make_snapshots(info)
        assert group.write_expert(0, snapshots, info)
        return snapshots

    @pytest.fixture
    def file(self, group: ExpertGroup, snapshots: list[Snapshot]) -> Location:
        """The file of expert 0."""
        return group.location / "expert-00000.arrow"

    def test_snapshots_come_back_to_the_last_bit(self, group, info, snapshots):
        """Every field of every snapshot is read as it was written, to the last bit."""
        for expected in snapshots:
            assert_same(group.read_snapshot(0, expected.epoch), expected)

    def test_params_come_back_in_the_order_asked_for(self, group, snapshots):
        """Params of any epochs are read in the requested order, also repeatedly."""
        found = group.read_params(0, [8, 0, 8])
        expected = [snapshots[index].params for index in (4, 0, 4)]
        assert [params.tobytes() for params in found] == [params.tobytes() for params in expected]

    def test_the_caller_owns_the_params(self, group, snapshots):
        """Writing into returned params changes neither the store nor another read."""
        group.read_params(0, [4])[0][:] = 0
        assert_same(group.read_snapshot(0, 4), snapshots[2])

    def test_info_comes_back(self, group, info, snapshots):
        """All fields of an expert's info are read as written."""
        assert group.read_info(0) == info
        assert info.parameter_count == 29

    def test_progress_comes_back(self, group, info, snapshots):
        """Losses and accuracies equal those of the snapshots, and are read without the parameters."""
        epochs, train_loss, test_accuracy = group.read_progress(0)
        assert epochs == info.epochs
        np.testing.assert_array_equal(train_loss, [s.train_loss for s in snapshots])
        np.testing.assert_array_equal(test_accuracy, [s.test_accuracy for s in snapshots])

    def test_buffers_come_back_beside_the_params(self, group, info):
        """Buffers keep names, shapes and full precision, whatever the storage."""
        info = replace(with_buffers(info), storage="bfloat16")
        snapshots = make_snapshots_with_buffers(info)
        group.write_expert(0, snapshots, info)
        assert group.read_info(0) == info
        assert info.buffer_count == 8
        for expected in snapshots:
            assert group.read_snapshot(0, expected.epoch).buffers.tobytes() == expected.buffers.tobytes()
            found = group.read_snapshot(0, expected.epoch)
            assert_same(replace(found, params=expected.params), expected)

    def test_a_network_without_buffers_has_an_empty_vector_of_them(self, group, snapshots):
        """A network without buffers has an empty vector of them."""
        buffers = group.read_snapshot(0, 4).buffers
        assert (buffers.shape, buffers.dtype) == ((0,), np.float32)

    @pytest.mark.parametrize(("storage", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
    def test_half_the_bytes_hold_rounded_params(self, group, storage, error):
        """Two bytes a value halve the file; params are read as float32, rounded to nearest."""
        info = replace(make_info(), parameter_names=("w",), parameter_shapes=((50_000,),), epochs=(0,))
        params = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
        group.write_expert(0, [Snapshot(0, 0, 0.0, 0.0, params)], info)
        info = replace(info, expert=1, storage=storage)
        group.write_expert(1, [Snapshot(0, 0, 0.0, 0.0, params)], info)
        (found,) = group.read_params(1, [0])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, params, rtol=error, atol=2**-25)
        assert not np.array_equal(found, params)
        assert group.size(1) < 0.52 * group.size(0)
        assert group.verify(1) == info

    def test_params_beyond_the_storage_are_refused(self, group, info):
        """A value that would be stored as infinity is an error that names another storage; nothing is stored."""
        snapshots = make_snapshots(info)
        snapshots[3].params[7] = 1e5
        with pytest.raises(StoreError, match=r"1e\+05 cannot be stored as float16.*bfloat16"):
            group.write_expert(0, snapshots, replace(info, storage="float16"))
        assert group.experts() == []

    def test_an_unknown_storage_is_refused(self, group, info):
        """An unknown storage is an error, because its params could not be read back."""
        with pytest.raises(ValueError, match="'float8' is not a storage format"):
            group.write_expert(0, make_snapshots(info), replace(info, storage="float8"))
        assert group.experts() == []

    def test_buffers_must_be_those_announced(self, group, info):
        """A vector of buffers of another length or type is refused."""
        snapshot = make_snapshots(info)[0]
        for buffers in (np.zeros(7, np.float32), np.zeros(8), np.zeros(0, np.float32)):
            with pytest.raises(ValueError, match=r"the buffers are .* instead of float32 \[8\]"):
                group.write_expert(0, [replace(snapshot, buffers=buffers)], with_buffers(info))

    def test_epochs_need_not_follow_one_another(self, group, info):
        """Any ascending epochs are stored; reading a missing one is an error that lists those stored."""
        info = replace(info, epochs=(0, 1, 2, 5, 40))
        snapshots = make_snapshots(info)
        group.write_expert(0, snapshots, info)
        assert [p.tobytes() for p in group.read_params(0, [40, 1])] == [snapshots[i].params.tobytes() for i in (4, 1)]
        assert group.read_progress(0).epochs == info.epochs
        with pytest.raises(StoreError, match=r"has no epoch 3; it has epochs 0-2, 5, 40\. experts\.keep_epochs"):
            group.read_params(0, [3])

    def test_a_removed_expert_is_gone(self, group, info, snapshots):
        """Removing an expert deletes it alone, and its number can be written again."""
        other = replace(info, expert=3)
        group.write_expert(3, make_snapshots(other), other)
        group.remove_expert(0)
        assert group.experts() == [3]
        for act in (group.read_info, group.remove_expert):
            with pytest.raises(StoreError, match=r"expert-00000\.arrow.* does not exist"):
                act(0)
        others = make_snapshots(info, seed=1)
        assert group.write_expert(0, others, info)
        assert_same(group.read_snapshot(0, 4), others[2])

    def test_a_removed_group_is_gone(self, store, group, snapshots):
        """Removing a group deletes its experts and transform, and it is no longer listed."""
        group.write_transform({"mean": np.zeros(3, np.float32)}, {})
        group.remove()
        assert store.groups() == []
        assert not group.has_transform()

    def test_writers_of_different_experts_do_not_disturb_each_other(self, store, group):
        """Experts written side by side are all stored; a reader meanwhile gets whole ones only."""

        def write(expert: int) -> bool:
            writer = store.group(KEY.dataset, KEY.architecture, KEY.fingerprint)
            info = make_info(expert)
            return writer.write_expert(expert, make_snapshots(info), info)

        with ThreadPoolExecutor(4) as threads:
            writes = [threads.submit(write, expert) for expert in range(8)]
            while not all(each.done() for each in writes):
                for expert in group.experts():
                    group.verify(expert)
        assert all(each.result() for each in writes)
        assert group.experts() == list(range(8))
        for expert in range(8):
            assert_same(group.read_snapshot(expert, 4), make_snapshots(make_info(expert))[2])

    def test_only_the_requested_epochs_are_read(self, group, info, monkeypatch):
        """Reading two of many epochs transfers the file's end once, and then two batches each time."""
        params = np.zeros(50_000, np.float32)  # 200 kB
        info = TrajectoryInfo(
            **{**vars(info), "parameter_names": ("w",), "parameter_shapes": ((50_000,),), "epochs": (0, 1, 2)}
        )
        group.write_expert(0, [Snapshot(epoch, 0, 0.0, 0.0, params) for epoch in info.epochs], info)
        read_ranges, lengths = Location.read_ranges, []

        def recording(location, ranges):
            lengths.append([end - start for start, end in ranges])
            return read_ranges(location, ranges)

        monkeypatch.setattr(Location, "read_ranges", recording)
        group.read_params(0, [0, 2])
        group.read_params(0, [1, 2])
        (end,), *pairs = lengths
        assert end <= 64 * 1024
        assert [len(pair) for pair in pairs] == [2, 2]
        assert all(200_000 <= length < 201_000 for pair in pairs for length in pair)

    def test_any_arrow_program_can_read_an_expert(self, info, snapshots, file):
        """An expert's file is an ordinary Arrow IPC file with the documented columns."""
        table = pa.ipc.open_file(pa.BufferReader(file.read_bytes())).read_all()
        assert table.column_names == ["epoch", "step", "train_loss", "test_accuracy", "params", "buffers"]
        assert table.column("epoch").to_pylist() == list(info.epochs)
        np.testing.assert_array_equal(table.column("params").to_pylist(), [s.params for s in snapshots])

    def test_the_same_expert_gives_the_same_file(self, store, group, info, snapshots, file):
        """Equal experts give equal bytes."""
        content = file.read_bytes()
        file.remove()
        group.write_expert(0, make_snapshots(info), info)
        assert file.read_bytes() == content

    def test_an_empty_store_has_no_groups_and_no_experts(self, store, group):
        """A place where nothing was written is an empty store, not an error."""
        assert store.groups() == []
        assert group.experts() == []

    def test_groups_and_experts_are_listed_in_order(self, store):
        """Listings are sorted and hold exactly what was written."""
        keys = [GroupKey("digits", "ConvNetD2", "b"), GroupKey("cifar10", "ResNet18", "a"), KEY]
        for key in keys:
            group = store.group(key.dataset, key.architecture, key.fingerprint)
            for expert in (12, 3):
                info = make_info(expert, key=key)
                group.write_expert(expert, make_snapshots(info), info)
            assert group.experts() == [3, 12]
        assert store.groups() == sorted(keys)

    def test_other_files_are_not_taken_for_experts(self, store, group, snapshots):
        """Other files at any level are not listed."""
        (store.location / "README.md").write_text("not a data set")
        (store.location / "digits" / "notes.txt").write_text("not an architecture")
        for name in ("expert-1.arrow", "expert-000001.arrow", "expert-00002.arrow.bak", "xexpert-00003.arrow"):
            (group.location / name).write_text("not an expert")
        (store.location / "digits" / "ConvNetD2" / "empty" / "notes.txt").write_text("not a group")
        assert group.experts() == [0]
        assert store.groups() == [KEY]

    def test_an_expert_being_written_is_not_there(self, store, group, info):
        """An expert is neither listed nor readable until its file is complete."""

        def looking_around() -> Iterator[Snapshot]:
            for snapshot in make_snapshots(info):
                assert group.experts() == []
                assert store.groups() == []
                assert group.location.list() == []
                with pytest.raises(StoreError):
                    group.read_info(0)
                yield snapshot

        assert group.write_expert(0, looking_around(), info)
        assert group.experts() == [0]

    def test_a_committed_expert_stays(self, group, info, snapshots):
        """Writing a stored expert again changes nothing and takes no snapshot, which can be costly."""
        others = iter(make_snapshots(info, seed=1))
        assert not group.write_expert(0, others, info)
        assert len(list(others)) == len(snapshots)
        assert_same(group.read_snapshot(0, 4), snapshots[2])

    def test_of_two_writers_of_one_expert_the_first_wins(self, group, info):
        """The later of two writers of one expert leaves the file and reports that it exists."""
        first, second = make_snapshots(info, seed=1), make_snapshots(info, seed=2)

        def overtaken() -> Iterator[Snapshot]:
            yield from second
            assert group.write_expert(0, first, info)

        assert not group.write_expert(0, overtaken(), info)
        for expected in first:
            assert_same(group.read_snapshot(0, expected.epoch), expected)

    def test_a_failing_expert_leaves_nothing(self, group, info):
        """An error in the training passes through unchanged, nothing is stored, and a retry works."""

        def failing() -> Iterator[Snapshot]:
            yield make_snapshots(info)[0]
            raise FloatingPointError("loss is nan")

        with pytest.raises(FloatingPointError, match="loss is nan"):
            group.write_expert(0, failing(), info)
        assert group.experts() == []
        assert group.write_expert(0, make_snapshots(info), info)

    @pytest.mark.parametrize("taken", [[0, 1], [0, 2, 1, 3, 4], [0, 1, 2, 3, 4, 4], []])
    def test_snapshots_must_be_those_announced(self, group, info, taken):
        """Missing, swapped or repeated snapshots are refused and nothing is stored."""
        snapshots = make_snapshots(info)
        with pytest.raises(ValueError, match="epochs 0, 2, 4, 6, 8 announced"):
            group.write_expert(0, [snapshots[index] for index in taken], info)
        assert group.experts() == []

    def test_params_must_fit_the_network(self, group, info):
        """Params of another length or type are refused."""
        for params in (np.zeros(28, np.float32), np.zeros(29), np.zeros((1, 29), np.float32)):
            with pytest.raises(ValueError, match=r"instead of float32 \[29\]"):
                group.write_expert(0, [Snapshot(0, 0, 0.0, 0.0, params)], info)

    def test_info_must_be_of_the_expert_written(self, store, info):
        """An expert cannot be stored under another's number or in another's group."""
        with pytest.raises(ValueError, match="expert 0 of digits/ConvNetD2/5f2a9c given for expert 1"):
            store.group("digits", "ConvNetD2", "5f2a9c").write_expert(1, make_snapshots(info), info)
        with pytest.raises(ValueError, match="given for expert 0 of digits/ConvNetD2/other"):
            store.group("digits", "ConvNetD2", "other").write_expert(0, make_snapshots(info), info)

    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../up", "-x", "a\\b", "a b", "a\n", ".tmp-x"])
    def test_names_cannot_lead_elsewhere(self, store, name):
        """A name that is no plain folder name is refused everywhere."""
        for names in ((name, "a", "b"), ("a", name, "b"), ("a", "b", name)):
            with pytest.raises(StoreError, match="cannot be a group's folder"):
                store.group(*names)

    def test_a_missing_expert_is_named(self, group, snapshots):
        """Reading a missing expert is a StoreError with its file's name."""
        for read in (group.read_info, group.read_progress, group.verify):
            with pytest.raises(StoreError, match=r"expert-00007\.arrow.* does not exist"):
                read(7)

    def test_a_missing_epoch_is_named(self, group, snapshots):
        """Reading a missing epoch is an error that lists those stored and what decides them."""
        with pytest.raises(StoreError, match=r"has no epoch 3; it has epochs 0, 2, 4, 6, 8\. experts\.keep_epochs"):
            group.read_params(0, [2, 3])

    def test_verify_accepts_what_was_written(self, group, info, snapshots):
        """Verifying an intact file returns the expert's info."""
        assert group.verify(0) == info

    def test_an_altered_file_is_named(self, group, snapshots, file):
        """A changed bit in the parameters is an error with the file's name; other epochs stay readable."""
        content = bytearray(file.read_bytes())
        position = content.find(snapshots[2].params.tobytes())
        content[position + 5] ^= 0x10
        file.write_atomic(bytes(content))
        with pytest.raises(CorruptFileError, match=r"expert-00000\.arrow is damaged"):
            group.read_params(0, [2, 4])
        assert_same(group.read_snapshot(0, 2), snapshots[1])
        with pytest.raises(CorruptFileError, match=r"expert-00000\.arrow is damaged"):
            group.verify(0)

    def test_a_truncated_file_is_named(self, group, snapshots, file):
        """A file without its end is an error with its name."""
        file.write_atomic(file.read_bytes()[:-100])
        with pytest.raises(CorruptFileError, match=r"expert-00000\.arrow has no seal .* truncated"):
            group.read_params(0, [4])

    def test_a_damaged_expert_can_be_written_again(self, group, info, snapshots, file):
        """A damaged expert, deleted and written anew, is read also by a group that had read the old one."""
        group.read_params(0, [0])
        file.remove()
        others = make_snapshots(info, seed=1)
        assert group.write_expert(0, others, info)
        assert_same(group.read_snapshot(0, 4), others[2])

    def test_a_reader_elsewhere_recovers_from_a_replaced_file(self, store, group, info, snapshots, file):
        """A reader with the old footer reads the old file or the new one whole, never a mixture."""
        reader = store.group(KEY.dataset, KEY.architecture, KEY.fingerprint)
        reader.read_params(0, [0])
        file.remove()
        others = make_snapshots(info, seed=1)
        group.write_expert(0, others, info)
        found = reader.read_snapshot(0, 4)
        assert_same(found, others[2] if found.train_loss == others[2].train_loss else snapshots[2])

    def test_a_file_replaced_while_it_is_read_is_read_again(self, group, info, snapshots, file, monkeypatch):
        """A file replaced between two reads of its parts is read again, not called damaged."""
        one, other = file.read_bytes(), replace(with_buffers(info), recipe={"longer": "than the other's"})
        file.remove()
        group.write_expert(0, make_snapshots_with_buffers(other), other)
        contents = [one, file.read_bytes()]
        (twin := group.location / "transform.arrow").write_atomic(b"")
        write_tensors(twin, {"mean": np.zeros(3, np.float32)}, kind="transform", metadata={})
        tensors = [twin.read_bytes()]
        write_tensors(twin, {"mean": np.ones(300, np.float32)}, kind="transform", metadata={})
        tensors.append(twin.read_bytes())
        read_ranges = Location.read_ranges

        def replacing(location: Location, ranges):
            if left:
                changed, versions = (file, contents) if location.path == file.path else (twin, tensors)
                changed.write_atomic(versions[left.pop() % 2])
            return read_ranges(location, ranges)

        monkeypatch.setattr(Location, "read_ranges", replacing)
        for times in (1, 2):
            for read in (group.verify, lambda _: group.read_transform(), group.read_info):
                left, group._opened = [*range(times)], {}
                read(0)
                left, group._opened = [*range(1, times + 1)], {}
                read(0)
        file.write_atomic(contents[1])
        left, group._opened = [*range(10_001)], {}
        monkeypatch.setattr("datm_ray.store.sealed.time.sleep", lambda _: None)
        with pytest.raises(StoreError, match=r"has changed each of the 12 times.*Another command writes it"):
            group.verify(0)

    def test_a_renamed_expert_is_noticed(self, group, snapshots, file):
        """A file renamed to another expert's name is refused."""
        (group.location / "expert-00001.arrow").write_atomic(file.read_bytes())
        with pytest.raises(CorruptFileError, match="holds expert 0 of digits/ConvNetD2/5f2a9c"):
            group.read_params(1, [0])

    def test_a_group_survives_pickling(self, group, snapshots):
        """A pickled group keeps the footers that it has read."""
        group.read_info(0)
        assert_same(pickle.loads(pickle.dumps(group)).read_snapshot(0, 4), snapshots[2])

    def test_the_transform_lies_beside_the_experts(self, group, snapshots):
        """A transform is read as written, is written once, and is not listed as an expert."""
        arrays = {"matrix": np.eye(3, dtype=np.float32), "mean": np.arange(3, dtype=np.float32)}
        assert group.write_transform(arrays, {"eps": 0.1})
        assert not group.write_transform({"matrix": np.zeros((3, 3), np.float32)}, {})
        found = group.read_transform()
        assert found.metadata == {"eps": 0.1}
        assert {name: array.tolist() for name, array in found.arrays.items()} == {
            name: array.tolist() for name, array in arrays.items()
        }
        assert group.experts() == [0]

    def test_a_transform_may_share_the_bytes_of_its_twin(self, group):
        """A transform that shares its twin's bytes stays readable after the twin is deleted."""
        arrays, twin = {"mean": np.arange(3, dtype=np.float32)}, group.location / "twin.arrow"
        write_tensors(twin, arrays, kind="transform", metadata={"eps": 0.1})
        assert group.write_transform(arrays, {"eps": 0.1}, twin)
        assert not group.write_transform(arrays, {"eps": 0.1}, twin)
        twin.remove()
        assert group.read_transform().arrays["mean"].tolist() == [0, 1, 2]

    def test_a_missing_transform_is_named(self, group):
        """Reading the transform of a group without one is a StoreError."""
        with pytest.raises(StoreError, match=r"transform\.arrow"):
            group.read_transform()

    def test_another_file_is_not_taken_for_a_transform(self, group, snapshots, file):
        """A file of another format under a transform's name is refused."""
        (group.location / "transform.arrow").write_atomic(file.read_bytes())
        with pytest.raises(CorruptFileError, match=r'format "datm_ray\.trajectory", not "datm_ray\.tensors"'):
            group.read_transform()

    def test_every_byte_counts_for_verify(self, group, snapshots, file):
        """The digests of an expert's file cover every byte."""
        content = file.read_bytes()
        for position in range(0, len(content), max(97, len(content) // self.altered_bytes)):
            altered = bytearray(content)
            altered[position] ^= 1
            file.write_atomic(bytes(altered))
            with pytest.raises(CorruptFileError):
                group.verify(0)
        file.write_atomic(content)
        group.verify(0)
