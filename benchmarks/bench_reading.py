"""CPU time of reading streamed images of ImageNet's usual size: decoding and resizing, and normalising.

python benchmarks/bench_reading.py [--images 256] [--turns 5]

The files are JPEGs of 500x375 pixels, made of smooth noise that compresses to about 65 KB. One process with one thread;
CPU seconds are counted, so that other work on the machine changes little. `planning.machines.READING_OPERATIONS` and
`streamed.NORMALISED` follow from such a run.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from tables import spread, table
from turns import cpu_seconds

from datm_ray.data import load_raw, streamed
from datm_ray.data.dataset import prepare, transform_of
from datm_ray.data.streamed import StreamedImages

SIZE, QUALITY, SIDE = (375, 500), 90, 224
"""SIZE: height and width of the files. QUALITY: of JPEG. SIDE: height and width to which images are resized."""


def write_files(folder: Path, count: int) -> float:
    """Write images of two classes. Returns the mean size of a file in bytes."""
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse = draw.integers(0, 256, (SIZE[0] // 5, SIZE[1] // 5, 3), dtype=np.uint8)
        place = folder / "ab"[number % 2] / f"{number}.jpg"
        place.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC).save(place, quality=QUALITY)
    return sum(each.stat().st_size for each in folder.rglob("*.jpg")) / count


def main() -> None:
    """Read the images in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        size = write_files(Path(name), arguments.images)
        raw = load_raw("folder", name, resize=SIDE, streamed=True)
        images = prepare(raw, transform_of(raw, "standard")).train_images
        assert isinstance(images, StreamedImages)
        pixels = images.pixels[:]

        def normalise(at_once: int) -> None:
            with (
                mock.patch.object(streamed, "NORMALISED", at_once),
                mock.patch.object(type(images.pixels), "__getitem__", return_value=pixels),
            ):
                images[:]

        calls = {
            "decoding and resizing": lambda: images.pixels[:],
            f"normalising {streamed.NORMALISED} at a time": lambda: normalise(streamed.NORMALISED),
            "normalising all at once": lambda: normalise(len(images)),
        }
        found = cpu_seconds(calls, arguments.turns)
    rows = [[what, spread([1e3 * each / len(images) for each in seconds])] for what, seconds in found.items()]
    print(f"{len(images)} images, {size / 1e3:.0f} KB a file on average")
    print("\n".join(table(["one image", "CPU ms"], rows)))


if __name__ == "__main__":
    main()
