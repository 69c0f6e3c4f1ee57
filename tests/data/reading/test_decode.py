"""Tests the changes to decoded pixels: EXIF orientation, 16 bits to 8, colour modes; each change is counted."""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin, features

from datm_ray.data import load_raw
from datm_ray.data.reading.decode import Encoded, decode
from datm_ray.errors import DatasetError

PHOTOS = Path(__file__).parents[2] / "samples" / "photos"
FORMATS = ["JPEG", "PNG", "TIFF", "WEBP"] + ["AVIF"] * ("avif" in features.get_supported_modules())


def encoded(*contents: bytes) -> Encoded:
    return Encoded(np.zeros(len(contents), np.int64), lambda i: io.BytesIO(contents[i]), lambda i: f"/data/{i}.png")


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def ramp(width: int = 24, height: int = 16) -> Image.Image:
    """An image with four different corners."""
    y, x = np.indices((height, width))
    return Image.fromarray(np.stack([x * 9, y * 14, (x + y) * 5], axis=-1).astype(np.uint8))


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("form", FORMATS)
def test_images_are_turned_as_their_exif_data_say(form: str) -> None:
    """All eight EXIF orientations turn images as Pillow's own function does, and the size is the turned one."""
    for orientation in range(1, 9):
        content = saved(ramp(), form, exif=with_orientation(orientation))
        alike = (
            saved(ramp(), exif=with_orientation(orientation)) if form == "TIFF" else content
        )  # Pillow 10 turns it twice
        with Image.open(io.BytesIO(alike)) as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).transpose(2, 0, 1)
        (pixels,), notes = decode([encoded(content)])
        assert pixels.shape[2:] == ((24, 16) if orientation > 4 else (16, 24)), orientation
        assert np.array_equal(pixels[0], expected), orientation
        assert notes == (() if orientation == 1 else ("of 1 images: 1 turned by EXIF",)), orientation


def test_exif_data_after_the_pixels_count_too() -> None:
    """EXIF data at the end of a PNG count; sizes found only there are refused by name or resized."""
    plain = saved(ramp())
    end = plain.index(b"IEND") - 4
    late = plain[:end] + chunk(b"eXIf", with_orientation(6).tobytes().removeprefix(b"Exif\0\0")) + plain[end:]
    early = saved(ramp(), exif=with_orientation(6))
    (pixels,), _ = decode([encoded(late)], 8)
    assert np.array_equal(pixels, decode([encoded(early)], 8)[0][0])
    with pytest.raises(DatasetError, match=r"differ in size: /data/0\.png is 24x16, /data/1\.png is 16x24"):
        decode([encoded(plain, late)])


def test_broken_exif_data_are_no_error() -> None:
    """Broken EXIF data, such as a text for a number, leave the image as it is."""
    text = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02x\0\0\0\0\0\0\0"
    for exif in (
        b"Exif\0\0nonsense",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        with_orientation(9).tobytes(),
        text,
        b"Exif\0\0",
    ):
        for form in ("JPEG", "PNG", "WEBP"):
            (pixels,), notes = decode([encoded(saved(ramp(), form, exif=exif))])
            assert (pixels.shape, notes) == ((1, 3, 16, 24), ()), (exif, form)


def grey16(values: np.ndarray, form: str, **options: Any) -> bytes:
    return saved(Image.fromarray(values.astype(np.uint16)), form, **options)


def test_sixteen_bits_of_grey_become_eight() -> None:
    """16-bit grey keeps the upper byte of each value in PNG, TIFF and PGM, and the images are counted."""
    values = np.arange(256).reshape(16, 16)
    contents = {
        "png": grey16(values * 257, "PNG"),
        "tiff": grey16(values * 257, "TIFF", compression="tiff_lzw"),
        "big-endian tiff": saved(Image.frombytes("I;16B", (16, 16), (values * 256).astype(">u2").tobytes()), "TIFF"),
        "pgm": b"P5 16 16 65535\n" + (values * 256 + 255).astype(">u2").tobytes(),
    }
    (pixels,), notes = decode([encoded(*contents.values())])
    for name, image in zip(contents, pixels, strict=True):
        assert np.array_equal(image[0], values), name
    assert notes == ("of 4 images: 4 converted to grey (16-bit grey 4), 4 cut from 16 to 8 bits",)


