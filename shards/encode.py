"""Image bytes of any kind -> bytes of an upright sRGB JPEG that is known to decode.

    header ---- upright YCbCr sRGB JPEG of the right size ----> strict grey decode ----> the same bytes
       |
       +--- any other JPEG: strict scaled decode ---+
       |                                            +--> sRGB --> resize --> upright --> encode
       +--- other formats: Pillow ------------------+

libjpeg-turbo (simplejpeg) does all JPEGs, and strictly: bytes that it would have to guess about are damage.
"""

import io
import math
import os
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from configs.errors import UserError
from configs.packing import Encode
from shards.jpeg import SIGNATURE, Header, header

_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
_END = b"\xff\xd9"  # the end-of-image marker; entropy-coded data never holds these two bytes
_LUMA = 64  # smallest side of the grey image, pixels
_MOST_PIXELS = 89_478_485  # Pillow's limit for a decompression bomb: no photograph is worth the memory
_LONGEST = 65_500  # libjpeg's limit for a side, pixels
# Besides JPEG; none runs a program.
_FORMATS = ("PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF")
_ENDINGS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".jp2": "JPEG2000",
    ".avif": "AVIF",
}


class Encoded(NamedTuple):
    """A JPEG ready for a shard."""

    jpeg: bytes
    """The file's bytes."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    original: tuple[int, int]
    """Width and height of the image that was given, upright, pixels."""
    grey: NDArray[np.uint8] | None
    """The JPEG's luma, (height, width), shrunk while each side keeps 64 pixels; None if not asked for."""


def encode(data: bytes, settings: Encode, *, name: str = "", grey: bool = False) -> Encoded:
    """Make sure that an image can be used, and encode it again unless it is already what a shard holds.

    An upright sRGB JPEG of the right size passes through untouched, with its metadata and whatever follows
    its end. Anything else is brought to 8-bit sRGB by its colour profile, resized, turned upright as its EXIF
    orientation says, and written as JPEG. A profile or EXIF block that is broken or does not suit the pixels
    is ignored, as viewers ignore it. Of several frames or pages the first counts, as for other readers.

    Args:
        data: an encoded image: JPEG, PNG, TIFF, BMP, WebP, GIF, PPM, JPEG 2000 or AVIF.
        settings: size and coding.
        name: file name, whose ending must not promise another format.
        grey: return the luma too, for the perceptual hash; then even `check = "header"` decodes.

    Raises:
        UserError: the reason why the image cannot be used: empty, damaged (a JPEG: whatever libjpeg warns of,
            or no end-of-image marker), not an image, mislabelled, too large to be one, or of a pixel type
            without a meaning as 8-bit RGB.
    """
    if not data:
        raise UserError("the file is empty")
    try:
        return _encoded(data, settings, name, grey)
    except UserError:
        raise
    except UnidentifiedImageError:
        known = ", ".join(("JPEG", *_FORMATS))
        raise UserError(f"not an image of a known format and pixel type ({known})") from None
    except Exception as error:  # damaged bytes make decoders raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot be decoded: {reason}") from None


def _encoded(data: bytes, settings: Encode, name: str, grey: bool) -> Encoded:
    found = header(data)
    source = _jpeg(data, found, name) if found else _other(data, name)
    target = _target(source.width, source.height, settings)
    size = (source.width, source.height)
    original = size[::-1] if source.orientation in _SIDEWAYS else size
    if source.ready and target.whole:
        luma = _luma(data) if grey or settings.check == "decode" else None
        return Encoded(data, *size, original, luma if grey else None)
    image = _fitted(source, target)
    if max(image.size) > _LONGEST:
        raise UserError(
            f"{image.width} x {image.height} pixels are more than a JPEG holds ({_LONGEST} a side): "
            "set `resize` to shrink it"
        )
    jpeg = simplejpeg.encode_jpeg(
        np.asarray(image), quality=settings.quality, colorsubsampling=settings.subsampling
    )
    return Encoded(jpeg, image.width, image.height, original, _grey(image) if grey else None)


