"""Card of a synthetic set: the README.md with which a set is published, as hubs for data sets show it."""

from __future__ import annotations

import dataclasses
import io
import re
from typing import Any

import yaml
from PIL import Image

from datm_ray.artifact import SAFETENSORS, Artifact, without_transform
from datm_ray.config import RunConfig, unread_keys
from datm_ray.core.training.loop import OPTIMISERS, Schedule
from datm_ray.errors import RunDirectoryError
from datm_ray.interop.exports import EXPORTS
from datm_ray.report.gallery import contact_sheet
from datm_ray.report.page import costs_of, provenance_lines, template, what_was_done
from datm_ray.report.results import RunSummary, Table, accuracies, cost_lines, network_accuracies
from datm_ray.words import one_line

SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
"""Exclusive upper bound of the number of images -> size category in the cards of Hugging Face's data sets."""
CARD = "README.md"
"""Name of the card's file, which hubs show."""
_LICENCE = re.compile(r"^(#+ .*licen[cs].*|.*licen[cs].*\n *[-=]+ *)$", re.MULTILINE | re.IGNORECASE)
"""Pattern of the licence's heading, a card's last section: any heading with "licence" or "license", also underlined."""
_MADE = "\n## How it was made\n"
"""Heading of a card's section before the licence."""
PREVIEW_PIXELS = 96
"""Width in pixels up to which images in preview.png are enlarged, by a whole factor; wider images keep their size."""


def published_files(run: RunSummary, earlier: str = "", *, transform: bool = True) -> dict[str, bytes]:
    """Name -> content of the files with which a finished set is published.

    These are a preview, Parquet and safetensors files, and last the card, a README.md that describes the set.

    Args:
        run: the run.
        earlier: text of an earlier card, whose licence the new one keeps; "" if there is none.
        transform: False to leave a transform above `INLINE_BYTES` (64 KiB), such as whitening, out of safetensors.

    Raises:
        RunDirectoryError: the run has no synthetic set yet, or the earlier card's licence cannot be read.
        ConfigError: the set was scored by a training that this version does not have.
    """
    if run.synthetic is None:
        raise RunDirectoryError(
            f"{run.folder.uri} holds no synthetic set",
            "its distillation is not finished",
            "run the same `datm-ray run` again: it resumes",
        )
    everything = run.synthetic if transform else without_transform(run.synthetic)
    text = _with_licence_of(earlier, card(run, run.synthetic, is_whole=everything is run.synthetic))
    files = {"preview.png": _preview(run.synthetic), **EXPORTS["parquet"](run.synthetic)}
    return files | EXPORTS["safetensors"](everything) | {CARD: text.encode(errors="replace")}


def card(run: RunSummary, artifact: Artifact, *, is_whole: bool = True) -> str:
    """Card in Markdown: what the set is, how to use it, its accuracy beside the controls, and how it was made.

    Args:
        artifact: finished set of the run.
        is_whole: False if the set's safetensors file leaves the transform out.

    Raises:
        ConfigError: the set was scored by a training that this version does not have.
    """
    images = len(artifact.images)
    channels, height, width = artifact.images.shape[1:]
    rows = accuracies([run])
    return template("card.md.j2").render(
        title=one_line(f"{run.config.name}: {run.dataset_name} distilled to {images:,} images"),
        size=next((name for bound, name in SIZES.items() if images < bound), "n>1M"),
        method=run.config.method.rpartition(":")[2],
        done=one_line(what_was_done(run)),
        made=f"The method is {run.config.method}.",
        training=_in_words(artifact, ["epochs", "batch_size", "optimiser", "learning_rate"]),
        image=f"{channels}×{height}×{width} in {len(artifact.class_names)} classes",
        clipped=artifact.clipped_in_words(),
        is_whole=is_whole,
        is_plain=is_whole and artifact.transform.kind == "standard",
        whole_training=_whole_training_in_words(artifact),
        source=_source(run.config),
        teacher=_taught(artifact),
        table=as_markdown(rows) if run.scores else "",
        networks=as_markdown(network_accuracies(run)) if run.networks else "",
        facts=[(name, one_line(value)) for name, value in provenance_lines(artifact.provenance) if value],
        costs=as_markdown(table) if (table := costs_of(cost_lines(run))) else "",
        recipe=yaml.safe_dump(_recipe(run.config), sort_keys=False, allow_unicode=True).strip(),
        dataset=one_line(run.dataset_name),
    )


