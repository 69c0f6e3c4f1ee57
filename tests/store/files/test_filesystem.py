"""Tests places: URIs, atomic writes, leftovers, and error messages."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import pickle
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext

import pytest
from fsspec.implementations.local import LocalFileSystem

from datm_ray.errors import ClusterError, CorruptFileError, RunDirectoryError, StoreError, TransientStoreError
from datm_ray.store.files.filesystem import AlreadyExistsError, Location, open_location, require_shared, seconds_to_look


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path) -> Location:
    root = str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    return open_location(root) / "runs"


@pytest.fixture
def local(tmp_path) -> Location:
    return open_location(str(tmp_path))


def test_a_file_comes_back(folder):
    """Bytes, text and JSON are read as written, and missing folders are made."""
    (folder / "a" / "bytes").write_atomic(b"\x00\xff")
    (folder / "text").write_text("größer\n")
    (folder / "state.json").write_json({"step": 3, "losses": [0.5, None]})
    assert (folder / "a" / "bytes").read_bytes() == b"\x00\xff"
    assert (folder / "text").read_bytes().decode() == "größer\n"
    assert (folder / "state.json").read_json() == {"step": 3, "losses": [0.5, None]}
    assert folder.list() == ["a", "state.json", "text"]


def test_existence_and_size_are_known(folder):
    """A file exists from its writing to its removal, a folder as long as it has content."""
    file = folder / "file"
    assert not file.exists()
    file.write_atomic(b"12345")
    assert (file.exists(), folder.exists(), file.size()) == (True, True, 5)
    assert not (file / "below").exists()
    file.remove()
    assert not file.exists()


class Mount:
    """Network disk whose client believes that a file is missing until it reads the first folder that exists above."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unknown = set[str]()
        info, ls, scandir = LocalFileSystem.info, LocalFileSystem.ls, os.scandir

        def scan(folder):
            self.look(folder)
            self.unknown = {path for path in self.unknown if os.path.dirname(path) != folder}
            return scandir(folder)

        def wrapped(call):
            return lambda fs, path, **options: (self.look(path), call(fs, path, **options))[1]

        monkeypatch.setattr(os, "scandir", scan)
        monkeypatch.setattr(os.path, "lexists", lambda path: not self.is_unknown(path))
        monkeypatch.setattr(LocalFileSystem, "info", wrapped(info))
        monkeypatch.setattr(LocalFileSystem, "ls", wrapped(ls))

    def is_unknown(self, path) -> bool:
        """True for what the client believes to be missing, and for all below it."""
        return any(f"{path}/".startswith(f"{unknown}/") for unknown in self.unknown)

    def look(self, path) -> None:
        """Raise an error for what is unknown."""
        if self.is_unknown(path):
            raise FileNotFoundError(path)


def test_a_missing_file_is_looked_up_afresh(local, monkeypatch):
    """A file or folder that the client of a shared disk remembers as missing is found, also in a new folder."""
    mount = Mount(monkeypatch)
    new, file = local / "new", local / "new" / "runs" / "file"
    file.write_atomic(b"12345")
    for unknown in (file, file.parent, new):
        mount.unknown = {unknown.path}
        assert file.exists()
        assert mount.unknown == set()
        mount.unknown = {unknown.path} - {file.path}
        assert file.parent.list() == ["file"]
    assert not (local / "other" / "runs" / "file").exists()
    assert not (file / "below" / "below").exists()


