"""An image file -> the pixels that the model of this bundle takes -> a line of JSON.

Needs NumPy, Pillow and simplejpeg.
"""

import io
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

ABOUT: dict[str, Any] = json.loads((Path(__file__).parent / "bundle.json").read_text(encoding="utf-8"))
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF")  # none runs a program
ORIENTATION = 0x0112  # EXIF tag; 1 is upright
SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
Box = tuple[float, float, float, float]


def tell(run: Callable[[NDArray[np.uint8]], Any], names: Sequence[str]) -> int:
    """Print a line for each image file: its probabilities and verdict, or why there are none.

    Args:
        run: pixels -> probabilities (1, classes), and more.

    Returns:
        0, 1 if any could not be used or told, or 2 if there are none.
    """
    if not names:
        print("usage: python predict.py IMAGE …", file=sys.stderr)
        return 2
    try:
        return _told(run, names)
    except BrokenPipeError:  # nobody reads on, as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _told(run: Callable[[NDArray[np.uint8]], Any], names: Sequence[str]) -> int:
    status = 0
    for name in names:
        line: dict[str, Any] = {"image": name}
        try:
            line |= _judged(run(pixels(Path(name).read_bytes()))[0][0].tolist())
        except Exception as error:  # damaged bytes make decoders raise almost anything
            status, line["error"] = 1, " ".join(str(error).split()) or type(error).__name__
        print(json.dumps(line), flush=True)
    return status


def _judged(probabilities: list[float]) -> dict[str, Any]:
    """The positive class where its probability reaches the threshold, else the likeliest other."""
    called = dict(zip(ABOUT["classes"], probabilities, strict=True))
    others = {name: value for name, value in called.items() if name != ABOUT["positive"]}
    reached = called[ABOUT["positive"]] >= ABOUT["threshold"]
    verdict = ABOUT["positive"] if reached else max(others, key=others.__getitem__)
    return {"verdict": verdict, "probabilities": called}


def pixels(data: bytes) -> NDArray[np.uint8]:
    """The bytes of an image file -> upright sRGB pixels (1, height, width, 3), made as training's were."""
    encoding = ABOUT["encoding"]
    with _opened(data) as image:
        box, size = _target(image.width, image.height)
        upright = image.getexif().get(ORIENTATION, 1) == 1
        profile = image.info.get("icc_profile")
        if image.format in ("JPEG", "MPO") and image.mode in SPACES:
            whole = (encoding["size"],) * 2 if encoding["resize"] == "pad" else size
            if image.mode == "RGB" and upright and not profile and whole == image.size:
                return _through(data)
            needed = max(size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1]))
            scaled, scale = _decoded(data, image, needed)
        else:
            scaled, scale = image, 1.0
        rgb = _rgb(scaled, profile).resize(
            size,
            Image.Resampling.LANCZOS,
            (box[0] * scale, box[1] * scale, box[2] * scale, box[3] * scale),
            reducing_gap=3.0,
        )
        rgb = _turned(rgb, image)
    if encoding["resize"] == "pad":
        canvas = Image.new("RGB", (encoding["size"],) * 2)
        canvas.paste(rgb, ((canvas.width - rgb.width) // 2, (canvas.height - rgb.height) // 2))
        rgb = canvas
    return _through(
        simplejpeg.encode_jpeg(
            np.array(rgb), quality=encoding["quality"], colorsubsampling=encoding["subsampling"]
        )
    )


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty")
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"not an image of a known format ({', '.join(FORMATS)})") from None


def _through(jpeg: bytes) -> NDArray[np.uint8]:
    """Training's images went through a JPEG too."""
    return np.array(simplejpeg.decode_jpeg(jpeg))[None]


def _target(width: int, height: int) -> tuple[Box, tuple[int, int]]:
    """The part of an image that is kept (left, top, right, bottom), and the size it is brought to."""
    resize, size = ABOUT["encoding"]["resize"], ABOUT["encoding"]["size"]
    box: Box = (0, 0, width, height)
    if resize == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    if resize in ("crop", "stretch"):
        return box, (size, size)
    scale = {
        "none": 1.0,
        "short_side": min(1.0, size / min(width, height)),
        "long_side": min(1.0, size / max(width, height)),
        "pad": size / max(width, height),
    }[resize]
    return box, (max(1, round(width * scale)), max(1, round(height * scale)))


def _decoded(data: bytes, image: Image.Image, needed: float) -> tuple[Image.Image, float]:
    """A JPEG decoded at the smallest of 1/8, 2/8, … 8/8 that covers a scale, and that scale."""
    sizes = [tuple(math.ceil(side * eighths / 8) for side in image.size) for eighths in range(1, 9)]
    least = tuple(int(side * needed) for side in image.size)
    eighths = next(
        (n for n in range(1, 8) if all(a >= b for a, b in zip(sizes[n - 1], least, strict=True))), 8
    )
    width, height = sizes[eighths - 1]
    factor = 1 if eighths < 8 else 8
    space = SPACES[image.mode]
    decoded = simplejpeg.decode_jpeg(data, space, min_height=height, min_width=width, min_factor=factor)
    if image.mode == "CMYK":
        decoded = 255 - decoded  # JPEGs hold CMYK inverted, as Adobe began it
    return Image.fromarray(decoded[:, :, 0] if image.mode == "L" else decoded, image.mode), eighths / 8


def _rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """8-bit sRGB; the transparent turns black."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no range to bring to 8 bits")
    alpha = None
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"grey values {values.min()} to {values.max()} are beyond 16 bits")
        image = Image.fromarray((values // 257).astype(np.uint8))  # 65535 / 255 = 257
    elif image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA")
        image = image.convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("L" if grey else "RGB")
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        try:
            given, wanted = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, given, wanted, outputMode="RGB") or image
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile says nothing
    image = image.convert("RGB")
    return Image.composite(image, Image.new("RGB", image.size), alpha) if alpha else image


def _turned(image: Image.Image, original: Image.Image) -> Image.Image:
    """Turned upright as the original's EXIF block says; Pillow turns a TIFF itself."""
    if original.format == "TIFF":
        return image
    image.getexif()[ORIENTATION] = original.getexif().get(ORIENTATION, 1)
    return ImageOps.exif_transpose(image)
