"""Checkpoints written beside training: what was true when they were asked for, and faults that are told."""

import resource
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.schema import Experiment
from train import checkpoint
from train.progress import Progress
from train.saver import Saver

FINGERPRINT = checkpoint.fingerprint(Experiment(), "abc")
GOOD, BAD = torch.tensor(True), torch.tensor(False)


def state(value: float) -> dict[str, Any]:
    """Tensors in every nesting that a run's state has."""
    value = float(value)
    return {
        "learner": {"w": torch.full((1000,), value)},
        "optimizer": {"groups": [{"lr": 0.1, "t": torch.tensor(value)}]},
    }


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until it is let go."""
    gate, plain = threading.Event(), checkpoint.save

    def save(*arguments: Any, **named: Any) -> None:
        assert gate.wait(30)
        plain(*arguments, **named)

    monkeypatch.setattr(checkpoint, "save", save)
    return gate


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints there, oldest first."""
    return sorted(int(path.stem[5:]) for path in folder.glob("step-*.pt"))


def test_training_goes_on_and_changes_nothing_that_is_being_written(
    tmp_path: Path, slow: threading.Event
) -> None:
    saver, content, progress = Saver(tmp_path, FINGERPRINT, keep=2), state(1), Progress(step=1, history=[0.5])
    saver.save(progress, content, GOOD)
    content["learner"]["w"].fill_(9)
    content["optimizer"]["groups"][0]["t"].fill_(9)
    progress.step = 9
    progress.history.append(0.9)
    assert not steps(tmp_path)
    slow.set()
    saver.close()
    found, loaded = checkpoint.load(tmp_path, FINGERPRINT) or pytest.fail("none")
    assert (found.step, found.history) == (1, [0.5])
    torch.testing.assert_close(loaded, state(1), rtol=0, atol=0)


def test_one_at_a_time(tmp_path: Path, slow: threading.Event) -> None:
    saver = Saver(tmp_path, FINGERPRINT, keep=5)
    saver.save(Progress(step=1), state(1), GOOD)
    threading.Timer(0.2, slow.set).start()
    began = time.monotonic()
    saver.save(Progress(step=2), state(2), GOOD)
    assert time.monotonic() - began > 0.1 and 1 in steps(tmp_path)
    saver.close()
    assert steps(tmp_path) == [1, 2]


def test_a_step_that_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    saver = Saver(tmp_path, FINGERPRINT, keep=5)
    saver.save(Progress(step=1), state(1), GOOD)
    saver.save(Progress(step=2), state(2), BAD)
    saver.close()
    assert steps(tmp_path) == [1]


@pytest.fixture
def full() -> Any:
    """A disk that takes no file of more than 30 kB; Python turns the signal for it into an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_in_a_line_and_harms_no_older_one(
    tmp_path: Path, full: None, capsys: pytest.CaptureFixture[str]
) -> None:
    saver, large = Saver(tmp_path, FINGERPRINT, keep=1), {"w": torch.zeros(10_000)}
    saver.save(Progress(step=1), state(1), GOOD)
    saver.save(Progress(step=2), large, GOOD)
    while saver._writing is not None:
        saver.look()
        time.sleep(0.01)
    told = capsys.readouterr().out
    assert (
        "warning" in told
        and "step-00000002.pt: cannot be written (File too large)" in told
        and told.count("\n") == 1
    )
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]
    saver.save(Progress(step=3), large, GOOD)
    with pytest.raises(UserError, match="File too large"):
        saver.settle(must=True)
    saver.save(Progress(step=4), state(4), GOOD)  # there is room again
    saver.close()
    assert steps(tmp_path) == [4]


def test_a_mistake_of_ours_in_the_thread_is_not_kept_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", lambda *_: 1 / 0)
    saver = Saver(tmp_path, FINGERPRINT, keep=1)
    saver.save(Progress(step=1), state(1), GOOD)
    with pytest.raises(ZeroDivisionError):
        saver.settle()


def test_the_best_is_kept_besides_the_newest(tmp_path: Path) -> None:
    saver = Saver(tmp_path, FINGERPRINT, keep=2)
    for step, best in ((1, 0), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5), (7, 5), (8, 5)):
        saver.save(Progress(step=step, best_step=best), state(step), GOOD)
        saver.settle()
        assert step < 4 or best in steps(tmp_path)
    saver.close()
    assert steps(tmp_path) == [5, 7, 8]


def test_any_flipped_byte_is_noticed_or_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint.save(tmp_path, FINGERPRINT, Progress(step=1), state(1), keep=2)
    checkpoint.save(tmp_path, FINGERPRINT, Progress(step=2), state(2), keep=2)
    newest, draw = tmp_path / "step-00000002.pt", np.random.default_rng(0)
    sound = newest.read_bytes()
    tensor = sound.index(np.full(8, 2, np.float32).tobytes())
    places = [tensor + 3, *draw.integers(0, len(sound), 200).tolist()]
    noticed = []
    for place in places:
        damaged = bytearray(sound)
        damaged[place] ^= 1 << draw.integers(8)
        newest.write_bytes(damaged)
        progress, loaded = checkpoint.load(tmp_path, FINGERPRINT) or pytest.fail("none")
        assert progress.step in (1, 2)
        torch.testing.assert_close(loaded, state(progress.step), rtol=0, atol=0)
        noticed.append(progress.step == 1)
    assert noticed[0] and "the checksum of" in capsys.readouterr().out
    assert 0.3 < np.mean(noticed) < 1  # the rest is padding and what zip files say twice
