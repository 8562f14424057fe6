"""Two models on the same images: the paired bootstrap over patients, and DeLong's test."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.load import load as read_config
from configs.schema import Experiment
from eval.figures import Detection, Need, estimate
from eval.metrics import Bools, Bootstrap, Floats, Ints
from train.classifier import Classifier, load
from train.embeddings import Embeddings, read_embeddings

COMPARED = ("roc_auc", "pr_auc", "partial_auc", "sensitivity", "specificity", "brier")


class Difference:
    """First less second, of some figures, on the same images under the same draws."""

    def __init__(self, first: Detection, second: Detection) -> None:
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
    places = [_placements(scores, positives) for scores in (first, second)]
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


def _placements(scores: Floats, positives: Bools) -> tuple[Floats, Floats]:
    """Share of negatives below each positive, of positives above each negative; a tie counts half."""
    of, others = np.sort(scores[positives]), np.sort(scores[~positives])

    def below(values: Floats, at: Floats) -> Floats:
        both = np.searchsorted(values, at, side="left") + np.searchsorted(values, at, side="right")
        return np.asarray(both / (2 * len(values)))

    return below(others, scores[positives]), 1 - below(of, scores[~positives])


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Two runs on the test set that they have in common: each one's figures, and the first less the second.

    The settings of `evaluate` are the first run's.

    Raises:
        UserError: if a run is not finished, or their test sets are not of the same images, labels and
        patients.
    """
    experiment = read_config(first / "config.yaml")
    settings, group = experiment.evaluate, group_name(experiment)
    bootstrap = Bootstrap(settings.bootstrap, settings.confidence, settings.seed)
    one, other = (read_embeddings(run, "test") for run in (first, second))
    order = _paired(one, other, (first, second))
    groups, labels = one.group_codes(), one.labels
    classifiers = [load(run) for run in (first, second)]
    positive = classifiers[0].positive
    scores = (_scores(classifiers[0], one), _scores(classifiers[1], other)[order])
    one_part, other_part = (
        Detection(its, labels == positive, groups, threshold=c.threshold, name=c.classes[c.positive])
        for its, c in zip(scores, classifiers, strict=True)
    )
    return {
        "runs": [str(first), str(second)],
        "positive": classifiers[0].classes[positive],
        "group": group,
        "images": len(labels),
        "groups": int(groups.max()) + 1,
        "confidence": bootstrap.confidence,
        "first": estimate([one_part], groups, bootstrap, group),
        "second": estimate([other_part], groups, bootstrap, group),
        "difference": differences(
            (one_part, other_part), scores, labels == positive, groups, bootstrap, group
        ),
    }


def said(results: Mapping[str, Any]) -> list[str]:
    """A comparison as lines to print."""
    first, second = results["runs"]
    size = f"{results['images']:,} images of {results['groups']:,} {results['group']}s"
    lines = [
        f"A  {first}",
        f"B  {second}",
        f"the same {size}; [{results['confidence']:.0%} interval over {results['group']}s]",
        f"  {'':<14}{'A':<24}{'B':<24}A - B",
    ]
    for name in COMPARED:
        cells = [interval(results[which], name) for which in ("first", "second", "difference")]
        lines.append(f"  {name:<14}{cells[0]:<24}{cells[1]:<24}{cells[2]}")
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


def _scores(classifier: Classifier, test: Embeddings) -> Floats:
    return classifier.probabilities(test.vectors, test.metadata)[:, classifier.positive]


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
