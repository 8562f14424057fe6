"""Figures with honest intervals: every one from the same bootstrap of whole groups.

Shapes: n samples, G groups, C classes, K distinct scores, L of positives, b resamples. A resample is its
multiplicities (b, G): how often each group was drawn. All ones are the data themselves, so value and
interval come from the same code, and no sample is ever copied.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

BOOTSTRAP = 0  # purpose of randomness
ROUNDING = 1e-9  # 1 - 0.9 is a little more or less than 0.1
CELLS = 4_000_000  # numbers in the largest temporary of a chunk of resamples: 32 MB


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn."""

    draws: int
    confidence: float
    """Coverage, 0.5..1."""
    seed: int

    def resamples(self, groups: Ints) -> Iterator[Floats]:
        """Multiplicities in chunks (b, G): the data themselves first, then every draw.

        Whole groups are drawn with replacement, because images of one patient are not independent: the pairs
        cluster bootstrap of Cameron, Gelbach & Miller 2008, "Bootstrap-Based Improvements for Inference
        with Clustered Errors".
        """
        count = int(groups.max()) + 1
        yield np.ones((1, count))
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, BOOTSTRAP))))
        chunk = max(1, CELLS // len(groups))
        for start in range(0, self.draws, chunk):
            rows = min(chunk, self.draws - start)
            drawn = generator.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
            yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(float)

    def interval(self, drawn: Floats) -> tuple[Floats, Floats]:
        """Percentile interval over axis 0, undefined draws left out (Efron & Tibshirani 1993, chapter 13)."""
        tail = (1 - self.confidence) / 2
        low, high = np.nanquantile(drawn, [tail, 1 - tail], axis=0)
        return low, high


class Ranking:
    """Samples from the highest score down, ties taken together."""

    def __init__(self, scores: Floats, positives: Bools, groups: Ints) -> None:
        """scores, positives, groups: (n,)."""
        order = np.argsort(-scores, kind="stable")
        self._ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
        self._positives, self._groups = positives[order], groups[order]
        self.thresholds: Floats = scores[order][self._ends]
        """(K,) distinct scores, highest first."""

    def counts(self, multiplicity: Floats) -> tuple[Floats, Floats]:
        """True and false positives at each threshold: (b, G) -> (b, K), (b, K)."""
        weights = multiplicity[:, self._groups]
        flagged = np.cumsum(weights, axis=1)[:, self._ends]
        caught = np.cumsum(weights * self._positives, axis=1)[:, self._ends]
        return caught, flagged - caught


class Curve:
    """ROC and precision-recall curves by the points where they rise: the L distinct scores of positives.

    Nothing is lost: between two of them only false positives change, and a curve is a straight line. A
    resample costs as many additions as there are samples, and little memory where positives are rare.
    """

    def __init__(self, scores: Floats, positives: Bools, groups: Ints, count: int) -> None:
        """scores, positives, groups: (n,); count: G."""
        levels = -np.unique(-scores[positives])  # highest first
        exact = np.searchsorted(-levels, -scores)  # level at or just below a score
        tied = np.append(levels, np.nan)[exact] == scores
        # Cells: above level 0, at level 0, between 0 and 1, at level 1, …, below all.
        self._negatives = _counts(2 * exact + tied, ~positives, groups, (2 * len(levels) + 1, count))
        self._positives = _counts(exact, positives, groups, (len(levels) + 1, count))

    def under(self, multiplicity: Floats) -> "Points":
        """Multiplicities (b, G) -> the curve of each resample."""
        draws = np.ascontiguousarray(multiplicity.T)
        negatives = np.cumsum(self._negatives @ draws, axis=0)
        caught = np.cumsum(self._positives @ draws, axis=0)
        return Points(caught[:-1], negatives[:-1:2], negatives[1::2], caught[-1], negatives[-1])


@dataclass(frozen=True)
class Points:
    """Curves of b resamples, from the highest score down; ties are taken together."""

    caught: Floats
    """(L, b) true positives at each level."""
    above: Floats
    """(L, b) false positives above it."""
    alarms: Floats
    """(L, b) false positives at it."""
    positives: Floats
    """(b,) all there are."""
    negatives: Floats
    """(b,) all there are."""

    def roc_auc(self) -> Floats:
        """(b,) area under the ROC curve by trapezoids; nan where a kind is missing."""
        height = self.negatives - (self.above + self.alarms) / 2
        return ratio((self._risen * height).sum(axis=0), self.positives * self.negatives)

    def average_precision(self) -> Floats:
        """(b,) area under the precision-recall steps, sum of (R_k - R_k-1) P_k, as scikit-learn."""
        precision = self.caught / np.maximum(self.caught + self.alarms, np.finfo(float).tiny)
        return ratio((self._risen * precision).sum(axis=0), self.positives)

    def partial_auc(self, sensitivity: float) -> Floats:
        """(b,) area between the ROC curve and a sensitivity, 0 ... 1 - sensitivity.

        With 0.8 the metric of ISIC 2024 (Kurtansky et al. 2024, "The SLICE-3D dataset"; Kaggle's
        `pAUC-aboveTPR`).
        """
        end = ratio(self.caught, self.positives)
        start = end - ratio(self._risen, self.positives)
        first = np.maximum(start, sensitivity)
        part = np.maximum(end - first, 0)
        share = np.clip(ratio(first - start, end - start), 0, 1)
        left, right = ratio(self.above, self.negatives), ratio(self.alarms, self.negatives)
        height = 1 - (left + np.nan_to_num(share) * (right - left) + right) / 2
        area: Floats = (part * height).sum(axis=0)
        return area

    def sensitivity_at(self, specificity: float) -> Floats:
        """(b,) the highest sensitivity of a threshold that keeps a specificity; 0 where none does."""
        kept = self.alarms <= (1 - specificity + ROUNDING) * self.negatives
        best = np.where(kept, self.caught, 0).max(axis=0, initial=0)
        return np.where(self.negatives > 0, ratio(best, self.positives), np.nan)

    def specificity_at(self, sensitivity: float) -> Floats:
        """(b,) the highest specificity of a threshold that reaches a sensitivity."""
        reached = self.caught >= (sensitivity - ROUNDING) * self.positives
        least = np.where(reached, self.alarms, np.inf).min(axis=0, initial=np.inf)
        spared = np.where(self.positives > 0, self.negatives - least, np.nan)
        return ratio(spared, self.negatives)

    @property
    def _risen(self) -> Floats:
        return np.diff(self.caught, prepend=0, axis=0)


def ratio(above: Floats, below: Floats) -> Floats:
    """above / below, nan where nothing is below."""
    out = np.full(np.broadcast(above, below).shape, np.nan)
    np.divide(above, below, out=out, where=below > 0)
    return out


def decide(probabilities: Floats, positive: int, threshold: float) -> Ints:
    """Called class of each sample, (n, C) -> (n,).

    The positive class where its probability reaches the threshold, else the likeliest of the others.
    """
    others = probabilities.copy()
    others[:, positive] = -1
    called: Ints = np.where(probabilities[:, positive] >= threshold, positive, others.argmax(axis=1))
    return called


def confusion_matrix(labels: Ints, called: Ints, classes: int) -> Ints:
    """(C, C) counts: rows are the true class, columns the called one."""
    counts: Ints = np.bincount(labels * classes + called, minlength=classes**2)
    return counts.reshape(classes, classes)


def roc_band(ranking: Ranking, groups: Ints, bootstrap: Bootstrap) -> tuple[Floats, Floats, Floats]:
    """Pointwise interval of the ROC curve: false positive rates (201,), low and high sensitivity (201,)."""
    grid, curves = np.linspace(0, 1, 201), []
    for multiplicity in bootstrap.resamples(groups):
        caught, alarms = ranking.counts(multiplicity)
        sensitivity, rate = ratio(caught, caught[:, -1:]), ratio(alarms, alarms[:, -1:])
        curves += [
            np.interp(grid, np.append(0, x), np.append(0, y)) for x, y in zip(rate, sensitivity, strict=True)
        ]
    return grid, *bootstrap.interval(np.array(curves[1:]))


def precision_band(ranking: Ranking, groups: Ints, bootstrap: Bootstrap) -> tuple[Floats, Floats, Floats]:
    """Pointwise interval of precision: recalls (200,) above 0, low and high precision (200,).

    Precision at a recall is that of the highest threshold which reaches it.
    """
    grid, curves = np.linspace(0, 1, 201)[1:], []
    for multiplicity in bootstrap.resamples(groups):
        caught, alarms = ranking.counts(multiplicity)
        recall, precision = ratio(caught, caught[:, -1:]), ratio(caught, caught + alarms)
        # Rounding may leave the last recall a hair below 1.
        reached = [np.searchsorted(row, grid - ROUNDING).clip(max=len(row) - 1) for row in recall]
        curves += [row[at] for row, at in zip(precision, reached, strict=True)]
    return grid, *bootstrap.interval(np.array(curves[1:]))


def reliability(
    scores: Floats, positives: Bools, groups: Ints, bootstrap: Bootstrap, bins: int = 10
) -> tuple[Floats, Floats, Floats, Floats]:
    """Mean score, share of positives, and its interval, in bins of about as many samples: each (bins,).

    The interval of a bin that a single group fills is nan.
    """
    where = quantile_bins(scores, bins)
    used = int(where.max()) + 1
    sizes = sums(groups, where, used)
    hits = sums(groups[positives], where[positives], used, rows=len(sizes))
    shares = np.concatenate([ratio(m @ hits, m @ sizes) for m in bootstrap.resamples(groups)])
    mean = np.bincount(where, scores) / np.bincount(where)
    lone = np.count_nonzero(sizes, axis=0) < 2
    low, high = (np.where(lone, np.nan, end) for end in bootstrap.interval(shares[1:]))
    return mean, shares[0], low, high


def quantile_bins(scores: Floats, bins: int) -> Ints:
    """Bin (n,) of each score, from 0 without gaps, about as many samples in each."""
    edges = np.unique(np.quantile(scores, np.linspace(0, 1, bins + 1)[1:-1]))
    return np.unique(np.searchsorted(edges, scores, side="right"), return_inverse=True)[1].astype(np.int64)


def sums(groups: Ints, cells: Ints, width: int, rows: int = 0) -> Floats:
    """Count of each (group, cell): (n,), (n,) -> (rows or G, width)."""
    rows = rows or int(groups.max()) + 1
    return np.bincount(groups * width + cells, minlength=rows * width).reshape(rows, width).astype(float)


def _counts(rows: Ints, chosen: Bools, groups: Ints, shape: tuple[int, int]) -> "scipy.sparse.csr_array":
    """How many of the chosen samples each (row, group) has."""
    ones = np.ones(int(chosen.sum()))
    return scipy.sparse.csr_array((ones, (rows[chosen], groups[chosen])), shape=shape)
