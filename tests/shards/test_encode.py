"""Every kind of image becomes an upright sRGB JPEG, or is refused with the reason."""

import contextlib
import io
import math
import struct
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from configs.errors import UserError
from configs.packing import Encode
from shards.encode import Encoded, encode
from shards.jpeg import header

RED, GREEN = (200, 30, 30), (30, 160, 30)
KEEP = Encode(resize="none")


def picture(width: int = 80, height: int = 60) -> Image.Image:
    """Red, with a green left third."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (0, 0, width // 3, height))
    return image


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft shapes with a little grain."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(40, 216, (6, 9, 3), dtype=np.uint8))
    soft = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    return Image.fromarray((soft + rng.normal(0, 3, (height, width, 1))).clip(0, 255).astype(np.uint8))


def stored(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def short(side: int) -> Encode:
    return Encode(size=side)


def opened(encoded: Encoded) -> Image.Image:
    image = Image.open(io.BytesIO(encoded.jpeg))
    image.load()
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (encoded.width, encoded.height))
    return image


def decoded(data: bytes, how: Encode | None = None, **options: Any) -> Image.Image:
    return opened(encode(data, how or Encode(), **options))


def pixels(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image, dtype=float)


def decibels(one: Image.Image, other: Image.Image) -> float:
    error = float(np.mean((pixels(one) - pixels(other)) ** 2))
    return 10 * math.log10(255**2 / max(error, 1e-9))


def rotated(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# --- what passes through


def test_a_jpeg_that_fits_passes_through_untouched() -> None:
    data = stored(picture(), quality=80)
    assert encode(data, short(60)).jpeg == data
    assert encode(data, KEEP).jpeg == data
    assert encode(data, short(59)).jpeg != data


@pytest.mark.parametrize(
    ("how", "passes"),
    [
        (Encode(resize="long_side", size=80), True),
        (Encode(resize="long_side", size=79), False),
        (Encode(resize="crop", size=60), False),
        (Encode(resize="pad", size=80), False),
        (Encode(resize="stretch", size=60), False),
    ],
)
def test_only_what_has_the_size_passes(how: Encode, passes: bool) -> None:
    data = stored(picture())
    assert (encode(data, how).jpeg == data) == passes
    square = stored(picture(how.size, how.size))
    assert encode(square, how).jpeg == square


@pytest.mark.parametrize("check", ["decode", "header"])
@pytest.mark.parametrize(
    "options",
    [
        *({"subsampling": s, "progressive": p} for s in ("4:4:4", "4:2:2", "4:2:0") for p in (False, True)),
        {"restart_marker_blocks": 3},
        {"exif": rotated(1)},
        {"exif": b"Exif\0\0damaged"},
        {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()},
        {"icc_profile": b"no profile at all"},
    ],
)
def test_every_usual_jpeg_passes_through(options: dict[str, Any], check: Any) -> None:
    data = stored(photograph(90, 70), **options)
    assert encode(data, Encode(check=check)).jpeg == data
    assert encode(data + b"\0" * 40, Encode(check=check)).jpeg == data + b"\0" * 40


def test_the_same_input_gives_the_same_bytes() -> None:
    for data in (stored(photograph(300, 200), icc_profile=ADOBE_RGB), stored(photograph(300, 200), "PNG")):
        assert encode(data, short(64)) == encode(data, short(64))


# --- sizes


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (4000, 600), (257, 256), (171, 128), (1, 65)])
def test_larger_images_shrink_to_the_short_side(size: tuple[int, int]) -> None:
    scale = min(1, 64 / min(size))
    expected = (round(size[0] * scale), round(size[1] * scale))
    assert decoded(stored(picture(*size)), short(64)).size == expected
    assert decoded(stored(picture(*size), "PNG"), short(64)).size == expected


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (129, 5), (4000, 1), (64, 64), (50, 20)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_larger_images_shrink_to_the_long_side(size: tuple[int, int], kind: str) -> None:
    scale = min(1, 64 / max(size))
    expected = tuple(max(1, round(side * scale)) for side in size)
    assert decoded(stored(picture(*size), kind), Encode(resize="long_side", size=64)).size == expected


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(400, 300), (301, 415), (20, 30), (64, 65), (1, 200), (7, 7)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_squares_have_exactly_the_size(resize: Any, size: tuple[int, int], kind: str) -> None:
    assert decoded(stored(picture(*size), kind), Encode(resize=resize, size=64)).size == (64, 64)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("factor", [1, 2, 7])
def test_a_crop_keeps_the_centre(kind: str, factor: int) -> None:
    image = Image.new("RGB", (96 * factor, 64 * factor), RED)
    image.paste(GREEN, (16 * factor, 0, 80 * factor, 64 * factor))
    options = {"subsampling": "4:4:4"} if kind == "JPEG" else {}
    out = pixels(decoded(stored(image, kind, **options), Encode(resize="crop", size=64)))
    assert out == pytest.approx(pixels(Image.new("RGB", (64, 64), GREEN)), abs=12)


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (30, 10)])
def test_padding_is_black_and_central(size: tuple[int, int]) -> None:
    out = pixels(decoded(stored(Image.new("RGB", size, RED)), Encode(resize="pad", size=90)))
    out = out if size[0] > size[1] else out.swapaxes(0, 1)
    assert out[:29].max() <= 12 and out[61:].max() <= 12
    assert out[31:59] == pytest.approx(pixels(Image.new("RGB", (90, 28), RED)), abs=12)


def test_stretching_keeps_all() -> None:
    out = decoded(stored(picture(300, 100)), Encode(resize="stretch", size=90))
    assert out.getpixel((24, 45)) == pytest.approx(GREEN, abs=12)
    assert out.getpixel((36, 45)) == pytest.approx(RED, abs=12)


def test_shrinking_is_close_to_a_full_decode_and_lanczos() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    source = Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC)
    data = stored(source, quality=95)
    full = Image.open(io.BytesIO(data)).resize((320, 240), Image.Resampling.LANCZOS)
    assert decibels(full, decoded(data, short(240))) > 38


@pytest.mark.parametrize("size", [(1500, 1000), (613, 457), (511, 333), (1023, 769)])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_nothing_visible_is_lost_to_scaled_decoding(size: tuple[int, int], subsampling: str) -> None:
    data = stored(photograph(*size), quality=90, subsampling=subsampling)
    small = decoded(data, Encode(size=256, quality=100))
    full = Image.open(io.BytesIO(data)).resize(small.size, Image.Resampling.LANCZOS)
    assert decibels(full, small) > 46  # of which the JPEG coding at quality 100 costs most


def test_the_settings_of_the_jpeg_are_kept() -> None:
    data = stored(photograph(200, 200), "PNG")
    sizes = {}
    for subsampling, sampling in (("444", (1, 1)), ("422", (2, 1)), ("420", (2, 2))):
        for quality in (50, 95):
            how = Encode(quality=quality, subsampling=subsampling)
            encoded = encode(data, how)
            assert opened(encoded).layer[0][1:3] == sampling  # type: ignore[attr-defined]
            sizes[subsampling, quality] = len(encoded.jpeg)
    assert sorted(sizes, key=sizes.__getitem__) == sorted(sizes, key=lambda of: (of[1], of[0]))


# --- orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("short_side", [0, 30])
def test_the_exif_orientation_is_applied(kind: str, short_side: int) -> None:
    data = stored(picture(), kind, exif=rotated(6))  # to be turned a quarter clockwise
    image = decoded(data, short(short_side) if short_side else KEEP)
    assert image.width < image.height
    assert image.getpixel((image.width // 2, 2)) == pytest.approx(GREEN, abs=8)
    assert image.getpixel((image.width // 2, image.height - 3)) == pytest.approx(RED, abs=8)
    assert image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("resize", ["none", "short_side", "long_side", "crop", "pad", "stretch"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_turned_file_equals_its_upright_twin(resize: Any, kind: str) -> None:
    how = Encode(resize=resize, size=50)
    upright = photograph(160, 100)
    undo = [None, 0, 3, 1, 5, 2, 6, 4]  # PIL.Image.Transpose that the orientation 1 + index undoes
    options = {"quality": 98, "subsampling": "4:4:4"} if kind == "JPEG" else {}
    if kind == "WEBP":
        options = {"lossless": True}
    expected = decoded(stored(upright, "PNG"), how)
    for orientation, turn in enumerate(undo, 1):
        turned = upright if turn is None else upright.transpose(Image.Transpose(turn))
        out = decoded(stored(turned, kind, exif=rotated(orientation), **options), how)
        assert out.size == expected.size
        assert decibels(out, expected) > 36, orientation


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


def profile(primaries: list[tuple[float, float, float]], curve: bytes, space: bytes = b"RGB ") -> bytes:
    """A matrix profile (ICC.1:2010), from its D50-adapted XYZ primaries and its tone curve."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))

    white = fixed(0.9642, 1.0, 0.8249)
    name = b"desc\0\0\0\0" + struct.pack(">I", 6) + b"a name".ljust(90, b"\0")
    tags = {b"desc": name, b"wtpt": b"XYZ \0\0\0\0" + white}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        tags |= {
            c + b"XYZ": b"XYZ \0\0\0\0" + fixed(*p)
            for c, p in zip((b"r", b"g", b"b"), primaries, strict=True)
        }
        tags |= {c + b"TRC": curve for c in (b"r", b"g", b"b")}
    table, body, at = b"", b"", 128 + 4 + 12 * len(tags)
    for key, value in tags.items():
        padded = value + b"\0" * (-len(value) % 4)
        table += key + struct.pack(">II", at + len(body), len(value))
        body += padded
    start = struct.pack(">I4sI4s4s4s", at + len(body), b"\0" * 4, 0x02400000, b"mntr", space, b"XYZ ")
    head = (start + b"\0" * 12 + b"acsp" + b"\0" * 28 + white).ljust(128, b"\0")
    return head + struct.pack(">I", len(tags)) + table + body


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + b"\0\0"