def test_what_appears_late_is_waited_for(monkeypatch):
    """A condition is checked every second until it holds, and once more at the end of the time."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for after, seconds, found, waited in ((0, 0, True, 0), (1, 0, False, 0), (3, 3, True, 3), (4, 3, False, 3)):
        calls = iter(range(after + 1))
        slept.clear()
        with nullcontext() if found else pytest.raises(ClusterError, match="not there"):
            require_shared(lambda after=after, calls=calls: next(calls) == after, seconds, "not there")
        assert slept == [1.0] * waited


def test_a_look_for_files_of_other_machines_is_short(local):
    """A worker looks for at most a minute, a third of its own time limit, and once where files appear at once."""
    assert [seconds_to_look(local, limit) for limit in (3600.0, 90.0, 2.0)] == [60, 30, 0]
    assert seconds_to_look(open_location("memory://a/b"), 3600.0) == 0


def test_listing_what_is_not_a_folder_is_empty(folder):
    """Listing a missing folder or a file gives nothing."""
    (folder / "file").write_atomic(b"")
    assert (folder / "file").list() == []
    assert (folder / "missing").list() == []


def test_ranges_are_read_in_order(folder):
    """Ranges of bytes may overlap, and end where the file ends."""
    (folder / "file").write_atomic(b"0123456789")
    found = (folder / "file").read_ranges([(5, 8), (0, 1), (7, 99)])
    assert [bytes(part) for part in found] == [b"567", b"0", b"789"]
    (folder / "empty").write_atomic(b"")
    assert [bytes(part) for part in (folder / "empty").read_ranges([(0, 9)])] == [b""]


def test_a_file_appears_only_when_it_is_complete(folder):
    """Until the writing block ends, the old content is there and no other name is listed."""
    file = folder / "file"
    file.write_atomic(b"old")
    with file.create() as draft:
        draft.write(b"new")
        assert file.read_bytes() == b"old"
        assert folder.list() == ["file"]
    assert file.read_bytes() == b"new"


def test_an_error_while_writing_leaves_the_old_file(folder):
    """An error while writing passes through unchanged and leaves the old file alone."""
    file = folder / "file"
    file.write_atomic(b"old")
    with pytest.raises(ZeroDivisionError), file.create() as draft:
        draft.write(b"new" * (1 // 0))
    assert file.read_bytes() == b"old"
    if folder.local_path:
        assert os.listdir(folder.local_path) == ["file"]


def test_a_file_written_once_stays(folder):
    """With replace=False the first file stays, and the second writer gets an AlreadyExistsError."""
    file = folder / "file"
    with file.create(replace=False) as draft:
        draft.write(b"first")
    with pytest.raises(AlreadyExistsError, match=r"/file exists already\.$"), file.create(replace=False) as draft:
        draft.write(b"second")
    assert file.read_bytes() == b"first"
    assert folder.list() == ["file"]


def test_writing_once_needs_no_hard_links(local, monkeypatch):
    """The first file stays on filesystems without hard links too."""
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    with (local / "file").create(replace=False) as draft:
        draft.write(b"first")
    with pytest.raises(AlreadyExistsError), (local / "file").create(replace=False) as draft:
        draft.write(b"second")
    assert os.listdir(local.path) == ["file"]
    assert (local / "file").read_bytes() == b"first"


def failing(code: int) -> Callable[..., None]:
    """A system call that fails with an errno."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("call", ["os.fsync", "os.link", "fcntl.flock", "mmap.mmap"])
def test_a_safeguard_that_a_file_system_lacks_is_passed_over(local, monkeypatch, call, code):
    """Files are written and read on file systems that cannot flush, link, lock or map."""
    monkeypatch.setattr(call, failing(code))
    for replace in (False, True):
        with (local / "file").create(replace=replace) as draft:
            draft.write(b"content")
        assert [bytes(part) for part in (local / "file").read_ranges([(1, 3)])] == [b"on"]
    with pytest.raises(AlreadyExistsError), (local / "file").create(replace=False) as draft:
        draft.write(b"another")
    assert (local / "file").read_bytes() == b"content"
    assert os.listdir(local.path) == ["file"]


@pytest.mark.parametrize(
    ("call", "code"), [("os.fsync", errno.EIO), ("os.fsync", errno.ENOSPC), ("os.link", errno.EIO)]
)
def test_an_error_of_the_device_is_not_passed_over(local, monkeypatch, call, code):
    """An I/O error of the device is raised and leaves no temporary file."""
    monkeypatch.setattr(call, failing(code))
    with pytest.raises(StoreError, match=os.strerror(code)), (local / "file").create(replace=False) as draft:
        draft.write(b"content")
    assert not [name for name in os.listdir(local.path) if name.startswith(".tmp-")]


