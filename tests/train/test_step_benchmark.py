"""The share of a step that waits for data: none on a resident batch, and what a slow loader makes of it."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.schema import Experiment
from pipeline.loader import Batch, Loader
from shards.timing import TURNS
from train import benchmark


@pytest.mark.parametrize("slow", [0.0, 0.1])
def test_waiting_is_what_the_loader_makes_wait(
    slow: float,
    tiny_experiment: Callable[..., Experiment],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = Loader._next

    def late(loader: Loader) -> Batch:
        time.sleep(slow)
        return plain(loader)

    monkeypatch.setattr(Loader, "_next", late)
    experiment = tiny_experiment(tmp_path / "run")
    benchmark.bench(experiment, tmp_path / "step.json", warm_up=0, seconds=0.15)
    resident, ours = json.loads((tmp_path / "step.json").read_text())
    assert [resident["name"], ours["name"]] == ["reference", "moleprint"] and resident["ratio"] == 1
    assert resident["data_wait_high"] < 0.01
    assert 0 <= ours["data_wait_low"] <= ours["data_wait"] <= ours["data_wait_high"] < 1
    if slow:
        assert ours["data_wait"] * ours["step_milliseconds"] > 1000 * slow * 0.9
        assert ours["images_per_second"] < resident["images_per_second"]
    for each in (resident, ours):
        assert each["step_milliseconds"] * each["images_per_second"] == pytest.approx(8000, rel=0.5)
        assert each["turns"] == TURNS and each["environment"]["cores"] > 0
    assert "Waiting for data: " in capsys.readouterr().out
    assert not (tmp_path / "run").exists(), "measuring is no run"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("moleprint")]
