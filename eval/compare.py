"""Two models, or two recipes of several runs, on the same images: paired bootstrap over patients, DeLong."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.load import load as read_config
from configs.schema import Experiment
from eval.figures import Detection, Need, Part, estimate
from eval.metrics import Bools, Bootstrap, Floats, Ints
from train.classifier import load
from train.embeddings import Embeddings, read_embeddings
from train.influence import placements

COMPARED = ("roc_auc", "pr_auc", "partial_auc", "sensitivity", "specificity", "brier")


class Mean:
    """The mean of some figures over runs of one recipe, on the same images under the same draws."""

    def __init__(self, runs: Sequence[Detection]) -> None:
        self._runs = runs

    def under(self, multiplicity: Floats) -> dict[str, Floats]:
        """name -> (b,)."""
        of = [run.under(multiplicity) for run in self._runs]
        return {name: np.mean([each[name] for each in of], axis=0) for name in COMPARED}

    def needs(self) -> Mapping[str, Sequence[Need]]:
        """name -> what it needs."""
        of = [run.needs() for run in self._runs]
        return {name: [need for each in of for need in each[name]] for name in COMPARED}


class Difference:
    """First less second, of some figures, on the same images under the same draws."""

    def __init__(self, first: Part, second: Part) -> None:
        self._first, self._second = first, second

    def under(self, multiplicity: Floats) -> dict[str, Floats]:
        """name -> (b,)."""
        one, other = self._first.under(multiplicity), self._second.under(multiplicity)
        return {name: one[name] - other[name] for name in COMPARED}

    def needs(self) -> Mapping[str, Sequence[Need]]:
        """name -> what it needs."""
        one, other = self._first.needs(), self._second.needs()
        return {name: [*one[name], *other[name]] for name in COMPARED}


def differences(
    parts: tuple[Detection, Detection],
    scores: tuple[Floats, Floats],
    positives: Bools,
    groups: Ints,
    bootstrap: Bootstrap,
    group: str,
) -> dict[str, Any]:
    """Each figure of COMPARED, first less second, with its interval; and `delong` where both kinds are
    there."""
    found = estimate([Difference(*parts)], groups, bootstrap, group)
    if positives.any() and not positives.all():
        found["delong"] = delong(*scores, positives, bootstrap.confidence)
    return found


def delong(first: Floats, second: Floats, positives: Bools, confidence: float = 0.95) -> dict[str, Any]:
    """The difference of two correlated ROC-AUCs (DeLong, DeLong & Clarke-Pearson 1988).

    It takes images for independent; where patients have several, the bootstrap over patients is the one to
    trust.

    Args:
        first, second: (n,) scores of the same images.
        positives: (n,) both kinds must be there.

    Returns:
        `roc_auc` of both, their standard errors `se`, the `difference` with its interval, `z` and two-sided
        `p`; these are None where the variance is 0 or, with a single image of a kind, has no estimate.
    """
    places = [placements(scores, positives) for scores in (first, second)]
    areas = [float(of.mean()) for of, _ in places]
    covariance = np.zeros((2, 2))
    for side in zip(*places, strict=True):  # of the positives, of the negatives
        count = len(side[0])
        covariance += np.cov(np.stack(side)) / count if count > 1 else np.nan
    difference = areas[0] - areas[1]
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    low = high = z = p = None
    if variance > 1e-16:
        normal, error = NormalDist(), variance**0.5
        margin = normal.inv_cdf((1 + confidence) / 2) * error
        low, high, z = difference - margin, difference + margin, difference / error
        p = 2 * normal.cdf(-abs(z))
    errors = [None if np.isnan(value) else float(value**0.5) for value in np.diag(covariance)]
    return {
        "roc_auc": areas,
        "se": errors,
        "difference": {"value": difference, "low": low, "high": high},
        "z": z,
        "p": p,
    }


def compare(first: Sequence[Path], second: Sequence[Path]) -> dict[str, Any]:
    """Two recipes on the test set that their runs have in common: each one's figures, and first less second.

    A recipe of several runs, such as seeds, is worth the mean of their figures. The intervals tell how far
    other patients would move it; `runs` has the ROC-AUC of every run, which tells how far other seeds would.

    Args:
        first, second: run folders of one recipe each. The settings of `evaluate` are the first one's.

    Raises:
        UserError: if a run is not finished, or their test sets are not of the same images, labels and
        patients.
    """
    experiment = read_config(first[0] / "config.yaml", of_run=True)
    settings, group = experiment.evaluate, group_name(experiment)
    bootstrap = Bootstrap(settings.bootstrap, settings.confidence, settings.seed)
    like, classifier = read_embeddings(first[0], "test"), load(first[0])
    groups, positives = like.group_codes(), like.labels == classifier.positive
    sides = [[_detection(run, like, first[0]) for run in runs] for runs in (first, second)]
    parts = [Mean([part for part, _ in side]) for side in sides]
    found = estimate([Difference(*parts)], groups, bootstrap, group)
    if len(first) == len(second) == 1 and positives.any() and not positives.all():
        found["delong"] = delong(sides[0][0][1], sides[1][0][1], positives, bootstrap.confidence)
    whole = np.ones((1, int(groups.max()) + 1))
    return {
        "runs": [
            {
                str(run): float(part.under(whole)["roc_auc"][0])
                for run, (part, _) in zip(runs, side, strict=True)
            }
            for runs, side in zip((first, second), sides, strict=True)
        ],
        "positive": classifier.classes[classifier.positive],
        "group": group,
        "images": len(positives),
        "groups": int(groups.max()) + 1,
        "confidence": bootstrap.confidence,
        "first": estimate([parts[0]], groups, bootstrap, group),
        "second": estimate([parts[1]], groups, bootstrap, group),
        "difference": found,
    }


def _detection(run: Path, like: Embeddings, first: Path) -> tuple[Detection, Floats]:
    """A run on the test images in the order of another's, and its scores (n,) of them."""
    test, classifier = read_embeddings(run, "test"), load(run)
    order = _paired(like, test, (first, run))
    scores = classifier.probabilities(test.vectors, test.metadata)[order, classifier.positive]
    positives = like.labels == classifier.positive
    name = classifier.classes[classifier.positive]
    return Detection(scores, positives, like.group_codes(), threshold=classifier.threshold, name=name), scores


