"""The schedule, and what a finished run says of itself."""

import json
import math
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from configs.errors import UserError
from configs.training import Train
from pipeline.source import Source
from shards.files import sha256
from shards.shardset import ShardSet
from train import encoder, model, result
from train.centroids import Centroids
from train.distributed import World, world
from train.runfolder import load_encoder
from train.schedule import learning_rate


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    settings = Train(epochs=10, lr=0.5, warmup=2)
    rates = [learning_rate(settings, step, 50) for step in range(500)]
    assert rates[:100] == pytest.approx([0.5 * (step + 1) / 100 for step in range(100)])
    cosine = [0.25 * (1 + math.cos(math.pi * step / 400)) for step in range(400)]
    assert rates[100:] == pytest.approx(cosine)
    assert learning_rate(settings, 500, 50) == learning_rate(settings, 900, 50) == pytest.approx(0)


@pytest.mark.parametrize(("warmup", "epochs"), [(0, 1), (0.3, 2), (1, 1), (5, 3)])
def test_any_warm_up_gives_a_usable_rate(warmup: float, epochs: int) -> None:
    settings = Train(epochs=epochs, lr=1e-3, warmup=warmup)
    rates = [learning_rate(settings, step, 7) for step in range(7 * epochs)]
    assert all(0 < rate <= 1e-3 for rate in rates)


def test_the_centroid_score_is_a_difference_of_cosines() -> None:
    centroids = Centroids(3, 2, torch.device("cpu"))
    vectors = torch.tensor([[1.0, 0], [1, 0], [0, 1], [-1, 0]])
    good = torch.tensor(True)
    centroids.add(vectors[:2], torch.tensor([0, 0]), good)
    centroids.add(vectors[2:], torch.tensor([1, 2]), good)
    centroids.add(vectors * torch.nan, torch.tensor([0, 1, 2, 0]), ~good)
    score = centroids.score(np.array([[0, 1], [1, 0], [-1, 0]], np.float32), positive=1)
    assert score.tolist() == pytest.approx([1, -1, -1])
    whole = Centroids.of(vectors.numpy(), np.array([0, 0, 1, 2]), 3)
    assert torch.equal(whole.state(), centroids.state())
    other = Centroids(3, 2, torch.device("cpu"))
    other.load(centroids.state())
    centroids.clear()
    assert (other.state() != centroids.state()).any() and (centroids.state() == 0).all()


