"""Read lists of tensors, nested to any depth, from files that `torch.save` wrote, as plain data.

torch.load trusts the sizes and classes in a file: 1.3 KB can ask for a tensor of 4 TB, or call a class that takes 8 GB.
This module reads the pickle opcode by opcode, and accepts only the opcodes of lists of tensors. It calls and executes
nothing. No tensor may use a value of its storage twice, and all storages together are no larger than the
file. The archive's checksums are checked.

The arguments of a call in a pickle are checked by their types before anything else: 300 bytes can hold a tuple of
tuples that would take hours to print, hash or compare.

Not covered: dictionaries, sparse and quantised tensors, and files from before torch 1.6, which are no archives.
"""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from datm_ray.store.files.filesystem import Location
from datm_ray.store.precision import from_storage

Tensors = Any
"""Content of a file: an array, number or text, or lists and tuples of such, nested as in the file."""

_DTYPES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "BFloat16Storage": "<u2"}
_INTEGERS = {"LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "|i1"}
_INTEGERS |= {"ByteStorage": "|u1", "BoolStorage": "|u1"}
_PLAIN = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"}
_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None, "EMPTY_TUPLE": ()}
_MAX_DIMENSIONS = 8


@dataclass(frozen=True)
class _Global:
    """Class or function that a pickle names. It is never imported or called."""

    module: str
    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.module, str) or not isinstance(self.name, str):
            raise ValueError("the pickle names a class by something else than texts")


@dataclass(frozen=True)
class _Storage:
    """Values [count] of a torch storage: flat memory that several tensors may share.

    The class is separate from arrays, so that a damaged file cannot use a tensor as a storage.
    """

    values: NDArray[Any]


def read_torch_file(location: Location, *, integers: bool = False) -> Tensors:
    """Read a file that `torch.save` wrote. Returns its tensor, or its lists and tuples, nested as in the file.

    Tensors become read-only arrays. There may be numbers and texts beside them. A local file is memory-mapped.

    Args:
        location: the file.
        integers: True to accept tensors of integers and of Booleans (as 0 and 1) too; False for floats alone.

    Raises:
        StoreError: the file is missing or cannot be read.
        ValueError: the file holds anything else, such as a dictionary. A file that is no archive, or a damaged one,
            raises errors of other classes too.
    """
    (content,) = location.read_ranges([(0, location.size())])
    with zipfile.ZipFile(pa.BufferReader(pa.py_buffer(content))) as archive:
        return _Reader(archive, len(content), _DTYPES | (_INTEGERS if integers else {})).read()


class _Reader:
    """Reader of the zip archive of `torch.save`. Raises ValueError if its members have more bytes than the file."""

    def __init__(self, archive: zipfile.ZipFile, size: int, dtypes: Mapping[str, str]) -> None:
        self._archive, self._left, self._dtypes = archive, size, dtypes
        self._storages: dict[str, _Storage] = {}
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"the archive has {len(pickles)} pickles, not one")
        self._folder = pickles[0].removesuffix("data.pkl")

    def read(self) -> Tensors:
        if f"{self._folder}byteorder" in self._archive.NameToInfo and self._member("byteorder") != b"little":
            raise ValueError("the tensors are not little-endian")
        return self._follow(self._member("data.pkl"))

    def _member(self, name: str) -> bytes:
        info = self._archive.getinfo(self._folder + name)
        self._left -= info.file_size
        if self._left < 0 or info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"the member {name} is compressed, or larger than the file")
        return self._archive.read(info)

    def _follow(self, pickle: bytes) -> Tensors:
        """Make the value of a pickle from its opcodes. Nothing is executed; unknown opcodes raise ValueError."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}
        argument: Any

        def pop(count: int) -> list[Any]:
            if not 0 <= count <= len(stack):
                raise ValueError("the pickle takes more than it has made")
            taken = stack[len(stack) - count :]
            del stack[len(stack) - count :]
            return taken

        for operation, argument, _ in pickletools.genops(pickle):
            match operation.name:
                case "PROTO" | "FRAME":
                    pass
                case name if name in _PLAIN:
                    if isinstance(argument, int) and not -(2**63) <= argument < 2**63:
                        raise ValueError("the pickle has an integer of more than 64 bits")
                    stack.append(argument)
                case name if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                case "EMPTY_LIST":
                    stack.append([])
                case "MARK":
                    marks.append(len(stack))
                case "APPEND":
                    (item,) = pop(1)
                    _list(stack[-1]).append(item)
                case "APPENDS":
                    items = pop(len(stack) - marks.pop())
                    _list(stack[-1]).extend(items)
                case "TUPLE":
                    stack.append(tuple(pop(len(stack) - marks.pop())))
                case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                    stack.append(tuple(pop(int(name[-1]))))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(_Global(*argument.split(" ")))
                case "STACK_GLOBAL":
                    stack.append(_Global(*pop(2)))
                case "BINPERSID":
                    stack.append(self._storage(*pop(1)))
                case "REDUCE":
                    stack.append(_call(*pop(2)))
                case "STOP":
                    return stack.pop()
                case name:
                    raise ValueError(f"the pickle makes something else than lists of tensors ({name})")
        raise ValueError("the pickle has no end")

    def _storage(self, identifier: Any) -> _Storage:
        match identifier:
            case ("storage", _Global("torch", dtype), str(key), _, int(count)) if dtype in self._dtypes:
                pass
            case _:
                raise ValueError("a tensor is stored as something else than floats or, where asked for, integers")
        if key not in self._storages:
            values = np.frombuffer(self._member(f"data/{key}"), self._dtypes[dtype])
            self._storages[key] = _Storage(from_storage(values, "bfloat16") if dtype == "BFloat16Storage" else values)
        if self._storages[key].values.size != count:
            raise ValueError(f"a storage has {self._storages[key].values.size} values, not {count}")
        return self._storages[key]


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise ValueError("the pickle appends to something other than a list")
    return value


def _call(function: Any, arguments: Any) -> Any:
    """Value of one of the three calls that torch.save writes into a pickle, found without running code from the file.

    The calls give a tensor, a parameter's tensor, or `None` for an empty OrderedDict. Others raise ValueError.
    """
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise ValueError(f"the pickle calls a {type(function).__name__} with a {type(arguments).__name__}")
    match function:
        case _Global("torch._utils", "_rebuild_tensor_v2"):
            return _tensor(*arguments[:4])
        case _Global("torch._utils", "_rebuild_parameter"):
            return arguments[0]
        case _Global("collections", "OrderedDict") if not arguments:
            return None
    raise ValueError(f"the pickle calls {function}")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> NDArray[Any]:
    """Array that is a view of a storage. Offset and strides count values.

    Raises ValueError if the view reaches beyond the storage or uses a value twice.
    """
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise ValueError("a tensor has no storage or no shape")
    if not len(shape) == len(strides) <= _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    if not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
        raise ValueError("a tensor has sizes that are no numbers, or are negative")
    values = storage.values
    if 0 in shape:
        return np.zeros(shape, values.dtype)
    last = 0  # largest offset so far: strides above it reach no value twice, so the tensor has at most last + 1 values
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride <= last:
            raise ValueError(f"a tensor {list(shape)} of strides {list(strides)} has values twice")
        last += (size - 1) * stride
    if offset + last >= values.size:
        raise ValueError(f"a tensor {list(shape)} is larger than its storage of {values.size} values")
    steps = [stride * values.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(values[offset:], shape, steps, writeable=False)
