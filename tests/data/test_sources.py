"""Tests that sources read and split every layout, and refuse unusable data with one clear line."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from datm_ray.data import ImageSet, Loaded, RawDataset, Request, known_sources, load_raw, source, sources
from datm_ray.data.reading import decode
from datm_ray.data.splits import Stream, stratified_split
from datm_ray.errors import DatasetError
from tests.data.conftest import Encode, WriteParquet, require_parquet, write_files


def sets_of(raw: RawDataset) -> tuple[ImageSet, ImageSet, ImageSet]:
    return raw.train, raw.validation, raw.test


def contents(images: ImageSet) -> set[bytes]:
    return {image.tobytes() for image in images.images}


# ------------------------------------------------------------------------------------------------------ splitting


def test_split_holds_out_the_fraction_of_each_class() -> None:
    """The split holds out an equal share of every class, whatever its size."""
    labels = np.array([0] * 50 + [1] * 20 + [2] * 5)
    kept, held_out = stratified_split(labels, 0.2, Stream.TEST, "abc")
    assert np.bincount(labels[held_out]).tolist() == [10, 4, 1]
    assert sorted([*kept, *held_out]) == list(range(75))


def test_split_leaves_at_least_one_image_on_either_side() -> None:
    """The split leaves at least one image of a class on either side."""
    labels = np.array([0, 0, 1, 1])
    for fraction in (0.01, 0.99):
        kept, held_out = stratified_split(labels, fraction, Stream.TEST, "ab")
        assert labels[kept].tolist() == labels[held_out].tolist() == [0, 1]


def test_split_is_frozen() -> None:
    """The split gives pinned rows, because another choice would change every result."""
    labels = np.arange(20) % 2
    assert stratified_split(labels, 0.3, Stream.TEST, "ab")[1].tolist() == [2, 3, 5, 9, 10, 14]
    assert stratified_split(labels, 0.3, Stream.VALIDATION, "ab")[1].tolist() == [1, 10, 11, 12, 15, 18]


def test_split_of_a_class_with_one_image_names_it() -> None:
    """A class too small for all three sets is an error that names it."""
    with pytest.raises(DatasetError, match="class 'b' has 1 image"):
        stratified_split(np.array([0, 0, 1]), 0.5, Stream.VALIDATION, "ab")


# --------------------------------------------------------------------------------------------------------- digits


def test_digits_need_no_files_and_keep_their_seventeen_values() -> None:
    """The embedded digits are 1797 images of 8x8 pixels with values 0..16 in three sets."""
    raw = load_raw("digits")
    assert (raw.name, raw.channels, raw.size, raw.classes, raw.levels) == ("digits", 1, (8, 8), 10, 16)
    assert [len(images) for images in sets_of(raw)] == [1293, 145, 359]
    assert raw.train.images.dtype == np.uint8
    assert raw.train.labels.dtype == np.int64
    assert raw.train.images.max() == 16


def test_the_three_sets_are_disjoint_and_complete() -> None:
    """No digit is in two sets and none is lost."""
    from sklearn.datasets import load_digits

    found = [contents(images) for images in sets_of(load_raw("digits"))]
    everything = {image.astype(np.uint8).tobytes() for image in load_digits().images}
    assert set.union(*found) == everything
    assert sum(map(len, found)) == len(everything)


def test_every_set_is_stratified() -> None:
    """Each class has about the same share of each set."""
    for images in sets_of(load_raw("digits")):
        shares = np.bincount(images.labels) / len(images)
        assert np.abs(shares - 0.1).max() < 0.012


def test_loading_twice_gives_the_same_fingerprint() -> None:
    """Loading twice gives equal fingerprints."""
    assert load_raw("digits").fingerprint == load_raw("digits").fingerprint


def test_fingerprint_changes_with_the_split_and_the_pixels() -> None:
    """The fingerprint changes with the split and with the image size."""
    prints = {load_raw("digits", validation=0.1).fingerprint, load_raw("digits", validation=0.2).fingerprint}
    prints.add(load_raw("digits", resize=4).fingerprint)
    assert len(prints) == 3
    assert {len(fingerprint) for fingerprint in prints} == {16}


def test_test_set_does_not_depend_on_the_validation_share() -> None:
    """The test set is equal for every share held out for validation."""
    few, many = load_raw("digits", validation=0.1), load_raw("digits", validation=0.5)
    assert np.array_equal(few.test.images, many.test.images)


def test_resized_digits_are_scaled_to_255_levels_first() -> None:
    """Digits are scaled from 17 to 256 levels before they are resized."""
    raw = load_raw("digits", resize=12)
    assert (raw.size, raw.levels) == ((12, 12), 255)
    assert raw.train.images.max() > 200
    assert load_raw("digits", resize=8).train.images.max() == 255


# ---------------------------------------------------------------------------------------------------------- CIFAR


class OldPickler(pickle.Pickler):
    """Writes dtypes as Python 2 did, in the way numpy now warns of; the official files are like that."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.dtype):
            return np.dtype, (value.str, 0, 1), value.__reduce__()[2]
        return NotImplemented


