"""Galleries of the report: images of a synthetic set in one picture, with one row per class."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datm_ray.artifact import Artifact
from datm_ray.report.results import RunSummary

IMAGES_SHOWN, CLASSES_SHOWN = 10, 20
"""Largest number of images per class, and largest number of classes, in a gallery."""


@dataclass(frozen=True)
class Gallery:
    """Images of a set as one picture, with one row per class."""

    title: str
    source: str
    alt: str
    class_names: Sequence[str]
    """Names of the classes, one for each row of the picture."""
    width: int
    """Width at which the page shows the picture, in CSS pixels: the picture's own width times a whole number."""
    enlarged: bool
    """True if one pixel of an image covers several on the screen; it is then drawn as a sharp square."""


def galleries(run: RunSummary) -> list[Gallery]:
    if not run.total:
        return [_gallery("Chosen images", run.synthetic)] if run.synthetic is not None else []
    sets = ((run.before, run.initial), ("After: synthetic images", run.synthetic))
    return [_gallery(title, artifact) for title, artifact in sets if artifact is not None]


def _gallery(title: str, artifact: Artifact) -> Gallery:
    sheet, rows, columns = contact_sheet(artifact)
    scale = max(1, round((56 if columns <= 4 and rows <= 10 else 40) / artifact.images.shape[3]))
    return Gallery(
        title=title,
        source=_png(sheet),
        alt=f"{title}, up to {columns} for each of {rows} classes, one row for each class.",
        class_names=artifact.class_names[:rows],
        width=sheet.shape[1] * scale,
        enlarged=scale > 1,
    )


def contact_sheet(artifact: Artifact) -> tuple[NDArray[np.uint8], int, int]:
    """Draw the first images of the set's first classes as one RGBA picture [h w 4], with a row for each class.

    Returns the picture, the number of rows of images, and the largest number of images in a row. The limits are
    `CLASSES_SHOWN` and `IMAGES_SHOWN`.
    """
    rows = _shown_rows(artifact)
    columns = max(map(len, rows))
    flat = [index for row in rows for index in row]
    pixels = dataclasses.replace(artifact, images=artifact.images[flat]).pixels()
    height, width = pixels.shape[1:3]
    gap = max(1, width // 12)
    sheet = np.zeros((len(rows) * (height + gap), columns * (width + gap), 4), np.uint8)
    places = ((y, x) for y, row in enumerate(rows) for x in range(len(row)))
    for image, (y, x) in zip(pixels, places, strict=True):
        top, left = y * (height + gap), x * (width + gap)
        tile = sheet[top : top + height, left : left + width]
        tile[..., :3], tile[..., 3] = image, 255
    return sheet, len(rows), columns


def _shown_rows(artifact: Artifact) -> list[list[int]]:
    """Indices of the images to show, one list for each shown class."""
    labels = artifact.labels.numpy()
    classes = range(min(CLASSES_SHOWN, len(artifact.class_names)))
    return [np.flatnonzero(labels == label)[:IMAGES_SHOWN].tolist() for label in classes]


def left_out(run: RunSummary) -> str:
    """Sentence on which images of the set the galleries show; "" if they show all."""
    if run.latest is None:
        return ""
    ipc, classes = run.config.distill.ipc, len(run.latest.class_names)
    parts = []
    if ipc > IMAGES_SHOWN:
        parts.append(f"the first {IMAGES_SHOWN} of {ipc:,} images of each class")
    if classes > CLASSES_SHOWN:
        parts.append(f"the first {CLASSES_SHOWN} of {classes:,} classes")
    return f"Shown are {' and '.join(parts)}." if parts else ""


def _png(rgba: NDArray[np.uint8]) -> str:
    sink = io.BytesIO()
    Image.fromarray(rgba).save(sink, "PNG", optimize=True)
    return data_uri("image/png", sink.getvalue())


def data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
