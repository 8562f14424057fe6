"""Figures equal scikit-learn's, and their intervals equal a loop that really copies the patients."""

import numpy as np
import pytest
from sklearn import metrics as oracle

from eval.figures import figures
from eval.metrics import Bootstrap, Curve, Ranking, confusion_matrix, decide, reliability, roc_band

CLASSES = ["benign", "melanoma"]
SENSITIVITY, SPECIFICITY = "sensitivity_at_specificity", "specificity_at_sensitivity"
FEW = Bootstrap(draws=200, confidence=0.95, seed=0)


def case(seed, n=120, patients=15, classes=2, ties=True):
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(n, classes))
    labels = draw.integers(0, classes, n)
    logits[np.arange(n), labels] += 1
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if ties:
        probabilities = np.round(probabilities, 1)
    groups = np.append(np.arange(patients), draw.integers(0, patients, n - patients))
    return probabilities, labels, groups


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("ties", [True, False])
def test_areas_equal_scikit_learn_with_and_without_weights(seed, ties):
    probabilities, labels, _ = case(seed, ties=ties)
    scores, positives = probabilities[:, 1], labels == 1
    weights = np.stack([np.ones(len(labels)), np.random.default_rng(seed).integers(0, 4, len(labels))])
    points = Curve(scores, positives, np.arange(len(labels)), len(labels)).under(weights)
    for row, w in enumerate(weights):
        assert points.roc_auc()[row] == pytest.approx(
            oracle.roc_auc_score(positives, scores, sample_weight=w)
        )
        expected = oracle.average_precision_score(positives, scores, sample_weight=w)
        assert points.average_precision()[row] == pytest.approx(expected)


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (2, 1), (3, 2), (5, 3)])
def test_every_value_equals_scikit_learn(classes, seed):
    probabilities, labels, groups = case(seed, classes=classes, ties=False)
    names, positive, threshold = [f"c{i}" for i in range(classes)], classes - 1, 0.37
    found = figures(
        probabilities, labels, groups, classes=names, positive=positive, threshold=threshold, bootstrap=FEW
    )
    scores, positives = probabilities[:, positive], labels == positive
    flagged = scores >= threshold
    called = np.where(flagged, positive, probabilities[:, :positive].argmax(axis=1))
    expected = {
        "roc_auc": oracle.roc_auc_score(positives, scores),
        "pr_auc": oracle.average_precision_score(positives, scores),
        "accuracy": oracle.accuracy_score(labels, called),
        "balanced_accuracy": oracle.balanced_accuracy_score(labels, called),
        "sensitivity": oracle.recall_score(positives, flagged),
        "specificity": oracle.recall_score(~positives, ~flagged),
        "brier": oracle.brier_score_loss(positives, scores),
    }
    columns = oracle.precision_recall_fscore_support(labels, called, labels=range(classes), zero_division=0)
    for kind, column in zip(("precision", "recall", "f1"), columns, strict=False):
        expected |= {f"{kind}.{name}": value for name, value in zip(names, column, strict=True)}
    values = {name: figure["value"] for name, figure in found.items() if name in expected}
    assert values == pytest.approx(expected)
    assert found["confusion_matrix"] == oracle.confusion_matrix(labels, called).tolist()
    assert found["class_counts"] == dict(zip(names, np.bincount(labels).tolist(), strict=True))
    assert (found["images"], found["groups"]) == (120, 15)
    assert found["sensitivity"] == found[f"recall.c{positive}"]


