"""Checkpoints of a distillation. Any number of class shards writes one, and any other number can read it.

A class shard is the images of some classes, which a worker holds.

    checkpoint.arrow    data that all shards share: step sizes, curves, counters, and the names of the parts
    checkpoint/<iteration>-<first>-<last>-<attempt>.arrow   images [first, last) of the set, those of one shard
    attempt.json        the attempt that may write, see `Attempt`

Every shard writes its images as a part of the checkpoint. After all parts are written, the first worker replaces
checkpoint.arrow. Only then is the new checkpoint valid. A run killed at any moment finds the old file with its parts,
or the new file with its parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from datm_ray.config import DistillConfig
from datm_ray.core.synthetic import Rows
from datm_ray.errors import CorruptFileError, StoreError
from datm_ray.methods.state import State, with_present_names
from datm_ray.runtime.mesh import Mesh
from datm_ray.store.claims import Claim
from datm_ray.store.files.filesystem import Location, MissingFileError
from datm_ray.store.sealed import reading_again, rejecting_nonsense
from datm_ray.store.tensors import read_tensors, write_tensors

CHECKPOINT = "checkpoint.arrow"
PARTS = "checkpoint"
ATTEMPT = "attempt.json"
AnyState = TypeVar("AnyState", bound=State[Any])
KIND = "checkpoint"
_PART = re.compile(r"(\d{8})-(\d+)-(\d+)(?:-([0-9a-f]{12}))?\.arrow")


@dataclass
class Attempt:
    """One attempt to distil a set, by any number of workers. The latest attempt owns the set's folder.

    Each attempt claims the folder before it reads anything there. The first worker checks the claim just before it
    renames each finished file into place. So a first worker left over from a lost connection ends with an
    `OvertakenError`.

    A write of an old attempt may pass this check, be delayed until a new attempt has started, and then still replace a
    file. This corrupts nothing, because each file is written whole. If the file is checkpoint.arrow, the part files
    that it names still exist: the new attempt deletes parts of old attempts only up to the iteration from which the new
    attempt resumed. If the new attempt is then killed before its next checkpoint, a third attempt resumes from the
    delayed checkpoint. Only the iterations between this checkpoint and the one that it replaced are computed again.
    """

    folder: Location
    """Folder of the set. On the first worker, every write first checks that the attempt still owns the folder."""
    token: int
    """Number that no other attempt has. Names of a checkpoint's part files contain the number."""
    resumed_at: int = -1
    """Number of iterations done at the checkpoint from which the attempt resumes; -1 if there was no checkpoint."""

    @classmethod
    def start(cls, folder: Location, mesh: Mesh) -> Attempt:
        """Claim a set's folder for a new attempt. All workers that distil the set call this together.

        From then on, a write by the first worker of an earlier attempt raises an `OvertakenError`.
        """
        claim = Claim(folder / ATTEMPT)
        if mesh.is_first:
            claim.take()
            folder = replace(folder, guard=claim.require)
        mine = torch.tensor([claim.token * mesh.is_first], dtype=torch.float64)
        return cls(folder, int(mesh.sum_over_all(mine)))