def as_markdown(table: Table) -> str:
    """Format a table in Markdown. Each cell has its value and, after it, its note."""
    rows = [
        [line.title, *(" ".join(filter(None, [each.value, each.note])) for each in line.cells)] for line in table.lines
    ]
    cells = [[one_line(cell).replace("|", "\\|") for cell in row] for row in [list(table.headings), *rows]]
    cells.insert(1, ["---"] * len(table.headings))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _source(config: RunConfig) -> str:
    """Arguments of `datm_ray.data.load_raw` that read a run's images, with "PATH" for a path."""
    data = config.dataset
    path = '"PATH", ' if data.path else ""
    resize = f"resize={data.resize}, " if data.resize else ""
    return f'"{data.source}", {path}{resize}validation={data.validation}'


def _whole_training_in_words(artifact: Artifact) -> str:
    """Settings with which the networks that scored the set were trained, as text. Defaults are left out."""
    training, _ = artifact.scored_training()
    unused = {name for each in OPTIMISERS.values() for name in each.settings}
    unused -= set(OPTIMISERS[training.optimiser].settings)
    usual = {field.name for field in dataclasses.fields(training) if getattr(training, field.name) == field.default}
    left_out = unused | usual - {"optimiser"}
    return _in_words(artifact, [each.name for each in dataclasses.fields(training) if each.name not in left_out])


def _in_words(artifact: Artifact, names: list[str]) -> str:
    """Fields `names` of the schedule with which the networks that scored the set were trained, as text.

    The text adds a remark if the learning rate was neither learned nor chosen.
    """
    training, is_chosen = artifact.scored_training()
    words = ", ".join(_setting(training, name) for name in names)
    return words if is_chosen else f"{words}; the learning rate was neither learned nor chosen"


def _setting(training: Schedule, name: str) -> str:
    value = getattr(training, name)
    return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"


def _preview(artifact: Artifact) -> bytes:
    """Picture of some images of the set, a row for each class, as a PNG file."""
    sheet, _, _ = contact_sheet(artifact)
    scale = max(1, PREVIEW_PIXELS // artifact.images.shape[3])
    sink = io.BytesIO()
    Image.fromarray(sheet.repeat(scale, axis=0).repeat(scale, axis=1)).save(sink, "PNG")
    return sink.getvalue()


def _recipe(config: RunConfig) -> dict[str, Any]:
    """Recipe in a set's card: the settings that the method reads and that differ from the defaults.

    Paths of this machine are left out. Section `cluster` keeps only its precision. A set that was read from files has a
    section `given`: its path becomes the published file, and the digest of the original files is left out.
    """
    cluster = set(type(config.cluster).model_fields) - {"precision"}
    left_out: dict[str, Any] = {
        "cluster": cluster,
        "dataset": {"path"},
        "distill": {"continue_from"},
        "given": {"digest"},
    }
    for key in unread_keys(config):
        section, _, name = key.partition(".")
        left_out[section] = (left_out.get(section) or set()) | {name} if name else True
    found = config.model_dump(mode="json", exclude_defaults=True, exclude=left_out)
    if "given" in found:
        found["given"]["path"] = SAFETENSORS
    return {name: value for name, value in found.items() if value != {}}


def _taught(artifact: Artifact) -> str:
    """Text on a teacher whose labels the scored networks had in place of the set's own; "" without a teacher."""
    temperature = artifact.scored_training()[0].temperature
    if temperature is None:
        return ""
    return (
        f"The networks below had a teacher's labels for every batch, at temperature {temperature:g}, in place of the "
        "set's own. These labels are not part of this folder, and the code above trains on the set's own."
    )


def is_card(text: str) -> bool:
    """True if a README.md is the card of a set, as `card` writes it."""
    return text.startswith("---\npretty_name: ") and "\n- dataset-distillation\n" in text.partition("\n---\n")[0]


def _with_licence_of(earlier: str, text: str) -> str:
    """New card `text` with the licence of the card `earlier`; `text` unchanged if `earlier` is "".

    The licence is the keys of the card's front matter that begin with "license", and all text from the licence's
    heading on. Users fill in both. A licence section that a user has removed stays removed.

    Raises:
        RunDirectoryError: the front matter of the earlier card cannot be read.
    """
    if not earlier:
        return text
    try:
        front = dict(yaml.safe_load(earlier.removeprefix("---\n").partition("\n---\n")[0]))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise RunDirectoryError(
            f"the front matter of the earlier {CARD} is no YAML, and its licence would be lost",
            one_line(str(error)),
            "mend it, or give another --out",
        ) from error
    kept = {key: value for key, value in front.items() if str(key).startswith("license")}
    lines = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True) if kept else ""
    return _parted(text)[0].replace("license: other\n", lines, 1) + _parted(earlier)[1]


def _parted(card: str) -> tuple[str, str]:
    """Two parts of a card: before the heading of its licence, and from there on. Without licence, the second is ""."""
    found = _LICENCE.search(card, max(0, card.find(_MADE)))
    at = found.start() if found else len(card)
    return card[:at], card[at:]
