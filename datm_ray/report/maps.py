"""Pictures of MetaDD's class activation maps and of the features that all its networks share.

Maps are drawn over the same images before and after distillation.
"""

from __future__ import annotations

import io
import warnings

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from datm_ray.artifact import Artifact
from datm_ray.report.charts import MUTED, STYLE, Picture
from datm_ray.report.gallery import data_uri
from datm_ray.report.results import Maps, RunSummary
from datm_ray.words import percent

IMAGES_DRAWN = 6
"""Largest number of images drawn, each from a different class."""
OPACITY = 0.55
"""Opacity of a map over its image, in [0, 1]."""


def map_pictures(run: RunSummary) -> list[Picture]:
    """Pictures of class activation maps before and after distillation; empty without MetaDD or until it is finished."""
    if run.maps is None:
        return []
    stages = ((run.before, run.initial, 0), ("After: synthetic images", run.synthetic, 1))
    return [_picture(title, artifact, run.maps, stage) for title, artifact, stage in stages if artifact is not None]


def _picture(title: str, artifact: Artifact, maps: Maps, stage: int) -> Picture:
    rows = list(maps.rows)[:IMAGES_DRAWN]
    pixels = np.repeat(artifact.pixels()[rows], 3 // artifact.images.shape[1], axis=3)  # show one channel as grayscale
    return Picture(
        title=title,
        source=_drawn((pixels / 255).astype(np.float32), maps.scaled[stage][:, : len(rows)], maps),
        alt=f"{title}: class activation maps of {len(maps.networks)} networks over {len(rows)} images.",
        caption=(
            "Warm colours are a network’s evidence for the image’s class. White in the last column: features of all "
            f"networks (scaled map of at least {maps.threshold:g}). Over all images, these are "
            f"{percent(maps.ratios[stage])} of the features of any network."
        ),
    )


def _drawn(pixels: NDArray[np.float32], scaled: NDArray[np.float32], maps: Maps) -> str:
    """Draw a row for each image: the image, the map of every network over it, and the features that all networks share.

    Returns the picture as a data: URI.

    Args:
        pixels: [b h w 3] images, in [0, 1].
        scaled: [m b h w] maps of the images by m networks, in [0, 1].
        maps: gives the networks' names and the smallest value of a feature.
    """
    titles = ["image", *(name.replace(" (", "\n(").replace(", ", ",\n") for name in maps.networks), "all"]
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = Figure(figsize=(0.9 * len(titles), 0.9 * len(pixels) + 0.3), layout="constrained")
        grid = figure.subplots(len(pixels), len(titles), squeeze=False)
        for row, image in enumerate(pixels):
            tiles = [image, *(_over(image, seen[row]) for seen in scaled), _shared(scaled[:, row], maps.threshold)]
            for axes, tile, title in zip(grid[row], tiles, titles, strict=True):
                axes.imshow(tile, interpolation="nearest")
                axes.set_axis_off()
                if row == 0:
                    axes.set_title(title, fontsize=8, color=MUTED)
        sink = io.BytesIO()
        figure.savefig(sink, format="png", dpi=130, metadata={"Software": None})
    return data_uri("image/png", sink.getvalue())


def _over(image: NDArray[np.float32], seen: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lay the map `seen` [h w] in colours over an image [h w 3]; both have values in [0, 1]."""
    coloured = matplotlib.colormaps["inferno"](seen)[..., :3]
    mixed: NDArray[np.float32] = ((1 - OPACITY) * image + OPACITY * coloured).astype(np.float32)
    return mixed


def _shared(scaled: NDArray[np.float32], threshold: float) -> NDArray[np.float32]:
    """Draw which features the networks share, as a picture [h w 3] of one image.

    A network has a feature at a pixel if its map is at least `threshold` there. The picture is white where all networks
    have a feature, grey where only some have one, and dark elsewhere.

    Args:
        scaled: [m h w] maps of the image in [0, 1], one per network.
        threshold: smallest value of a feature, in [0, 1].
    """
    features = scaled >= threshold
    value = np.where(features.all(axis=0), 1.0, np.where(features.any(axis=0), 0.45, 0.1)).astype(np.float32)
    return np.repeat(value[..., None], 3, axis=2)
