"""Tests the trajectory store on a local disk: the contract, and the behaviour of files and processes."""

from __future__ import annotations

import math
import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from datm_ray.errors import StoreError
from datm_ray.store.files import local
from datm_ray.store.trajectories import TrajectoryStore
from tests.store.contract import (
    KEY,
    TrajectoryStoreContract,
    assert_same,
    make_info,
    make_snapshots,
    make_snapshots_with_buffers,
    with_buffers,
)

SAMPLES = Path(__file__).parent / "samples"

WRITER = """
import sys, time
from datm_ray.store.trajectories import TrajectoryStore
from tests.store.contract import KEY, make_info, make_snapshots

def slowly(snapshots, pause):
    for number, snapshot in enumerate(snapshots):
        yield snapshot
        if number == 2:
            print("half", flush=True)
            time.sleep(pause)

uri, first, last, pause = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
group = TrajectoryStore(uri).group(KEY.dataset, KEY.architecture, KEY.fingerprint)
for expert in range(first, last):
    info = make_info(expert)
    print(group.write_expert(expert, slowly(make_snapshots(info), pause), info), flush=True)
"""


def start_writer(uri: str, first: int, last: int, pause: float) -> subprocess.Popen[str]:
    """Start a process that writes experts first .. last - 1 and pauses some seconds in the middle of each."""
    arguments = [sys.executable, "-c", WRITER, uri, str(first), str(last), str(pause)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)


class TestLocal(TrajectoryStoreContract):
    @pytest.fixture
    def uri(self, tmp_path: Path) -> str:
        return str(tmp_path / "store")

    def test_a_writer_killed_in_mid_write_leaves_no_expert(self, uri, group):
        """A writer killed by SIGKILL leaves no listed expert; the next one removes its leftovers."""
        with start_writer(uri, 0, 1, pause=60) as writer:
            assert writer.stdout.readline() == "half\n"
            assert len(os.listdir(group.location.path)) == 1
            assert group.location.remove_leftovers() == []  # its writer lives
            writer.send_signal(signal.SIGKILL)
        assert len(os.listdir(group.location.path)) == 1
        assert group.experts() == []
        info = make_info()
        snapshots = make_snapshots(info)
        assert group.write_expert(0, snapshots, info)
        assert os.listdir(group.location.path) == ["expert-00000.arrow"]
        assert_same(group.read_snapshot(0, 4), snapshots[2])

    def test_processes_write_different_experts_at_the_same_time(self, uri, group):
        """Processes that write different experts disturb neither each other nor a reader."""
        with start_writer(uri, 0, 4, pause=0.02) as one, start_writer(uri, 4, 8, pause=0.02) as two:
            while one.poll() is None or two.poll() is None:
                for expert in group.experts():
                    group.verify(expert)
        assert (one.returncode, two.returncode) == (0, 0)
        assert group.experts() == list(range(8))
        for expert in group.experts():
            for expected in make_snapshots(make_info(expert)):
                assert_same(group.read_snapshot(expert, expected.epoch), expected)

    def test_processes_writing_the_same_expert_store_one(self, uri, group):
        """Exactly one of two processes that write the same expert stores it."""
        with start_writer(uri, 0, 1, pause=1) as one, start_writer(uri, 0, 1, pause=1) as two:
            stored = [one.communicate()[0].split()[-1], two.communicate()[0].split()[-1]]
        assert sorted(stored) == ["False", "True"]
        assert os.listdir(group.location.path) == ["expert-00000.arrow"]
        group.verify(0)

    def test_file_uris_and_paths_name_the_same_store(self, uri, snapshots):
        """file:///x and /x are one store."""
        assert TrajectoryStore(f"file://{uri}").groups() == [KEY]

    def test_a_file_can_be_read_by_those_the_umask_allows(self, file):
        """A file has the permissions of the umask, not those of its temporary name."""
        umask = os.umask(0)
        os.umask(umask)
        assert stat.S_IMODE(os.stat(file.path).st_mode) == 0o666 & ~umask

    def test_vectors_outlive_the_file(self, group, snapshots, file):
        """Returned vectors stay valid after the file is deleted."""
        (params,) = group.read_params(0, [4])
        file.remove()
        np.testing.assert_array_equal(params, snapshots[2].params)

    def test_a_file_in_place_of_the_store_is_named(self, tmp_path):
        """A store cannot be made where a file is."""
        (tmp_path / "taken").write_text("a file")
        store = TrajectoryStore(str(tmp_path / "taken"))
        assert store.groups() == []
        info = make_info()
        with pytest.raises(StoreError, match="taken/digits/ConvNetD2"):
            store.group(KEY.dataset, KEY.architecture, KEY.fingerprint).write_expert(0, make_snapshots(info), info)

    def test_version_1_stays_readable(self):
        """An expert and a transform of format version 1, without buffers, are read to the last bit."""
        store = TrajectoryStore(str(SAMPLES / "v1"))
        assert store.groups() == [KEY]
        group = store.group(KEY.dataset, KEY.architecture, KEY.fingerprint)
        assert group.experts() == [0]
        assert group.verify(0) == replace(make_info(), format_version=1)
        for expected in make_snapshots(make_info()):
            assert_same(group.read_snapshot(0, expected.epoch), expected)
        transform = group.read_transform()
        assert transform.metadata == {"kind": "zca"}
        np.testing.assert_array_equal(transform.arrays["mean"], np.arange(4, dtype=np.float32))

    def test_version_2_stays_readable(self):
        """Experts of format version 2, with buffers and in bfloat16, are read to the last bit."""
        group = TrajectoryStore(str(SAMPLES / "v2")).group(KEY.dataset, KEY.architecture, KEY.fingerprint)
        assert group.experts() == [0, 1]
        assert group.verify(0) == replace(with_buffers(make_info()), format_version=2)
        for expected in make_snapshots_with_buffers(with_buffers(make_info())):
            assert_same(group.read_snapshot(0, expected.epoch), expected)
        assert group.verify(1) == replace(make_info(1), format_version=2, storage="bfloat16")
        for expected in make_snapshots(make_info(1)):
            rounded = torch.from_numpy(expected.params).bfloat16().float().numpy()
            assert_same(group.read_snapshot(1, expected.epoch), replace(expected, params=rounded))


def test_free_space_is_that_of_the_disk_that_will_hold_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing folder has its parent's disk, a link its target's, and a disk that does not tell has no limit."""
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path.resolve())
        return SimpleNamespace(free=7, total=9)

    monkeypatch.setattr(local.shutil, "disk_usage", usage)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other disk").mkdir()
    assert local.free_space("runs") == 7
    (tmp_path / "runs").symlink_to("other disk")
    assert local.free_space("runs") == local.free_space("runs/birds/experts") == 7
    assert asked == [tmp_path, tmp_path / "other disk", tmp_path / "other disk"]
    monkeypatch.setattr(local.shutil, "disk_usage", lambda _: SimpleNamespace(free=0, total=0))
    assert local.free_space("runs") == math.inf
    monkeypatch.setattr(local.shutil, "disk_usage", mock.Mock(side_effect=OSError(5, "Input/output error")))
    assert local.free_space("runs") == math.inf
