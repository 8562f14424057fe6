"""Cross-validation by patient: chooses hyper-parameters, and says what the choice is worth, honestly.

    folds        0  1  2  3  4          of train + val; test is never here
    candidates   fitted without i, judged on i             for each fold i: what chooses
    nested       fitted without i and j, judged on j       for each pair: what would have chosen, had i been
    unseen

The figure reported for a choice is nested: on each fold, that of the candidate that the other folds alone
would have chosen. (Varma & Simon 2006, "Bias in error estimation when using cross-validation for model
selection".)

It is honest about the classifier alone: the encoder has learned from train's labels, so all candidates stand
higher than they will on test. It compares them; what to expect is the test split's to say.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from train.calibration import softmax
from train.families import Family, Samples
from train.perceptron import Floats, Ints

Bools = NDArray[np.bool_]

LEAST = 4
"""Folds at least: with two left out, there must be one to learn from and one to stop early by."""
FIGURES = ("roc_auc", "pr_auc")
LIMIT = np.iinfo(np.int32).max  # of scikit-learn's seeds


@dataclass(frozen=True)
class Outcome:
    """What cross-validation says of one family's candidates, or of several families'."""

    chosen: int
    """Candidate of the highest mean ROC-AUC over the folds; the first of equals."""
    candidates: Floats
    """(candidates, folds, figures) each judged on the fold that it did not see."""
    nested: Floats
    """(folds, figures) of the choice."""


def assign(labels: Ints, groups: Ints, positive: int, folds: int, seed: int) -> Ints | None:
    """Fold (n,) of each sample: whole groups in one, classes spread evenly, both kinds in every fold.

    There are fewer folds than asked for where too few groups have the positive class, or another; None where
    they do not suffice for LEAST.
    """
    positives = labels == positive
    most = min(folds, *(len(np.unique(groups[positives == kind])) for kind in (True, False)))
    for count in range(most, LEAST - 1, -1):
        splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed % LIMIT)
        fold = np.empty(len(labels), np.int64)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            for number, (_, rows) in enumerate(splitter.split(labels, labels, groups)):
                fold[rows] = number
        if len(np.unique(2 * fold + positives)) == 2 * count:
            return fold
    return None


def cross_validate(
    families: Sequence[Family],
    samples: Samples,
    fold: Ints,
    positive: int,
    *,
    across: bool,
    done: Callable[[], object],
) -> dict[str, Outcome]:
    """Judge every candidate of every family.

    Args:
        samples: those that the families learn from; n of them.
        fold: (n,) fold of each, from 0; LEAST or more.
        positive: the class that ROC-AUC and PR-AUC are about.
        across: choose among families too, as `best`.
        done: called after each family.
    """
    folds = int(fold.max()) + 1
    parts = [np.flatnonzero(fold == number) for number in range(folds)]

    def judge(family: Family, left_out: Sequence[int]) -> Floats:
        """(candidates, left out, figures)."""
        return np.array(
            [
                [
                    _figures(logits, samples.labels[parts[number]] == positive, positive)
                    for number, logits in zip(left_out, candidate, strict=True)
                ]
                for candidate in family.unseen(samples, parts, left_out)
            ]
        )

    outer, inner = {}, {}
    for family in families:
        outer[family.name] = np.concatenate([judge(family, [i]) for i in range(folds)], axis=1)
        inner[family.name] = np.full((len(family.grid), folds, folds), np.nan)
        if across or len(family.grid) > 1:  # else there is nothing to choose, so nothing to nest
            for i, j in itertools.combinations(range(folds), 2):
                of_i, of_j = judge(family, [i, j])[..., 0].T
                inner[family.name][:, i, j], inner[family.name][:, j, i] = of_j, of_i
        done()
    outcomes = {family.name: _choose(outer[family.name], inner[family.name]) for family in families}
    if across:
        outcomes["best"] = _choose(np.concatenate(list(outer.values())), np.concatenate(list(inner.values())))
    return outcomes


def _choose(outer: Floats, inner: Floats) -> Outcome:
    """outer (candidates, folds, figures), inner (candidates, i, j): without i and j, on j; nan for i = j."""
    chosen = int(outer[..., 0].mean(axis=1).argmax())
    if len(outer) == 1:
        return Outcome(chosen, outer, outer[0])
    without = np.nanmean(inner, axis=2).argmax(axis=0)  # (folds,) what the others would have chosen
    return Outcome(chosen, outer, outer[without, np.arange(outer.shape[1])])


def _figures(logits: Floats, positives: Bools, positive: int) -> tuple[float, float]:
    scores = softmax(logits)[:, positive]
    return float(roc_auc_score(positives, scores)), float(average_precision_score(positives, scores))
