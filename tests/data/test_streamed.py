"""Tests that images that stay in their files are the images that would be in memory."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datm_ray.config import ClusterConfig, DatasetConfig, RunConfig, WorkerShape
from datm_ray.core.images.batches import batches
from datm_ray.core.networks.registry import build_network
from datm_ray.core.training.loop import predict_logits
from datm_ray.data import RawDataset, load_raw, streamed
from datm_ray.data.dataset import Dataset, prepare, transform_of
from datm_ray.data.reading import decode, parquet
from datm_ray.data.streamed import StreamedImages, StreamedPixels
from datm_ray.data.transform import Transform
from datm_ray.errors import DatasetError, TransientStoreError
from datm_ray.runtime.machine import assigned
from datm_ray.stages.worker import StageWorker
from tests.data.conftest import Encode, WriteParquet, write_files

PHOTOS = Path(__file__).parent.parent / "samples" / "photos"


@pytest.fixture(params=["folder", "parquet"])
def path(request: pytest.FixtureRequest, tmp_path: Path, encode: Encode, write_parquet: WriteParquet) -> Path:
    """Images of three classes in a source of either kind, with 14 images a class."""
    labels = [i % 3 for i in range(42)]
    if request.param == "parquet":
        return write_parquet(tmp_path / "train.parquet", labels)
    files = {f"{'abc'[label]}/{number:02}.png": encode(10 * label + number) for number, label in enumerate(labels)}
    return write_files(tmp_path / "letters", files)


def both(path: Path) -> tuple[RawDataset, RawDataset]:
    """Images of a source in memory, and streamed."""
    source = "parquet" if path.suffix else "folder"
    held = load_raw(source, str(path), resize=8, validation=0.2)
    return held, load_raw(source, str(path), resize=8, validation=0.2, streamed=True)


def prepared(path: Path) -> tuple[Dataset, Dataset]:
    held, streamed = both(path)
    return prepare(held, transform_of(held, "standard")), prepare(streamed, transform_of(streamed, "standard"))


def test_streamed_images_are_the_images_in_memory(path: Path) -> None:
    """All three sets have the same pixels, labels and normalised images, in any order of rows."""
    held, streamed = both(path)
    rows = np.array([3, 0, 2])
    for role in ("train", "validation", "test"):
        own, other = getattr(held, role), getattr(streamed, role)
        assert isinstance(other.images, StreamedPixels)
        assert np.array_equal(own.labels, other.labels)
        assert np.array_equal(own.images[rows], other.images[rows])
        assert np.array_equal(own.images[1:], other.images[1:])
    images, others = (each.train_images for each in prepared(path))
    assert isinstance(others, StreamedImages)
    assert others.shape == images.shape
    assert np.array_equal(images[rows], others[rows])


def test_any_number_of_threads_reads_the_same_bits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are decoded by the threads that the data set was given, and have the bits of one thread."""
    asked: list[int | None] = []
    real = decode.in_parallel

    def recorded(count: int, work: Any, threads: int | None = None) -> Any:
        asked.append(threads)
        return real(count, work, threads)

    held, streamed = prepared(path)
    monkeypatch.setattr(decode, "in_parallel", recorded)
    for threads in (1, 3, 16):
        again = pickle.loads(pickle.dumps(streamed.read_by(threads)))
        for own, other in ((held.train_images, again.train_images), (held.test_images, again.test_images)):
            assert np.array_equal(own[:], other[:])
            assert asked.pop() == threads
    assert held.read_by(3) is held


