"""A shard set at a glance: samples of each split and class as one picture."""

import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shards.facts import MOST_SOURCES, counted
from shards.files import atomic
from shards.shardset import ShardSet
from shards.tables import few

Ints = NDArray[np.int64]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MOST_HEIGHT = 6_000
"""Pixels that all bands may take: viewers and browsers still show such a picture at once."""
MARGIN, GAP, KEY, CAPTION, BETWEEN = 24, 8, 20, 28, 14
"""Pixels: around the sheet, between tiles, below a tile for its key, above a band, below a band."""
LEAST_WIDTH = 480
"""Pixels of the sheet, so that a notice stays legible above a single column of tiles."""
WHITE, INK, GREY, PALE = (255, 255, 255), (34, 34, 34), (110, 110, 110), (238, 238, 238)
BLUE, RED, PINK = (120, 144, 168), (178, 58, 58), (250, 226, 226)
_PLAIN = str.maketrans({"–": "-", "—": "-", "−": "-", "×": "x", "’": "'", "‘": "'", "ß": "ss", "±": "+/-"})


class Band(NamedTuple):
    """A split's samples of one class on the sheet."""

    caption: str
    positive: bool
    """Whether its class is the one that figures are about."""
    shown: Ints
    """(k,) indices of the samples with a tile."""


class Line(NamedTuple):
    """A line of text at the sheet's head."""

    text: str
    size: int
    """Of the type, pixels."""
    colour: tuple[int, int, int]

    @property
    def height(self) -> int:
        """Pixels, with the space below it."""
        return self.size * 7 // 5


def contact_sheet(shards: ShardSet, path: Path, *, columns: int = 8, rows: int = 2, tile: int = 128) -> None:
    """Write a PNG of samples: a band for each split and class, each sample in a square tile.

    The same set and arguments give the same picture. Images are scaled to fit their tile, never stretched;
    one that does not match its checksum or does not decode becomes a tile that says so.

    Args:
        shards: the set.
        path: the PNG.
        columns: tiles in a row.
        rows: most rows of tiles in a band; many bands get fewer.
        tile: side of a tile, pixels.

    Raises:
        ValueError: if `columns`, `rows` or `tile` is not positive.
        UserError: if `path` cannot be written.
    """
    if min(columns, rows, tile) < 1:
        raise ValueError(f"columns {columns}, rows {rows} and tile {tile} must be positive")
    bands, remarks = plan_bands(shards, columns=columns, rows=rows, tile=tile)
    width = max(2 * MARGIN + columns * (tile + GAP) - GAP, LEAST_WIDTH)
    lines = head(shards, remarks, width - 2 * MARGIN)
    top = MARGIN + sum(line.height for line in lines) + BETWEEN
    height = top + sum(_height(len(band.shown), columns, tile) for band in bands) + MARGIN - BETWEEN
    sheet = Image.new("RGB", (width, height), WHITE)
    draw = ImageDraw.Draw(sheet)
    y = MARGIN
    for line in lines:
        draw.text((MARGIN, y), line.text, line.colour, typeface(line.size))
        y += line.height
    y = top
    for band in bands:
        _draw_band(sheet, draw, shards, band, y, columns, tile)
        y += _height(len(band.shown), columns, tile)
    with atomic(path) as file:
        sheet.save(file, "PNG")


def plan_bands(shards: ShardSet, *, columns: int, rows: int, tile: int) -> tuple[list[Band], list[str]]:
    """The bands of a sheet, split by split, and remarks on what is left out to keep it at MOST_HEIGHT.

    Rows are given up first, down to one a band, then whole splits from the last, then classes.
    """
    inside = {part: np.asarray(pc.equal(shards.samples["split"], part)) for part in shards.parts}
    members = {
        (part, label): np.flatnonzero(inside[part] & (shards.labels == label))
        for part in shards.parts
        for label in range(len(shards.classes))
    }

    def height(of: Sequence[tuple[str, int]], rows: int) -> int:
        return sum(_height(min(len(members[band]), rows * columns), columns, tile) for band in of)

    kept, room = list(members), rows
    while room > 1 and height(kept, room) > MOST_HEIGHT:
        room -= 1
    parts = list(shards.parts)
    while len(parts) > 1 and height(kept, room) > MOST_HEIGHT:
        gone = parts.pop()
        kept = [band for band in kept if band[0] != gone]
    while len(kept) > 1 and height(kept, room) > MOST_HEIGHT:
        kept.pop()

    bands = []
    for part, label in kept:
        mine = members[part, label]
        caption = f"{part} · {shards.classes[label]} · {counted(len(mine), 'image')}"
        bands.append(Band(caption, label == shards.positive, evenly(mine, room * columns)))
    remarks = []
    if room < rows:
        remarks.append(f"{counted(room, 'row')} a band instead of {rows}: there are {len(members)} bands")
    if left := [band for band in members if band not in kept]:
        names = [f"{part} · {shards.classes[label]}" for part, label in left if part in parts]
        remarks.append(f"not shown: {few([*names, *shards.parts[len(parts) :]], MOST_SOURCES)}")
    return bands, remarks


