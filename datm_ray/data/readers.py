"""The built-in sources: digits, CIFAR, Tiny-ImageNet, image folders and Parquet files.

Each is one registered function from a `Request` to what it found; `datm_ray.data.sources.load_raw` does the rest. To
add a source, register a function of your own in the same way, from any module that is imported before `load_raw` runs.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from numpy.typing import NDArray

from datm_ray.data.decode import decode, require_memory, resize_images
from datm_ray.data.files import FileTree, file_tree
from datm_ray.data.parquet import find_files, read_parquet
from datm_ray.data.sources import ImageSet, Loaded, Request, source
from datm_ray.errors import DatasetError

DEFAULT_FOLDER = Path("~/.cache/datm_ray")

Named = list[tuple[str, tuple[str, ...]]]  # class name and path parts of each image


@source("digits")
def _digits(request: Request) -> Loaded:
    """scikit-learn's bundled handwritten digits: 1797 images of 8x8 pixels, values 0..16; needs no files."""
    from sklearn.datasets import load_digits

    if request.path is not None:
        raise DatasetError(
            "the digits come with scikit-learn and take no dataset.path",
            f"it is {request.path!r}",
            "leave it out, or choose another dataset.source",
        )
    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[:, None]
    levels = 16
    if request.resize is not None:
        require_memory(len(images), (1, request.resize, request.resize), request.copies)
        # Interpolated values need finer steps than sixteen.
        images, levels = resize_images(np.rint(images * (255 / 16)).astype(np.uint8), request.resize), 255
    labelled = ImageSet(images, bunch.target.astype(np.int64))
    return Loaded("digits", tuple(map(str, range(10))), labelled, None, levels)


@source("cifar10")
def _cifar10(request: Request) -> Loaded:
    """`path` is the folder that holds, or will hold, `cifar-10-batches-py`."""
    from torchvision.datasets import CIFAR10

    return _cifar("cifar10", CIFAR10, request)


@source("cifar100")
def _cifar100(request: Request) -> Loaded:
    """`path` is the folder that holds, or will hold, `cifar-100-python`. The labels are the 100 fine ones."""
    from torchvision.datasets import CIFAR100

    return _cifar("cifar100", CIFAR100, request)


def _cifar(name: str, layout: Any, request: Request) -> Loaded:
    root = Path(request.path or DEFAULT_FOLDER).expanduser()
    if root.name == layout.base_folder:
        root = root.parent
    if request.path is not None and not (root.is_dir() or root.parent.is_dir()):
        raise DatasetError(f"data set path {root} does not exist", remedy=f"Give the folder of {layout.base_folder}")
    train, test = (_cifar_part(name, layout, root, train, request.download) for train in (True, False))
    height, width = (request.resize, request.resize) if request.resize else train.data.shape[1:3]
    require_memory(len(train.data) + len(test.data), (3, height, width), request.copies)
    return Loaded(
        name=name,
        class_names=tuple(train.classes),
        train=_cifar_images(train, request.resize),
        test=_cifar_images(test, request.resize),
    )


def _cifar_part(name: str, layout: Any, root: Path, train: bool, download: bool) -> Any:
    # The official files are pickles. torchvision compares each with its published MD5 sum before it unpickles
    # anything, and raises RuntimeError where one differs; nothing here opens them on its own.
    try:
        with warnings.catch_warnings():
            # The pickles were written by Python 2 and spell a dtype in a way that numpy 2.4 warns of.
            warnings.filterwarnings("ignore", message=r"dtype\(\): align")
            return layout(str(root), train=train, download=download)
    except (OSError, RuntimeError) as error:
        raise DatasetError(
            f"the data set {name} is not in {root} and could not be {'downloaded' if download else 'read'} ({error})",
            "The files are absent or damaged" + (", and there is no network" if isinstance(error, URLError) else ""),
            f"Unpack {layout.filename} from {layout.url} there, so that {root / layout.base_folder} exists",
        ) from error


def _cifar_images(part: Any, resize: int | None) -> ImageSet:
    images = np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))
    images = images if resize is None else resize_images(images, resize)
    return ImageSet(images, np.array(part.targets, dtype=np.int64))


