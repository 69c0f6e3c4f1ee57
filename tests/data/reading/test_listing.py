"""Tests which files of a folder or archive are data: hidden files, links, suffixes, empty classes; and the notes."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datm_ray.data import load_raw
from datm_ray.data.reading import decode
from datm_ray.data.reading.contents import recognise
from datm_ray.data.reading.files import file_tree, list_folder
from datm_ray.errors import DatasetError
from tests.data.conftest import Encode, WriteParquet, write_files


@pytest.fixture
def animals(tmp_path: Path, encode: Encode) -> Path:
    """Two class folders of ten images."""
    return write_files(
        tmp_path / "animals", {f"{name}/{i:02}.png": encode(i) for name in ("cat", "dog") for i in range(10)}
    )


def packed(root: Path, archive: Path, spelt: Callable[[str], str] = str) -> Path:
    """A zip archive of a folder, with names spelt in some way."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix() + "/" * path.is_dir()
            file.writestr(spelt(name), b"" if path.is_dir() else path.read_bytes())
    return archive


HIDDEN = (
    "cat/.ipynb_checkpoints/00-checkpoint.png",
    "cat/@eaDir/00.png/SYNOPHOTO_THUMB_M.png",
    "cat/._00.png",
    "@eaDir/cat/00.png",
    "#recycle/cat/00.png",
    "@Recycle/00.png",
    "$RECYCLE.BIN/00.png",
    "System Volume Information/00.png",
    "lost+found/00.png",
    "dog/__pycache__/00.png",
    "__MACOSX/cat/._00.png",
    ".git/annex/00.png",
)


def test_hidden_files_and_folders_are_no_data(animals: Path, tmp_path: Path) -> None:
    """Each kind of hidden file or folder, in a folder or an archive, changes no image and is counted."""
    expected = load_raw("folder", str(animals))
    assert "not taken" not in " ".join(expected.notes)
    for name in HIDDEN:
        write_files(animals, {name: (animals / "cat/00.png").read_bytes()})
    for path in (animals, packed(animals, tmp_path / "animals.zip")):
        raw = load_raw("folder", str(path))
        assert raw.fingerprint == expected.fingerprint, path
        assert raw.notes[0] == f"{len(HIDDEN)} files or folders were not taken: hidden {len(HIDDEN)}"


def test_hidden_parquet_files_are_no_data(tmp_path: Path, write_parquet: WriteParquet) -> None:
    """Parquet files in a notebook's checkpoints or of macOS resources are neither read nor refused."""
    write_parquet(tmp_path / "train.parquet", [0, 1, 2] * 10)
    expected = load_raw("parquet", str(tmp_path))
    write_parquet(tmp_path / ".ipynb_checkpoints/train-checkpoint.parquet", [0, 1, 2] * 10)
    (tmp_path / "._train.parquet").write_bytes(b"\0\5\26\7")
    (tmp_path / "README.md").write_text("")
    raw = load_raw("parquet", str(tmp_path))
    assert raw.fingerprint == expected.fingerprint
    assert raw.notes == (
        "3 files or folders were not taken: hidden 2, .md 1",
        "training images: train.parquet; test images: a fixed 20\N{NO-BREAK SPACE}% of each class of these",
    )


def link(root: Path, **targets: str) -> None:
    for name, target in targets.items():
        (root / name).symlink_to(target)


def test_links_upwards_are_not_followed(animals: Path, tmp_path: Path) -> None:
    """A link to a folder above itself or to the root adds no image and does not loop."""
    expected = load_raw("folder", str(animals))
    pool = write_files(tmp_path / "pool", {"x/note.txt": b""})
    link(animals, here=".", above="..", everything="/")
    link(animals / "cat", up="..", self=".", pool=str(pool / "x"))
    link(pool / "x", pool=str(pool))
    raw = load_raw("folder", str(animals))
    assert raw.fingerprint == expected.fingerprint
    assert raw.notes[0] == "7 files or folders were not taken: links upwards 6, .txt 1"


def test_each_file_is_taken_once_by_its_path_with_fewest_links(tmp_path: Path) -> None:
    """Each file is taken once, by its path with the fewest links, in any order of listing."""
    root = write_files(tmp_path / "root", {"b/1.png": b"", "c/2.png": b"", "pool/3.txt": b""})
    write_files(tmp_path / "out", {"4.png": b"", "5.png": b"", "blob": b"", ".hidden/6.png": b""})
    link(root, a="b", d="../out", e="../out")
    link(root / "b", again="../c")
    link(
        root / "c",
        **{"0.png": "2.png", "6.png": "../../out/5.png", "7.png": "../../out/blob", "8.png": "../../out/.hidden/6.png"},
    )
    link(root / "pool", **{"4.png": "../../out/4.png", "9.png": "../c/7.png"})
    listing = list_folder(root, {".png"})
    assert listing.files == ("b/1.png", "c/2.png", "c/6.png", "c/7.png", "c/8.png", "d/4.png")
    assert listing.folders == ("a", "b", "b/again", "c", "d", "e", "pool")
    assert listing.passed_over["links to data already taken"] == 8


