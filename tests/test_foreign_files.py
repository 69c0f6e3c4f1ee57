"""Tests that any foreign file gives the right values or one line of error, and never a crash.

A sample of every kind that is read is mutated at random, by a seed: bytes flipped, cut off, inserted, removed, swapped.
Sealed files are also mutated below their seal, which is then made right again, for anyone can do that. The quick test
takes some of each kind in this process; the slow one takes many more, each kind in a process whose memory is limited.
"""

from __future__ import annotations

import base64
import io
import json
import re
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, features
from safetensors.torch import save_file as save_weights

from datm_ray.artifact import KIND, SCORING, load, save_artifact
from datm_ray.cli.stores import _expert_facts, _expert_lines
from datm_ray.config import DistillConfig, to_yaml
from datm_ray.core.synthetic import Rows, SyntheticSet
from datm_ray.core.training.experts import ExpertState
from datm_ray.core.training.loop import PROTOCOLS
from datm_ray.data import Transform, fit_transform, load_raw
from datm_ray.data.reading import parquet
from datm_ray.errors import CorruptFileError, DatasetError, DatmError
from datm_ray.interop.exports import export
from datm_ray.interop.replay_buffers import _read
from datm_ray.interop.teachers import read_weights
from datm_ray.methods.trajectory.iteration import IterationRecord, MatchingState
from datm_ray.monitor.spent import Spent
from datm_ray.pipeline.folder import DATA, DataNote
from datm_ray.recipes import get_recipe
from datm_ray.stages.distill.checkpoint import CHECKPOINT, PARTS, load_checkpoint, read_curves
from datm_ray.stages.evaluate.scores import _Result
from datm_ray.stages.experts.progress import ExpertProgress, TrainingProgress
from datm_ray.stages.experts.train import read_experts_cost
from datm_ray.store import sealed
from datm_ray.store.files.filesystem import open_location
from datm_ray.store.labels import LabelStore
from datm_ray.store.tensors import write_tensors
from datm_ray.store.trajectories import ExpertGroup, TrajectoryStore
from tests.conftest import tiny_config
from tests.processes import side_by_side
from tests.store.contract import KEY, make_info, make_snapshots_with_buffers, with_buffers
from tests.store.test_labels import TINY as LABELS, records_of as label_records

CPU = torch.device("cpu")
DRAW = np.random.default_rng(0)
MEMORY = 6 * 2**30  # bytes of address space of a process that reads mutations


def synthetic_set() -> SyntheticSet:
    images = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    return SyntheticSet(images, torch.eye(2).repeat(2, 1), torch.tensor([0.01]), torch.arange(4) % 2)


def write_set(folder: Path) -> Path:
    transform = fit_transform("zca", DRAW.integers(0, 256, (9, 1, 3, 3), dtype=np.uint8), 255)
    place = open_location(str(folder / "set.arrow"))
    save_artifact(place, synthetic_set(), transform, ("a", "b"), {"name": "x"}, {"torch": "1"}, has_step_size=True)
    return folder / "set.arrow"


def write_safetensors(folder: Path) -> Path:
    (name,) = export(load(str(write_set(folder))), "safetensors", open_location(str(folder)))
    return folder / name


def write_set_apart(folder: Path) -> Path:
    """Write a set into a run's folder, with a transform too large to travel inside."""
    images = DRAW.integers(0, 256, (9, 1, 12, 12), dtype=np.uint8)
    transform, root = fit_transform("zca", images.repeat(16, axis=0), 255), open_location(str(folder))
    synthetic = SyntheticSet(transform.normalise(images), torch.zeros(9, 2), torch.ones(1), torch.arange(9) % 2)
    save_artifact(
        root / "run/set.arrow", synthetic, transform, ("a", "b"), {}, {}, root / "transforms", has_step_size=True
    )
    return folder / "run/set.arrow"


def write_transform_apart(folder: Path) -> Path:
    write_set_apart(folder)
    (path,) = (folder / "transforms").iterdir()
    return path


def read_set(path: Path) -> object:
    found = load(str(path))
    images = found.normalise(np.ones((1, *found.transform.shape), np.float32))
    return [found.images, found.soft_labels, found.labels, found.step_sizes, found.pixels(), images, found.recipe]


