"""What each validation sample contributes to a figure: how sure is it that one epoch is better than another?

A figure's influence (n,) says by how much each sample moves it. Summed over a group (a lesion, a patient),
whose images go together, its squares add up to the figure's variance. Influences of two figures of the same
samples may be subtracted: the difference of two epochs is known much better than either figure is. For an AUC
this is DeLong's variance (Biometrics 44:837, 1988), over groups Obuchowski's (Biometrics 53:567, 1997), but
for their factors n / (n - 1), and a single positive adds nothing to it. A mean over queries takes the others,
which they are searched among, as given: of MAP@R and the triplet loss the true error is about twice as large.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def placements(scores: NDArray[np.floating], positives: Bools) -> tuple[Floats, Floats]:
    """Share of negatives below each positive, of positives above each negative; a tie counts half."""
    of, others = np.sort(scores[positives]), np.sort(scores[~positives])

    def below(values: NDArray[np.floating], at: NDArray[np.floating]) -> Floats:
        both = np.searchsorted(values, at, side="left") + np.searchsorted(values, at, side="right")
        return np.asarray(both / (2 * len(values)))

    return below(others, scores[positives]), 1 - below(of, scores[~positives])


def of_auc(scores: NDArray[np.floating], positives: Bools) -> Floats:
    """Influence (n,) on the ROC-AUC of scores (n,), by the sample's placement."""
    right = np.empty(len(scores))
    right[positives], right[~positives] = placements(scores, positives)
    return _centred(right, positives)


def of_mean(values: Floats, labels: NDArray[np.int64]) -> Floats:
    """Influence (n,) on the mean of values (n,) where every class counts the same; NaN has none."""
    return _centred(values, labels) / len(np.unique(labels[~np.isnan(values)]))


def over_groups(influence: Floats, groups: NDArray[np.int64]) -> Floats:
    """Sum over each group (groups,); its length is the standard error of the figure."""
    _, codes = np.unique(groups, return_inverse=True)
    return np.asarray(np.bincount(codes, weights=influence), np.float64)


def standard_error(parts: Floats) -> float:
    """Of a figure, or of a difference, from what its groups contribute (groups,)."""
    return float(np.linalg.norm(parts))


def _centred(values: Floats, classes: NDArray[np.generic]) -> Floats:
    parts = np.zeros(len(values))
    for label in np.unique(classes):
        own = (classes == label) & ~np.isnan(values)
        parts[own] = (values[own] - values[own].mean()) / own.sum() if own.any() else 0
    return parts
