"""Checkpoints appear whole, a damaged newest one is passed over, another configuration's are refused."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.load import fields
from configs.schema import Experiment
from train import checkpoint
from train.checkpoint import FREE
from train.progress import Progress

FINGERPRINT = checkpoint.fingerprint(Experiment(), "abc")


def save(folder: Path, step: int, keep: int = 2) -> None:
    """A small checkpoint of a step."""
    progress = Progress(step=step, top=step / 100, run_id="w1", history=[0.25, step / 100])
    checkpoint.save(folder, FINGERPRINT, progress, {"learner": {"w": torch.full((3,), step)}}, keep=keep)


def loaded(folder: Path) -> tuple[Progress, dict[str, Any]]:
    """The newest checkpoint, which must be there."""
    found = checkpoint.load(folder, FINGERPRINT)
    assert found is not None
    return found


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 7)
    progress, state = loaded(tmp_path)
    assert asdict(progress) == asdict(Progress(7, 0.07, run_id="w1", history=[0.25, 0.07]))
    assert state.keys() == {"learner"} and torch.equal(state["learner"]["w"], torch.full((3,), 7))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100_000_000):
        save(tmp_path, step, keep=3)
    assert loaded(tmp_path)[0].step == 100_000_000
    assert sorted(int(path.stem[5:]) for path in tmp_path.iterdir()) == [9, 10, 100_000_000]


def test_without_any_there_is_none(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "missing", FINGERPRINT) is None
    (tmp_path / ".step-00000001.pt.x.tmp").write_bytes(b"half")
    assert checkpoint.load(tmp_path, FINGERPRINT) is None


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_damaged_newest_one_is_passed_over(
    share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 3)
    save(tmp_path, 4)
    newest = tmp_path / "step-00000004.pt"
    data = newest.read_bytes()
    newest.write_bytes(data[: int(share * len(data))])
    assert loaded(tmp_path)[0].step == 3
    assert "step-00000004.pt: damaged checkpoint passed over" in capsys.readouterr().out
    (tmp_path / "step-00000003.pt").write_bytes(b"")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.load(tmp_path, FINGERPRINT)


def test_a_damaged_newer_one_does_not_push_out_what_is_saved_after_it(tmp_path: Path) -> None:
    for step in (3, 6):
        save(tmp_path, step)
    (tmp_path / "step-00000006.pt").write_bytes(b"damaged")
    save(tmp_path, 4, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004.pt"]


def test_a_failing_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def test_another_configuration_is_refused_by_its_keys(tmp_path: Path) -> None:
    save(tmp_path, 1)
    other = Experiment(train={"lr": 1e-5}, loader={"augment": {"hue": 3}})  # type: ignore[arg-type]
    with pytest.raises(
        UserError,
        match=r"differing in\n  loader\.augment\.hue: 10\.0 → 3\.0\n  train\.lr: 0\.0003 → 1e-05\nchoose",
    ):
        checkpoint.load(tmp_path, checkpoint.fingerprint(other, "abc"))
    with pytest.raises(UserError, match=r"differing in\n  shards\.sha256: abc → abd\n"):
        checkpoint.load(tmp_path, checkpoint.fingerprint(Experiment(), "abd"))


def test_fields_that_came_later_do_not_stop_a_run(tmp_path: Path) -> None:
    """A run begun before a field existed goes on with its default, and is refused any other value."""
    older = json.loads(FINGERPRINT)
    del older["loader"]["dtype"], older["loader"]["augment"]["blur"]
    checkpoint.save(tmp_path, json.dumps(older), Progress(3), {}, keep=1)
    assert loaded(tmp_path)[0].step == 3
    assert checkpoint.completed(older) == json.loads(FINGERPRINT)
    other = Experiment(loader={"augment": {"blur": 1}})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"differing in\n  loader\.augment\.blur: 0\.0 → 1\.0\nchoose"):
        checkpoint.load(tmp_path, checkpoint.fingerprint(other, "abc"))


def test_a_run_that_took_the_best_figure_does_not_go_on_with_a_tolerance(tmp_path: Path) -> None:
    older = json.loads(FINGERPRINT)
    del older["train"]["tolerance"]
    checkpoint.save(tmp_path, json.dumps(older), Progress(3), {}, keep=1)
    with pytest.raises(UserError, match=r"differing in\n  train\.tolerance: 0\.0 → 1\.0\nchoose"):
        loaded(tmp_path)
    as_before = Experiment(train={"tolerance": 0})  # type: ignore[arg-type]
    assert checkpoint.load(tmp_path, checkpoint.fingerprint(as_before, "abc"))


def test_where_the_values_come_from_does_not_matter() -> None:
    given, preset = (
        Experiment(loader={"augment": values})  # type: ignore[arg-type]
        for values in ({"scale": (1, 1), "shift": 0, "hue": 18}, {"preset": "reference"})
    )
    one, other = (json.loads(checkpoint.fingerprint(e, "abc")) for e in (given, preset))
    assert one == other != json.loads(FINGERPRINT)


def changed(section: str, key: str) -> Experiment:
    """The default experiment with one value changed, validity aside."""
    part = getattr(Experiment(), section)
    return Experiment().model_copy(update={section: part.model_copy(update={key: "changed"})})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_what_changes_the_result_changes_the_fingerprint_and_nothing_else_does() -> None:
    keys = [key.split(".") for key, _ in fields(Experiment) if key.count(".") == 1 and "synthetic" not in key]
    deciding = {
        f"{section}.{key}"
        for section, key in keys
        if checkpoint.fingerprint(changed(section, key), "abc") != FINGERPRINT
    }
    encoders = {"loader", "model", "loss", "train"}
    free = {f"{section}.{key}" for section, names in FREE.items() for key in names if key != "augment"}
    assert deciding == {f"{s}.{k}" for s, k in keys if s in encoders} - free
    assert {"loader.threads", "train.processes"} <= free
