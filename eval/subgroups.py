"""The figures of parts of a split: by sex, age, site, size of the image, source, or any column."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.figures import Detection, estimate
from eval.metrics import Bools, Bootstrap, Floats, Ints
from train.metadata import Metadata, is_number, read

SMALL = 10
"""Fewer groups than this with the positive class, or without it: the interval is not to be relied on."""
MOST = 12
"""Values of a column at most; the rarest are taken together as `other`."""
AGES = ((30, "under 30"), (50, "30 to 49"), (70, "50 to 69"), (np.inf, "70 and over"))
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?")
UNKNOWN, OTHER = "unknown", "other"
SIZE = "image_size"


def subgroups(
    scores: Floats,
    positives: Bools,
    groups: Ints,
    metadata: Metadata,
    names: Sequence[str],
    *,
    threshold: float,
    bootstrap: Bootstrap,
    name: str,
    group: str,
) -> dict[str, dict[str, Any]]:
    """Column -> value -> the figures of `Detection` among its images, and the counts `images`, `positive`,
    `groups` and `small`. A column that is not there, or has one value, is left out.

    Args:
        scores: (n,) probability of the positive class.
        positives: (n,) whether an image is of that class.
        groups: (n,) codes from 0 without gaps.
        metadata: column -> (n,).
        names: roles (age, sex, site), `image_size` (of the original, before packing), or columns.
    """
    found: dict[str, dict[str, Any]] = {}
    for column in names:
        values = banded(metadata, column)
        distinct = sorted(set(values), key=_place)
        if len(distinct) < 2:
            continue
        found[column] = {}
        for value in distinct:
            rows = np.flatnonzero(np.array(values) == value)
            own = np.unique(groups[rows], return_inverse=True)[1].astype(np.int64)
            part = Detection(scores[rows], positives[rows], own, threshold=threshold, name=name)
            kinds = [len(np.unique(own[positives[rows] == kind])) for kind in (True, False)]
            found[column][value] = estimate([part], own, bootstrap, group) | {
                "images": len(rows),
                "positive": int(positives[rows].sum()),
                "groups": int(own.max()) + 1,
                "small": min(kinds) < SMALL,
            }
    return found


def banded(metadata: Metadata, column: str) -> list[str]:
    """(n,) value of each sample, few enough to tell apart: ages in bands, other numbers in quarters."""
    if column == SIZE:
        widths, heights = read(metadata, "original_width"), read(metadata, "original_height")
        if widths is None or heights is None:
            return []
        return _common([f"{int(w)}×{int(h)}" for w, h in zip(widths, heights, strict=True)])
    values = read(metadata, column)
    if values is None:
        return []
    if column == "age":
        return [UNKNOWN if v is None else next(band for end, band in AGES if v < end) for v in values]
    if is_number(metadata, column) and len(set(values)) > MOST:
        return _quarters(values)
    return _common(
        [
            UNKNOWN if value is None else f"{value:g}" if isinstance(value, float) else value
            for value in values
        ]
    )


def _quarters(values: Sequence[float | None]) -> list[str]:
    known = [value for value in values if value is not None]
    edges = np.unique(np.quantile(known, [0, 0.25, 0.5, 0.75, 1]))
    names = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)]
    return [
        UNKNOWN
        if value is None
        else names[min(int(np.searchsorted(edges, value, side="right")) - 1, len(names) - 1)]
        for value in values
    ]


def _common(values: Sequence[str]) -> list[str]:
    """The same with the rarest as `other`, if there are too many."""
    distinct, counts = np.unique(np.array(values, dtype=object), return_counts=True)
    if len(distinct) <= MOST:
        return list(values)
    kept = set(distinct[np.argsort(-counts, kind="stable")[: MOST - 1]].tolist())
    return [value if value in kept else OTHER for value in values]


def _place(value: str) -> tuple[int, list[float], str]:
    """Ages in their order, the rest by the numbers in them and by name; `other` and `unknown` last."""
    bands = [band for _, band in AGES]
    rank = bands.index(value) if value in bands else len(bands) + (value in (UNKNOWN, OTHER))
    return rank, [float(number) for number in NUMBER.findall(value)], value
