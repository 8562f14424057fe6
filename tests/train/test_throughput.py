"""`bench train` measures the trainer's own step beside a plain script's, and leaves nothing behind."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.timing import TURNS, take_turns
from train import throughput


def test_every_contestant_trains_and_has_its_row(
    tiny_experiment: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "take_turns", partial(take_turns, turns=1))
    experiment = tiny_experiment(tmp_path / "run", model={"weights": "imagenet"})
    throughput.bench(experiment, tmp_path / "bench.json", warm_up=0.01, seconds=0.01)
    rows = {row["name"]: row for row in json.loads((tmp_path / "bench.json").read_text())}
    assert rows.keys() == {"reference", "moleprint", "moleprint, resident batch"}
    for row in rows.values():
        assert 0 < row["low"] <= row["images_per_second"] <= row["high"]
        assert row["turns"] == TURNS and row["backbone"] == "timm/test_resnet" and row["environment"]
    assert rows["reference"]["ratio"] == 1
    assert "moleprint trains at" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_plain_scripts_triplets_are_triplets() -> None:
    labels = np.array([0, 1, 0, 1, 1, 2])
    found = list(throughput._triplets(labels, np.random.default_rng(0)))
    assert [anchor for anchor, _, _ in found] == [0, 1, 2, 3, 4]  # the last has no positive
    for anchor, positive, negative in found:
        assert anchor != positive and labels[anchor] == labels[positive] != labels[negative]
