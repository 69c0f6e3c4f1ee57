"""Synthetic sets as self-describing files.

A set's file holds the images in the normalised space in which they were learned, the soft labels, the step size, the
recipe, the provenance, and the transform between pixels and normalised images. A whitening transform is large: up to
38 MB for 32x32 RGB and 604 MB for 64x64, however small the set. So a large transform is stored once in a folder beside
the runs, under a digest of its bits, and the set's file holds the digest alone:

    <out>/transforms/<digest>.arrow
    <out>/<run>/synthetic.arrow

`datm_ray.load(path)` reads a set. Its transform is read at its first use: from the set's own folder, or from the folder
`transforms` in it or in a folder above. The exports "arrow" and "safetensors" are single files with everything, which
`load` reads from any place. After `without_transform`, they leave a large transform out; `Artifact.fitted` fits it
again on real images.

The evaluation writes `scoring.json` beside the set: the settings with which networks were trained to score it.
`Artifact.training` reads these settings, and the exports "arrow" and "safetensors" hold them.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import TensorDataset

from datm_ray.core.synthetic import SyntheticSet
from datm_ray.core.training.loop import OPTIMISERS, PROTOCOLS, Schedule, schedule_of
from datm_ray.data.transform import Images, Kind, Normaliser, Transform, fit_transform, fitted_elsewhere, require_shape
from datm_ray.errors import ConfigError, CorruptFileError, StoreError
from datm_ray.store.files.filesystem import AlreadyExistsError, Location, open_location
from datm_ray.store.sealed import damaged, rejecting_nonsense
from datm_ray.store.tensors import read_tensors, write_tensors
from datm_ray.store.trajectories import TRANSFORM_KIND
from datm_ray.words import counted, dimensions

KIND = "synthetic-set"
SCORING = "scoring.json"
"""Name of the file, in a run's folder, with the settings with which networks were trained to score the run's set."""
SYNTHETIC, SAFETENSORS = "synthetic.arrow", "synthetic.safetensors"
"""SYNTHETIC: name of a set's file in a run's folder, and of its export "arrow". SAFETENSORS: name of its export
"safetensors"."""
OTHERS_IMAGES = "images_best.pt"
"""Name of the file of images in the folders of sets that the published programs of DATM, MTT and others write."""
TRANSFORMS = "transforms"
"""Name of the folder, beside the runs' folders, of normalising transforms larger than `INLINE_BYTES`."""
CHECKSUM = "sha256"
"""Metadata key of the checksum in the export "safetensors", whose format has none."""
INLINE_BYTES = 64 * 1024
"""Largest size in bytes, inclusive, of a normalising transform that runs store inside their set's file."""
_SEARCHED = 50  # most names in a folder that `load` searches for sets, if it is given a folder
_PARENTS = 3  # number of folders above a set's own folder that are searched for its transform
_NOT_CHOSEN = (
    "the learning rate {:.4g} of this set was neither learned for such a training nor chosen on validation images: "
    "score the set with `datm-ray evaluate` and load it from its run's folder, or try some rates"
)
_PREFIX = "transform."  # prefix of the names of a transform's arrays in a set's file


@dataclass(frozen=True)
class KeptTransform:
    """Reference to a set's normalising transform that is stored in a file of its own, and read at its first use."""

    set_location: Location
    """Location of the set's file."""
    digest: str
    """Digest of the transform, see `Transform.digest`; also the name of its file."""
    shape: tuple[int, ...]
    """Channels, height and width of an image, as the set's file states them."""

    @cached_property
    def transform(self) -> Transform:
        """Transform, read from the set's own folder, or from a folder `transforms` in it or in the three folders above.

        Raises:
            StoreError: none of these folders has the file.
            CorruptFileError: the file is damaged, or holds another transform.
        """
        failure: StoreError | None = None
        for place in self._places():
            try:
                there = place.exists()
            except StoreError as error:  # a folder above may be unreadable, so the search continues
                failure = failure or error
                continue
            if there:
                file = read_tensors(place, kind=TRANSFORM_KIND)
                transform = Transform.from_arrays(file.arrays, file.metadata, place.uri)
                if (transform.digest, transform.shape) != (self.digest, self.shape):
                    raise damaged(place, "Its transform does not match its name")
                return transform
        name = f"{TRANSFORMS}/{self.digest}.arrow"
        raise StoreError(
            f"the transform of {self.set_location.uri} is missing: no {name} in its folder or one above",
            str(failure or "The file was moved away from the runs it was made with"),
            f"Copy {name} of their output folder beside it, or export the set there with --format arrow",
        ) from failure

    def _places(self) -> Iterator[Location]:
        name, folder = f"{self.digest}.arrow", self.set_location.parent
        yield folder / name
        for _ in range(_PARENTS + 1):
            yield folder / TRANSFORMS / name
            folder = folder.parent


