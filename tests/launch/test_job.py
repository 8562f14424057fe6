"""The torchrun and sbatch calls that are composed, and the settings chosen for a host."""

import os
import shlex
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.run import config_from_args, parse_args

from configs.errors import UserError
from configs.load import load
from launch import cli, job
from launch.host import Host, Route, _count, route_to, settings
from launch.job import Job

DEMO = cli.DEMO
BIG = Host(cores=128, gpus=8, numa_nodes=2)
AWAY = Route("10.0.0.7", "ib0", is_host=False)


def demo(stage: str = "train", **fields: object) -> Job:
    """A job of the demo, whose run folder is runs/demo."""
    return Job(stage, DEMO, ["train.lr=0.1"], load(DEMO, ["train.lr=0.1"]), **fields)  # type: ignore[arg-type]


def values(host: Host, ranks: int, route: Route | None = None, **environment: str) -> dict[str, str]:
    """name -> value of the settings chosen."""
    return {s.name: s.value for s in settings(host, ranks, route, environment)}


def test_settings_follow_the_host() -> None:
    alone = values(Host(cores=8), 2)
    assert alone == {"OMP_NUM_THREADS": "4", "PYTHONSAFEPATH": "1"}
    assert values(Host(cores=2), 8)["OMP_NUM_THREADS"] == "1"
    big = values(BIG, 8, AWAY)
    assert big["OMP_NUM_THREADS"] == "16" and big["--numa-binding"] == "node"
    assert big["NCCL_SOCKET_IFNAME"] == big["GLOO_SOCKET_IFNAME"] == "ib0"
    assert big["--local-addr"] == "10.0.0.7" and big["--rdzv-conf"].startswith("is_host=0")
    assert "--numa-binding" not in values(replace(BIG, numa_nodes=1), 8)
    for setting in settings(BIG, 8, AWAY, {}):
        assert setting.why and "\n" not in setting.why


def test_what_the_user_has_set_stays() -> None:
    mine = values(BIG, 8, AWAY, OMP_NUM_THREADS="3", NCCL_SOCKET_IFNAME="eth9")
    assert mine["OMP_NUM_THREADS"] == "3" and mine["NCCL_SOCKET_IFNAME"] == "eth9"
    assert mine["GLOO_SOCKET_IFNAME"] == "ib0"


def test_torchrun_understands_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back by torchrun's own parser."""
    monkeypatch.chdir(tmp_path)  # it makes the logs' folder
    several = demo(nodes="2:4", rendezvous="node01")
    parsed = parse_args(several.torchrun(8, settings(BIG, 8, AWAY, {})))
    config, _, words = config_from_args(parsed)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (2, 4, 8, 3)
    assert (config.rdzv_backend, config.rdzv_endpoint, config.local_addr) == (
        "c10d",
        "node01:29400",
        "10.0.0.7",
    )
    assert config.rdzv_configs["is_host"] == "0" and "SIGUSR1" in config.signals_to_handle
    assert words[1:] == ["-m", "train.encoder", str(DEMO), "train.lr=0.1"]
    alone = parse_args(demo(restarts=5).torchrun(2, settings(Host(cores=8), 2, None, {})))
    assert (
        alone.standalone
        and alone.max_restarts == 5
        and alone.log_dir == f"runs/demo/logs/{socket.gethostname()}"
    )
    assert parse_args(demo("pack").torchrun(1, [])).training_script_args[0] == "pack"


def test_a_bound_rank_is_told_its_threads() -> None:
    chosen = settings(BIG, 8, None, {})
    assert job._threaded(demo(), BIG, 8, chosen).overrides == ["train.lr=0.1", "loader.threads=16"]
    asked = replace(demo(), experiment=load(DEMO, ["loader.threads=5"]))
    assert job._threaded(asked, BIG, 8, chosen) == asked
    assert job._threaded(demo(), BIG, 8, settings(replace(BIG, numa_nodes=1), 8, None, {})) == demo()


