"""A run folder belongs to one process at a time, and never ends in a half-truth."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from train import encoder, result, runfolder
from train.distributed import World


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    with (
        runfolder.locked(tmp_path / "run"),
        pytest.raises(UserError, match="another process is working on this run"),
        runfolder.locked(tmp_path / "run"),
    ):
        pass
    with runfolder.locked(tmp_path / "run"):
        pass  # free again


def test_a_failure_before_anything_is_made_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError), runfolder.locked(tmp_path / "a" / "run"):
        raise UserError("no shard set")
    assert not (tmp_path / "a" / "run").exists()


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    half = tmp_path / "checkpoints" / ".step-00000001.pt.x.tmp"
    half.parent.mkdir()
    half.write_bytes(b"half")
    with runfolder.locked(tmp_path):
        assert not half.exists()


def test_a_path_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"file/run: cannot be made"),
        runfolder.locked(tmp_path / "file" / "run"),
    ):
        pass


def test_divergence_ends_in_one_line_and_keeps_no_broken_checkpoint(
    tiny_experiment: Any, tmp_path: Path
) -> None:
    settings = {"epochs": 1, "lr": 1e30, "grad_clip": 0, "warmup": 0, "checkpoint_every": 2}
    experiment = tiny_experiment(
        tmp_path / "run", train=settings, tracking={"mode": "disabled", "log_every": 1000}
    )
    with pytest.raises(UserError, match=r"lower train\.lr"):
        encoder.run(experiment, World())
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_run_without_its_weights_is_not_finished(
    tiny_experiment: Any, trained: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("encoder.json", "encoder.safetensors"):
        (copy / name).write_bytes((trained / name).read_bytes())
    experiment = tiny_experiment(copy)
    assert result.finished(experiment)
    (copy / "encoder.safetensors").unlink()
    assert not result.finished(experiment)


def test_a_mistake_on_another_host_is_told_by_its_first_rank() -> None:
    """Global rank 8 is local rank 0 of the second host: what only that host lacks, only it can say."""
    environment = {**os.environ, "RANK": "8", "WORLD_SIZE": "16", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "train.encoder", "nowhere.yaml"],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: rank 8: nowhere.yaml" in done.stderr
