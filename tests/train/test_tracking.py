"""One W&B run a run folder, whatever happens to it; `metrics.jsonl` always; rank 0 only."""

import gzip
import json
import math
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from wandb.proto import wandb_internal_pb2

from configs.errors import UserError
from configs.schema import Experiment, Run, Tracking
from pipeline.environment import environment
from shards.shardset import ShardSet
from train import tracking
from train import window as tracking_window
from train.distributed import world
from train.encoder import run
from train.signals import StoppedError
from train.tracking import Tracker
from train.window import Window


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


def written(path: Path) -> list[Any]:
    """The messages of W&B's log, whole: its own process may still be writing when `finish` returns."""
    deadline = time.monotonic() + 30
    while True:
        found = [wandb_internal_pb2.Record.FromString(data) for data in records(path)]
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < deadline
        time.sleep(0.05)


def records(path: Path) -> Iterator[bytes]:
    """The records of W&B's log: LevelDB's log format, in blocks of 32 KiB, after seven bytes of its own.

    One that is still being written is left out."""
    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if place + 7 + length > len(data):
            return
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def contents(run: Path) -> dict[str, Any]:
    """What an offline run holds, read back with W&B's own messages."""
    found: dict[str, Any] = {"history": [], "summary": {}, "config": {}, "artifacts": {}, "alerts": []}
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    for record in written(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind in ("history", "summary"):
            items = record.history.item if kind == "history" else record.summary.update
            values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            found["history"].append(values) if kind == "history" else found["summary"].update(values)
        elif kind == "artifact":
            found["artifacts"][record.artifact.name] = record.artifact
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            found["artifacts"][record.request.log_artifact.artifact.name] = (
                record.request.log_artifact.artifact
            )
        elif kind == "alert":
            found["alerts"].append((record.alert.title, record.alert.text))
    return found


def test_what_an_offline_run_holds(tiny_experiment: Any, tmp_path: Path) -> None:
    """Trained for real, then read back: config, code, group, curves, pictures, table, both artifacts."""
    settings = {
        "mode": "offline",
        "log_every": 1,
        "group": "folds",
        "tags": ("a",),
        "triplets": 3,
        "images": 4,
    }
    made = tiny_experiment(tmp_path / "run", tracking={**settings, "profile": "2:4"})
    with world() as here:
        run(made, here)
    held = contents(tmp_path / "run")
    assert (held["run"].run_group, list(held["run"].tags), held["run"].project) == (
        "folds",
        ["a"],
        "moleprint",
    )
    assert held["config"]["train"]["epochs"] == made.train.epochs
    assert held["config"]["environment"] == environment()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["encoder/loss"] for row in held["history"] if "encoder/loss" in row]
    assert losses == [row["loss"] for row in lines if "loss" in row] and len(losses) == 8
    assert all(row["seconds_left"] >= 0 for row in lines if "loss" in row) and lines[-2]["seconds_left"] == 0
    for name, count, validations in (("augmented", 4, 1), ("hardest_triplets", 3, 2)):
        counts = [row.get(f"encoder/{name}/count") for row in held["history"]]
        assert [count for count in counts if count] == [count] * validations
    tables = [row["encoder/embeddings/nrows"] for row in held["history"] if "encoder/embeddings/nrows" in row]
    assert tables == [len(ShardSet.of(made).split("val"))] * 2
    shards = held["artifacts"][f"{Path(made.pack.output).parent.name}-shards"]
    assert (shards.type, shards.use_after_commit) == ("dataset", True)
    assert json.loads(shards.metadata)["sha256"] == ShardSet.of(made).sha256
    entries = {entry.path: entry for entry in shards.manifest.contents}
    assert entries["dataset.json"].ref == (Path(made.pack.output) / "dataset.json").resolve().as_uri()
    encoder = held["artifacts"]["run-encoder"]
    assert (encoder.type, encoder.use_after_commit, sorted(encoder.aliases)) == (
        "model",
        False,
        ["best", "latest"],
    )
    assert {entry.path for entry in encoder.manifest.contents} == {"encoder.safetensors", "encoder.json"}
    (trace,) = (tmp_path / "run/trace").iterdir()
    assert trace.name == "rank-0-steps-2-4.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert any("convolution" in event.get("name", "") for event in events)


