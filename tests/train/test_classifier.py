"""The classifier: exact thresholds, calibration that can only help, fits that repeat to the byte."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.judging import Classifier as Settings
from configs.schema import Experiment
from train.calibration import choose_threshold, fit_temperature, nll, softmax
from train.classifier import finished, load
from train.classify import fit
from train.embeddings import Embeddings, read_embeddings, write_embeddings
from train.perceptron import mlp

META = {"encoder_sha256": "e1", "shards_sha256": "s1", "classes": ["benign", "melanoma"], "positive": 1}


def write(run, split, n, seed, meta=META, labels=None, dim=8):
    draw = np.random.default_rng(seed)
    labels = (np.arange(n) % 4 == 0).astype(np.int64) if labels is None else labels
    vectors = draw.normal(size=(n, dim)).astype(np.float32)
    vectors[:, 0] += 2 * labels
    keys, groups = [f"{split}{i}" for i in range(n)], [f"{split}{i // 3}" for i in range(n)]
    write_embeddings(run, split, Embeddings(np.arange(n), keys, groups, labels, vectors, meta))


def experiment(run: Path, **settings) -> Experiment:
    settings = {"epochs": 6, "hidden": (16,), "batch": 32, "folds": 0, "seeds": 1, **settings}
    return Experiment.model_validate({"run": {"folder": run}, "classifier": settings})


@pytest.fixture
def run(tmp_path):
    write(tmp_path, "train", 200, 0)
    write(tmp_path, "val", 80, 1)
    return tmp_path


def test_embeddings_come_back_in_index_order(tmp_path):
    order = np.array([2, 0, 1])
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    labels = np.array([1, 0, 1])
    written = Embeddings(order, ["c", "a", "b"], ["p2", "p0", "p0"], labels[order], vectors[order], META)
    write_embeddings(tmp_path, "val", written)
    read = read_embeddings(tmp_path, "val")
    assert read.keys == ["a", "b", "c"] and read.groups == ["p0", "p0", "p2"] and read.meta == META
    assert read.index.tolist() == [0, 1, 2] and read.labels.tolist() == labels.tolist()
    assert np.array_equal(read.vectors, vectors) and read.vectors.dtype == np.float32
    assert read.group_codes().tolist() == [0, 0, 1]


def test_embeddings_refuse_what_cannot_be_used(run):
    with pytest.raises(UserError, match=r"test\.parquet: not found; make it with `moleprint embed CONFIG`"):
        read_embeddings(run, "test")
    (run / "embeddings/val.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match=r"val\.parquet: cannot be read"):
        read_embeddings(run, "val")
    vectors = np.array([[1, np.nan], [0, 1]], np.float32)
    write_embeddings(
        run, "val", Embeddings(np.arange(2), ["a", "b"], ["a", "b"], np.array([0, 1]), vectors, META)
    )
    with pytest.raises(UserError, match="1 of 2 embeddings are not finite"):
        read_embeddings(run, "val")


@pytest.mark.parametrize("seed", range(20))
def test_thresholds_equal_brute_force(seed):
    draw = np.random.default_rng(seed)
    scores, positives = draw.integers(0, 12, 40) / 12, draw.random(40) < 0.3  # few values, so many ties
    positives[:2] = True, False

    def rates(threshold):
        called = scores >= threshold
        return (called & positives).sum() / positives.sum(), (called & ~positives).sum() / (~positives).sum()

    def middle(score):
        return (score + max((s for s in scores if s < score), default=0)) / 2

    best = max(round(rates(t)[0] - rates(t)[1], 9) for t in scores)
    youden = max(t for t in scores if round(rates(t)[0] - rates(t)[1], 9) == best)
    assert choose_threshold(scores, positives, "youden") == middle(youden)
    for wanted in (0.0, 0.5, 0.9, 1.0):
        highest = max(t for t in scores if rates(t)[0] >= wanted)
        found = choose_threshold(scores, positives, "sensitivity", sensitivity=wanted)
        assert found == middle(highest) and rates(found) == rates(highest)
    assert choose_threshold(scores, positives, "half") == 0.5


def test_a_threshold_keeps_off_the_scores():
    """Or the rounding of another batch, machine or bundle would turn the call of the sample that it is."""
    scores, positives = np.array([0.1, 0.3, 0.4, 0.8]), np.array([False, False, True, True])
    assert choose_threshold(scores, positives, "youden") == pytest.approx(0.35)
    assert choose_threshold(scores, ~positives, "cost", cost=0.0) == pytest.approx(0.9)  # calls nothing
    assert choose_threshold(scores, ~positives, "sensitivity", sensitivity=1.0) == pytest.approx(0.05)
    close = np.array([0.5, np.nextafter(0.5, 1)])
    found = choose_threshold(close, np.array([False, True]), "youden")
    assert (close >= found).tolist() == [False, True]
    assert choose_threshold(np.array([0.2, 1.0]), np.array([True, False]), "cost", cost=0.0) > 1


def test_temperature_is_the_best_on_a_fine_grid():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 400)
    logits = 4 * draw.normal(size=(400, 3)) + 3 * np.eye(3)[labels]  # far too sure of itself
    offset = np.log([0.5, 1.0, 2.0])
    temperature = fit_temperature(logits, labels, offset)

    def at(t):
        return nll(softmax(logits / t - offset), labels)

    grid = np.geomspace(0.05, 20, 2000)
    assert temperature == pytest.approx(min(grid, key=at), rel=0.005)
    assert at(temperature) <= min(at(1.0), *map(at, grid)) + 1e-9


def test_class_weights_are_undone_in_the_probabilities(run):
    """Trained with balanced weights, the mean probability must still be near the prevalence of 1/4."""
    write(run, "val", 400, 1)
    fit(experiment(run, epochs=40), progress=False)
    probabilities = load(run).probabilities(read_embeddings(run, "val").vectors)
    assert probabilities.sum(axis=1) == pytest.approx(1)
    assert probabilities[:, 1].mean() == pytest.approx(0.25, abs=0.05)


def test_two_fits_write_the_same_bytes_and_leave_the_global_generator_alone(run, tmp_path):
    names = ("classifier.safetensors", "classifier.json")
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    fit(experiment(run), progress=False)
    assert torch.equal(before, torch.random.get_rng_state())
    first = [(run / name).read_bytes() for name in names]
    torch.manual_seed(8)
    fit(experiment(run), progress=False)
    assert [(run / name).read_bytes() for name in names] == first
    fit(experiment(run, seed=1), progress=False)
    assert (run / names[0]).read_bytes() != first[0]


def test_the_fitted_classifier_is_the_best_epoch_and_learns(run):
    logged = []

    class Recorder:
        def log(self, step, values):
            logged.append((step, values))

    record = fit(experiment(run, epochs=60, patience=3, lr=0.02), tracker=Recorder(), progress=False)
    losses = [values["val_loss"] for _, values in logged]
    assert record["best_epoch"] == np.argmin(losses) + 1
    assert len(losses) == record["best_epoch"] + 3 < 60  # stopped by patience
    assert [step for step, _ in logged] == [
        7 * e for e in range(1, len(losses) + 1)
    ]  # 200 / 32 steps an epoch
    assert record["val"]["nll"] <= record["val"]["nll_before_temperature"] + 1e-12
    assert record["val"]["roc_auc"] > 0.85
    assert record["val"]["roc_auc"] == pytest.approx(
        logged[record["best_epoch"] - 1][1]["val_roc_auc"], abs=1e-3
    )


def test_probabilities_do_not_depend_on_the_batch(run):
    fit(experiment(run), progress=False)
    classifier, vectors = load(run), read_embeddings(run, "val").vectors
    one_by_one = np.concatenate([classifier.probabilities(v[None]) for v in vectors])
    assert classifier.probabilities(vectors) == pytest.approx(one_by_one, abs=1e-12)


def test_the_reference_network():
    shapes = [tuple(p.shape) for p in mlp([512, 256, 64, 2], 0.4).parameters()]
    assert shapes == [(256, 512), (256,), (64, 256), (64,), (2, 64), (2,)]
    kinds = [type(layer).__name__ for layer in mlp([512, 256, 64, 2], 0.4)]
    assert kinds == ["Linear", "LeakyReLU", "Dropout"] * 2 + ["Linear"]


def test_finished_tells_changed_settings_and_changed_embeddings(run):
    assert not finished(experiment(run))
    fit(experiment(run), progress=False)
    assert finished(experiment(run))
    assert not finished(experiment(run, lr=0.5))
    write(run, "train", 200, 0, {**META, "encoder_sha256": "e2"})
    assert not finished(experiment(run))


def test_load_refuses_a_missing_or_mixed_classifier(run):
    with pytest.raises(
        UserError, match=r"classifier\.json: not found; make it with `moleprint classify CONFIG`"
    ):
        load(run)
    fit(experiment(run), progress=False)
    shutil.copy(run / "classifier.safetensors", run / "kept")
    fit(experiment(run, seed=1), progress=False)
    shutil.copy(run / "kept", run / "classifier.safetensors")
    with pytest.raises(UserError, match="sha256 is not the one"):
        load(run)
    record = json.loads((run / "classifier.json").read_text())
    del record["temperature"]
    (run / "classifier.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="make it again with"):
        load(run)


def test_fit_names_what_is_wrong(run):
    write(run, "val", 40, 1, {**META, "encoder_sha256": "other"})
    with pytest.raises(UserError, match="different encoders or shard sets"):
        fit(experiment(run), progress=False)
    write(run, "val", 40, 1, labels=np.zeros(40, np.int64))
    with pytest.raises(UserError, match=r"samples are 'melanoma', so no threshold.*pack\.ratios\.val"):
        fit(experiment(run), progress=False)
    write(run, "val", 40, 1)
    write(run, "train", 40, 1, labels=np.ones(40, np.int64))
    with pytest.raises(UserError, match="class 'benign' has no sample in train"):
        fit(experiment(run), progress=False)
    write(run, "train", 40, 1)
    with pytest.raises(UserError, match=r"lower classifier\.lr"):
        fit(experiment(run, lr=1e30), progress=False)
    assert not (run / "classifier.json").exists() and not (run / "classifier.safetensors").exists()


def test_the_default_settings_are_the_reference_ones():
    settings = Settings()
    assert (settings.hidden, settings.dropout) == ((256, 64), 0.4)