def test_intervals_equal_a_loop_that_copies_whole_patients(monkeypatch):
    probabilities, labels, groups = case(4)
    monkeypatch.setattr("eval.metrics.CELLS", 1000)  # several chunks
    found = figures(probabilities, labels, groups, classes=CLASSES, positive=1, threshold=0.4, bootstrap=FEW)
    slow = {"roc_auc": [], "pr_auc": [], "accuracy": [], "f1.melanoma": [], "brier": []}
    draws = np.concatenate(list(FEW.resamples(groups)))[1:]
    assert draws.shape == (200, 15) and (draws.sum(axis=1) == 15).all()
    for times in draws.astype(int):
        rows = np.concatenate([np.tile(np.flatnonzero(groups == g), t) for g, t in enumerate(times)])
        p, y = probabilities[rows, 1], labels[rows]
        slow["roc_auc"].append(oracle.roc_auc_score(y, p))
        slow["pr_auc"].append(oracle.average_precision_score(y, p))
        slow["accuracy"].append(((p >= 0.4) == y).mean())
        slow["f1.melanoma"].append(oracle.f1_score(y, p >= 0.4))
        slow["brier"].append(((p - y) ** 2).mean())
    for name, values in slow.items():
        low, high = np.quantile(values, [0.025, 0.975])
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((low, high)), name


def test_draws_do_not_depend_on_the_chunk_and_follow_the_seed(monkeypatch):
    groups = np.arange(50)
    whole = np.concatenate(list(FEW.resamples(groups)))
    monkeypatch.setattr("eval.metrics.CELLS", 350)
    assert np.array_equal(whole, np.concatenate(list(FEW.resamples(groups))))
    other = Bootstrap(draws=200, confidence=0.95, seed=1)
    assert not np.array_equal(whole, np.concatenate(list(other.resamples(groups))))


def correlated(seed, patients=40, each=10):
    """Accuracy 0.7 by patient: all images of a patient are called alike, so 40 facts look like 400."""
    draw = np.random.default_rng(seed)
    groups = np.repeat(np.arange(patients), each)
    right = np.repeat(draw.random(patients) < 0.7, each)
    labels = np.tile([0, 1], patients * each // 2)
    scores = np.where(right == (labels == 1), 0.9, 0.1)
    return np.stack([1 - scores, scores], axis=1), labels, groups


def accuracy(seed, clustered=True):
    probabilities, labels, groups = correlated(seed)
    groups = groups if clustered else np.arange(len(labels))
    found = figures(probabilities, labels, groups, classes=CLASSES, positive=1, threshold=0.5, bootstrap=FEW)
    return found["accuracy"]


def test_correlated_patients_widen_the_interval():
    whole, naive = accuracy(0), accuracy(0, clustered=False)
    assert whole["value"] == naive["value"]
    ratio = (whole["high"] - whole["low"]) / (naive["high"] - naive["low"])
    assert ratio == pytest.approx(np.sqrt(10), rel=0.25)  # 10 images each, all alike


def test_clustered_intervals_cover_the_truth_and_naive_ones_do_not():
    def cover(clustered):
        found = [accuracy(seed, clustered) for seed in range(100)]
        return np.mean([f["low"] <= 0.7 <= f["high"] for f in found])

    assert cover(clustered=True) > 0.88
    assert cover(clustered=False) < 0.6


def test_what_is_undefined_is_left_out_with_its_reason():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    found = figures(
        probabilities,
        np.zeros(3, int),
        np.arange(3),
        classes=CLASSES,
        positive=1,
        threshold=0.5,
        bootstrap=FEW,
    )
    assert found["undefined"]["roc_auc"] == "no group with images of melanoma"
    assert found["undefined"]["precision.melanoma"] == "no group with images called melanoma"
    assert found["specificity"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert not {"roc_auc", "pr_auc", "sensitivity", "balanced_accuracy", "recall.melanoma"} & found.keys()


def test_draws_without_a_class_are_left_out_and_counted():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]])
    labels, groups = np.array([0, 1, 0, 1]), np.arange(4)
    found = figures(probabilities, labels, groups, classes=CLASSES, positive=1, threshold=0.5, bootstrap=FEW)
    draws = np.concatenate(list(FEW.resamples(groups)))[1:]
    positives = draws[:, 1] + draws[:, 3]
    one_class = int(((positives == 0) | (positives == 4)).sum())
    assert 0 < one_class < 200 and found["undefined_draws"]["roc_auc"] == one_class
    assert found["roc_auc"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_one_group_makes_no_interval():
    """Three patients, one with all melanomas: what rests on that one has a value and no interval."""
    scores = np.array([0.1, 0.6, 0.2, 0.3, 0.8, 0.4])
    labels, groups = np.array([0, 0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 2, 2])
    probabilities = np.stack([1 - scores, scores], axis=1)
    settings = {"classes": CLASSES, "positive": 1, "threshold": 0.5, "bootstrap": FEW, "group": "patient"}
    found = figures(probabilities, labels, groups, **settings)
    lone = {name.removesuffix(".interval") for name in found["undefined"]}
    fixed = [f"{name}_0.{at}" for name in (SENSITIVITY, SPECIFICITY) for at in ("8", "9", "95")]
    assert lone == {
        *("roc_auc", "pr_auc", "partial_auc", "sensitivity", "flagged_per_found", *fixed),
        *("balanced_accuracy", "recall.melanoma"),
    }
    for name in lone:
        assert found[name]["low"] is found[name]["high"] is None and found[name]["value"] > 0
        assert found["undefined"][f"{name}.interval"] == "one patient with images of melanoma"
    for name in ("accuracy", "specificity", "f1.melanoma", "precision.melanoma", "brier"):
        assert found[name]["low"] < found[name]["high"]
    assert not lone & found["undefined_draws"].keys()

    mirrored = figures(probabilities[:, ::-1], 1 - labels, groups, **settings)
    assert mirrored["undefined"]["roc_auc.interval"] == "one patient with images that are not melanoma"
    assert mirrored["undefined"]["specificity.interval"] == "one patient with images that are not melanoma"

    alone = figures(probabilities, labels, np.zeros(6, int), **settings)
    assert alone["accuracy"] == {"value": pytest.approx(4 / 6), "low": None, "high": None}
    assert set(alone["undefined"].values()) == {"one patient"} and not alone["undefined_draws"]


def test_decisions():
    two = np.array([[0.6, 0.4], [0.61, 0.39], [0.1, 0.9]])
    assert decide(two, 1, 0.4).tolist() == [1, 0, 1]
    assert decide(two, 0, 0.61).tolist() == [1, 0, 1]
    three = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.1, 0.6, 0.3]])
    assert decide(three, 1, 0.3).tolist() == [1, 2, 1]
    assert decide(three, 1, 0.7).tolist() == [0, 2, 2]
    assert confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist() == [[1, 1], [0, 1]]


