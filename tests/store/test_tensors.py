"""Tests tensor files: named arrays and metadata in one file."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from datm_ray.errors import CorruptFileError, StoreError
from datm_ray.store import tensors
from datm_ray.store.files.filesystem import AlreadyExistsError, Location, open_location
from datm_ray.store.sealed import SealedWriter
from datm_ray.store.tensors import DTYPES, read_tensors, write_tensors

ARRAYS = {
    "images": np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32),
    "labels": np.array([[1.5, -np.inf], [np.nan, 0.0]]),
    "counts": np.array([2**40, -1], np.int64),
    "step": np.array(7, np.int32),
    "nothing": np.zeros((0, 3), np.uint8),
}


@pytest.fixture(params=["local", "memory"])
def location(request: pytest.FixtureRequest, tmp_path) -> Location:
    root = str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    return open_location(root) / "set.arrow"


PAGE = (Path(__file__).parents[2] / "docs/store.md").read_text().partition("## Other files")[2]
SAMPLES = Path(__file__).parent / "samples"


def test_the_documented_code_reads_a_file_without_datm_ray(tmp_path, monkeypatch):
    """Code with pyarrow alone gives the arrays and metadata of a tensor file, from scalars to empty arrays."""
    write_tensors(open_location(str(tmp_path / "synthetic.arrow")), ARRAYS, kind="any", metadata={"class_names": ["a"]})
    monkeypatch.chdir(tmp_path)
    code = PAGE.partition("```python\n")[2].partition("```")[0]
    assert "datm_ray" not in code
    names = {}
    exec(code, names)
    assert names["about"] == {"class_names": ["a"]}
    assert names["arrays"].keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(names["arrays"][name], array, strict=True)


@pytest.mark.parametrize(
    "sample", ["v2/digits/ConvNetD2/5f2a9c/expert-00000.arrow", "labels-v1/labels.arrow", "labels-v1/epoch-00000.arrow"]
)
def test_documented_columns_and_versions_are_those_of_the_files(sample):
    """The row of a file in docs/store.md has its format and version, and names all its columns."""
    with pa.OSFile(str(SAMPLES / sample)) as source:
        schema = pa.ipc.open_file(source).schema
    found = schema.metadata[b"format"].decode(), schema.metadata[b"format_version"].decode()
    (row,) = (line for line in PAGE.splitlines() if re.match(rf"\|.*{Path(sample).name}` \|", line))
    assert "| `{}`, {} |".format(*found) in row
    named = PAGE if found[0] == tensors.FORMAT else row
    assert {f"`{name}`" for name in schema.names} <= set(re.findall(r"`\w+`", named))


def write_raw(location: Location, names: list[str], announced: list[str], version: int = 1) -> None:
    """Write a sealed tensor file with faulty content, as a faulty or newer program might."""
    with location.create() as file:
        header = {"kind": "checkpoint", "metadata": "{}"}
        writer = SealedWriter(file, tensors._SCHEMA, format_name=tensors.FORMAT, format_version=version, header=header)
        for name in names:
            writer.write(tensors._batch(name, np.zeros(2)))
        writer.close({"names": announced})


def test_arrays_come_back_to_the_last_bit(location):
    """Names, order, types, shapes and bytes of arrays are kept, from scalars to empty arrays."""
    write_tensors(location, ARRAYS, kind="checkpoint", metadata={"step": 3, "ipc": [1, 10]})
    found = read_tensors(location, kind="checkpoint")
    assert (found.kind, found.metadata) == ("checkpoint", {"step": 3, "ipc": [1, 10]})
    assert list(found.arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert (found.arrays[name].dtype, found.arrays[name].shape) == (array.dtype, array.shape)
        assert found.arrays[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_supported_dtype_comes_back(location, dtype):
    """Every supported dtype is kept, and the arrays belong to the caller."""
    array = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    write_tensors(location, {"a": array}, kind="checkpoint", metadata={})
    found = read_tensors(location, kind="checkpoint").arrays["a"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    found[:] = 0


def test_layout_and_byte_order_of_the_input_do_not_matter(location):
    """Transposed, strided and big-endian arrays are read with their values."""
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {"t": array.T, "strided": array[::2, ::3], "big": array.astype(">f4")}
    write_tensors(location, arrays, kind="checkpoint", metadata={})
    for name, found in read_tensors(location, kind="checkpoint").arrays.items():
        np.testing.assert_array_equal(found, arrays[name])


def test_no_arrays_are_an_empty_file(location):
    """A file of metadata without arrays is valid."""
    write_tensors(location, {}, kind="checkpoint", metadata={"a": None})
    assert read_tensors(location, kind="checkpoint").arrays == {}


def test_the_same_input_gives_the_same_bytes(location):
    """Equal input gives equal bytes, whatever the time and the order of metadata keys."""
    write_tensors(location, ARRAYS, kind="checkpoint", metadata={"a": 1, "b": 2})
    content = location.read_bytes()
    write_tensors(location, ARRAYS, kind="checkpoint", metadata={"b": 2, "a": 1})
    assert location.read_bytes() == content


def test_any_arrow_program_can_read_the_file(location):
    """A tensor file is an ordinary Arrow IPC file with one row per array."""
    write_tensors(location, ARRAYS, kind="checkpoint", metadata={})
    table = pa.ipc.open_file(pa.BufferReader(location.read_bytes())).read_all()
    assert table.column("name").to_pylist() == list(ARRAYS)
    assert table.column("data")[0].as_py() == ARRAYS["images"].tobytes()
    assert table.schema.metadata[b"format"] == b"datm_ray.tensors"


def test_a_file_is_replaced_whole_or_kept_on_demand(location):
    """Writing again replaces the file, or keeps it if it is written once."""
    write_tensors(location, {"a": np.zeros(1)}, kind="checkpoint", metadata={})
    write_tensors(location, {"a": np.ones(1)}, kind="checkpoint", metadata={})
    with pytest.raises(AlreadyExistsError, match=r"set\.arrow exists already"):
        write_tensors(location, {"a": np.full(1, 2.0)}, kind="checkpoint", metadata={}, replace=False)
    assert read_tensors(location, kind="checkpoint").arrays["a"] == [1.0]


@pytest.mark.parametrize("array", [np.array(["text"]), np.array([{}], object), np.zeros(1, np.complex64)])
def test_other_dtypes_are_refused(location, array):
    """Dtypes that cannot be read back, or only by executing code, are refused."""
    with pytest.raises(TypeError, match='array "a" has dtype'):
        write_tensors(location, {"a": array}, kind="checkpoint", metadata={})
    assert not location.exists()


def test_metadata_must_be_json(location):
    """An object that JSON cannot hold is refused before anything is written."""
    with pytest.raises(TypeError):
        write_tensors(location, {}, kind="checkpoint", metadata={"a": object()})
    assert not location.exists()


def test_another_kind_is_refused(location):
    """A file of another kind, such as a checkpoint for a synthetic set, is refused."""
    write_tensors(location, ARRAYS, kind="checkpoint", metadata={})
    with pytest.raises(CorruptFileError, match=r'set\.arrow is a "checkpoint", not a "synthetic-set"'):
        read_tensors(location, kind="synthetic-set")


def test_a_missing_file_is_a_store_error(location):
    """A missing file is a StoreError, distinct from a damaged one."""
    with pytest.raises(StoreError, match=r"set\.arrow.* does not exist"):
        read_tensors(location, kind="checkpoint")


@pytest.mark.parametrize("content", [b"", b"x", b"ARROW1", b"\x89PNG\r\n" * 40, bytes(5000)])
def test_a_file_of_another_program_is_refused(location, content):
    """A file that is no tensor file is an error with its name, however short."""
    location.write_atomic(content)
    with pytest.raises(CorruptFileError, match=r"set\.arrow has no seal"):
        read_tensors(location, kind="checkpoint")


def test_a_plain_arrow_file_is_refused(location):
    """An Arrow file without a seal is refused."""
    with location.create() as file, pa.ipc.new_file(file, tensors._SCHEMA) as writer:
        writer.write_batch(tensors._batch("a", np.zeros(2)))
    with pytest.raises(CorruptFileError, match="was not written by datm_ray"):
        read_tensors(location, kind="checkpoint")


def test_a_newer_format_is_refused(location):
    """A file of a newer format is an error that says so."""
    write_raw(location, ["a"], ["a"], version=2)
    with pytest.raises(CorruptFileError, match=r"has version 2 .* up to 1\. .* newer release\. Upgrade"):
        read_tensors(location, kind="checkpoint")


@pytest.mark.parametrize("names", [["a"], ["a", "b", "b"], ["b", "a"], ["a", "b", "c"]])
def test_missing_and_repeated_arrays_are_noticed(location, names):
    """A missing or repeated array is an error."""
    write_raw(location, names, announced=["a", "b"])
    with pytest.raises(CorruptFileError, match="not those it announces"):
        read_tensors(location, kind="checkpoint")
