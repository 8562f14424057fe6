"""Small pictures of lesions out of the shards, and the most confident mistakes with their neighbours."""

import base64
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from configs.errors import UserError
from configs.schema import Experiment
from eval.metrics import Floats, Ints
from eval.neighbours import Known
from pipeline.source import Source
from shards.shardset import ShardSet
from train.embeddings import Embeddings

THUMBNAIL, PICTURE = 56, 112
"""Longer side of a lesion on the map, and in a gallery, pixels."""
MISTAKES, NEIGHBOURS = 8, 4
BUDGET = 8_000_000
"""Bytes of pictures in a report, at most: it is mailed."""


@dataclass(frozen=True)
class Lesion:
    """An image in the report."""

    key: str
    group: str
    label: str
    picture: str
    """JPEG in base64; empty where the shards are not at hand."""
    called: str = ""
    probability: float = 0.0
    """Of the positive class."""
    distance: float = 0.0
    """Of a neighbour, to the lesion it is shown with."""


@dataclass(frozen=True)
class Mistake:
    """A lesion that was called wrongly, and its nearest training images."""

    lesion: Lesion
    nearest: Sequence[Lesion]


class Pictures:
    """Small JPEGs of a shard set's images, by index, until the budget is spent."""

    def __init__(self, shards: ShardSet | None) -> None:
        self._source = Source(shards, max_bad=0) if shards else None
        self._left = BUDGET

    def __call__(self, index: int, side: int) -> str:
        """Base64 of a JPEG; empty where it cannot be had."""
        if self._source is None or self._left <= 0:
            return ""
        (data,), _ = self._source.fetch(np.array([index]))
        with Image.open(io.BytesIO(data.tobytes())) as image:
            image.draft("RGB", (side, side))
            small = image.convert("RGB")
            small.thumbnail((side, side), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        small.save(file, "JPEG", quality=70)
        text = base64.b64encode(file.getvalue()).decode()
        self._left -= len(text)
        return text

    def close(self) -> None:
        """Let go of the files."""
        if self._source is not None:
            self._source.close()


def shard_set(experiment: Experiment, sha256: str) -> ShardSet | None:
    """The shard set that a run was made from; None where it is not at hand: a report does without."""
    try:
        shards = ShardSet.of(experiment)
        if shards.sha256 == sha256:
            return shards
        reason = f"{shards.folder}: another shard set than the run's"
    except UserError as error:
        reason = str(error)
    print(f"a report without pictures of lesions: {reason}", file=sys.stderr)
    return None


def mistakes(
    train: Embeddings,
    test: Embeddings,
    probabilities: Floats,
    called: Ints,
    classes: Sequence[str],
    positive: int,
    pictures: Pictures,
) -> dict[str, list[Mistake]]:
    """`missed` and `alarms` of the positive class, the most confident first."""
    scores, positives = probabilities[:, positive], test.labels == positive
    missed = np.flatnonzero(positives & (called != positive))
    alarms = np.flatnonzero(~positives & (called == positive))
    order = {
        "missed": missed[np.argsort(scores[missed], kind="stable")],
        "alarms": alarms[np.argsort(-scores[alarms], kind="stable")],
    }
    known = Known(train, train, torch.device("cpu"))
    found = {}
    for kind, all_rows in order.items():
        rows = all_rows[:MISTAKES]
        near, distances = known.nearest(test.vectors[rows], NEIGHBOURS)
        found[kind] = [
            Mistake(
                lesion(test, row, probabilities, called, classes, positive, pictures, PICTURE),
                [
                    Lesion(
                        train.keys[n],
                        train.groups[n],
                        classes[train.labels[n]],
                        pictures(int(train.index[n]), PICTURE),
                        distance=float(distance),
                    )
                    for n, distance in zip(neighbours, away, strict=True)
                ],
            )
            for row, neighbours, away in zip(rows, near, distances, strict=True)
        ]
    return found


def lesion(
    test: Embeddings,
    row: int,
    probabilities: Floats,
    called: Ints,
    classes: Sequence[str],
    positive: int,
    pictures: Pictures,
    side: int,
) -> Lesion:
    """A test image, its longer side `side` pixels."""
    return Lesion(
        test.keys[row],
        test.groups[row],
        classes[test.labels[row]],
        pictures(int(test.index[row]), side),
        called=classes[called[row]],
        probability=float(probabilities[row, positive]),
    )
