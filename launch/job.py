"""A stage on many processes and hosts: the torchrun or sbatch call for it, shown and made.

moleprint train, run ──────────────────────┐
moleprint launch ──────────────────────────┼──► Job ──► torchrun's arguments ──► torchrun.py ──► ranks
sbatch recipes/slurm.sbatch, on each node ─┘
moleprint launch --slurm ──► that sbatch call
"""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configs.errors import UserError
from configs.schema import Experiment
from launch.host import Host, Route, Setting, route_to, settings, split

RECIPES = Path(__file__).parent / "recipes"
STAGES = {"train": ("train.encoder",), "embed": ("train.embed",), "pack": ("launch.cli", "pack")}
"""Stage: the module that every rank runs, and its first argument."""
RESTARTS = 3
"""Times that the ranks of several hosts start again after one was lost."""


@dataclass(frozen=True)
class Job:
    """One stage of an experiment: on this host alone, or on this host among others."""

    stage: str
    config: Path
    overrides: Sequence[str]
    experiment: Experiment
    gpus: int | None = None
    """Processes on each host, one a GPU where there are any; `train.processes` if None."""
    nodes: str = "1"
    """Hosts, or `MIN:MAX` of them."""
    rendezvous: str = ""
    """`HOST:PORT` where several hosts meet."""
    restarts: int | None = None
    """Times to start again after a lost rank; 0 on one host and RESTARTS on several if None."""

    @property
    def logs(self) -> Path:
        """This host's: `ID/attempt_N/LOCAL_RANK/stdout.log` and `stderr.log` in it."""
        return self.experiment.run.folder / "logs" / socket.gethostname()

    def run(self, *, show: bool = False, dry: bool = False) -> None:
        """Start its ranks on this host and wait for them.

        Args:
            show: print the call before, with a reason for each setting.
            dry: do no more than that.

        Raises:
            StageError: if a rank ends with an error, or all were told to end.
            UserError: if this host or the way to the others is not as asked.
        """
        self._check()
        host = Host.this()
        ranks = self.ranks(host)
        chosen = settings(host, ranks, self._route())
        arguments = _threaded(self, host, ranks, chosen).torchrun(ranks, chosen)
        variables = {s.name: s.value for s in chosen if not s.name.startswith("--")}
        if show:
            print(_shown(host, chosen, variables, arguments), flush=True)
        if not dry:
            from launch.torchrun import torchrun

            os.environ.update(variables)
            os.environ.setdefault("TQDM_MININTERVAL", "10")  # ranks write to files: seldom, and whole lines
            torchrun(arguments, self.logs)

    def _check(self) -> None:
        """Raises UserError for numbers that cannot be meant."""
        least, _, most = self.nodes.partition(":")
        if not re.fullmatch(r"[1-9]\d*(:\d+)?", self.nodes) or int(most or least) < int(least):
            raise UserError(
                f"--nodes {self.nodes}: expected a number of hosts, or MIN:MAX of them, such as 1:2"
            )
        for name, number in (("--gpus", self.gpus), ("--max-restarts", self.restarts)):
            if number is not None and number < 0:
                raise UserError(f"{name} {number}: expected 0 or more")

    def ranks(self, host: Host) -> int:
        """Processes on a host: as many as asked, but one a GPU at most where there are any."""
        if self.stage == "pack":  # it has worker processes of its own
            return 1
        asked = self.experiment.train.processes if self.gpus is None else self.gpus
        if self.gpus and host.gpus and self.gpus > host.gpus:
            raise UserError(f"--gpus {self.gpus}: this host has {host.gpus}; ask for {host.gpus} at most")
        return min(asked or host.gpus, host.gpus) if host.gpus else asked or 1

    def _route(self) -> Route | None:
        if self.rendezvous:
            return route_to(self.rendezvous)
        if self.nodes != "1":
            raise UserError(
                f"--nodes {self.nodes}: they need a place to meet; give one of them as --rendezvous "
                "HOST:PORT and start the same command on each, or hand the job to SLURM with --slurm"
            )
        return None

    def torchrun(self, ranks: int, chosen: Sequence[Setting]) -> list[str]:
        """Arguments of torchrun for so many ranks on this host, with these settings."""
        meeting, restarts = ["--standalone"], 0
        if self.rendezvous:
            name, port = split(self.rendezvous)
            run = os.environ.get("PET_RDZV_ID") or self.experiment.run.folder.name
            meeting = [f"--nnodes={self.nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={name}:{port}"]
            meeting.append(f"--rdzv-id={run}")
            restarts = RESTARTS
        return [
            *meeting,
            f"--nproc-per-node={ranks}",
            *(str(setting) for setting in chosen if setting.name.startswith("--")),
            f"--max-restarts={restarts if self.restarts is None else self.restarts}",
            "--monitor-interval=0.1",
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            f"--log-dir={self.logs}",
            "--redirects=3",
            "--tee=0:3",
            "-m",
            *STAGES[self.stage],
            str(self.config),
            *self.overrides,
        ]

    def sbatch(self, options: Sequence[str], *, dry: bool = False) -> None:
        """Hand it to SLURM, and show the call before.

        Args:
            options: of sbatch, such as `--partition=gpu`.
            dry: show it only.

        Raises:
            UserError: if SLURM is not there, or refuses it.
        """
        self._check()
        if ":" in self.nodes:
            raise UserError(f"--nodes {self.nodes}: SLURM gives a job a fixed number of nodes; give that")
        command = [
            "sbatch",
            f"--job-name={self.experiment.run.folder.name}",
            f"--nodes={self.nodes}",
            *([f"--gpus-per-node={self.gpus}"] if self.gpus else []),
            *options,
            str(RECIPES / "slurm.sbatch"),
            str(self.config),
            f"--stage={self.stage}",
            *([] if self.restarts is None else [f"--max-restarts={self.restarts}"]),
            *self.overrides,
        ]
        here = str(Path(sys.executable).parent)  # where the nodes find `moleprint`
        print(f"PATH={shlex.quote(here)}:$PATH {shlex.join(command)}", flush=True)
        if dry:
            return
        path = f"{here}{os.pathsep}{os.environ.get('PATH', '')}"
        try:
            ended = subprocess.run(command, env={**os.environ, "PATH": path}, check=False)
        except FileNotFoundError:
            raise UserError("sbatch: not found; run this where SLURM's commands are") from None
        if ended.returncode:
            raise UserError(f"sbatch refused the job (exit status {ended.returncode}); its words are above")


def _threaded(job: Job, host: Host, ranks: int, chosen: Sequence[Setting]) -> Job:
    """The same with each rank's share of the cores as its DALI threads, where it could not tell by itself."""
    bound = any(setting.name == "--numa-binding" for setting in chosen)
    if not bound or job.experiment.loader.threads or job.stage == "pack":
        return job
    # A bound rank sees the cores of its NUMA node alone, and would share them among all ranks of the host.
    return replace(job, overrides=[*job.overrides, f"loader.threads={max(1, host.cores // ranks)}"])


def _shown(
    host: Host, chosen: Sequence[Setting], variables: Mapping[str, str], arguments: Sequence[str]
) -> str:
    width = max(len(str(setting)) for setting in chosen)
    return "\n".join(
        [
            f"# {socket.gethostname()}: {host.cores} cores, {host.gpus} GPUs, {host.numa_nodes} NUMA nodes",
            *(f"# {setting!s:<{width}}  {setting.why}" for setting in chosen),
            shlex.join([*(f"{name}={value}" for name, value in variables.items()), "torchrun", *arguments]),
        ]
    )