def write_pickle(path: Path, value: Any) -> str:
    """Writes the file and returns its MD5 sum."""
    file = io.BytesIO()
    OldPickler(file, protocol=2).dump(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.getvalue())
    return hashlib.md5(file.getvalue(), usedforsecurity=False).hexdigest()


def cifar_batch(seed: int, label_key: str) -> dict[str, Any]:
    labels = [i % 3 for i in range(12)]
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 3072), dtype=np.uint8)
    return {"data": pixels, label_key: labels}


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in torchvision's CIFAR-10 layout: 3 classes, 2 training batches and a test batch of 12 images."""
    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    sums = {
        name: write_pickle(base / name, cifar_batch(i, "labels"))
        for i, name in enumerate(("data_batch_1", "data_batch_2", "test_batch"))
    }
    meta = write_pickle(base / "batches.meta", {"label_names": ["cat", "dog", "eel"]})
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in list(sums)[:2]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})
    return tmp_path


def test_cifar10_layout_is_read(cifar10: Path) -> None:
    """CIFAR-10 batches become images [n 3 32 32] in their own order, with the meta file's class names."""
    raw = load_raw("cifar10", str(cifar10))
    assert (raw.class_names, raw.channels, raw.size, raw.levels) == (("cat", "dog", "eel"), 3, (32, 32), 255)
    assert [len(images) for images in sets_of(raw)] == [21, 3, 12]
    expected = cifar_batch(2, "labels")
    assert np.array_equal(raw.test.images, expected["data"].reshape(-1, 3, 32, 32))
    assert raw.test.labels.tolist() == expected["labels"]


def test_cifar10_path_may_be_the_batches_folder(cifar10: Path) -> None:
    """A path one level too low, to the batches' folder, is accepted."""
    direct = load_raw("cifar10", str(cifar10 / "cifar-10-batches-py"), resize=8)
    assert direct.size == (8, 8)


def test_cifar100_has_the_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-100 is read from its own layout, with the fine label names."""
    from torchvision.datasets import CIFAR100

    base = tmp_path / CIFAR100.base_folder
    sums = {name: write_pickle(base / name, cifar_batch(i, "fine_labels")) for i, name in enumerate(("train", "test"))}
    meta = write_pickle(base / "meta", {"fine_label_names": ["ant", "bee", "cow"]})
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": meta})
    raw = load_raw("cifar100", str(tmp_path))
    assert (raw.class_names, raw.test.labels.max()) == (("ant", "bee", "cow"), 2)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_failed_download_says_where_to_put_the_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed download is an error that names the archive, its address and the folder."""

    def offline(*args: Any, **kwargs: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(DatasetError, match=r"could not be downloaded .*no route") as caught:
        load_raw(name, str(tmp_path))
    assert str(tmp_path) in caught.value.remedy
    assert "https://" in caught.value.remedy


def test_altered_cifar_file_is_never_unpickled(cifar10: Path) -> None:
    """A file with another MD5 sum is refused before its pickle, which could run anything, is opened."""

    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(cifar10 / "exploded"),))

    write_pickle(cifar10 / "cifar-10-batches-py" / "data_batch_1", Bomb())
    with pytest.raises(DatasetError, match="could not be read"):
        load_raw("cifar10", str(cifar10), download=False)
    assert not (cifar10 / "exploded").exists()


# -------------------------------------------------------------------------------------------------- Tiny-ImageNet


def tiny_files(encode: Encode) -> dict[str, bytes]:
    """Two classes in the official layout; the first training image is a grayscale JPEG."""
    files = {"wnids.txt": b"n02\nn01\n", "words.txt": b"n01\tgoldfish, Carassius auratus\nn02\tbell\nn03\tx\n"}
    for value, wnid in ((50, "n01"), (150, "n02")):
        for i in range(4):
            mode = "L" if (wnid, i) == ("n01", 0) else "RGB"
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = encode(value + i, (64, 64), mode, "JPEG")
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b"n01_0.JPEG\t0\t0\t63\t63\n"
        files[f"val/images/val_{value}.JPEG"] = encode(value, (64, 64), "RGB", "JPEG")
    files["val/val_annotations.txt"] = b"val_50.JPEG\tn01\t0\t32\t44\t62\nval_150.JPEG\tn02\t0\t32\t44\t62\n"
    files["test/images/test_0.JPEG"] = encode(0, (64, 64), "RGB", "JPEG")
    return files


