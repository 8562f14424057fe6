"""Subgroups, the models beside the verdict's, and two runs on the same test set."""

import json

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from configs.errors import UserError
from configs.load import dump
from configs.schema import Experiment
from eval.compare import compare, said
from eval.judge import judge
from eval.metrics import Bootstrap
from eval.subgroups import SMALL, _place, banded, subgroups
from launch.cli import main
from train.classifier import load
from train.classify import fit
from train.embeddings import Embeddings, read_embeddings, write_embeddings

META = {"encoder_sha256": "e1", "shards_sha256": "s1", "classes": ["benign", "melanoma"], "positive": 1}
FEW = Bootstrap(draws=100, confidence=0.95, seed=0)


def make(run, noise, **classifier):
    """A run whose embeddings tell the class the less, the more noise they have; always of the same images."""
    for seed, (split, n) in enumerate({"train": 160, "val": 80, "test": 120}.items()):
        draw = np.random.default_rng(seed)
        labels = draw.integers(0, 2, n)
        vectors = noise * draw.normal(size=(n, 6)).astype(np.float32)
        vectors[np.arange(n), labels] += 2
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        metadata = {
            "sex": pa.chunked_array([[("male", "female", "")[i % 3] for i in range(n)]]),
            "original_width": pa.chunked_array([[100] * n]),
            "original_height": pa.chunked_array([[75 + 25 * (i % 2) for i in range(n)]]),
        }
        groups = [f"{split}{i // 3}" for i in range(n)]
        keys = [f"{split}{i}" for i in range(n)]
        write_embeddings(run, split, Embeddings(np.arange(n), keys, groups, labels, vectors, META, metadata))
    sections = {
        "run": {"folder": run},
        "classifier": {"epochs": 10, "lr": 0.01, "hidden": (8,), "folds": 0, "seeds": 2, **classifier},
        "evaluate": {"bootstrap": 100},
    }
    experiment = Experiment.model_validate(sections)
    fit(experiment, progress=False)
    (run / "config.yaml").write_text(dump(experiment))
    return experiment


def test_two_runs_are_paired_by_image(tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    make(first, 1.0)
    make(second, 3.0)
    test = read_embeddings(second, "test")
    order = np.random.default_rng(0).permutation(120)  # the same images, numbered otherwise
    write_embeddings(
        second,
        "test",
        Embeddings(
            np.arange(120),
            [test.keys[i] for i in order],
            [test.groups[i] for i in order],
            test.labels[order],
            test.vectors[order],
            META,
        ),
    )
    results = compare([first], [second])
    aucs = []
    for run in (first, second):
        data = read_embeddings(run, "test")
        aucs.append(roc_auc_score(data.labels, load(run).probabilities(data.vectors)[:, 1]))
    assert [results[which]["roc_auc"]["value"] for which in ("first", "second")] == pytest.approx(aucs)
    apart = results["difference"]
    assert apart["roc_auc"]["value"] == pytest.approx(aucs[0] - aucs[1]) and apart["roc_auc"]["low"] > 0
    assert apart["delong"]["difference"]["value"] == pytest.approx(aucs[0] - aucs[1])
    assert apart["delong"]["p"] < 0.05

    main(["compare", str(first), str(second), "--json", str(tmp_path / "both.json")])
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "both.json").read_text()) == results
    assert (
        printed == "\n".join(said(results)) + "\n"
        and "DeLong" in printed
        and "120 images of 40 patients" in printed
    )


def test_recipes_of_several_runs_are_worth_their_mean(tmp_path, capsys):
    runs = [tmp_path / name for name in "abc"]
    for run, noise in zip(runs, (1.0, 1.5, 3.0), strict=True):
        make(run, noise)
    single = [compare([run], [runs[2]]) for run in runs[:2]]
    results = compare(runs[:2], runs[2:])
    aucs = list(results["runs"][0].values())
    assert aucs == pytest.approx([one["first"]["roc_auc"]["value"] for one in single])
    for name in ("first", "difference"):
        values = [one[name]["roc_auc"]["value"] for one in single]
        assert results[name]["roc_auc"]["value"] == pytest.approx(np.mean(values))
    apart = results["difference"]["roc_auc"]
    assert apart["low"] < apart["value"] < apart["high"] and "delong" not in results["difference"]
    main(["compare", str(runs[0]), str(runs[1]), "--against", str(runs[2])])
    assert f"A: mean of 2 runs, ROC-AUC {aucs[0]:.3f}, {aucs[1]:.3f}, sd" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compare", str(runs[0])])
    assert "1 runs: give two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"keys": [f"other{i}" for i in range(120)]}, "have other test sets"),
        ({"groups": [f"g{i}" for i in range(120)]}, "have other groups"),
        ({"labels": np.arange(120) % 2}, "have other labels"),
    ],
)
def test_runs_of_other_test_sets_are_refused(tmp_path, change, told):
    make(tmp_path / "a", 1.0)
    make(tmp_path / "b", 1.0)
    test = read_embeddings(tmp_path / "b", "test")
    write_embeddings(tmp_path / "b", "test", Embeddings(**{**vars(test), **change}))
    with pytest.raises(UserError, match=told):
        compare([tmp_path / "a"], [tmp_path / "b"])


