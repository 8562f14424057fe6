"""The report: whole or absent, complete, self-contained, escaped, and never from parts that do not belong."""

import csv
import html.parser
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix, roc_auc_score

from configs.errors import UserError
from configs.schema import Experiment
from eval import plots, report
from eval.evaluate import evaluate, headline
from eval.plots import read_curves, training_curves
from train.classifier import load
from train.classify import fit
from train.embeddings import Embeddings, read_embeddings, write_embeddings

META = {"encoder_sha256": "e1", "shards_sha256": "s1", "classes": ["benign", "melanoma"], "positive": 1}
PICTURES = {
    *("roc", "precision_recall", "confusion", "reliability", "scores", "decision"),
    *("embeddings_pca", "embeddings_tsne"),
}


def write(run, split, n, seed, meta=META, labels=None, groups=None):
    draw = np.random.default_rng(seed)
    count = len(meta["classes"])
    labels = draw.integers(0, count, n) if labels is None else labels
    vectors = draw.normal(size=(n, 8)).astype(np.float32)
    vectors[np.arange(n), labels] += 2
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = groups or [f"{split}-{i // 4}" for i in range(n)]
    keys = [f"{split}{i}" for i in range(n)]
    write_embeddings(run, split, Embeddings(np.arange(n), keys, groups, labels, vectors, meta))


def make(run: Path, meta=META) -> Experiment:
    for seed, (split, n) in enumerate({"train": 160, "val": 60, "test": 80}.items()):
        write(run, split, n, seed, meta)
    experiment = Experiment.model_validate(
        {
            "run": {"folder": run},
            "classifier": {"epochs": 5, "hidden": (8,), "folds": 0, "seeds": 2},
            "evaluate": {"bootstrap": 100},
        }
    )
    fit(experiment, progress=False)
    return experiment


@pytest.fixture(autouse=True)
def blank_pictures(monkeypatch):
    """Most tests look at no picture, and a second of drawing each would be the most of their time."""

    def save(figure, path):
        path.touch()
        path.with_suffix(".svg").write_text('<svg viewBox="0 0 1 1"></svg>')

    monkeypatch.setattr(plots, "save", save)


@pytest.fixture
def drawn(blank_pictures, monkeypatch):
    """Pictures after all."""
    monkeypatch.undo()


@pytest.fixture
def experiment(tmp_path):
    return make(tmp_path / "run")


def labels_of_pictures(page: str) -> list[str]:
    """What the page's drawings are called; fails on a page that loads anything from elsewhere."""
    found = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("link", "iframe", "b-tag", "object", "base")
            for name, value in attrs:
                if name in ("src", "href", "xlink:href"):
                    assert value.startswith(("#", "data:image/")) and tag != "script", value
                if tag == "svg" and name == "aria-label":
                    found.append(value)

    Parser().feed(page)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    return found


def test_figures_are_those_of_the_classifier_on_the_embeddings(experiment):
    run = experiment.run.folder
    results = evaluate(experiment, progress=False)
    assert json.loads((run / "report/metrics.json").read_text()) == results
    classifier, test = load(run), read_embeddings(run, "test")
    scores = classifier.probabilities(test.vectors)[:, 1]
    assert results["test"]["roc_auc"]["value"] == pytest.approx(roc_auc_score(test.labels, scores))
    called = (scores >= classifier.threshold).astype(int)
    assert results["test"]["confusion_matrix"] == confusion_matrix(test.labels, called).tolist()
    assert (results["test"]["images"], results["test"]["groups"]) == (80, 20)
    assert results["threshold"] == classifier.threshold and results["classifier_sha256"] == classifier.sha256
    for split in ("train", "val", "test"):
        for name in (
            "roc_auc",
            "pr_auc",
            "accuracy",
            "sensitivity",
            "specificity",
            "precision.melanoma",
            "f1.benign",
        ):
            figure = results[split][name]
            assert figure["low"] <= figure["value"] <= figure["high"] and math.isfinite(figure["value"])