def test_class_folders_may_be_links(animals: Path, tmp_path: Path) -> None:
    """Links to class folders, parts and single images give what the files themselves give."""
    expected = load_raw("folder", str(animals))
    linked = tmp_path / "linked" / "animals"
    (linked / "dog").mkdir(parents=True)
    link(linked, cat=str(animals / "cat"))
    link(linked / "dog", **{path.name: str(path) for path in (animals / "dog").iterdir()})
    raw = load_raw("folder", str(linked))
    assert (raw.fingerprint, raw.notes) == (expected.fingerprint, expected.notes)


def test_a_class_without_an_image_is_refused(animals: Path, tmp_path: Path) -> None:
    """A class folder without images is an error that counts why, so that no label shifts unnoticed."""
    bee = animals / "bee"
    for message, target, files in (
        ("1 file or folder was not taken: links to data already taken 1", "cat", ()),
        ("1 file or folder was not taken: links to nothing 1", "../not mounted", ()),
        ("Its folder is empty", None, ()),
        (r"22 files or folders were not taken: \.heic 16, \.jxl 6", None, (*["HEIC"] * 16, *["jxl"] * 6)),
        ("2 files or folders were not taken: .txt 1, without a suffix 1", None, ("no suffix", "txt")),
    ):
        paths = [animals]
        if target:
            bee.symlink_to(target)
        else:
            bee.mkdir()
            write_files(bee, {f"{i}.{suffix}": b"" for i, suffix in enumerate(files)})
            paths.append(packed(animals, tmp_path / "animals.zip"))
        for path in paths:
            with pytest.raises(DatasetError, match=rf"class 'bee' of .*animals.* has no image left\. {message}\. Add"):
                load_raw("folder", str(path))
        bee.unlink() if target else shutil.rmtree(bee)


def test_suffixes_of_jpeg_and_avif_are_read(animals: Path, encode: Encode) -> None:
    """Files with .jfif and .jpe, and with every suffix that Pillow decodes here, are images."""
    from PIL import features

    expected = load_raw("folder", str(animals))
    suffixes = ["jfif", "jpe", "JPG", "webp"] + ["avif"] * ("avif" in features.get_supported_modules())
    for suffix in suffixes:
        form = {"webp": "WEBP", "avif": "AVIF"}.get(suffix, "JPEG")
        write_files(animals, {f"cat/{i}.{suffix}": encode(9, format=form) for i in range(2)})
    raw = load_raw("folder", str(animals))
    assert sum(map(len, (raw.train, raw.validation, raw.test))) == 20 + 2 * len(suffixes)
    assert raw.fingerprint != expected.fingerprint


def test_images_beside_class_folders_are_counted(animals: Path, encode: Encode) -> None:
    """Images beside class folders have no label; they are not used, and a note counts them."""
    write_files(animals, {"contact sheet.png": encode(1)})
    assert load_raw("folder", str(animals)).notes[-1].endswith("; not used: beside the folders (1 image)")


