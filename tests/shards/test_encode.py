"""Every kind of image becomes an upright RGB JPEG, or is refused with the reason."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.errors import UserError
from shards.encode import encode

RED, GREEN = (200, 30, 30), (30, 160, 30)


def picture(width: int = 80, height: int = 60) -> Image.Image:
    """Red, with a green left third."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (0, 0, width // 3, height))
    return image


def stored(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def decoded(data: bytes, short_side: int = 256) -> Image.Image:
    encoded = encode(data, short_side=short_side, quality=95)
    image = Image.open(io.BytesIO(encoded.jpeg))
    image.load()
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (encoded.width, encoded.height))
    return image


def rotated(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_a_jpeg_that_fits_passes_through_untouched() -> None:
    data = stored(picture(), quality=80)
    assert encode(data, short_side=60, quality=95).jpeg == data
    assert encode(data, short_side=0, quality=95).jpeg == data
    assert encode(data, short_side=59, quality=95).jpeg != data


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (4000, 600), (257, 256), (171, 128), (1, 65)])
def test_larger_images_shrink_to_the_short_side(size: tuple[int, int]) -> None:
    scale = min(1, 64 / min(size))
    assert decoded(stored(picture(*size)), 64).size == (round(size[0] * scale), round(size[1] * scale))


def test_shrinking_is_close_to_a_full_decode_and_lanczos() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    source = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
    data = stored(source, quality=95)
    full = Image.open(io.BytesIO(data)).resize((320, 240), Image.Resampling.LANCZOS)
    error = np.asarray(full, dtype=float) - np.asarray(decoded(data, 240), dtype=float)
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 38  # dB


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("short_side", [0, 30])
def test_the_exif_orientation_is_applied(kind: str, short_side: int) -> None:
    data = stored(picture(), kind, exif=rotated(6))  # to be turned a quarter clockwise
    image = decoded(data, short_side)
    assert image.width < image.height
    assert image.getpixel((image.width // 2, 2)) == pytest.approx(GREEN, abs=8)
    assert image.getpixel((image.width // 2, image.height - 3)) == pytest.approx(RED, abs=8)
    assert image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("RGB", "RGBA", "P")),
        *(("TIFF", "CMYK"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("BMP", "RGB"), ("GIF", "P")),
    ],
)
def test_colours_survive(kind: str, mode: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decoded(stored(picture().convert(mode, palette=Image.Palette.ADAPTIVE), kind, **options))
    assert image.getpixel((70, 30)) == pytest.approx(RED, abs=12)
    assert image.getpixel((5, 30)) == pytest.approx(GREEN, abs=12)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_keeps_its_range(dtype: type) -> None:
    top = np.iinfo(dtype).max
    ramp = np.tile(np.linspace(0, top, 64), (32, 1)).astype(dtype)
    grey = np.asarray(decoded(stored(Image.fromarray(ramp), "PNG")), dtype=float)
    assert grey[16] == pytest.approx(np.linspace(0, 255, 64)[:, None].repeat(3, 1), abs=3)


def test_transparent_pixels_turn_black() -> None:
    clear = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    assert np.asarray(decoded(stored(clear, "PNG"))).max() <= 2


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "not an image"),
        (stored(picture(400, 300))[:1500], "truncated"),
        (stored(picture(400, 300))[:-2], "truncated"),
        (stored(picture(400, 300), "PNG")[:-40], "decoded"),
        (stored(Image.new("1", (20_000, 20_000)), "PNG"), "bomb"),
        (stored(Image.new("1", (10_000, 9_000)), "PNG"), "bomb"),
        (stored(Image.new("F", (8, 8)), "TIFF"), "floating-point"),
    ],
)
def test_what_cannot_be_used_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        encode(data, short_side=256, quality=95)
    assert "\n" not in str(caught.value)
