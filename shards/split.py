"""Who is in train, val and test: whole groups only, stratified by class and by group size.

Groups that share a listed duplicate are tied into one unit first; units, never images, are dealt out.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int64]


class Purpose(IntEnum):
    """What a draw is for: streams of different purposes share no numbers."""

    UNDERSAMPLE = 101
    SPLIT = 102
    ORDER = 103


def generator(seed: int, purpose: Purpose, part: int = 0) -> np.random.Generator:
    """A generator that is a pure function of its arguments."""
    return np.random.default_rng([seed, purpose, part])


def connect(count: int, pairs: Codes) -> Codes:
    """Connected components of a graph, by union-find with path halving.

    Args:
        count: number of nodes n.
        pairs: (m, 2) edges.

    Returns:
        (n,) the smallest node of each node's component.
    """
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for one, other in pairs.tolist():
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return np.array([root(node) for node in range(count)], dtype=np.int64)


def tie(groups: Codes, pairs: Codes) -> Codes:
    """Units that must stay together: groups, joined wherever a listed pair of images spans two of them.

    Args:
        groups: (n,) group code of each image, 0 ... number of groups - 1.
        pairs: (m, 2) image rows.

    Returns:
        (n,) unit code of each image, 0 ... number of units - 1.
    """
    together = connect(int(groups.max()) + 1, groups[pairs])
    return np.unique(together[groups], return_inverse=True)[1].astype(np.int64)


def undersample(labels: Codes, seed: int) -> Codes:
    """Rows (k,), ascending, that hold every class as often as the rarest one, drawn by seed."""
    counts = np.bincount(labels)
    least = counts[counts > 0].min()
    draw = generator(seed, Purpose.UNDERSAMPLE)
    kept = [draw.choice(np.flatnonzero(labels == c), least, replace=False) for c in np.flatnonzero(counts)]
    return np.sort(np.concatenate(kept))


def split(units: Codes, labels: Codes, ratios: tuple[float, ...], seed: int) -> Codes:
    """Deal units to splits so that each split's share of everything that matters comes near its ratio.

    What matters is one row of features a unit: its images of each class, its images, whether it has each
    class, one for itself, and its bin of size (powers of two), each as a share of the whole set's. Units
    come rarest class first, then largest first, in random order among alike ones, and go where the sum of
    (share held - share asked)^2 / share asked grows least: iterative stratification (Sechidis et al. 2011)
    with whole groups for samples. Where only as many units with a class are left as there are splits
    without it, those splits come first.

    Args:
        units: (n,) unit code of each image, 0 ... number of units - 1.
        labels: (n,) class index of each image.
        ratios: share of each split; all above 0.
        seed: the draw among units that are alike.

    Returns:
        (n,) index of each image's split in `ratios`.
    """
    images = np.zeros((int(units.max()) + 1, int(labels.max()) + 1))  # (units, classes)
    np.add.at(images, (units, labels), 1)
    has = images > 0
    sizes = images.sum(axis=1)
    bins = np.log2(sizes).astype(np.int64)
    features = np.column_stack([images, sizes, has, np.ones_like(sizes), np.eye(bins.max() + 1)[bins]])
    features = features[:, features.any(axis=0)]
    features /= features.sum(axis=0)

    rarity = np.where(has, has.sum(axis=0), len(has) + 1).min(axis=1)
    order = np.lexsort((generator(seed, Purpose.SPLIT).random(len(has)), -bins, rarity))
    asked = np.array(ratios)
    excess = np.tile(-asked[:, None], features.shape[1])  # (splits, features) share held - share asked
    lacks = np.ones((len(asked), has.shape[1]), dtype=bool)  # (splits, classes)
    left = has.sum(axis=0)
    chosen = np.empty(len(has), dtype=np.int64)
    for unit in order:
        grows = (features[unit] + 2 * excess) @ features[unit] / asked
        last_call = has[unit] & (left <= lacks.sum(axis=0))
        needy = lacks[:, last_call].any(axis=1)
        best = int(np.argmin(np.where(needy, grows, np.inf) if needy.any() else grows))
        chosen[unit] = best
        excess[best] += features[unit]
        lacks[best] &= ~has[unit]
        left -= has[unit]
    return chosen[units]