def test_alerts_are_told_once_and_nothing_that_is_not_finite_is_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(UserError),
        Tracker(experiment(tmp_path / "run", "offline"), "encoder") as tracker,
    ):
        tracker.log(1, {"loss": 1.0})
        tracker.log(2, {"loss": math.nan})
        tracker.log(3, {"loss": math.inf})
        for step in (3, 4):
            tracker.alert(step, "collapse", "nearly one point")
        raise UserError("it diverged")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [("loss" in row, row["step"]) for row in rows] == [(True, 1), (False, 2), (False, 3)]
    titles = [title for title, _ in contents(tmp_path / "run")["alerts"]]
    assert titles == ["not finite", "collapse", "encoder ended"]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert told == ["warning: step 2: not finite: loss", "warning: step 3: collapse: nearly one point"]


def test_nobody_waits_for_a_network_that_swallows_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that takes connections and never answers: lines are logged meanwhile, and stay on disk."""
    hole = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{hole.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "REACHED", 3)
    wandb.teardown()  # what it knows of another server
    started = time.perf_counter()
    tracker = Tracker(experiment(tmp_path / "run", "online"), "encoder")
    for step in range(1, 101):
        tracker.log(step, {"loss": 1 / step})
    assert time.perf_counter() - started < 1.5
    assert len(steps(tmp_path / "run")) == 100
    tracker.close()
    hole.close()
    assert "W&B cannot be reached" in capsys.readouterr().err
    losses = [row["encoder/loss"] for row in contents(tmp_path / "run")["history"]]
    assert losses == [1 / step for step in range(1, 101)]
    wandb.teardown()


def test_a_client_that_fails_is_told_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Failing:
        """A W&B run whose every call fails."""

        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("broken pipe")

    window = Window(Failing)
    for _ in range(3):
        window.do(lambda run: run.log({}))
    window.close(failed=False)
    assert capsys.readouterr().err.count("W&B: broken pipe") == 1


def test_a_stage_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking_window, "PATIENCE", 0)
    monkeypatch.setattr(tracking_window, "REACHED", 0.1)
    window = Window(lambda: None)
    freed = threading.Event()
    window.do(lambda run: freed.wait())
    window.close(failed=False)
    assert "not all could be sent in time" in capsys.readouterr().err
    freed.set()


def test_after_an_error_it_waits_less_than_torchrun_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which kills what is left 30 s after the first rank: the error would never be told."""
    assert tracking_window.BROKEN_OFF < 30
    monkeypatch.setattr(tracking_window, "BROKEN_OFF", 0.1)
    begins, begun = threading.Event(), threading.Event()

    def start(*_: Any) -> None:
        begins.wait()
        begun.set()
        raise RuntimeError("too late to be told")

    monkeypatch.setattr(tracking, "_start", start)
    with pytest.raises(UserError), Tracker(experiment(tmp_path / "run", "offline"), "encoder"):
        raise UserError("it diverged")
    begins.set()
    assert begun.wait(10)
    said = capsys.readouterr().err
    assert "not all could be sent in time" in said and "too late" not in said


@pytest.mark.parametrize(
    ("error", "alerts"), [(RuntimeError("out of memory"), 1), (StoppedError("told to stop"), 0)]
)
def test_an_error_is_an_alert_and_a_stop_is_none(error: Exception, alerts: int, tmp_path: Path) -> None:
    with pytest.raises(type(error)), Tracker(experiment(tmp_path / "run", "offline"), "encoder"):
        raise error
    assert contents(tmp_path / "run")["alerts"] == [("encoder ended", str(error))] * alerts
