"""Decoded images kept in memory, so that only the first sight of one costs a decode.

    memfd   │ seen: a byte an image │ pixels of image 0 │ pixels of image 1 │ …      (uint8 RGB, any sizes)

One copy serves all ranks of a node: the first makes an anonymous file in memory, the others open it as
/proc/PID/fd/N. It has no name in any folder and counts against no limit of /dev/shm, so it is gone with the
last process that holds it, whatever ends that, SIGKILL too. Memory is taken as images are first seen; which
rank decodes an image makes no difference, as all get the same pixels.
"""

import mmap
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from configs.errors import UserError
from configs.loading import Loader as Settings
from pipeline.decode import Decoder, Pixels, UndecodableError
from pipeline.reading import Bytes
from pipeline.sampler import Indices
from pipeline.source import Source
from shards.shardset import ShardSet

Share = Callable[[str], str]
"""Takes this rank's word, gives that of the first rank on its node; every rank calls it."""


class Fetcher(Protocol):
    """Where a loader's images come from."""

    def fetch(self, indices: Indices) -> tuple[list[Bytes], Indices]:
        """What the graph is fed for each index, and the indices that it really shows, (n,)."""

    def close(self) -> None:
        """Let go of threads and files."""


class Cache:
    """Room for the pixels of some samples of a shard set. Close it after the loaders that use it."""

    def __init__(self, shards: ShardSet, indices: Indices, address: str = "") -> None:
        """
        Args:
            indices: the samples, with all that may stand in for them.
            address: of another process's cache of the same samples, to share it.

        Raises:
            OSError: if there is no such cache, or no memory can be had.
        """
        members = np.unique(indices)
        sizes = shards.widths[members] * shards.heights[members] * 3
        ends = np.cumsum(sizes) + len(members)
        self._slots = np.full(len(shards), -1, np.int64)
        self._slots[members] = np.arange(len(members))
        self._starts, self._bytes = ends - sizes, int(ends[-1]) if len(ends) else 1
        self._shapes = np.stack([shards.heights[members], shards.widths[members]], axis=1)
        self._file = os.open(address, os.O_RDWR | os.O_CLOEXEC) if address else os.memfd_create("moleprint")
        try:
            if address and os.fstat(self._file).st_size != self._bytes:
                raise OSError(f"{address} is not a cache of these images")
            if not address:
                os.truncate(self._file, self._bytes)
            self._memory = np.frombuffer(mmap.mmap(self._file, self._bytes), np.uint8)
        except BaseException:
            os.close(self._file)
            self._file = -1
            raise
        self._seen = self._memory[: len(members)]
        self._fence = threading.Lock()

    @property
    def address(self) -> str:
        """Where other processes of this node find it."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def has(self, indices: Indices) -> NDArray[np.bool_]:
        """Which of them are here, (n,)."""
        slots = self._slots[indices]
        assert (slots >= 0).all(), "a sample that the cache was not made for"
        seen: NDArray[np.bool_] = self._seen[slots] == 1
        with self._fence:  # pixels are not read before the mark that another process set after them
            return seen

    def get(self, index: int) -> Pixels:
        """(h, w, 3) of a sample that is here, not to be written to; valid as long as it is held."""
        return self._view(int(self._slots[index]))

    def put(self, index: int, pixels: Pixels) -> None:
        """Keep a sample's pixels. Another process may do so at the same time: it writes the same."""
        slot = int(self._slots[index])
        self._view(slot)[:] = pixels
        with self._fence:  # pixels are written before the mark
            self._seen[slot] = 1

    def shape(self, index: int) -> tuple[int, int, int]:
        """(h, w, 3) that a sample must have."""
        height, width = self._shapes[self._slots[index]].tolist()
        return height, width, 3

    def close(self) -> None:
        """Let go of the memory; it is free once no process and no array holds it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            del self._memory, self._seen

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self.close()

    def _view(self, slot: int) -> Pixels:
        height, width = self._shapes[slot].tolist()
        start = int(self._starts[slot])
        return self._memory[start : start + height * width * 3].reshape(height, width, 3)


class CachedSource:
    """Pixels by sample index: from the cache, or decoded and put there."""

    def __init__(self, source: Source, cache: Cache, *, batch: int, threads: int) -> None:
        self._source, self._cache = source, cache
        self._decoder = Decoder(batch, threads)

    def fetch(self, indices: Indices) -> tuple[list[Pixels], Indices]:
        """Pixels (h, w, 3) of each index, and the indices they really belong to, (n,).

        Raises:
            DamagedDataError: if more samples are damaged than allowed.
        """
        true = self._source.replaced(indices)
        while len(missing := np.unique(true[~self._cache.has(true)])):
            self._decode(missing)
            true = self._source.replaced(indices)
        return [self._cache.get(index) for index in true.tolist()], true

    def close(self) -> None:
        """End the decoder's threads; the cache stays."""
        self._decoder.close()
        self._source.close()

    def _decode(self, missing: Indices) -> None:
        """Put samples, or what stands in for them, into the cache; replace those that cannot be decoded."""
        data, shown = self._source.fetch(missing)
        try:
            images = self._decoder(data)
        except UndecodableError as error:
            for position in error.positions:
                self._source.condemn(int(shown[position]))
            if not error.positions:
                raise
            return
        for index, pixels in zip(shown.tolist(), images, strict=True):
            if pixels.shape == self._cache.shape(index):
                self._cache.put(index, pixels)
            else:
                self._source.condemn(index)


