"""An interrupted run ends as the uninterrupted one: the same weights, the same log."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import UserError
from configs.schema import Experiment
from pipeline.loader import Batch
from train import encoder
from train.distributed import World, world

CLOCK = {"time", "images_per_second", "data_wait", "val_seconds", "seconds_left"}
"""Figures of speed, which no two runs share."""


class StoppedError(Exception):
    """Stands for whatever ends a run."""


def train(experiment: Experiment) -> None:
    """Run the stage in this process."""
    with world() as here:
        encoder.run(experiment, here)


def train_until(step: int, experiment: Experiment, here: World | None = None) -> None:
    """Run the stage in this process, and end it once `step` steps are done."""
    plain = encoder.Trainer.train_step

    def stopping(trainer: encoder.Trainer, batch: Batch) -> Any:
        if trainer.progress.step == step:
            raise StoppedError
        return plain(trainer, batch)

    with mock.patch.object(encoder.Trainer, "train_step", stopping), pytest.raises(StoppedError):
        encoder.run(experiment, here or World())


def lines(folder: Path) -> list[dict[str, float]]:
    """`metrics.jsonl` without the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def assert_equal_runs(folder: Path, reference: Path) -> None:
    """Weights, what is said of them, every logged line, and the last checkpoint are equal."""
    mine, theirs = load_file(folder / "encoder.safetensors"), load_file(reference / "encoder.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (folder / "encoder.json").read_text() == (reference / "encoder.json").read_text()
    assert lines(folder) == lines(reference)
    last, expected = (
        torch.load(run / "checkpoints" / checkpoints(run)[-1], weights_only=True)
        for run in (folder, reference)
    )
    for part in ("learner", "optimizer", "centroids"):
        torch.testing.assert_close(last[part], expected[part], rtol=0, atol=0)


def checkpoints(folder: Path) -> list[str]:
    """Names of a run's checkpoints, oldest first."""
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


def test_a_run_leaves_what_it_promises(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} >= {"config.yaml", "environment.json", "encoder.json"}
    best = 4 * json.loads((trained / "encoder.json").read_text())["best_epoch"]
    assert checkpoints(trained) == [f"step-{step:08d}.pt" for step in sorted({6, 8, best})]
    logged = lines(trained)
    assert [row["step"] for row in logged if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in logged if "val_roc_auc" in row] == [4, 8]
    assert len({row["loss"] for row in logged if "loss" in row}) == 8


def test_a_stopped_run_ends_as_the_whole_one(tiny_experiment: Any, trained: Path, tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path / "run")
    train_until(7, experiment)
    assert checkpoints(tmp_path / "run")[-1] == "step-00000006.pt"
    train(experiment)
    assert_equal_runs(tmp_path / "run", trained)


def test_a_truncated_newest_checkpoint_is_passed_over(
    tiny_experiment: Any,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    experiment = tiny_experiment(tmp_path / "run")
    train_until(7, experiment)
    newest = tmp_path / "run/checkpoints/step-00000006.pt"
    with newest.open("r+b") as file:
        file.truncate(newest.stat().st_size // 2)
    train(experiment)
    assert "step-00000006.pt: damaged checkpoint passed over" in capsys.readouterr().out
    assert_equal_runs(tmp_path / "run", trained)


def test_a_checkpoint_of_an_older_version_is_gone_on_from(
    tiny_experiment: Any, trained: Path, tmp_path: Path
) -> None:
    """One that knew one validation figure and neither averages nor counts of skipped steps."""
    experiment = tiny_experiment(tmp_path / "run")
    train_until(7, experiment)
    newest = tmp_path / "run/checkpoints/step-00000006.pt"
    state = torch.load(newest, weights_only=True)
    for part in ("scaler", "ema", "guard", "figures"):
        del state[part]
    recorded, made_by = state["progress"], json.loads(state["fingerprint"])
    recorded["best_auc"] = recorded.pop("top")
    for later in ("top_step", "top_parts", "top_of", "behind"):
        del recorded[later]
    del recorded["best_figures"], made_by["train"]["optimizer"], made_by["train"]["monitor"]
    torch.save({**state, "fingerprint": json.dumps(made_by)}, newest)
    train(experiment)
    mine, theirs = (load_file(run / "encoder.safetensors") for run in (tmp_path / "run", trained))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert lines(tmp_path / "run") == lines(trained)


def test_figures_not_yet_logged_and_dropout_are_not_lost(tiny_experiment: Any, tmp_path: Path) -> None:
    """A line is the mean over its steps, of which a checkpoint may have seen but some."""
    tracking = {"mode": "disabled", "log_every": 4}
    for name in ("whole", "cut"):
        experiment = tiny_experiment(
            tmp_path / name,
            model={"backbone": "mobilenet_v3_small", "embedding_dim": 16},
            tracking=tracking,
            train={"epochs": 1, "checkpoint_every": 3, "probe_images": 0, "ema": 0.9},
        )
        if name == "cut":
            train_until(3, experiment)
        train(experiment)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert [row["step"] for row in lines(tmp_path / "cut")] == [4, 4]


def test_a_changed_configuration_is_gone_on_with_if_it_is_allowed_by_name(
    tiny_experiment: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    train_until(3, tiny_experiment(folder))
    changed = {"epochs": 1, "lr": 1e-4, "weight_decay": 0.3, "probe_images": 0, "patience": 0}
    allowed = {"allow_changed": ("train.lr", "train.epochs")}
    with pytest.raises(
        UserError, match=r"  train\.weight_decay: 0\.05 → 0\.3\nchoose .*changed=\[train\.weight_decay\]"
    ) as refused:
        train(tiny_experiment(folder, train=changed | allowed))
    assert "train.lr" not in str(refused.value)
    train(tiny_experiment(folder, train=changed | {"allow_changed": ("train",)}))
    logged = lines(folder)
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 4]
    assert logged[3]["lr"] == 1e-4  # the last step of the warm-up
    last = torch.load(folder / "checkpoints/step-00000004.pt", weights_only=True)
    assert [group["weight_decay"] for group in last["optimizer"]["param_groups"]] == [0.3, 0]


def test_another_configuration_is_refused_by_its_keys(tiny_experiment: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_until(4, tiny_experiment(folder))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError, match=r"  loss\.margin: soft → 0\.3\n  train\.lr: 0\.0003 → 0\.0001\nchoose"
    ):
        train(
            tiny_experiment(folder, loss={"mining": "random", "margin": 0.3}, train={"epochs": 2, "lr": 1e-4})
        )
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