SRGB_CURVE = b"para\0\0\0\0\0\3\0\0" + struct.pack(
    ">5i", *(round(v * 65536) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
)
SRGB_PRIMARIES = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)]
ADOBE_RGB = profile(
    [(0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)], gamma(2.2)
)
SWAPPED = profile([SRGB_PRIMARIES[1], SRGB_PRIMARIES[0], SRGB_PRIMARIES[2]], SRGB_CURVE)


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


# --- several pictures in a file


@pytest.mark.parametrize("kind", ["MPO", "GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_picture_counts(kind: str) -> None:
    first = picture()
    lossless: dict[str, Any] = {"lossless": True}
    options = lossless if kind == "WEBP" else {}
    second = Image.new("RGB", first.size, (0, 0, 255))
    data = stored(first, kind, save_all=True, append_images=[second], **options)
    encoded = encode(data, Encode(), name="a.jpg" if kind == "MPO" else "")
    assert encoded.jpeg != data
    assert opened(encoded).getpixel((70, 30)) == pytest.approx(RED, abs=12)
    assert len(encoded.jpeg) < len(data) or kind != "MPO"


# --- the grey image


@pytest.mark.parametrize("check", ["decode", "header"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(256, 200), (65, 64), (90, 20), (530, 400)])
def test_the_grey_image_is_the_luma(kind: str, size: tuple[int, int], check: Any) -> None:
    data = stored(photograph(*size), kind)
    encoded = encode(data, Encode(check=check), grey=True)
    grey = encoded.grey
    assert grey is not None and grey.dtype == np.uint8
    assert all(new >= min(64, old) for new, old in zip(grey.shape, opened(encoded).size[::-1], strict=True))
    expected = opened(encoded).convert("L").resize(grey.shape[::-1], Image.Resampling.BOX)
    assert grey.astype(float) == pytest.approx(pixels(expected), abs=12)
    assert encode(data, Encode(check=check)).grey is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_grey_image_stays_when_a_shard_is_packed_again(kind: str) -> None:
    encoded = encode(stored(photograph(700, 512), kind, quality=95), Encode(), grey=True)
    again = encode(encoded.jpeg, Encode(), grey=True)
    assert again.jpeg == encoded.jpeg
    assert encoded.grey is not None and again.grey is not None
    assert encoded.grey.astype(float) == pytest.approx(again.grey.astype(float), abs=2)


# --- what is refused


def huge_jpeg(width: int, height: int) -> bytes:
    data = stored(picture())
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (stored(picture(400, 300))[:1500], "truncated"),
        (stored(picture(400, 300))[:-2], "truncated"),
        (stored(picture(400, 300))[:200], "truncated"),
        (stored(picture(400, 300), progressive=True)[:-2], "truncated"),
        (stored(picture(400, 300), "PNG")[:-40], "decoded"),
        (stored(Image.new("1", (20_000, 20_000)), "PNG"), "bomb"),
        (stored(Image.new("1", (10_000, 9_000)), "PNG"), "bomb"),
        (huge_jpeg(10_000, 9_000), "10000 x 9000 .* bomb"),
        (huge_jpeg(65_500, 65_500), "bomb"),
        (stored(Image.new("F", (8, 8)), "TIFF"), "floating-point"),
        (stored(Image.fromarray(np.full((8, 8), 70_000, np.int32)), "TIFF"), "beyond 16 bits"),
    ],
)
@pytest.mark.parametrize("check", ["decode", "header"])
def test_what_cannot_be_used_is_refused(data: bytes, reason: str, check: Any) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        encode(data, Encode(check=check))
    assert "\n" not in str(caught.value)


