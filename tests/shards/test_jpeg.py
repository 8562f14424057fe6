"""The marker walk agrees with Pillow, and takes nothing for a header that is none."""

import io
import itertools
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.jpeg import Header, header


def stored(size: tuple[int, int] = (40, 30), mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.effect_noise(size, 40).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def found(data: bytes) -> Header:
    walked = header(data)
    assert walked is not None
    return walked


def segment(marker: int, payload: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(payload) + 2).to_bytes(2) + payload


def with_segments(data: bytes, *segments: bytes) -> bytes:
    return data[:2] + b"".join(segments) + data[2:]


def test_sizes_and_codings_agree_with_pillow() -> None:
    sizes = [(1, 1), (17, 300), (640, 480), (8, 20_000)]
    codings: list[dict[str, Any]] = [
        {},
        {"progressive": True, "quality": 30},
        {"optimize": True, "subsampling": "4:4:4"},
        {"restart_marker_blocks": 2, "comment": b"\xff\xda" * 40},
    ]
    for size, mode, options in itertools.product(sizes, ["L", "RGB", "CMYK"], codings):
        data = stored(size, mode, **options)
        walked, image = found(data), Image.open(io.BytesIO(data))
        assert (walked.width, walked.height) == image.size == size
        assert (len(walked.components), walked.bits) == (len(mode), 8)
        assert walked.sof == (2 if options.get("progressive") else 0)
        assert walked.ycbcr == (mode == "RGB")
        assert data[walked.scan : walked.scan + 2] == b"\xff\xda"
        assert (walked.exif, walked.icc, walked.several) == (b"", b"", False)


@pytest.mark.parametrize(
    ("options", "adobe", "ycbcr"),
    [({}, None, True), ({"keep_rgb": True}, 0, False)],
)
def test_the_colour_transform(options: dict[str, Any], adobe: int | None, ycbcr: bool) -> None:
    walked = found(stored(**options))
    assert (walked.adobe, walked.ycbcr) == (adobe, ycbcr)


def test_colours_that_decoders_could_disagree_on_are_not_ycbcr() -> None:
    plain = stored()
    for transform, ycbcr in ((0, False), (1, True), (2, False)):
        walked = found(with_segments(plain, segment(0xEE, b"Adobe\0d\0\0\0\0" + bytes([transform]))))
        assert (walked.adobe, walked.ycbcr) == (transform, ycbcr)
    frame = plain.index(b"\xff\xc0") + 10
    named = plain[:frame] + b"R" + plain[frame + 1 : frame + 3] + b"G" + plain[frame + 4 : frame + 6] + b"B"
    assert not found(named + plain[frame + 7 :]).ycbcr


def test_exif_and_profile_are_those_that_pillow_reads() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = np.random.default_rng(0).bytes(150_000)  # more than two segments hold
    data = stored(exif=exif, icc_profile=profile)
    image = Image.open(io.BytesIO(data))
    assert found(data).exif == image.info["exif"].removeprefix(b"Exif\0\0")
    assert found(data).icc == image.info["icc_profile"] == profile


def test_profile_parts_in_any_order_but_never_a_missing_one() -> None:
    one, two = (segment(0xE2, b"ICC_PROFILE\0" + part) for part in (b"\x01\x02abc", b"\x02\x02def"))
    assert found(with_segments(stored(), two, one)).icc == b"abcdef"
    assert found(with_segments(stored(), two)).icc == found(with_segments(stored(), one, one)).icc == b""


def test_other_segments_mean_nothing() -> None:
    others = [segment(m, b"ExifICC_PROFILE Adobe MPF") for m in (0xE0, 0xE1, 0xE2, 0xEE, 0xFE)]
    plain, walked = found(stored()), found(with_segments(stored(), *others, b"\xff\xff\xff"))
    assert walked._replace(scan=0) == plain._replace(scan=0)


def test_several_pictures_are_told() -> None:
    out = io.BytesIO()
    one = Image.effect_noise((40, 30), 40).convert("RGB")
    one.save(out, "MPO", save_all=True, append_images=[one])
    assert found(out.getvalue()).several


def test_what_is_no_header() -> None:
    data = stored(exif=Image.Exif(), comment=b"a mole")
    scan = found(data).scan
    assert all(header(data[:end]) is None for end in range(scan + 2))
    frame = data.index(b"\xff\xc0")
    for at, value in ((frame + 3, 18), (frame + 9, 2), (frame + 5, 0), (frame + 1, 0xC4), (frame, 0), (2, 0)):
        bad = bytearray(data)
        bad[at] = value
        if at == frame + 5:
            bad[at + 1] = 0  # no height
        assert header(bytes(bad)) is None, (at - frame, value)
    assert header(b"") is header(b"\x89PNG\r\n\x1a\n") is header(b"\xff\xd8\xff\xda") is None
    assert header(data[:2] + b"\xff\xe0\0\1" + data[2:]) is None  # a segment shorter than its own length
