"""`moleprint doctor`: is this machine ready? A line a check: what was found, and the remedy."""

import json
import netrc
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from launch import probes

GIB = 1 << 30
INSTALL_AGAIN = "install again: `rm -rf .venv`, then `make setup`"
DRIVERS = {"11": "450.80", "12": "525.60", "13": "580.65"}
"""CUDA -> the oldest driver that runs builds for it (NVIDIA, CUDA compatibility)."""
ALL_REDUCE = {"nccl": 2.0, "gloo": 0.1}
"""Backend -> GB/s on one host below which something is wrong: PCIe 3 gives about 8, NVLink 100 and more."""
ALL_REDUCE_REMEDY = (
    "see what NCCL_DEBUG=INFO says; in a container, more --shm-size; NCCL_P2P_DISABLE=1 as a test"
)
READ, WRITE = 100, 50
"""MB/s: 4,000 photographs a second of 256 pixels are 68 read; a checkpoint of a ResNet-50 is 300 MB."""
CLOCK = 2.0
"""Seconds that a clock may be off."""
NTP = "run chrony or systemd-timesyncd: hosts whose clocks differ log in an order that misleads"


@dataclass(frozen=True)
class Finding:
    """What one check came to."""

    state: Literal["ok", "warn", "fail"]
    """`warn`: moleprint runs, but something is missing or may run out; `fail`: it cannot run."""
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """One thing to look at."""

    name: str
    look: Callable[[], Finding]
    remedy: str = INSTALL_AGAIN
    """If the look itself ends in an error."""


def examine(folders: Sequence[Path] = (), *, as_json: bool = False) -> int:
    """Look at everything and print a line a check, or one JSON value for machines.

    Args:
        folders: that will hold shards and runs; the current one if none are given.

    Returns:
        0 if nothing failed, else 1.
    """
    rows = []
    for check in checks(folders or (Path(),)):
        finding = _look(check)
        rows.append({"check": check.name, **asdict(finding)})
        if not as_json:
            remedy = f" → {finding.remedy}" if finding.remedy else ""
            print(f"{finding.state:6}{check.name:12}{finding.found}{remedy}", flush=True)
    states = [row["state"] for row in rows]
    failed, warned = states.count("fail"), states.count("warn")
    if as_json:
        print(json.dumps({"failed": failed, "warned": warned, "checks": rows}, indent=2))
    else:
        print(f"{len(rows)} checks: {failed} failed, {warned} with a warning")
    return int(failed > 0)


def _look(check: Check) -> Finding:
    try:
        return check.look()
    except Exception as error:  # a library that cannot even be loaded raises what it likes
        reason = " ".join(str(error).split())
        return Finding("fail", f"{type(error).__name__}: {reason}", check.remedy)


def _python() -> Finding:
    return Finding("ok", f"{platform.python_version()}, {sys.executable}")


def _torch() -> Finding:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
    return Finding("ok", f"{torch.__version__}, built for {build}")


def _gpus() -> Finding:
    import torch

    driver, cuda = _driver(), torch.version.cuda
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if gpus:
        return Finding("ok", ", ".join(f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in gpus))
    if driver:
        remedy = f"update it to one for CUDA {cuda}, or unset CUDA_VISIBLE_DEVICES"
        return Finding(
            "warn",
            f"driver {driver}, but torch sees no GPU",
            remedy if cuda else "install a torch built for CUDA",
        )
    return Finding("ok", "none: everything runs on the CPU")


def _cuda_driver() -> Finding:
    """The driver against what torch and DALI were built for."""
    import torch

    driver = _driver()
    if not driver:
        return Finding("ok", "none, and none is needed on the CPU")
    builds = {"torch": torch.version.cuda or "", "DALI": probes.dali_cuda()}
    needs = {
        name: DRIVERS[major] for name, cuda in builds.items() if (major := cuda.split(".")[0]) in DRIVERS
    }
    told = ", ".join(f"{name} (CUDA {builds[name]}) needs {needs[name]}" for name in needs)
    late = [name for name, need in needs.items() if probes.version(driver) < probes.version(need)]
    if late:
        remedy = "update the driver, or install builds for its CUDA (README: Two commands)"
        return Finding("fail", f"{driver} is too old: {told}", remedy)
    return Finding("ok", f"{driver}; {told or 'nothing here was built for CUDA'}")