def test_a_side_that_no_jpeg_holds_is_refused() -> None:
    data = stored(Image.new("L", (66_000, 2)), "PNG")
    with pytest.raises(UserError, match=r"66000 x 2 pixels .* set `resize`"):
        encode(data, KEEP)
    assert decoded(data, Encode(resize="long_side", size=1000)).size == (1000, 1)


@pytest.mark.parametrize(
    ("kind", "name", "promised"),
    [
        ("PNG", "a.jpg", ".jpg"),
        ("JPEG", "folder.jpg/a.png", ".png"),
        ("MPO", "a.tif", ".tif"),
        ("WEBP", "a.JPEG", ".jpeg"),
        ("GIF", "a.webp", ".webp"),
        ("TIFF", "a.bmp", ".bmp"),
        ("BMP", "a.b.tiff", ".tiff"),
    ],
)
def test_a_name_that_promises_another_format_is_refused(kind: str, name: str, promised: str) -> None:
    data = stored(
        picture(), kind, **({"save_all": True, "append_images": [picture()]} if kind == "MPO" else {})
    )
    shown = "JPEG" if kind == "MPO" else kind
    with pytest.raises(UserError, match=f"^is a {shown}, though its name says {promised}; rename it$"):
        encode(data, Encode(), name=name)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("JPEG", ["a.jpg", "A.JPG", "a.jpeg", "a", "", "jpg", "a.dat", "x.png/a.jpg", "ISIC_1.2"]),
        ("PNG", ["a.png", "a.PNG", "a"]),
        ("TIFF", ["a.tif", "a.TIFF"]),
        ("BMP", ["a.bmp"]),
        ("WEBP", ["a.webp"]),
        ("GIF", ["a.gif"]),
    ],
)
def test_a_name_that_agrees_or_promises_nothing_is_fine(kind: str, names: list[str]) -> None:
    data = stored(picture(), kind)
    for name in names:
        encode(data, Encode(), name=name)


