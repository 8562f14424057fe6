"""configs/sweep.yaml, as W&B's own agent takes it."""

import os
import subprocess
from pathlib import Path

import pytest
import wandb
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from configs.load import load
from configs.schema import Experiment, Run, Tracking
from train.tracking import Tracker


def test_a_sweep_composes_a_command_that_runs_an_experiment(tmp_path: Path) -> None:
    """As `wandb agent` does: W&B's own functions fill in the command, and a shell runs it."""
    sweep = yaml.safe_load((Path(__file__).parents[2] / "configs/sweep.yaml").read_text())
    chosen = {}
    for name, how in sweep["parameters"].items():
        chosen[name] = {"value": how["values"][0] if "values" in how else how["min"]}
    filled = create_sweep_command_args({"args": chosen})
    command: list[str] = []
    for word in create_sweep_command(sweep["command"]):
        command += filled[word[2:-1]] if word.startswith("${") else [word]
    stand_in = tmp_path / "moleprint"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    environ = {**os.environ, "WANDB_RUN_ID": "trial7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    verb, config, *overrides = done.stdout.splitlines()
    assert (verb, overrides[0]) == ("run", "run.folder=runs/sweep/trial7")
    loaded = load(Path(__file__).parents[2] / config, overrides)
    assert (loaded.train.lr, loaded.loss.mining, loaded.loss.margin) == (1e-4, "all", "soft")
    assert sweep["metric"]["name"] == "encoder/val_roc_auc"  # what test_what_an_offline_run_holds finds


def test_a_trial_of_a_sweep_is_the_agents_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline = Experiment(run=Run(folder=tmp_path / "run"), tracking=Tracking(mode="offline"))
    monkeypatch.setenv("WANDB_RUN_ID", "trial7")
    wandb.teardown()
    with Tracker(offline, "encoder") as tracker:
        assert tracker.run_id == "trial7"
    monkeypatch.delenv("WANDB_RUN_ID")
    wandb.teardown()
    with Tracker(offline, "classifier") as tracker:
        assert tracker.run_id == "trial7"
