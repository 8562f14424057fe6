"""The recipes hold together with what they call: shell that parses, options that exist, fields that agree."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from configs.errors import RESUMABLE
from configs.load import load
from launch import cli, torchrun
from launch.job import RECIPES, STAGES

ROOT = RECIPES.parents[1]


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun.sh"])
def test_shells_take_them(name: str) -> None:
    subprocess.run(["bash", "-n", str(RECIPES / name)], check=True)


STAND_INS = {
    "scontrol": """case "$2" in
        hostnames) printf "n1\\nn2\\n" ;;
        node) echo " NodeAddr=10.0.0.1 x=y" ;;
        *) echo "$@" > requeued ;;
    esac""",
    "srun": 'echo "$@" > started; exit ${STATUS:-0}',
    "sleep": "",
}


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"), [(0, 0, False), (75, 0, True), (75, 100, False), (2, 0, False)]
)
def test_slurm_puts_back_what_can_go_on(status: int, restarts: int, requeued: bool, tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands; it was also tried under slurmctld and two slurmd."""
    for name, script in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "30007",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_RESTART_COUNT": str(restarts),
        "STATUS": str(status),
    }
    words = ["bash", str(RECIPES / "slurm.sbatch"), "a.yaml", "--stage=train"]
    done = subprocess.run(words, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == status and (tmp_path / "requeued").exists() == requeued
    started = (tmp_path / "started").read_text().split()
    call = started[started.index("moleprint") + 1 :]
    options = cli._parse([call[0], str(cli.DEMO), *call[2:]])
    assert (options.gpus, options.nodes, options.rendezvous) == (8, "2", "10.0.0.1:20007")


def test_the_statuses_and_waits_agree() -> None:
    recipe = (RECIPES / "slurm.sbatch").read_text()
    assert f"resumable={RESUMABLE}\n" in recipe and "--signal=B:USR1@120" in recipe
    assert torchrun.GRACE < 120


def test_the_pods_run_what_the_command_understands() -> None:
    job = yaml.safe_load((RECIPES / "pytorchjob.yaml").read_text())
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    options = cli._parse(container["args"])
    load(ROOT / options.config, options.overrides)
    assert options.verb == "launch" and options.stage in STAGES
    assert options.gpus == container["resources"]["limits"]["nvidia.com/gpu"]
    assert pod["terminationGracePeriodSeconds"] > torchrun.GRACE
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    policy = job["spec"]["elasticPolicy"]
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]


def test_the_image_holds_the_repository_alone() -> None:
    """A .venv of the host would be taken for the image's own, and data would be sent along."""
    git, docker = (
        {line.strip("*/") for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")}
        for name in (".gitignore", ".dockerignore")
    )
    assert docker == {name.removeprefix("*") for name in git}


def test_pods_are_told_by_the_operators_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PET_NNODES", "1:2")
    monkeypatch.setenv("PET_RDZV_ENDPOINT", "moleprint-worker-0:29400")
    monkeypatch.setenv("PET_MAX_RESTARTS", "10")
    options = cli._parse(["launch", str(cli.DEMO)])
    assert (options.nodes, options.rendezvous) == ("1:2", "moleprint-worker-0:29400")
    assert options.max_restarts == 10


def test_torchrun_alone_gets_options_that_it_knows(tmp_path: Path) -> None:
    from torch.distributed.run import parse_args

    stand_in = tmp_path / "torchrun"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > words\n')
    stand_in.chmod(0o755)
    for extra in ({}, {"HEAD": "a:29400", "NODES": "1:2"}):
        environment = {"PATH": f"{tmp_path}:{Path(shutil.which('sh') or '/bin/sh').parent}", **extra}
        words = [str(RECIPES / "torchrun.sh"), "a.yaml", "train.lr=1"]
        subprocess.run(words, env=environment, cwd=tmp_path, check=True)
        parsed = parse_args((tmp_path / "words").read_text().split())
        assert (parsed.training_script, parsed.training_script_args) == (
            "train.encoder",
            ["a.yaml", "train.lr=1"],
        )
        assert parsed.standalone == (not extra) and parsed.nnodes == extra.get("NODES", "1:1")
