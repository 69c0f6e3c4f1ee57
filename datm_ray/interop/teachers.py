"""Import of trained classifiers, such as torchvision's, as experts whose last epoch alone is stored.

A file holds a state_dict, written by `torch.save` or by safetensors: tensors by name. Names may be those of
torchvision, of timm, or of this package. Running statistics are stored too, so SRe2L, labels and MetaDD use an imported
network like one that this package has trained. Trajectory matching cannot use it, because it needs earlier epochs.

A file does not say how the images of its training were normalised, nor in which order its classes are. So the recipe
must give `dataset.mean` and `dataset.std`, and the classes of its data set must have the same order. The import
measures the accuracy on test images, which reveals most mistakes; the command line warns if the network only guesses.

`torch.load` reads files with `weights_only=True`, which executes nothing from them. Beside the weights,
an `argparse.Namespace` and numbers of numpy become empty objects; a file with objects of other classes is refused.
Tests: tests/test_teachers.py.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from datm_ray.config import RunConfig
from datm_ray.core.networks.parameters import flatten, flatten_buffers, float_buffers
from datm_ray.core.networks.registry import build_network
from datm_ray.data.dataset import transform_of
from datm_ray.data.sources import RawDataset, load_raw
from datm_ray.data.transform import Transform
from datm_ray.errors import ConfigError, CorruptFileError, StoreError
from datm_ray.interop.accuracy import Accuracy, accuracy_of
from datm_ray.interop.names import timm_names, torchvision_names
from datm_ray.stages.experts.train import expert_group, expert_info
from datm_ray.stages.methods.registry import trained_networks
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.trajectories import Snapshot
from datm_ray.words import data_size, listed

_WRAPPERS = ("state_dict", "model")
"""Keys under which training programs store a state_dict beside other things."""
_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")
"""Prefixes that torch adds to the names of weights if a network is trained in parallel, averaged or compiled."""


_COUNTERS = ("num_batches_tracked", "n_averaged")
"""Ends of the names of counters in a state_dict, which no network needs to compute its logits."""


class _Discarded:
    """Empty stand-in for an object that a training program saved beside a state_dict. Its content is not read."""

    def __new__(cls, *_: object) -> _Discarded:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


_DISCARDED = ("argparse.Namespace", *(f"numpy.{core}.multiarray.scalar" for core in ("_core", "core")), "numpy.dtype")
"""Classes and functions that a torch file may name beside tensors. `torch.load` makes a `_Discarded` for each."""


@dataclass(frozen=True)
class ImportedTeacher:
    """Result of importing a trained classifier."""

    group: str
    """Key (folder) of the expert group in which the network was stored."""
    expert: int
    """Number, within the group, of the expert that the network was stored as."""
    accuracy: Accuracy
    """Accuracy of the classifier on test images of the recipe's data set."""


def import_teacher(file: str, config: RunConfig, store_uri: str) -> ImportedTeacher:
    """Store a trained classifier as an expert of a recipe, under the first free number.

    If the recipe has several networks, the classifier becomes an expert of the first network that its weights fit, by
    their names and shapes.

    Args:
        file: path or URI of a state_dict, in safetensors format if the name ends in .safetensors, else torch's.
        config: recipe of the experts, with the normalisation that the classifier was trained with.
        store_uri: path or URI of the trajectory store to write to.

    Raises:
        ConfigError: the recipe trains no network, or does not give the normalisation.
        CorruptFileError: the file holds no state_dict or impossible values, or its network gives logits that are not
            finite.
        DatasetError: the recipe's images cannot be read.
        StoreError: the file cannot be read or fits no network of the recipe, the experts are stored already, or another
            process stores them at the same time.
    """
    d = config.dataset
    if d.statistics is None:
        raise ConfigError(
            "dataset.mean and dataset.std are not given",
            "the file does not say how the images of its network were normalised",
            "give them; those of ImageNet are --set dataset.mean=[0.485,0.456,0.406] "
            "--set dataset.std=[0.229,0.224,0.225]",
        )
    place = open_location(file)
    weights = read_weights(place)
    raw = load_raw(d.source, d.path, resize=d.resize, validation=d.validation, streamed=d.streamed)
    transform = transform_of(raw, "standard", d.statistics)
    networks = trained_networks(config.resolved(raw.size))
    if not networks:
        raise ConfigError(f"method {config.method} trains no network", remedy="give a recipe of sre2l or with metadd")
    different = []
    for each in networks:
        network = build_network(each.network.for_images(raw.channels, raw.size, raw.classes), seed=0)
        difference = load_weights(network, weights)
        if not difference:
            return _store(network, each, raw, transform, store_uri, place)
        different.append(f"{each.network.architecture}: {difference}")
    raise StoreError(
        f"{place.uri} does not fit {config.name}",
        different[0],
        "give a recipe with the file's network, norm and classes; up to 64 pixels a side, its first layers are small",
    )