@source("tiny-imagenet")
def _tiny_imagenet(request: Request) -> Loaded:
    """`path` is `tiny-imagenet-200.zip` or the unpacked folder; its validation set is our test set."""
    with file_tree(_tiny_root(request.path)) as tree:
        prefix = _tiny_prefix(tree)
        wnids = [line.strip() for line in tree.lines(f"{prefix}wnids.txt")]
        label_of = {wnid: label for label, wnid in enumerate(wnids)}
        train, test = _tiny_train(tree, prefix, label_of), _tiny_test(tree, prefix, label_of)
        names = _tiny_class_names(wnids, tree.lines(f"{prefix}words.txt"))
        return _decoded("tiny-imagenet", names, tree, train, test, request)


def _tiny_root(path: str | None) -> Path:
    if path is not None:
        return Path(path).expanduser()
    unpacked = DEFAULT_FOLDER.expanduser() / "tiny-imagenet-200"
    return unpacked if unpacked.is_dir() else unpacked.with_suffix(".zip")


def _tiny_prefix(tree: FileTree) -> str:
    """What comes before `wnids.txt`: the archive, and a folder one level too high, have a top folder."""
    lists = [name for name in tree.names if name.split("/")[-1] == "wnids.txt"]
    return min(lists, key=len, default="").removesuffix("wnids.txt")


def _tiny_train(tree: FileTree, prefix: str, label_of: dict[str, int]) -> list[tuple[str, int]]:
    layout = re.compile(re.escape(prefix) + r"train/([^/]+)/images/[^/]+\.JPEG")
    matches = ((name, layout.fullmatch(name)) for name in tree.names)
    return [(name, label_of[match[1]]) for name, match in matches if match and match[1] in label_of]


def _tiny_test(tree: FileTree, prefix: str, label_of: dict[str, int]) -> list[tuple[str, int]]:
    rows = [line.split("\t") for line in tree.lines(f"{prefix}val/val_annotations.txt")]
    for row in rows:
        if len(row) < 2 or row[1] not in label_of:
            raise DatasetError(
                f"the val_annotations.txt of {tree.root} has a line without a known class: {' '.join(row)[:80]}",
                "The file is damaged or belongs to another data set",
                "Fetch tiny-imagenet-200.zip again",
            )
    return [(f"{prefix}val/images/{row[0]}", label_of[row[1]]) for row in rows]


def _tiny_class_names(wnids: Sequence[str], words: Sequence[str]) -> tuple[str, ...]:
    """The first synonym of each class, or its id where several classes share that word or none is listed."""
    synonyms = dict(line.split("\t", 1) for line in words if "\t" in line)
    names = [synonyms.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]
    shared = Counter(names)
    return tuple(name if shared[name] == 1 else wnid for name, wnid in zip(names, wnids, strict=True))


ROLES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
ROLES |= dict.fromkeys(("val", "valid", "validation"), "val")
"""What folders are for, by their names in small letters."""


@source("folder")
def _folder(request: Request) -> Loaded:
    """Class folders of images below `path`/train and `path`/test (or val), or right below `path`.

    Without a test folder a fixed fifth of each class is the test set. `path` may also be a zip archive of the
    same.
    """
    with file_tree(_needed_path("folder", request)) as tree:
        images = tree.images()
        # Class folders sit inside a role's folder.
        roles = {ROLES[parts[0].lower()]: parts[0] for parts in images if len(parts) > 2 and parts[0].lower() in ROLES}
        if "train" not in roles:
            _require_classes(tree, images)
            return _class_folders(tree, [(parts[0], parts) for parts in images if len(parts) > 1], [], request)
        held_out = roles.get("test", roles.get("val"))
        _require_labelled(tree, images)
        train, test = (
            [(parts[1], parts) for parts in images if len(parts) > 2 and parts[0] == folder]
            for folder in (roles["train"], held_out)
        )
        return _class_folders(tree, train, test, request)