def write_zip(path: Path, files: dict[str, bytes], prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(prefix + name, content)
    return path


def test_tiny_imagenet_zip_and_folder_are_the_same_data_set(tmp_path: Path, encode: Encode) -> None:
    """The zip archive, the folder in it and the folder above that give one data set."""
    files = tiny_files(encode)
    paths = (
        write_zip(tmp_path / "tiny-imagenet-200.zip", files, "tiny-imagenet-200/"),
        write_files(tmp_path / "above" / "tiny-imagenet-200", files),
        tmp_path / "above",
    )
    raws = [load_raw("tiny-imagenet", str(path)) for path in paths]
    assert len({raw.fingerprint for raw in raws}) == 1
    raw = raws[0]
    assert (raw.class_names, raw.channels, raw.size) == (("bell", "goldfish"), 3, (64, 64))
    assert [len(images) for images in sets_of(raw)] == [6, 2, 2]


def test_tiny_imagenet_tests_on_the_official_validation_set(tmp_path: Path, encode: Encode) -> None:
    """The official validation set becomes the test set, with classes numbered as in wnids.txt."""
    raw = load_raw("tiny-imagenet", str(write_files(tmp_path, tiny_files(encode))))
    assert dict(zip(raw.test.labels.tolist(), raw.test.images[:, 0, 0, 0].tolist(), strict=True)) == {1: 50, 0: 150}


def test_tiny_imagenet_classes_that_share_a_word_keep_their_ids(tmp_path: Path, encode: Encode) -> None:
    """Tiny ImageNet classes that share a word get unique names by their ids."""
    files = tiny_files(encode) | {"words.txt": b"n01\tcrane, bird\nn02\tcrane, machine\n"}
    assert load_raw("tiny-imagenet", str(write_files(tmp_path, files))).class_names == ("n02", "n01")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val/val_annotations.txt": b"val_50.JPEG\tn77\t0\n"}, "without a known class: val_50.JPEG n77"),
        ({"wnids.txt": b"n08\nn09\n", "val/val_annotations.txt": b""}, "no training images"),
        ({"val/images/val_50.JPEG": b"not a picture"}, "val_50.JPEG cannot be read"),
    ],
)
def test_damaged_tiny_imagenet_is_named(change: dict[str, bytes], message: str, tmp_path: Path, encode: Encode) -> None:
    """Each kind of damage to Tiny ImageNet gives an error of its own."""
    with pytest.raises(DatasetError, match=message):
        load_raw("tiny-imagenet", str(write_files(tmp_path, tiny_files(encode) | change)))


def test_incomplete_tiny_imagenet_names_the_missing_file(tmp_path: Path, encode: Encode) -> None:
    """A Tiny ImageNet archive without its class list is an error that names the missing file."""
    files = {name: content for name, content in tiny_files(encode).items() if name != "wnids.txt"}
    with pytest.raises(DatasetError, match=r"has no file wnids\.txt"):
        load_raw("tiny-imagenet", str(write_zip(tmp_path / "tiny.zip", files)))


