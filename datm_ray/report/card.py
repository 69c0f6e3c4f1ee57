"""Card of a synthetic set: the README.md with which a set is published, as hubs for data sets show it."""

from __future__ import annotations

import dataclasses
import importlib.resources
import io
import re
import warnings
from typing import Any

import jinja2
import yaml
from PIL import Image

from datm_ray.artifact import EXPORTS, Artifact
from datm_ray.config import RunConfig, unread_keys
from datm_ray.core.training.loop import Schedule
from datm_ray.errors import RunDirectoryError
from datm_ray.report.gallery import contact_sheet
from datm_ray.report.page import costs_of, provenance_lines, what_was_done
from datm_ray.report.results import Run, RunSummary, Table, accuracies, cost_lines, network_accuracies, read_run
from datm_ray.words import one_line

SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
"""Bound of the number of images, exclusive -> Hugging Face's name for the size."""
CARD = "README.md"
"""Name of the card's file, which hubs show."""
_LICENCE = "\n## Licence\n"
"""Heading of a card's last section."""
PREVIEW_PIXELS = 96
"""Width of one image in preview.png up to which small images are enlarged."""


def published_files(summary: RunSummary, earlier: str = "") -> dict[str, bytes]:
    """Files with which a finished set is published, by name: card, preview, Parquet and safetensors.

    Args:
        summary: the run.
        earlier: text of an earlier card, whose licence the new one keeps; "" if there is none.

    Raises:
        RunDirectoryError: the run has no synthetic set yet.
    """
    run = read_run(summary)
    if run.synthetic is None:
        raise RunDirectoryError(
            f"{summary.folder.uri} holds no synthetic set",
            "its distillation is not finished",
            "run the same `datm-ray run` again: it resumes",
        )
    text = _with_licence_of(earlier, card(run, run.synthetic))
    files = {CARD: text.encode(errors="replace"), "preview.png": _preview(run.synthetic)}
    return files | EXPORTS["parquet"](run.synthetic) | EXPORTS["safetensors"](run.synthetic)


def card(run: Run, artifact: Artifact) -> str:
    """Card in Markdown: what the set is, how to use it, its accuracy beside the controls, and how it was made."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = importlib.resources.files("datm_ray.report").joinpath("card.md.j2").read_text(encoding="utf-8")
    summary, images = run.summary, len(artifact.images)
    channels, height, width = artifact.images.shape[1:]
    rows = accuracies([summary])
    return environment.from_string(template).render(
        title=one_line(f"{run.config.name}: {run.dataset} distilled to {images:,} images"),
        size=next((name for bound, name in SIZES.items() if images < bound), "n>1M"),
        method=run.config.method.rpartition(":")[2],
        done=one_line(what_was_done(run)),
        made=f"The method is {run.config.method}.",
        training=_training_in_words(artifact),
        image=f"{channels}×{height}×{width} in {len(artifact.class_names)} classes",
        clipped=artifact.clipped_in_words(),
        teacher=_taught(artifact),
        table=as_markdown(rows) if summary.scores else "",
        networks=as_markdown(network_accuracies(summary)) if summary.networks else "",
        facts=[(name, one_line(value)) for name, value in provenance_lines(artifact.provenance) if value],
        costs=as_markdown(table) if (table := costs_of(cost_lines(summary))) else "",
        recipe=yaml.safe_dump(_recipe(run.config), sort_keys=False, allow_unicode=True).strip(),
        dataset=one_line(run.dataset),
    )


def as_markdown(table: Table) -> str:
    """Format a table in Markdown. Each cell has its value and, after it, its note."""
    rows = [
        [line.title, *(" ".join(filter(None, [each.value, each.note])) for each in line.cells)] for line in table.lines
    ]
    cells = [[one_line(cell).replace("|", "\\|") for cell in row] for row in [list(table.headings), *rows]]
    cells.insert(1, ["---"] * len(table.headings))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _training(artifact: Artifact) -> tuple[Schedule, bool]:
    """How networks were trained on the set, and whether their learning rate was learned or chosen."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return artifact.training(), not caught


def _training_in_words(artifact: Artifact) -> str:
    training, is_chosen = _training(artifact)
    shown = {field.name: getattr(training, field.name) for field in dataclasses.fields(training)}
    names = ("epochs", "batch_size", "optimiser", "learning_rate")
    words = [
        f"{name} {shown[name]:.3g}" if isinstance(shown[name], float) else f"{name} {shown[name]}" for name in names
    ]
    return ", ".join(words) + ("" if is_chosen else ", which was neither learned nor chosen")


def _preview(artifact: Artifact) -> bytes:
    """Picture of some images of the set, a row for each class, as a PNG file."""
    sheet, _, _ = contact_sheet(artifact)
    scale = max(1, PREVIEW_PIXELS // artifact.images.shape[3])
    sink = io.BytesIO()
    Image.fromarray(sheet.repeat(scale, axis=0).repeat(scale, axis=1)).save(sink, "PNG")
    return sink.getvalue()


def _recipe(config: RunConfig) -> dict[str, Any]:
    """Settings that differ from the defaults and decide the set, without paths of this machine; a recipe by itself."""
    left_out: dict[str, Any] = {"cluster": True, "dataset": {"path"}, "distill": {"continue_from"}, "given": {"path"}}
    for key in unread_keys(config):
        section, _, name = key.partition(".")
        left_out[section] = (left_out.get(section) or set()) | {name} if name else True
    found = config.model_dump(mode="json", exclude_defaults=True, exclude=left_out)
    return {name: value for name, value in found.items() if value != {}}


def _taught(artifact: Artifact) -> str:
    """Sentence on a teacher whose labels the scored networks had in place of the set's own; "" without a teacher."""
    temperature = _training(artifact)[0].temperature
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
    """Card with the licence of an earlier card: its line `license:` and its last section, which users fill in."""
    line, section = re.search("^license: .*$", earlier, re.MULTILINE), earlier.partition(_LICENCE)[2]
    if line is None or not section:
        return text
    return text.replace("license: other", line[0], 1).partition(_LICENCE)[0] + _LICENCE + section
