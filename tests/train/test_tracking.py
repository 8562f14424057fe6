"""One W&B run a run folder, whatever happens to it; `metrics.jsonl` always; rank 0 only."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb

from configs.schema import Experiment, Run, Tracking
from train.tracking import Tracker


def experiment(folder: Path, mode: str = "disabled") -> Experiment:
    """An experiment of a run folder."""
    return Experiment(run=Run(folder=folder), tracking=Tracking(mode=mode))  # type: ignore[arg-type]


def steps(folder: Path) -> list[tuple[str, int]]:
    """(stage, step) of every line of `metrics.jsonl`."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["stage"], row["step"]) for row in rows]


def log(folder: Path, stage: str, first: int, last: int, **arguments: Any) -> str | None:
    """Log steps first..last of a stage; returns the run's id."""
    with Tracker(experiment(folder), stage, **arguments) as tracker:
        for step in range(first, last + 1):
            tracker.log(step, {"loss": 1 / step})
    return tracker.run_id


def test_lines_after_the_step_of_a_resume_are_dropped(tmp_path: Path) -> None:
    log(tmp_path, "encoder", 1, 5)
    log(tmp_path, "classifier", 1, 4)
    log(tmp_path, "encoder", 4, 6, after=3)
    assert steps(tmp_path) == [
        *(("encoder", step) for step in (1, 2, 3)),
        *(("classifier", step) for step in (1, 2, 3, 4)),
        *(("encoder", step) for step in (4, 5, 6)),
    ]
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    assert row["loss"] == 0.5 and row["time"] > 1.7e9


@pytest.mark.parametrize(
    "tail", ['{"stage": "encoder", "st', '{"stage": "encoder", "step": 2}', "\\x00\\x00\n"]
)
def test_a_half_written_line_is_dropped(tail: str, tmp_path: Path) -> None:
    log(tmp_path, "encoder", 1, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    log(tmp_path, "encoder", 2, 2, after=5)
    assert steps(tmp_path) == [("encoder", 1), ("encoder", 2)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    assert log(tmp_path, "encoder", 1, 3, rank=1) is None
    with Tracker(experiment(tmp_path, "offline"), "encoder", rank=1) as tracker:
        tracker.images("x", torch.zeros(1, 3, 4, 4), ["a"])
        tracker.figures({"auc": 1.0}, {})
    assert not list(tmp_path.iterdir())


def test_disabled_writes_the_log_and_no_wandb_folder(tmp_path: Path) -> None:
    run_id = log(tmp_path / "run", "encoder", 1, 2)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"metrics.jsonl", "wandb.json"}
    assert json.loads((tmp_path / "run/wandb.json").read_text()) == {"id": run_id}


def test_the_id_of_a_checkpoint_is_taken_up_and_the_folders_goes_first(tmp_path: Path) -> None:
    assert log(tmp_path / "a", "encoder", 1, 1, run_id="fromckpt") == "fromckpt"
    assert log(tmp_path / "a", "encoder", 1, 1, run_id="another") == "fromckpt"
    assert log(tmp_path / "a", "classifier", 1, 1) == "fromckpt"
    assert log(tmp_path / "b", "encoder", 1, 1) != log(tmp_path / "c", "encoder", 1, 1)


def test_checkpoints_hold_the_id_of_the_run_folder(trained: Path) -> None:
    run_id = json.loads((trained / "wandb.json").read_text())["id"]
    for path in (trained / "checkpoints").glob("step-*.pt"):
        assert torch.load(path, weights_only=True)["progress"]["run_id"] == run_id


def test_an_offline_run_is_resumed_under_one_id(tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    with Tracker(experiment(tmp_path / "run", "offline"), "encoder") as tracker:
        tracker.images("augmented", torch.rand(2, 3, 8, 8), ["benign", "melanoma"])
        tracker.log(1, {"loss": 0.5})
    wandb.Image(torch.rand(3, 8, 8)).image.save(picture)
    with Tracker(experiment(tmp_path / "run", "offline"), "evaluate") as other:
        other.figures({"test.roc_auc": 0.9}, {"roc": picture})
    assert tracker.run_id == other.run_id
    written = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(written) == 2  # two in one second: W&B numbers the second folder's name
    assert [path.stem for folder in written for path in folder.glob("*.wandb")] == [f"run-{other.run_id}"] * 2
    texts = (b"encoder/loss", b"encoder/step", b"evaluate/test.roc_auc", b"evaluate/roc", b"melanoma")
    deadline = time.monotonic() + 30  # W&B's own process may still be writing when `finish` returns
    missing: list[bytes] = [b""]
    while missing and time.monotonic() < deadline:
        data = b"".join(path.read_bytes() for folder in written for path in folder.glob("*.wandb"))
        missing = [text for text in texts if text not in data]
        time.sleep(0.05)
    assert not missing
    assert len(list((tmp_path / "run" / "wandb").rglob("*.png"))) == 3


def test_auto_is_offline_where_no_key_is_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    with Tracker(experiment(tmp_path / "run", "auto"), "encoder"):
        pass
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_a_run_goes_on_offline_where_wandb_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = wandb.init

    def unreachable(**arguments: Any) -> Any:
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("no route\nto host")
        return plain(**arguments)

    monkeypatch.setattr(wandb, "init", unreachable)
    with Tracker(experiment(tmp_path / "run", "online"), "encoder") as tracker:
        tracker.log(1, {"loss": 1.0})
    assert "W&B cannot be reached (no route); logging offline" in capsys.readouterr().err
    assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{tracker.run_id}"))