def read_scoring(path: Path) -> object:
    set_file = path.parent / "synthetic.arrow"
    if not set_file.exists():
        write_set(path.parent).rename(set_file)
    return load(str(set_file)).training()


def read_of_transform(path: Path) -> object:
    return read_set(path.parents[1] / "run/set.arrow")


def group_of(path: Path) -> ExpertGroup:
    return TrajectoryStore(str(path.parents[3])).group(*str(KEY).split("/"))


def write_expert(folder: Path) -> Path:
    info = with_buffers(make_info(epochs=2))
    path = folder / str(KEY) / "expert-00000.arrow"
    group_of(path).write_expert(0, make_snapshots_with_buffers(info), info)
    return path


def read_expert(path: Path) -> object:
    group = group_of(path)
    facts = _expert_facts(group, 0)
    lines = [*_expert_lines(facts, with_recipe=True), facts["damage"]]
    snapshots = [group.read_snapshot(0, epoch) for epoch in group.read_info(0).epochs]
    return [lines, *((each.epoch, each.step, each.params, each.buffers) for each in snapshots)]


def write_transform(folder: Path) -> Path:
    transform = fit_transform("standard", DRAW.integers(0, 256, (9, 3, 2, 2), dtype=np.uint8), 255)
    path = folder / str(KEY) / "transform.arrow"
    group_of(path).write_transform(transform.to_arrays(), transform.to_metadata())
    return path


def read_transform(path: Path) -> object:
    file = group_of(path).read_transform()
    transform = Transform.from_arrays(file.arrays, file.metadata)
    return [transform.apply(np.ones((1, *transform.shape), np.float32)), transform.fingerprint]


def write_checkpoint(folder: Path) -> Path:
    record = IterationRecord(0, 0, 1, 2, 0.5, 0.01, False, 0.1)
    state = MatchingState(synthetic_set(), DistillConfig(), {}, [record])
    state.record_validation(0.5)
    held, shared = state.to_arrays()
    metadata = {"recipe": {}, "iteration": 1, "parts": ["00000001-0-4.arrow"]}
    write_tensors(open_location(str(folder / PARTS / "00000001-0-4.arrow")), held, kind="checkpoint", metadata={})
    write_tensors(open_location(str(folder / CHECKPOINT)), shared, kind="checkpoint", metadata=metadata)
    return folder / CHECKPOINT


def write_part(folder: Path) -> Path:
    return write_checkpoint(folder).parent / PARTS / "00000001-0-4.arrow"


def read_checkpoint(path: Path) -> object:
    folder = open_location(str(path.parent if path.name == CHECKPOINT else path.parents[1]))
    state = load_checkpoint(MatchingState, folder, Rows(0, 4), DistillConfig(), CPU)
    assert state is not None
    return [*vars(state.synthetic).values(), [vars(each) for each in state.history], read_curves(folder)]


def progress_of(folder: Path) -> ExpertProgress:
    return ExpertProgress(TrajectoryStore(str(folder)).group(*str(KEY).split("/")), [0, 1], [0, 1], [0, 1])


def write_progress(folder: Path) -> Path:
    progress = progress_of(folder)
    for epoch in (0, 1):
        state = ExpertState(torch.full((2, 5), float(epoch)), torch.zeros(2, 3), torch.ones(2, 5), epoch, 7 * epoch)
        list(progress.add(state, torch.ones(2), last=epoch == 1))
    return max(folder.rglob("*-*-*.arrow"))


def read_progress(path: Path) -> object:
    progress = progress_of(path.parents[5])
    state = progress.resume(CPU)
    if state is None or not path.exists():
        raise CorruptFileError("it was damaged, and was removed")
    snapshots = [(each.epoch, each.step, each.params, each.buffers) for each in progress.snapshots(1)]
    return [snapshots, state.parameters, state.velocity, state.epoch, state.step]


def write_training(folder: Path) -> Path:
    state = ExpertState(torch.arange(10.0).view(2, 5), torch.zeros(2, 3), torch.ones(2, 10), 4, 28)
    list(TrainingProgress(open_location(str(folder)), 2).add(state, last=True))
    return next(folder.glob("*.arrow"))


def read_training(path: Path) -> object:
    state = TrainingProgress(open_location(str(path.parent)), 2).resume(CPU)
    if state is None or not path.exists():
        raise CorruptFileError("it was damaged, and was removed")
    return [state.parameters, state.buffers, state.velocity, state.epoch, state.step]


