"""Built-in sources: digits, CIFAR, Tiny-ImageNet, image folders and Parquet files.

Each source is a registered function that takes a `Request` and returns a `Loaded`. `datm_ray.data.sources.load_raw`
calls it, and splits and checks the images. To add a source, register a function in the same way, in any module that is
imported before `load_raw` runs.
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

from datm_ray.data.reading.decode import Encoded, decode, image_suffixes, require_memory, resize_images, survey
from datm_ray.data.reading.files import FileTree, file_tree
from datm_ray.data.reading.parquet import find_files, read_parquet
from datm_ray.data.sources import ImageSet, Loaded, Request, source
from datm_ray.data.splits import Role, role_of, went_where
from datm_ray.data.streamed import StreamedPixels
from datm_ray.errors import DatasetError, MissingImagesError
from datm_ray.words import counted, listed

DEFAULT_FOLDER = Path("~/.cache/datm_ray")

Parts = tuple[str, ...]  # parts of a path
Named = list[tuple[str, Parts]]  # class name and path of each image


@source("digits")
def _digits(request: Request) -> Loaded:
    """Read scikit-learn's digits, which need no path: 1797 images of 8x8 pixels, values 0..16, or 0..255 if resized."""
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
        # Interpolated values need more than sixteen levels.
        images, levels = resize_images(np.rint(images * (255 / 16)).astype(np.uint8), request.resize), 255
    labelled = ImageSet(images, bunch.target.astype(np.int64))
    return Loaded("digits", tuple(map(str, range(10))), labelled, None, levels)


@source("cifar10")
def _cifar10(request: Request) -> Loaded:
    """Read CIFAR-10; `path` is the folder that holds, or will hold, `cifar-10-batches-py`."""
    from torchvision.datasets import CIFAR10

    return _cifar("cifar10", CIFAR10, request)


@source("cifar100")
def _cifar100(request: Request) -> Loaded:
    """Read CIFAR-100 with its 100 fine labels; `path` is the folder that holds, or will hold, `cifar-100-python`."""
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
    # The official files are pickles. torchvision checks each against its published MD5 sum before it unpickles
    # anything, and raises RuntimeError if one differs. No code here opens them itself.
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
    """Read Tiny-ImageNet, with its validation images as test set. `path` is `tiny-imagenet-200.zip` or a folder."""
    with file_tree(_tiny_root(request.path), {".jpeg", ".txt"}) as tree:
        prefix = _tiny_prefix(tree)
        wnids = [line.strip() for line in tree.lines(f"{prefix}wnids.txt")]
        label_of = {wnid: label for label, wnid in enumerate(wnids)}
        train, test = _tiny_sorted(tree, f"{prefix}train", label_of), _tiny_test(tree, prefix, label_of)
        names = _tiny_class_names(wnids, tree.lines(f"{prefix}words.txt"))
        return _decoded("tiny-imagenet", names, tree, train, test, request)


def _tiny_root(path: str | None) -> Path:
    if path is not None:
        return Path(path).expanduser()
    unpacked = DEFAULT_FOLDER.expanduser() / "tiny-imagenet-200"
    return unpacked if unpacked.is_dir() else unpacked.with_suffix(".zip")


def _tiny_prefix(tree: FileTree) -> str:
    """Path of the folder with `wnids.txt`, relative to the root: "", or ending in "/" if the data set lies below it."""
    lists = [name for name in tree.listing.files if name.split("/")[-1] == "wnids.txt"]
    return min(lists, key=len, default="").removesuffix("wnids.txt")


def _tiny_sorted(tree: FileTree, folder: str, label_of: dict[str, int]) -> list[tuple[str, int]]:
    """Name and label of each image in the class folders (keys of `label_of`) of `folder`, or in `images` below them."""
    layout = re.compile(re.escape(folder) + r"/([^/]+)/(?:images/)?[^/]+\.JPEG")
    matches = ((name, layout.fullmatch(name)) for name in tree.listing.files)
    return [(name, label_of[match[1]]) for name, match in matches if match and match[1] in label_of]


