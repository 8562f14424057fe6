"""Figures with honest intervals: every one from the same bootstrap of whole groups.

Shapes: n samples, G groups, C classes, K distinct scores, b resamples. A resample is its multiplicities
(b, G): how often each group was drawn. All ones are the data themselves, so value and interval come from
the same code, and no sample is ever copied.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

BOOTSTRAP = 0  # purpose of randomness
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


def roc_auc(caught: Floats, alarms: Floats) -> Floats:
    """Area under the ROC curve by trapezoids, (b, K), (b, K) -> (b,); nan where a kind is missing."""
    height = caught - np.diff(caught, prepend=0) / 2
    area = (np.diff(alarms, prepend=0) * height).sum(axis=1)
    return ratio(area, caught[:, -1] * alarms[:, -1])


def average_precision(caught: Floats, alarms: Floats) -> Floats:
    """Area under the precision-recall steps, sum of (R_k - R_k-1) P_k, as scikit-learn; (b, K) x2 -> (b,)."""
    precision = caught / np.maximum(caught + alarms, np.finfo(float).tiny)
    return ratio((np.diff(caught, prepend=0) * precision).sum(axis=1), caught[:, -1])


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


def figures(
    probabilities: Floats,
    labels: Ints,
    groups: Ints,
    *,
    classes: Sequence[str],
    positive: int,
    threshold: float,
    bootstrap: Bootstrap,
    group: str = "group",
) -> dict[str, Any]:
    """Every figure of one split, ready for JSON.

    Args:
        probabilities: (n, C).
        labels: (n,) class indices.
        groups: (n,) group codes from 0 without gaps; groups are drawn whole.
        classes: the C names; `precision.NAME`, `recall.NAME`, `f1.NAME` are each class against the rest.
        positive: index of the class that the other figures are about.
        threshold: it is called where its probability reaches this.
        bootstrap: draws, coverage and seed of the intervals.
        group: what a group is, such as `patient`, for the reasons in `undefined`.

    Returns:
        name -> {"value", "low", "high"}; counts: `images`, `groups`, `class_counts`, `confusion_matrix`;
        `undefined`: name -> why a figure is left out, `NAME.interval` -> why its low and high are None;
        `undefined_draws`: name -> draws its interval lacks.
    """
    evaluated = _Evaluated(probabilities, labels, groups, len(classes), positive, threshold)
    chunks = defaultdict(list)
    for multiplicity in bootstrap.resamples(groups):
        for name, values in evaluated.under(multiplicity, classes).items():
            chunks[name].append(values)
    rows: dict[str, Any] = {}
    undefined, undefined_draws = evaluated.undefined(classes, group), {}
    for name, parts in chunks.items():
        if name in undefined:
            continue
        value, drawn = parts[0][0], np.concatenate(parts[1:])
        rows[name] = {"value": float(value), "low": None, "high": None}
        missing = int(np.isnan(drawn).sum())
        if missing == len(drawn):
            undefined.setdefault(f"{name}.interval", "no draw defines it")
        if f"{name}.interval" in undefined:
            continue
        low, high = bootstrap.interval(drawn)
        rows[name] |= {"low": float(low), "high": float(high)}
        if missing:
            undefined_draws[name] = missing
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    called = decide(probabilities, positive, threshold)
    return rows | {
        "images": len(labels),
        "groups": int(groups.max()) + 1,
        "class_counts": dict(zip(classes, counts, strict=True)),
        "confusion_matrix": confusion_matrix(labels, called, len(classes)).tolist(),
        "undefined": undefined,
        "undefined_draws": undefined_draws,
    }


class _Evaluated:
    """One split reduced to sums per group, so that a resample costs matrix products and one ranking."""

    def __init__(
        self, probabilities: Floats, labels: Ints, groups: Ints, classes: int, positive: int, threshold: float
    ) -> None:
        scores, positives = probabilities[:, positive], labels == positive
        self.positive = positive
        self.ranking = Ranking(scores, positives, groups)
        called = decide(probabilities, positive, threshold)
        self.confusion = _sums(groups, labels * classes + called, classes**2)  # (G, C * C)
        self.squares = np.bincount(groups, (scores - positives) ** 2)  # (G,)

    def under(self, multiplicity: Floats, classes: Sequence[str]) -> dict[str, Floats]:
        """name -> (b,) values for multiplicities (b, G)."""
        b, c, positive = len(multiplicity), len(classes), self.positive
        confusion = (multiplicity @ self.confusion).reshape(b, c, c)
        right, true, called = (np.einsum(p, confusion) for p in ("bii->bi", "bij->bi", "bij->bj"))
        negatives = true.sum(axis=1) - true[:, positive]
        alarms = called[:, positive] - right[:, positive]
        recall, precision, f1 = ratio(right, true), ratio(right, called), ratio(2 * right, true + called)
        curve = self.ranking.counts(multiplicity)
        values = {
            "roc_auc": roc_auc(*curve),
            "pr_auc": average_precision(*curve),
            "accuracy": ratio(right.sum(axis=1), true.sum(axis=1)),
            "balanced_accuracy": recall.mean(axis=1),
            "sensitivity": recall[:, positive],
            "specificity": ratio(negatives - alarms, negatives),
            "brier": ratio(multiplicity @ self.squares, true.sum(axis=1)),
        }
        for i, name in enumerate(classes):
            values |= {f"precision.{name}": precision[:, i], f"recall.{name}": recall[:, i]}
            values[f"f1.{name}"] = f1[:, i]
        return values

    def undefined(self, classes: Sequence[str], group: str) -> dict[str, str]:
        """name -> why it has no value; `NAME.interval` -> why it has no interval.

        A figure divides by a count of some images. Where no group holds such images, it has no value. Where
        one group holds them all, draws of groups repeat that group or lack it, and cannot tell how far the
        figure would move with other groups.
        """
        confusion = self.confusion.reshape(-1, len(classes), len(classes))
        true, called = confusion.any(axis=2), confusion.any(axis=1)  # (G, C) whether a group has such images
        others = np.delete(true, self.positive, axis=1).any(axis=1)
        everyone = (len(confusion), "")
        of, calls, either = (
            [(n, f" with images {what} {name}") for n, name in zip(has.sum(axis=0), classes, strict=True)]
            for what, has in (("of", true), ("called", called), ("of or called", true | called))
        )
        positives = of[self.positive]
        negatives = (others.sum(), f" with images that are not {classes[self.positive]}")
        needs = {
            "roc_auc": [positives, negatives],
            "pr_auc": [positives],
            "accuracy": [],
            "balanced_accuracy": of,
            "sensitivity": [positives],
            "specificity": [negatives],
            "brier": [],
        }
        for i, name in enumerate(classes):
            needs |= {f"precision.{name}": [calls[i]], f"recall.{name}": [of[i]], f"f1.{name}": [either[i]]}
        reasons = {}
        for name, needed in needs.items():
            count, what = min([everyone, *needed])
            if count < 2:
                reasons[f"{name}.interval" if count else name] = f"{('no', 'one')[count]} {group}{what}"
        return reasons


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


def reliability(
    scores: Floats, positives: Bools, groups: Ints, bootstrap: Bootstrap, bins: int = 10
) -> tuple[Floats, Floats, Floats, Floats]:
    """Mean score, share of positives, and its interval, in bins of about as many samples: each (bins,).

    The interval of a bin that a single group fills is nan.
    """
    edges = np.unique(np.quantile(scores, np.linspace(0, 1, bins + 1)[1:-1]))
    where = np.unique(np.searchsorted(edges, scores, side="right"), return_inverse=True)[1]
    used = int(where.max()) + 1
    sizes = _sums(groups, where, used)
    hits = _sums(groups[positives], where[positives], used, rows=len(sizes))
    shares = np.concatenate([ratio(m @ hits, m @ sizes) for m in bootstrap.resamples(groups)])
    mean = np.bincount(where, scores) / np.bincount(where)
    lone = np.count_nonzero(sizes, axis=0) < 2
    low, high = (np.where(lone, np.nan, end) for end in bootstrap.interval(shares[1:]))
    return mean, shares[0], low, high


def _sums(groups: Ints, cells: Ints, width: int, rows: int = 0) -> Floats:
    """Count of each (group, cell): (n,), (n,) -> (rows or G, width)."""
    rows = rows or int(groups.max()) + 1
    return np.bincount(groups * width + cells, minlength=rows * width).reshape(rows, width).astype(float)