def test_sixteen_bits_of_colour_are_counted() -> None:
    """16-bit colour images, whose upper byte Pillow keeps, are counted too."""
    ppm = b"P6 1 1 65535\n" + struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    row = zlib.compress(b"\0" + struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC))
    png = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    (pixels,), notes = decode([encoded(ppm, png)])
    assert np.abs(pixels[:, :, 0, 0].astype(int) - [0x12, 0x56, 0x9A]).max() <= 1
    assert notes == ("of 2 images: 2 cut from 16 to 8 bits",)


def test_images_that_use_few_of_their_16_bits_are_reported() -> None:
    """16-bit images with 12 used bits, as from scanners, become nearly black and are reported."""
    assert decode([encoded(grey16(np.full((4, 4), 4095), "PNG"))])[1][1:] == (
        "the brightest pixel of the 16-bit images is 15 of 255; scale them if they use fewer than 16 bits",
    )


def test_values_of_no_known_range_are_refused() -> None:
    """Float and 32-bit images are refused by name, because their white is unknown."""
    for mode in ("F", "I"):
        content = saved(Image.new(mode, (4, 4), 1000), "TIFF")
        with pytest.raises(
            DatasetError, match=rf"neither 8 nor 16 bits a channel \(mode {mode}\)\. .*8 or 16 bits first"
        ):
            decode([encoded(content)])


def test_warnings_of_pillow_are_hidden(recwarn: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither Pillow's warnings nor its log, one for each image, are shown."""
    palette = ramp().quantize(4)
    odd = saved(palette, "PNG", transparency=b"\0\x80\xff\xff")
    animated = saved(ramp(), "PNG")
    animated = animated[:33] + chunk(b"acTL", struct.pack(">II", 0, 0)) + animated[33:]
    warnings.simplefilter("always")
    for content in (odd, animated, saved(ramp(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")):
        decode([encoded(content)])
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("PIL").handlers, "without one, Python prints what is logged"


def test_texts_in_png_files_do_not_matter() -> None:
    """Two megabytes of text in a PNG do not refuse it, and Pillow's limit is restored afterwards."""
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    for add, packed in (("add_text", True), ("add_text", False), ("add_itxt", True)):
        info = PngImagePlugin.PngInfo()
        getattr(info, add)("workflow", "x" * 2_000_000, zip=packed)
        (pixels,), _ = decode([encoded(saved(ramp(), pnginfo=info))])
        assert np.array_equal(pixels[0].transpose(1, 2, 0), np.asarray(ramp())), (add, packed)
    assert limit == PngImagePlugin.MAX_TEXT_CHUNK


def test_photos_as_people_have_them() -> None:
    """A folder of mixed photos gives upright images in their colours, and every change is reported.

    `tests/samples/make_photos.py` made it: red lamps and blue doors, some in grey, all brighter at the top.
    """
    raw = load_raw("folder", str(PHOTOS), resize=8)
    assert raw.class_names == ("door", "lamp")
    assert [len(of) for of in (raw.train, raw.validation, raw.test)] == [12, 2, 4]
    images = np.concatenate([raw.train.images, raw.validation.images, raw.test.images]).astype(int)
    labels = np.concatenate([raw.train.labels, raw.validation.labels, raw.test.labels])
    top, bottom = images[:, :, :2].mean((2, 3)), images[:, :, -2:].mean((2, 3))
    assert (top.max(1) > 1.8 * bottom.max(1)).all()
    colour = np.where(labels == 1, top[:, 0] - top[:, 2], top[:, 2] - top[:, 0])
    assert ((colour > 150) | (np.abs(colour) < 6)).all()
    assert (colour > 150).sum() == 14
    assert raw.notes == (
        "5 files or folders were not taken: hidden 3, .db 1, .heic 1",
        "training images: all folders; test images: a fixed 20\N{NO-BREAK SPACE}% of each class of these",
        "of 18 images: 10 converted to RGB (RGBA 2, palette 2, CMYK 2, 16-bit grey 2, black and white 1, grey 1), "
        "4 turned by EXIF, 2 left without their transparency, 2 cut from 16 to 8 bits, "
        "2 read as the first of several frames, 16 changed in aspect ratio by dataset.resize",
    )
