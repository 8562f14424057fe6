"""Each figure equals its definition written as a slow loop, or a published value; so does the bootstrap of
it."""

import numpy as np
import pytest
from sklearn import metrics as oracle

from eval.compare import Difference, delong
from eval.curves import ACTED_ON, decision_curve, reliability_rows
from eval.figures import Calls, Detection, Means, estimate, figures
from eval.metrics import Bootstrap, Curve
from eval.patients import by_patient, ugly_duckling

FEW = Bootstrap(draws=100, confidence=0.95, seed=0)


def case(seed, n=150, patients=20, ties=True, rare=False):
    draw = np.random.default_rng(seed)
    positives = draw.random(n) < (0.1 if rare else 0.4)
    positives[:2] = True, False
    scores = 1 / (1 + np.exp(-draw.normal(size=n) - positives))
    if ties:
        scores = np.round(scores, 1)
    groups = np.append(np.arange(patients), draw.integers(0, patients, n - patients))
    return scores, positives, groups


def points(scores, positives, weights=None):
    weights = np.ones((1, len(scores))) if weights is None else weights
    return Curve(scores, positives, np.arange(len(scores)), len(scores)).under(weights)


def isic_2024(labels, scores, least=0.8):
    """The metric as the challenge defined it: flip both, area up to 1 - least, undo scikit-learn's
    scaling."""
    area = 1 - least
    scaled = oracle.roc_auc_score(1 - labels, -scores, max_fpr=area)
    return area**2 / 2 + (area - area**2 / 2) * (scaled - 0.5) / 0.5


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ties", [True, False])
def test_partial_auc_is_that_of_isic_2024(seed, ties):
    scores, positives, _ = case(seed, ties=ties, rare=seed % 2 == 0)
    expected = isic_2024(positives.astype(int), scores)
    assert points(scores, positives).partial_auc(0.8)[0] == pytest.approx(expected)
    assert points(scores, positives).partial_auc(0.0)[0] == pytest.approx(
        oracle.roc_auc_score(positives, scores)
    )
    perfect = points(positives.astype(float), positives).partial_auc(0.8)[0]
    assert perfect == pytest.approx(0.2)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ties", [True, False])
def test_a_resample_of_the_curve_is_the_curve_of_the_resample(seed, ties):
    scores, positives, groups = case(seed, ties=ties)
    multiplicity = np.concatenate(list(FEW.resamples(groups)))[:30]
    found = Curve(scores, positives, groups, 20).under(multiplicity)
    for row, times in enumerate(multiplicity.astype(int)):
        rows = np.repeat(np.arange(len(scores)), times[groups])
        s, y = scores[rows], positives[rows]
        if y.all() or not y.any():
            continue
        assert found.roc_auc()[row] == pytest.approx(oracle.roc_auc_score(y, s))
        assert found.average_precision()[row] == pytest.approx(oracle.average_precision_score(y, s))
        assert found.partial_auc(0.8)[row] == pytest.approx(isic_2024(y.astype(int), s))


@pytest.mark.parametrize("seed", range(8))
def test_fixed_points_equal_a_search_of_all_thresholds(seed):
    scores, positives, _ = case(seed)
    at = [np.inf, *np.unique(scores)]
    sensitivity = [(scores[positives] >= t).mean() for t in at]
    specificity = [(scores[~positives] < t).mean() for t in at]
    for wanted in (0.0, 0.5, 0.8, 0.9, 1.0):
        best = max(a for a, b in zip(sensitivity, specificity, strict=True) if b >= wanted - 1e-12)
        assert points(scores, positives).sensitivity_at(wanted)[0] == pytest.approx(best)
        best = max(b for a, b in zip(sensitivity, specificity, strict=True) if a >= wanted - 1e-12)
        if wanted > 0:  # a sensitivity of 0 needs no call at all, and no threshold of a positive
            assert points(scores, positives).specificity_at(wanted)[0] == pytest.approx(best)


def test_what_a_clinic_would_see_at_its_own_prevalence():
    """Sensitivity 90 %, specificity 85 % at 1.76 %: PPV 9.7 %, 10.3 flagged for each found."""
    positives = np.repeat([True, False], [20, 200])
    scores = np.concatenate([np.repeat([1.0, 0.0], [18, 2]), np.repeat([1.0, 0.0], [30, 170])])
    part = Detection(scores, positives, np.arange(220), threshold=0.5, prevalence=0.0176)
    found = {name: values[0] for name, values in part.under(np.ones((1, 220))).items()}
    assert (found["sensitivity"], found["specificity"]) == (0.9, 0.85)
    ppv = 0.9 * 0.0176 / (0.9 * 0.0176 + 0.15 * 0.9824)
    npv = 0.85 * 0.9824 / (0.85 * 0.9824 + 0.1 * 0.0176)
    assert (found["ppv"], found["npv"]) == pytest.approx((ppv, npv))
    assert found["flagged_per_found"] == pytest.approx(1 / ppv) and round(1 / ppv, 1) == 10.3
    own = Detection(scores, positives, np.arange(220), threshold=0.5).under(np.ones((1, 220)))
    assert own["ppv"][0] == pytest.approx(18 / 48) and own["npv"][0] == pytest.approx(170 / 172)
    assert own["prevalence"][0] == pytest.approx(20 / 220)


