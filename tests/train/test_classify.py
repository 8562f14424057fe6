"""Models beside the MLP, the choice among them, seeds, ensembles, metadata: each held to an outside
oracle."""

import json

import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from configs.errors import UserError
from configs.judging import Classifier as Settings
from configs.schema import Experiment
from train.baselines import Linear, Means, Neighbours
from train.calibration import choose_threshold, softmax
from train.classifier import load
from train.classify import fit, summary
from train.crossvalidation import assign, cross_validate
from train.embeddings import Embeddings, read_embeddings, write_embeddings
from train.families import Family, NearestNeighbours, Samples, roles
from train.metadata import Inputs, read
from train.perceptron import Examples, class_weights, undersample

META = {"encoder_sha256": "e1", "shards_sha256": "s1", "classes": ["benign", "melanoma"], "positive": 1}
NONE = np.empty((0, 0), np.float32)


def case(seed, n=200, dim=6, classes=2, share=4):
    draw = np.random.default_rng(seed)
    labels = (np.arange(n) % share == 0).astype(np.int64) if classes == 2 else draw.integers(0, classes, n)
    vectors = draw.normal(size=(n, dim)).astype(np.float32)
    vectors[np.arange(n), labels] += 1.5
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors, labels


def column(values):
    return pa.chunked_array([pa.array(values)])


def write(run, split, n, seed, classes=2, metadata=None):
    vectors, labels = case(seed, n, classes=classes)
    groups = [f"{split}{i // 3}" for i in range(n)]
    meta = META if classes == 2 else {**META, "classes": [f"c{i}" for i in range(classes)]}
    keys = [f"{split}{i}" for i in range(n)]
    write_embeddings(
        run, split, Embeddings(np.arange(n), keys, groups, labels, vectors, meta, metadata or {})
    )


def experiment(run, **settings):
    settings = {"epochs": 15, "lr": 0.01, "hidden": (8,), "batch": 32, "seeds": 1, "folds": 0, **settings}
    return Experiment.model_validate({"run": {"folder": run}, "classifier": settings})


@pytest.fixture
def run(tmp_path):
    write(tmp_path, "train", 200, 0)
    write(tmp_path, "val", 80, 1)
    return tmp_path


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("weighted", [True, False])
def test_logistic_regression_is_that_of_scikit_learn(classes, weighted):
    vectors, labels = case(0, classes=classes)
    (model,) = Linear.fit(Examples(vectors, labels), classes, [0.05], weighted=weighted)
    scaler = StandardScaler().fit(vectors)
    oracle = LogisticRegression(C=1 / (0.05 * 200), class_weight="balanced" if weighted else None)
    oracle.fit(scaler.transform(vectors), labels)
    found = softmax(model.logits(vectors, np.empty((200, 0), np.float32)))
    assert found == pytest.approx(oracle.predict_proba(scaler.transform(vectors)), abs=1e-3)


def test_a_class_that_was_never_met_is_never_called():
    vectors, labels = case(0)
    (linear,) = Linear.fit(Examples(vectors, labels), 3, [0.1], weighted=True)
    for model in (linear, Means.fit(vectors, labels, 3)):
        assert softmax(model.logits(vectors, np.empty((200, 0), np.float32)))[:, 2].max() < 1e-6


def test_nearest_mean_calls_what_scikit_learn_calls():
    vectors, labels = case(0, classes=3)
    model = Means.fit(vectors, labels, 3)
    called = model.logits(vectors, NONE).argmax(axis=1)
    assert np.array_equal(called, NearestCentroid().fit(vectors, labels).predict(vectors))


def test_neighbours_vote_by_cosine():
    vectors, labels = case(0, classes=3)
    asked = case(1, n=20, classes=3)[0]
    found = softmax(Neighbours(vectors, labels, 7, 3).logits(asked, NONE))
    for row, vector in enumerate(asked):
        cosines = vectors.astype(float) @ vector
        nearest = np.argsort(-cosines)[:7]
        votes = np.exp(cosines[nearest] / 0.07)
        shares = np.array([votes[labels[nearest] == label].sum() for label in range(3)])
        expected = (shares + votes.mean() / 3) / (votes.sum() + votes.mean())
        assert found[row] == pytest.approx(expected, abs=1e-4)


def test_folds_keep_patients_whole_and_have_both_kinds():
    draw = np.random.default_rng(0)
    groups = draw.integers(0, 40, 300)
    labels = (draw.random(40) < 0.3).astype(int)[groups]
    fold = assign(labels, groups, 1, 5, seed=0)
    assert fold is not None and set(fold) == set(range(5))
    assert all(len(set(fold[groups == group])) == 1 for group in range(40))
    assert all(len(set(labels[fold == number])) == 2 for number in range(5))
    few = np.where(groups < 4, 1, 0)  # four patients have it all: four folds
    assert assign(few, groups, 1, 5, seed=0).max() == 3
    assert assign(np.where(groups < 3, 1, 0), groups, 1, 5, seed=0) is None
    assert assign(labels, groups, 1, 0, seed=0) is None


