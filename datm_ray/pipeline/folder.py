"""Files about the runs in an output folder: each run's recipe and its note on data and experts; reports and cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from datm_ray.config import RunConfig, load_recipe_of_run, unread_keys
from datm_ray.data.patience import Say, silent
from datm_ray.data.sources import RawDataset
from datm_ray.errors import RunDirectoryError
from datm_ray.report.card import CARD, is_card, published_files
from datm_ray.report.page import write_report
from datm_ray.report.results import RunSummary, write_summary
from datm_ray.stages.distill.checkpoint import CHECKPOINT, copy_checkpoint
from datm_ray.stages.distill.pieces import PIECES
from datm_ray.stages.distill.task import COST, INITIAL, SYNTHETIC
from datm_ray.stages.evaluate.scores import read_fair_rows, read_fair_scores, read_network_scores, read_scores
from datm_ray.stages.labels import labels_location
from datm_ray.store.files.filesystem import Location, open_location
from datm_ray.store.labels import INFO_FILE
from datm_ray.store.sealed import rejecting_nonsense

RECIPE, DATA, LEASE = "recipe.yaml", "dataset.json", "lease.json"
RESULTS = {INITIAL, CHECKPOINT, SYNTHETIC, PIECES, "evaluation"}
"""Names of files and folders that each mark a run's folder as one with results. Experts are in the store."""


@dataclass(frozen=True)
class DataNote:
    """Content of dataset.json in a run's folder: the data set and the experts that the run's results were made from."""

    fingerprint: str
    training_images: int
    name: str | None = None
    """Name of the data set; `None` in notes of earlier versions."""
    experts: Mapping[str, str] = field(default_factory=dict)
    """Expert, as KEY/NUMBER of its group and its number there -> digest of its imported weights; "" if it was trained.
    Trained experts after a group's first may be left out. Empty in notes of earlier versions."""

    @classmethod
    def read(cls, folder: Location) -> DataNote | None:
        """Read dataset.json in a run's folder; `None` if the file does not exist.

        Raises:
            CorruptFileError: the file's content is not a `DataNote`.
        """
        place = folder / DATA
        if not place.exists():
            return None
        note = place.read_json()
        with rejecting_nonsense(place):
            experts = {str(key): str(digest) for key, digest in dict(note.get("experts", {})).items()}
            return cls(str(note["fingerprint"]), int(note["training_images"]), note.get("name"), experts)


def write_note(folder: Location, raw: RawDataset, experts: Mapping[str, str]) -> None:
    """Write dataset.json, the note about a run's data set and experts, into the run's folder.

    If the folder has results, experts in its earlier note stay in the note, even if the store has lost them.

    Args:
        folder: the run's folder.
        raw: the run's images.
        experts: the run's experts, as in `DataNote.experts`.
    """
    earlier = DataNote.read(folder) if has_results(folder) else None
    counts = {"training_images": len(raw.train), "test_images": len(raw.test)}
    facts = {"name": raw.name, "fingerprint": raw.fingerprint, **counts}
    (folder / DATA).write_json(facts | {"experts": {**(earlier.experts if earlier else {}), **experts}})


def continued_run(config: RunConfig, folder: Location) -> Location | None:
    """Folder of the run that `distill.continue_from` names, if its state must still be copied into the run's `folder`.

    `None` if the recipe continues no run, or if `folder` has a checkpoint or a finished set already.
    """
    place = config.distill.continue_from
    if place is None or "distill.continue_from" in unread_keys(config):
        return None
    has_state = (folder / CHECKPOINT).exists() or (folder / SYNTHETIC).exists()
    return None if has_state else open_location(place)


def continue_set(config: RunConfig, folder: Location) -> int | None:
    """Copy first set, checkpoint and cost of the run that `distill.continue_from` names into the run's `folder`.

    Returns the number of iterations done in the copied checkpoint. Returns `None` if nothing was copied, because the
    recipe continues no run, or `folder` has a checkpoint or a finished set already.
    """
    source = continued_run(config, folder)
    if source is None:
        return None
    (folder / INITIAL).write_atomic((source / INITIAL).read_bytes())
    done = copy_checkpoint(source, folder)
    if (source / COST).exists():
        (folder / COST).write_atomic((source / COST).read_bytes())
    return done


def has_results(folder: Location) -> bool:
    """True if a run's folder holds results, so that no other recipe may use the folder."""
    return not RESULTS.isdisjoint(folder.list())


