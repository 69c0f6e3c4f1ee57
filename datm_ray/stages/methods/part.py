"""One worker's part in the distillation of a set: settings, data, other workers, and the images that it holds."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datm_ray.config import Role, RunConfig
from datm_ray.core.synthetic import Rows
from datm_ray.data.dataset import Dataset
from datm_ray.runtime.mesh import Mesh
from datm_ray.stages.experts.networks import ExpertNetworks
from datm_ray.store.files.filesystem import Location
from datm_ray.store.tensors import dump_tensors, read_tensors

SHARED_KIND = "shared by pieces"

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Piece:
    """Some images of each of some classes of a set, which one worker makes independently of other such pieces."""

    number: int
    """Number of the piece (part of a set) within its set, from 0."""
    classes: range
    images: range
    """Range of the images that the piece has of each class, in the numbering of the whole set: from 0 to ipc - 1."""

    def rows(self, ipc: int) -> NDArray[np.int64]:
        """Indices of the piece's images, class by class, in a whole set with `ipc` images per class."""
        rows: NDArray[np.int64] = (np.array(self.classes)[:, None] * ipc + np.array(self.images)).flatten()
        return rows


@dataclass(frozen=True)
class Part:
    """One worker's part in the distillation of one set: settings, data, and which images the worker holds."""

    config: RunConfig
    dataset: Dataset
    store_uri: str
    mesh: Mesh
    """Workers that distil the set together."""
    device: torch.device
    sharing: int
    """Number of distilling workers that may run on this node at the same time."""
    piece: Piece | None = None
    """Piece (some images of some classes) that the worker makes; `None` if the set is not made in pieces."""
    experts: Sequence[ExpertNetworks] | None = None
    """Trained networks that the worker keeps from an earlier piece; `None` to read them from the store."""
    kept: dict[Any, Any] = field(default_factory=dict)
    """Objects that a method made from `experts` and keeps for the worker's next piece, such as compiled code."""
    shared: Location | None = None
    """Folder of files that all pieces of the set may need, see `shared_arrays`; `None` if the set is not made in
    pieces. The folder is removed with the pieces."""

    @cached_property
    def rows(self) -> Rows:
        """Range of the synthetic set's images that the worker holds.

        If the worker makes a piece (some images of some classes), images are counted within the piece.
        """
        if self.piece is not None:
            return Rows(0, len(self.piece.classes) * len(self.piece.images))
        return Rows.of_shard(self.mesh.column, self.mesh.columns, self.dataset.classes, self.config.distill.ipc)

    @property
    def role(self) -> Role:
        """Backbones and MetaDD networks that this worker computes."""
        return self.config.roles[self.mesh.row] if self.mesh.rows > 1 else self.config.whole_role


def shared_arrays(
    part: Part, name: str, settings: Hashable, compute: Callable[[], Generator[None, None, Arrays]]
) -> Generator[None, None, Arrays]:
    """Return arrays that all pieces of a set need. Calls `compute` only if no worker has stored them. Yields meanwhile.

    Workers do not wait for each other, so two may compute the same arrays at the same time. The file of the first one
    counts for both.

    Args:
        part: a worker's part, which is a piece of a set.
        name: name of the file, without its suffix.
        settings: all that decides the arrays of this name, besides the trained networks and the data set. The worker
            also keeps the arrays for other runs with equal settings.
        compute: makes the arrays, by name, and yields between steps.
    """
    assert part.shared is not None
    place, kept, key = part.shared / f"{name}.arrow", part.kept, (name, settings)
    if place.uri not in kept:
        if not place.exists():
            arrays: Arrays = kept[key] if key in kept else (yield from compute())
            place.write_once(lambda file: dump_tensors(file, arrays, kind=SHARED_KIND, metadata={}))
        kept[place.uri] = kept[key] = read_tensors(place, kind=SHARED_KIND).arrays
    stored: Arrays = kept[place.uri]
    return stored
