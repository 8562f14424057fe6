"""Retrieval: are a sample's nearest neighbours of its own class? By cosine, the sample itself left out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ROUNDING = 1e-9  # of a distance
FIRST = (1, 5, 10)
"""k of recall@k."""
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def per_query(
    vectors: NDArray[np.float32],
    labels: Ints,
    *,
    queries: Ints | None = None,
    groups: Ints | None = None,
    chunk: int = 128,
) -> dict[str, Floats]:
    """Each query's retrieval among all samples.

    recall@k is 1 where one of the k nearest is of the query's class; MAP@R is the mean, over the R nearest,
    R being the number of others of its class, of the precision up to each that is of it (Musgrave et al.
    2020, "A Metric Learning Reality Check").

    Args:
        vectors: (n, dim); their lengths do not matter.
        labels: (n,) class indices.
        queries: rows (q,) to ask about; None: all.
        groups: (n,) patients; a query's own are passed over, who share skin and camera. None: none are.
        chunk: queries at a time; memory holds chunk × n numbers.

    Returns:
        `recall_at_K`, `map_at_r`: (q,), nan where no other sample is of the class.
    """
    rows = np.arange(len(labels)) if queries is None else queries
    known, classes = torch.from_numpy(_directions(vectors)), torch.from_numpy(labels)
    owners = torch.arange(len(labels)) if groups is None else torch.from_numpy(groups)
    parts = [_chunk(known, classes, owners, torch.from_numpy(part)) for part in _split(rows, chunk)]
    names = [*(f"recall_at_{k}" for k in FIRST), "map_at_r"]
    return dict(zip(names, np.concatenate(parts, axis=1), strict=True))


def _split(rows: Ints, chunk: int) -> Sequence[Ints]:
    return [rows[start : start + chunk] for start in range(0, max(len(rows), 1), chunk)]


def _chunk(known: torch.Tensor, classes: torch.Tensor, owners: torch.Tensor, rows: torch.Tensor) -> Floats:
    """(figures, q)."""
    cosines = known[rows] @ known.T
    cosines.masked_fill_(owners[rows, None] == owners, -torch.inf)
    order = cosines.argsort(dim=1, descending=True, stable=True)
    own = cosines.gather(1, order) == -torch.inf
    right = (classes[order] == classes[rows, None]) & ~own
    total = right.sum(dim=1)
    seen = torch.arange(1, len(known) + 1)
    precise = right.cumsum(dim=1) / seen
    precise.masked_fill_(~right | (seen > total[:, None]), 0)
    figures = [right[:, :k].any(dim=1).double() for k in FIRST] + [precise.double().sum(dim=1) / total]
    found = torch.stack(figures)
    found[:, total == 0] = torch.nan
    return np.asarray(found.numpy())


def silhouette(vectors: NDArray[np.float32], labels: Ints) -> Floats:
    """(n,) silhouette of each sample by cosine distance (Rousseeuw 1987).

    It is 0 for a sample that is alone in its class, or where all lie on one point, and nan where there is
    one class only. The mean cosine distance to a class is 1 - the product with its mean direction: no pair
    is looked at.
    """
    present, codes = np.unique(labels, return_inverse=True)
    if len(present) < 2:
        return np.full(len(labels), np.nan)
    directions = _directions(vectors.astype(np.float64))
    sums = np.stack([directions[codes == code].sum(axis=0) for code in range(len(present))])
    counts, rows = np.bincount(codes), np.arange(len(labels))
    products, size = directions @ sums.T, counts[codes]  # (n, classes), (n,)
    within = 1 - (products[rows, codes] - 1) / np.maximum(size - 1, 1)
    outside = 1 - products / counts
    outside[rows, codes] = np.inf
    nearest = outside.min(axis=1)
    scale = np.maximum(nearest, within)
    defined = (size > 1) & (scale > ROUNDING)
    return np.asarray(np.divide(nearest - within, scale, out=np.zeros(len(labels)), where=defined))


def _directions(vectors: NDArray[Any]) -> NDArray[Any]:
    """The same of length 1: rounding to float16 takes some of it."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.finfo(vectors.dtype).tiny))
