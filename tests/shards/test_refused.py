"""What cannot be used is refused with the reason; damage is refused or does no harm."""

import contextlib
import io
import struct
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import (
    ADOBE_RGB,
    KEEP,
    decoded,
    photograph,
    picture,
    rotated,
    stored,
)
from PIL import Image

from configs.errors import UserError
from configs.packing import Encode
from shards.encode import encode

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
        ("WEBP", "a.gif", ".gif"),
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
