"""The README's picture: the sets of a finished run, before and after distillation, side by side.

python benchmarks/picture.py runs/demo/digits-ipc10 benchmarks/results/digits-ipc10.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from facts import in_folder
from numpy.typing import NDArray
from PIL import Image

import datm_ray
from datm_ray.report.gallery import contact_sheet

SCALE = 3
"""Side, in pixels of the picture, of the square that shows one pixel of an image."""


def side_by_side(run: str) -> NDArray[np.uint8]:
    """Initial and final set as one RGBA picture [h w 4]."""
    before, after = (contact_sheet(datm_ray.load(f"{run}/{name}.arrow"))[0] for name in ("initial", "synthetic"))
    gap = np.zeros((len(before), before.shape[1] // 12, 4), np.uint8)
    return np.concatenate([before, gap, after], axis=1).repeat(SCALE, axis=0).repeat(SCALE, axis=1)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    Image.fromarray(side_by_side(sys.argv[1])).save(in_folder(Path(sys.argv[2])), optimize=True)
