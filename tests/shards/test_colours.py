"""Pixels of every kind become 8-bit sRGB."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pictures import (
    ADOBE_RGB,
    GREEN,
    RED,
    SRGB_CURVE,
    SRGB_PRIMARIES,
    SWAPPED,
    decibels,
    decoded,
    gamma,
    opened,
    photograph,
    picture,
    pixels,
    profile,
    short,
    stored,
)
from PIL import Image, ImageCms

from configs.packing import Encode
from shards.encode import encode
from shards.jpeg import header

# --- colours


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("RGB", "RGBA", "P")),
        *(("TIFF", "CMYK"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("BMP", "RGB"), ("GIF", "P")),
        *(("TIFF", "RGB"), ("PPM", "RGB"), ("JPEG2000", "RGB"), ("TIFF", "YCbCr")),
    ],
)
@pytest.mark.parametrize("size", [60, 20])
def test_colours_survive(kind: str, mode: str, size: int) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = stored(picture().convert(mode, palette=Image.Palette.ADAPTIVE), kind, **options)
    image = decoded(data, short(size))
    assert image.getpixel((70 * size // 60, size // 2)) == pytest.approx(RED, abs=12)
    assert image.getpixel((5 * size // 60, size // 2)) == pytest.approx(GREEN, abs=12)


def test_an_rgb_jpeg_is_encoded_again() -> None:
    data = stored(photograph(80, 60), keep_rgb=True, quality=98)
    encoded = encode(data, Encode())
    walked = header(encoded.jpeg)
    assert walked is not None and walked.ycbcr
    assert decibels(opened(encoded), Image.open(io.BytesIO(data))) > 38


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_keeps_its_range(dtype: type) -> None:
    top = np.iinfo(dtype).max
    ramp: NDArray[Any] = np.tile(np.linspace(0, top, 64), (32, 1)).astype(dtype)
    for kind in ("PNG", "TIFF"):
        grey = pixels(decoded(stored(Image.fromarray(ramp), kind)))
        assert grey[16] == pytest.approx(np.linspace(0, 255, 64)[:, None].repeat(3, 1), abs=3)


def test_a_grey_jpeg_becomes_rgb() -> None:
    source = photograph(80, 60).convert("L")
    for size in (60, 30):
        out = pixels(decoded(stored(source, quality=98), short(size)))
        expected = source.resize((80 * size // 60, size), Image.Resampling.LANCZOS)
        assert out == pytest.approx(pixels(expected.convert("RGB")), abs=10)


def test_sixteen_bit_colour_keeps_its_range() -> None:
    ramp: NDArray[np.uint16] = np.linspace(0, 65535, 64).astype(np.uint16)
    rows = np.stack([ramp, ramp[::-1], ramp // 2], axis=-1)[None].repeat(32, 0)
    out = pixels(decoded(sixteen_bit_png(rows), Encode(quality=100)))
    assert out[16] == pytest.approx(rows[16] / 257, abs=4)


def sixteen_bit_png(rows: NDArray[np.uint16]) -> bytes:
    """(height, width, 3) -> PNG; Pillow writes no such file."""
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = rows.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


def test_one_bit_is_black_and_white() -> None:
    image = Image.new("1", (64, 32))
    image.paste(1, (32, 0, 64, 32))
    out = pixels(decoded(stored(image, "PNG")))
    assert out[:, :30].max() <= 3 and out[:, 34:].min() >= 252


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_turn_black(mode: str) -> None:
    clear = Image.new("RGBA", (32, 32), (255, 255, 255, 0)).convert(mode)
    assert pixels(decoded(stored(clear, "PNG"))).max() <= 2
    half = Image.new("RGBA", (32, 32), (200, 200, 200, 128)).convert(mode)
    assert pixels(decoded(stored(half, "PNG"))) == pytest.approx(np.full((32, 32, 3), 100), abs=3)


def test_a_transparent_palette_entry_turns_black() -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 255, 255, 255])
    assert pixels(decoded(stored(image, "PNG", transparency=1))).max() <= 2


# --- colour profiles


def to_srgb(image: Image.Image, given: bytes) -> Image.Image:
    from_profile = ImageCms.ImageCmsProfile(io.BytesIO(given))
    out = ImageCms.profileToProfile(image, from_profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert out is not None
    return out


@pytest.mark.parametrize("given", [ADOBE_RGB, SWAPPED], ids=["wide", "swapped"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_colours_are_brought_to_srgb(given: bytes, kind: str) -> None:
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98, "subsampling": "4:4:4"}}
    source = photograph(120, 90)
    encoded = encode(stored(source, kind, icc_profile=given, **options.get(kind, {})), Encode(quality=98))
    assert decibels(opened(encoded), to_srgb(source, given)) > 38
    assert decibels(source, to_srgb(source, given)) < 34  # else it would not matter
    assert "icc_profile" not in Image.open(io.BytesIO(encoded.jpeg)).info


def test_a_swapped_profile_swaps_the_colours() -> None:
    data = stored(Image.new("RGB", (64, 64), (0, 255, 0)), "PNG", icc_profile=SWAPPED)
    assert decoded(data).getpixel((30, 30)) == pytest.approx((255, 0, 0), abs=4)


def test_a_profile_of_transparent_and_palette_images() -> None:
    green = Image.new("RGBA", (64, 64), (0, 255, 0, 255))
    for image in (green, green.convert("P", palette=Image.Palette.ADAPTIVE)):
        data = stored(image, "PNG", icc_profile=SWAPPED)
        assert decoded(data).getpixel((30, 30)) == pytest.approx((255, 0, 0), abs=4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_grey_profile(kind: str) -> None:
    given = profile([], gamma(1.0), b"GRAY")
    source = Image.new("L", (64, 64), 55)
    expected = to_srgb(source, given).getpixel((0, 0))
    assert expected == pytest.approx((128,) * 3, abs=3)
    assert decoded(stored(source, kind, icc_profile=given)).getpixel((30, 30)) == pytest.approx(
        expected, abs=3
    )


def test_srgb_is_known_by_what_it_does() -> None:
    for known in (
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        profile(SRGB_PRIMARIES, SRGB_CURVE),
    ):
        data = stored(photograph(80, 60), icc_profile=known)
        assert encode(data, Encode()).jpeg == data
    data = stored(photograph(80, 60), icc_profile=ADOBE_RGB)
    assert encode(data, Encode()).jpeg != data


def test_a_profile_that_is_broken_or_of_other_pixels_is_ignored() -> None:
    for useless in (ADOBE_RGB[:200], profile([], gamma(1.0), b"GRAY"), b"\0" * 200):
        data = stored(photograph(80, 60), icc_profile=useless)
        assert encode(data, Encode()).jpeg == data
    plain = decoded(stored(photograph(80, 60).convert("L"), "PNG"))
    assert decoded(stored(photograph(80, 60).convert("L"), "PNG", icc_profile=ADOBE_RGB)) == plain