def write_labels(folder: Path) -> Path:
    store = LabelStore.create(str(folder), LABELS)
    store.write_epoch(0, [label_records(LABELS)])
    return folder / "epoch-00000.arrow"


def write_label_info(folder: Path) -> Path:
    write_labels(folder)
    return folder / "labels.arrow"


def read_labels(path: Path) -> object:
    store = LabelStore(str(path.parent))
    info, found = store.info, store.read(0, range(LABELS.images))
    return [info.to_json(), info.planned_bytes, *vars(found).values()]


def json_kind(value: object, read: Callable[[Path], object], name: str = "experts-cost.json") -> Kind:
    def write(folder: Path) -> Path:
        (folder / name).write_text(json.dumps(value))
        return folder / name

    return Kind(write, read, exact=False)


def write_recipe(folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(to_yaml(tiny_config()))
    return folder / "recipe.yaml"


def picture(number: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(file, form)
    return file.getvalue()


def write_parquet(folder: Path) -> Path:
    rows = [{"bytes": picture(number), "path": None} for number in range(10)]
    names = json.dumps({"info": {"features": {"label": {"names": ["a", "b"]}}}})
    table = pa.table({"image": rows, "label": [0, 1] * 5}).replace_schema_metadata({"huggingface": names})
    pq.write_table(table, folder / "x.parquet")
    return folder / "x.parquet"


def write_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(10):
            archive.writestr(f"{'ab'[number % 2]}/{number}.png", picture(number))
    return folder / "x.zip"


def write_images(form: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        for number in range(10):
            file = folder / "images" / "ab"[number % 2] / f"{number}.{form.lower()}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(number, form))
        return folder / "images" / "a" / f"0.{form.lower()}"

    return write


def pixels(source: str, path: Path) -> object:
    raw = load_raw(source, str(path), validation=0.3)
    return [part for images in (raw.train, raw.validation, raw.test) for part in (images.images, images.labels)]


def write_buffer(folder: Path) -> Path:
    torch.save([[[torch.randn(2, 3), torch.randn(3)] for _ in range(3)]], folder / "buffer.pt")
    return folder / "buffer.pt"


def write_weights(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        weights = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).state_dict()
        if name.endswith(".safetensors"):
            save_weights(weights, folder / name)
        else:
            torch.save(weights, folder / name, _use_new_zipfile_serialization=name.endswith(".pth"))
        return folder / name

    return write


def read_teacher(path: Path) -> object:
    return read_weights(open_location(str(path)))


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    write: Callable[[Path], Path]
    read: Callable[[Path], object]
    exact: bool = True
    """True if checksums cover it, so that what is read must be what was written."""
    sealed: bool = False
    count: int = 150
    """Mutations in the quick test."""


SPENT = Spent(1, 2, 3, 4, 5, 6).to_json()
RESULT = {"test_accuracy": 0.5, "test_accuracy_with_learned_step_size": None, "step_size": 0.01, "cost": SPENT}
COSTS = [{"architecture": "convnet", "known": 3, "spent": SPENT}]
KINDS = {
    "synthetic set": Kind(write_set, read_set, sealed=True),
    "set in safetensors": Kind(write_safetensors, read_set),
    "set without its transform": Kind(write_set_apart, read_set, sealed=True, count=80),
    "transform of sets": Kind(write_transform_apart, read_of_transform, sealed=True, count=80),
    "expert": Kind(write_expert, read_expert, sealed=True),
    "transform": Kind(write_transform, read_transform, sealed=True),
    "checkpoint": Kind(write_checkpoint, read_checkpoint, sealed=True, count=80),
    "part of a checkpoint": Kind(write_part, read_checkpoint, sealed=True, count=80),
    "labels": Kind(write_labels, read_labels, sealed=True),
    "info of labels": Kind(write_label_info, read_labels, sealed=True),
    "expert progress": Kind(write_progress, read_progress, sealed=True, count=50),
    "training progress": Kind(write_training, read_training, sealed=True, count=50),
    "data note": json_kind(
        {"fingerprint": "x", "training_images": 3}, lambda p: DataNote.read(open_location(str(p.parent))), DATA
    ),
    "result": json_kind(RESULT, lambda p: _Result.read(open_location(str(p)))),
    "scoring of a set": json_kind(PROTOCOLS["quick"].to_json(), read_scoring, SCORING),
    "experts' cost": json_kind(COSTS, lambda p: read_experts_cost(open_location(str(p.parent)))),
    "recipe": Kind(write_recipe, lambda path: get_recipe(str(path)), exact=False, count=40),
    "replay buffer": Kind(write_buffer, lambda path: _read(open_location(str(path)))),
    "weights": Kind(write_weights("x.pth"), read_teacher, exact=False),
    "weights of old torch": Kind(write_weights("x.pt"), read_teacher, exact=False),
    "weights in safetensors": Kind(write_weights("x.safetensors"), read_teacher, exact=False),
    "parquet": Kind(write_parquet, lambda path: pixels("parquet", path), exact=False),
    "zip": Kind(write_zip, lambda path: pixels("folder", path), exact=False, count=100),
    "png": Kind(write_images("PNG"), lambda path: pixels("folder", path.parents[1]), exact=False, count=50),
    "jpeg": Kind(write_images("JPEG"), lambda path: pixels("folder", path.parents[1]), exact=False, count=50),
    "webp": Kind(write_images("WEBP"), lambda path: pixels("folder", path.parents[1]), exact=False, count=50),
    **(
        {"avif": Kind(write_images("AVIF"), lambda path: pixels("folder", path.parents[1]), exact=False, count=30)}
        if "avif" in features.get_supported_modules()
        else {}
    ),
    "tiff": Kind(write_images("TIFF"), lambda path: pixels("folder", path.parents[1]), exact=False, count=50),
}


def mutated(content: bytes, draw: np.random.Generator) -> bytes:
    """One mutation: bytes flipped, a number replaced, or a stretch cut off, removed, inserted, zeroed or doubled."""
    place, length = int(draw.integers(0, len(content) + 1)), int(draw.integers(1, 60))
    before, after = content[:place], content[place + length :]
    match int(draw.integers(0, 8)):
        case 0 | 1:
            return before + bytes([int(draw.integers(0, 256))]) + content[place + 1 :]
        case 2:
            return before
        case 3:
            return before + after
        case 4:
            return before + draw.bytes(length) + content[place:]
        case 5:
            return before + bytes(length) + after
        case 6:
            return before + content[place : place + length] + content[place:]
    place -= place % 8
    number = int(draw.choice([-1, 0, 1, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63), 200_000]))
    return content[:place] + struct.pack("<q", number) + content[place + 8 :]


def taken_apart(content: bytes) -> tuple[dict[str, Any], list[bytes], bytes]:
    """Index, parts of the stream, and footer of a sealed file."""
    footer_size = 10 + struct.unpack_from("<i", content, len(content) - 10)[0]
    end = len(content) - footer_size - sealed._SEAL_END.size
    size = sealed._SEAL_END.unpack_from(content, end)[1]
    index = json.loads(content[end - size : end])
    ends = accumulate((length for length, _ in index["parts"]), initial=0)
    return index, [content[first:last] for first, last in pairwise(ends)], content[-footer_size:]


def with_seal(index: dict[str, Any], parts: list[bytes], footer: bytes) -> bytes:
    """A sealed file with a right digest, whatever its content."""
    text = json.dumps(index).encode()
    seal = sealed._SEAL_END.pack(sha256(text + footer).digest(), len(text), sealed._SEAL_MAGIC)
    return b"".join(parts) + text + seal + footer


def digests(parts: list[bytes]) -> list[list[object]]:
    """Digests and lengths of parts, as an index has them."""
    return [[len(part), sha256(part).hexdigest()] for part in parts]


def resealed(content: bytes, draw: np.random.Generator) -> bytes:
    """A mutation of a sealed file below its seal, with right digests and lengths."""
    index, parts, footer = taken_apart(content)
    what = int(draw.integers(0, len(parts) + 2))
    if what == len(parts):
        footer = mutated(footer[:-10], draw)
        return with_seal(index, parts, footer + struct.pack("<i6s", len(footer), b"ARROW1"))
    if what > len(parts):
        return with_seal(mutated_value(index, draw), parts, footer)
    parts[what] = mutated(parts[what], draw)
    return with_seal({**index, "parts": digests(parts)}, parts, footer)


def mutated_value(value: Any, draw: np.random.Generator) -> Any:
    """A JSON value with one value, at any depth, replaced."""
    if isinstance(value, dict | list) and value and draw.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[int(draw.integers(0, len(keys)))]
        pairs = [(each, mutated_value(value[each], draw) if each == key else value[each]) for each in keys]
        return dict(pairs) if isinstance(value, dict) else [each for _, each in pairs]
    return [None, -1, 0, 2**70, 1.5, float("nan"), "x", [], {}, True, [[1]]][int(draw.integers(0, 11))]


def mutations(kind: Kind, content: bytes, count: int, seed: int) -> Iterator[tuple[bytes, bool]]:
    """Contents, each with a flag that is True if reading it must give the original values."""
    draw = np.random.default_rng(seed)
    for _ in range(count):
        yield mutated(content, draw), kind.exact
        if kind.sealed:
            yield resealed(content, draw), False
            yield with_other_metadata(content, draw), False
        elif content[:1] in b"[{":
            yield json.dumps(mutated_value(json.loads(content), draw)).encode(), False


def with_other_metadata(content: bytes, draw: np.random.Generator) -> bytes:
    """A sealed file with equal batches and one changed value of metadata, as another program might write it."""
    place = open_location("memory://mutations") / "x.arrow"
    place.write_atomic(content)
    file = sealed.SealedFile(place, *_schema_of(content))
    header = dict(file.header)
    key = "info" if "info" in header else "metadata"
    header[key] = json.dumps(mutated_value(json.loads(header[key]), draw))
    names = {"format_name": header.pop("format"), "format_version": int(header.pop("format_version"))}
    target = io.BytesIO()
    writer = sealed.SealedWriter(target, file.schema, **names, header=header)
    for batch in file.batches(range(file.n_batches)):
        writer.write(batch)
    writer.close(file.summary)
    return target.getvalue()


def _schema_of(content: bytes) -> Any:
    place = open_location("memory://mutations") / "x.arrow"
    names = ("datm_ray.trajectory", "datm_ray.labels", "datm_ray.tensors")
    name = next(each for each in names if each.encode() in content)
    file = sealed.open_sealed(place, format_name=name, format_version=9)
    return file.schema, file.header, file.parts, file.summary


def same(one: Any, other: Any) -> bool:
    """True if two values from a kind's `read` are equal to the last bit."""
    return plain(one) == plain(other)


def plain(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        return plain(value.numpy())
    if isinstance(value, np.ndarray):
        return (value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return repr(value)


def read_mutations(name: str, folder: Path, count: int, seed: int) -> int:
    """Read mutations of a kind of file. Returns how many are refused; fails at any other error."""
    kind, refused = KINDS[name], 0
    path = kind.write(folder)
    content, truth = path.read_bytes(), kind.read(path)
    for number, (mutation, exact) in enumerate(mutations(kind, content, count, seed)):
        path.unlink(missing_ok=True)
        path.write_bytes(mutation)
        try:
            found = kind.read(path)
        except DatmError as error:
            refused += len(str(error).splitlines()) == 1
            continue
        except Exception as error:
            raise AssertionError(f"mutation {number} of seed {seed} of a {name}: {error!r}") from error
        assert not exact or same(found, truth), f"mutation {number} of seed {seed} of a {name} is read wrongly"
    return refused


@pytest.mark.parametrize("name", KINDS)
def test_a_mutated_file_is_refused_or_read_right(name: str, tmp_path: Path) -> None:
    """No mutation of a file of any kind gives a traceback, a crash, a hang or another value."""
    assert read_mutations(name, tmp_path, KINDS[name].count // 2, seed=0) > 0


@pytest.mark.slow
@pytest.mark.exhaustive
def test_more_mutations_in_little_memory_crash_nothing(tmp_path: Path) -> None:
    """Other mutations, in a process limited to 6 GiB of addresses, crash nothing."""
    command = [sys.executable, "-m", "tests.test_foreign_files", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.splitlines() == list(KINDS)


def test_a_set_that_points_beyond_its_end_is_refused(tmp_path: Path) -> None:
    """Sealed offsets 200,000 bytes too far neither show the process's memory nor crash it."""
    path = tmp_path / "x.arrow"
    write_tensors(open_location(str(path)), {"images": np.arange(4, dtype=np.float32)}, kind=KIND, metadata={})
    index, parts, footer = taken_apart(path.read_bytes())
    head, batch, *rest = parts
    for distance in (200_000, 200_000_000):
        before, offsets, after = batch.rpartition(struct.pack("<qq", 0, 16))
        assert offsets
        changed = [head, before + struct.pack("<qq", distance, distance + 16) + after, *rest]
        path.write_bytes(with_seal({**index, "parts": digests(changed)}, changed, footer))
        with pytest.raises(CorruptFileError, match="makes no sense"):
            load(str(path))


def test_compressed_batches_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 8 KB with a batch that unpacks to 8 MB is refused before unpacking."""
    new_file, options = pa.ipc.new_file, pa.ipc.IpcWriteOptions(compression="zstd")
    monkeypatch.setattr(pa.ipc, "new_file", lambda file, schema: new_file(file, schema, options=options))
    place = open_location(str(tmp_path / "x.arrow"))
    write_tensors(place, {"images": np.zeros(2_000_000, np.float32)}, kind=KIND, metadata={})
    assert place.size() < 10_000
    with pytest.raises(CorruptFileError, match="a batch is compressed"):
        load(place.uri)


def test_statistics_that_disagree_in_a_parquet_file_do_not_end_the_process(tmp_path: Path) -> None:
    """A Parquet histogram of levels that is too short, a C++ exception in pyarrow, is one line of error."""
    path = write_parquet(tmp_path)
    before, histogram, after = path.read_bytes().rpartition(b"\x26\x00\x14")  # 2 numbers: 0, and 10 in zigzag
    assert histogram
    footer_size = struct.unpack("<i", after[-8:-4])[0]
    path.write_bytes(before + b"\x16\x14" + after[:-8] + struct.pack("<i", footer_size - 1) + b"PAR1")
    (call,) = side_by_side(load_raw, [("parquet", str(path))])
    assert isinstance(call.exception(), DatasetError), call.exception()


def test_a_parquet_file_of_integers_of_a_few_bits_is_refused(tmp_path: Path) -> None:
    """A Parquet file with an Arrow schema of 4-bit integers, for which pyarrow raises another error, is refused."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [picture(0)], "label": pa.array([0], pa.uint8())}), path)
    content = path.read_bytes()
    (schema,) = re.findall(rb"[A-Za-z0-9+/=]{100,}", content)
    before, bits, after = base64.b64decode(schema).rpartition(struct.pack("<i", 8))
    assert bits
    path.write_bytes(content.replace(schema, base64.b64encode(before + struct.pack("<i", 4) + after)))
    with pytest.raises(DatasetError, match=r"cannot be read as Parquet \(Integers with less than 8 bits"):
        load_raw("parquet", str(path))


def test_archives_parquet_and_images_that_unpack_to_too_much_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that unpack to too much are one line with the file's name, before the memory is used."""
    monkeypatch.setattr(parquet, "DECODED_FREE", 2**20)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("a/1.png", "b/1.png"):
            archive.writestr(name, picture(0) + bytes(2_000_000))
    rows = [{"bytes": picture(0) + bytes(2_000_000), "path": None}, {"bytes": picture(1), "path": None}]
    pq.write_table(pa.table({"image": rows, "label": [0, 1]}), tmp_path / "b.parquet", compression="zstd")
    (tmp_path / "c" / "a").mkdir(parents=True)
    Image.new("1", (5000, 5000)).save(tmp_path / "c" / "a" / "0.png")
    for source, name, words in (
        ("folder", "a.zip", r"a\.zip/a/1\.png cannot be read .*bytes that unpack to 2000"),
        ("parquet", "b.parquet", r"b\.parquet cannot be read as Parquet \(its \d+ bytes unpack to 2000"),
        (
            "folder",
            "c",
            r"0\.png has 5000x5000 pixels in only [\d,]+ bytes\. An image of more than 100 pixels .* Scale it",
        ),
    ):
        with pytest.raises(DatasetError, match=words):
            load_raw(source, str(tmp_path / name))


def text(value: str) -> bytes:
    """Pickle operation that puts a text of up to 255 bytes on the stack."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def stored(key: bytes = text("0"), dtype: bytes = b"ctorch\nFloatStorage\n", count: bytes = b"K\x03") -> bytes:
    """Pickle operations for the three values of `replay_buffer`."""
    return b"(" + text("storage") + dtype + key + text("cpu") + count + b"tQ"


def tensor(storage: bytes, sizes: bytes) -> bytes:
    """Pickle operations of a tensor with the offset, shape and strides of `sizes`."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + sizes + b"tR"


NESTED = b"K\x00" + b"q\x00h\x00\x86" * 25  # a pair of twice the same pair, and so on: 33 million numbers if read
NUMBER = b"\x8a\xff" + bytes(254) + b"\x7f"  # 2**2039 - 2**2032
REPEATED = tensor(stored(), b"K\x02K\x03\x85K\x00\x85")
PICKLES = {
    "a call of nested pairs": (NESTED + b")R", "calls a tuple with a tuple"),
    "a call with a number": (b"ccollections\nOrderedDict\nK\x00R", "OrderedDict|with a int"),
    "a class named by nested pairs": (stored(dtype=text("torch") + NESTED + b"\x93"), "something else than texts"),
    "a storage of nested pairs": (stored(dtype=NESTED), "something else than floats"),
    "a storage named by nested pairs": (stored(key=NESTED), "something else than floats"),
    "a storage as long as nested pairs": (stored(count=NESTED), "something else than floats"),
    "an identifier of a storage that is a text": (text("01234") + b"Q", "something else than floats"),
    "parameters that are nested pairs": (b"]]]" + NESTED + b"aa]" + NESTED + b"aaa", None),
    "a large number": (NUMBER, "more than 64 bits"),
    "a shape of large numbers": (
        tensor(stored(), b"K\x00(" + NUMBER + b"q\x01" + b"h\x01" * 20_000 + b"t)"),
        "than 64",
    ),
    "a shape of 20,000 numbers": (
        tensor(stored(), b"K\x00(" + b"\x8a\x08" + bytes(7) + b"\x7fq\x01" + b"h\x01" * 20_000 + b"t)"),
        "20001 dimensions and 0 strides",
    ),
    "a shape of nested pairs": (tensor(stored(), b"K\x00" + NESTED + NESTED), "no numbers"),
    "a stride of zero": (REPEATED, "has values twice"),
    "strides that meet": (tensor(stored(), b"K\x00K\x02K\x02\x86K\x01K\x01\x86"), "has values twice"),
    "a tensor beyond its storage": (tensor(stored(), b"K\x01K\x03\x85K\x01\x85"), "larger than its storage of 3"),
    "a tensor whose storage is a tensor": (
        tensor(tensor(stored(), b"K\x00K\x03\x85K\x01\x85"), b"K\x00K\x03\x85K\x01\x85"),
        "no storage",
    ),
    "two equal tensors by turns": (
        b"]("
        + b"](]("
        + tensor(stored(), b"K\x00K\x01\x85K\x01\x85")
        + b"eq\x01"
        + b"]("
        + tensor(stored(), b"K\x01K\x01\x85K\x01\x85")
        + b"eq\x02"
        + b"h\x01h\x02" * 100
        + b"ee",
        None,
    ),
}


def replay_buffer(path: Path, pickle: bytes) -> Path:
    """An archive as torch.save writes it, with any pickle and a storage of three equal values."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x04" + pickle + b".")
        archive.writestr("x/data/0", bytes(12))
    return path


def test_pickles_of_replay_buffers_are_refused_before_they_take_time_or_memory(tmp_path: Path) -> None:
    """A hostile replay buffer costs no more than its length, and shows no memory behind its storages."""
    for name, (pickle, words) in PICKLES.items():
        place = open_location(str(replay_buffer(tmp_path / "x.pt", pickle)))
        start = time.process_time()
        with pytest.raises(CorruptFileError, match=r"x\.pt is not a replay buffer") as refusal:
            _read(place)
        assert time.process_time() - start < 1, name
        cause = refusal.value.__cause__
        assert (cause is None) if words is None else re.search(words, str(cause)), (name, cause)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for each in KINDS:
        print(each, flush=True)  # after a crash the last line names its kind
        (folder := Path(sys.argv[1]) / each).mkdir()
        read_mutations(each, folder, 2 * KINDS[each].count, seed=1)