def _tiny_test(tree: FileTree, prefix: str, label_of: dict[str, int]) -> list[tuple[str, int]]:
    """File name and label of each validation image.

    As published, the images lie in one folder, and the order is that of `val_annotations.txt`. In class folders they
    are sorted by image number, which is the same order for the published files.
    """
    by_class = _tiny_sorted(tree, f"{prefix}val", label_of)
    if by_class and not any(name.startswith(f"{prefix}val/images/") for name in tree.listing.files):
        return sorted(by_class, key=lambda image: (len(image[0].split("/")[-1]), image[0].split("/")[-1]))
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
    """Class names: the first synonym of each class, or its id if the synonym is missing or not unique.

    Args:
        wnids: ids of the classes, in the order of labels.
        words: lines of `words.txt`: an id, a tab, and synonyms with commas between them.
    """
    synonyms = dict(line.split("\t", 1) for line in words if "\t" in line)
    names = [synonyms.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]
    shared = Counter(names)
    return tuple(name if shared[name] == 1 else wnid for name, wnid in zip(names, wnids, strict=True))


@source("folder")
def _folder(request: Request) -> Loaded:
    """Read class folders of images below `path`/train and `path`/test (or val), or directly below `path`.

    Without a labelled test folder, `TEST_FRACTION` of each class is the test set. `path` may also be a zip archive with
    this layout.
    """
    root = Path(_needed_path("folder", request)).expanduser()
    with file_tree(root, image_suffixes()) as tree:
        images = [tuple(name.split("/")) for name in tree.listing.files]
        training = _folder_for("train", tree, images)
        if training is None:
            _require_classes(tree, images)
            return _class_folders(tree, "", [(parts[0], parts) for parts in images if len(parts) > 1], "", [], request)
        stray = next((parts for parts in images if len(parts) == 2 and parts[0] == training), None)
        if stray:
            raise DatasetError(
                f"{'/'.join(stray)} in {tree.root} lies in no class folder",
                "Images beside class folders have no label",
                f"Sort {training} into a folder for each class, or move these images away",
            )
        train = _labelled(images, training)
        for role in ("test", "val"):
            held_out = _folder_for(role, tree, images)
            test = _labelled(images, held_out)
            # If the only folder is not named like a class, such as test/images, its images have no labels.
            if held_out and (len({name for name, _ in test}) > 1 or {name for name, _ in test} & dict(train).keys()):
                return _class_folders(tree, training, train, held_out, test, request)
        return _class_folders(tree, training, train, "", [], request)


def _folder_for(role: Role, tree: FileTree, images: Sequence[Parts]) -> str | None:
    """Top folder that holds the class folders of a role, such as training; `None` if there is none.

    If several folders have a name for this role, the folder whose name has only letters is taken: "train" beside
    "train2".

    Args:
        images: path of each image file, divided into the names of folders and file.

    Raises:
        DatasetError: several folders have such a name, and not exactly one name has only letters.
    """
    tops = sorted({parts[0] for parts in images if len(parts) > 2 and role_of(parts[0]) == role})
    plain = [top for top in tops if top.isalpha()]
    if len(plain or tops) > 1:
        raise DatasetError(
            f"the folders {' and '.join((plain or tops)[:3])} in {tree.root} are both for {role}, by their names",
            remedy="Put their images into one, or rename the others",
        )
    return next(iter(plain or tops), None)


def _labelled(images: Sequence[Parts], folder: str | None) -> Named:
    """Class name and path of each image in the class folders of `folder`; empty if `folder` is `None`."""
    return [(parts[1], parts) for parts in images if len(parts) > 2 and parts[0] == folder]


def _require_classes(tree: FileTree, images: Sequence[Parts]) -> None:
    """Raise a `DatasetError` if the top folders cannot be the classes.

    There are two such cases: a folder is named as a part of the data set, such as "test"; or there are several folders,
    and all images lie in their subfolders. A folder "train" beside folders of other names may be a class.
    """
    tops = sorted({parts[0] for parts in images if len(parts) > 1})
    parted = [top for top in tops if top.isalpha() and role_of(top)]
    if parted and (parted == tops or any(role_of(top) != "train" for top in parted)):  # "train" may be a class
        raise DatasetError(
            f"{tree.root} has a folder {parted[0]}, but no folder train with a folder of images for each class",
            "; ".join((f"By its name {parted[0]} is a part of the set and no class", *tree.listing.notes())),
            "Sort the images into train/CLASS and test/CLASS, or rename the folder if it is a class",
        )
    if len(tops) > 1 and all(len(parts) > 2 for parts in images):
        raise DatasetError(
            f"{tree.root} has no images in {', '.join(tops[:4])}, but folders",
            "They may be parts of the set, or the path leads one folder too high",
            "Name the parts train and test, with a folder for each class in both, or give the folder of the classes",
        )


