"""What `moleprint doctor` measures: all-reduce, disks, the clock, and W&B's answer to a key."""

import base64
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

MEGABYTES = 64
"""Written to a disk and read back."""
SECONDS = 120
"""That an all-reduce may take, with its start."""
_TIME_ERROR = 5  # linux/timex.h: TIME_ERROR, the clock is not synchronised


def all_reduce(processes: int) -> dict[str, Any]:
    """GB/s between processes of this host, in the way that training joins them: see allreduce.py.

    Raises:
        RuntimeError: with the last words of the processes, if they fail.
        subprocess.TimeoutExpired: if they hang.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        words = ["--standalone", f"--nproc-per-node={processes}", "-m", "launch.allreduce", str(file)]
        ended = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words],
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**os.environ, "OMP_NUM_THREADS": "1", "NCCL_DEBUG": "WARN"},
            check=False,
        )
        if ended.returncode or not file.exists():
            lines = [line for line in ended.stderr.splitlines() if "Error" in line or "WARN" in line]
            raise RuntimeError(" ".join(lines[:2]) or f"exit status {ended.returncode}")
        measured: dict[str, Any] = json.loads(file.read_text())
        return measured


def disk_speed(folder: Path) -> tuple[float, float]:
    """MB/s of writing a file there, to the disk itself, and of reading it back from there.

    Raises:
        OSError: if it cannot be written.
    """
    block = os.urandom(10**6)  # what compresses would flatter some disks
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor.", suffix=".tmp") as file:
        started = time.perf_counter()
        for _ in range(MEGABYTES):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - started
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # not from the page cache
        file.seek(0)
        started = time.perf_counter()
        while file.read(10**6):
            pass
        return MEGABYTES / written, MEGABYTES / (time.perf_counter() - started)


def clock_ahead(folder: Path) -> float:
    """Seconds by which this machine's clock is ahead of that which stamps files in a folder: a server's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor.", suffix=".tmp") as file:
        before = time.time()
        os.write(file.fileno(), b"now")
        os.fsync(file.fileno())
        stamped = os.fstat(file.fileno()).st_mtime
        after = time.time()
    return max(0.0, before - stamped) or min(0.0, after - stamped)


def clock_synchronised() -> bool:
    """Whether the kernel is told by something (NTP, PTP) that its clock is right: adjtimex(2)."""
    buffer = ctypes.create_string_buffer(512)  # struct timex; mode 0 changes nothing
    return ctypes.CDLL(None, use_errno=True).adjtimex(buffer) not in (-1, _TIME_ERROR)


def newest_install() -> float:
    """When the newest of the installed packages was put here, in seconds since 1970: the past, for sure."""
    places = (distribution.locate_file("") for distribution in metadata.distributions())
    return max((Path(str(place)).stat().st_mtime for place in set(places)), default=0.0)


def wandb_knows(server: str, key: str, *, patience: float = 5.0) -> bool:
    """Whether a W&B server takes a key.

    Raises:
        OSError: if the server cannot be reached.
    """
    query = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
    word = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Authorization": f"Basic {word}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.rstrip('/')}/graphql", query, headers)
    try:
        with urllib.request.urlopen(request, timeout=patience) as answer:
            told = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return False
        raise
    except ValueError as error:
        raise OSError("its answer is not W&B's") from error
    return bool((told.get("data") or {}).get("viewer"))


def version(text: str) -> tuple[int, ...]:
    """`535.104.05` as numbers that compare."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def dali_cuda(distributions: Sequence[str] = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")) -> str:
    """The CUDA that the installed DALI was built for, `12.0`; empty if there is none."""
    for name in distributions:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return f"{name[-3:-1]}.{name[-1]}"
    return ""