def test_files_without_a_count_of_names_are_written(local, monkeypatch):
    """Files are written where a file system reports a link count of 0."""
    fstat = os.fstat

    def without_names(descriptor: int) -> os.stat_result:
        fields = list(fstat(descriptor))
        fields[3] = 0
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", without_names)
    (local / "file").write_text("content")
    assert os.listdir(local.path) == ["file"]


def test_a_second_name_copies_no_bytes(local):
    """A second name on a local disk copies no bytes, unless it is taken; either can be deleted."""
    (local / "a").write_text("one")
    assert (local / "new" / "b").link(local / "a")
    (local / "a").remove()
    assert (local / "new" / "b").read_bytes() == b"one"
    (local / "c").write_text("three")
    assert not (local / "c").link(local / "new" / "b")
    assert not (local / "d").link(local / "absent")
    assert not (open_location("memory://x") / "b").link(local / "c")
    assert (local / "c").read_bytes() == b"three"


@pytest.mark.parametrize("uri", ["/tmp/a", "file:///tmp/a", "memory://bucket/a", "s3://bucket/a"])
def test_a_place_has_a_parent(uri):
    """A place's parent is the folder around it, up to the root or the bucket."""
    place = open_location(uri)
    assert (place / "b" / "c").parent.parent == place
    top = place.parent.parent.parent
    assert top.parent == top
    assert (top / "x").parent.path.rstrip("/") == top.path.rstrip("/")


def test_leftovers_of_dead_writers_are_removed(local):
    """A temporary file without a writer is removed; one in use stays, and neither is listed."""
    host = socket.gethostname()
    (local / f".tmp-{host}-1-file").write_atomic(b"half")
    with (local / "file").create() as draft:
        draft.write(b"whole")
        assert local.remove_leftovers() == [f".tmp-{host}-1-file"]
        assert local.list() == []
    assert os.listdir(local.path) == ["file"]
    assert (local / "missing").remove_leftovers() == []


def test_leftovers_of_other_machines_are_removed_when_old(local):
    """Leftovers of other machines, whose locks may be invisible, are removed after a day."""
    name = ".tmp-elsewhere-1-file"
    (local / name).write_atomic(b"half")
    assert local.remove_leftovers() == []
    yesterday = time.time() - 25 * 3600
    os.utime(os.path.join(local.path, name), (yesterday, yesterday))
    assert local.remove_leftovers() == [name]


def test_a_draft_removed_before_its_lock_is_started_anew(local, monkeypatch):
    """A draft removed between its creation and its lock is started anew."""
    flock = fcntl.flock
    stolen = []

    def after_a_cleaner(descriptor, operation):
        if not stolen:
            stolen.extend(os.listdir(local.path))
            os.unlink(os.path.join(local.path, stolen[0]))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", after_a_cleaner)
    (local / "file").write_atomic(b"whole")
    assert stolen[0].startswith(".tmp-")
    assert os.listdir(local.path) == ["file"]


@pytest.mark.parametrize("times", [1, 3])
def test_a_folder_that_another_command_removes_is_made_again(local, monkeypatch, times):
    """A command that ends removes its empty folders; what another one writes there at that moment is written."""
    make, folder = os.makedirs, local / "run" / "part"
    removed = iter(range(times))

    def made(path, **options):
        make(path, **options)
        if next(removed, None) is not None:
            os.rmdir(path)

    monkeypatch.setattr(os, "makedirs", made)
    (folder / "file").write_atomic(b"whole")
    assert (folder / "file").read_bytes() == b"whole"
    removed = iter(range(times))
    with (local / "another").locked(lambda: None):
        assert os.path.isdir((local / "another").local_path)
    removed = iter(range(100))
    with pytest.raises(StoreError, match="does not exist"):
        (local / "third" / "file").write_atomic(b"")


