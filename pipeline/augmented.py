"""Augmentation at a glance: originals of each class beside what training makes of them, as one picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from configs.loading import Augment
from configs.loading import Loader as Settings
from pipeline.loader import Loader
from pipeline.sampler import Indices
from shards.facts import counted
from shards.files import atomic
from shards.shardset import ShardSet
from shards.sheet import (
    BETWEEN,
    BLUE,
    CAPTION,
    GAP,
    GREY,
    INK,
    KEY,
    MARGIN,
    MOST_HEIGHT,
    PINK,
    RED,
    WHITE,
    evenly,
    head,
    plain,
    shortened,
    tiles,
    typeface,
)

APART = 3 * GAP
"""Pixels between an original and its versions."""


class _Chosen:
    """A sampler of always the same samples: an epoch is one batch of them."""

    steps = 1

    def __init__(self, indices: Indices) -> None:
        self._indices = indices

    def batch(self, epoch: int, step: int) -> Indices:
        return self._indices.copy()


class _Row(NamedTuple):
    """A sample and its versions."""

    key: str
    original: Image.Image | None
    versions: list[Image.Image]


def augmented_sheet(
    shards: ShardSet,
    settings: Settings,
    path: Path,
    *,
    seed: int,
    versions: int = 7,
    rows: int = 3,
    tile: int = 128,
) -> None:
    """Write a PNG: a band for each class, a training image a row, the whole of it, then as training sees it.

    The versions come from the loader, on the CPU, as an encoder gets them, normalisation undone. The same
    set, settings and seed give the same picture.

    Args:
        seed: of augmentation, `train.seed`.
        versions: augmented versions of each image.
        rows: images of each class; many classes get fewer, the last of very many none.
        tile: side of a tile, pixels.

    Raises:
        UserError: if `path` cannot be written, or a sample is damaged.
    """
    train = shards.split("train")
    members = [train[shards.labels[train] == label] for label in range(len(shards.classes))]
    while rows > 1 and len(members) * _height(rows, tile) > MOST_HEIGHT:
        rows -= 1
    shown = [evenly(mine, rows) for mine in members][: max(1, MOST_HEIGHT // _height(rows, tile))]
    every = iter(_rows(shards, np.concatenate(shown), settings, seed, versions, tile))

    width = 2 * MARGIN + (versions + 1) * (tile + GAP) + APART - 2 * GAP
    remark = "left: a training image; right: what the encoder is shown of it, epoch by epoch"
    lines = head(shards, [remark, strengths(settings.augment)], width - 2 * MARGIN)
    top = MARGIN + sum(line.height for line in lines) + BETWEEN
    sheet = Image.new("RGB", (width, top + sum(_height(len(each), tile) for each in shown) + MARGIN), WHITE)
    draw, y = ImageDraw.Draw(sheet), MARGIN
    for line in lines:
        draw.text((MARGIN, y), line.text, line.colour, typeface(line.size))
        y += line.height
    y = top
    for label, mine in enumerate(shown):
        caption = f"{shards.classes[label]} · {counted(len(members[label]), 'training image')}"
        colour = RED if label == shards.positive else BLUE
        draw.rectangle((MARGIN, y, MARGIN + 3, y + 17), colour)
        draw.text(
            (MARGIN + 12, y),
            shortened(plain(caption), typeface(16), width - 2 * MARGIN - 12),
            INK,
            typeface(16),
        )
        for place in range(len(mine)):
            _draw_row(sheet, draw, next(every), y + CAPTION + place * (tile + KEY), tile)
        y += _height(len(mine), tile)
    with atomic(path) as file:
        sheet.save(file, "PNG")


def strengths(augment: Augment) -> str:
    """The augmentations that are on, and how strong, in a line."""
    low, high = augment.scale
    found = {
        "8 symmetries": augment.symmetries,
        f"rotation ±{augment.rotation:g} degrees": augment.rotation,
        f"scale {low:g}-{high:g}": augment.scale != (1, 1),
        f"shift ±{augment.shift:g}": augment.shift,
        **{
            f"{name} ±{value:g}": value
            for name in ("brightness", "contrast", "saturation")
            if (value := getattr(augment, name))
        },
        f"hue ±{augment.hue:g} degrees": augment.hue,
    }
    seldom = {
        f"blur to sigma {augment.blur:g}": augment.blur,
        f"cutout to {augment.cutout:g}": augment.cutout,
        f"JPEG quality from {100 - augment.jpeg:g}": augment.jpeg,
    }
    found |= {
        f"{text} (of {augment.occasional:.0%})": on and augment.occasional for text, on in seldom.items()
    }
    named = [text for text, on in found.items() if on]
    return f"augmentation: {', '.join(named) or 'none'}"


def _rows(
    shards: ShardSet, indices: Indices, settings: Settings, seed: int, versions: int, tile: int
) -> Iterator[_Row]:
    """Each of the samples, in order."""
    plainly = {"dtype": "float32", "channels_last": False, "max_bad": 0.0}
    with Loader(
        shards,
        _Chosen(indices),
        settings.model_copy(update=plainly),
        augmentation=settings.augment,
        seed=seed,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        threads=1,
    ) as loader:
        epochs = [_pictures(next(iter(loader)).images, settings, tile) for _ in range(versions)]
    for place, original in enumerate(tiles(shards, indices, tile)):
        yield _Row(str(shards.keys[indices[place]]), original, [pictures[place] for pictures in epochs])


def _pictures(images: torch.Tensor, settings: Settings, tile: int) -> list[Image.Image]:
    """Normalised images (n, 3, size, size) as pictures of the side of a tile."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (settings.mean, settings.std))
    levels = ((images * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each).resize((tile, tile), Image.Resampling.LANCZOS) for each in levels]


def _height(images: int, tile: int) -> int:
    """Pixels that a band of so many images takes, with the space below it."""
    return CAPTION + images * (tile + KEY) + BETWEEN


def _draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: _Row, y: int, tile: int) -> None:
    small = typeface(min(11, max(tile // 6, 6)))
    if row.original:
        sheet.paste(row.original, (MARGIN, y))
    else:
        draw.rectangle((MARGIN, y, MARGIN + tile - 1, y + tile - 1), PINK)
    draw.text((MARGIN + tile // 2, y + tile + 2), shortened(plain(row.key), small, tile), GREY, small, "ma")
    for epoch, picture in enumerate(row.versions):
        x = MARGIN + tile + APART + epoch * (tile + GAP)
        sheet.paste(picture, (x, y))
        draw.text((x + tile // 2, y + tile + 2), f"epoch {epoch}", GREY, small, "ma")
