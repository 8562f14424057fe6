"""The share of a step that waits for data: none on a resident batch, and what a slow loader makes of it."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.schema import Experiment
from pipeline.loader import Batch, Loader
from train import benchmark
from train.encoder import Trainer

LATE = 0.05  # seconds


def test_the_steps_are_those_of_training(
    tiny_experiment: Callable[..., Experiment],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = set(threading.enumerate())
    shown: list[list[int]] = []
    plain = Trainer.train_step

    def seen(trainer: Trainer, batch: Batch) -> Any:
        shown.append(batch.index.tolist())
        return plain(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", seen)
    file = tmp_path / "step.json"
    benchmark.bench(tiny_experiment(tmp_path / "run"), file, warm_up=0, seconds=0, turns=2)
    resident, ours = json.loads(file.read_text())
    assert [resident["name"], ours["name"]] == ["reference", "moleprint"] and resident["ratio"] == 1
    # A turn is a step of warm-up and one that counts: of the resident batch, of the loader's next two, …
    first, _, second, third, again, _, fourth, fifth = shown
    assert first == again == shown[1] == shown[5]
    assert len({tuple(batch) for batch in (first, second, third, fourth, fifth)}) == 5
    for each in (resident, ours):
        assert 0 <= each["data_wait_low"] <= each["data_wait"] <= each["data_wait_high"] < 1
        assert 0 < each["low"] <= each["images_per_second"] <= each["high"]
        assert each["turns"] == 2 and each["environment"]["cores"] > 0
    assert "Waiting for data: " in capsys.readouterr().out
    assert not (tmp_path / "run").exists(), "measuring is no run"
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith("moleprint")]


def test_waiting_is_what_the_loader_makes_wait(
    tiny_experiment: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Loader._next

    def late(loader: Loader) -> Batch:
        time.sleep(LATE)
        return plain(loader)

    def step(trainer: Trainer, batch: Batch) -> Any:
        time.sleep(LATE)
        return SimpleNamespace(embeddings=torch.zeros(8, 16), labels=batch.labels), None

    monkeypatch.setattr(Loader, "_next", late)
    monkeypatch.setattr(Trainer, "train_step", step)
    file = tmp_path / "step.json"
    benchmark.bench(tiny_experiment(tmp_path / "run"), file, warm_up=0, seconds=4 * LATE, turns=3)
    resident, ours = json.loads(file.read_text())
    assert (
        resident["data_wait"] < 0.05 and ours["data_wait"] > 0.3
    )  # half of it, but for what else is at work
    assert ours["ratio"] < 0.8 and ours["step_milliseconds"] > 2000 * LATE
