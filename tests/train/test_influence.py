"""How sure a figure is: against slow loops, and against a bootstrap over groups."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from train.influence import Floats, of_auc, of_mean, over_groups, standard_error

COUNT, GROUPS = 300, np.arange(300) // 3
LABELS = (np.arange(COUNT) // 3 % 4 == 0).astype(int)  # whole groups, as lesions are


def drawn(seed: int, apart: float) -> Floats:
    """Scores (300,) that a group's three samples share a good part of."""
    random = np.random.default_rng(seed)
    return np.repeat(random.normal(size=100), 3) + 0.5 * random.normal(size=COUNT) + apart * LABELS


def bootstrap(figure: Callable[[Floats, np.ndarray], float], *several: Floats) -> float:
    """Standard deviation of a figure's, or of a difference's, draws of groups."""
    rows, values = np.arange(COUNT).reshape(-1, 3), []
    for picked in np.random.default_rng(9).integers(100, size=(1500, 100)):
        own = rows[picked].ravel()
        found = [figure(its[own], LABELS[own]) for its in several]
        values.append(found[0] - found[-1] if len(found) > 1 else found[0])
    return float(np.std(values))


def auc(scores: Floats, labels: np.ndarray) -> float:
    """By the ranks' sum (Mann & Whitney 1947): a tenth of scikit-learn's time."""
    own, count = rankdata(scores)[labels == 1], len(labels)
    return float((own.mean() - (len(own) + 1) / 2) / (count - len(own)))


def mean(values: Floats, labels: np.ndarray) -> float:
    return float(np.mean([np.nanmean(values[labels == label]) for label in (0, 1)]))


def test_an_auc_is_the_mean_of_the_shares_that_each_sample_is_ranked_right_against() -> None:
    scores, positives = np.array([0.1, 0.4, 0.4, 0.9, 0.4, 0.2]), np.array([0, 0, 1, 1, 0, 1], bool)
    right = np.array(
        [
            np.mean(
                [(s > o) + 0.5 * (s == o) if p else (s < o) + 0.5 * (s == o) for o in scores[positives != p]]
            )
            for s, p in zip(scores, positives, strict=True)
        ]
    )
    assert (
        right[positives].mean() == right[~positives].mean() == pytest.approx(roc_auc_score(positives, scores))
    )
    assert auc(scores, positives) == pytest.approx(roc_auc_score(positives, scores))
    np.testing.assert_allclose(of_auc(scores, positives), (right - right[positives].mean()) / 3)


def test_an_auc_is_as_sure_as_a_bootstrap_over_groups_finds() -> None:
    first, second = drawn(1, 1.5), drawn(1, 1.5) + 0.3 * drawn(2, 1.0)
    parts = [over_groups(of_auc(scores, LABELS == 1), GROUPS) for scores in (first, second)]
    assert standard_error(parts[0]) == pytest.approx(bootstrap(auc, first), rel=0.05)
    assert standard_error(parts[0] - parts[1]) == pytest.approx(bootstrap(auc, first, second), rel=0.05)
    assert standard_error(parts[0] - parts[1]) < 0.5 * standard_error(parts[0])
    assert standard_error(of_auc(first, LABELS == 1)) < 0.7 * standard_error(parts[0])  # as if all were apart


def test_a_mean_is_as_sure_as_a_bootstrap_over_groups_finds() -> None:
    values = drawn(3, 1.0)
    values[::50] = np.nan
    parts = over_groups(of_mean(values, LABELS), GROUPS)
    assert standard_error(parts) == pytest.approx(bootstrap(mean, values), rel=0.05)


def test_a_class_without_a_value_has_no_part() -> None:
    values = np.where(LABELS, np.nan, drawn(4, 0))
    parts = of_mean(values, LABELS)
    assert not parts[LABELS == 1].any()
    assert standard_error(parts) == pytest.approx(np.nanstd(values) / np.sqrt((LABELS == 0).sum()))
