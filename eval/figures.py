"""Named figures of a split, each with its interval: images, patients, one class or all of them.

A `Part` knows some figures under any resample of the groups, and what each needs to be defined. `estimate`
gives the value and the interval of all of them; one resample serves every figure.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from eval.metrics import (
    Bools,
    Bootstrap,
    Curve,
    Floats,
    Ints,
    confusion_matrix,
    decide,
    quantile_bins,
    ratio,
    sums,
)

FIXED = (0.8, 0.9, 0.95)
"""Sensitivities at which specificity is told, and the reverse."""
PARTIAL = 0.8
"""Sensitivity above which the partial area is taken."""
BINS = 10
"""Of the calibration error: as many samples in each."""
Need = tuple[int, str]
"""How many groups have what a figure divides by, and what that is."""


class Part(Protocol):
    """Some figures of one split."""

    def under(self, multiplicity: Floats) -> Mapping[str, Floats]:
        """name -> (b,) values for multiplicities (b, G); nan where one is undefined."""

    def needs(self) -> Mapping[str, Sequence[Need]]:
        """name -> what must be there for it."""


def estimate(
    parts: Sequence[Part], groups: Ints, bootstrap: Bootstrap, group: str = "group"
) -> dict[str, Any]:
    """Value and interval of all figures of some parts.

    An interval is the percentiles of the draws. A draw in which a figure is undefined, such as sensitivity
    where no patient with a melanoma was drawn, is left out of that figure's interval, and counted.

    Args:
        groups: (n,) group codes from 0 without gaps; groups are drawn whole.
        group: what a group is, such as `patient`, for the reasons in `undefined`.

    Returns:
        name -> {"value", "low", "high"};
        `undefined`: name -> why a figure is left out, `NAME.interval` -> why its low and high are None;
        `undefined_draws`: name -> draws its interval lacks.
    """
    chunks = defaultdict(list)
    for multiplicity in bootstrap.resamples(groups):
        for part in parts:
            for name, values in part.under(multiplicity).items():
                chunks[name].append(values)
    rows: dict[str, Any] = {}
    undefined = _undefined(parts, int(groups.max()) + 1, group)
    undefined_draws: dict[str, int] = {}
    for name, found in chunks.items():
        if name in undefined:
            continue
        value, drawn = found[0][0], np.concatenate([found[0][1:], *found[1:]])
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
    return rows | {"undefined": undefined, "undefined_draws": undefined_draws}


def _undefined(parts: Sequence[Part], count: int, group: str) -> dict[str, str]:
    """name -> why it has no value; `NAME.interval` -> why it has no interval.

    A figure divides by a count of some images. Where no group holds such images, it has no value. Where one
    group holds them all, draws of groups repeat that group or lack it, and cannot tell how far the figure
    would move with other groups.
    """
    reasons = {}
    for part in parts:
        for name, needed in part.needs().items():
            least, what = min([(count, ""), *needed])
            if least < 2:
                reasons[f"{name}.interval" if least else name] = f"{('no', 'one')[least]} {group}{what}"
    return reasons


class Detection:
    """The figures of one class against the rest, by its score and a threshold.

    `calibration_error` is the expected one: |mean score - share of the class|, weighed over BINS bins of
    about as many samples (Naeini, Cooper & Hauskrecht 2015). It cannot be negative, so chance alone lifts it
    above 0, in every bootstrap draw once more than in the data: its value is biased upward, and its
    percentile interval sits higher still and need not hold the value of a perfectly calibrated model, which
    is 0 (Kumar, Liang & Ma 2019, "Verified Uncertainty Calibration"). The bins stay those of the data.

    `sensitivity_at_specificity_…` and the reverse take whatever threshold these samples allow, not the stored
    one, which flatters a little where samples are few.
    """

    def __init__(
        self,
        scores: Floats,
        positives: Bools,
        groups: Ints,
        *,
        threshold: float,
        name: str = "positive",
        prevalence: float | None = None,
    ) -> None:
        """
        Args:
            scores: (n,) probability of the class.
            positives: (n,) whether a sample is of it.
            groups: (n,) codes from 0.
            threshold: the class is called where the score reaches this.
            name: of the class.
            prevalence: at which PPV, NPV and the number flagged are told; None: that of the data.
        """
        count = int(groups.max()) + 1
        self._name, self._prevalence = name, prevalence
        self._curve = Curve(scores, positives, groups, count)
        self._cells = sums(groups, 2 * positives + (scores >= threshold), 4, rows=count)  # (G, 4)
        self._squares = np.bincount(groups, (scores - positives) ** 2, minlength=count)
        where = quantile_bins(scores, BINS)
        cells = groups * (int(where.max()) + 1) + where
        excess = np.bincount(cells, scores - positives, minlength=count * (int(where.max()) + 1))
        self._excess = excess.reshape(count, -1)

    def under(self, multiplicity: Floats) -> dict[str, Floats]:
        """name -> (b,)."""
        points = self._curve.under(multiplicity)
        spared, alarms, missed, caught = (multiplicity @ self._cells).T
        positives, negatives = missed + caught, spared + alarms
        total = positives + negatives
        sensitivity, specificity = ratio(caught, positives), ratio(spared, negatives)
        if self._prevalence is None:
            share = ratio(positives, total)
            hit, false, quiet = ratio(caught, total), ratio(alarms, total), ratio(spared, total)
            lost = ratio(missed, total)
        else:
            share = np.full(len(total), self._prevalence)
            hit, lost = sensitivity * share, (1 - sensitivity) * share
            false, quiet = (1 - specificity) * (1 - share), specificity * (1 - share)
        values = {
            "roc_auc": points.roc_auc(),
            "pr_auc": points.average_precision(),
            "partial_auc": points.partial_auc(PARTIAL),
            "prevalence": ratio(positives, total),
            "sensitivity": sensitivity,
            "specificity": specificity,
            "ppv": ratio(hit, hit + false),
            "npv": ratio(quiet, quiet + lost),
            "flagged_per_found": ratio(hit + false, hit),
            "brier": ratio(multiplicity @ self._squares, total),
            "calibration_error": ratio(np.abs(multiplicity @ self._excess).sum(axis=1), total),
        }
        values |= {f"sensitivity_at_specificity_{at:g}": points.sensitivity_at(at) for at in FIXED}
        values |= {f"specificity_at_sensitivity_{at:g}": points.specificity_at(at) for at in FIXED}
        return values

    def needs(self) -> dict[str, list[Need]]:
        """name -> what it needs."""
        spared, alarms, missed, caught = (self._cells > 0).T
        name = self._name
        positives: Need = (int((missed | caught).sum()), f" with images of {name}")
        negatives: Need = (int((spared | alarms).sum()), f" with images that are not {name}")
        called: Need = (int((alarms | caught).sum()), f" with images called {name}")
        others: Need = (int((spared | missed).sum()), f" with images not called {name}")
        found: Need = (int(caught.sum()), f" with images of {name} that are called so")
        kinds = [] if self._prevalence is None else [positives, negatives]
        return {
            "pr_auc": [positives],
            "prevalence": [],
            "sensitivity": [positives],
            "specificity": [negatives],
            "ppv": [called, *kinds],
            "npv": [others, *kinds],
            "flagged_per_found": [positives, found, *kinds],
            "brier": [],
            "calibration_error": [],
            "roc_auc": [positives, negatives],
            "partial_auc": [positives, negatives],
            **{f"sensitivity_at_specificity_{at:g}": [positives, negatives] for at in FIXED},
            **{f"specificity_at_sensitivity_{at:g}": [positives, negatives] for at in FIXED},
        }


class Calls:
    """The figures of the called classes: accuracy; precision, recall and F1 of each class, and their means.

    As in scikit-learn's classification report, a `macro` mean is that over classes (of recall:
    `balanced_accuracy`), a `weighted` one that over images by their class (of recall: `accuracy`). Where a
    figure of a class that counts has no meaning, as the precision of one never called, which scikit-learn
    takes for 0, the mean has none.
    """

    def __init__(self, called: Ints, labels: Ints, groups: Ints, classes: Sequence[str]) -> None:
        """called, labels: (n,) class indices; groups: (n,) codes from 0."""
        self._classes = classes
        self._confusion = sums(groups, labels * len(classes) + called, len(classes) ** 2)  # (G, C * C)

    def under(self, multiplicity: Floats) -> dict[str, Floats]:
        """name -> (b,)."""
        b, c = len(multiplicity), len(self._classes)
        confusion = (multiplicity @ self._confusion).reshape(b, c, c)
        right, true, called = (np.einsum(p, confusion) for p in ("bii->bi", "bij->bi", "bij->bj"))
        recall, precision, f1 = ratio(right, true), ratio(right, called), ratio(2 * right, true + called)
        values = {
            "accuracy": ratio(right.sum(axis=1), true.sum(axis=1)),
            "balanced_accuracy": recall.mean(axis=1),
            "macro_precision": precision.mean(axis=1),
            "macro_f1": f1.mean(axis=1),
            "weighted_precision": _weighted(precision, true),
            "weighted_f1": _weighted(f1, true),
        }
        for i, name in enumerate(self._classes):
            values |= {f"precision.{name}": precision[:, i], f"recall.{name}": recall[:, i]}
            values[f"f1.{name}"] = f1[:, i]
        return values

    def needs(self) -> dict[str, list[Need]]:
        """name -> what it needs."""
        confusion = self._confusion.reshape(-1, len(self._classes), len(self._classes))
        true, called = confusion.any(axis=2), confusion.any(axis=1)  # (G, C) whether a group has such images
        of, calls, either = (
            [
                (int(count), f" with images {what} {name}")
                for count, name in zip(has.sum(axis=0), self._classes, strict=True)
            ]
            for what, has in (("of", true), ("called", called), ("of or called", true | called))
        )
        needs: dict[str, list[Need]] = {"accuracy": [], "balanced_accuracy": of}
        there = [call for call, (groups, _) in zip(calls, of, strict=True) if groups]
        needs |= {
            "macro_precision": calls,
            "weighted_precision": there,
            "macro_f1": either,
            "weighted_f1": [],
        }
        for i, name in enumerate(self._classes):
            needs |= {f"precision.{name}": [calls[i]], f"recall.{name}": [of[i]], f"f1.{name}": [either[i]]}
        return needs


def _weighted(values: Floats, images: Floats) -> Floats:
    """Mean over classes by their images, both (b, C): a class without any counts nothing, defined or not."""
    return ratio(np.where(images > 0, images * values, 0).sum(axis=1), images.sum(axis=1))


class EachClass:
    """ROC-AUC and PR-AUC of each class against the rest, and their means over classes."""

    def __init__(self, probabilities: Floats, labels: Ints, groups: Ints, classes: Sequence[str]) -> None:
        """probabilities: (n, C); labels: (n,); groups: (n,) codes from 0."""
        count = int(groups.max()) + 1
        self._curves = {
            name: Curve(probabilities[:, i], labels == i, groups, count) for i, name in enumerate(classes)
        }
        self._present = sums(groups, labels, len(classes), rows=count) > 0  # (G, C)

    def under(self, multiplicity: Floats) -> dict[str, Floats]:
        """name -> (b,)."""
        points = {name: curve.under(multiplicity) for name, curve in self._curves.items()}
        roc = {f"roc_auc.{name}": of.roc_auc() for name, of in points.items()}
        precision = {f"pr_auc.{name}": of.average_precision() for name, of in points.items()}
        macro = {
            "macro_roc_auc": np.mean(list(roc.values()), axis=0),
            "macro_pr_auc": np.mean(list(precision.values()), axis=0),
        }
        return roc | precision | macro

    def needs(self) -> dict[str, list[Need]]:
        """name -> what it needs."""
        needs: dict[str, list[Need]] = {"macro_roc_auc": [], "macro_pr_auc": []}
        for i, name in enumerate(self._curves):
            others = np.delete(self._present, i, axis=1).any(axis=1)
            of: Need = (int(self._present[:, i].sum()), f" with images of {name}")
            needs[f"pr_auc.{name}"] = [of]
            needs[f"roc_auc.{name}"] = [of, (int(others.sum()), f" with images that are not {name}")]
            for figure in ("roc_auc", "pr_auc"):
                needs[f"macro_{figure}"] += needs[f"{figure}.{name}"]
        return needs


class Means:
    """Means over the samples, or over some of them, of values that each one has."""

    def __init__(self, values: Mapping[str, Floats], groups: Ints, what: str) -> None:
        """values: name -> (n,), nan where a sample has none; groups: (n,) codes from 0; what: samples have
        that."""
        count = int(groups.max()) + 1
        self._what = what
        self._sums, self._counts = {}, {}
        for name, its in values.items():
            has = np.isfinite(its)
            self._sums[name] = np.bincount(groups[has], its[has], minlength=count)
            self._counts[name] = np.bincount(groups[has], minlength=count)

    def under(self, multiplicity: Floats) -> dict[str, Floats]:
        """name -> (b,)."""
        return {
            name: ratio(multiplicity @ self._sums[name], multiplicity @ self._counts[name])
            for name in self._sums
        }

    def needs(self) -> dict[str, list[Need]]:
        """name -> what it needs."""
        return {name: [(int((count > 0).sum()), self._what)] for name, count in self._counts.items()}


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
    prevalence: float | None = None,
) -> dict[str, Any]:
    """Every figure of one split's images, ready for JSON.

    Args:
        probabilities: (n, C).
        labels: (n,) class indices.
        groups: (n,) group codes from 0 without gaps; groups are drawn whole.
        classes: the C names; `precision.NAME`, `recall.NAME`, `f1.NAME` are each class against the rest, and
        with
            more than two classes `roc_auc.NAME` and `pr_auc.NAME` too.
        positive: index of the class that the other figures are about.
        threshold: it is called where its probability reaches this.
        bootstrap: draws, coverage and seed of the intervals.
        group: what a group is, such as `patient`, for the reasons in `undefined`.
        prevalence: at which PPV, NPV and the number flagged are told; None: that of the data.

    Returns:
        As `estimate`, with the counts `images`, `groups`, `class_counts`, `confusion_matrix`.
    """
    called = decide(probabilities, positive, threshold)
    parts: list[Part] = [
        Detection(
            probabilities[:, positive],
            labels == positive,
            groups,
            threshold=threshold,
            name=classes[positive],
            prevalence=prevalence,
        ),
        Calls(called, labels, groups, classes),
    ]
    if len(classes) > 2:
        parts.append(EachClass(probabilities, labels, groups, classes))
    counts = np.bincount(labels, minlength=len(classes)).tolist()
    return estimate(parts, groups, bootstrap, group) | {
        "images": len(labels),
        "groups": int(groups.max()) + 1,
        "class_counts": dict(zip(classes, counts, strict=True)),
        "confusion_matrix": confusion_matrix(labels, called, len(classes)).tolist(),
    }