def test_tiny_imagenet_without_a_path_looks_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny ImageNet without a path is looked for in the cache, and the error names that place."""
    monkeypatch.setattr("datm_ray.data.reading.readers.DEFAULT_FOLDER", tmp_path)
    with pytest.raises(DatasetError, match=r"tiny-imagenet-200\.zip does not exist"):
        load_raw("tiny-imagenet")


# --------------------------------------------------------------------------------------------------------- folder


def folder_files(encode: Encode, roles: tuple[str, ...], count: int = 10, **options: Any) -> dict[str, bytes]:
    """Two classes below each role, values 0.. for ants and 100.. for bees."""
    return {
        f"{role}{name}/{i:02}.png": encode(value + i, **options)
        for role in roles
        for value, name in ((0, "ants"), (100, "bees"))
        for i in range(count)
    }


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folder_with_train_and_test(held_out: str, tmp_path: Path, encode: Encode) -> None:
    """Class folders below train and test (or val) are two sets, also of images that are not square."""
    root = write_files(tmp_path / "insects", folder_files(encode, ("train/", f"{held_out}/")))
    raw = load_raw("folder", str(root))
    assert (raw.name, raw.class_names, raw.channels, raw.size) == ("insects", ("ants", "bees"), 3, (4, 6))
    assert [len(images) for images in sets_of(raw)] == [18, 2, 20]
    assert (raw.test.labels == raw.test.images[:, 0, 0, 0] // 100).all()


@pytest.mark.parametrize("role", ["", "train/"])
def test_folder_without_a_test_set_is_split(role: str, tmp_path: Path, encode: Encode) -> None:
    """A folder without a test set holds out a fixed share of each class."""
    raw = load_raw("folder", str(write_files(tmp_path, folder_files(encode, (role,)))))
    assert [len(images) for images in sets_of(raw)] == [14, 2, 4]
    assert not contents(raw.train) & contents(raw.test)


def test_folder_may_be_a_zip_archive(tmp_path: Path, encode: Encode) -> None:
    """A folder source reads a zip archive without unpacking it."""
    files = folder_files(encode, ("",)) | {"__MACOSX/ants/._00.png": b"", "ants/.hidden.png": b"", "note.txt": b""}
    raw = load_raw("folder", str(write_zip(tmp_path / "insects.zip", files)))
    assert (raw.name, raw.class_names) == ("insects", ("ants", "bees"))


def test_all_grayscale_stays_one_channel(tmp_path: Path, encode: Encode) -> None:
    """A set of grayscale images only keeps one channel."""
    raw = load_raw("folder", str(write_files(tmp_path, folder_files(encode, ("",), mode="L"))))
    assert raw.train.images.shape[1:] == (1, 4, 6)


def test_mixed_modes_become_rgb(tmp_path: Path, encode: Encode) -> None:
    """One colour image is enough to make the whole set RGB."""
    files = folder_files(encode, ("",), mode="L") | {"ants/zz.png": encode(7, mode="RGBA")}
    assert load_raw("folder", str(write_files(tmp_path, files))).channels == 3


def test_mixed_sizes_need_resize(tmp_path: Path, encode: Encode) -> None:
    """Mixed sizes are an error that names two images and the option; with that option the set is read."""
    files = folder_files(encode, ("",)) | {"ants/zz.png": encode(7, size=(9, 5))}
    root = str(write_files(tmp_path, files))
    with pytest.raises(DatasetError, match=r"00\.png is 6x4, .*zz\.png is 9x5.*resize=4"):
        load_raw("folder", root)
    assert load_raw("folder", root, resize=5).size == (5, 5)


def write_photos(folder: Path, header: Encode, kind: str, sizes: list[tuple[int, int]]) -> str:
    """A folder or Parquet file of two classes whose images are headers of these sizes. Returns its path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "folder":
        files = {f"{'ants' if i % 2 else 'bees'}/{i:03}.png": header(*size) for i, size in enumerate(sizes)}
        return str(write_files(folder / "photos", files))
    images = [{"bytes": header(*size)} for size in sizes]
    pq.write_table(pa.table({"image": images, "label": [i % 2 for i in range(len(sizes))]}), folder / "photos.parquet")
    return str(folder / "photos.parquet")


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_images_beyond_memory_are_refused_by_their_headers(
    kind: str, tmp_path: Path, header: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images too large for memory, all copies counted, are refused undecoded, with a size that fits."""
    monkeypatch.setattr(decode, "available_memory", lambda: 2**30)
    path = write_photos(tmp_path, header, kind, [(4000, 3000)] * 40)
    message = r"40 images of 3x3000x4000, such as .*photos.*, need 6\.71 GiB of memory, and 1 GiB is free.*resize=128"
    with pytest.raises(DatasetError, match=message):
        load_raw(kind, path)
    with pytest.raises(DatasetError, match=r"need 12\.1 GiB.*twice more"):
        load_raw(kind, path, copies=2)
    with pytest.raises(DatasetError, match=r"40 images of 3x2000x2000.*resize=128"):
        load_raw(kind, path, resize=2000)
    with pytest.raises(DatasetError, match="cannot be read"):  # small enough: now it is decoded
        load_raw(kind, path, resize=128)
    monkeypatch.setattr(decode, "available_memory", lambda: 1000)
    with pytest.raises(DatasetError, match="Use fewer images"):
        load_raw(kind, path)


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_mixed_sizes_are_refused_by_their_headers(kind: str, tmp_path: Path, header: Encode) -> None:
    """Mixed sizes are refused before decoding, with a size fit for distillation."""
    path = write_photos(tmp_path, header, kind, [(4000, 3000)] * 9 + [(3000, 4000)])
    with pytest.raises(DatasetError, match=r"differ in size: .*4000x3000, .*3000x4000.*resize=128"):
        load_raw(kind, path)


def test_resized_digits_and_cifar_are_refused_before_they_are_resized(
    cifar10: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digits and CIFAR resized beyond memory are refused before they are resized."""
    with pytest.raises(DatasetError, match=r"1,797 images of 1x8000x8000 need .*resize=128"):
        load_raw("digits", resize=8000)
    with pytest.raises(DatasetError, match=r"images of 3x90000x90000 need .*resize=128"):
        load_raw("cifar10", str(cifar10), resize=90_000)
    monkeypatch.setattr(decode, "available_memory", lambda: 1000)
    with pytest.raises(DatasetError, match=r"images of 3x32x32 need"):
        load_raw("cifar10", str(cifar10))


def test_images_are_resized_one_by_one(tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among forty images at most one for each thread is in memory at full size."""
    monkeypatch.setattr(decode.os, "cpu_count", lambda: 2)
    root = write_files(tmp_path, folder_files(encode, ("",), count=20, size=(700, 500)))
    load_raw("folder", str(root), resize=8)  # loads Pillow's own modules before memory is measured
    tracemalloc.start()
    try:
        raw = load_raw("folder", str(root), resize=8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert raw.size == (8, 8)
    assert peak < 4 * 700 * 500 * 3


def test_resize_is_antialiased(tmp_path: Path, encode: Encode) -> None:
    """Shrinking a fine checkerboard gives gray, not one of its two colours."""
    board = Image.fromarray((np.indices((32, 32)).sum(axis=0) % 2 * 255).astype(np.uint8))
    files = folder_files(encode, ("",), mode="L")
    root = write_files(tmp_path, files)
    for path in (root / "ants").iterdir():
        board.save(path)
    raw = load_raw("folder", str(root), resize=4)
    ants = raw.train.images[raw.train.labels == 0]
    assert np.abs(ants.astype(int) - 127).max() < 20


@pytest.mark.parametrize(
    ("roles", "added", "message"),
    [
        (("",), {"ants/zz.png": b"\x89PNG nonsense"}, r"zz\.png cannot be read \(no image of a known kind\)"),
        (("train/", "test/"), {"test/cows/0.png": b""}, r"class 'cows' that the training folder lacks"),
        (("one/", "two/"), {}, r"no images in one, two, but folders.* train and test"),
        (("insects/",), {}, r"has 1 class.*'insects'"),  # nearly always a path one level off
        ((), {}, "no training images found"),
    ],
)
def test_bad_folder_is_explained(
    roles: tuple[str, ...], added: dict[str, bytes], message: str, tmp_path: Path, encode: Encode
) -> None:
    """Each fault of a folder of images gives an error of its own."""
    root = write_files(tmp_path, folder_files(encode, roles) | added)
    with pytest.raises(DatasetError, match=message):
        load_raw("folder", str(root))


def test_large_photographs_are_read_and_larger_ones_refused_rightly(
    tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Photos of 89 megapixels are read; twice that is an error that says to scale down."""
    root = str(write_files(tmp_path, folder_files(encode, ("",))))  # images of 24 pixels
    expected = load_raw("folder", root, resize=3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert load_raw("folder", root, resize=3).fingerprint == expected.fingerprint
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DatasetError, match=r"\.png is too large \(Image size \(24 pixels\) .*\. Scale it down\.$"):
        load_raw("folder", root, resize=3)


def test_truncated_image_is_named(tmp_path: Path, encode: Encode) -> None:
    """A whole header with truncated pixels is an error that names the file."""
    files = folder_files(encode, ("",), size=(64, 64), format="BMP")
    files["bees/03.png"] = files["bees/03.png"][:500]
    with pytest.raises(DatasetError, match=r"bees/03\.png cannot be read"):
        load_raw("folder", str(write_files(tmp_path, files)))


def test_class_missing_from_the_test_folder_is_named(tmp_path: Path, encode: Encode) -> None:
    """A training class missing from the test folder is an error that names it."""
    files = {name: data for name, data in folder_files(encode, ("train/", "test/")).items() if "test/bees" not in name}
    with pytest.raises(DatasetError, match=r"test set has no image of 1 of 2 classes, 'bees'"):
        load_raw("folder", str(write_files(tmp_path, files)))


def test_two_images_of_a_class_are_too_few(tmp_path: Path, encode: Encode) -> None:
    """A class of two images, too few for three sets, is an error that names class and set."""
    with pytest.raises(DatasetError, match=r"class 'ants' has 1 image.*validation set"):
        load_raw("folder", str(write_files(tmp_path, folder_files(encode, ("",), count=2))))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_misspelt_folder_is_not_made_and_filled(name: str, tmp_path: Path) -> None:
    """A download creates at most the last folder of a path, so a misspelt path is an error."""
    with pytest.raises(DatasetError, match=r"typo/deep does not exist. Give the folder of cifar-10"):
        load_raw(name, str(tmp_path / "typo/deep"))
    assert list(tmp_path.iterdir()) == []


def test_parts_are_known_by_their_usual_names(tmp_path: Path, encode: Encode) -> None:
    """Folders with the usual names of parts, in any case, are never taken for classes."""
    root = write_files(tmp_path, folder_files(encode, ("Training/", "Validation/")))
    raw = load_raw("folder", str(root))
    assert raw.class_names == ("ants", "bees")
    assert [len(images) for images in sets_of(raw)] == [18, 2, 20]


@pytest.mark.parametrize("name", ["folder", "tiny-imagenet", "parquet"])
def test_missing_path_is_named(name: str, tmp_path: Path) -> None:
    """A path that does not exist is an error that repeats it."""
    with pytest.raises(DatasetError, match=r"nowhere"):
        load_raw(name, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["folder", "parquet"])
def test_path_left_out_is_asked_for(name: str) -> None:
    """A source without a default place is an error that asks for a path."""
    with pytest.raises(DatasetError, match=f"'{name}' needs a path"):
        load_raw(name)


def test_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    """A file that is no archive is refused where a folder is expected."""
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DatasetError, match="neither a folder nor a zip archive"):
        load_raw("folder", str(tmp_path / "notes.txt"))


# -------------------------------------------------------------------------------------------------------- Parquet

LABELS = [0, 1, 2] * 10


def test_parquet_folder_with_class_names(tmp_path: Path, write_parquet: WriteParquet) -> None:
    """Parquet files called train and test are two sets, with class names from Hugging Face metadata."""
    names = ("ant", "bee", "cow")
    write_parquet(tmp_path / "bugs" / "train-00000-of-00001.parquet", LABELS, class_names=names)
    write_parquet(tmp_path / "bugs" / "test-00000-of-00001.parquet", LABELS[:6], class_names=names)
    raw = load_raw("parquet", str(tmp_path / "bugs"))
    assert (raw.name, raw.class_names, raw.channels, raw.size) == ("bugs", names, 3, (4, 6))
    assert [len(images) for images in sets_of(raw)] == [27, 3, 6]
    assert (raw.test.images[:, 0, 0, 0] // 10 == raw.test.labels).all()


def test_parquet_shards_are_one_set(tmp_path: Path, write_parquet: WriteParquet) -> None:
    """Parquet shards, also in sub-folders, equal one file with all rows."""
    parts = (LABELS[:15], LABELS[15:])
    for i, part in enumerate(parts):
        images = [{"bytes": encode_value(10 * x + (15 * i + j) % 10)} for j, x in enumerate(part)]
        write_parquet(tmp_path / "shards" / "data" / f"train-{i}.parquet", part, images=images)
    write_parquet(tmp_path / "shards" / "data" / "val.parquet", LABELS[:6])
    pair = [write_parquet(tmp_path / "a.parquet", LABELS), write_parquet(tmp_path / "b.parquet", LABELS[:6])]
    sharded = load_raw("parquet", str(tmp_path / "shards"))
    assert sharded.fingerprint == load_raw("parquet", ",".join(map(str, pair))).fingerprint


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["categories", "categories in structs", "views", "views in structs", "large"])
def test_every_arrow_type_of_bytes_is_read_alike(
    kind: str, streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images as dictionary codes, views or large bytes load like plain bytes, however many rows share a dictionary."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from datm_ray.data.reading import parquet

    monkeypatch.setattr(parquet, "DECODED_FREE", 0)
    monkeypatch.setattr(parquet, "DECODED_RATIO", 3)  # the dictionary must not be counted for each 16 rows
    kinds = {"views": (pa.binary_view(), pa.string_view()), "large": (pa.large_binary(), pa.large_string())}
    encoded = [b"P5 4 4 255\n" + bytes([i % 256, i // 256] * 8) for i in range(600)]
    image, label = pa.array(encoded, pa.binary()), pa.array([f"class {i % 3}" for i in range(600)])
    tables = [{"image": image, "label": label}]
    if kind.startswith("categories"):
        tables.append({name: column.dictionary_encode() for name, column in tables[0].items()})
    else:
        types = kinds[kind.split()[0]]
        tables.append({"image": image.cast(types[0]), "label": label.cast(types[1])})
    if kind.endswith("structs"):
        tables[1]["image"] = pa.StructArray.from_arrays([tables[1]["image"]], ["bytes"])
    raws = []
    for number, table in enumerate(tables):
        pq.write_table(pa.table(table), tmp_path / f"{number}.parquet", compression="none")
        raws.append(load_raw("parquet", str(tmp_path / f"{number}.parquet"), resize=4, streamed=streamed))
    for plain, other in zip(*map(sets_of, raws), strict=True):
        assert np.array_equal(plain.images[:], other.images[:])
        assert np.array_equal(plain.labels, other.labels)
    assert raws[1].class_names == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["data/train-00000-of-00001.parquet"], ""),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], ""),
        (["train-00000-of-00002-a1.parquet", "train-00001-of-00002-b2.parquet"], ""),
        (["train-1-of-2.parquet", "train-2-of-2.parquet"], ""),
        (["data/train-00000-of-00002.parquet"], r"data/train-00001-of-00002\.parquet is missing in .* 1 of 2 files"),
        (["train-00001-of-00003.parquet", "train-00002-of-00003.parquet"], r"train-00000-of-00003\.parquet is missing"),
        (["train.parquet", "test-00001-of-00002.parquet"], r"test-00000-of-00002\.parquet is missing"),
        (["train.parquet", "test.parquet", "val-00000-of-00002.parquet"], ""),  # not used
        (["train-00000-of-00001.parquet", "train-00000-of-00002.parquet"], "were written twice"),
        (["train-00000-of-00001-a1.parquet", "train-00000-of-00001-b2.parquet"], "were written twice"),
    ],
)
def test_numbered_files_must_all_be_there(
    names: list[str], message: str, tmp_path: Path, write_parquet: WriteParquet
) -> None:
    """A folder of numbered Parquet files is refused if one of them is missing, or if they were written twice."""
    for name in names:
        write_parquet(tmp_path / name, LABELS)
    require_parquet(tmp_path, message)