class _Source(NamedTuple):
    """An image whose pixels may still have to be decoded."""

    width: int
    height: int
    orientation: int
    profile: bytes
    ready: bool
    """Whether the bytes are what a shard holds, if the size is right too."""
    pixels: Callable[[float], tuple[Image.Image, float]]
    """At least this scale -> pixels, the scale they have, at most 1."""


def _jpeg(data: bytes, found: Header, name: str) -> _Source:
    _check("JPEG", name, found.width, found.height)
    if data.rfind(_END, found.scan) < 0:
        raise UserError("truncated: a JPEG without its end")
    orientation = _orientation(found.exif) if found.exif else 1
    ready = found.ycbcr and found.sof <= 2 and found.bits == 8 and orientation == 1 and not found.several
    if ready and found.icc:
        ready = _to_srgb(found.icc, "RGB") is None
    return _Source(
        found.width, found.height, orientation, found.icc, ready, lambda scale: _scaled(data, found, scale)
    )


def _other(data: bytes, name: str) -> _Source:
    if data.startswith(SIGNATURE):
        raise UserError("truncated or damaged: a JPEG that ends or breaks off before its pixels")
    with warnings.catch_warnings(action="ignore"):  # of odd metadata and of size, which is checked here
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check(image.format or "", name, *image.size)
        image.load()  # before the orientation is asked for: Pillow turns a TIFF itself
        exif = image.getexif()
    orientation, profile = exif.get(_ORIENTATION, 1), image.info.get("icc_profile") or b""
    return _Source(image.width, image.height, orientation, profile, False, lambda scale: (image, 1.0))


def _check(kind: str, name: str, width: int, height: int) -> None:
    ending = os.path.splitext(name)[1].lower()  # noqa: PTH122 - a path object takes 2 µs an image
    if _ENDINGS.get(ending, kind) != kind:
        article = "an" if kind == "AVIF" else "a"
        raise UserError(f"is {article} {kind}, though its name says {ending}; rename it")
    if width * height > _MOST_PIXELS:
        raise UserError(
            f"{width} x {height} pixels are too many for a photograph (at most {_MOST_PIXELS:,}): "
            "a decompression bomb"
        )


def _orientation(exif: bytes) -> int:
    with warnings.catch_warnings(action="ignore"):
        tags = Image.Exif()
        try:
            tags.load(exif)
            return int(tags.get(_ORIENTATION, 1))
        except Exception:  # a broken EXIF block says nothing of the orientation
            return 1


def _luma(jpeg: bytes) -> NDArray[np.uint8]:
    """Strict decode of all coefficients, but few pixels: it refuses whatever a full decode refuses."""
    grey: NDArray[np.uint8] = simplejpeg.decode_jpeg(jpeg, "GRAY", min_height=_LUMA, min_width=_LUMA)
    return grey[:, :, 0]


