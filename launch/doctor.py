"""`moleprint doctor`: is this machine ready? A line a check: what was found, and the remedy."""

import netrc
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

GIB = 1 << 30
INSTALL_AGAIN = "install again: `rm -rf .venv`, then `make setup`"


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


def examine() -> int:
    """Print a line a check; 0 if none failed, else 1."""
    findings = []
    for check in CHECKS:
        finding = _look(check)
        findings.append(finding.state)
        remedy = f" → {finding.remedy}" if finding.remedy else ""
        print(f"{finding.state:6}{check.name:12}{finding.found}{remedy}", flush=True)
    failed, warned = findings.count("fail"), findings.count("warn")
    print(f"{len(findings)} checks: {failed} failed, {warned} with a warning")
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
        names = [f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in gpus]
        return Finding("ok", f"{', '.join(names)}; driver {driver or 'unknown'}")
    if driver:
        remedy = f"update it to one for CUDA {cuda}, or unset CUDA_VISIBLE_DEVICES"
        return Finding(
            "warn",
            f"driver {driver}, but torch sees no GPU",
            remedy if cuda else "install a torch built for CUDA",
        )
    return Finding("ok", "none: everything runs on the CPU")


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


def _disk() -> Finding:
    free = shutil.disk_usage(".").free
    found = f"{free / GIB:.1f} GiB free in {Path.cwd()}"
    if free < 5 * GIB:
        return Finding("warn", found, "5 GiB are wanted for shards and runs: make room, or work elsewhere")
    return Finding("ok", found)


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
    """From the environment and ~/.netrc, where W&B's own login looks; nothing is sent."""
    import wandb

    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        return Finding("ok", f"{wandb.__version__}, WANDB_MODE={mode}")
    own = os.environ.get("WANDB_BASE_URL")
    servers = [own] if own else [wandb.Settings().base_url, "https://api.wandb.ai"]
    try:
        machines = netrc.netrc(os.environ.get("NETRC")).hosts
    except FileNotFoundError:
        machines = {}
    if os.environ.get("WANDB_API_KEY") or any(urlsplit(server).netloc in machines for server in servers):
        return Finding("ok", f"{wandb.__version__}, a key is configured: runs are sent as they go")
    found = f"{wandb.__version__}, no key: runs are logged offline"
    return Finding("ok", found, "`wandb login` once, and they are sent as they go")


def _git() -> Finding:
    if not shutil.which("git"):
        return Finding("warn", "not found", "install it, and runs record the commit they were made with")
    version = subprocess.run(["git", "--version"], capture_output=True, text=True, check=True).stdout
    return Finding("ok", version.strip().removeprefix("git version "))


def _first_line(path: str, otherwise: str) -> str:
    file = Path(path)
    return file.read_text().partition("\n")[0] if file.exists() else otherwise


CHECKS = (
    Check("python", _python),
    Check("torch", _torch),
    Check("GPUs", _gpus),
    Check("DALI", _dali, f"{INSTALL_AGAIN}; on a GPU the driver must be 525.60 or newer"),
    Check("cores", _cores),
    Check("memory", _memory),
    Check("disk", _disk),
    Check("shared mem", _shared_memory, "mount a tmpfs at /dev/shm"),
    Check("open files", _open_files),
    Check("W&B", _wandb, "mend ~/.netrc, or move it away and run `wandb login`"),
    Check("git", _git),
)