def _require_classes(tree: FileTree, images: Sequence[Sequence[str]]) -> None:
    """That top folders are not parts of the set, under names nobody knows, or a level too many."""
    tops = sorted({parts[0] for parts in images})
    if len(tops) > 1 and all(len(parts) > 2 for parts in images):
        raise DatasetError(
            f"{tree.root} has no images in {', '.join(tops[:4])}, but folders",
            "They may be parts of the set, or the path leads one folder too high",
            "Name the parts train and test, with a folder for each class in both, or give the folder of the classes",
        )


def _require_labelled(tree: FileTree, images: Sequence[Sequence[str]]) -> None:
    """That beside a training folder no images lie outside class folders, where they would be passed over."""
    stray = next((parts for parts in images if len(parts) == 2 and parts[0].lower() in ROLES), None)
    if stray:
        raise DatasetError(
            f"{'/'.join(stray)} in {tree.root} lies in no class folder",
            "These images are unlabelled",
            f"Sort {stray[0]} into a folder for each class, or move it away: a fifth is then held out for testing",
        )


def _class_folders(tree: FileTree, train: Named, test: Named, request: Request) -> Loaded:
    class_names = tuple(sorted({name for name, _ in train}))
    label_of = {name: label for label, name in enumerate(class_names)}
    unknown = sorted({name for name, _ in test} - label_of.keys())
    if unknown:
        raise DatasetError(
            f"the test folder of {tree.root} has a class {unknown[0]!r} that the training folder lacks",
            f"The training folder has {', '.join(class_names[:8])}",
            "Give both the same class folders",
        )
    train_files, test_files = (
        [("/".join(parts), label_of[name]) for name, parts in images] for images in (train, test)
    )
    name = tree.root.resolve().name.removesuffix(".zip")
    return _decoded(name, class_names, tree, train_files, test_files, request)


@source("parquet")
def _parquet(request: Request) -> Loaded:
    """`path` is a folder of *train* and *test* or *val* files, one file, or TRAIN.parquet,TEST.parquet."""
    if request.path is None:
        raise _no_path("parquet")
    files = find_files(request.path)
    parts = [read_parquet(shards) for shards in (files.train, files.test) if shards]
    named = {part.class_names for part in parts}
    if len(named) > 1:
        raise DatasetError(
            f"the training and test files of {request.path} name different classes",
            "They belong to two data sets",
            "Set dataset.path to TRAIN.parquet,TEST.parquet of one data set",
        )
    if not len(parts[0].encoded):
        raise _no_images(Path(request.path), "one image a row")
    names = parts[0].class_names or _numbered(parts[0].encoded.labels)
    decoded = decode([part.encoded for part in parts], request.resize, request.copies)
    sets = [ImageSet(images, part.encoded.labels) for images, part in zip(decoded.pixels, parts, strict=True)]
    return Loaded(files.name, names, sets[0], sets[1] if len(sets) > 1 else None, notes=decoded.notes)


def _numbered(labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Class names "0", "1", ...; never more than images and one, whatever a damaged label column says."""
    return tuple(map(str, range(min(int(labels.max()), len(labels)) + 1)))


def _decoded(
    name: str,
    class_names: tuple[str, ...],
    tree: FileTree,
    train: list[tuple[str, int]],
    test: list[tuple[str, int]],
    request: Request,
) -> Loaded:
    if not train:
        raise _no_images(tree.root, "train/<class>/*.png, <class>/*.png or, for tiny-imagenet, the official layout")
    encoded = [tree.encoded(files) for files in (train, test) if files]
    decoded = decode(encoded, request.resize, request.copies)
    sets = [ImageSet(images, files.labels) for images, files in zip(decoded.pixels, encoded, strict=True)]
    return Loaded(name, class_names, sets[0], sets[1] if test else None, notes=decoded.notes)


def _needed_path(name: str, request: Request) -> Path:
    if request.path is None:
        raise _no_path(name)
    return Path(request.path).expanduser()


def _no_path(name: str) -> DatasetError:
    return DatasetError(f"source {name!r} needs a path", remedy="Set dataset.path to where the images are")


def _no_images(root: Path, layout: str) -> DatasetError:
    return DatasetError(
        f"no training images found in {root}",
        f"Expected was {layout}",
        "Check dataset.path and the layout below it",
    )