def _all_reduce() -> Finding:
    """Between all GPUs, or two processes where there are none or one."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus == 1:
        return Finding("ok", "one GPU: nothing to exchange")
    measured = probes.all_reduce(gpus or 2)
    speed, backend = measured["gigabytes_per_second"], measured["backend"]
    found = f"{speed:.1f} GB/s over {measured['ranks']} {'GPUs' if gpus else 'processes'} by {backend}"
    least = ALL_REDUCE[backend]
    if speed < least:
        return Finding("warn", f"{found}; {least} are usual", ALL_REDUCE_REMEDY)
    return Finding("ok", found)


def _driver() -> str:
    """Version of the NVIDIA driver, empty where there is none."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.stdout.partition("\n")[0].strip() if answer.returncode == 0 else ""


def _dali() -> Finding:
    import torch
    from nvidia import dali

    gpus = range(torch.cuda.device_count())
    for name, gpu in [("CPU", None), *((f"GPU {gpu}", gpu) for gpu in gpus)]:
        error = _decoding_error(gpu)
        if error > 2:
            found = f"{dali.__version__} on {name}: a decoded image is {error:.0f} grey levels off"
            return Finding("fail", found, INSTALL_AGAIN)
    where = "CPU and every GPU" if gpus else "CPU"
    return Finding("ok", f"{dali.__version__}, decodes and transforms as it should on {where}")


def _decoding_error(gpu: int | None) -> float:
    """Mean difference in grey levels of an image through the loader's graph from the same through Pillow."""
    import numpy as np
    from PIL import Image

    from pipeline import augment, graph

    y, x = np.mgrid[:64, :64].astype(np.uint8) * 4
    file = BytesIO()
    Image.fromarray(np.stack([x, y, 255 - x], axis=2)).save(file, "JPEG", subsampling="4:4:4")
    side = np.array([64])
    inputs = [np.frombuffer(file.getvalue(), np.uint8)], *augment.identity(1).parameters(side, side, 64)
    pipeline = graph.build(
        lambda: inputs, batch=1, size=64, mean=(0, 0, 0), std=(1, 1, 1), threads=1, prefetch=1, gpu=gpu
    )
    (images,) = pipeline.run()
    (image,) = graph.tensor(images).cpu().numpy()
    return float(np.abs(image.transpose(1, 2, 0) * 255 - np.asarray(Image.open(file))).mean())


def _cores() -> Finding:
    cores, total = len(os.sched_getaffinity(0)), os.cpu_count()
    quota, period = _first_line("/sys/fs/cgroup/cpu.max", "max 1").split()
    if quota != "max" and int(quota) / int(period) < cores:
        allowed = int(quota) / int(period)
        remedy = f"set loader.threads={max(1, int(allowed))}, or raise the container's limit"
        return Finding("warn", f"{cores} seen, but time for {allowed:g} is allowed", remedy)
    return Finding("ok", f"{cores} of {total}")


def _memory() -> Finding:
    lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    bytes_of = {name: int(kib) * 1024 for name, kib, *_ in lines}
    limit = _first_line("/sys/fs/cgroup/memory.max", "max")
    total = bytes_of["MemTotal:"] if limit == "max" else min(int(limit), bytes_of["MemTotal:"])
    free = min(total, bytes_of["MemAvailable:"])
    found = f"{free / GIB:.1f} GiB available of {total / GIB:.1f}"
    if free < 4 * GIB:
        return Finding("warn", found, "4 GiB are wanted: end other programs, or train with fewer processes")
    return Finding("ok", found)


def _disk(folder: Path) -> Finding:
    """Room and speed of the disk that a folder is, or will be, on."""
    place = _there(folder)
    free = shutil.disk_usage(place).free
    written, read = probes.disk_speed(place)
    found = f"{free / GIB:.1f} GiB free, writes {written:,.0f} MB/s, reads {read:,.0f} MB/s in {place}"
    if free < 5 * GIB:
        return Finding("warn", found, "5 GiB are wanted for shards and runs: make room, or work elsewhere")
    if read < READ or written < WRITE:
        wanted = f"{READ} MB/s read and {WRITE} written are wanted"
        return Finding("warn", found, f"{wanted}: set loader.stage to a local disk, or loader.cache")
    return Finding("ok", found)