def test_roc_band_holds_the_curve():
    probabilities, labels, groups = case(0, n=400, ties=False)
    ranking = Ranking(probabilities[:, 1], labels == 1, groups)
    grid, low, high = roc_band(ranking, groups, FEW)
    x, y, _ = oracle.roc_curve(labels, probabilities[:, 1], drop_intermediate=False)
    curve = np.interp(grid, x, y)
    assert ((low - 1e-9 <= curve) & (curve <= high + 1e-9)).mean() > 0.97
    assert (np.diff(low) >= -1e-9).all() and (np.diff(high) >= -1e-9).all() and high[-1] == low[-1] == 1


def test_reliability_counts_what_each_bin_holds():
    scores = np.repeat([0.1, 0.5, 0.9], 20)
    positives = np.concatenate([np.arange(20) < k for k in (2, 10, 18)])
    mean, share, low, high = reliability(scores, positives, np.arange(60), FEW, bins=3)
    assert mean == pytest.approx([0.1, 0.5, 0.9]) and share == pytest.approx([0.1, 0.5, 0.9])
    assert (low <= share).all() and (share <= high).all() and (low < high).all()
    groups = np.append(np.zeros(20, int), np.arange(1, 41))  # one group fills the first bin
    _, share, low, high = reliability(scores, positives, groups, FEW, bins=3)
    assert share[0] == 0.1 and np.isnan(low).tolist() == np.isnan(high).tolist() == [True, False, False]