def test_calibration_error_by_hand():
    scores = np.repeat([0.1, 0.5, 0.9], 20)
    positives = np.concatenate([np.arange(20) < k for k in (2, 14, 18)])  # the middle third is 0.2 too low
    part = Detection(scores, positives, np.arange(60), threshold=0.5)
    assert part.under(np.ones((1, 60)))["calibration_error"][0] == pytest.approx(0.2 / 3)
    rows = reliability_rows(scores, positives, np.arange(60), FEW)
    assert [row["mean"] for row in rows] == pytest.approx([0.1, 0.5, 0.9])
    assert [row["share"]["value"] for row in rows] == pytest.approx([0.1, 0.7, 0.9])
    assert [row["images"] for row in rows] == [20, 20, 20]


@pytest.mark.parametrize("prevalence", [None, 0.02])
def test_net_benefit_equals_its_definition(prevalence):
    scores, positives, groups = case(3, ties=prevalence is None)
    found = decision_curve(scores, positives, groups, FEW, "patient", prevalence)
    assert [row["probability"] for row in found] == list(ACTED_ON)
    share = positives.mean() if prevalence is None else prevalence
    if prevalence is not None:
        odds = scores / (1 - scores) * share / (1 - share) / positives.mean() * (1 - positives.mean())
        scores = odds / (1 + odds)
    for row in found:
        p = row["probability"]
        for name, acted in (("model", scores >= p), ("all", np.ones(len(scores), bool))):
            hit, false = acted[positives].mean() * share, acted[~positives].mean() * (1 - share)
            assert row[name]["value"] == pytest.approx(hit - false * p / (1 - p))
            assert row[name]["low"] <= row[name]["value"] <= row[name]["high"]


def test_at_another_prevalence_a_calibrated_model_is_worth_as_much_as_where_it_is_used():
    """The same clinic seen twice: as it is, and with so many more positives, its probabilities to match."""
    draw = np.random.default_rng(0)
    risk = draw.beta(0.5, 8, 40_000)
    positives = draw.random(len(risk)) < risk
    enriched = np.concatenate([np.flatnonzero(positives).repeat(5), np.flatnonzero(~positives)])
    given = 5 * risk / (5 * risk + 1 - risk)
    there = decision_curve(risk, positives, np.arange(len(risk)) % 50, FEW, "patient")
    here = decision_curve(
        given[enriched], positives[enriched], enriched % 50, FEW, "patient", float(positives.mean())
    )
    for one, other in zip(there, here, strict=True):
        assert other["model"]["value"] == pytest.approx(one["model"]["value"], abs=2e-4)
        assert other["all"]["value"] == pytest.approx(one["all"]["value"])