def test_a_split_is_judged_with_all_that_is_beside_it(tmp_path):
    experiment = make(tmp_path, 2.0)
    classifier, test = load(tmp_path), read_embeddings(tmp_path, "test")
    found = judge(test, classifier, experiment.evaluate, "patient", learned_from=False)
    json.dumps(found, allow_nan=False)
    assert set(found["models"]) == {"logistic_regression", "knn", "nearest_mean"}
    for name, its in found["models"].items():
        scores = classifier.beside[name].probabilities(test.vectors)[:, 1]
        auc = roc_auc_score(test.labels, scores)
        assert its["roc_auc"]["value"] == pytest.approx(auc)
        assert its["difference"]["roc_auc"]["value"] == pytest.approx(found["roc_auc"]["value"] - auc)
        called = scores >= its["threshold"]
        assert its["sensitivity"]["value"] == pytest.approx(called[test.labels == 1].mean())
    seeds = [roc_auc_score(test.labels, s.probabilities(test.vectors)[:, 1]) for s in classifier.seeds]
    assert found["seeds"]["roc_auc"]["values"] == pytest.approx(seeds)
    assert found["seeds"]["roc_auc"]["sd"] == pytest.approx(np.std(seeds, ddof=1))
    assert found["embedding"]["recall_at_1"]["value"] == pytest.approx(
        np.mean([found["embedding"][f"recall_at_1.{name}"]["value"] for name in META["classes"]])
    )
    assert set(found["subgroups"]) == {"sex", "image_size"}  # no age, no site, no source in these data
    assert list(found["subgroups"]["image_size"]) == ["100×75", "100×100"]  # by pixels, not by letters
    assert found["patients"]["groups"] == 40 and 0 < found["ugly_duckling"]["groups"] <= 40
    learned = judge(
        read_embeddings(tmp_path, "train"), classifier, experiment.evaluate, "patient", learned_from=True
    )
    assert "roc_auc" in learned and "patients" in learned and "models" not in learned


def test_subgroups_are_the_figures_of_their_images():
    draw = np.random.default_rng(0)
    n, values = 300, np.array(["a", "b", "rare"])[np.append(draw.integers(0, 2, 290), np.full(10, 2))]
    positives, groups = draw.random(n) < 0.4, np.append(np.arange(100), draw.integers(0, 100, 200))
    scores = draw.random(n) + positives
    metadata = {"camera": pa.chunked_array([values.tolist()]), "same": pa.chunked_array([["x"] * n])}
    found = subgroups(
        scores,
        positives,
        groups,
        metadata,
        ("camera", "same", "absent"),
        threshold=0.9,
        bootstrap=FEW,
        name="melanoma",
        group="patient",
    )
    assert list(found) == ["camera"] and list(found["camera"]) == ["a", "b", "rare"]
    for value, its in found["camera"].items():
        rows = values == value
        assert its["roc_auc"]["value"] == pytest.approx(roc_auc_score(positives[rows], scores[rows]))
        assert its["specificity"]["value"] == pytest.approx((scores[rows & ~positives] < 0.9).mean())
        assert (its["images"], its["positive"]) == (rows.sum(), (rows & positives).sum())
        few = min(len(set(groups[rows & (positives == kind)])) for kind in (True, False))
        assert its["groups"] == len(set(groups[rows])) and its["small"] == (few < SMALL)
    assert found["camera"]["rare"]["small"] and not found["camera"]["a"]["small"]


def test_values_are_banded():
    def column(values):
        return pa.chunked_array([pa.array(values)])

    ages = {"age_approx": column([15.0, 30.0, 49.9, 50.0, 85.0, None])}
    bands = ["under 30", "30 to 49", "30 to 49", "50 to 69", "70 and over", "unknown"]
    assert banded(ages, "age") == bands
    many = {"site": column([f"s{i % 20:02d}" for i in range(60)] + ["s00"] * 5)}
    assert len(set(banded(many, "site"))) == 12 and "other" in banded(many, "site")
    numbers = {"diameter": column([float(i) for i in range(100)] + [None])}
    assert sorted(set(banded(numbers, "diameter"))) == [
        *("0 to 24.75", "24.75 to 49.5", "49.5 to 74.25", "74.25 to 99", "unknown")
    ]
    assert banded({"stage": column([1, 2, None])}, "stage") == ["1", "2", "unknown"]
    in_order = ["under 30", "9 to 10", "10 to 20", "100×75", "100×100", "isic-2018", "isic-2020", "other"]
    assert sorted(set(in_order), key=_place) == in_order
    assert banded({}, "image_size") == banded({}, "age") == []