@dataclass(frozen=True)
class LeftOutTransform:
    """Description of a normalising transform that a set's file leaves out; training images serve to fit it again."""

    place: str
    """Path or URI of the set's file."""
    kind: Kind
    shape: tuple[int, int, int]
    """Channels, height and width of an image."""
    fingerprint: str
    """16 hex digits that identify the transform that was left out, as in `Transform.fingerprint`."""
    eps: float

    @property
    def transform(self) -> Transform:
        raise StoreError(
            f"{self.place} leaves out its {self.kind} transform, for real images and back to pixels",
            "it is large, and follows from the training images",
            "give those as uint8 [n c h w]: `synthetic = synthetic.fitted(images)`",
        )


@dataclass(frozen=True, repr=False)
class Artifact:
    """A synthetic set with everything needed to use it elsewhere.

    `normalise`, `pixels` and other methods that need the transform raise a `StoreError` if it is missing.
    """

    images: Tensor
    """[n c h w] float32 images, normalised by `transform`; feed them to a network unchanged."""
    soft_labels: Tensor
    """[n k] logits; train towards their softmax."""
    labels: Tensor
    """[n] int64 class that each image was made for."""
    step_size: float
    """Learning rate of SGD to train the recipe's `network` on this set: learned with the images, published or given if
    `has_step_size` is true, otherwise a default."""
    step_sizes: tuple[float, ...]
    """Learning rates like `step_size`, one for each network whose experts were matched, the recipe's `network` first.
    Files of earlier versions hold only that of `network`."""
    class_names: tuple[str, ...]
    """Names of the k classes."""
    held_transform: Transform | KeptTransform | LeftOutTransform
    """Transform of the set, or a reference to one that is not in the set's file. Read it through `transform`."""
    recipe: Mapping[str, Any]
    """Configuration of the run that made the set, as plain data: section -> key -> value."""
    provenance: Mapping[str, Any]
    """Versions, hardware, data set and experts of the run."""
    place: str = ""
    """Path or URI that the set was read from; "" if it was not read from a file."""
    held_scoring: Mapping[str, Any] | Location | None = None
    """Settings of the training that scored the set, as `Schedule.to_json` writes them, or the location of the run's
    file with them; `None` if neither is known. Use `training` to get the settings."""
    stated_has_step_size: bool | None = None
    """Value of `has_step_size` in the set's file; `None` if the file is of an earlier version, which states none."""

    def __repr__(self) -> str:
        images, classes = len(self.images), len(self.class_names)
        what = f"{images:,} images of {dimensions(self.images.shape[1:])} in {classes:,} classes"
        name, step_size = self.recipe.get("name", "without a name"), f"step size {self.step_size:.4g}"
        return f"<synthetic set {name}: {what}, {step_size}{f', from {self.place}' if self.place else ''}>"

    def training(self) -> Schedule:
        """Settings of the training that scored the set: epochs, batch size, optimiser, augmentation.

        `training().optimizer(network)` makes the optimizer. `training().batches(loader, optimizer, epoch)` yields an
        epoch's batches and sets the learning rate before each. `training().augment(images)` augments a batch. If
        `temperature` is not `None`, a teacher's logits of every batch replaced the set's labels, see
        `datm_ray.ReplayedLabels`.

        The settings are those of the last evaluation. A run's folder, published sets and the exports "arrow" and
        "safetensors" hold them. If a learning rate was chosen for each network on validation images, the settings have
        the most frequent one.

        Before any evaluation, the settings are those of the recipe that made the set. The learning rate is that of the
        recipe, or else the set's step size. A `UserWarning` is issued if this rate was neither learned nor chosen. If
        the recipe names no protocol, the settings are those of the protocol "published", without augmentation.

        Raises:
            ConfigError: this version has no such protocol, optimiser or augmentation.
            CorruptFileError: the run's file with the settings is damaged.
        """
        schedule, is_chosen = self.scored_training()
        if not is_chosen:
            warnings.warn(_NOT_CHOSEN.format(schedule.learning_rate), stacklevel=2)
        return schedule

    def scored_training(self) -> tuple[Schedule, bool]:
        """Settings as `training` returns them, and True if their learning rate is more than a default.

        A learning rate that was learned, published, given or chosen on validation images is no default.

        Raises:
            ConfigError: this version has no such protocol, optimiser or augmentation.
            CorruptFileError: the run's file with the settings is damaged.
        """
        if scoring := self._scoring():
            return scoring, True
        scored = self.recipe.get("evaluate", {})
        name, optimiser = scored.get("protocol", "published"), scored.get("optimiser", "sgd")
        if name not in PROTOCOLS or optimiser not in OPTIMISERS:
            raise ConfigError(
                f"the set was scored by {optimiser!r} with protocol {name!r}, which this version does not have",
                "it was made by another version",
                "upgrade datm_ray, or choose the settings yourself",
            )
        schedule = schedule_of(scored, scored.get("learning_rate") or self.step_size)
        is_sgd_on_own_labels = schedule.optimiser == "sgd" and schedule.temperature is None
        return schedule, bool(scored.get("learning_rate")) or (is_sgd_on_own_labels and self.has_step_size)

    def _scoring(self) -> Schedule | None:
        """Settings of the training that scored the set; `None` if no evaluation wrote them or they cannot be read.

        Raises:
            CorruptFileError: the file has impossible settings.
        """
        if self.held_scoring is None:
            return None
        if not isinstance(self.held_scoring, Location):
            with rejecting_nonsense(open_location(self.place or SYNTHETIC)):
                return Schedule.from_json(self.held_scoring)
        try:
            if not self.held_scoring.exists():
                return None
            content = self.held_scoring.read_json()
        except StoreError:  # the set alone may be readable
            return None
        with rejecting_nonsense(self.held_scoring):
            return Schedule.from_json(content)

    @property
    def has_step_size(self) -> bool:
        """True if the set's step size was learned, published or given, for SGD on the set's own labels.

        False if the step size is a default. Networks that score the set then train with a step size that is chosen on
        validation images.
        """
        if self.stated_has_step_size is not None:
            return self.stated_has_step_size
        # Only for sets of earlier versions, whose files state nothing: later methods need no name here.
        method, distill = self.recipe.get("method", "datm"), self.recipe.get("distill", {})
        if ":" in method:  # a user's own method, which may have learned the step size
            return not math.isclose(self.step_size, distill.get("initial_step_size") or 0.01, rel_tol=1e-6)
        if method == "given":
            return self.recipe.get("given", {}).get("step_size") is not None
        return method not in ("sre2l", "select")

    @property
    def transform(self) -> Transform:
        """Transform from real images to what networks trained on the set expect, and from synthetic images to pixels.

        Raises:
            StoreError: the file that holds the transform is not found, or the set's file leaves the transform out, see
                `fitted`.
            CorruptFileError: the transform's file is damaged, or holds another transform.
        """
        held = self.held_transform
        return held if isinstance(held, Transform) else held.transform

    def fitted(self, images: Tensor | NDArray[np.uint8]) -> Artifact:
        """Copy of the set whose left-out transform is fitted on real images; the unchanged set if it has its transform.

        The images that the run trained on give the set's transform, up to rounding. Other images give a `UserWarning`,
        and nearly the same transform if they are all training images of the data set, or another encoding of them. The
        fit takes some seconds at 32x32 RGB.

        Args:
            images: [n c h w] real training images in uint8.

        Raises:
            DatasetError: the images have another shape than the set's, or are fewer than two.
            TypeError: the images are not uint8.
        """
        held = self.held_transform
        if not isinstance(held, LeftOutTransform):
            return self
        array = images.cpu().numpy() if isinstance(images, Tensor) else images
        if array.dtype != np.uint8:
            raise TypeError(f"images are {array.dtype}: give uint8 from 0 to 255")
        require_shape(array.shape[1:], held.kind, held.shape)
        transform = fit_transform(held.kind, array, 255, eps=held.eps)
        if transform.fingerprint != held.fingerprint:
            warnings.warn(fitted_elsewhere("the set", f"these {counted(len(array), 'image')}"), stacklevel=2)
        return replace(self, held_transform=transform)

    def dataset(self) -> TensorDataset:
        """Data set of pairs (image [c h w], class probabilities [k]), ready for a `DataLoader`.

        torch's cross_entropy accepts such probabilities as its target.
        """
        return TensorDataset(self.images, self.soft_labels.softmax(dim=1))

    def normalise(self, images: Images) -> Tensor:
        """Normalise real images as networks trained on this set expect them: float32; shape and device stay.

        Args:
            images: a batch [n c h w] or one image [c h w], as tensor or array; floats from 0 (black) to 1 (white), or
                uint8 from 0 to 255.

        Raises:
            DatasetError: the images do not have the set's shape.
            StoreError: the set's transform is missing.
            TypeError: the images are integers other than uint8.
        """
        return self.transform.normalise(images)

    def normaliser(self) -> Normaliser:
        """Module on the CPU that computes `normalise`: a layer before a network, or a torchvision transform.

        As a transform, it also takes PIL images of any size, and resizes them to the size of the set's images.
        """
        return self.transform.normaliser()

    def denormalise(self, images: Tensor) -> Tensor:
        """Map normalised images, such as those of this set, back to 0 (black) to 1 (white), without clipping."""
        return self.transform.denormalise(images)

    def clipped_share(self) -> float:
        """Share in [0, 1] of the images' values that are darker than 0 or brighter than 1, which `pixels` clips."""
        unit = self.denormalise(self.images)
        half = 0.5 / 255  # changes by rounding to a pixel do not count
        return float(((unit < -half) | (unit > 1 + half)).float().mean())

    def clipped_in_words(self) -> str:
        """Text without a full stop on the share of the images' values that `pixels` clips; "" if it clips none."""
        share = self.clipped_share()
        if not share:
            return ""
        shown = f"{100 * share:.0f} %" if share >= 0.01 else "Less than 1 %"
        return f"{shown} of the pixels' values lay outside 0..1 and were clipped"

    def pixels(self) -> NDArray[np.uint8]:
        """Synthetic images as ordinary pixels [n h w c], 0..255, clipped."""
        unit = self.denormalise(self.images).clamp(0, 1)
        pixels: NDArray[np.uint8] = (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return pixels


def save_artifact(
    location: Location,
    synthetic: SyntheticSet,
    transform: Transform,
    class_names: tuple[str, ...],
    recipe: Mapping[str, Any],
    provenance: Mapping[str, Any],
    transforms: Location | None = None,
    *,
    has_step_size: bool,
) -> None:
    """Write a synthetic set to a file, atomically.

    Args:
        location: file to write; an existing file is replaced.
        synthetic: images, labels and step sizes.
        transform: normalisation of the images.
        class_names: names of the classes, in the order of the labels.
        recipe: configuration of the run, as plain data.
        provenance: versions, hardware, data set and experts of the run, as plain data.
        transforms: folder for large transforms, each stored once and named by its digest; `load` must find it from the
            set's file. `None` stores the transform in the set's file.
        has_step_size: True if the step size was learned, published or given; False if it is a default.
    """
    images, soft_labels = synthetic.images.detach(), synthetic.soft_labels.detach()
    step_sizes = tuple(synthetic.step_sizes.tolist())
    parts = (images, soft_labels, synthetic.labels, step_sizes[0], step_sizes, class_names, transform)
    artifact = Artifact(*parts, recipe, provenance, stated_has_step_size=has_step_size)
    kept = transforms is not None and keep_transform(transform, transforms) is not None
    arrays, metadata = set_parts(artifact, kept=kept)
    write_tensors(location, arrays, kind=KIND, metadata=metadata)


def set_parts(artifact: Artifact, *, kept: bool = False) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays by name, and metadata, of a set's file.

    A transform that the set leaves out (`LeftOutTransform`) has no arrays here, only a description in the metadata.

    Args:
        kept: True if the transform is stored in a file of its own: its arrays are left out here, and the metadata hold
            its digest, by which that file is found. False puts the transform's arrays here.
    """
    held = artifact.held_transform
    arrays = {
        "images": artifact.images.cpu().numpy(),
        "soft_labels": artifact.soft_labels.cpu().numpy(),
        "labels": artifact.labels.cpu().numpy(),
        "step_size": np.array(artifact.step_size, np.float32),  # for earlier versions of this program
        "step_sizes": np.array(artifact.step_sizes, np.float32),
    }
    metadata: dict[str, Any] = {
        "class_names": list(artifact.class_names),
        "transform": _described(held, kept=kept),
        "recipe": dict(artifact.recipe),
        "provenance": dict(artifact.provenance),
    }
    if scoring := artifact._scoring():
        metadata["scoring"] = scoring.to_json()
    if artifact.stated_has_step_size is not None:
        metadata["has_step_size"] = artifact.stated_has_step_size
    if not kept and not isinstance(held, LeftOutTransform):
        arrays |= {_PREFIX + name: array for name, array in artifact.transform.to_arrays().items()}
    return arrays, metadata


def _described(held: Transform | KeptTransform | LeftOutTransform, *, kept: bool) -> dict[str, Any]:
    """Metadata of a set's transform for the set's file.

    Args:
        held: the transform, or the set's reference to it or description of it.
        kept: True if the transform is stored in a file of its own: its digest is added, by which that file is found.
    """
    if isinstance(held, LeftOutTransform):
        plain = {"kind": held.kind, "shape": list(held.shape), "fingerprint": held.fingerprint, "eps": held.eps}
        return plain | {"is_left_out": True}
    transform = held if isinstance(held, Transform) else held.transform
    return transform.to_metadata() | ({"digest": transform.digest} if kept else {})


def without_transform(artifact: Artifact) -> Artifact:
    """Copy of a set whose exports leave out a transform larger than `INLINE_BYTES`; `Artifact.fitted` fits it again."""
    transform = artifact.transform
    if transform.nbytes <= INLINE_BYTES:
        return artifact
    left = LeftOutTransform(artifact.place, transform.kind, transform.shape, transform.fingerprint, transform.eps)
    return replace(artifact, held_transform=left)


def keep_transform(transform: Transform, transforms: Location) -> Location | None:
    """Write a transform larger than `INLINE_BYTES` into the folder `transforms`, unless the folder has it.

    Returns the location of the transform's file, or `None` for a smaller transform, which needs no file.
    """
    if transform.nbytes <= INLINE_BYTES:
        return None
    place = transforms / f"{transform.digest}.arrow"
    if not place.exists():
        with suppress(AlreadyExistsError):  # another worker has written it
            arrays, metadata = transform.to_arrays(), transform.to_metadata()
            write_tensors(place, arrays, kind=TRANSFORM_KIND, metadata=metadata, replace=False)
    return place


def load(uri: str | os.PathLike[str]) -> Artifact:
    """Read a synthetic set written by datm_ray, .arrow or .safetensors, from a path or any URI.

    Raises:
        StoreError: the file does not exist, is a folder, or holds tensors of another program (.pt).
        CorruptFileError: the file is not a synthetic set, is truncated or altered, or its parts contradict each other.
    """
    location = open_location(os.fspath(uri))
    if location.path.endswith((".pt", ".pth")):
        raise _of_another_program(location, location.parent)
    try:
        return read_artifact(location)
    except StoreError as error:
        is_folder = isinstance(error.__cause__, IsADirectoryError | FileNotFoundError)
        names = location.list()[:_SEARCHED] if is_folder else []
        found = [name for name in names if name in (SYNTHETIC, SAFETENSORS)]
        found += [f"{name}/{SYNTHETIC}" for name in names if (location / name / SYNTHETIC).exists()]
        if not found and OTHERS_IMAGES in names:
            raise _of_another_program(location / OTHERS_IMAGES, location) from error
        if not found:
            raise
        places = " or ".join((location / name).uri for name in found[:3])
        raise StoreError(f"{uri} is a folder", remedy=f"Give a set in it: {places}") from error


def _of_another_program(file: Location, folder: Location) -> StoreError:
    return StoreError(
        f"{file.uri} holds tensors of another program, and no set of datm_ray",
        "its files state neither classes nor normalisation",
        f"Score it by a recipe with `method: given` and `given: {{path: {folder.uri}}}`, and load the synthetic.arrow "
        "of that run",
    )


def read_artifact(location: Location) -> Artifact:
    """Read a synthetic set from an .arrow or .safetensors file.

    Raises:
        StoreError: the file cannot be read, or is a folder.
        CorruptFileError: the file is not a synthetic set, is truncated or altered, or its parts contradict each other.
    """
    if location.path.endswith(".safetensors"):
        arrays, metadata = _read_safetensors(location)
    else:
        file = read_tensors(location, kind=KIND)
        arrays, metadata = file.arrays, file.metadata
    missing = {"images", "soft_labels", "labels", "step_size"} - arrays.keys()
    missing |= {"class_names", "transform", "recipe", "provenance"} - metadata.keys()
    if missing:
        raise CorruptFileError(
            f"{location.uri} has no part {', '.join(map(repr, sorted(missing)))}",
            "It was written by another version",
            "Distil it again",
        )
    with rejecting_nonsense(location):
        artifact = Artifact(
            images=_tensor(arrays["images"]),
            soft_labels=_tensor(arrays["soft_labels"]),
            labels=_tensor(arrays["labels"]),
            step_size=float(arrays["step_size"]),
            step_sizes=tuple(arrays.get("step_sizes", arrays["step_size"].reshape(1)).tolist()),
            class_names=tuple(metadata["class_names"]),
            held_transform=_transform_of(location, arrays, metadata["transform"]),
            recipe=metadata["recipe"],
            provenance=metadata["provenance"],
            place=location.uri,
            held_scoring=_scoring_of(location, metadata),
            stated_has_step_size=metadata.get("has_step_size"),
        )
    _require_sound(artifact, location.uri)
    return artifact


def _tensor(array: NDArray[Any]) -> Tensor:
    """Tensor that shares the memory of an array. A read-only array is copied, because tensors can be written to."""
    return torch.from_numpy(array) if array.flags.writeable else torch.tensor(array)


def _is_finite(tensor: Tensor) -> bool:
    """True if no value is infinite or nan. Unlike `Tensor.isfinite`, this takes no memory: a set may have gigabytes."""
    return not tensor.numel() or all(bool(each.isfinite()) for each in tensor.aminmax())


def _require_sound(artifact: Artifact, uri: str) -> None:
    """Check a set that was read. Right checksums do not suffice, because any program can write a file.

    Raises:
        CorruptFileError: a shape, label, name or value contradicts the others.
    """
    fault = next(_faults(artifact), None)
    if fault:
        raise CorruptFileError(
            f"{uri} is not a usable synthetic set: {fault}",
            "It was written by another program or another version, or altered",
            "Distil it again, or restore a copy",
        )


def _faults(artifact: Artifact) -> Iterator[str]:
    """Yield a sentence for each fault of a set. Later checks assume that earlier ones found none."""
    images, soft_labels, labels = artifact.images, artifact.soft_labels, artifact.labels
    n, k, rates = len(labels) if labels.ndim else 0, len(artifact.class_names), artifact.step_sizes
    for name, tensor, dtype, shape in (
        ("images", images, torch.float32, (n, *artifact.held_transform.shape)),
        ("soft_labels", soft_labels, torch.float32, (n, k)),
        ("labels", labels, torch.int64, (n,)),
    ):
        if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
            yield f"{name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}"
        elif not _is_finite(tensor):
            yield f"{name} has {counted(int((~tensor.isfinite()).sum()), 'value')} that are not finite"
    if not n or not k:
        yield f"it has {counted(n, 'image')} of {counted(k, 'class')}"
    elif not 0 <= int(labels.min()) <= int(labels.max()) < k:
        yield f"its labels are {int(labels.min())}..{int(labels.max())}, and its classes are 0..{k - 1}"
    if not all(isinstance(name, str) for name in artifact.class_names):
        yield "a class has a name that is not text"
    if not all(isinstance(rate, float) and 0 < rate < math.inf for rate in (artifact.step_size, *rates)) or not rates:
        yield f"its step sizes are {[artifact.step_size, *rates]}, not positive numbers"
    if not isinstance(artifact.stated_has_step_size, bool | None):
        yield f"has_step_size is {artifact.stated_has_step_size!r}, not true or false"
    if not isinstance(artifact.recipe, dict) or not isinstance(artifact.provenance, dict):
        yield "its recipe or its provenance is not a mapping"


def _transform_of(
    location: Location, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]
) -> Transform | KeptTransform | LeftOutTransform:
    if "is_left_out" in metadata:
        return _left_out_of(location, metadata)
    if "digest" not in metadata:
        pieces = {name.removeprefix(_PREFIX): array for name, array in arrays.items() if name.startswith(_PREFIX)}
        return Transform.from_arrays(pieces, metadata, location.uri)
    if not re.fullmatch(r"[0-9a-f]{32}", str(metadata["digest"])):  # the digest becomes part of a path
        raise damaged(location, "The digest of its transform is invalid")
    return KeptTransform(location, metadata["digest"], tuple(map(int, metadata["shape"])))


def _left_out_of(location: Location, metadata: Mapping[str, Any]) -> LeftOutTransform:
    channels, height, width = map(int, metadata["shape"])
    kind, fingerprint, eps = metadata["kind"], str(metadata["fingerprint"]), float(metadata["eps"])
    if kind not in ("zca", "standard") or not 0 < eps < math.inf:
        raise damaged(location, "Its transform is described wrongly")
    return LeftOutTransform(location.uri, kind, (channels, height, width), fingerprint, eps)


def _scoring_of(location: Location, metadata: Mapping[str, Any]) -> Mapping[str, Any] | Location | None:
    """Settings of the training that scored a set, or the location of a file that may hold them.

    Settings in the set's file come first. Without them, a set in a run's folder gives the location of that run's file
    with the settings. Any other set gives `None`. A set counts as in a run's folder if its file has the name that runs
    give to sets.
    """
    if "scoring" in metadata:
        return dict(metadata["scoring"])
    return location.parent / SCORING if location.path.rpartition("/")[2] == SYNTHETIC else None


def _read_safetensors(location: Location) -> tuple[dict[str, NDArray[Any]], Mapping[str, Any]]:
    """Read arrays and metadata of a file that the export "safetensors" wrote.

    Raises:
        StoreError: the file cannot be read.
        CorruptFileError: the file has another format, or its checksum is wrong or missing.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as parse

    data = location.read_bytes()
    try:
        arrays = parse(data)  # checks that every array lies within the file
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = json.loads(header["__metadata__"][KIND])
        if not isinstance(metadata, dict):
            raise TypeError("its metadata is not a mapping")
        written, found = metadata.pop(CHECKSUM, None), checksum(arrays, metadata)
    except (SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"{location.uri} is not a synthetic set in safetensors format ({type(error).__name__}: {error})",
            "It is damaged, or was written by another program",
            "Export the set again with `datm-ray export FILE --format safetensors`",
        ) from error
    if written != found:
        raise CorruptFileError(
            f"{location.uri} has {'no checksum' if written is None else 'a wrong checksum'}",
            "It was altered, or was written by another program",
            "Export the set again with `datm-ray export FILE --format safetensors`",
        )
    return arrays, metadata


def checksum(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, Any]) -> str:
    """SHA-256 in hex digits over a set's metadata and the names, types, shapes and bytes of its arrays."""
    # Round trip through JSON, to compare with the form that is read back.
    digest = sha256(json.dumps(json.loads(json.dumps(metadata)), sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