def test_no_fold_has_two_roles():
    for folds in (4, 5, 7):
        for left_out in ([0], [folds - 1], [0, 2], [folds - 2, folds - 1]):
            learned, stop = roles(folds, left_out)
            assert sorted([*learned, stop, *left_out]) == list(range(folds))


class Guesses(Family):
    """Scores that owe nothing to the data: whoever chooses among many by one set of folds finds a good
    one."""

    name = "guesses"
    grid = tuple({"number": number} for number in range(20))

    def fit(self, train, val, grid):
        raise AssertionError("it is asked by folds")

    def unseen(self, samples, parts, left_out):
        for point in self.grid:
            yield [self.guess(point["number"], i, len(parts[i])) for i in left_out]

    def guess(self, number, fold, count):
        scores = np.random.default_rng((number, fold)).normal(size=count)
        return np.stack([np.zeros(count), scores], axis=1)


def test_the_nested_figure_is_honest_where_the_best_of_many_is_not():
    labels, fold = np.tile([0, 1], 100), np.repeat(np.arange(5), 40)
    samples = Samples(np.zeros((200, 2), np.float32), labels, [str(i) for i in range(200)], {})
    families = [Guesses(Settings(), 2)]
    outcome = cross_validate(families, samples, fold, 1, across=False, done=lambda: None)["guesses"]
    flattering = outcome.candidates[..., 0].mean(axis=1)
    assert outcome.chosen == flattering.argmax() and flattering.max() > 0.55
    assert abs(outcome.nested[:, 0].mean() - 0.5) < 0.05


def test_neighbours_found_fold_by_fold_are_those_of_one_search():
    vectors, labels = case(0, n=150)
    samples = Samples(vectors, labels, [str(i) for i in range(150)], {})
    parts = [np.arange(i, 150, 5) for i in range(5)]
    family = NearestNeighbours(Settings(), 2)
    for left_out in ([1], [0, 3]):
        fast = list(family.unseen(samples, parts, left_out))
        slow = list(Family.unseen(family, samples, parts, left_out))
        for one, other in zip(fast, slow, strict=True):
            for a, b in zip(one, other, strict=True):
                assert a == pytest.approx(b, abs=1e-6)


def test_every_model_is_beside_the_mlp_and_comes_back_as_it_was(run):
    record = fit(experiment(run, folds=4, seeds=2), progress=False)
    classifier, val = load(run), read_embeddings(run, "val")
    assert classifier.name == "mlp"
    assert set(classifier.beside) == {"logistic_regression", "knn", "nearest_mean"}
    models = {"mlp": (classifier.verdict, record)} | {
        name: (model, record["beside"][name]) for name, model in classifier.beside.items()
    }
    for name, (model, about) in models.items():
        scores = model.probabilities(val.vectors)[:, 1]
        assert roc_auc_score(val.labels, scores) == pytest.approx(about["val"]["roc_auc"]), name
        assert about["val"]["roc_auc"] > 0.75
        assert about["val"]["nll"] <= about["val"]["nll_before_temperature"] + 1e-9
        assert model.threshold == choose_threshold(scores, val.labels == 1, "youden")
        assert len(about["cross_validation"]["roc_auc"]["folds"]) == 4
        assert 0.6 < about["cross_validation"]["roc_auc"]["mean"] < 1
    assert len(classifier.seeds) == 2 and record["seeds"][0]["val"] == record["val"]
    assert record["seeds"][1]["val"] != record["val"]
    text = "\n".join(summary(record))
    assert "gives the verdict" in text and "mlp, 2 seeds" in text and "nearest_mean" in text


def test_cross_validation_never_reads_the_test_split(run):
    write(run, "test", 30, 9)
    (run / "embeddings/test.parquet").write_bytes(b"not to be read")
    fit(experiment(run, folds=4), progress=False)


@pytest.mark.parametrize("name", ["logistic_regression", "knn", "nearest_mean"])
def test_another_model_may_give_the_verdict(run, name):
    record = fit(experiment(run, model=name), progress=False)
    classifier, val = load(run), read_embeddings(run, "val")
    assert classifier.name == name and "mlp" in classifier.beside
    assert classifier.threshold == record["threshold"]
    one_by_one = np.concatenate([classifier.probabilities(vector[None]) for vector in val.vectors])
    assert classifier.probabilities(val.vectors) == pytest.approx(one_by_one, abs=1e-6)