def save_checkpoint(
    attempt: Attempt,
    state: State[Any],
    rows: Rows,
    mesh: Mesh,
    recipe: Mapping[str, Any],
    computed: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a checkpoint of the distillation. All its workers call this together.

    Args:
        attempt: attempt at the set, which must still own the folder.
        state: state of the distillation, with the images that this worker holds.
        rows: range of the set's images that this worker holds.
        mesh: workers of the distillation.
        recipe: settings that decide the result, to store in checkpoint.arrow.
        computed: how iterations were computed: for each change, a mapping as in the result of `read_computed`.

    Raises:
        OvertakenError: on the first worker, if a newer attempt owns the folder.
    """
    held, shared = state.to_arrays()
    folder = attempt.folder
    if mesh.row == 0:
        write_tensors(folder / PARTS / _part_name(attempt, state.iteration, rows), held, kind=KIND, metadata={})
    written = mesh.gather(torch.tensor([[rows.first, rows.last]], device=state.synthetic.images.device))
    mesh.barrier()
    if written is not None:
        names = [_part_name(attempt, state.iteration, Rows(*bounds)) for bounds in written.tolist()]
        metadata = {"recipe": recipe, "iteration": state.iteration, "parts": names, "computed": list(computed)}
        write_tensors(folder / CHECKPOINT, shared, kind=KIND, metadata=metadata)
        _delete_older_parts(attempt, state.iteration)


def load_checkpoint(
    kind: type[AnyState], folder: Location, rows: Rows, settings: DistillConfig, device: torch.device
) -> AnyState | None:
    """Read the state of the last checkpoint for some images of the set; `None` if there is no checkpoint.

    The images may be divided otherwise than among the workers that wrote the checkpoint.

    Args:
        kind: class of the state.
        folder: folder of the set.
        rows: range of the set's images that this worker holds.
        settings: section `distill` of the recipe.
        device: device that gets the tensors.

    Raises:
        CorruptFileError: the checkpoint is damaged, or a part is missing, damaged or does not fit it.
    """
    if not (folder / CHECKPOINT).exists():
        return None
    try:
        # Another command that resumes this run may replace the checkpoint and delete the parts of the former one.
        return reading_again(
            folder / CHECKPOINT,
            lambda: _load(kind, folder, rows, settings, device),
            (CorruptFileError, MissingFileError),
        )
    except MissingFileError as error:
        raise _unusable(folder, f"names the part {error.fact.rpartition('/')[2]}, which is missing") from error


def _load(
    kind: type[AnyState], folder: Location, rows: Rows, settings: DistillConfig, device: torch.device
) -> AnyState:
    file = read_tensors(folder / CHECKPOINT, kind=KIND)
    if "parts" not in file.metadata:
        raise _unusable(folder, "names no parts")
    with rejecting_nonsense(folder / CHECKPOINT):
        held = _read_rows(folder, file.metadata["parts"], rows)
        state = kind.from_arrays(held, file.arrays, settings, device)
        _require_shapes(folder, state)
    return state


def copy_checkpoint(source: Location, folder: Location) -> int:
    """Copy the checkpoint of a finished distillation from folder `source` to `folder`. Returns the iterations done.

    checkpoint.arrow is copied last. Without this file, an interrupted copy does not count as a checkpoint.

    Raises:
        MissingFileError: `source` has no checkpoint, or lacks one of its parts.
        CorruptFileError: the checkpoint is damaged.
    """
    names = read_tensors(source / CHECKPOINT, kind=KIND).metadata.get("parts", ())
    with rejecting_nonsense(source / CHECKPOINT):
        files = [f"{PARTS}/{name}" for name in names if _part_rows(source, name)]
    for name in (*files, CHECKPOINT):
        (folder / name).write_atomic((source / name).read_bytes())
    return read_iteration(folder)


def read_computed(folder: Location) -> list[dict[str, Any]]:
    """How iterations were computed up to the checkpoint: one mapping for the start, and one for every change.

    A mapping has facts such as "precision", and as "from_iteration" the number of iterations done before. The list is
    empty if there is no checkpoint, or if an earlier version of this package wrote the checkpoint.

    Raises:
        CorruptFileError: the checkpoint is damaged, or its entries are no mappings.
    """
    place = folder / CHECKPOINT
    if not place.exists():
        return []
    metadata = read_tensors(place, kind=KIND).metadata
    with rejecting_nonsense(place):
        return [{**entry} for entry in metadata.get("computed", ())]


def read_iteration(folder: Location) -> int:
    """Number of iterations done at the checkpoint; -1 if there is none. Raises CorruptFileError if it is damaged."""
    place = folder / CHECKPOINT
    if not place.exists():
        return -1
    with rejecting_nonsense(place):
        return int(read_tensors(place, kind=KIND).metadata.get("iteration", 0))


def read_curves(folder: Location) -> dict[str, Any]:
    """Curves of a distillation from its checkpoint: column name, such as "history.loss" -> array of values.

    Columns named "history." have one value per iteration, of the first backbone if several are matched. Columns named
    "validation." describe validations, columns named "meta." describe MetaDD.

    Raises:
        MissingFileError: there is no checkpoint.
        CorruptFileError: the checkpoint is damaged, or lacks columns of iterations.
    """
    arrays = with_present_names(read_tensors(folder / CHECKPOINT, kind=KIND).arrays)
    if not {"history.iteration", "history.loss", "history.skipped"} <= arrays.keys():
        raise _unusable(folder, "has no columns for iterations, losses and skipped updates")
    with rejecting_nonsense(folder / CHECKPOINT):
        first = arrays.get("history.backbone", np.zeros_like(arrays["history.iteration"])) == 0
        curves = {name: array[first] for name, array in arrays.items() if name.startswith("history.")}
    return curves | {name: array for name, array in arrays.items() if name.startswith(("validation.", "meta."))}


def _read_rows(folder: Location, names: list[str], rows: Rows) -> dict[str, NDArray[Any]]:
    """Read the arrays of a range of the set's images from the part files. Returns array name -> joined array."""
    pieces: list[dict[str, NDArray[Any]]] = []
    found = rows.first
    for part, name in sorted((_part_rows(folder, name), name) for name in names):
        first, last = max(rows.first, part.first), min(rows.last, part.last)
        if first < last:
            arrays = read_tensors(folder / PARTS / name, kind=KIND).arrays
            if {len(array) for array in arrays.values()} != {part.last - part.first}:
                raise _unusable(folder, f"has a part {name} with other rows than its name says")
            cut = slice(first - part.first, last - part.first)
            pieces.append({key: array[cut] for key, array in arrays.items()})
            found += last - first
    if found != rows.last:
        raise _unusable(folder, f"holds {found - rows.first} of the {rows.last - rows.first} images asked for")
    # The first validation adds the chosen set. After a kill, only some parts may have this set.
    names_of_all = set(pieces[0]).intersection(*pieces)
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in names_of_all}