def test_ranks_are_one_a_gpu_where_there_are_any() -> None:
    cpu = Host(cores=8)
    assert (demo().ranks(cpu), demo(gpus=4).ranks(cpu), demo(gpus=4).ranks(BIG)) == (2, 4, 4)
    assert demo().ranks(BIG) == 2 and demo(gpus=0).ranks(BIG) == 8 and demo("pack", gpus=8).ranks(BIG) == 1
    with pytest.raises(UserError, match="--gpus 9: this host has 8"):
        demo(gpus=9).ranks(BIG)


def test_the_place_where_hosts_meet() -> None:
    here = route_to("localhost:4000")
    assert here == Route("127.0.0.1", "lo", is_host=True)
    with pytest.raises(UserError, match="expected HOST:PORT"):
        route_to("node01:http")
    for port in ("0", "99999"):
        with pytest.raises(UserError, match="expected HOST:PORT"):
            route_to(f"localhost:{port}")
    with pytest.raises(UserError, match=r"nowhere.invalid:29400: the host where all meet"):
        route_to("nowhere.invalid:29400", patience=0)
    with pytest.raises(UserError, match="--nodes 2: they need a place to meet"):
        demo(nodes="2").run(dry=True)
    assert [_count(text) for text in ("0\n", "0-1\n", "0-1,4\n")] == [1, 2, 3]


def test_launch_shows_the_call_and_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`section.key=value` may stand after options; the last line is the call, ready for a shell."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cli.main(["launch", str(DEMO), "--gpus", "2", "--dry-run", "train.lr=0.5", "--stage", "embed"])
    *reasons, call = capsys.readouterr().out.splitlines()
    assert all(line.startswith("# ") for line in reasons)
    words = shlex.split(call)
    assert words[-4:] == ["-m", "train.embed", str(DEMO), "train.lr=0.5"] and "torchrun" in words
    assert any("OMP_NUM_THREADS" in line and "share" in line for line in reasons)


SBATCH = """#!/bin/sh
printf '%s\\n' "$@" > "$0.words"
command -v moleprint > "$0.found"
exit ${REFUSE:-0}
"""


def test_a_job_is_handed_to_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = tmp_path / "sbatch"
    stand_in.write_text(SBATCH)
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    cli.main(
        ["launch", str(DEMO), "--gpus=8", "--nodes=4", "--slurm", "--sbatch=--partition=a b", "train.lr=0.5"]
    )
    words = (tmp_path / "sbatch.words").read_text().splitlines()
    recipe = str(job.RECIPES / "slurm.sbatch")
    options = ["--job-name=demo", "--nodes=4", "--gpus-per-node=8", "--partition=a b"]
    assert words == [*options, recipe, str(DEMO), "--stage=train", "train.lr=0.5"]
    assert shlex.split(capsys.readouterr().out)[1:] == ["sbatch", *words]
    assert (tmp_path / "sbatch.found").read_text().strip().endswith("/moleprint")
    monkeypatch.setenv("REFUSE", "1")
    with pytest.raises(UserError, match="refused the job"):
        demo().sbatch([])
    with pytest.raises(UserError, match="fixed number of nodes"):
        demo(nodes="1:2").sbatch([])
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="sbatch: not found"):
        demo().sbatch([])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--nodes", "two"], "--nodes two: expected a number"),
        (["--nodes", "3:2"], "--nodes 3:2: expected a number"),
        (["--nodes", "0", "--slurm"], "--nodes 0: expected a number"),
        (["--gpus", "-1", "--slurm"], "--gpus -1: expected 0 or more"),
        (["--max-restarts", "-1"], "--max-restarts -1: expected 0 or more"),
        (["--sbatch=--time=1"], "--sbatch=--time=1: is for a job of SLURM"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_shown(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["launch", str(DEMO), "--rendezvous=localhost", "--dry-run", *words])
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {error}") and not said.out


def test_strange_words_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["launch", str(DEMO), "--nods", "2"], ["verify", "x", "a=b"]):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert "unrecognized arguments" in capsys.readouterr().err
