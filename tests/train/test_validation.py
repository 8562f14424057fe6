"""Validation figures: kNN against scikit-learn, the probe, what they learn from, the best epoch."""

import json
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from configs.training import Monitor, Train
from shards.shardset import ShardSet
from train import encoder, validation
from train.centroids import Centroids
from train.distributed import World
from train.embed import embed, evaluation_loader
from train.influence import standard_error
from train.progress import LOWER_IS_BETTER, Progress
from train.runfolder import load_encoder
from train.validation import TEMPERATURE, Embedded, Figures, draw, figures, linear_probe, neighbours


def embedded(count: int, seed: int, apart: float = 1.0) -> Embedded:
    """Unit vectors (count, 8) of two classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4 // 3
    vectors = torch.randn(count, 8, generator=generator) + apart * F.one_hot(labels, 8)
    return Embedded(np.arange(count), F.normalize(vectors, dim=1).numpy(), labels.numpy())


def found(held: Embedded, known: Embedded | None, monitor: str = "roc_auc") -> Figures:
    """Validation figures; the score is along the direction that the classes lie apart in."""
    direction = np.eye(8, dtype=np.float32)[1] - np.eye(8, dtype=np.float32)[0]
    return figures(
        held,
        known,
        held.vectors @ direction,
        held.index // 2,
        positive=1,
        margin=0.2,
        monitor=monitor,
        world=World(),
    )


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
    near, far = (found(embedded(80, 1, a), embedded(120, 2, a)).values for a in (0.3, 4))
    aucs = {"roc_auc", "knn_roc_auc", "probe_roc_auc"}
    assert near.keys() == far.keys() == {*validation.retrieval.COLUMNS, *aucs}
    assert near.keys() == set(get_args(Monitor))
    for name in near:
        assert (far[name] < near[name]) if name in LOWER_IS_BETTER else (far[name] > near[name])
    without = found(embedded(80, 1), None).values
    assert without.keys() == {*validation.retrieval.COLUMNS, "roc_auc"}


def test_what_is_learnt_from_is_of_training_and_balanced(tiny_shards: ShardSet) -> None:
    train = tiny_shards.split("train")
    drawn = draw(tiny_shards.labels, train, 20, seed=3)
    assert np.isin(drawn, train).all() and len(np.unique(drawn)) == 20 and (np.diff(drawn) > 0).all()
    assert np.bincount(tiny_shards.labels[drawn]).tolist() == [10, 10]
    assert np.array_equal(drawn, draw(tiny_shards.labels, train, 20, seed=3))
    assert not np.array_equal(drawn, draw(tiny_shards.labels, train, 20, seed=4))
    many = draw(tiny_shards.labels, train, 10_000, seed=3)
    assert np.array_equal(many, train)


@pytest.mark.parametrize("monitor", get_args(Monitor))
def test_a_figure_says_what_each_group_contributes(monitor: str) -> None:
    held, known = embedded(80, 1), embedded(120, 2)
    parts = found(held, known, monitor).parts
    assert parts.shape == (40,) and abs(parts.sum()) < 1e-9 < standard_error(parts) < 0.2
    twice = Embedded(
        np.repeat(held.index, 2), *(np.repeat(a, 2, axis=0) for a in (held.vectors, held.labels))
    )
    if monitor.endswith("roc_auc"):  # images that say the same, of the same groups, make it no surer
        assert standard_error(found(twice, known, monitor).parts) == pytest.approx(standard_error(parts))


NAN = math.nan


def noted(monitor: str, values: list[float], *, tolerance: float, error: float = 0.01) -> Progress:
    """Validations one after the other; any two of them differ with the same standard error."""
    progress, taken = Progress(), []
    settings = Train.model_validate({"monitor": monitor, "tolerance": tolerance})
    for epoch, value in enumerate(values, 1):
        progress.step = 5 * epoch
        parts = error / math.sqrt(2) * np.eye(len(values))[epoch - 1]
        figures = {monitor: value, "other": epoch}
        taken.append(progress.note(figures, parts, of="this set", settings=settings, steps=5))
    assert progress.best_figures["other"] == progress.best_step / 5 == len(taken) - taken[::-1].index(True)
    assert progress.stale == len(values) - progress.top_step / 5
    assert progress.history == pytest.approx(values, nan_ok=True)
    return progress


@pytest.mark.parametrize(
    ("monitor", "values", "taken", "top"),
    [
        ("map_at_r", [0.2, 0.5, 0.4], 2, 2),
        ("map_at_r", [0.2, 0.5, 0.495], 3, 2),
        ("map_at_r", [0.2, 0.5, 0.495, 0.48, 0.491], 5, 2),
        ("map_at_r", [0.5, 0.494, 0.488], 2, 1),  # each is set against the best, not against the one before
        ("map_at_r", [0.5, 0.494, 0.51, 0.4], 3, 3),
        ("map_at_r", [0.5, 0.5], 2, 1),
        ("triplet_loss", [0.2, 0.1, 0.3], 2, 2),
        ("triplet_loss", [0.2, 0.1, 0.105], 3, 2),
        ("roc_auc", [NAN, 0.6, NAN], 2, 2),
    ],
)
def test_the_epoch_taken_is_the_newest_within_a_standard_error_of_the_best(
    monitor: str, values: list[float], taken: int, top: int
) -> None:
    progress = noted(monitor, values, tolerance=1)
    assert (progress.best_step, progress.top_step) == (5 * taken, 5 * top)
    progress = noted(monitor, values, tolerance=0)
    assert progress.best_step == progress.top_step == 5 * top


def test_figures_that_do_not_vary_take_the_first_of_equal_ones() -> None:
    assert noted("roc_auc", [0.9, 1.0, 1.0, 1.0], tolerance=1, error=0).best_step == 10


def test_epochs_are_not_compared_across_shard_sets() -> None:
    progress, settings = noted("roc_auc", [0.9, 0.8], tolerance=1), Train()
    progress.step = 15
    assert progress.note({"roc_auc": 0.7}, np.zeros(3), of="another set", settings=settings, steps=5)
    assert (progress.top, progress.top_step, progress.best_step, progress.stale) == (0.7, 15, 15, 0)


def test_the_line_of_a_validation_says_why_it_is_taken() -> None:
    lines = [
        noted("knn_roc_auc", [0.5, 0.8, 0.794, 0.7][:count], tolerance=1).said("knn_roc_auc", 5)
        for count in (2, 3, 4)
    ]
    assert lines == [
        "epoch 2: validation knn AUC 0.800 (best)",
        "epoch 3: validation knn AUC 0.794 (taken, 0.6 standard errors behind the best, 0.800)",
        "epoch 4: validation knn AUC 0.700 (10.0 standard errors behind the best, 0.800)",
    ]


@pytest.mark.parametrize("known", ["best", "best_auc"])
def test_what_older_checkpoints_took_for_best_is_what_newer_figures_are_set_against(known: str) -> None:
    recorded = {"step": 10, known: 0.8, "best_step": 5, "history": [0.8, 0.7], "stale": 1, "run_id": None}
    progress = Progress.of(recorded)
    assert (progress.top, progress.top_step, progress.best_step) == (0.8, 5, 5)
    progress.step = 15
    assert not progress.note({"roc_auc": 0.79}, np.ones(3), of="this set", settings=Train(), steps=5)
    progress.step = 20
    assert progress.note({"roc_auc": 0.81}, np.ones(3), of="this set", settings=Train(), steps=5)
    assert (progress.top, progress.top_step, progress.best_step) == (0.81, 20, 20)
    assert Progress.of({"step": 0}).top is None


def test_a_monitor_needs_what_it_is_made_from() -> None:
    with pytest.raises(ValueError, match="monitor=knn_roc_auc needs probe_images above 0"):
        Train(monitor="knn_roc_auc", probe_images=0)


def test_a_run_validates_when_it_is_due_and_exports_the_average(tiny_experiment: Any, tmp_path: Path) -> None:
    settings = {"epochs": 3, "validate_every": 2, "ema": 0.5, "probe_images": 30}
    settings |= {"monitor": "triplet_loss", "tolerance": 0}
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
    assert about["best_epoch"] == best["epoch"]
    assert about["validation_roc_auc"] == best["val_roc_auc"]
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