def test_a_range_that_cannot_be_read_has_the_cause_of_its_own_error(monkeypatch):
    """A failed range names its cause, also where fsspec returns the error in place of bytes."""
    location = open_location("memory://ranges/file")
    monkeypatch.setattr(location.fs, "cat_ranges", lambda *_, **__: [b"1", FileNotFoundError("file")])
    with pytest.raises(StoreError, match=r"Cannot read .*does not exist"):
        location.read_ranges([(0, 1), (1, 2)])


def test_nothing_is_left_over_elsewhere(folder):
    """Places without temporary files have no leftovers to remove."""
    (folder / "file").write_atomic(b"")
    assert folder.remove_leftovers() == []


def test_a_location_survives_pickling(folder):
    """A pickled location is equal and works."""
    (folder / "file").write_atomic(b"content")
    assert pickle.loads(pickle.dumps(folder / "file")) == folder / "file"
    assert pickle.loads(pickle.dumps(folder / "file")).read_bytes() == b"content"


def test_paths_become_absolute(tmp_path, monkeypatch):
    """A relative path is made absolute, so that it is the same in another folder or process."""
    monkeypatch.chdir(tmp_path)
    location = open_location("store") / "file"
    assert location.uri == location.path == location.local_path == str(tmp_path / "store" / "file")


def test_only_local_files_have_a_local_path():
    """Only local files have a local path, which readers map."""
    assert open_location("file:///a/b").local_path == "/a/b"
    assert open_location("memory://a/b").local_path is None


def test_a_missing_file_is_explained(folder):
    """Reading or deleting a missing file is one line with its name."""
    for action in (Location.read_bytes, Location.size, Location.read_json, Location.remove):
        with pytest.raises(StoreError, match=r"^Cannot (read|delete) .*/missing\. .*does not exist\. Check"):
            action(folder / "missing")
    with pytest.raises(StoreError, match="does not exist"):
        (folder / "missing").read_ranges([(0, 1)])


def test_invalid_json_is_explained(folder):
    """Invalid JSON is an error of a damaged file, with its name."""
    (folder / "state.json").write_text('{"step": ')
    with pytest.raises(CorruptFileError, match=r"state\.json is not valid JSON"):
        (folder / "state.json").read_json()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_an_unwritable_folder_is_explained(local):
    """An unwritable folder is an error with its name and what to check."""
    os.chmod(local.path, 0o500)
    with pytest.raises(StoreError, match=r"^Cannot write .*Access is denied.* Check the owner"):
        (local / "file").write_atomic(b"")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Access is denied (Permission denied). Check"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. Free some space"),
        (type("NoCredentialsError", (Exception,), {})("boto"), "No credentials were found. Set AWS_ACCESS"),
        (RuntimeError("No route to\n http://me:secret@host/x"), "No route to http://host/x."),
        (TimeoutError(), "TimeoutError."),
    ],
)
def test_failures_are_explained_in_one_line(local, error, words):
    """Any exception of a filesystem becomes a StoreError with fact, cause and remedy, and without secrets."""
    with pytest.raises(StoreError) as caught, (local / "file").explaining("write"):
        raise error
    assert str(caught.value).startswith(f"Cannot write {local.path}/file. {words}")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_error_says_whether_another_attempt_may_help(local, monkeypatch):
    """A broken or full disk is one machine's, so another attempt may help; a forbidden place stays forbidden."""
    for code in (errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EACCES):
        monkeypatch.setattr(os, "replace", failing(code))
        with pytest.raises(StoreError) as caught:
            (local / "file").write_text("x")
        assert isinstance(caught.value, TransientStoreError) == (code != errno.EACCES), os.strerror(code)