def open_cache(
    shards: ShardSet, indices: Indices, settings: Settings, share: Share = lambda word: word
) -> Cache | None:
    """The cache that the configuration asks for, shared by the ranks of this node; None for none.

    Args:
        indices: the samples that will be loaded more than once.
        share: how the ranks of a node agree; every rank must call this function.

    Raises:
        UserError: if a cache is asked for and cannot be had.
    """
    if settings.cache == "none":
        return None
    if settings.cache == "device":
        raise UserError("loader.cache=device: a cache in GPU memory is not there yet; set loader.cache=host")
    cache, why = None, ""
    needed, allowed = _pixel_bytes(shards, indices), 1e9 * settings.cache_gigabytes
    free = available_memory()
    if needed > allowed:
        why = (
            f"the images take {needed / 1e9:.2g} GB decoded, loader.cache_gigabytes allows {allowed / 1e9:g}"
        )
    elif needed > free:
        why = (
            f"the images take {needed / 1e9:.2g} GB decoded, this node has {free / 1e9:.2g} GB of memory left"
        )
    try:
        cache = None if why else Cache(shards, indices)
    except OSError as error:
        why = f"no memory can be had ({error})"
    # The first rank of the node decides for all; every rank comes here, lest the others wait for it.
    address = share(cache.address if cache else "")
    if cache is None or address != cache.address:
        if cache is not None:
            cache.close()
        try:
            cache = Cache(shards, indices, address) if address else None
        except OSError as error:
            cache, why = None, f"the node's ranks cannot share memory ({error})"
    if cache is None and settings.cache == "host":
        raise UserError(f"loader.cache=host: {why or 'not on the first rank'}; set loader.cache=none")
    if cache is None and why:
        tqdm.write(f"loader.cache=auto keeps no images: {why}", sys.stderr)
    return cache


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that this process may still take: of the machine, and of its control group."""
    left = float("inf")
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text())
        left = 1024.0 * int(found[1]) if found else left
        group = (root / "proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
        folder = root / "sys/fs/cgroup" / group
        for parent in (folder, *folder.parents):
            limit = (
                (parent / "memory.max").read_text().strip() if (parent / "memory.max").is_file() else "max"
            )
            if limit != "max":
                stat = (parent / "memory.stat").read_text()
                kept = sum(int(n) for n in re.findall(r"^(?:inactive|active)_file (\d+)$", stat, re.M))
                used = int((parent / "memory.current").read_text()) - kept  # page cache makes way
                left = min(left, int(limit) - used)
    except OSError:  # a system that does not say
        pass
    return left


def _pixel_bytes(shards: ShardSet, indices: Indices) -> int:
    members = np.unique(indices)
    return int((shards.widths[members] * shards.heights[members] * 3).sum())
