"""Image bytes of any kind -> bytes of an upright RGB JPEG that is known to decode."""

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from configs.errors import UserError

_ORIENTATION = 0x0112  # EXIF tag; 1 is upright


@dataclass(frozen=True)
class Encoded:
    """A JPEG ready for a shard."""

    jpeg: bytes
    """The file's bytes."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""


def encode(data: bytes, *, short_side: int, quality: int) -> Encoded:
    """Decode an image in full, and encode it again unless it is already what a shard holds.

    An upright RGB JPEG whose short side fits passes through untouched. Anything else is turned upright,
    brought to 8-bit RGB, shrunk where it is larger, and written as JPEG with chroma at full resolution
    (4:4:4): colour is a diagnostic sign, a source's halved chroma is whole again once shrunk by two, and
    without chroma upsampling all decoders agree.

    Args:
        data: an encoded image: JPEG, PNG or another format that Pillow reads.
        short_side: largest short side, pixels; 0 keeps every size.
        quality: JPEG quality, 1 to 100.

    Raises:
        UserError: the reason why the image cannot be used: empty, truncated, not an image, too large to be
            one, or of a pixel type without a meaning as 8-bit RGB.
    """
    if not data:
        raise UserError("the file is empty")
    try:
        # Pillow warns of a decompression bomb from 89 megapixels on: no photograph is worth the memory.
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            image = Image.open(io.BytesIO(data))
        return _encode(image, data, short_side, quality)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError("not an image of a known format") from None
    except Exception as error:  # damaged bytes make Pillow's decoders raise almost anything
        raise UserError(
            f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}"
        ) from None


def _encode(image: Image.Image, data: bytes, short_side: int, quality: int) -> Encoded:
    width, height = image.size
    shrink = short_side / min(width, height) if short_side else 1.0
    upright = image.getexif().get(_ORIENTATION, 1) == 1
    if image.format == "JPEG" and image.mode == "RGB" and upright and shrink >= 1:
        image.load()
        return Encoded(data, width, height)
    if shrink < 1:
        size = (round(width * shrink), round(height * shrink))
        # A JPEG is decoded at the smallest of 1, 1/2, 1/4, 1/8 that covers this; rounded down, so that half
        # of an odd width counts as half.
        image.draft(None, (int(width * shrink), int(height * shrink)))
        image = _rgb(image).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    else:
        image = _rgb(image)
    image = ImageOps.exif_transpose(image)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling="4:4:4")
    return Encoded(out.getvalue(), image.width, image.height)


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any Pillow image; the transparent turns black, as the rim of a dermoscope's view is."""
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UserError(f"grey values {values.min()} to {values.max()} are beyond 16 bits")
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")  # 65535 / 255 = 257
    if image.mode == "F":
        raise UserError("floating-point pixels have no range to bring to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("RGB")