def evenly(members: Ints, count: int) -> Ints:
    """At most `count` of members (n,), as far apart as can be: the middles of equal stretches."""
    count = min(count, len(members))
    return members[(2 * np.arange(count) + 1) * len(members) // max(2 * count, 1)]


def make_tile(data: bytes, crc32: int, side: int) -> Image.Image | None:
    """The image in a square tile, scaled to fit; None if it is damaged.

    Args:
        data: the JPEG.
        crc32: the checksum it must have.
        side: of the tile, pixels.
    """
    if zlib.crc32(data) != crc32:
        return None  # even where it decodes: it would show what nobody packed
    try:
        with Image.open(BytesIO(data)) as image:
            width, height = image.size
            image.draft("RGB", (2 * side, 2 * side))  # decodes a large one at a fraction of its size
            scale = side / max(width, height)
            fitted = (max(round(width * scale), 1), max(round(height * scale), 1))
            small = image.convert("RGB").resize(fitted, Image.Resampling.LANCZOS)
    except Exception:  # Pillow has no common error for bytes that are no image
        return None
    tile = Image.new("RGB", (side, side), PALE)
    tile.paste(small, ((side - fitted[0]) // 2, (side - fitted[1]) // 2))
    return tile


def shortened(text: str, font: Font, width: float) -> str:
    """The text, with as much of its middle left out as makes it fit `width` pixels."""
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        short = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
        if font.getlength(short) <= width:
            return short
    return ""


def head(shards: ShardSet, remarks: Sequence[str], width: int) -> list[Line]:
    """Title, counts, remarks and notice, wrapped to `width` pixels."""
    folder = shards.folder.resolve()
    counts = (len(shards), "image"), (len(shards.group_names), "group")
    texts = [
        Line(f"{folder.parent.name}/{folder.name}".lstrip("/"), 22, INK),
        Line(", ".join(counted(number, noun) for number, noun in counts), 14, GREY),
        *(Line(remark, 14, GREY) for remark in remarks),
        *(Line(notice, 14, RED) for notice in shards.notice.splitlines()),
    ]
    return [
        line._replace(text=text) for line in texts for text in wrapped(line.text, typeface(line.size), width)
    ]


def _height(images: int, columns: int, tile: int) -> int:
    """Pixels that a band of so many images takes, with the space below it."""
    return CAPTION + -(-images // columns) * (tile + KEY) + BETWEEN


def _draw_band(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    shards: ShardSet,
    band: Band,
    y: int,
    columns: int,
    tile: int,
) -> None:
    draw.rectangle((MARGIN, y, MARGIN + 3, y + 17), RED if band.positive else BLUE)
    caption = shortened(plain(band.caption), typeface(16), sheet.width - 2 * MARGIN - 12)
    draw.text((MARGIN + 12, y), caption, INK, typeface(16))
    small = typeface(min(11, max(tile // 6, 6)))
    for place, (index, image) in enumerate(zip(band.shown, tiles(shards, band.shown, tile), strict=True)):
        row, column = divmod(place, columns)
        x, top = MARGIN + column * (tile + GAP), y + CAPTION + row * (tile + KEY)
        if image:
            sheet.paste(image, (x, top))
        else:
            draw.rectangle((x, top, x + tile - 1, top + tile - 1), PINK)
            draw.text((x + tile // 2, top + tile // 2), shortened("damaged", small, tile), RED, small, "mm")
        key = shortened(plain(shards.keys[index]), small, tile)
        draw.text((x + tile // 2, top + tile + 2), key, GREY, small, "ma")


def tiles(shards: ShardSet, indices: Ints, side: int) -> Iterator[Image.Image | None]:
    """Each sample's `make_tile`."""
    for n in indices:
        try:
            data = shards.jpeg(int(n))
        except OSError:
            data = b""
        yield make_tile(data, int(shards.crc32[n]), side)


def typeface(size: int) -> Font:
    """Pillow's own, so that the same set gives the same picture anywhere; size in pixels."""
    return ImageFont.load_default(size=size)


def plain(text: str) -> str:
    """One line of the characters that Pillow's own font can draw; '?' for others."""
    bare = unicodedata.normalize("NFKD", " ".join(text.translate(_PLAIN).replace("…", "...").split()))
    kept = (c for c in bare if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" or c == "·" else "?" for c in kept)


def wrapped(text: str, font: Font, width: int) -> list[str]:
    """Lines that fit `width` pixels."""
    lines = [""]
    for word in plain(text).split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return [shortened(line, font, width) for line in lines if line]
