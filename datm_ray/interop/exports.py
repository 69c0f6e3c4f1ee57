"""Exports of synthetic sets: to one file that `datm_ray.load` reads from anywhere, or to files of other programs."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Container, Sequence
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from datm_ray.artifact import (
    CHECKSUM,
    KIND,
    OTHERS_IMAGES,
    SAFETENSORS,
    SYNTHETIC,
    Artifact,
    checksum,
    set_parts,
)
from datm_ray.errors import ConfigError, StoreError
from datm_ray.store.files.filesystem import Location
from datm_ray.store.tensors import dump_tensors
from datm_ray.words import listed

_LONGEST_FOLDER = 200  # longest name of a class's folder in bytes; file systems take 255


def export(artifact: Artifact, kind: str, out: Location) -> list[str]:
    """Write a synthetic set in one of the formats of `EXPORTS`. Returns the written files' paths relative to `out`.

    Args:
        artifact: the synthetic set.
        kind: "png" (one folder per class), "parquet" (Hugging Face layout, soft labels as probabilities), "pt" (the
            three files that DATM's evaluation script reads, soft labels as logits), "arrow" or "safetensors" (one file
            with everything, which `load` reads; the transform is included, unless the set leaves it out).
        out: folder to write to. Files of the same names are replaced.

    Raises:
        ConfigError: the kind does not exist, or PNG files of another set lie in `out`, so that two sets would be mixed.
            Folders that cannot be listed are not searched.
        StoreError: the set's transform is missing, or `out` cannot be written.
    """
    if kind not in EXPORTS:
        raise ConfigError(f"unknown export format {kind!r}", remedy=f"choose one of: {', '.join(EXPORTS)}")
    files = EXPORTS[kind](artifact)
    if kind == "png":
        _require_no_other_images(out, files)
    for name, data in files.items():
        (out / name).write_atomic(data)
    return list(files)


def _require_no_other_images(out: Location, names: Container[str]) -> None:
    """Raise a `ConfigError` if folders in `out` hold exported images that writing the files `names` would not replace.

    Images of an export are recognised by their file names, which are numbers. Folders that cannot be listed are
    skipped.
    """
    present = ((folder, name) for folder in _listed(out) for name in _listed(out / folder))
    found = (f"{folder}/{name}" for folder, name in present if re.fullmatch(r"\d{5,}\.png", name))
    other = next((path for path in found if path not in names), None)
    if other:
        raise ConfigError(
            f"{out.uri} holds images that are not of this set, such as {other}",
            "Another set was exported there, and the two would be mixed",
            "Give another --out, or delete these images",
        )


def _listed(folder: Location) -> Sequence[str]:
    """Sorted names in a folder; empty if it cannot be listed, for example with credentials that only allow writing."""
    with suppress(StoreError):
        return folder.list()
    return ()


def left_out(artifact: Artifact, kind: str) -> list[str]:
    """Sentences on what an export loses or changes; empty if nothing. `kind` is a key of `EXPORTS`, such as "png"."""
    lines = []
    if kind in ("png", "parquet") and (clipped := artifact.clipped_in_words()):
        lines.append(f"{clipped}; arrow, safetensors and pt keep them.")
    if kind == "png":
        lines.append(
            "PNG holds images and classes; soft labels and step size are in the .arrow file, and in --format pt."
        )
        renamed = [
            f"{name!r} is in {folder!r}"
            for name, folder in zip(artifact.class_names, class_folders(artifact.class_names), strict=True)
            if name != folder
        ]
        if renamed:
            lines.append(f"Folders with other names than their classes: {listed(renamed, 3)}.")
    if kind == "parquet":
        lines.append("Parquet holds images, classes and soft labels; the step size is in the .arrow file.")
    if kind == "pt":
        lines.append("These files hold neither class names nor the transform; both are in the .arrow file.")
        if len(artifact.step_sizes) > 1:
            lines.append(f"lr_best.pt holds the first of {len(artifact.step_sizes)} step sizes.")
    return lines


def _png_files(artifact: Artifact) -> dict[str, bytes]:
    files, folders, seen = {}, class_folders(artifact.class_names), Counter[int]()
    for label, image in zip(artifact.labels.tolist(), artifact.pixels(), strict=True):
        files[f"{folders[label]}/{seen[label]:05d}.png"] = encode_png(image)
        seen[label] += 1
    return files


def _parquet_file(artifact: Artifact) -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": encode_png(image), "path": None} for image in artifact.pixels()]
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(artifact.class_names), "_type": "ClassLabel"},
        "soft_label": {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"},
    }
    table = pa.table(
        {
            "image": pa.array(images, image_type),
            "label": pa.array(artifact.labels.tolist(), pa.int64()),
            "soft_label": pa.array(artifact.soft_labels.softmax(dim=1).tolist(), pa.list_(pa.float32())),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return {"train.parquet": sink.getvalue()}


def _datm_files(artifact: Artifact) -> dict[str, bytes]:
    """Name -> content of the files for DATM's evaluation.py: normalised images, soft labels as logits, step size."""
    parts = {
        OTHERS_IMAGES: artifact.images,
        "labels_best.pt": artifact.soft_labels,
        "lr_best.pt": torch.tensor(artifact.step_size),
    }
    files = {}
    for name, tensor in parts.items():
        sink = io.BytesIO()
        torch.save(tensor, sink)
        files[name] = sink.getvalue()
    return files


def _arrow_file(artifact: Artifact) -> dict[str, bytes]:
    arrays, metadata = set_parts(artifact)
    sink = io.BytesIO()
    dump_tensors(sink, arrays, kind=KIND, metadata=metadata)
    return {SYNTHETIC: sink.getvalue()}


def _safetensors_file(artifact: Artifact) -> dict[str, bytes]:
    from safetensors.numpy import save

    arrays, metadata = set_parts(artifact)
    contiguous = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    metadata[CHECKSUM] = checksum(contiguous, metadata)
    return {SAFETENSORS: save(contiguous, {KIND: json.dumps(metadata, sort_keys=True)})}


EXPORTS: dict[str, Callable[[Artifact], dict[str, bytes]]] = {
    "png": _png_files,
    "parquet": _parquet_file,
    "pt": _datm_files,
    "arrow": _arrow_file,
    "safetensors": _safetensors_file,
}


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode one image [h w c], c 1 or 3, as a PNG file."""
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(sink, "PNG")
    return sink.getvalue()


def class_folders(class_names: tuple[str, ...]) -> list[str]:
    """Name of the folder that an export makes for each class's images, in the order of the classes.

    Characters other than letters, digits, "-", "_" and blanks become "_", and long names are cut. Names that would then
    be equal, ignoring upper and lower case, get the number of their class as an ending.
    """
    names = ["".join(c if c.isalnum() or c in "-_ " else "_" for c in name).strip() or "_" for name in class_names]
    names = [name.encode()[:_LONGEST_FOLDER].decode(errors="ignore") for name in names]
    # A name with a number may equal another class's name. Names with numbers differ from each other, so this ends.
    while len(folded := Counter(name.casefold() for name in names)) < len(names):
        names = [name if folded[name.casefold()] == 1 else f"{name}-{label}" for label, name in enumerate(names)]
    return names
