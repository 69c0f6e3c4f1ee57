"""Makes `tests/samples/photos`: a folder of images as people have them, in a few KB.

    python tests/samples/make_photos.py FOLDER

Each image is a wedge, bright at the top when it is shown upright: red for the class "lamp", blue for "door". Sizes,
colour modes, depths, formats and suffixes differ, and among the images lies what cameras, drives and programs add.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def wedge(colour: str, width: int = 16, height: int = 12) -> Image.Image:
    """An RGB image that is bright at the top."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., "rgb".index(colour)] = np.linspace(255, 60, height)[:, None]
    return Image.fromarray(pixels)


def turned(image: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    """The image as a camera held in another way stores it, with the EXIF data that say so."""
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image.transpose(back[orientation]), exif


def transparent(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(128)
    return image


def deep(image: Image.Image) -> Image.Image:
    """The image in 16-bit grey."""
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def make(root: Path) -> None:
    """Write the folder."""
    for name, colour in (("lamp", "r"), ("door", "b")):
        folder = root / name
        folder.mkdir(parents=True)
        wedge(colour).save(folder / "IMG_0001.JPG", "JPEG")
        image, exif = turned(wedge(colour, 12, 18), 6)
        image.save(folder / "IMG_0002.jpeg", "JPEG", exif=exif)
        wedge(colour, 9, 9).convert("CMYK").save(folder / "print.jpe", "JPEG")
        wedge(colour, 20, 10).quantize(8).save(folder / "logo.gif", save_all=True, append_images=[wedge("g", 20, 10)])
        transparent(wedge(colour)).save(folder / "cut out.png")
    lamp, door = root / "lamp", root / "door"
    image, exif = turned(wedge("r"), 3)
    image.save(lamp / "turned.webp", exif=exif, lossless=True)
    wedge("r").save(lamp / "download.jfif", "JPEG", exif=b"Exif\0\0broken")
    deep(wedge("r")).save(lamp / "scan.png")
    text = PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    wedge("r").save(lamp / "generated.png", pnginfo=text)
    deep(wedge("b")).save(door / "scan.tif", compression="tiff_lzw")
    wedge("b").convert("L").save(door / "old.bmp")
    wedge("b").convert("1").save(door / "fax.tiff", compression="group4")
    image, exif = turned(wedge("b", 10, 14), 8)
    image.save(door / "phone.png", exif=exif)
    for other in ("@eaDir/IMG_0001.JPG/SYNOPHOTO_THUMB_M.jpg", ".ipynb_checkpoints/scan-checkpoint.png", "._logo.gif"):
        path = lamp / other
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5\26\7")
    (lamp / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (door / "IMG_0003.heic").write_bytes(b"\0\0\0\x18ftypheic")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
