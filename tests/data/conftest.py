"""Fixtures that make small images and small Parquet files of every layout that the sources read."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datm_ray.data.sources import load_raw
from datm_ray.errors import DatasetError

Encode = Callable[..., bytes]
WriteParquet = Callable[..., Path]


def require_parquet(folder: Path, message: str) -> None:
    """Assert that a folder of Parquet files of three classes loads, or is refused with `message` unless it is ""."""
    if message:
        with pytest.raises(DatasetError, match=message):
            load_raw("parquet", str(folder))
    else:
        assert load_raw("parquet", str(folder)).classes == 3


@pytest.fixture
def encode() -> Encode:
    """encode(value, size=(w, h), mode="RGB", format="PNG") -> bytes of an image of one value."""

    def write(value: int, size: tuple[int, int] = (6, 4), mode: str = "RGB", format: str = "PNG") -> bytes:
        channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
        pixels = np.full((size[1], size[0], *channels), value, dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format=format)
        return file.getvalue()

    return write


@pytest.fixture
def header() -> Encode:
    """header(width, height) -> a PNG file of 45 bytes with that size and without pixels."""

    def write(width: int, height: int) -> bytes:
        chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
        packed = [struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in chunks]
        return b"\x89PNG\r\n\x1a\n" + b"".join(packed)

    return write


@pytest.fixture
def write_parquet(encode: Encode) -> WriteParquet:
    """write_parquet(path, labels, ...) -> path of a file whose i-th image has the value 10 * label + i % 10."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(
        path: Path,
        labels: Sequence[Any],
        *,
        columns: tuple[str, str] = ("image", "label"),
        class_names: Sequence[str] | None = None,
        images: Sequence[Any] | None = None,
    ) -> Path:
        if images is None:
            images = [{"bytes": encode(10 * int(x) + i % 10), "path": None} for i, x in enumerate(labels)]
        table = pa.table(dict(zip(columns, (images, list(labels)), strict=True)))
        if class_names is not None:
            features = {columns[1]: {"names": list(class_names), "_type": "ClassLabel"}}
            metadata = json.dumps({"info": {"features": features}})
            table = table.replace_schema_metadata({"huggingface": metadata})
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        return path

    return write


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    """Write files by name below a root, with the folders that they need. Returns the root."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root
