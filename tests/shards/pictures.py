"""Small pictures of known colours, stored and read back: what the tests of encoding share."""

import io
import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from configs.packing import Encode
from shards.encode import Encoded, encode

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