def _grey(image: Image.Image) -> NDArray[np.uint8]:
    """As `_luma`, of pixels that are at hand: means of blocks, as a scaled decode gives."""
    block = max(1, min(image.width // _LUMA, image.height // _LUMA, 8))
    return np.asarray(image.convert("L").reduce(block))


def _scaled(data: bytes, found: Header, scale: float) -> tuple[Image.Image, float]:
    """The pixels at the smallest of 1/8, 2/8, ... 8/8 that covers a scale; where it halves the size, halved
    chroma is whole again."""

    def size(eighths: int) -> tuple[int, int]:
        return math.ceil(found.width * eighths / 8), math.ceil(found.height * eighths / 8)

    # Rounded down, so that half of an odd width counts as half.
    least = int(found.width * scale), int(found.height * scale)
    enough = (n for n in range(1, 8) if size(n)[0] >= least[0] and size(n)[1] >= least[1])
    eighths = next(enough, 8)
    if len(found.components) not in (1, 3, 4):
        raise UserError(f"{len(found.components)} colour components have no meaning; expected 1, 3 or 4")
    mode, space = {1: ("L", "GRAY"), 3: ("RGB", "RGB"), 4: ("CMYK", "CMYK")}[len(found.components)]
    width, height = size(eighths)
    # Of 7 pixels 7/8 are 7 too, rounded up: the factor forbids that.
    factor = 1 if eighths < 8 else 8
    pixels = simplejpeg.decode_jpeg(data, space, min_height=height, min_width=width, min_factor=factor)
    if mode == "CMYK":
        pixels = 255 - pixels  # JPEGs hold CMYK inverted, as Adobe began it
    return Image.fromarray(pixels[:, :, 0] if mode == "L" else pixels, mode), eighths / 8


class _Target(NamedTuple):
    """What becomes of an image, before it is turned upright."""

    whole: bool
    """Nothing."""
    box: tuple[int, int, int, int]
    """The part that is kept: left, top, right, bottom, pixels."""
    size: tuple[int, int]
    """Its new width and height, pixels."""
    canvas: tuple[int, int]
    """Width and height of the black canvas that has it in its centre, pixels; a square if not `size`."""


def _target(width: int, height: int, settings: Encode) -> _Target:
    size, box = settings.size, (0, 0, width, height)
    if settings.resize == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    if settings.resize in ("crop", "stretch"):
        new = (size, size)
    else:
        side = min(width, height) if settings.resize == "short_side" else max(width, height)
        scale = 1.0 if settings.resize == "none" else size / side
        scale = scale if settings.resize == "pad" else min(1.0, scale)
        new = (max(1, round(width * scale)), max(1, round(height * scale)))
    canvas = (size, size) if settings.resize == "pad" else new
    return _Target(canvas == (width, height), box, new, canvas)


def _fitted(source: _Source, target: _Target) -> Image.Image:
    left, top, right, bottom = target.box
    needed = max(target.size[0] / (right - left), target.size[1] / (bottom - top))
    image, scale = source.pixels(needed)
    # A scaled decode rounds its size up: what is kept may end within its last pixel.
    box = (left * scale, top * scale, right * scale, bottom * scale)
    image = _rgb(image, source.profile).resize(target.size, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    if source.orientation in _TURNS:
        image = image.transpose(_TURNS[source.orientation])
    if target.canvas != target.size:
        (width, height), inner = target.canvas, image
        image = Image.new("RGB", target.canvas)
        image.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    return image


def _rgb(image: Image.Image, profile: bytes) -> Image.Image:
    """8-bit sRGB of any Pillow image; the transparent turns black, as the rim of a dermoscope's view is."""
    if image.mode == "F":
        raise UserError("floating-point pixels have no range to bring to 8 bits")
    alpha = None
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UserError(f"grey values {values.min()} to {values.max()} are beyond 16 bits")
        image = Image.fromarray((values // 257).astype(np.uint8))  # 65535 / 255 = 257
    elif image.has_transparency_data:
        grey = image.mode in ("1", "L", "LA")
        image = image.convert("RGBA")
        alpha, image = image.getchannel("A"), image.convert("L" if grey else "RGB")
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    change = _to_srgb(profile, image.mode) if profile else None
    image = change.apply(image) if change else image.convert("RGB")
    return Image.composite(image, Image.new("RGB", image.size), alpha) if alpha else image


@lru_cache(maxsize=16)  # a camera has one profile; building its transform takes longer than applying it
def _to_srgb(profile: bytes, mode: str) -> Any | None:
    """ImageCms transform from a colour profile, of images of a mode, to sRGB; None where there is none to do.

    That is where it moves no colour by more than 2 of 255 (sRGB profiles go by a dozen names, so it is what
    they do that counts), and where the profile is broken or meant for another mode.
    """
    from PIL import ImageCms  # few images have a profile, and a process starts faster without this

    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        change = ImageCms.buildTransform(
            given,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.PERCEPTUAL,  # the usual one for photographs
        )
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode == "RGB":
        levels = np.linspace(0, 255, 9).round().astype(np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
        moved = np.asarray(change.apply(Image.fromarray(colours))).astype(int) - colours
        if np.abs(moved).max() <= 2:
            return None
    return change
