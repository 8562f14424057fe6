"""An image is passed through, or brought to its size, upright, as the settings say."""

import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from pictures import (
    ADOBE_RGB,
    GREEN,
    KEEP,
    RED,
    decibels,
    decoded,
    opened,
    photograph,
    picture,
    pixels,
    rotated,
    short,
    stored,
)
from PIL import Image, ImageCms

from configs.packing import Encode
from shards.encode import encode

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
        data = stored(turned, kind, exif=rotated(orientation), **options)
        out = decoded(data, how)
        assert encode(data, how).original == upright.size
        assert out.size == expected.size
        assert decibels(out, expected) > 36, orientation


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


def test_the_module_is_light() -> None:
    heavy = "torch", "nvidia.dali", "pandas", "pyarrow", "PIL.ImageCms", "PIL.TiffImagePlugin"
    code = f"import sys, shards.encode; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
