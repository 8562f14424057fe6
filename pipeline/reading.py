"""The bytes of samples, from shards on a local disk or a network mount."""

import mmap
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from configs.errors import DamagedDataError

Bytes = NDArray[np.uint8]
Spot = tuple[int, int, int]
"""Number of the shard, first byte, bytes."""

NETWORK = re.compile(
    r"nfs|nfs4|cifs|smb3|smbfs|lustre|beegfs|gpfs|ceph|glusterfs|orangefs|pvfs2|panfs|wekafs|9p|afs|ncpfs"
    r"|virtiofs|fuse|fuse\..+"
)
"""Types of file systems whose files may go away or fail while they are mapped."""
PARALLEL = 16
"""Reads under way at once on a network mount, where each waits for a server."""
OPEN_FILES = 256


class Reader(Protocol):
    """Reads any samples of a shard set."""

    def read(self, spots: Sequence[Spot]) -> list[Bytes]:
        """The bytes of each; fewer where a shard ends early.

        Raises:
            DamagedDataError: if a shard cannot be read at all.
        """

    def close(self) -> None:
        """Let go of threads and files."""


def reader(paths: Sequence[Path], how: str) -> Reader:
    """As configured; `auto` looks at where the shards lie."""
    if how == "auto":
        how = "pread" if paths and NETWORK.fullmatch(file_system(paths[0])) else "mmap"
    return Calls(paths) if how == "pread" else Maps(paths)


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Type of the file system that a path lies on, such as `ext4`; empty if the system does not say."""
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    path, best, kind = path.resolve(), Path(), ""
    for line in lines:
        _, point, fs_type, *_ = line.split(" ")
        place = Path(re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), point))
        # A later mount on the same point hides the earlier.
        if path.is_relative_to(place) and len(place.parts) >= len(best.parts):
            best, kind = place, fs_type
    return kind


class Maps:
    """Shards mapped into memory: no call and no copy per sample; the page cache is all the memory used."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._maps: dict[int, mmap.mmap] = {}

    def read(self, spots: Sequence[Spot]) -> list[Bytes]:
        """Views into the maps."""
        return [self._view(*spot) for spot in spots]

    def close(self) -> None:
        """The maps go with their last view."""
        self._maps.clear()

    def _view(self, shard: int, offset: int, size: int) -> Bytes:
        if shard not in self._maps:
            path = self._paths[shard]
            try:
                with path.open("rb") as file:
                    self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # an empty file cannot be mapped
                raise _unreadable(path, error) from None
        pages = self._maps[shard]
        return np.frombuffer(pages, np.uint8, max(0, min(size, len(pages) - offset)), min(offset, len(pages)))


class Calls:
    """A call per sample, many under way at once: a server that fails is an error, not the process's death."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._files: dict[int, int] = {}
        self._threads = ThreadPoolExecutor(PARALLEL, thread_name_prefix="moleprint-read")

    def read(self, spots: Sequence[Spot]) -> list[Bytes]:
        """Copies, in memory of their own."""
        needed = {shard for shard, _, _ in spots}
        for shard in [s for s in self._files if s not in needed][: max(0, len(self._files) - OPEN_FILES)]:
            os.close(self._files.pop(shard))
        for shard in needed - self._files.keys():
            try:
                self._files[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise _unreadable(self._paths[shard], error) from None
        return list(self._threads.map(self._call, spots))

    def close(self) -> None:
        """End the threads, close the files."""
        self._threads.shutdown(cancel_futures=True)
        while self._files:
            os.close(self._files.popitem()[1])

    def _call(self, spot: Spot) -> Bytes:
        shard, offset, size = spot
        try:
            parts = [os.pread(self._files[shard], size, offset)]
            while parts[-1] and (missing := size - sum(map(len, parts))):
                parts.append(os.pread(self._files[shard], missing, offset + size - missing))
        except OSError as error:
            raise _unreadable(self._paths[shard], error) from None
        return np.frombuffer(b"".join(parts), np.uint8)


def _unreadable(path: Path, error: OSError | ValueError) -> DamagedDataError:
    reason = getattr(error, "strerror", None) or error
    return DamagedDataError(f"{path}: cannot be read ({reason}); is the shard set complete?")