def test_parquet_files_in_a_folder_without_images_are_named(tmp_path: Path, write_parquet: WriteParquet) -> None:
    """Reading Parquet files as a folder of images is an error that says how they are read."""
    write_parquet(tmp_path / "data" / "train.parquet", LABELS)
    (tmp_path / "banner.png").write_bytes(encode_value(1))
    with pytest.raises(DatasetError, match=r"It holds Parquet files \(1\): give the folder of the Parquet files"):
        load_raw("folder", str(tmp_path))


def test_a_numbered_file_may_be_used_alone(tmp_path: Path, write_parquet: WriteParquet) -> None:
    """The path of one numbered file is taken, and a note says that there are more."""
    raw = load_raw("parquet", str(write_parquet(tmp_path / "train-00000-of-00002.parquet", LABELS)))
    assert raw.notes == ("train-00000-of-00002.parquet is one of 2 numbered files",)


def encode_value(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), value, dtype=np.uint8)).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("columns", [("img", "fine_label"), ("image", "labels")])
def test_parquet_column_names(columns: tuple[str, str], tmp_path: Path, write_parquet: WriteParquet) -> None:
    """The usual image and label columns are found; without metadata class names are numbers."""
    raw = load_raw("parquet", str(write_parquet(tmp_path / "bugs.parquet", LABELS, columns=columns)))
    assert (raw.name, raw.class_names) == ("bugs", ("0", "1", "2"))
    assert [len(images) for images in sets_of(raw)] == [21, 3, 6]