def test_a_guard_is_asked_immediately_before_a_file_gets_its_name(folder):
    """A guard's error leaves the file as it was, also below the guarded folder."""
    place = folder / "file"
    place.write_text("old")

    def refuse() -> None:
        raise RunDirectoryError("not yours")

    guarded = dataclasses.replace(folder, guard=refuse)
    for replaces in (True, False):
        with pytest.raises(RunDirectoryError), (guarded / "file").create(replace=replaces) as draft:
            draft.write(b"new")
    assert place.read_bytes() == b"old"


def test_a_full_disk_is_explained():
    """A full disk while writing is a StoreError."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    full = open_location("/dev/full")
    explained = pytest.raises(StoreError, match="No space left")
    with open("/dev/full", "wb", buffering=0) as file, explained, full.explaining("write"):
        file.write(b"x")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("foo://x", r"^Cannot open foo://x\..* Use a local path or an s3://"),
        ("gs://bucket", r"^Cannot open gs://bucket\. A Python package is missing: .*gcsfs"),
        ("", "is empty"),  # not the current folder
    ],
)
def test_what_cannot_be_opened_is_explained(uri, message):
    """An unknown scheme, a missing package and an empty name are errors of their own."""
    with pytest.raises(StoreError, match=message):
        open_location(uri)


@pytest.mark.parametrize("uri", ["s3://key:secret@bucket/x", "foo://me:secret@host/x", "s3://secret@bucket"])
def test_credentials_are_never_shown(uri):
    """Credentials in a URI appear neither in the message nor in the fields of the error."""
    with pytest.raises(StoreError) as caught:
        open_location(uri)
    assert "secret" not in str(caught.value) + repr(caught.value)


def test_credentials_in_s3_uris_are_refused():
    """Credentials in an S3 URI are refused, because they would be read as part of the bucket's name."""
    with pytest.raises(StoreError, match=r"URI s3://bucket/x carries credentials.* Set AWS_ACCESS_KEY_ID"):
        open_location("s3://key:secret@bucket/x")
    for uri in ("s3://key:with/slash@bucket/x", "s3://key:with@sign@bucket/x", "s3://key@bucket/x"):
        with pytest.raises(StoreError, match=r"URI s3://bucket/x carries") as caught:
            open_location(uri)
        assert "with" not in str(caught.value)
    assert open_location("s3://bucket/a:b@c").path == "bucket/a:b@c"


def test_a_path_is_a_path_whatever_it_looks_like(tmp_path, monkeypatch):
    """A path is read as it stands, and its shown form opens the same file; no character is syntax."""
    monkeypatch.chdir(tmp_path)
    names = [
        "a::b",
        "runs::x",
        "local:x",
        "data:x",
        "a=b",
        " a ",
        "a\nb",
        "[x]",
        "a*?",
        "~nobody-of-this-name",
        "C:\\x",
    ]
    names += ["a%20b", "a#b", "-x", "caf\udce9", "./s3:x", "./s3://x", "{a}", "$HOME", "a?versionId=1"]
    for name in names:
        place = open_location(name) / "file"
        place.write_text(name.encode(errors="replace").decode())
        assert (tmp_path / name / "file").is_file(), name
        assert open_location(place.uri).read_bytes() == name.encode(errors="replace")
        assert open_location(name).list() == ["file"]
    assert {path.name for path in tmp_path.iterdir()} == {name.removeprefix("./").split("/")[0] for name in names}


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3:x", "Write s3://x, or ./s3:x for a local path"),
        ("s3:/bucket/x", "Write s3://bucket/x, or"),
        ("S3://bucket/x", "Write s3://bucket/x, or"),
        ("s3::x", "Write s3://x, or"),
        ("file:/x", "Write file:///x, or"),
        ("file://runs/x", "write file:///folder"),
        ("s3://bucket/a::b", "stands between filesystems"),
        ("file:///tmp/a::b", "stands between filesystems"),
        ("memory://a::b", "stands between filesystems"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(uri, expected):
    """An ambiguous path is refused before anything is written, with how to write either meaning."""
    with pytest.raises(StoreError) as caught:
        open_location(uri)
    assert expected.lower() in str(caught.value).lower()
