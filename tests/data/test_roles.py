"""Tests which files train and which test: by whole words of their names, and only with labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datm_ray.data import load_raw
from datm_ray.data.splits import TEST_FRACTION, role_of
from datm_ray.errors import DatasetError
from datm_ray.words import percent
from tests.data.conftest import Encode, WriteParquet, require_parquet

LABELS = [0, 1, 2] * 10


def test_a_whole_word_of_the_nearest_name_is_the_role() -> None:
    """The role is a whole word of the file's name or else its folder's; two roles in a name are none."""
    for path, role in {
        "train_test_split/train.parquet": "train",
        "train_test_split/test.parquet": "test",
        "retrain/0000.parquet": None,
        "retrain/train-test/0000.parquet": None,
        "default/partial-train/0000.parquet": "train",
        "train/validation-00000-of-00001.parquet": "val",
        "latest/contest_evaluation.parquet": None,
        "train/test/0.parquet": "test",
        "TRAIN.parquet": "train",
        "cifarTrain0.parquet": "train",
        "x/dev_2.parquet": "val",
        "valid training/part.parquet": None,
        "prétrain.parquet": None,
        "0testing1.parquet": "test",
    }.items():
        assert role_of(*reversed(path.split("/"))) == role, path


def parquet_notes(
    root: Path, write_parquet: WriteParquet, files: dict[str, list[object]]
) -> tuple[tuple[int, ...], str]:
    """Sizes of the training, validation and test sets of a folder with these labels, and the note on its files."""
    for name, labels in files.items():
        images = [{"bytes": encoded(len(name) + i)} for i in range(len(labels))]
        write_parquet(root / name, labels, images=images)
    raw = load_raw("parquet", str(root))
    return (len(raw.train), len(raw.validation), len(raw.test)), raw.notes[-1]


def encoded(value: int) -> bytes:
    """A small image in a format that needs no encoder."""
    return b"P5 2 2 255\n" + bytes([value % 256] * 4)


def test_parquet_files_go_where_their_names_say(tmp_path: Path, write_parquet: WriteParquet) -> None:
    """Parquet files go to the set in their name, files without labels are not used, and a note says so."""
    few, none, nothing = LABELS[:6], [-1] * 6, [None] * 6
    for number, (files, sizes, note) in enumerate(
        (
            (
                {
                    "train_test_split/train.parquet": LABELS,
                    "train_test_split/test.parquet": few,
                    "retrain/0.parquet": few,
                },
                (27, 3, 6),
                "training images: train_test_split/train.parquet; test images: train_test_split/test.parquet; "
                "not used: retrain/0.parquet",
            ),
            (
                {"train.parquet": LABELS, "test.parquet": none, "val.parquet": few},
                (27, 3, 6),
                "training images: train.parquet; test images: val.parquet; not used: test.parquet",
            ),
            (
                {"train.parquet": LABELS, "test.parquet": nothing},
                (21, 3, 6),
                "training images: train.parquet; test images: a fixed 20\N{NO-BREAK SPACE}% of each class of these; "
                "not used: test.parquet (without labels)",
            ),
            (
                {"train.parquet": LABELS, "test.parquet": few, "dev.parquet": few},
                (27, 3, 6),
                "training images: train.parquet; test images: test.parquet; not used: dev.parquet",
            ),
            (
                {f"train-{i}.parquet": LABELS for i in range(5)},
                (108, 12, 30),
                "training images: train-0.parquet, train-1.parquet, train-2.parquet and 2 more; "
                "test images: a fixed 20\N{NO-BREAK SPACE}% of each class of these",
            ),
        )
    ):
        assert parquet_notes(tmp_path / f"{number}", write_parquet, files) == (sizes, note)


def test_a_test_file_without_a_label_column_is_not_the_test_set(tmp_path: Path, write_parquet: WriteParquet) -> None:
    """A test file without labels, as competitions publish it, is not the test set."""
    write_parquet(tmp_path / "train.parquet", LABELS)
    write_parquet(tmp_path / "test.parquet", LABELS[:6], columns=("image", "id"))
    raw = load_raw("parquet", str(tmp_path))
    assert len(raw.test) == 6
    assert raw.notes[-1].endswith("not used: test.parquet (without labels)")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["160px/train-0.parquet", "320px/train-0.parquet"], "the folders 160px and 320px in .* all hold training"),
        (["160px/train/0.parquet", "320px/train/0.parquet", "160px/test/0.parquet"], "all hold training images"),
        (["train.parquet", "copy/train.parquet"], r"the folders \. and copy in .* all hold training images"),
        (["train.parquet", "a/test.parquet", "b/test.parquet"], "the folders a and b in .* all hold test images"),
        (["train.parquet", "test.parquet", "a/val.parquet", "b/val.parquet"], ""),  # not used
        (["train/0.parquet", "test/0.parquet"], ""),
        (["train/2024/0.parquet", "train/2025/0.parquet"], ""),
        (["train/2024/train-0.parquet", "train/2025/train-0.parquet"], ""),
        (["train/part-0.parquet", "train/train-extra.parquet"], ""),
        (["data/train-a.parquet", "data/train-b.parquet", "data/test.parquet"], ""),
        (["default/partial-train/0.parquet", "default/test/0.parquet"], ""),
    ],
)
def test_configurations_of_one_repository_are_not_merged(
    names: list[str], message: str, tmp_path: Path, write_parquet: WriteParquet
) -> None:
    """Training files in several folders are refused, and test files too; parts of one training folder are not."""
    for name in names:
        write_parquet(tmp_path / name, LABELS)
    require_parquet(tmp_path, message)


def test_a_comma_may_be_in_a_name(tmp_path: Path, write_parquet: WriteParquet) -> None:
    """A path with a comma that exists is one path, not a pair of paths."""
    path = write_parquet(tmp_path / "cats, dogs" / "a,b.parquet", LABELS)
    assert load_raw("parquet", str(path)).fingerprint == load_raw("parquet", str(path.parent)).fingerprint


# --------------------------------------------------------------------------------------------- labels that are texts


def write_texts(path: Path, labels: pa.Array) -> Path:
    images = [{"bytes": encoded(i)} for i in range(len(labels))]
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


def test_labels_that_are_texts_are_the_names_of_the_classes(tmp_path: Path) -> None:
    """Text labels are numbered alphabetically, alike in every shard and set, also as categories."""
    names = ["dog", "ant", "cat"] * 10
    codes = pa.array([0, 1, 2] * 10, pa.int8())
    other = pa.array([2, 1, 0] * 10, pa.int8())
    train = [
        pa.array(names),
        pa.array(names, pa.large_string()),
        pa.DictionaryArray.from_arrays(codes, ["dog", "ant", "cat"]),
        pa.DictionaryArray.from_arrays(other, ["cat", "ant", "dog"]),
        pa.array(names).dictionary_encode(),
    ]
    raws = []
    for number, column in enumerate(train):
        write_texts(tmp_path / str(number) / "train-1.parquet", column)
        write_texts(tmp_path / str(number) / "train-2.parquet", pa.array(["cat", "cat"]).dictionary_encode())
        write_texts(tmp_path / str(number) / "test.parquet", pa.array(["dog", "cat", "ant"]))
        raws.append(load_raw("parquet", str(tmp_path / str(number)), validation=0.5))
    assert {raw.class_names for raw in raws} == {("ant", "cat", "dog")}
    assert {raw.fingerprint for raw in raws} == {raws[0].fingerprint}
    assert raws[0].test.labels.tolist() == [2, 1, 0]
    pixels, labels = (
        np.concatenate([getattr(of, each) for of in (raws[0].train, raws[0].validation)])
        for each in ("images", "labels")
    )
    assert sorted(zip(pixels[:, 0, 0, 0].tolist(), labels.tolist(), strict=True))[2:5] == [(1, 0), (1, 1), (2, 1)]


def test_texts_and_numbers_that_are_no_labels_are_named(tmp_path: Path) -> None:
    """Unknown test classes, missing texts, fractions, and shards of both kinds each give an error."""
    good = pa.array(["a", "b"] * 10)
    for train, test, words in (
        (
            good,
            pa.array(["a", "z", "b"]),
            r"test\.parquet has a class 'z' that the training files lack\. They have a, b",
        ),
        (pa.array(["a", None] * 10), good, r"holds string with 10 missing value"),
        (pa.array([0.0, 1.0] * 10), good, r"holds double with 0 missing.*names of classes, or as integers"),
        (pa.array([0, 1] * 10), good, "name different classes"),
    ):
        write_texts(tmp_path / "train.parquet", train)
        write_texts(tmp_path / "test.parquet", test)
        with pytest.raises(DatasetError, match=words):
            load_raw("parquet", str(tmp_path))
    write_texts(tmp_path / "train-2.parquet", good)
    with pytest.raises(DatasetError, match="hold different classes"):
        load_raw("parquet", str(tmp_path))


def test_categories_of_numbers_are_numbers(tmp_path: Path) -> None:
    """Categories of numbers, as pandas writes them, are read as numbers."""
    path = write_texts(tmp_path / "x.parquet", pa.array([0, 1] * 10).dictionary_encode())
    assert load_raw("parquet", str(path)).class_names == ("0", "1")


# ---------------------------------------------------------------------------------------------------------- folders


def write_folder(root: Path, counts: dict[str, int]) -> str:
    """Write this many images into each folder."""
    for number, (folder, count) in enumerate(counts.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / folder / f"{i}.pgm").write_bytes(encoded(10 * number + i))
    return str(root)


CLASSES = {"train/ant": 10, "train/bee": 10}
HELD_OUT = f"training images: train; test images: a fixed {percent(TEST_FRACTION)} of each class of these"


def test_folders_go_where_their_names_say(tmp_path: Path) -> None:
    """The test set is a test folder with the classes, else a validation folder, else held-out images."""
    for number, (more, tests, note) in enumerate(
        (
            ({}, 4, HELD_OUT),
            ({"test": 3}, 4, f"{HELD_OUT}; not used: test (3 images)"),
            ({"test/images": 3}, 4, f"{HELD_OUT}; not used: test (3 images)"),
            (
                {"test/images": 3, "val/ant": 1, "val/bee": 1},
                2,
                "training images: train; test images: val; not used: test (3 images)",
            ),
            (
                {"test/ant": 1, "test/bee": 2, "dev/ant": 1, "dev/bee": 1, "extra/x": 2},
                3,
                "training images: train; test images: test; not used: dev (2 images) and extra (2 images)",
            ),
            (
                {"retrain/ant": 1, "train_masks/ant": 1, "Testing set/ant": 1, "Testing set/bee": 2},
                3,
                "training images: train; test images: Testing set; "
                "not used: retrain (1 image) and train_masks (1 image)",
            ),
        )
    ):
        raw = load_raw("folder", write_folder(tmp_path / f"{number}", CLASSES | more))
        assert (len(raw.test), raw.notes[-1]) == (tests, note)
        assert raw.class_names == ("ant", "bee")
    raw = load_raw(
        "folder",
        write_folder(tmp_path / "words", {"seg_train/a": 5, "seg_train/b": 5, "seg_test/a": 1, "seg_test/b": 1}),
    )
    assert raw.notes[-1] == "training images: seg_train; test images: seg_test"


def test_folders_that_do_not_say_which_are_for_training_are_refused(tmp_path: Path) -> None:
    """Parts of a set are never taken for classes, and two training folders are an error."""
    for number, (counts, words) in enumerate(
        (
            (
                {"train": 10, "test": 10},
                "has a folder test, but no folder train with a folder of images for each class",
            ),
            ({"ant": 10, "bee": 10, "test": 5}, "has a folder test, but no folder train"),
            ({"ant": 10, "bee": 10, "test/ant": 5, "test/bee": 5}, "has a folder test, but no folder train"),
            ({"train_1/ant": 9, "train_1/bee": 9, "train_2/ant": 9}, "train_1 and train_2 .* are both for train"),
            (CLASSES | {"train": 2}, "train/0.pgm in .* lies in no class folder"),
            (CLASSES | {"test/cow": 1, "test/ant": 1}, "has a class 'cow' that the training folder lacks"),
            (CLASSES | {"test/Ant": 1, "test/Bee": 1}, "has a class 'Ant' that the training folder lacks"),
        )
    ):
        with pytest.raises(DatasetError, match=words):
            load_raw("folder", write_folder(tmp_path / f"{number}", counts))


def test_training_images_of_another_kind_are_not_called_absent(tmp_path: Path) -> None:
    """A train folder without readable images is an error that counts what lies in it."""
    root = Path(write_folder(tmp_path, {"test/ant": 1, "test/bee": 1}))
    (root / "train/ant").mkdir(parents=True)
    (root / "train/ant/1.heic").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"no class; 1 file or folder was not taken: \.heic 1\. Sort"):
        load_raw("folder", str(root))


def test_trains_are_a_class_like_others(tmp_path: Path) -> None:
    """A folder called train beside other image folders is a class of vehicles."""
    raw = load_raw("folder", write_folder(tmp_path, {"bus": 10, "train": 10, "test tube": 10}))
    assert raw.class_names == ("bus", "test tube", "train")


# -------------------------------------------------------------------------------------------------- Tiny-ImageNet


@pytest.mark.parametrize("inner", ["", "images/"])
@pytest.mark.parametrize("is_annotated", [False, True])
def test_a_sorted_validation_set_of_tiny_imagenet_is_read(
    inner: str, is_annotated: bool, tmp_path: Path, encode: Encode
) -> None:
    """Tiny ImageNet with validation images sorted into class folders equals the published layout."""
    pictures = {i: encode(20 * i, (8, 8), format="JPEG") for i in range(12)}
    files = {"wnids.txt": b"n01\nn02\n", "words.txt": b"n01\tant\nn02\tbee\n"}
    files |= {f"train/n0{1 + i % 2}/images/{i}.JPEG": encode(i, (8, 8), format="JPEG") for i in range(12)}
    notes = "".join(f"val_{i}.JPEG\tn0{2 - i % 2}\t0\t0\t1\t1\n" for i in range(12)).encode()
    published = files | {f"val/images/val_{i}.JPEG": pictures[i] for i in pictures} | {"val/val_annotations.txt": notes}
    by_class = files | {f"val/n0{2 - i % 2}/{inner}val_{i}.JPEG": pictures[i] for i in pictures}
    by_class |= {"val/val_annotations.txt": notes} if is_annotated else {}
    for name, tree in (("published", published), ("sorted", by_class)):
        for path, content in tree.items():
            place = tmp_path / name / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    expected, raw = (load_raw("tiny-imagenet", str(tmp_path / name)) for name in ("published", "sorted"))
    assert raw.fingerprint == expected.fingerprint
    folder = load_raw("folder", str(tmp_path / "sorted"))
    assert (folder.class_names, len(folder.test)) == (("n01", "n02"), 12)
    assert np.bincount(folder.test.labels).tolist() == [6, 6]