def said(results: Mapping[str, Any]) -> list[str]:
    """A comparison as lines to print."""
    size = f"{results['images']:,} images of {results['groups']:,} {results['group']}s"
    lines = [
        *(f"{side}  {run}" for side, runs in zip("AB", results["runs"], strict=True) for run in runs),
        f"the same {size}; [{results['confidence']:.0%} interval over {results['group']}s]",
        f"  {'':<14}{'A':<24}{'B':<24}A - B",
    ]
    for name in COMPARED:
        cells = [interval(results[which], name) for which in ("first", "second", "difference")]
        lines.append(f"  {name:<14}{cells[0]:<24}{cells[1]:<24}{cells[2]}")
    for side, runs in zip("AB", results["runs"], strict=True):
        if len(runs) > 1:
            values = np.array(list(runs.values()))
            each = ", ".join(f"{value:.3f}" for value in values)
            lines.append(f"  {side}: mean of {len(runs)} runs, ROC-AUC {each}, sd {values.std(ddof=1):.3f}")
    if "delong" in results["difference"]:
        lines += [
            "",
            f"  DeLong, which takes images for independent: {delong_said(results['difference']['delong'])}",
        ]
    return lines


def delong_said(found: Mapping[str, Any]) -> str:
    """`A - B 0.012 [-0.003, 0.027], z 1.57, p 0.12`."""
    of = found["difference"]
    if found["z"] is None:
        return f"ROC-AUCs differ by {of['value']:.3f}; their variance has no estimate"
    return (
        f"A - B {of['value']:.3f} [{of['low']:.3f}, {of['high']:.3f}], z {found['z']:.2f}, p {found['p']:.2g}"
    )


def group_name(experiment: Experiment) -> str:
    """What a group is, such as `patient`."""
    return experiment.pack.group_column.removesuffix("_id").replace("_", " ")


def interval(split: Mapping[str, Any], name: str) -> str:
    """`0.912 [0.880, 0.940]`, or why there is no interval, or why the figure is undefined."""
    if name in split["undefined"]:
        return f"undefined: {split['undefined'][name]}"
    figure = split[name]
    if f"{name}.interval" in split["undefined"]:
        return f"{figure['value']:.3f}, no interval: {split['undefined'][f'{name}.interval']}"
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"


def _paired(one: Embeddings, other: Embeddings, runs: tuple[Path, Path]) -> Ints:
    """Rows of `other` in the order of `one`."""
    place = {key: row for row, key in enumerate(other.keys)}
    lacking = [key for key in one.keys if key not in place]
    if lacking or len(place) != len(one.keys):
        raise UserError(
            f"{runs[0]} and {runs[1]} have other test sets ({len(one.keys):,} and {len(place):,} images, "
            f"{len(one.keys) - len(lacking):,} in both), so nothing can be paired; compare runs of one "
            "shard set"
        )
    order = np.array([place[key] for key in one.keys])
    names = {its.meta["classes"][its.meta["positive"]] for its in (one, other)}
    kinds = [its.labels == its.meta["positive"] for its in (one, other)]
    if len(names) > 1 or not np.array_equal(kinds[0], kinds[1][order]):
        raise UserError(
            f"{runs[0]} and {runs[1]}: the same images have other labels; compare runs of one labelling"
        )
    if one.groups != [other.groups[row] for row in order]:
        raise UserError(
            f"{runs[0]} and {runs[1]}: the same images have other groups; compare runs of one grouping"
        )
    return order