def test_archives_spelt_otherwise_are_the_same_data_set(animals: Path, tmp_path: Path) -> None:
    """An outer folder, "./", backslashes and repeated names in an archive do not change the data set."""
    expected = load_raw("folder", str(animals))
    for spelt in (str, lambda name: f"animals/{name}", lambda name: f"./{name}", lambda n: n.replace("/", "\\")):
        path = packed(animals, tmp_path / "animals.zip", spelt)
        if spelt is str:
            with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr("cat/00.png", (animals / "cat/00.png").read_bytes())
        raw = load_raw("folder", str(path))
        assert (raw.fingerprint, raw.class_names) == (expected.fingerprint, ("cat", "dog")), spelt("a/b")


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(
    animals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that cannot be read is an error, not an empty folder."""
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if path.endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DatasetError, match=r"animals/dog cannot be read \(permission denied\)\. Check .* permissions"):
        load_raw("folder", str(animals))


def test_pipes_are_not_opened(animals: Path) -> None:
    """Named pipes are skipped, because reading one blocks for ever."""
    os.mkfifo(animals / "cat/pipe.png")
    assert load_raw("folder", str(animals)).notes[0] == "1 file or folder was not taken: special files 1"


def test_names_of_files_cannot_write_to_the_terminal(tmp_path: Path, write_parquet: WriteParquet) -> None:
    """Notes show control characters in file names as escapes, and are one line each."""
    write_parquet(tmp_path / "train\x1b[2J\n.parquet", [0, 1, 2] * 10)
    (tmp_path / "x.\x1b[2J").write_bytes(b"")
    notes = load_raw("parquet", str(tmp_path)).notes
    assert notes[0] == "1 file or folder was not taken: without a suffix 1"
    assert notes[1].startswith(r"training images: train\x1b[2J .parquet;")


# ------------------------------------------------------------------------------------------ files of another kind

HEADS = {
    "empty": b"",
    "nothing but zero bytes": bytes(600),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
    "a git-annex pointer": b"../../.git/annex/objects/Qx/0W/SHA256E-s12--4d7a.png",
    "an HTML page": b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>",
    "an XML text": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a JSON text": b'{"error": "rate limit"}',
    "packed with gzip": b"\x1f\x8b\x08\0",
    "an archive of another kind": b"7z\xbc\xaf\x27\x1c",
    "a tar archive": b"cat/".ljust(257, b"\0") + b"ustar\0",
    "a HEIC image": b"\0\0\0\x18ftypheic",
    "an encrypted Parquet file": b"PARE",
    "a document": b"%PDF-1.7",
}


def test_a_file_of_another_kind_is_called_what_it_is(animals: Path, tmp_path: Path) -> None:
    """A file of another kind is called by its first bytes, with how to get the right one."""
    for name, head in HEADS.items():
        content = recognise(head)
        assert content is not None, name
        assert content.name == name
        (animals / "cat/00.png").write_bytes(head)
        (tmp_path / "x.bin").write_bytes(head)
        for source, path, words in (
            ("folder", animals, f"cat/00.png cannot be read ({name}). "),
            ("parquet", tmp_path / "x.bin", f"x.bin cannot be read as Parquet ({name}). "),
            ("folder", tmp_path / "x.bin", f"data set path {tmp_path / 'x.bin'} is {name}. "),
        ):
            with pytest.raises(DatasetError) as caught:
                load_raw(source, str(path))
            assert words in str(caught.value), (name, source)
            assert str(caught.value).endswith(f"{content.remedy}."), (name, source)


def test_encrypted_and_cut_off_archives_are_named(animals: Path, tmp_path: Path) -> None:
    """An encrypted archive and a truncated one each give an error that says so."""
    path = packed(animals, tmp_path / "animals.zip")
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=r"animals\.zip is a zip archive\. Its end is missing\. "):
        load_raw("folder", str(path))
    start = content.index(b"PK\1\2")
    content[start + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=r"animals\.zip is encrypted\. Unpack it with its password"):
        load_raw("folder", str(path))


def test_bad_images_are_counted_and_three_are_named(animals: Path, encode: Encode) -> None:
    """One message counts all bad images and names the first three, whatever is wrong."""
    (animals / "cat/01.png").write_bytes(b"")
    assert_refused(animals, r"image .*cat/01\.png cannot be read \(empty\)\. Fetch it again\.$")
    (animals / "cat/03.png").write_bytes(HEADS["an HTML page"])
    (animals / "dog/00.png").write_bytes(encode(1)[:50])
    assert_refused(
        animals,
        r"3 of 20 images cannot be read, in .*animals: cat/01\.png \(empty\), cat/03\.png \(an HTML page\) and "
        r"dog/00\.png \(image file is truncated\)\. Fetch it again\.$",
    )
    (animals / "dog/09.png").unlink()
    (animals / "dog/09.png").symlink_to("nowhere.png")
    assert_refused(animals, r"4 of 20 images .* and 1 more\. ")


def test_no_image_is_kept_while_bad_ones_are_counted(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting bad images keeps no decoded image in memory."""
    kept: list[object] = []
    require = decode._require_readable

    def watched(sets: Any, results: Any) -> Any:
        kept.extend(result for of_set in results for result in of_set)
        return require(sets, results)

    monkeypatch.setattr(decode, "_require_readable", watched)
    (animals / "cat/01.png").write_bytes(b"")
    assert_refused(animals, r"cat/01\.png cannot be read")
    assert len(kept) == 20
    assert not any(isinstance(each, Image.Image) for each in kept)


def assert_refused(path: Path, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        load_raw("folder", str(path))


def test_links_in_an_archive_are_counted(animals: Path, tmp_path: Path) -> None:
    """Links in an archive are counted and not read; each holds only another file's path."""
    archive = packed(animals, tmp_path / "animals.zip")
    plain = load_raw("folder", str(archive))
    link = zipfile.ZipInfo("cat/link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(link, "../dog/0.png")
    found = load_raw("folder", str(archive))
    assert found.notes[0] == "1 file or folder was not taken: links in an archive 1"
    assert found.fingerprint == plain.fingerprint


def test_an_archive_stays_open_while_it_is_read(animals: Path, tmp_path: Path) -> None:
    """An archive is opened once, and its names are those of an unpacked folder."""
    with file_tree(packed(animals, tmp_path / "a.zip", lambda name: f"top/{name}"), {".png"}) as tree:
        assert tree.listing.files[0] == "cat/00.png"
        assert tree.open("cat/00.png").read() == (animals / "cat/00.png").read_bytes()
