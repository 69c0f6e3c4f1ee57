"""Read synthetic sets that another program or another run has made, so that they can be scored.

Layouts:
    images_best.pt, labels_best.pt, lr_best.pt   tensors of DATM, MTT and methods derived from MTT; lr_best.pt, the step
                                                 size, may be missing
    a folder for each class                      image files, as SRe2L, RDED and `datm-ray export` write them
    .arrow, .safetensors                         sets of this program

Images in .pt files are normalised already, and the files do not say how. Image files hold pixels. Sets of this program
hold their transform or its fingerprint. Nothing in a file is executed, see `interop.torch_files`.
Tests: tests/test_given.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datm_ray.artifact import OTHERS_IMAGES, SAFETENSORS, SYNTHETIC, Artifact, LeftOutTransform, read_artifact
from datm_ray.data.reading.decode import decode, image_suffixes
from datm_ray.data.reading.files import file_tree
from datm_ray.data.transform import Transform
from datm_ray.errors import ConfigError, CorruptFileError, DatasetError, StoreError
from datm_ray.interop.exports import class_folders
from datm_ray.interop.torch_files import read_torch_file
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.words import dimensions

SMALLEST_PROBABILITY = 1e-9
"""Smallest probability that is turned into a logit; smaller ones in soft labels are raised to it."""


@dataclass(frozen=True, eq=False)
class GivenSet:
    """Synthetic set that was read from files, with its images sorted by class."""

    uri: str
    images: NDArray[Any]
    """Images [n c h w] of the set: normalised, in float32; or pixels, in uint8."""
    labels: NDArray[np.int64]
    """Class [n] of each image, from 0, ascending."""
    soft_labels: NDArray[np.float32] | None
    """Soft labels [n k] of the images, as logits; `None` if the files give classes only."""
    step_size: float | None
    """Learning rate to train with: learned, published or given with the set. `None` if the files hold none, or only a
    default."""
    transform: Transform | None = None
    """Normalisation of the images, if datm_ray wrote the set. `None` if its file leaves it out, or if another program
    wrote the set."""
    fitted: str = ""
    """Fingerprint of the transform that normalised the images, if the file leaves the transform out; "" otherwise."""

    @property
    def digest(self) -> str:
        """16 hex digits over images, classes, soft labels, step size and transform. Names of files have no effect."""
        digest = sha256(repr((self.step_size, self.transform and self.transform.digest)).encode())
        for array in (self.images, self.labels, *([] if self.soft_labels is None else [self.soft_labels])):
            digest.update(repr((array.dtype.str, array.shape)).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def images_for(self, transform: Transform) -> NDArray[np.float32]:
        """Images [n c h w] of the set, normalised by `transform`.

        Normalised images without a transform of their own, as those of other programs, are returned unchanged.
        """
        if self.images.dtype == np.uint8:
            return transform.apply(self.images.astype(np.float32) / np.float32(255))
        if self.transform is None or self.transform.digest == transform.digest:
            return self.images
        return transform.apply(self.transform.invert(self.images))

    def require_fitting(self, image: tuple[int, int, int], class_names: Sequence[str], ipc: int) -> None:
        """Raise a `ConfigError` if the set's image size, classes or images per class do not fit a run.

        Args:
            image: channels, height and width of the run's real images.
            class_names: names of the run's classes.
            ipc: images per class that the recipe states.
        """
        own, classes = self.images.shape[1:], len(class_names)
        if own != image:
            raise ConfigError(
                f"the images of {self.uri} are {dimensions(own)}, and those of the data set {dimensions(image)}",
                "the set was made for other images, or for images of another size",
                "give its dataset.source, and its size as dataset.resize",
            )
        if self.soft_labels is not None and self.soft_labels.shape[1] != classes:
            raise ConfigError(
                f"the soft labels of {self.uri} are for {self.soft_labels.shape[1]} classes, and the data set has "
                f"{classes}",
                remedy="give the dataset.source of the set",
            )
        if self.labels[-1] >= classes:
            raise ConfigError(
                f"{self.uri} has images of class {self.labels[-1]}, and the data set has {classes} classes, from 0 on",
                remedy="give the dataset.source of the set",
            )
        counts = np.bincount(self.labels, minlength=classes)
        other = int(np.flatnonzero(counts != counts[0])[0]) if counts.min() != counts.max() else 0
        if other:
            raise ConfigError(
                f"{self.uri} has {counts[0]} images of class {class_names[0]!r} and {counts[other]} of "
                f"{class_names[other]!r}",
                "a set has as many images of each class, so that controls can have as many",
                "complete the set, or score it by classes of equal size",
            )
        if counts[0] != ipc:
            raise ConfigError(
                f"{self.uri} has {counts[0]} images of each class, and distill.ipc is {ipc}",
                remedy=f"use --set distill.ipc={counts[0]}",
            )


def read_set(uri: str, class_names: Sequence[str]) -> GivenSet:
    """Read a synthetic set in any layout that this module lists: .pt, .arrow or .safetensors files, or image folders.

    Args:
        uri: a folder, a file, or a zip archive of image files, as a path or URI. Image files must lie on a local disk.
        class_names: names of the run's classes. A set of this program must have the same; in a folder of image files,
            folders are recognised by them.

    Raises:
        ConfigError: nothing is there, the set is in no known layout, its images look like pixels where normalised ones
            are expected, or a set of this program has other classes.
        CorruptFileError: a file is damaged, or holds other things than a set.
        DatasetError: an image file cannot be read, or a folder is no class.
        StoreError: a file cannot be read, or the transform of a set of this program is missing.
    """
    place = _place_of(uri)
    if place.path.endswith(".pt"):
        return _of_tensors(place)
    return _of_artifact(read_artifact(place), class_names) if _is_own(place) else _of_images(place, class_names)


def read_step_size(uri: str) -> float | None:
    """Read the step size (learning rate for training on the set) from a set's files; `None` if they hold none.

    Images are not read if the step size has a file of its own.

    Args:
        uri: the set's folder or file, as a path or URI.

    Raises:
        ConfigError: nothing is there, or the .pt files in the folder have no known name.
        CorruptFileError: a file is damaged, or holds no step size above 0.
        StoreError: a file cannot be read.
    """
    place = _place_of(uri)
    if place.path.endswith(".pt"):
        return _rate_of(place)
    return _step_size_of(read_artifact(place)) if _is_own(place) else None


def _place_of(uri: str) -> Location:
    """Location from which a set is read: one file, or the given folder if the set consists of image files.

    The file is the .pt file of the images, or the .arrow or .safetensors file that this program has written.

    Args:
        uri: the file, or the folder that holds the file.

    Raises:
        ConfigError: nothing is there, or the .pt files in the folder have no known name.
    """
    place = open_location(uri)
    if not place.exists():
        raise ConfigError(f"given.path {uri} does not exist", remedy="give the folder or file of the set")
    if place.path.endswith(".pt") or _is_own(place):
        return place
    names = place.list()
    for name in filter(names.__contains__, (OTHERS_IMAGES, SYNTHETIC, SAFETENSORS)):
        return place / name
    tensors = [name for name in names if name.endswith(".pt")]
    if tensors:
        raise ConfigError(
            f"given.path {uri} has no {OTHERS_IMAGES}",
            remedy=f"give one of its files, such as {uri}/{tensors[0]}",
        )
    return place


def _is_own(place: Location) -> bool:
    return place.path.endswith((".arrow", ".safetensors"))


def _of_tensors(place: Location) -> GivenSet:
    """Read a set from .pt files: images<rest> at `place`, labels<rest> beside it and, for a step size, lr<rest>.

    <rest> is the common part of the three names, such as "_best.pt".

    Raises:
        ConfigError: `place` is not a file images<rest>, or its images have no value below 0, as pixels.
        CorruptFileError: the tensors do not form a set.
        StoreError: a file is missing or cannot be read.
    """
    rest = _rest_of_name(place)
    images, labels = _tensor(place), _tensor(place.parent / f"labels{rest}")
    step_size = _rate_of(place)
    are_images = images.ndim == 4 and images.dtype.kind == "f" and len(images)
    if not are_images or labels.ndim not in (1, 2) or len(labels) != len(images):
        raise CorruptFileError(
            f"{place.uri} and labels{rest} are no set: {list(images.shape)} and {list(labels.shape)}",
            "images are floats [n c h w], and labels [n] or [n k]",
        )
    if not (np.isfinite(images).all() and np.isfinite(labels).all()):
        raise CorruptFileError(f"{place.uri} or labels{rest} has values that are not finite", "the set has diverged")
    if images.min() >= 0:
        raise ConfigError(
            f"{place.uri} has values from {images.min():.3g} to {images.max():.3g}, which do not look normalised",
            "normalised images have values below 0; these may be pixels",
            "normalise them first, or give a folder of image files",
        )
    if labels.ndim == 1 and ((labels < 0) | (labels % 1 != 0)).any():
        wrong = labels[(labels < 0) | (labels % 1 != 0)][0]
        raise CorruptFileError(f"labels{rest} beside {place.uri} has the class {wrong:g}", "classes are 0, 1, 2, ...")
    soft = _as_logits(labels.astype(np.float32)) if labels.ndim == 2 else None
    classes = labels.astype(np.int64) if soft is None else _classes_of(soft)
    return _sorted(place.uri, images.astype(np.float32), classes, soft, step_size)


def _rest_of_name(place: Location) -> str:
    """Common part of the names of a set's .pt files, such as "_best.pt", from the file of the images at `place`.

    Raises:
        ConfigError: the file's name does not begin with "images".
    """
    name = PurePosixPath(place.path).name
    if not name.startswith("images"):
        raise ConfigError(f"given.path {place.uri} holds no images", remedy="give the file images_....pt beside it")
    return name.removeprefix("images")


def _rate_of(place: Location) -> float | None:
    """Step size from the file beside the images at `place`, such as lr_best.pt; `None` if there is no such file."""
    rate = place.parent / f"lr{_rest_of_name(place)}"
    return _step_size(_tensor(rate), rate) if rate.exists() else None


def _tensor(place: Location) -> NDArray[Any]:
    """Read the tensor or number that `torch.save` wrote to `place`, as an array; 0-d for a number.

    Raises:
        CorruptFileError: the file holds something else.
    """
    try:
        found = read_torch_file(place, integers=True)
    except StoreError:
        raise
    except Exception as error:  # archives and pickles raise errors of many classes
        raise _no_tensor(place, f"it cannot be read as a tensor ({error})") from error
    if isinstance(found, int | float):
        return np.asarray(found)
    if not isinstance(found, np.ndarray):
        raise _no_tensor(place, "it holds several values")
    return found


def _no_tensor(place: Location, cause: str) -> CorruptFileError:
    return CorruptFileError(f"{place.uri} is not a tensor", cause, "Write it with torch.save(tensor.cpu(), FILE)")


def _step_size(found: NDArray[Any], place: Location) -> float:
    value = float(found.reshape(-1)[0]) if found.size == 1 else math.nan
    if not 0 < value < math.inf:
        raise CorruptFileError(f"{place.uri} is not a step size: it is {found.tolist()}", "it must be above 0")
    return value


def _as_logits(soft: NDArray[np.float32]) -> NDArray[np.float32]:
    """Soft labels [n k] as logits. If all rows are probabilities, they are replaced by their logarithms."""
    if soft.min() >= 0 and bool(np.allclose(soft.sum(axis=1), 1, atol=1e-3)):
        return np.log(np.maximum(soft, SMALLEST_PROBABILITY)).astype(np.float32)
    return soft


def _classes_of(soft: NDArray[np.float32]) -> NDArray[np.int64]:
    """Classes [n] of images, derived from their soft labels [n k].

    There are two candidates: the highest label of each image, and the classes of a set that is sorted by class with
    equally many images in each. Learned labels need not be highest at the image's class, and published sets are sorted.
    The sorted classes are returned if both conditions hold:

    - n is a multiple of k, but the highest labels do not have equally many images in each class;
    - both candidates agree on at least (1 + 1/k) / 2 of the images, which is halfway between chance and all.

    Otherwise the highest labels are returned.
    """
    n, k = soft.shape
    highest: NDArray[np.int64] = soft.argmax(axis=1).astype(np.int64)
    if n % k or (np.bincount(highest, minlength=k) == n // k).all():
        return highest
    ordered: NDArray[np.int64] = np.repeat(np.arange(k), n // k)
    return ordered if (ordered == highest).mean() >= (1 + 1 / k) / 2 else highest


def _of_artifact(artifact: Artifact, class_names: Sequence[str]) -> GivenSet:
    if artifact.class_names != tuple(class_names):
        both = zip(artifact.class_names, class_names, strict=False)
        theirs, ours = next((pair for pair in both if pair[0] != pair[1]), ("", ""))
        counts = f"{len(artifact.class_names)} classes, and the data set {len(class_names)}"
        raise ConfigError(
            f"{artifact.place} has {f'the class {theirs!r} in the place of {ours!r}' if theirs else counts}",
            "it was made from another data set",
            "give the dataset.source of the set",
        )
    arrays = (artifact.images.numpy(), artifact.labels.numpy(), artifact.soft_labels.numpy())
    held = artifact.held_transform
    if isinstance(held, LeftOutTransform):
        return replace(_sorted(artifact.place, *arrays, _step_size_of(artifact), None), fitted=held.fingerprint)
    return _sorted(artifact.place, *arrays, _step_size_of(artifact), artifact.transform)


def _step_size_of(artifact: Artifact) -> float | None:
    return artifact.step_size if artifact.has_step_size else None


def _of_images(place: Location, class_names: Sequence[str]) -> GivenSet:
    if place.local_path is None:
        raise ConfigError(
            f"given.path {place.uri} has no {OTHERS_IMAGES} and no set", remedy="copy image files to a local disk"
        )
    root = Path(place.local_path)
    if root.is_file() and root.suffix.lower() != ".zip":
        raise ConfigError(
            f"given.path {place.uri} is a file of no known kind",
            "sets are files .pt, .arrow and .safetensors, and folders or .zip archives of images",
            "give the folder or file of the set",
        )
    try:
        labels, pixels = _labels_and_pixels(root, place.uri, class_names)
    except DatasetError as failure:
        raise _about_the_set(failure) from failure.__cause__
    return _sorted(place.uri, pixels, labels, None, None)


def _labels_and_pixels(root: Path, uri: str, class_names: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Labels [n] and pixels [n c h w] of the images in a folder or zip archive that has a folder for each class.

    Args:
        root: the folder or archive.
        uri: name of the folder or archive in messages.
        class_names: names of the run's classes.

    Raises:
        ConfigError: there is no folder of images.
        DatasetError: an image cannot be read, or a folder is no class.
    """
    with file_tree(root, image_suffixes()) as tree:
        files = [(name, Path(name).parts[0]) for name in tree.listing.files if len(Path(name).parts) > 1]
        if not files:
            raise ConfigError(
                f"given.path {uri} holds no set",
                f"it has neither {OTHERS_IMAGES}, nor {SYNTHETIC}, nor a folder of images for each class",
                "give the folder or file of the set",
            )
        label_of = _labels_of(sorted({folder for _, folder in files}), class_names, uri)
        encoded = tree.encoded([(name, label_of[folder]) for name, folder in files])
        (pixels,), _ = decode([encoded])
    return encoded.labels, pixels