def test_the_best_model_is_the_best_of_cross_validation(run):
    record = fit(experiment(run, model="best", folds=4, search={"lr": [1e-5, 1e-2]}), progress=False)
    candidates = record["choice"]["candidates"]
    best = max(candidates, key=lambda its: its["roc_auc"])
    assert record["model"] == best["model"] and record["hyperparameters"] == best["hyperparameters"]
    of_mlp = [its for its in candidates if its["model"] == "mlp"]
    assert [its["hyperparameters"] for its in of_mlp] == [{"lr": 1e-5}, {"lr": 1e-2}]


def test_too_few_folds_are_refused():
    assert Settings(folds=0).folds == 0 and Settings(folds=4).folds == 4
    with pytest.raises(ValueError, match="folds=2 leaves too little"):
        Settings(folds=2)


@pytest.mark.parametrize("settings", [{"model": "best"}, {"search": {"dropout": [0.1, 0.5]}}])
def test_a_choice_without_folds_is_refused(run, settings):
    with pytest.raises(UserError, match=r"classifier\.(model=best|search\.dropout) needs cross-validation"):
        fit(experiment(run, **settings), progress=False)


def test_ensembles_are_means_of_logits(run):
    val = read_embeddings(run, "val")
    extra = np.empty((80, 0), np.float32)
    fit(experiment(run, seeds=3, ensemble="seeds"), progress=False)
    classifier = load(run)
    mean = np.mean([seed.model.logits(val.vectors, extra) for seed in classifier.seeds], axis=0)
    assert classifier.verdict.model.logits(val.vectors, extra) == pytest.approx(mean)
    record = fit(experiment(run, ensemble="folds", folds=4), progress=False)
    assert record["members"] == 4 and len(load(run).verdict.model.members) == 4
    with pytest.raises(UserError, match="ensemble=folds needs classifier"):
        fit(experiment(run, ensemble="folds"), progress=False)


@pytest.mark.parametrize("imbalance", ["weights", "sampling", "undersampling", "none"])
@pytest.mark.parametrize("model", ["mlp", "logistic_regression"])
def test_probabilities_are_at_the_prevalence_of_the_data(run, imbalance, model):
    write(run, "val", 400, 1)
    fit(experiment(run, epochs=25, imbalance=imbalance, model=model), progress=False)
    probabilities = load(run).probabilities(read_embeddings(run, "val").vectors)
    assert probabilities[:, 1].mean() == pytest.approx(0.25, abs=0.06)


def test_undersampling_takes_as_many_of_each():
    labels = np.repeat([0, 1, 2], [50, 7, 20])
    rows = undersample(labels, seed=0, member=0)
    assert np.bincount(labels[rows]).tolist() == [7, 7, 7] and len(set(rows)) == 21
    assert not np.array_equal(rows, undersample(labels, seed=0, member=1))
    assert class_weights(labels, 4) == pytest.approx([77 / 200, 77 / 28, 77 / 80, 1])


def test_several_classes(tmp_path):
    for split, n, seed in (("train", 200, 0), ("val", 80, 1)):
        write(tmp_path, split, n, seed, classes=4)
    fit(experiment(tmp_path, folds=4), progress=False)
    classifier, val = load(tmp_path), read_embeddings(tmp_path, "val")
    for model in (classifier.verdict, *classifier.beside.values()):
        found = model.probabilities(val.vectors)
        assert found.shape == (80, 4) and found.sum(axis=1) == pytest.approx(1)


def table(draw, labels):
    """Age tells the class; a third of it is blank; sex says nothing, and sometimes that it is unknown."""
    ages = np.where(labels == 1, 70, 40) + draw.normal(0, 5, len(labels))
    return {
        "age_approx": column([None if i % 3 == 0 else float(age) for i, age in enumerate(ages)]),
        "sex": column([("male", "female", "unknown", "")[i % 4] for i in range(len(labels))]),
    }


def test_metadata_are_inputs_that_may_be_missing(tmp_path):
    draw = np.random.default_rng(0)
    for split, n, seed in (("train", 200, 0), ("val", 80, 1)):
        write(tmp_path, split, n, seed, metadata=table(draw, case(seed, n)[1]))
    without = fit(experiment(tmp_path, epochs=30, lr=0.01), progress=False)
    record = fit(experiment(tmp_path, epochs=30, lr=0.01, metadata=("age", "sex")), progress=False)
    assert record["val"]["roc_auc"] > without["val"]["roc_auc"]
    logistic = record["beside"]["logistic_regression"]["val"]["roc_auc"]
    assert logistic > without["beside"]["logistic_regression"]["val"]["roc_auc"]
    assert record["metadata"][1] == {"name": "sex", "values": ["female", "male"]}
    classifier, val = load(tmp_path), read_embeddings(tmp_path, "val")
    known = classifier.probabilities(val.vectors, val.metadata)[:, 1]
    assert roc_auc_score(val.labels, known) == pytest.approx(record["val"]["roc_auc"])
    blind = classifier.probabilities(val.vectors)
    assert np.isfinite(blind).all() and not np.allclose(blind[:, 1], known)
    with pytest.raises(
        UserError, match=r"no column of the tables tells 'site'; they have: age, sex, age_approx$"
    ):
        fit(experiment(tmp_path, metadata=("site",)), progress=False)


