"""Tests the trajectory store on S3: the contract and network faults. Needs moto; nothing leaves this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from datm_ray.config import to_yaml
from datm_ray.errors import StoreError
from datm_ray.store.files.filesystem import AlreadyExistsError, open_location
from datm_ray.store.trajectories import ExpertGroup, Snapshot, TrajectoryStore
from tests.conftest import assert_one_line, tiny_config
from tests.store.contract import KEY, TrajectoryStoreContract, assert_same, make_info, make_snapshots
from tests.store.proxy import BUSY, FAULTS, LOST_ANSWER, LOST_REQUEST, every_fifth

pytestmark = pytest.mark.s3


def group_of(bucket: str) -> ExpertGroup:
    return TrajectoryStore(f"s3://{bucket}/store").group(KEY.dataset, KEY.architecture, KEY.fingerprint)


def first(method: str, fault: str) -> Callable[[str, str], str | None]:
    """Fails the first request of a method, in one way."""
    open_: list[str] = [fault]
    return lambda given, path: open_.pop() if given == method and open_ else None


class TestS3(TrajectoryStoreContract):
    altered_bytes = 12

    @pytest.fixture
    def uri(self, bucket: str) -> str:
        return f"s3://{bucket}/store"


def test_the_environment_configures_s3_as_it_does_for_s3fs(bucket, s3_server, monkeypatch, tmp_path):
    """Endpoint and credentials come from AWS_ENDPOINT_URL_S3, a profile, or s3fs's arguments in FSSPEC_S3_*."""
    (open_location(f"s3://{bucket}") / "file").write_text("found")
    (tmp_path / "config").write_text(
        f"[profile mine]\nendpoint_url = {s3_server}\nregion = us-east-1\n"
        "aws_access_key_id = testing\naws_secret_access_key = testing\n"
    )
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    bare = {name: value for name, value in os.environ.items() if name[:11] not in ("AWS_ACCESS_", "AWS_SECRET_")}
    for environment in (
        {**os.environ, "AWS_ENDPOINT_URL_S3": s3_server},
        {**bare, "AWS_PROFILE": "mine", "AWS_CONFIG_FILE": str(tmp_path / "config")},
        {**bare, "FSSPEC_S3_ENDPOINT_URL": s3_server, "FSSPEC_S3_KEY": "testing", "FSSPEC_S3_SECRET": "testing"},
    ):
        code = (
            "import sys; from datm_ray.store.files.filesystem import open_location as o; print(o(sys.argv[1]).list())"
        )
        command = [sys.executable, "-c", code, f"s3://{bucket}"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.stdout == "['file']\n", result.stderr


def test_a_whole_bucket_can_be_a_store(bucket):
    """A store's URI may be a bucket without a folder."""
    group = TrajectoryStore(f"s3://{bucket}").group(KEY.dataset, KEY.architecture, KEY.fingerprint)
    group.write_expert(0, make_snapshots(make_info()), make_info())
    assert TrajectoryStore(f"s3://{bucket}").groups() == [KEY]


def test_a_pair_costs_two_snapshots_on_the_wire(bucket, s3_proxy):
    """With the footer known, two epochs cost two requests and at most 5 % more than their bytes."""
    info = replace(make_info(), parameter_names=("w",), parameter_shapes=((50_000,),), epochs=(0, 1, 2, 3))
    group = group_of(bucket)
    group.write_expert(0, [Snapshot(epoch, 0, 0.0, 0.0, np.ones(50_000, np.float32)) for epoch in range(4)], info)
    group.read_info(0)
    del s3_proxy.exchanges[:]
    group.read_params(0, [1, 3])
    assert [exchange.method for exchange in s3_proxy.exchanges] == ["GET", "GET"]
    sent = sum(exchange.sent for exchange in s3_proxy.exchanges)
    assert 2 * 200_000 < sent <= 1.05 * 2 * 200_000


def test_a_small_file_is_fetched_once(bucket, s3_proxy):
    """A file below 64 KiB, of an expert or a set, is fetched by one request."""
    group = group_of(bucket)
    group.write_expert(0, make_snapshots(make_info()), make_info())
    group.write_transform({"mean": np.zeros(2000, np.float32), "matrix": np.eye(30, dtype=np.float32)}, {})
    for read in (group.verify, lambda _: group.read_transform(), lambda expert: group.read_params(expert, [0, 4, 8])):
        del s3_proxy.exchanges[:]
        read(0)
        assert [exchange.method for exchange in s3_proxy.exchanges] == ["HEAD", "GET"]


def test_verify_reads_files_side_by_side(bucket, s3_proxy, datm_ray):
    """Verify reads eight files at a time and prints them in order."""
    group = group_of(bucket)
    for expert in range(24):
        group.write_expert(expert, make_snapshots(make_info(expert)), make_info(expert))
    group.write_transform({"mean": np.zeros(3, np.float32)}, {})
    for expert in (3, 17):
        file = group.location / f"expert-{expert:05d}.arrow"
        file.write_atomic(file.read_bytes()[:-100])
    lock, at_work, most = threading.Lock(), 0, 0

    def slowly(method: str, path: str) -> None:
        nonlocal at_work, most
        if method == "HEAD":
            with lock:
                at_work += 1
                most = max(most, at_work)
            time.sleep(0.05)
            with lock:
                at_work -= 1

    s3_proxy.plan, s3_proxy.lock = slowly, nullcontext()
    assert_one_line(datm_ray("store", "verify", f"s3://{bucket}/store"), "2 of the files in")
    assert 4 <= most <= 8


def test_a_server_that_fails_every_fifth_request_is_tolerated(bucket, s3_proxy):
    """All is written once and read as written, whether a server answers 503 or drops requests or answers."""
    s3_proxy.plan = every_fifth(seed=0)
    group = group_of(bucket)
    for expert in range(8):
        info = make_info(expert)
        assert group.write_expert(expert, make_snapshots(info), info)
        assert not group.write_expert(expert, make_snapshots(info, seed=1), info)
    assert group.experts() == list(range(8))
    for expert in range(8):
        for expected in make_snapshots(make_info(expert)):
            assert_same(group.read_snapshot(expert, expected.epoch), expected)
    assert set(s3_proxy.faults) == set(FAULTS)


@pytest.mark.slow
def test_a_run_over_a_failing_server_completes(bucket, s3_proxy, datm_ray, tmp_path):
    """A run on S3 whose every fifth request fails exits with code 0, and every expert is whole."""
    s3_proxy.plan = every_fifth(seed=1)
    config = tiny_config("distill.iterations=4", "distill.validate_every=4", "evaluate.seeds=1")
    (tmp_path / "tiny.yaml").write_text(to_yaml(config))
    out = f"s3://{bucket}/runs"
    code, _, err = datm_ray("run", str(tmp_path / "tiny.yaml"), "--executor", "serial", "--out", out)
    assert code == 0, err
    assert {"report.html", "tiny"} <= set(open_location(out).list())
    (key,) = TrajectoryStore(f"{out}/experts").groups()
    group = TrajectoryStore(f"{out}/experts").group(key.dataset, key.architecture, key.fingerprint)
    assert [group.verify(expert).expert for expert in group.experts()] == [0, 1]
    assert set(s3_proxy.faults) == set(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("replace_", [True, False])
def test_an_upload_that_fails_once_is_sent_again(bucket, s3_proxy, fault, replace_):
    """An upload whose answer was lost is recognised as its own, not as another writer's."""
    s3_proxy.plan = first("PUT", fault)
    file = open_location(f"s3://{bucket}/file")
    with file.create(replace=replace_) as draft:
        draft.write(b"content")
    assert s3_proxy.faults == {fault: 1}
    assert file.read_bytes() == b"content"


@pytest.mark.parametrize("content", [b"another", b"content"])
def test_a_lost_answer_does_not_hide_that_another_writer_came_first(bucket, s3_proxy, content):
    """After a lost answer a writer's mark, not the content, says who wrote first."""
    file = open_location(f"s3://{bucket}/file")

    def overtaken() -> None:
        with file.create(replace=False) as draft:
            draft.write(b"content")
            file.write_atomic(content)
            s3_proxy.plan = first("PUT", LOST_ANSWER)

    with pytest.raises(AlreadyExistsError):
        overtaken()
    assert s3_proxy.faults == {LOST_ANSWER: 1}
    assert file.read_bytes() == content


@pytest.mark.parametrize("fault", FAULTS)
def test_an_upload_in_parts_is_whole_or_absent(bucket, s3_proxy, fault, monkeypatch):
    """A file too large for one upload is completed once, also where the answer to that is lost."""
    monkeypatch.setattr("datm_ray.store.files.s3.LARGEST_PUT", 2**20)
    file = open_location(f"s3://{bucket}/file")
    put_file = file.fs.put_file
    monkeypatch.setattr(file.fs, "put_file", lambda *given, **named: put_file(*given, chunksize=5 * 2**20, **named))
    content = np.random.default_rng(0).bytes(10 * 2**20 + 5)

    def at_the_end(method: str, path: str) -> str | None:
        return fault if method == "POST" and "uploadId" in path and not s3_proxy.faults else None

    s3_proxy.plan = at_the_end
    with file.create(replace=False) as draft:
        draft.write(content)
    assert s3_proxy.faults == {fault: 1}
    assert file.read_bytes() == content
    with pytest.raises(AlreadyExistsError), file.create(replace=False) as draft:
        draft.write(bytes(len(content)))
    assert file.read_bytes() == content


def test_a_read_that_breaks_off_is_repeated(bucket, s3_proxy):
    """A read that fails in the middle is repeated."""
    group = group_of(bucket)
    info = replace(make_info(), parameter_names=("w",), parameter_shapes=((50_000,),))  # too large for one read
    snapshots = make_snapshots(info)
    group.write_expert(0, snapshots, info)
    group.read_info(0)
    for fault in (BUSY, LOST_REQUEST):
        s3_proxy.plan = first("GET", fault)
        assert_same(group.read_snapshot(0, 4), snapshots[2])
    assert s3_proxy.faults == {BUSY: 1, LOST_REQUEST: 1}


def commands(uri: str) -> Iterator[list[str]]:
    yield ["store", "ls", uri]
    yield ["experts", "digits-ipc1", "--executor", "serial", "--store", uri]


def test_a_wrong_bucket_is_one_line(bucket, datm_ray):
    """A missing bucket is one line of error for listing and for training."""
    for command in commands(f"s3://no-{bucket}/store"):
        assert_one_line(datm_ray(*command), "The bucket does not exist. Check its spelling")


def test_no_network_is_one_line(s3_environment, datm_ray, monkeypatch):
    """A server that does not answer is one line of error after the number of attempts set for botocore."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, so that nobody listens there
        s3_environment(f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        for command in commands("s3://bucket/store"):
            words = "The server does not answer (Could not connect to the endpoint URL"
            assert_one_line(datm_ray(*command), words, code=1)


def test_missing_credentials_are_one_line(bucket, datm_ray, monkeypatch):
    """Missing credentials are one line that names the variables; no request is sent."""
    monkeypatch.setattr("datm_ray.store.files.patience._rights_are_there", False)  # as in a command of its own
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for command in commands(f"s3://{bucket}/store"):
        assert_one_line(datm_ray(*command), "No credentials were found. Set AWS_ACCESS_KEY_ID")


def test_wrong_credentials_are_one_line(bucket, datm_ray, monkeypatch):
    """Denied access is one line of error, not an empty store."""
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0.0)  # from now on moto checks credentials
    for command in commands(f"s3://{bucket}/store"):
        assert_one_line(datm_ray(*command), "The server does not know this access key. Check AWS_ACCESS_KEY_ID")


def test_a_key_is_a_key_whatever_it_looks_like(bucket):
    """A key is listed, found and read under its name; no character in it is syntax."""
    names = ["a b", "a=b", "[x]", "a*?", "a%20b", "a#b", "a?b", "a+b", "{a}", "é", "😀", "<b>", "a&b;c", "~", "-x"]
    for name in names:
        place = open_location(f"s3://{bucket}/{name}") / "file"
        place.write_text(name)
        assert (place.exists(), place.size()) == (True, len(name.encode())), name
        assert open_location(place.uri).read_bytes().decode() == name
        assert bytes(place.read_ranges([(0, 1)])[0]) == name.encode()[:1]
        assert place.parent.list() == ["file"], name
    assert open_location(f"s3://{bucket}").list() == sorted(names)
    for name in names:
        (open_location(f"s3://{bucket}/{name}") / "file").remove()
    assert open_location(f"s3://{bucket}").list() == []


@pytest.mark.parametrize(
    "name", ["a?versionId=1", "a?versionId=1/b", "../b", "a/../b", "./a", "a//b", "a\nb", "caf\udce9"]
)
def test_a_key_that_would_lead_elsewhere_is_refused_or_taken(name, bucket):
    """A key that s3fs or a server would change is a StoreError, and writes nothing."""
    try:
        place = open_location(f"s3://{bucket}/{name}")
        place.write_text("content")
    except StoreError:
        assert open_location(f"s3://{bucket}").list() == []
    else:
        found = [path.removeprefix(f"{bucket}/") for path in place.fs.find(bucket)]
        assert found == [name], found