def _about_the_set(failure: DatasetError) -> DatasetError:
    """Error about a given set, from an error about a data set, whose advice on keys of `dataset` would not help."""
    fact, remedy = failure.fact.replace("data set path", "given.path"), failure.remedy
    if "dataset.resize" in remedy:
        remedy = "Give images that are all as large as those of the data set, or a smaller set"
    elif "dataset." in remedy:
        remedy = "Give the folder or file of the set"
    return DatasetError(fact, failure.cause, remedy)


def _labels_of(folders: Sequence[str], class_names: Sequence[str], uri: str) -> dict[str, int]:
    """Folder -> label, found by the class's name or else by the number, from 0 on, in the folder's name.

    Raises:
        DatasetError: neither the names nor the numbers of the folders are those of the classes.
    """
    known = {name: label for label, name in enumerate(class_folders(tuple(class_names)))}
    known |= {name: label for label, name in enumerate(class_names)}
    if known.keys() >= set(folders):
        return {folder: known[folder] for folder in folders}
    numbers = {folder: int(found[1]) for folder in folders if (found := re.fullmatch(r"\D*(\d+)", folder))}
    if sorted(numbers.values()) == list(range(len(class_names))) and len(numbers) == len(folders):
        return numbers
    other = next(folder for folder in folders if folder not in known)
    raise DatasetError(
        f"the folder {other!r} in {uri} is no class of the data set",
        f"its classes are {', '.join(map(repr, class_names[:3]))}{', ...' if len(class_names) > 3 else ''}",
        f"Name the folders as the classes, or number them from 0 to {len(class_names) - 1} in their order",
    )


def _sorted(
    uri: str,
    images: NDArray[Any],
    labels: NDArray[np.int64],
    soft_labels: NDArray[np.float32] | None,
    step_size: float | None,
    transform: Transform | None = None,
) -> GivenSet:
    order = np.argsort(labels, kind="stable")
    soft_labels = None if soft_labels is None else soft_labels[order]
    return GivenSet(uri, images[order], labels[order], soft_labels, step_size, transform)