def test_several_classes_have_their_own_and_mean_areas():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 4, 200)
    probabilities = draw.dirichlet(np.ones(4), 200) + np.eye(4)[labels] * 0.3
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    names = ["a", "b", "c", "d"]
    groups = np.append(np.arange(50), draw.integers(0, 50, 150))
    found = figures(
        probabilities,
        labels,
        groups,
        classes=names,
        positive=2,
        threshold=0.3,
        bootstrap=FEW,
        group="patient",
    )
    each = [oracle.roc_auc_score(labels == i, probabilities[:, i]) for i in range(4)]
    assert [found[f"roc_auc.{name}"]["value"] for name in names] == pytest.approx(each)
    assert found["roc_auc"]["value"] == pytest.approx(each[2])
    macro = oracle.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert found["macro_roc_auc"]["value"] == pytest.approx(macro)
    called = np.where(
        probabilities[:, 2] >= 0.3, 2, np.array([0, 1, 3])[np.delete(probabilities, 2, 1).argmax(1)]
    )
    report = oracle.classification_report(labels, called, output_dict=True)
    of = {"macro": ("macro_precision", "balanced_accuracy", "macro_f1")}
    of["weighted"] = ("weighted_precision", "accuracy", "weighted_f1")
    for mean, columns in of.items():
        expected = [report[f"{mean} avg"][column] for column in ("precision", "recall", "f1-score")]
        assert [found[column]["value"] for column in columns] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("labels", "called", "undefined"),
    [
        ([0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 0, 0], {"balanced_accuracy", "macro_precision", "macro_f1"}),
        ([0, 0, 1, 1, 0, 1], [0, 2, 1, 1, 0, 0], {"balanced_accuracy"}),  # called, but not there
        (
            [0, 0, 1, 2, 0, 1],
            [0, 1, 1, 1, 0, 0],
            {"macro_precision", "weighted_precision"},
        ),  # there, not called
    ],
)
def test_means_over_classes_leave_out_what_has_no_meaning(labels, called, undefined):
    report = oracle.classification_report(labels, called, labels=[0, 1, 2], output_dict=True, zero_division=0)
    calls = Calls(np.array(called), np.array(labels), np.arange(6), ["a", "b", "c"])
    found = {name: float(values[0]) for name, values in calls.under(np.ones((1, 6))).items()}
    expected = {
        "macro_precision": report["macro avg"]["precision"],
        "macro_f1": report["macro avg"]["f1-score"],
    }
    expected |= {"balanced_accuracy": report["macro avg"]["recall"]}
    expected |= {"weighted_precision": report["weighted avg"]["precision"]}
    expected |= {"weighted_f1": report["weighted avg"]["f1-score"]}
    assert {name for name in expected if np.isnan(found[name])} == undefined
    assert {name: found[name] for name in expected.keys() - undefined} == pytest.approx(
        {name: expected[name] for name in expected.keys() - undefined}
    )
    lacking = {name for name, needs in calls.needs().items() if any(not count for count, _ in needs)}
    assert lacking & expected.keys() == undefined


def test_patients_are_judged_by_their_worst_image():
    scores, positives, groups = case(5, rare=True)
    settings = {"bootstrap": FEW, "name": "melanoma", "group": "patient"}
    found = by_patient(scores, positives, groups, threshold=0.6, **settings)
    worst = np.array([scores[groups == g].max() for g in range(20)])
    has = np.array([positives[groups == g].any() for g in range(20)])
    assert found["roc_auc"]["value"] == pytest.approx(oracle.roc_auc_score(has, worst))
    assert found["sensitivity"]["value"] == pytest.approx((worst[has] >= 0.6).mean())
    assert (found["groups"], found["positive"]) == (20, has.sum())


def test_the_ugly_duckling_within_each_patient():
    # Patient 0: found first. 1: ties for first with one other. 2: second of three. 3: all of a kind.
    scores = np.array([0.9, 0.1, 0.5, 0.5, 0.2, 0.6, 0.7, 0.1, 0.3, 0.4])
    positives = np.array([1, 0, 1, 0, 0, 1, 0, 0, 0, 0], bool)
    groups = np.array([0, 0, 1, 1, 1, 2, 2, 2, 3, 3])
    found = ugly_duckling(scores, positives, groups, bootstrap=FEW, name="melanoma", group="patient")
    assert found["groups"] == 3
    assert found["top_1"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["top_1_by_chance"]["value"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 3) / 3)
    assert found["within_auc"]["value"] == pytest.approx((1 + 0.75 + 0.5) / 3)
    alone = ugly_duckling(scores, positives, np.arange(10), bootstrap=FEW, name="melanoma", group="lesion")
    assert alone["undefined"]["top_1"] == "no lesion with images both of melanoma and not"


def slow_delong(scores, positives):
    """Covariance (2, 2) by the definition: every pair of a positive and a negative."""
    psi = [np.sign(s[positives][:, None] - s[~positives]) / 2 + 0.5 for s in scores]
    v10, v01 = ([p.mean(axis=axis) for p in psi] for axis in (1, 0))
    areas = [p.mean() for p in psi]
    m, n = psi[0].shape
    covariance = np.empty((2, 2))
    for r in range(2):
        for s in range(2):
            s10 = sum((v10[r][i] - areas[r]) * (v10[s][i] - areas[s]) for i in range(m)) / (m - 1)
            s01 = sum((v01[r][j] - areas[r]) * (v01[s][j] - areas[s]) for j in range(n)) / (n - 1)
            covariance[r, s] = s10 / m + s01 / n
    return areas, covariance


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [True, False])
def test_delong_equals_its_definition(seed, ties):
    first, positives, _ = case(seed, n=60, ties=ties)
    second = np.round(first + np.random.default_rng(seed).normal(0, 0.3, 60), 1 if ties else 9)
    areas, covariance = slow_delong((first, second), positives)
    found = delong(first, second, positives)
    assert found["roc_auc"] == pytest.approx(areas)
    assert found["se"] == pytest.approx(np.sqrt(np.diag(covariance)))
    error = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    assert found["z"] == pytest.approx((areas[0] - areas[1]) / error)
    assert found["difference"]["high"] - found["difference"]["low"] == pytest.approx(2 * 1.959964 * error)
    same = delong(first, first, positives)
    assert same["difference"] == {"value": 0.0, "low": None, "high": None} and same["p"] is None