def test_parquet_of_plain_bytes(tmp_path: Path, write_parquet: WriteParquet) -> None:
    """An image column of plain bytes is read like a struct of bytes, also from a single file in a folder."""
    write_parquet(tmp_path / "bugs.parquet", LABELS, images=[encode_value(x) for x in LABELS])
    assert load_raw("parquet", str(tmp_path)).classes == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ("photo", "label")}, r"no column 'image' or 'img'.*columns are 'photo', 'label'"),
        ({"columns": ("image", "species")}, r"no column 'label'.*columns are 'image', 'species'"),
        ({"images": [{"path": "x.png"}] * 30}, r"image column .* holds struct<path"),
        ({"images": [{"bytes": None}, *[{"bytes": b"x"}] * 29]}, r"1 row without image bytes"),
        ({"images": [{"bytes": b"x"}] * 30}, r"30 of 30 images cannot be read, .*: bad\.parquet row 0 \("),
        ({"class_names": ("ant", "bee")}, r"label 2, outside 0\.\.1"),
        ({"class_names": ("ant", "bee", "cow", "dog")}, r"no image of 1 of 4 classes, 'dog'"),
        ({"labels": [0, 1, -1] * 10}, r"label -1, outside 0\.\.1"),
        ({"labels": [0, 1, 10**12] * 10}, r"label 1000000000000, outside"),
        ({"labels": [0, 1, 3] * 10}, r"no image of 1 of 4 classes, '2'"),
    ],
)
def test_bad_parquet_is_explained(
    options: dict[str, Any], message: str, tmp_path: Path, write_parquet: WriteParquet
) -> None:
    """Each fault of a Parquet file, also in its labels, gives an error of its own."""
    images = [{"bytes": encode_value(i)} for i in range(30)]
    path = write_parquet(tmp_path / "bad.parquet", **{"labels": LABELS, "images": images} | options)
    with pytest.raises(DatasetError, match=message):
        load_raw("parquet", str(path))