def test_the_report_folder_is_complete_and_self_contained(experiment, drawn):
    run = experiment.run.folder
    about = {"stage": "encoder", "time": 1.7e9}
    lines = [{**about, "step": i, "epoch": i / 2, "loss": 1 / (i + 1), "lr": 0.1} for i in range(6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = evaluate(experiment, progress=False, notice="Drawn, not photographed.")
    names = {path.name for path in (run / "report").iterdir()}
    assert names == {
        f"{name}.{kind}" for name in PICTURES | {"training", "curves"} for kind in ("png", "svg")
    } | {
        "metrics.json",
        "predictions_test.csv",
        "index.html",
    }
    page = (run / "report/index.html").read_text()
    shown = {*labels_of_pictures(page), "confusion"}  # which is a table there
    assert shown == (PICTURES - {"embeddings_pca", "embeddings_tsne"}) | {
        *("training", "curves", "PCA of the test embeddings", "t-SNE of the test embeddings")
    }
    assert "Drawn, not photographed." in page and "not a medical device" in page
    for name in ("roc_auc", "pr_auc", "sensitivity", "specificity"):
        assert f"<b>{results['test'][name]['value']:.3f}</b>" in page
    for path in (run / "report").glob("*.png"):
        with Image.open(path) as picture:
            grey = np.asarray(picture.convert("L"))
        assert grey.shape[0] > 400 and grey.std() > 5, f"{path.name} is blank"


def test_predictions_hold_every_test_sample(experiment):
    evaluate(experiment, progress=False)
    run = experiment.run.folder
    with (run / "report/predictions_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    classifier, test = load(run), read_embeddings(run, "test")
    assert [row["key"] for row in rows] == test.keys and [row["group"] for row in rows] == test.groups
    assert [row["label"] for row in rows] == [classifier.classes[label] for label in test.labels]
    scores = classifier.probabilities(test.vectors)[:, 1]
    assert [float(row["probability"]) for row in rows] == pytest.approx(scores, abs=1e-6)
    assert [row["decision"] == "melanoma" for row in rows] == (scores >= classifier.threshold).tolist()


def test_a_second_report_takes_the_place_of_the_first_and_repeats_it(experiment, drawn):
    run = experiment.run.folder
    evaluate(experiment, progress=False)
    first = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    (run / "report/stale.png").write_text("from an older run")
    evaluate(experiment, progress=False)
    assert {path.name: path.read_bytes() for path in (run / "report").iterdir()} == first


def test_a_failure_leaves_the_old_report_and_no_half_of_a_new_one(experiment, monkeypatch):
    run = experiment.run.folder
    evaluate(experiment, progress=False)
    before = {path.name: path.read_bytes() for path in (run / "report").iterdir()}
    listing = sorted(path.name for path in run.iterdir())

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(report, "_page", fail)
    with pytest.raises(UserError, match=r"report: cannot be written \(No space left on device\)"):
        evaluate(experiment, progress=False)
    assert {path.name: path.read_bytes() for path in (run / "report").iterdir()} == before
    assert sorted(path.name for path in run.iterdir()) == listing


def test_names_are_escaped_and_more_than_two_classes_work(tmp_path):
    classes = ["nevus $x$", "<b-tag>keratosis", 'mel & "noma"']
    experiment = make(tmp_path, {**META, "classes": classes, "positive": 2})
    results = evaluate(experiment, progress=False, notice="<b-tag>notice")
    page = (tmp_path / "report/index.html").read_text()
    labels_of_pictures(page)
    assert (
        "&lt;b-tag&gt;keratosis" in page
        and "mel &amp; &#34;noma&#34;" in page
        and "&lt;b-tag&gt;notice" in page
    )
    assert np.array(results["test"]["confusion_matrix"]).shape == (3, 3)
    assert "<b-tag>keratosis" in headline(results)


def test_a_test_split_without_the_positive_class_still_reports(experiment):
    run = experiment.run.folder
    write(run, "test", 20, 5, labels=np.zeros(20, np.int64))
    results = evaluate(experiment, progress=False)
    assert "roc_auc" not in results["test"] and "melanoma" in results["test"]["undefined"]["roc_auc"]
    assert not (run / "report/roc.png").exists()
    assert "undefined: no patient with images of melanoma" in headline(results)
    assert "no patient with images of melanoma" in (run / "report/index.html").read_text()


@pytest.mark.filterwarnings("error")
def test_figures_of_one_patient_are_told_without_an_interval(experiment):
    run = experiment.run.folder
    write(run, "test", 20, 5, groups=["alone"] * 20)
    results = evaluate(experiment, progress=False)
    value = results["test"]["roc_auc"]["value"]
    assert f"ROC-AUC      {value:.3f}, no interval: one patient" in headline(results)
    page = (run / "report/index.html").read_text()
    assert f"<b>{value:.3f}</b>" in page and "<span>no interval: one patient</span>" in page
    assert "None" not in page and ">ROC curve<" in page
    write(run, "test", 20, 5, labels=np.repeat([0, 1], [17, 3]), groups=["a"] * 9 + ["b"] * 8 + ["c"] * 3)
    results = evaluate(experiment, progress=False)
    assert "no interval: one patient with images of melanoma" in headline(results)
    assert results["test"]["accuracy"]["low"] <= results["test"]["accuracy"]["high"]


def test_draws_that_an_interval_lacks_are_told(experiment):
    run = experiment.run.folder
    write(run, "test", 20, 5, labels=np.repeat([0, 1], [17, 3]), groups=[f"p{i % 18}" for i in range(20)])
    lacking = evaluate(experiment, progress=False)["test"]["undefined_draws"]["roc_auc"]
    page = " ".join((run / "report/index.html").read_text().split())
    assert f"In test, {lacking} draws leave roc_auc undefined, and its interval does without them." in page


@pytest.mark.parametrize(
    ("prevalence", "said"), [(None, "are at each split's own prevalence"), (0.0176, "at 1.76 % melanoma, as")]
)
def test_the_page_says_at_what_prevalence_and_what_to_beware_of(experiment, prevalence, said):
    settings = experiment.evaluate.model_copy(update={"prevalence": prevalence})
    evaluate(experiment.model_copy(update={"evaluate": settings}), progress=False)
    page = " ".join((experiment.run.folder / "report/index.html").read_text().split())
    assert said in page and "its range sits high" in page and "takes images for independent" in page


def test_headline_tells_the_figures(experiment):
    results = evaluate(experiment, progress=False)
    text, test = headline(results), results["test"]
    assert text.startswith("test: 80 images of 20 patients")
    auc = test["roc_auc"]
    assert f"{auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]" in text
    row = next(line for line in text.splitlines() if line.split()[:1] == ["melanoma"])
    assert [int(cell) for cell in row.split()[1:]] == test["confusion_matrix"][1]


def test_the_tracker_gets_figures_and_pictures_that_exist(experiment):
    class Recorder:
        def figures(self, values, pictures):
            assert set(pictures) == PICTURES and all(path.is_file() for path in pictures.values())
            self.values = values

    recorder = Recorder()
    results = evaluate(experiment, tracker=recorder, progress=False)
    assert recorder.values["test/roc_auc"] == results["test"]["roc_auc"]["value"]
    assert recorder.values["val/f1.melanoma"] == results["val"]["f1.melanoma"]["value"]
    for place, of in (
        ("test/roc_auc", results["test"]["roc_auc"]),
        ("test/patients/sensitivity", results["test"]["patients"]["sensitivity"]),
        ("test/embedding/map_at_r", results["test"]["embedding"]["map_at_r"]),
        ("test/models/knn/difference/roc_auc", results["test"]["models"]["knn"]["difference"]["roc_auc"]),
    ):
        told = [recorder.values[f"{place}{end}"] for end in ("", "_low", "_high")]
        assert told == [of["value"], of["low"], of["high"]]
    assert all(isinstance(value, float) for value in recorder.values.values())


def test_it_refuses_what_does_not_belong_together(experiment):
    run = experiment.run.folder
    write(run, "test", 20, 5, {**META, "encoder_sha256": "e2"})
    with pytest.raises(UserError, match=r"test\.parquet: made from another encoder than the classifier"):
        evaluate(experiment, progress=False)
    write(run, "test", 20, 5, {**META, "shards_sha256": "s2"})
    with pytest.raises(UserError, match="made from another shard set"):
        evaluate(experiment, progress=False)
    write(run, "test", 20, 5, groups=["val-3"] * 20)
    with pytest.raises(UserError, match=r"1 groups lie both in val and in test, such as 'val-3'"):
        evaluate(experiment, progress=False)
    (run / "embeddings/test.parquet").unlink()
    with pytest.raises(UserError, match=r"moleprint embed CONFIG"):
        evaluate(experiment, progress=False)
    (run / "classifier.json").unlink()
    with pytest.raises(UserError, match=r"moleprint classify CONFIG"):
        evaluate(experiment, progress=False)
    assert not (run / "report").exists()


def test_curves_of_a_resumed_run_count_each_epoch_once(tmp_path):
    log = tmp_path / "metrics.jsonl"
    rows = [{"stage": "encoder", "step": s, "epoch": s / 10, "loss": 9.0} for s in (10, 20, 30)]
    rows += [
        {"stage": "encoder", "step": s, "epoch": s / 10, "loss": 1.0, "note": "resumed"} for s in (20, 30)
    ]
    rows += [{"stage": "classifier", "step": 5, "val_roc_auc": 0.7}, {"other": 1}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "encoder", "st')
    curves = read_curves(log)
    assert curves["encoder"] == {"loss": [(1.0, 9.0), (2.0, 1.0), (3.0, 1.0)]}
    assert curves["classifier"] == {"val_roc_auc": [(5.0, 0.7)]}
    assert training_curves(tmp_path / "curves.png", log) and (tmp_path / "curves.png").is_file()
    assert not training_curves(tmp_path / "none.png", tmp_path / "missing.jsonl")


def test_every_figure_of_the_log_is_redrawn(tmp_path, monkeypatch):
    """Once, beside those that it compares with; none that is no figure."""
    figures = ("loss", "triplet", "classification", "val_triplet_loss", "val_roc_auc", "lr", "grad_norm")
    figures += ("images_per_second", "data_wait", "spread", "val_spread", "val_recall_at_1", "val_map_at_r")
    figures += ("distance_negative", "distance_negative_p90", "active_triplets", "one_of_tomorrow")
    row = {"stage": "encoder", "time": 1.7e9, "seconds_left": 5.0, **dict.fromkeys(figures, 0.5)}
    rows = [{**row, "step": step, "epoch": step / 2} for step in (1, 2)]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    assert plots.training_curves(tmp_path / "a.png", log) and plots.further_curves(tmp_path / "b.png", log)
    panels = [{line.get_label() for line in axes.lines} for figure in drawn for axes in figure.axes]
    assert sorted(name for panel in panels for name in panel) == sorted(figures)
    assert {"distance_negative", "distance_negative_p90"} in panels
    assert {"spread", "val_spread"} in panels and {"val_recall_at_1", "val_map_at_r"} in panels
    assert panels[0] == {"loss", "triplet", "classification"} and {"val_triplet_loss"} in panels
