"""Validation figures: kNN against scikit-learn, the probe, what they learn from, the best epoch."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from configs.training import Train
from shards.shardset import ShardSet
from train import encoder, validation
from train.centroids import Centroids
from train.distributed import World
from train.embed import embed, evaluation_loader
from train.progress import Progress
from train.runfolder import load_encoder
from train.validation import TEMPERATURE, Embedded, draw, figures, linear_probe, neighbours


def embedded(count: int, seed: int, apart: float = 1.0) -> Embedded:
    """Unit vectors (count, 8) of two classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4 // 3
    vectors = torch.randn(count, 8, generator=generator) + apart * F.one_hot(labels, 8)
    return Embedded(np.arange(count), F.normalize(vectors, dim=1).numpy(), labels.numpy())


def test_neighbours_are_those_of_scikit_learn() -> None:
    held, known = embedded(50, 1), embedded(200, 2)
    theirs = KNeighborsClassifier(
        20, weights=lambda d: np.exp((1 - d**2 / 2 - 1) / TEMPERATURE), algorithm="brute"
    ).fit(known.vectors, known.labels)
    ours = neighbours(torch.from_numpy(held.vectors), known, positive=1)
    np.testing.assert_allclose(ours, theirs.predict_proba(held.vectors)[:, 1], atol=1e-5)
    few = neighbours(torch.from_numpy(held.vectors), embedded(8, 2), positive=1)
    assert few.isfinite().all()  # fewer than 20 to ask


def test_the_probe_finds_a_direction_that_separates() -> None:
    held, known = embedded(300, 1, apart=3), embedded(300, 2, apart=3)
    odds = linear_probe(held.vectors, known, positive=1)
    truth = held.labels == 1
    assert np.mean(odds[truth][:, None] > odds[~truth]) > 0.98
    np.testing.assert_allclose(linear_probe(held.vectors, known, positive=0), -odds, atol=1e-3)


def test_all_figures_of_a_good_encoder_are_better() -> None:
    near, far = (
        figures(embedded(80, 1, a), embedded(120, 2, a), positive=1, margin=0.2, world=World())
        for a in (0.3, 4)
    )
    assert near.keys() == far.keys() == {*validation.retrieval.COLUMNS, "knn_roc_auc", "probe_roc_auc"}
    assert all(Progress(best=near[name]).beats(far[name], name) for name in near)
    without = figures(embedded(80, 1), None, positive=1, margin=0.2, world=World())
    assert without.keys() == set(validation.retrieval.COLUMNS)


def test_what_is_learnt_from_is_of_training_and_balanced(tiny_shards: ShardSet) -> None:
    train = tiny_shards.split("train")
    drawn = draw(tiny_shards.labels, train, 20, seed=3)
    assert np.isin(drawn, train).all() and len(np.unique(drawn)) == 20 and (np.diff(drawn) > 0).all()
    assert np.bincount(tiny_shards.labels[drawn]).tolist() == [10, 10]
    assert np.array_equal(drawn, draw(tiny_shards.labels, train, 20, seed=3))
    assert not np.array_equal(drawn, draw(tiny_shards.labels, train, 20, seed=4))
    many = draw(tiny_shards.labels, train, 10_000, seed=3)
    assert np.array_equal(many, train)


@pytest.mark.parametrize(
    ("monitor", "values", "best"),
    [
        ("map_at_r", [0.2, 0.5, 0.4], 2),
        ("triplet_loss", [0.2, 0.1, 0.3], 2),
        ("roc_auc", [math.nan, 0.6, math.nan], 2),
    ],
)
def test_the_best_epoch_is_that_of_the_figure_chosen(monitor: str, values: list[float], best: int) -> None:
    progress = Progress()
    found = []
    for epoch, value in enumerate(values, 1):
        progress.step = 5 * epoch
        found.append(progress.note({monitor: value, "other": epoch}, monitor, steps=5))
    assert progress.best_step == 5 * best and progress.stale == len(values) - best
    assert progress.best_figures["other"] == best == len(found) - found[::-1].index(True)
    assert progress.history == pytest.approx(values, nan_ok=True)


def test_a_monitor_needs_what_it_is_made_from() -> None:
    with pytest.raises(ValueError, match="monitor=knn_roc_auc needs probe_images above 0"):
        Train(monitor="knn_roc_auc", probe_images=0)


def test_a_run_validates_when_it_is_due_and_exports_the_average(tiny_experiment: Any, tmp_path: Path) -> None:
    settings = {"epochs": 3, "validate_every": 2, "ema": 0.5, "probe_images": 30, "monitor": "triplet_loss"}
    experiment = tiny_experiment(
        tmp_path / "run",
        train={**settings, "patience": 0},
        loader={"steps_per_epoch": 1, "global_batch": 8, "size": 32, "threads": 1},
    )
    encoder.run(experiment, World())
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    validated = {row["epoch"]: row for row in rows if "val_roc_auc" in row}
    assert list(validated) == [2, 3]
    about = json.loads((tmp_path / "run/encoder.json").read_text())
    best = min(validated.values(), key=lambda row: row["val_triplet_loss"])
    assert about["best_epoch"] == best["epoch"] and about["validation_roc_auc"] == best["val_roc_auc"]
    assert {f"val_{name}": value for name, value in about["validation"].items()}.items() <= best.items()
    assert {"val_knn_roc_auc", "val_probe_roc_auc", "val_recall_at_5", "val_map_at_r"} <= best.keys()
    last = torch.load(tmp_path / "run/checkpoints/step-00000003.pt", weights_only=True)
    if about["best_epoch"] == 3:
        assert all(torch.equal(last["best"][name], value) for name, value in last["ema"].items())
    assert not torch.equal(last["ema"]["backbone.fc.weight"], last["learner"]["encoder.backbone.fc.weight"])


def test_an_average_is_judged_by_centroids_of_its_own(
    tiny_experiment: Any, tiny_shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the probe images as it embeds them; the epoch's are of the weights that it averages."""
    made, asked, of, score = [], [], Centroids.of, Centroids.score

    def noted(vectors: np.ndarray, labels: np.ndarray, classes: int) -> Centroids:
        made.append((vectors, labels, of(vectors, labels, classes)))
        return made[-1][2]

    monkeypatch.setattr(Centroids, "of", noted)
    monkeypatch.setattr(Centroids, "score", lambda self, *rest: asked.append(self) or score(self, *rest))
    experiment = tiny_experiment(
        tmp_path / "run",
        train={"epochs": 1, "ema": 0.9, "probe_images": 30},
        loader={"steps_per_epoch": 2, "global_batch": 8, "size": 32, "threads": 1},
    )
    encoder.run(experiment, World())
    ((vectors, labels, centroids),) = made
    assert asked == [centroids]
    loaded, _ = load_encoder(tmp_path / "run", torch.device("cpu"))
    drawn = draw(tiny_shards.labels, tiny_shards.split("train"), 30, seed=0)
    with evaluation_loader(tiny_shards, drawn, experiment, World()) as loader:
        _, found = embed(loaded, loader, precision=torch.float32)
    np.testing.assert_allclose(vectors, found, atol=1e-5)
    assert np.array_equal(labels, tiny_shards.labels[drawn])