def test_unreadable_parquet_is_named(tmp_path: Path) -> None:
    """A truncated Parquet file is an error that names it."""
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DatasetError, match=r"train\.parquet cannot be read as Parquet"):
        load_raw("parquet", str(tmp_path))


def test_parquet_without_rows_is_refused(tmp_path: Path, write_parquet: WriteParquet) -> None:
    """A Parquet table without rows is an error."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())])
    pq.write_table(schema.empty_table(), tmp_path / "train.parquet")
    with pytest.raises(DatasetError, match="no training images found"):
        load_raw("parquet", str(tmp_path))


def test_parquet_folder_without_training_files_lists_what_it_holds(tmp_path: Path, write_parquet: WriteParquet) -> None:
    """A folder with no training file by name is an error that lists its files."""
    for name in ("a", "b"):
        write_parquet(tmp_path / f"{name}.parquet", LABELS)
    with pytest.raises(DatasetError, match=r"no Parquet file of training images\. It holds a\.parquet, b\.parquet"):
        load_raw("parquet", str(tmp_path))


@pytest.mark.parametrize("other", ["other-train.parquet", "test.parquet"])
def test_parquet_files_of_two_data_sets_are_not_mixed(other: str, tmp_path: Path, write_parquet: WriteParquet) -> None:
    """Shards or test files with other class names are an error."""
    write_parquet(tmp_path / "train.parquet", LABELS, class_names=("ant", "bee", "cow"))
    write_parquet(tmp_path / other, LABELS, class_names=("car", "bus", "van"))
    with pytest.raises(DatasetError, match="different classes"):
        load_raw("parquet", str(tmp_path))


# -------------------------------------------------------------------------------------------- options and registry


@pytest.mark.parametrize(("typed", "meant"), [("cifar-10", "cifar10"), ("tinyimagenet", "tiny-imagenet")])
def test_unknown_source_suggests_the_nearest(typed: str, meant: str) -> None:
    """An unknown source is an error that lists the known ones and suggests the nearest."""
    with pytest.raises(DatasetError, match=rf"Known are cifar10, .*Did you mean '{meant}'"):
        load_raw(typed)


@pytest.mark.parametrize("options", [{"validation": 0.0}, {"validation": 1.0}, {"resize": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    """Shares outside 0 to 1 and sizes below 1 are errors."""
    (name,) = options
    with pytest.raises(DatasetError, match=f"{name}="):
        load_raw("digits", **options)


def test_a_source_is_one_decorated_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's source is one decorated function, checked and split like built-in ones."""
    monkeypatch.setattr(sources, "_SOURCES", dict(sources._SOURCES))

    @source("stripes")
    def stripes(request: Request) -> Loaded:
        images = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8)
        return Loaded("stripes", ("even", "odd"), ImageSet(images, np.arange(20) % 2), None)

    assert "stripes" in known_sources()
    assert [len(images) for images in sets_of(load_raw("stripes"))] == [14, 2, 4]


# ---------------------------------------------------------------------------------------------------- real images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "size", "classes"), [("cifar10-{}.parquet", 32, 10), ("tinyimagenet-*{}.parquet", 64, 200)]
)
def test_real_photographs(pattern: str, size: int, classes: int) -> None:
    """Real Hugging Face files, in the folder DATM_RAY_TEST_DATA, are read whole."""
    folder = Path(os.environ.get("DATM_RAY_TEST_DATA", "absent"))
    train = sorted(folder.glob(pattern.format("train")))
    test = sorted(folder.glob(pattern.format("test"))) or sorted(folder.glob(pattern.format("val")))
    if not train or not test:
        pytest.skip("DATM_RAY_TEST_DATA names no folder with these files")
    raw = load_raw("parquet", f"{train[0]},{test[0]}")
    assert (raw.channels, raw.size, raw.classes) == (3, (size, size), classes)
    assert np.ptp(np.bincount(raw.train.labels)) == 0
    assert 100 < raw.train.images.mean() < 140