# --- damage

ENCODINGS: list[tuple[str, dict[str, Any]]] = [
    ("JPEG", {"subsampling": "4:2:0"}),
    ("JPEG", {"subsampling": "4:4:4", "restart_marker_blocks": 2}),
    ("JPEG", {"progressive": True, "exif": rotated(6), "icc_profile": ADOBE_RGB}),
    ("JPEG", {"progressive": True, "subsampling": "4:4:4"}),
    ("MPO", {"save_all": True, "append_images": [picture()]}),
    ("PNG", {"icc_profile": ADOBE_RGB, "exif": rotated(3)}),
    ("TIFF", {"compression": "tiff_lzw", "exif": rotated(8)}),
    ("TIFF", {}),
    ("WEBP", {}),
    ("BMP", {}),
    ("GIF", {}),
]
FILES = [stored(photograph(96, 72), kind, **options) for kind, options in ENCODINGS]
EDIT = st.tuples(
    st.sampled_from(["set", "zero", "cut", "delete", "insert"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=12),
)


def damaged(data: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    for edit, where, new in edits:
        at = int(where * len(data))
        data = {
            "set": data[:at] + new + data[at + len(new) :],
            "zero": data[:at] + bytes(8 * len(new)) + data[at + 8 * len(new) :],
            "cut": data[:at],
            "delete": data[:at] + data[at + len(new) :],
            "insert": data[:at] + new + data[at:],
        }[edit]
    return data


def decodes(jpeg: bytes) -> None:
    with warnings.catch_warnings(action="ignore"):
        image = Image.open(io.BytesIO(jpeg))
        image.load()
    assert image.mode == "RGB" and image.format == "JPEG"


@settings(max_examples=800, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(FILES), st.lists(EDIT, min_size=1, max_size=3), st.booleans())
def test_damage_is_refused_or_harmless(
    data: bytes, edits: list[tuple[str, float, bytes]], grey: bool
) -> None:
    bad = damaged(data, edits)
    try:
        encoded = encode(bad, Encode(size=96), grey=grey)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
    else:
        decodes(encoded.jpeg)


@pytest.mark.parametrize("index", range(4))
def test_a_jpeg_cut_anywhere_is_refused(index: int) -> None:
    for end in range(0, len(FILES[index]), 7):
        for check in ("decode", "header"):
            with pytest.raises(UserError):
                encode(FILES[index][:end], Encode(size=96, check=check))


def test_damage_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    with warnings.catch_warnings(action="error"):
        for data in FILES:
            if data[:2] in (b"II", b"MM"):
                continue  # libtiff writes to standard error, whatever Pillow asks of it
            for at in rng.integers(0, len(data), 40):
                with contextlib.suppress(UserError):
                    encode(data[:at] + rng.bytes(3) + data[at + 3 :], Encode(size=48))
    assert capfd.readouterr() == ("", "")


def test_the_module_is_light() -> None:
    heavy = "torch", "nvidia.dali", "pandas", "pyarrow", "PIL.ImageCms", "PIL.TiffImagePlugin"
    code = f"import sys, shards.encode; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