def test_inputs_are_fitted_on_what_they_are_given():
    metadata = {"age": column([20.0, None, 60.0, 40.0]), "site": column(["torso", None, "Unknown", "head"])}
    inputs = Inputs.fit(metadata, ("age", "site"))
    assert Inputs.of(json.loads(json.dumps(inputs.describe()))) == inputs
    found = inputs.encode(metadata, 4)
    filled = np.array([20, 40, 60, 40])
    assert found[:, 0] == pytest.approx((filled - 40) / filled.std(), abs=1e-6)
    assert found[:, 1].tolist() == [0, 1, 0, 0]
    assert found[:, 2:].tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 1], [1, 0, 0]]  # head, torso, unknown
    new = inputs.encode({"site": column(["palm"])}, 1)
    assert new.tolist() == [[0, 1, 0, 0, 1]]
    shouted = inputs.encode({"SITE": column(["TORSO", "Head"])}, 2)
    assert shouted[:, 2:].tolist() == [[0, 1, 0], [1, 0, 0]]


def test_tables_may_write_numbers_as_text_and_texts_as_numbers():
    inputs = Inputs.fit({"size_mm": column([1.0, 3.0]), "camera": column(["1", "2"])}, ("size_mm", "camera"))
    same = inputs.encode({"size_mm": column(["1.0", "3"]), "camera": column([1, 2])}, 2)
    assert same.tolist() == [[-1, 0, 1, 0, 0], [1, 0, 0, 1, 0]]
    missing = inputs.encode({"size_mm": column(["large", "inf", ""])}, 3)
    assert missing[:, :2].tolist() == [[0, 1]] * 3


def test_a_role_is_read_from_whichever_column_tells_it():
    metadata = {"age_approx": column(["45", "", "x"]), "age": column([None, 30.0, None])}
    assert read(metadata, "age") == [45.0, 30.0, None]
    assert read({"localization": column([" back ", "unknown"])}, "site") == ["back", None]
    sexes = {"sex": column(["Male", "male", None, "NA"]), "gender": column([None, None, "MALE", "female"])}
    assert read(sexes, "sex") == ["male", "male", "male", "female"]
    assert read({"SEX": column([None, "f"]), "sex": column(["m", "x"])}, "sex") == ["m", "x"]
    assert read({"SEX": column([None, "f"]), "sex": column(["m", None])}, "sex") == ["m", "f"]
    both = {"source": column(["isic", "ham"]), "Source": column(["x", "x"])}
    assert read(both, "source") == ["isic", "ham"] and read(both, "Source") == ["x", "x"]
    assert Inputs.fit(both, ("Source",)).fields
    with pytest.raises(UserError, match="no column of the tables tells 'source'; they have: Source"):
        Inputs.fit(both, ("source",))
    assert read({"Sex": column(["F"])}, "sex") == read({"Sex": column(["F"])}, "SEX") == ["f"]
    assert read(metadata, "site") is None


@pytest.mark.parametrize("seed", range(10))
def test_more_operating_points_equal_brute_force(seed):
    draw = np.random.default_rng(seed)
    scores, positives = draw.integers(0, 12, 40) / 12, draw.random(40) < 0.3
    positives[:2] = True, False
    everything = [*sorted(set(scores)), np.nextafter(scores.max(), np.inf)]

    def missed(t):
        return (positives & (scores < t)).sum()

    def alarms(t):
        return (~positives & (scores >= t)).sum()

    def same_calls(found, expected):
        return ((scores >= found) == (scores >= expected)).all()

    for wanted in (0.0, 0.5, 0.9, 1.0):
        expected = min(t for t in everything if 1 - alarms(t) / (~positives).sum() >= wanted)
        assert same_calls(choose_threshold(scores, positives, "specificity", specificity=wanted), expected)
    for cost in (0.1, 1, 20, 1000):
        least = min(cost * missed(t) + alarms(t) for t in everything)
        expected = max(t for t in everything if cost * missed(t) + alarms(t) == least)
        assert same_calls(choose_threshold(scores, positives, "cost", cost=cost), expected)
