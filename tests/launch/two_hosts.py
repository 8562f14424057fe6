"""Two hosts on one machine: network namespaces with addresses of their own, joined by a virtual cable.

Run by itself, as root, it trains on both, loses one, and takes it back; it prints the transcript:

    python tests/launch/two_hosts.py SHARDS FOLDER
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
_numbers = itertools.count()


class Host:
    """A network namespace, and what runs in it."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self.process: subprocess.Popen[bytes] | None = None
        self.log = Path(os.devnull)

    def start(self, words: list[str], log: Path) -> None:
        """Run a command there, its output in a file."""
        self.log = log
        command = ["ip", "netns", "exec", self.name, *words]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=ROOT, start_new_session=True
            )

    def kill(self) -> None:
        """SIGKILL every process of this host, as a crash or `kill -9` does."""
        inside = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False
        )
        for pid in map(int, inside.stdout.split()):
            os.kill(pid, signal.SIGKILL)
        if self.process:
            self.process.wait()

    def pids(self) -> list[int]:
        """Processes that run there."""
        words = ["ip", "netns", "pids", self.name]
        inside = subprocess.run(words, capture_output=True, text=True, check=False)
        return [int(pid) for pid in inside.stdout.split()]

    def said(self) -> str:
        """What its command has printed."""
        return self.log.read_text(errors="replace")


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Both, joined; gone at the end. Needs root."""
    tag = f"{os.getpid()}{next(_numbers)}"
    hosts = tuple(
        Host(f"mole{tag}{letter}", address) for letter, address in zip("ab", ADDRESSES, strict=True)
    )
    first, second = hosts
    try:
        for host in hosts:
            ip("netns", "add", host.name)
        ip("link", "add", "cable", "netns", first.name, "type", "veth", "peer", "cable", "netns", second.name)
        for host in hosts:
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", host.name, "link", "set", link, "up")
        yield first, second
    finally:
        for host in hosts:
            host.kill()
            subprocess.run(["ip", "netns", "del", host.name], check=False)


def ip(*words: str) -> None:
    """ip(8)."""
    subprocess.run(["ip", *words], check=True)


def launch(shards: Path, run: Path, *overrides: str, nodes: str = "1:2") -> list[str]:
    """`moleprint launch` of a tiny experiment, the same on every host."""
    config = run.with_name("config.yaml")
    config.write_text(
        f"pack: {{output: {shards}}}\n"
        "loader: {global_batch: 8, size: 32, threads: 1}\n"
        "model: {backbone: resnet18, embedding_dim: 16}\n"
        "train: {epochs: 100000, patience: 0, checkpoint_every: 2, processes: 1}\n"
        "tracking: {mode: disabled, log_every: 1}\n"
        f"run: {{folder: {run}}}\n"
    )
    words = [sys.executable, "-m", "launch.cli", "launch", str(config), f"--nodes={nodes}"]
    return [*words, f"--rendezvous={ADDRESSES[0]}:29400", *overrides]


def step(run: Path) -> int:
    """The newest step that was logged."""
    lines = run / "metrics.jsonl"
    rows = lines.read_text().splitlines() if lines.exists() else []
    return max((json.loads(row)["step"] for row in rows if row.endswith("}")), default=0)


def wait_for(what: str, true: Callable[[], bool], hosts: tuple[Host, Host], seconds: float = 600) -> None:
    """Until a condition holds; AssertionError with all that was said if it does not come to."""
    deadline = time.monotonic() + seconds
    while not true():
        said = "\n".join(f"--- {host.name}\n{host.said()}" for host in hosts)
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{said}"
        time.sleep(0.2)


def ranks(host: Host) -> int:
    """Training processes of a host."""
    commands = (_read(Path(f"/proc/{pid}/cmdline")) for pid in host.pids())
    return sum(b"train.encoder" in command and b"launch.cli" not in command for command in commands)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def story(shards: Path, folder: Path) -> Iterator[str]:
    """Both train; one is lost and the other goes on; it comes back and both do; the end. A line for each."""
    run = folder / "run"
    command = launch(shards, run)
    began = time.monotonic()

    def told(what: str) -> str:
        return f"[{time.monotonic() - began:5.1f} s] step {step(run):>4}: {what}"

    with two_hosts() as (a, b):
        hosts = (a, b)
        for host in hosts:
            host.start(command, folder / f"{host.address}.log")
        yield told(f"`moleprint launch --nodes=1:2` on {a.address}, where all meet, and on {b.address}")
        wait_for("both train", lambda: step(run) >= 6 and ranks(a) == ranks(b) == 1, hosts)
        yield told("both hosts train, a rank each")
        b.kill()
        lost = step(run)
        yield told(f"{b.address} is lost: all its processes are killed")
        wait_for("one goes on", lambda: step(run) >= lost + 6 and ranks(a) == 1, hosts)
        yield told(f"{a.address} goes on alone, from the newest checkpoint")
        b.start(command, folder / f"{b.address}-again.log")
        yield told(f"{b.address} is back, with the same command")
        wait_for("both again", lambda: ranks(b) == 1, hosts)
        joined = step(run)
        wait_for("both again", lambda: step(run) >= joined + 6 and ranks(a) == ranks(b) == 1, hosts)
        yield told("both train again")
        for host in hosts:
            assert host.process
            os.killpg(host.process.pid, signal.SIGTERM)
        wait_for("the end", lambda: all(h.process and h.process.poll() is not None for h in hosts), hosts)
        assert a.process and b.process
        yield told(f"SIGTERM to both: ended with status {a.process.returncode} and {b.process.returncode}")


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.mkdir(parents=True)
    for line in story(Path(sys.argv[1]), target):
        print(line, flush=True)
    for log in sorted(target.glob("*.log")):
        print(f"\n─── {log.name}\n{log.read_text()}")