def read_weights(place: Location) -> dict[str, Tensor]:
    """Read the tensors of a state_dict by name, without the prefixes that torch's data parallelism and compiler add.

    Raises:
        StoreError: the file is missing, cannot be read, or does not fit into memory.
        CorruptFileError: the file holds no state_dict, values that are not finite, or negative running variances.
    """
    size = place.size()
    (content,) = place.read_ranges([(0, size)])
    try:
        found = _content(content, is_safetensors=place.path.endswith(".safetensors"))
        found = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)), found)
        weights = {_PREFIXES.sub("", name): tensor.detach() for name, tensor in found.items()}
        if len(weights) < len(found):
            raise ValueError("two names become one")
        if any(tensor.nbytes > tensor.untyped_storage().nbytes() for tensor in weights.values()):
            raise ValueError("a tensor has values twice")  # a small file could ask for any amount of memory
        is_finite = all(bool(tensor.isfinite().all()) for tensor in weights.values())
    except Exception as error:  # archives and pickles raise errors of many classes
        if isinstance(error, MemoryError) or "t allocate memory" in str(error):  # torch's text
            raise StoreError(
                f"there is not enough memory to read {place.uri}",
                f"the file has {data_size(size)}",
                "end other programs, or import it on a machine with more memory",
            ) from error
        named = re.search(r"GLOBAL ([\w.]{1,100})", str(error))  # torch names the class or function that it refuses
        raise CorruptFileError(
            f"{place.uri} is not a state_dict",
            f"It holds an object of {named[1]}, and objects could run code"
            if named
            else "It holds other things than tensors by name, or was cut off",
            "Write it with torch.save(network.state_dict(), FILE) or safetensors.torch.save_file",
        ) from error
    if not is_finite:
        remedy = "import a file of an earlier epoch, or train the network again"
        raise CorruptFileError(f"{place.uri} holds values that are not finite", "The training diverged", remedy)
    _require_variances(place, weights)
    return weights


def _content(content: memoryview, *, is_safetensors: bool) -> Any:
    """Decode `content`, the bytes of a torch or safetensors file. Other bytes raise errors of many classes."""
    if is_safetensors:
        return load_safetensors(bytes(content))
    with warnings.catch_warnings(), torch.serialization.safe_globals([(_Discarded, name) for name in _DISCARDED]):
        warnings.simplefilter("ignore")  # other pickle versions: torch reads or refuses them
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _require_variances(place: Location, weights: Mapping[str, Tensor]) -> None:
    """Raise a `CorruptFileError` if a running variance is negative, which no training can cause."""
    for name, tensor in weights.items():
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise CorruptFileError(
                f"{place.uri} holds negative variances in {name}",
                "another program mixed up or changed its tensors",
                "write the file again from the trained network",
            )


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Copy weights into a network of this package. Their names may be torchvision's, timm's or the network's own.

    Returns:
        "" if the weights fit. Otherwise a text with the differences in names and shapes, by the naming that fits best;
        the network then stays unchanged.
    """
    own = dict(network.named_parameters()) | float_buffers(network)
    given = {name: tensor for name, tensor in weights.items() if not name.endswith(_COUNTERS)}
    known = (torchvision_names(network), timm_names(network), {name: name for name in own})
    names = max(known, key=lambda names: len(given.keys() & names.values()))
    shapes = {names[name]: tuple(tensor.shape) for name, tensor in own.items()}
    differences = [
        _named("it lacks", shapes.keys() - given.keys()),
        _named("it has unknown", given.keys() - shapes.keys()),
        _named(
            "other shapes:",
            [
                f"{name} {list(given[name].shape)} instead of {list(shape)}"
                for name, shape in shapes.items()
                if name in given and tuple(given[name].shape) != shape
            ],
        ),
    ]
    if not any(differences):
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(given[names[name]])
    return "; ".join(filter(None, differences))


def _named(what: str, names: Collection[str]) -> str:
    """Text that starts with `what` and lists the first three names; "" if there are none."""
    return f"{what} {listed(sorted(names), 3)}" if names else ""


def _store(
    network: nn.Module, config: RunConfig, raw: RawDataset, transform: Transform, store_uri: str, file: Location
) -> ImportedTeacher:
    group = expert_group(store_uri, config, raw.name, raw.fingerprint)
    missing = sorted(set(range(config.experts.count)) - set(group.experts()))
    if not missing:
        raise StoreError(
            f"{group.location.uri} holds the experts of {config.name} already",
            "they were trained or imported before",
            f"use them, delete them with `datm-ray store rm {store_uri} {group.key}`, or give another --store",
        )
    accuracy = accuracy_of(network, raw, transform, file.uri)
    group.write_transform(transform.to_arrays(), transform.to_metadata())
    params, buffers = flatten(network).numpy(), flatten_buffers(network).numpy()
    digest = sha256(params.tobytes() + buffers.tobytes()).hexdigest()
    origin = {"file": PurePosixPath(file.path).name, "digest": digest}
    epochs = (config.experts.epochs,)
    info = expert_info(config, group, raw.fingerprint, network, missing[0], seed=-1, epochs=epochs, imported=origin)
    snapshot = Snapshot(epochs[0], -1, float("nan"), accuracy.share, params, buffers)
    if not group.write_expert(missing[0], [snapshot], info):
        raise StoreError(
            f"{file.uri} was not stored in {group.location.uri}",
            f"another process stored expert {missing[0]} at the same time",
            f"see it with `datm-ray store show {store_uri} {group.key}`; use it, or give another --store",
        )
    return ImportedTeacher(str(group.key), missing[0], accuracy)