def read_recipe(folder: Location) -> RunConfig | None:
    """Read the configuration that an earlier command wrote into a run's folder; `None` if there is none.

    Raises:
        ConfigError: the file is not a valid configuration.
    """
    place = folder / RECIPE
    if not place.exists():
        return None
    return load_recipe_of_run(place.read_bytes().decode(errors="replace"), place.uri)


def is_folder_of(config: RunConfig, folder: Location) -> bool:
    """True if a folder that holds the recipe `config` has the run's name; False if it was moved or copied."""
    return folder.parent / config.name == folder


def stored_labels(folder: Location, config: RunConfig, dataset_fingerprint: str) -> Location | None:
    """Folder of the stored labels that a recipe asks for; `None` if it asks for none or none are stored yet.

    Args:
        folder: the run's folder.
        config: the recipe.
        dataset_fingerprint: fingerprint of the run's images.
    """
    if not config.evaluate.stores_labels:
        return None
    place = labels_location(folder, config, dataset_fingerprint)
    return place if (place / INFO_FILE).exists() else None


def report(out: str, say: Say = silent) -> Location:
    """Write report.html and summary.json over all runs of an output folder, and return the report's location.

    No data set is needed.

    Args:
        out: output folder, a path or URI.
        say: shows a line about each folder that is left out because its name is not that of its run.

    Raises:
        RunDirectoryError: the folder holds no runs, or a run's folder lacks its note, dataset.json.
    """
    folder, configs = open_location(out), list[RunConfig]()
    for place in (folder / name for name in folder.list()):
        config = read_recipe(place)
        if config is not None and is_folder_of(config, place):
            configs.append(config)
        elif config is not None:
            say(f"left out of the report: {place.uri} was moved or copied; the name of its run is {config.name!r}")
    if not configs:
        raise RunDirectoryError(f"{folder.uri} holds no runs", remedy="give the --out of an earlier `datm-ray run`")
    found = summaries(folder, configs)
    write_summary(folder, found)
    return write_report(folder, found)


def publish(run: str, out: str, *, transform: bool = True) -> list[str]:
    """Write a finished set for publication: preview, Parquet, safetensors, and a card (README.md) with its accuracies.

    No data set is needed. Returns the names of the files written, the card last, so that an earlier card stays until
    the new set is complete. The licence of an earlier card of `publish` is kept.

    Args:
        run: folder of a run, a path or URI.
        out: folder to write to.
        transform: False to leave a large transform, 38 MB for whitened 32x32 RGB, out of safetensors. `Artifact.fitted`
            makes it again from the real training images.

    Raises:
        RunDirectoryError: the folder holds no run, its set is not finished, or `out` has a README.md that is no card
            or whose licence cannot be read.
        StoreError: the set's transform is missing, or `out` cannot be written.
    """
    folder, to = open_location(run.rstrip("/")), open_location(out)
    config = read_recipe(folder)
    if config is None or not is_folder_of(config, folder):
        raise RunDirectoryError(
            f"{folder.uri} is not the folder of a run",
            "a run's folder holds its recipe.yaml and has the run's name",
            "give <out>/<name>, such as runs/digits-ipc1",
        )
    present = (to / CARD).read_bytes().decode(errors="replace") if (to / CARD).exists() else ""
    present = present.replace("\r\n", "\n")  # editors on Windows end lines with "\r\n"
    if present and not is_card(present):
        raise RunDirectoryError(
            f"{(to / CARD).uri} exists and is no card of a set",
            "the folder holds something else",
            "give another --out, such as a new folder",
        )
    files = published_files(summaries(folder.parent, [config])[0], present, transform=transform)
    for name, content in files.items():
        (to / name).write_atomic(content)
    return list(files)


def summaries(out: Location, configs: Sequence[RunConfig]) -> list[RunSummary]:
    """Read scores and other facts for the report: one summary for each of these runs of the output folder.

    Raises:
        RunDirectoryError: a run's folder lacks its note, dataset.json.
    """
    found = []
    for config in configs:
        note = DataNote.read(out / config.name)
        if note is None:
            raise RunDirectoryError(
                f"{(out / config.name / DATA).uri} is missing",
                "the run's folder is not complete",
                "run the recipe again with the same --out",
            )
        where = (out, config, note.fingerprint)
        found.append(
            RunSummary(
                config,
                out / config.name,
                read_scores(*where),
                note.training_images,
                read_network_scores(*where),
                fair=read_fair_scores(*where),
                fair_rows=read_fair_rows(*where),
                dataset=note.name,
                labels=stored_labels(out / config.name, config, note.fingerprint),
            )
        )
    return found
