"""Real images: their sources, how they are split, and how their pixels are normalised.

`load_raw` reads a named source as training, validation and test images in uint8, and `prepare` normalises them. Every
distilled set is stored with its images' `Transform` or that transform's fingerprint, because whitened images mean
nothing without the transform. No module here trains, distributes or keeps state.
"""

import datm_ray.data.reading.readers  # noqa: F401 -- registers the built-in sources
from datm_ray.data.dataset import Dataset, prepare, transform_of
from datm_ray.data.sources import ImageSet, Loaded, RawDataset, Request, known_sources, load_raw, source
from datm_ray.data.transform import Transform, fit_transform

__all__ = [
    "Dataset",
    "ImageSet",
    "Loaded",
    "RawDataset",
    "Request",
    "Transform",
    "fit_transform",
    "known_sources",
    "load_raw",
    "prepare",
    "source",
    "transform_of",
]