def test_a_worker_reads_in_its_share_of_the_cpus(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker of all stages gives every stage's number of threads to all images of its data set."""
    monkeypatch.setattr(assigned, "cpus", 0)
    cluster = ClusterConfig(threads_per_worker=5, light=WorkerShape(threads_per_worker=2))
    worker = StageWorker(prepared(path)[1], cluster)
    for light, threads in ((False, 5), (True, 2)):
        dataset = worker._worker(lambda dataset, _: dataset, light=light)  # type: ignore[arg-type, return-value]
        for images in (dataset.train_images, dataset.validation_images, dataset.test_images):
            assert isinstance(images, StreamedImages)
            assert images.pixels.threads == threads


def test_images_are_normalised_some_at_a_time_with_equal_bits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No call normalises all images, whose temporaries would take several times their memory."""
    images, normalised, real = prepared(path)[1].train_images, list[int](), Transform.apply
    assert isinstance(images, StreamedImages)
    whole = images.transform.apply(images.pixels[:].astype(np.float32) / np.float32(images.levels))

    def counted(transform: Transform, some: Any) -> Any:
        normalised.append(len(some))
        return real(transform, some)

    monkeypatch.setattr(Transform, "apply", counted)
    assert np.array_equal(images[:].view(np.uint32), whole.view(np.uint32))
    assert sum(normalised) == len(images) > max(normalised)
    assert images[:0].shape == (0, *images.shape[1:])


def test_streamed_images_can_be_sent_to_a_worker(path: Path) -> None:
    """Pickled and unpickled, the images are read from their files again."""
    _, streamed = prepared(path)
    again = pickle.loads(pickle.dumps(streamed))
    assert np.array_equal(again.train_images[:5], streamed.train_images[:5])


def test_fingerprint_of_streamed_images_depends_on_names_and_sizes(path: Path, tmp_path: Path, encode: Encode) -> None:
    """A copied data set keeps its fingerprint. A changed file changes it, without any image being read."""
    _, first = both(path)
    copy = tmp_path / "elsewhere" / path.name
    (shutil.copy if path.suffix else shutil.copytree)(path, copy.parent.mkdir() or copy)  # type: ignore[arg-type]
    assert both(copy)[1].fingerprint == first.fingerprint
    target = copy if path.suffix else next(copy.rglob("*.png"))
    target.write_bytes(target.read_bytes() + b"\0")
    if not path.suffix:  # a Parquet file ends with its footer
        assert both(copy)[1].fingerprint != first.fingerprint


def test_batches_and_logits_are_those_of_images_in_memory(path: Path) -> None:
    """Networks are trained and scored on the same bits."""
    held, streamed = prepared(path)
    network = build_network(RunConfig().network.for_images(3, (8, 8), 3), seed=0)
    labels = torch.from_numpy(held.train_labels)
    images = torch.from_numpy(held.train_images)
    steps = zip(
        batches([images], [labels], [0], range(2), 10, "flip_crop"),
        batches([streamed.train_images], [labels], [0], range(2), 10, "flip_crop"),
        strict=True,
    )
    for one, other in steps:
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
    found = predict_logits(network, streamed.train_images, batch_size=10)
    assert torch.equal(predict_logits(network, images, batch_size=10), found)


def test_nothing_is_decoded_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading opens a sample of the files, and an index decodes only its rows."""
    raw = load_raw("folder", str(PHOTOS), resize=8, streamed=True)
    opened: list[int] = []
    real = type(raw.train.images).__getitem__

    def count(pixels: StreamedPixels, rows: Any) -> Any:
        opened.append(len(np.arange(len(pixels))[rows]))
        return real(pixels, rows)

    monkeypatch.setattr(StreamedPixels, "__getitem__", count)
    dataset = prepare(raw, transform_of(raw, "standard"))
    opened.clear()
    _ = dataset.test_images[:2]
    assert opened == [2]


def test_row_groups_are_read_one_at_a_time(tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in order read each row group of a Parquet file once, though few groups are kept."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    labels = [i % 2 for i in range(40)]
    table = pa.table({"image": [{"bytes": encode(i)} for i in range(40)], "label": labels})
    pq.write_table(table, tmp_path / "train.parquet", row_group_size=5)
    raw = load_raw("parquet", str(tmp_path / "train.parquet"), resize=8, streamed=True)
    parquet._group.cache_clear()
    assert isinstance(raw.train.images, StreamedPixels)
    files = raw.train.images.files
    for index in range(40):
        assert files.open(index).read() == encode(index)
    assert parquet._group.cache_info().misses == 8
    assert files.name(7).endswith("train.parquet row 7")


def test_damaged_file_is_named_when_it_is_read(tmp_path: Path, encode: Encode) -> None:
    """A file that became unreadable ends the reading with its name."""
    files = {f"{name}/{i}.png": encode(i) for name in "ab" for i in range(10)}
    raw = load_raw("folder", str(write_files(tmp_path, files)), resize=8, streamed=True)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"images cannot be read, in .*\d\.png \("):
        raw.train.images[:8]


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_a_file_that_is_away_is_another_attempt(
    kind: str, tmp_path: Path, encode: Encode, write_parquet: WriteParquet
) -> None:
    """Files that cannot be opened any more, as on a node without their disk, are an error to retry elsewhere."""
    labels = [i % 2 for i in range(40)]
    if kind == "parquet":
        place = write_parquet(tmp_path / "train.parquet", labels)
    else:
        place = write_files(tmp_path / "ab", {f"{'ab'[x]}/{i:02}.png": encode(i) for i, x in enumerate(labels)})
    raw = load_raw(kind, str(place), resize=8, streamed=True)
    parquet._group.cache_clear()
    place.rename(tmp_path / "away")
    with pytest.raises(TransientStoreError, match=r"cannot be read any more"):
        raw.train.images[np.array([0, 0, 1])]


def test_the_reason_is_that_of_the_file_that_is_named(tmp_path: Path, encode: Encode) -> None:
    """A file that is away is named with its own reason, not with that of a damaged file that was read before it."""
    files = {f"{name}/{i}.png": encode(i) for name in "ab" for i in range(10)}
    raw = load_raw("folder", str(write_files(tmp_path, files)), resize=8, streamed=True)
    assert isinstance(raw.train.images, StreamedPixels)
    encoded = raw.train.images.files
    damaged, gone, looped = (Path(encoded.name(i)) for i in range(3))
    damaged.write_bytes(b"no image")
    gone.unlink()
    looped.unlink()
    looped.symlink_to(looped)
    named = rf"{gone.name} and 1 more cannot be read any more \(no such file or directory\)"
    for rows in ([0, 1, 2], [2, 1, 0]):
        with pytest.raises(TransientStoreError, match=named):
            decode.decode_rows(encoded, np.array(rows), (3, 8, 8), 1)
    with pytest.raises(TransientStoreError, match=rf"{looped.name} cannot be read any more \(too many levels"):
        decode.decode_rows(encoded, np.array([0, 2]), (3, 8, 8), 1)


def test_pixels_of_unknown_range_are_refused_when_they_are_read(
    tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image of floats is refused as in memory, though loading read only a sample of the files."""
    monkeypatch.setattr(decode, "SURVEYED", 2)
    root = write_files(tmp_path / "ab", {f"{name}/{i:03}.png": encode(i) for name in "ab" for i in range(9)})
    Image.fromarray(np.ones((8, 8), np.float32)).save(root / "a/001.tiff")
    raw = load_raw("folder", str(root), resize=8, streamed=True)
    everything = [raw.train, raw.validation, raw.test]
    with pytest.raises(DatasetError, match=r"001\.tiff has neither 8 nor 16 bits"):
        [each.images[:] for each in everything]


def test_given_statistics_need_no_images(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transform of given statistics decodes two images, whose shape it takes."""
    raw, decoded, real = both(path)[1], list[int](), streamed.decode_rows

    def count(files: Any, rows: Any, *more: Any) -> Any:
        decoded.append(len(rows))
        return real(files, rows, *more)

    monkeypatch.setattr(streamed, "decode_rows", count)
    channels = raw.channels
    transform = transform_of(raw, "standard", ((0.5,) * channels, (0.2,) * channels))
    assert transform.mean.tolist() == [0.5] * channels
    assert decoded == [2]


def test_archives_and_missing_sizes_are_refused(tmp_path: Path, encode: Encode) -> None:
    """Images of an archive cannot be streamed, nor images whose size is not given, and zca needs all images."""
    root = write_files(tmp_path / "ab", {f"{name}/{i}.png": encode(i) for name in "ab" for i in range(10)})
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", root)
    with pytest.raises(DatasetError, match="cannot be streamed"):
        load_raw("folder", archive, resize=8, streamed=True)
    with pytest.raises(DatasetError, match=r"dataset\.resize"):
        load_raw("folder", str(root), streamed=True)
    with pytest.raises(DatasetError, match="one of the sources"):
        load_raw("digits", resize=8, streamed=True)
    with pytest.raises(ValueError, match="zca do not go together"):
        DatasetConfig(source="folder", path="x", resize=8, streamed=True, normalisation="zca")
    assert DatasetConfig(source="folder", resize=8, streamed=True).resolved((8, 8)).kind == "standard"