def _clock(folder: Path) -> Finding:
    """Against the past, the kernel's own word, and the clock that stamps files; no network is asked."""
    behind, ahead = probes.newest_install() - time.time(), probes.clock_ahead(_there(folder))
    now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    if behind > CLOCK:
        found = f"{now}, but something was installed {behind / 3600:.1f} hours after that"
        return Finding("fail", found, "set the clock: certificates are refused otherwise, and logs lie")
    if abs(ahead) > CLOCK:
        where = "ahead of" if ahead > 0 else "behind"
        found = f"{now}, {abs(ahead):.1f} s {where} the clock that stamps files in {_there(folder)}"
        return Finding("warn", found, "run chrony or ntpd on this host and on the file server")
    if not probes.clock_synchronised():
        return Finding("warn", f"{now}, which nothing keeps right (no NTP), says the kernel", NTP)
    return Finding("ok", f"{now}, synchronised, and the file system agrees")


def _there(folder: Path) -> Path:
    """A folder, or the nearest above it that exists."""
    return next(place for place in (folder.resolve(), *folder.resolve().parents) if place.is_dir())


def _shared_memory() -> Finding:
    free = shutil.disk_usage("/dev/shm").free
    found = f"{free / GIB:.2f} GiB free in /dev/shm"
    if free < GIB:
        remedy = "NCCL exchanges data there: start the container with --shm-size=8g or --ipc=host"
        return Finding("warn", found, remedy)
    return Finding("ok", found)


def _open_files() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return Finding("ok", "without limit")
    if limit < 1024:
        return Finding("warn", f"{limit} at most", "every shard takes one: raise it with `ulimit -n 4096`")
    return Finding("ok", f"{limit} at most")


def _wandb() -> Finding:
    """The key from the environment or ~/.netrc, where W&B's own login looks; its server is asked about it."""
    import wandb

    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return Finding("ok", f"{wandb.__version__}, WANDB_MODE={mode}")
    own = os.environ.get("WANDB_BASE_URL")
    servers = [own] if own else [wandb.Settings().base_url, "https://api.wandb.ai"]
    server, key = _wandb_key(servers)
    if not key:
        found = f"{wandb.__version__}, no key: runs are logged offline"
        return Finding("ok", found, "`wandb login` once, and they are sent as they go")
    found = f"{wandb.__version__}, a key is configured"
    try:
        taken = probes.wandb_knows(server, key)
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        remedy = "runs are logged offline till then; `wandb sync` sends them later"
        return Finding("warn", f"{found}, but {server} cannot be reached ({reason})", remedy)
    if not taken:
        return Finding("warn", f"{found}, but {server} refuses it", "`wandb login --relogin`")
    return Finding("ok", f"{found}, and {server} takes it: runs are sent as they go")


def _wandb_key(servers: Sequence[str]) -> tuple[str, str]:
    """(server, key); the key is empty if there is none."""
    if key := os.environ.get("WANDB_API_KEY"):
        return servers[0], key
    try:
        machines = netrc.netrc(os.environ.get("NETRC")).hosts
    except FileNotFoundError:
        machines = {}
    keys = (
        (server, machines[urlsplit(server).netloc][2])
        for server in servers
        if urlsplit(server).netloc in machines
    )
    return next(keys, (servers[0], ""))


def _git() -> Finding:
    if not shutil.which("git"):
        return Finding("warn", "not found", "install it, and runs record the commit they were made with")
    version = subprocess.run(["git", "--version"], capture_output=True, text=True, check=True).stdout
    return Finding("ok", version.strip().removeprefix("git version "))


def _first_line(path: str, otherwise: str) -> str:
    file = Path(path)
    return file.read_text().partition("\n")[0] if file.exists() else otherwise


def checks(folders: Sequence[Path]) -> list[Check]:
    """All that is looked at, in order.

    Args:
        folders: that will hold shards and runs.
    """
    writable = "get the right to write there, or choose another folder"
    return [
        Check("python", _python),
        Check("torch", _torch),
        Check("driver", _cuda_driver),
        Check("GPUs", _gpus),
        Check("DALI", _dali, f"{INSTALL_AGAIN}; on a GPU the driver must be 525.60 or newer"),
        Check("all-reduce", _all_reduce, ALL_REDUCE_REMEDY),
        Check("cores", _cores),
        Check("memory", _memory),
        Check("shared mem", _shared_memory, "mount a tmpfs at /dev/shm"),
        Check("open files", _open_files),
        *(Check("disk", partial(_disk, folder), writable) for folder in folders),
        Check("clock", partial(_clock, folders[0]), writable),
        Check("W&B", _wandb, "mend ~/.netrc, or move it away and run `wandb login`"),
        Check("git", _git),
    ]