def test_delong_of_the_ct_images_of_hanley_and_mcneil():
    """109 CT images rated 1 to 5 (Hanley & McNeil 1982); Stata's manual gives 0.8932, DeLong se 0.0307."""
    normal, abnormal = (33, 6, 6, 11, 2), (3, 2, 2, 11, 33)
    scores = np.concatenate([np.repeat(np.arange(1.0, 6), counts) for counts in (normal, abnormal)])
    positives = np.repeat([False, True], [58, 51])
    found = delong(scores, -scores, positives)
    assert round(found["roc_auc"][0], 4) == 0.8932 and round(found["se"][0], 4) == 0.0307
    low, high = (found["roc_auc"][0] + sign * 1.959964 * found["se"][0] for sign in (-1, 1))
    assert (round(low, 4), round(high, 4)) == (0.8330, 0.9534)


OVARIAN = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0  1.6 5.6 5 1
3.8 5.7  5 1  3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 4 1  3.6 6.7 4 0
2.3 4.4  6 1  4.2 7.6 4 0  4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1  3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1
3.1 6.6  6 1  4.1 8.2 6 1  4.3 7.0 5 1  4.3 6.5 4 1  3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0
3.7 6.1  5 1  3.3 6.3 7 1  4.2 7.7 6 1  3.5 6.2 5 1  2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1
3.3 5.7  6 1  3.7 6.9 5 1  3.6 6.6 5 1"""
"""Albumin, total protein, K-G score and outcome of 43 patients (DeLong 1988)."""


@pytest.mark.parametrize(
    ("column", "area", "error", "apart", "p"),
    [
        (0, 0.7366, 0.0927, (0.0108, -0.1761, 0.1976), 0.9102),
        (1, 0.6478, 0.1000, (-0.0780, -0.2830, 0.1271), 0.4561),
    ],
)
def test_delong_of_the_patients_of_delong(column, area, error, apart, p):
    """Against the K-G score, as SAS has it: PROC LOGISTIC's "Comparing Receiver Operating Characteristic
    Curves"."""
    table = np.array(OVARIAN.split(), dtype=float).reshape(-1, 4)
    found = delong(table[:, column], 10 - table[:, 2], table[:, 3] == 1)
    assert [round(value, 4) for value in found["roc_auc"]] == [area, 0.7258]
    assert [round(value, 4) for value in found["se"]] == [error, 0.1028]
    assert tuple(round(found["difference"][end], 4) for end in ("value", "low", "high")) == apart
    assert round(found["p"], 4) == p


def test_the_difference_is_drawn_in_pairs():
    """The interval of a difference on the same draws is far narrower than two intervals would make it."""
    scores, positives, groups = case(1, n=600, patients=100, ties=False)
    near = scores + np.random.default_rng(0).normal(0, 0.01, len(scores))
    one, other = (Detection(s, positives, groups, threshold=0.5) for s in (scores, near))
    apart = estimate([Difference(one, other)], groups, FEW)["roc_auc"]
    alone = estimate([one], groups, FEW)["roc_auc"]
    assert apart["high"] - apart["low"] < 0.2 * (alone["high"] - alone["low"])
    draws = np.concatenate(list(FEW.resamples(groups)))[1:].astype(int)
    slow = []
    for times in draws:
        rows = np.repeat(np.arange(len(scores)), times[groups])
        slow.append(
            oracle.roc_auc_score(positives[rows], scores[rows])
            - oracle.roc_auc_score(positives[rows], near[rows])
        )
    assert (apart["low"], apart["high"]) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))
    zero = estimate([Difference(one, one)], groups, FEW)["roc_auc"]
    assert zero == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_means_leave_out_who_has_no_value():
    values, groups = np.array([1.0, np.nan, 0.0, 1.0]), np.array([0, 0, 1, 2])
    part = Means({"x": values}, groups, " with a value")
    assert part.under(np.array([[1.0, 1, 1], [2, 0, 0], [0, 0, 0]]))["x"] == pytest.approx(
        [2 / 3, 1, np.nan], nan_ok=True
    )
    assert part.needs() == {"x": [(3, " with a value")]}