def test_the_encoder_says_what_it_was_made_from(trained: Path, tiny_shards: ShardSet) -> None:
    loaded, about = load_encoder(trained, torch.device("cpu"))
    assert not loaded.training
    assert about["preprocessing"] == {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    assert (about["embedding_dim"], about["epochs"]) == (16, 2)
    assert about["classes"] == list(tiny_shards.classes) and about["positive"] == tiny_shards.positive
    assert about["shards_sha256"] == tiny_shards.sha256
    assert about["encoder_sha256"] == sha256(trained / "encoder.safetensors")
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    validated = [row for row in rows if "val_roc_auc" in row]
    newest = torch.load(max((trained / "checkpoints").glob("*.pt")), weights_only=True)["progress"]
    top = max(validated, key=lambda row: row["val_roc_auc"])
    best = validated[-1] if newest["behind"] < 1 else top  # within a standard error of it, or it
    assert newest["top"] == top["val_roc_auc"]
    assert about["validation_roc_auc"] == best["val_roc_auc"]
    assert about["best_epoch"] == best["epoch"]


def test_the_log_says_what_is_worth_watching(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert steps[0].keys() >= {
        "triplet",
        "classification",
        "active_triplets",
        "spread",
        "uniformity",
        "alignment",
        "effective_rank",
        "distance_positive_p90",
        "distance_negative_p10",
        "lr",
        "grad_norm",
        "epoch",
    }
    for row in steps:
        assert row["stage"] == "encoder" and row["replaced_samples"] == 0
        assert row["loss"] == pytest.approx(0.1 * row["triplet"] + row["classification"], rel=1e-5)
        assert 0 <= row["data_wait"] <= 1 and row["images_per_second"] > 0 and row["grad_norm"] > 0
    assert [row["lr"] for row in steps] == [learning_rate(Train(epochs=2), step, 4) for step in range(8)]


def test_bad_steps_are_skipped_and_then_end_the_run(
    tiny_experiment: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = encoder.Trainer.train_step

    def poisoned(trainer: encoder.Trainer, batch: Any) -> Any:
        if trainer.progress.step in (1, 3, 5, 6, 7):
            batch.images[3, 0, 0, 0] = math.nan
        return plain(trainer, batch)

    settings = {"epochs": 2, "patience": 0, "probe_images": 0, "max_bad_steps": 3, "checkpoint_every": 1}
    experiment = tiny_experiment(tmp_path / "run", train={**settings, "keep": 9})
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UserError, match=r"3 steps in a row .* from step 6 on, which began on rank 0 "),
    ):
        patch.setattr(encoder.Trainer, "train_step", poisoned)
        encoder.run(experiment, World())
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows if "epoch" in row and "lr" in row] == [0, 1, 1, 2, 2, 3, 4]
    assert ["loss" in row for row in rows if "lr" in row] == [True, False, True, False, True, False, False]
    assert rows[4]["val_roc_auc"] > 0 and "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()
    kept = sorted(path.stem for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == [f"step-{step:08d}" for step in (1, 3, 4, 5)]  # an epoch's end, else none after a bad step
    assert "warning: step 2: not finite: steps skipped so far: 1" in capsys.readouterr().err
    encoder.run(experiment, World())  # it goes on, and does not tell again of what it has told
    assert "not finite" not in capsys.readouterr().err


def test_a_skipped_step_is_told_of_by_the_next_process_if_this_one_could_not(
    tiny_experiment: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = encoder.Trainer.train_step

    def poisoned(trainer: encoder.Trainer, batch: Any) -> Any:
        if trainer.progress.step == 0:
            batch.images[3, 0, 0, 0] = math.nan
        if trainer.progress.step == 2:
            raise KeyboardInterrupt  # after step 2 is saved, before a line is logged
        return plain(trainer, batch)

    settings = {"epochs": 1, "patience": 0, "probe_images": 0, "checkpoint_every": 2}
    experiment = tiny_experiment(tmp_path / "run", train=settings, tracking={"log_every": 100})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(encoder.Trainer, "train_step", poisoned)
        encoder.run(experiment, World())
    assert "not finite" not in capsys.readouterr().err
    encoder.run(experiment, World())
    assert "not finite: steps skipped so far: 1" in capsys.readouterr().err


def test_damage_is_counted_over_all_ranks(tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample once, however many ranks met it."""
    source = Source(tiny_shards, max_bad=3 / len(tiny_shards))
    source.substitutes.update({1: 2, 5: 6})
    trainer = Namespace(shards=tiny_shards, data=Namespace(training=Namespace(source=source)))
    count = encoder.Trainer._replaced
    assert count(trainer) == 2  # type: ignore[arg-type]
    monkeypatch.setattr(encoder, "union", lambda mine: mine | {5, 7})
    assert count(trainer) == 3  # type: ignore[arg-type]
    monkeypatch.setattr(encoder, "union", lambda mine: mine | {7, 8})
    with pytest.raises(UserError, match=r"4 samples are damaged .* allowed are 3 \(loader.max_bad\)"):
        count(trainer)  # type: ignore[arg-type]


class Small(nn.Module):
    """A backbone that is compiled in a blink."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 8 * 8, 16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.fc(self.norm(self.conv(images)).flatten(1))
        return features


def test_a_compiled_encoder_is_not_compiled_again(
    tiny_experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter, frames = CompileCounter(), []
    compiled, validated = nn.Module.compile, encoder.Trainer.validate
    monkeypatch.setattr(nn.Module, "compile", lambda m, **named: compiled(m, backend=counter, **named))

    def validate(trainer: encoder.Trainer) -> None:
        validated(trainer)
        frames.append(counter.frame_count)

    monkeypatch.setattr(encoder.Trainer, "validate", validate)
    monkeypatch.setattr(model, "build", lambda settings, **_: model.Encoder(Small(), "fc", settings))
    settings = {"epochs": 2, "patience": 0, "probe_images": 16, "compile": True}
    loader = {"global_batch": 8, "size": 32, "steps_per_epoch": 2, "threads": 1}
    encoder.run(tiny_experiment(tmp_path / "run", train=settings, loader=loader), World())
    assert frames[0] == frames[1] > 0


def test_every_option_of_model_and_loss_trains_and_is_rebuilt(tiny_experiment: Any, tmp_path: Path) -> None:
    options = {"freeze": 2, "layer_decay": 0.5, "projection": "mlp", "bnneck": True}
    experiment = tiny_experiment(
        tmp_path / "run",
        model={"backbone": "timm/test_resnet", "embedding_dim": 16, **options},
        loader={"global_batch": 8, "size": 32, "steps_per_epoch": 2, "threads": 1},
        loss={"mining": "random", "schedule": {"batch_hard": 0.5}, "supcon": 0.5, "arcface": 0.5},
        train={"epochs": 2, "micro_batch": 4, "lr": 1e-3},
    )
    before = dict(model.build(experiment.model, size=32, seed=0).named_parameters())
    with world() as here:
        encoder.run(experiment, here)
    loaded, _ = load_encoder(tmp_path / "run", torch.device("cpu"))
    for name, parameter in loaded.named_parameters():
        still = name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1", "neck.bias"))
        assert torch.equal(parameter, before[name]) == still, name
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert steps[0]["supcon"] > 0 and steps[0]["arcface"] > 0
    assert all(min(row["supcon"], row["arcface"]) >= 0 for row in steps)  # 0 once a batch is apart
    # The second epoch's negatives are the nearest: nearer than most are.
    assert all(row["distance_negative"] < row["distance_negative_p50"] for row in steps[2:])


def test_a_finished_run_knows_it_and_does_not_train_again(
    trained: Path, tiny_experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = tiny_experiment(trained)
    assert result.finished(experiment)
    assert result.finished(tiny_experiment(trained, evaluate={"seed": 3}))
    assert not result.finished(tiny_experiment(trained, train={"epochs": 9}))
    assert not result.finished(tiny_experiment(trained.parent / "none"))
    before = sha256(trained / "encoder.safetensors")
    monkeypatch.delattr(encoder.Trainer, "train_step")
    with world() as here:
        encoder.run(experiment, here)
    assert sha256(trained / "encoder.safetensors") == before