def _require_shapes(folder: Location, state: State[Any]) -> None:
    """Raise a `CorruptFileError` unless the shapes of the state's arrays fit each other and learned values are floats.

    A file with other shapes may have a valid checksum.
    """
    for held in (state.synthetic, state.chosen or state.synthetic, state.result):
        shapes = [tuple(each.shape) for each in (held.images, held.soft_labels, held.step_sizes, held.labels)]
        floats = all(each.is_floating_point() for each in (held.images, held.soft_labels, held.step_sizes))
        n = len(held.labels)
        if (
            list(map(len, shapes)) != [4, 2, 1, 1]
            or {shapes[0][0], shapes[1][0]} != {n}
            or not floats
            or not shapes[2][0]
        ):
            raise _unusable(folder, f"has a set whose shapes disagree: {shapes}")
    for name, momentum in state.momenta.items():
        if momentum.shape != state.synthetic.variable(name).shape:
            raise _unusable(folder, f"has momenta of {name} in another shape")


def _part_rows(folder: Location, name: str) -> Rows:
    match = _PART.fullmatch(name)
    if match is None:
        raise _unusable(folder, f"names {name!r} as a part of it")
    return Rows(int(match[2]), int(match[3]))


def _unusable(folder: Location, what: str) -> CorruptFileError:
    return CorruptFileError(
        f"{(folder / CHECKPOINT).uri} {what}",
        "it was not written by this program, or for another recipe",
        "if no other command works on it, move it away and run the same command: the set starts from iteration 0, "
        "and experts are kept",
    )


def _part_name(attempt: Attempt, iteration: int, rows: Rows) -> str:
    return f"{iteration:08d}-{rows.first}-{rows.last}-{attempt.token:012x}.arrow"


def _delete_older_parts(attempt: Attempt, iteration: int) -> None:
    """Delete part files (one worker's images of a checkpoint) that no checkpoint needs.

    These are this attempt's parts of iterations before `iteration`, and other attempts' parts up to the iteration from
    which this attempt resumed, inclusive. Later parts of another attempt stay, because a delayed checkpoint of that
    attempt may name them. A later attempt deletes them.
    """
    parts = attempt.folder / PARTS
    for name in parts.list():
        match = _PART.fullmatch(name)
        is_own = match is not None and match[4] == f"{attempt.token:012x}"
        if match and int(match[1]) < (iteration if is_own else attempt.resumed_at + 1):
            with suppress(StoreError):  # another process has removed it
                (parts / name).remove()
