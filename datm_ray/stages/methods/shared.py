"""Arrays that all pieces of a set need: one worker computes and stores them, and the other workers read them.

Tests: tests/stages/test_pieces.py.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping
from typing import Any

from numpy.typing import NDArray

from datm_ray.stages.methods.part import Part
from datm_ray.store.tensors import dump_tensors, read_tensors

KIND = "shared by pieces"

Arrays = Mapping[str, NDArray[Any]]


def shared_arrays(
    part: Part, name: str, settings: Hashable, compute: Callable[[], Generator[None, None, Arrays]]
) -> Generator[None, None, Arrays]:
    """Return the arrays that `compute` makes; call it only if no worker has stored them for the set. Yields meanwhile.

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
            place.write_once(lambda file: dump_tensors(file, arrays, kind=KIND, metadata={}))
        kept[place.uri] = kept[key] = read_tensors(place, kind=KIND).arrays
    stored: Arrays = kept[place.uri]
    return stored
