"""`moleprint train` told to end, or killed: it says so in a line, and no rank trains on alone."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.shardset import ShardSet


def ranks_of(folder: Path) -> list[int]:
    """Processes that train in a run folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().decode().split("\0")
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            continue
        if "train.encoder" in words and f"run.folder={folder}" in words:
            found.append(int(entry.parent.name))
    return found


@pytest.fixture
def training(tiny_shards: ShardSet, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A training run on two processes that would take for ever, past its first checkpoint."""
    folder = tmp_path / "run"
    config = tmp_path / "config.yaml"
    config.write_text(
        f"pack: {{output: {tiny_shards.folder}}}\n"
        "loader: {global_batch: 8, size: 32, threads: 1}\n"
        "model: {backbone: resnet18}\n"
        "train: {epochs: 100000, processes: 2, checkpoint_every: 2, patience: 0}\n"
        "tracking: {mode: disabled}\n"
    )
    command = [sys.executable, "-m", "launch.cli", "train", str(config), f"run.folder={folder}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step-*.pt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    yield process, folder
    for pid in [*ranks_of(folder), process.pid]:
        if process.poll() is None or pid != process.pid:
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def assert_no_rank_left(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while ranks_of(folder):
        assert time.monotonic() < deadline, "ranks train on without their parent"
        time.sleep(0.1)


@pytest.mark.slow
def test_ctrl_c_ends_it_in_one_line(training: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = training
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "training goes on from its newest checkpoint" in said
    assert_no_rank_left(folder)
    assert not list(folder.rglob(".*.tmp"))


@pytest.mark.slow
def test_sigusr1_saves_the_step_and_ends_it_with_a_status_of_its_own(
    training: tuple[subprocess.Popen[str], Path],
) -> None:
    process, folder = training
    process.send_signal(signal.SIGUSR1)  # SLURM's --signal=USR1@…
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    saved = re.search(r"told to stop: step (\d+) is saved", said)
    assert saved and "Traceback" not in said
    assert (folder / f"checkpoints/step-{int(saved[1]):08d}.pt").exists()
    assert_no_rank_left(folder)


@pytest.mark.slow
def test_ranks_end_with_a_parent_that_is_killed(training: tuple[subprocess.Popen[str], Path]) -> None:
    process, folder = training
    assert len(ranks_of(folder)) == 2
    process.kill()
    process.wait()
    assert_no_rank_left(folder)
