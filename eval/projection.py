"""Embeddings on a plane: the first two principal components, and t-SNE."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from eval.metrics import Bools, Floats, Ints
from train.plane import components

MOST = 1000
"""Images on a map, at most."""
CHOICE, START = range(2)  # purposes of randomness


@dataclass(frozen=True)
class Plane:
    """Where images lie on a map."""

    name: str
    x: str
    """What the axis means."""
    y: str
    points: Floats
    """(n, 2)."""


def chosen(positives: Bools, wrong: Bools, *, seed: int) -> Ints:
    """Rows to show, at most MOST, ascending: half of them positives and mistakes, as far as there are."""
    draw = np.random.default_rng((seed, CHOICE))
    order = draw.permutation(len(positives))
    first = order[(positives | wrong)[order]]
    rest = order[~(positives | wrong)[order]]
    kept = max(MOST // 2, MOST - len(rest))
    return np.sort(np.concatenate([first[:kept], rest[: MOST - min(kept, len(first))]]))


def planes(fitted: NDArray[np.float32], shown: NDArray[np.float32], *, seed: int) -> list[Plane]:
    """The maps of `shown` (n, dim); PCA is fitted on `fitted` (m, dim). None where they have no plane."""
    if shown.shape[1] < 2 or len(fitted) < 3:
        return []
    found = [_components(fitted, shown)]
    if len(shown) >= 10:
        found.append(_tsne(shown, seed))
    return found


def _components(fitted: NDArray[np.float32], shown: NDArray[np.float32]) -> Plane:
    points, (first, second) = components(fitted, shown)
    return Plane(
        "PCA",
        f"component 1 ({first:.0%} of variance)",
        f"component 2 ({second:.0%} of variance)",
        points,
    )


def _tsne(shown: NDArray[np.float32], seed: int) -> Plane:
    """t-SNE (van der Maaten & Hinton 2008), begun from the principal components, whose lie it keeps."""
    start = int(np.random.SeedSequence((seed, START)).generate_state(1)[0])
    perplexity = min(30.0, (len(shown) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca", random_state=start)
    # One thread: the same map on every machine; and on a busy one several wait for each other at every step.
    with threadpool_limits(1):
        points = model.fit_transform(shown.astype(np.float64))
    return Plane("t-SNE", "", "", points.astype(np.float64))