def _class_folders(tree: FileTree, training: str, train: Named, held_out: str, test: Named, request: Request) -> Loaded:
    """Load images: `train` from class folders in `training` ("": the root), `test` from `held_out` ("": none)."""
    listing = tree.listing
    names = {name for name, _ in train}
    empty = sorted(set(listing.subfolders(training)) - names)
    if names and empty:
        raise DatasetError(
            f"class {listed(map(repr, empty), 1)} of {tree.root} has no image left",
            "; ".join(listing.notes()) or "Its folder is empty",
            "Add images that are PNG or JPEG, or move the folder away if it is no class",
        )
    class_names = tuple(sorted(names))
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
    left_out = set(listing.files) - dict(train_files + test_files).keys()
    left = Counter(file.split("/")[0] if "/" in file else "beside the folders" for file in left_out)
    unused = [f"{top} ({counted(count, 'image')})" for top, count in sorted(left.items())]
    notes = (*listing.notes(), went_where([training or "all folders"], [held_out] if held_out else [], unused))
    return _decoded(name, class_names, tree, train_files, test_files, request, notes)


@source("parquet")
def _parquet(request: Request) -> Loaded:
    """Read Parquet files from a folder of *train* and *test* or *val* files, from one file, or from two.

    Two files are given as TRAIN.parquet,TEST.parquet.
    """
    path = _needed_path("parquet", request)
    files = find_files(path)
    train, names = read_parquet(files.train, streamed=request.streamed)
    test, test_names = read_parquet(files.test, names, streamed=request.streamed) if files.test else (None, names)
    if test_names != names:
        raise DatasetError(
            f"the training and test files of {path} name different classes",
            "They belong to two data sets",
            "Give the path TRAIN.parquet,TEST.parquet of one data set (dataset.path)",
        )
    if not len(train):
        raise _no_images(Path(path), "one image a row")
    sets, notes = _image_sets([train] if test is None else [train, test], request)
    names = names or _numbered(train.labels)
    return Loaded(files.name, names, sets[0], None if test is None else sets[1], notes=(*files.notes, *notes))


def _numbered(labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Class names "0", "1", ... up to the highest label; at most n + 1 for n images, as a damaged label may be huge."""
    return tuple(map(str, range(min(int(labels.max()), len(labels)) + 1)))


def _decoded(
    name: str,
    class_names: tuple[str, ...],
    tree: FileTree,
    train: list[tuple[str, int]],
    test: list[tuple[str, int]],
    request: Request,
    notes: tuple[str, ...] = (),
) -> Loaded:
    if not train:
        raise _no_images(
            tree.root,
            "train/<class>/*.png, <class>/*.png or, for tiny-imagenet, the official layout",
            notes,
            tree.listing.passed_over[".parquet"],
        )
    encoded = [tree.encoded(files) for files in (train, test) if files]
    sets, changes = _image_sets(encoded, request)
    return Loaded(name, class_names, sets[0], sets[1] if test else None, notes=(*notes, *changes))


def _image_sets(encoded: Sequence[Encoded], request: Request) -> tuple[list[ImageSet], tuple[str, ...]]:
    """Image sets that are decoded now, or at each use if streamed; and lines for the user on conversions."""
    if request.streamed and request.resize:
        image, notes = survey(encoded, request.resize)
        return [ImageSet(StreamedPixels(files, np.arange(len(files)), image), files.labels) for files in encoded], notes
    pixels, notes = decode(encoded, request.resize, request.copies, request.largest)
    return [ImageSet(images, files.labels) for images, files in zip(pixels, encoded, strict=True)], notes


def _needed_path(name: str, request: Request) -> str:
    if request.path is None:
        remedy = "Give the path where the images are (dataset.path)"
        raise MissingImagesError(f"source {name!r} needs a path", remedy=remedy)
    return request.path


def _no_images(root: Path, layout: str, notes: Sequence[str] = (), tables: int = 0) -> DatasetError:
    """Error for a path without images in the expected `layout`. `tables` is the number of Parquet files found there."""
    unpack = "" if root.is_dir() else "unpack it, then "
    return DatasetError(
        f"no training images found in {root}",
        "; ".join((f"Expected was {layout}", *notes)),
        f"It holds Parquet files ({tables}): {unpack}give the folder of the Parquet files (dataset.source parquet)"
        if tables
        else "Check the path (dataset.path) and the layout below it",
    )
