"""Pictures of what the encoder makes of the validation split: hardest triplets, and a plane to look at."""

import io
from typing import Any

import numpy as np
import wandb
from numpy.typing import NDArray
from PIL import Image

from shards.shardset import ShardSet
from train.plane import components

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
ANCHORS = 2000
"""Anchors looked at, evenly spaced: the distances of all to all grow with the square."""
SIDE = 160
"""Pixels of an image in a picture."""


def hardest_triplets(vectors: Floats, labels: Ints, count: int) -> tuple[Ints, Floats]:
    """Anchors whose farthest of their class is farther than their nearest of another, by the most.

    Args:
        vectors: (n, dim) unit vectors.
        labels: (n,) class indices.
        count: triplets at most, one an anchor.

    Returns:
        (count, 3) rows of anchor, positive, negative, hardest first; (count, 2) distances to the latter two.
    """
    anchors = np.unique(np.linspace(0, len(vectors) - 1, min(ANCHORS, len(vectors))).astype(np.int64))
    # Of unit vectors: |a - b|² = 2 - 2ab.
    distance = np.sqrt(np.maximum(0, 2 - 2 * vectors[anchors] @ vectors.T))
    same = labels[anchors, None] == labels[None]
    far = np.where(same, distance, -np.inf)
    far[np.arange(len(anchors)), anchors] = -np.inf  # itself
    near = np.where(same, np.inf, distance)
    positive, negative = far.argmax(axis=1), near.argmin(axis=1)
    apart = np.stack([far.max(axis=1), near.min(axis=1)], axis=1)
    valid = np.flatnonzero(np.isfinite(apart).all(axis=1))
    order = valid[np.argsort(apart[valid, 1] - apart[valid, 0], kind="stable")][:count]
    return np.stack([anchors, positive, negative], axis=1)[order], apart[order].astype(np.float32)


def triplets(shards: ShardSet, index: Ints, vectors: Floats, count: int) -> list[wandb.Image]:
    """The hardest as pictures: anchor, positive, negative.

    Args:
        index: (n,) of samples in the set.
        vectors: (n, dim) their embeddings.
    """
    rows, apart = hardest_triplets(vectors, shards.labels[index], count)
    pictures = []
    for row, (far, near) in zip(rows, apart, strict=True):
        anchor, positive, negative = index[row]
        said = [f"{shards.keys[i]} {shards.classes[shards.labels[i]]}" for i in (anchor, positive, negative)]
        caption = f"{said[0]} | {said[1]} at {far:.2f} | {said[2]} at {near:.2f}"
        pictures.append(wandb.Image(side_by_side(shards, index[row]), caption=caption))
    return pictures


def projection(shards: ShardSet, index: Ints, vectors: Floats, count: int) -> dict[str, Any]:
    """A table of samples in the plane, evenly chosen, and its scatter plot."""
    chosen = np.unique(np.linspace(0, len(index) - 1, min(count, len(index))).astype(np.int64))
    places, _ = components(vectors, vectors[chosen])
    rows = [
        [
            str(shards.keys[i]),
            shards.classes[shards.labels[i]],
            shards.group_names[shards.groups[i]],
            float(x),
            float(y),
        ]
        for i, (x, y) in zip(index[chosen], places, strict=True)
    ]
    table = wandb.Table(columns=["key", "class", "group", "x", "y"], data=rows)
    plot = wandb.plot.scatter(table, "x", "y", title="embeddings, first two principal components")
    return {"embeddings": table, "projection": plot}


def side_by_side(shards: ShardSet, indices: Ints) -> Image.Image:
    """Samples of a shard set as they are packed, in a row."""
    row = Image.new("RGB", (SIDE * len(indices), SIDE))
    for place, index in enumerate(indices):
        with Image.open(io.BytesIO(shards.jpeg(int(index)))) as image:
            row.paste(image.convert("RGB").resize((SIDE, SIDE)), (SIDE * place, 0))
    return row
