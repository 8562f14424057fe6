"""Decoded images kept in memory, so that only the first sight of one costs a decode.

    host     │ seen: a byte an image │ pixels of image 0 │ pixels of image 1 │ …      (uint8 RGB, any sizes)
    device                           │ pixels of image 0 │ pixels of image 1 │ …      (of each rank's own)

In the host's memory one copy serves all ranks of a node: the first makes an anonymous file in memory, the
others open it as /proc/PID/fd/N. It has no name in any folder and counts against no limit of /dev/shm, so it
is gone with the last process that holds it, whatever ends that, SIGKILL too. Memory is taken as images are
first seen; which rank decodes an image makes no difference, as all get the same pixels.
"""

import mmap
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from configs.errors import UserError
from configs.loading import Loader as Settings
from pipeline.decode import Decoder, UndecodableError
from pipeline.reading import Bytes
from pipeline.sampler import Indices
from pipeline.source import Source
from shards.shardset import ShardSet

Image = Bytes | torch.Tensor
"""Encoded (n,), or pixels (h, w, 3), uint8."""
DEVICE = "device"
CPU = torch.device("cpu")
Share = Callable[[str], str]
"""Takes this rank's word, gives that of the first rank on its node; every rank calls it."""


class Fetcher(Protocol):
    """Where a loader's images come from."""

    def fetch(self, indices: Indices) -> tuple[Sequence[Image], Indices]:
        """What the graph is fed for each index, and the indices that it really shows, (n,)."""

    def close(self) -> None:
        """Let go of threads and files."""


class Cache(Protocol):
    """Room for the pixels of some samples of a shard set. Close it after the loaders that use it."""

    gpu: int | None
    """Ordinal of the GPU whose memory it is, None for the host's."""

    def has(self, indices: Indices) -> NDArray[np.bool_]:
        """Which of them are here, (n,)."""

    def get(self, index: int) -> Image:
        """(h, w, 3) of a sample that is here, not to be written to; valid as long as it is held."""

    def put(self, index: int, pixels: torch.Tensor) -> None:
        """Keep a sample's pixels."""

    def shape(self, index: int) -> tuple[int, int, int]:
        """(h, w, 3) that a sample must have."""

    def close(self) -> None:
        """Let go of the memory."""


class Layout:
    """Where the pixels of some samples of a shard set lie, one after the other."""

    def __init__(self, shards: ShardSet, indices: Indices) -> None:
        """
        Args:
            indices: the samples, with all that may stand in for them.
        """
        members = np.unique(indices)
        sizes = shards.widths[members] * shards.heights[members] * 3
        ends = np.cumsum(sizes)
        self._slots = np.full(len(shards), -1, np.int64)
        self._slots[members] = np.arange(len(members))
        self._starts = ends - sizes
        self._shapes = np.stack([shards.heights[members], shards.widths[members]], axis=1)
        self.bytes, self.samples = int(sizes.sum()), len(members)

    def slots(self, indices: Indices) -> Indices:
        """Their numbers among the samples, (n,)."""
        slots: Indices = self._slots[indices]
        assert (slots >= 0).all(), "a sample that the cache was not made for"
        return slots

    def shape(self, index: int) -> tuple[int, int, int]:
        """(h, w, 3) of a sample."""
        height, width = self._shapes[self._slots[index]].tolist()
        return height, width, 3

    def bounds(self, index: int) -> slice:
        """The bytes of a sample."""
        start, (height, width, _) = int(self._starts[self._slots[index]]), self.shape(index)
        return slice(start, start + height * width * 3)


class HostCache:
    """In the host's memory, one copy for all processes of a node that are told its address."""

    gpu: int | None = None

    def __init__(self, shards: ShardSet, indices: Indices, address: str = "") -> None:
        """
        Args:
            indices: the samples, with all that may stand in for them.
            address: of another process's cache of the same samples, to share it.

        Raises:
            OSError: if there is no such cache, or no memory can be had.
        """
        self._layout = Layout(shards, indices)
        samples = self._layout.samples
        size = max(1, samples + self._layout.bytes)
        self._file = os.open(address, os.O_RDWR | os.O_CLOEXEC) if address else os.memfd_create("moleprint")
        try:
            if address and os.fstat(self._file).st_size != size:
                raise OSError(f"{address} is not a cache of these images")
            if not address:
                os.truncate(self._file, size)
            memory = np.frombuffer(mmap.mmap(self._file, size), np.uint8)
        except BaseException:
            os.close(self._file)
            self._file = -1
            raise
        self._seen, self._pixels = memory[:samples], memory[samples:]
        self._fence = threading.Lock()

    @property
    def address(self) -> str:
        """Where other processes of this node find it."""
        return f"/proc/{os.getpid()}/fd/{self._file}"

    def has(self, indices: Indices) -> NDArray[np.bool_]:
        """Which of them are here, (n,)."""
        seen: NDArray[np.bool_] = self._seen[self._layout.slots(indices)] == 1
        with self._fence:  # pixels are not read before the mark that another process set after them
            return seen

    def get(self, index: int) -> Bytes:
        """(h, w, 3) of a sample that is here, not to be written to; valid as long as it is held."""
        return self._pixels[self._layout.bounds(index)].reshape(self.shape(index))

    def put(self, index: int, pixels: torch.Tensor) -> None:
        """Keep a sample's pixels. Another process may do so at the same time: it writes the same."""
        self.get(index)[:] = pixels
        with self._fence:  # pixels are written before the mark
            self._seen[self._layout.slots(np.array([index]))] = 1

    def shape(self, index: int) -> tuple[int, int, int]:
        """(h, w, 3) that a sample must have."""
        return self._layout.shape(index)

    def close(self) -> None:
        """Let go of the memory; it is free once no process and no array holds it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
            del self._pixels, self._seen

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self.close()


class DeviceCache:
    """In the memory of a rank's own device, from which the graph is fed without a copy through the host."""

    def __init__(self, shards: ShardSet, indices: Indices, device: torch.device) -> None:
        """
        Args:
            indices: the samples, with all that may stand in for them.

        Raises:
            torch.OutOfMemoryError: if the device has no such memory left.
        """
        self._layout = Layout(shards, indices)
        self._pixels = torch.empty(self._layout.bytes, dtype=torch.uint8, device=device)
        self._seen = np.zeros(self._layout.samples, np.bool_)
        self.gpu = device.index if device.type == "cuda" else None
        if self.gpu is not None:  # other streams will write to memory that this one may still be reading
            torch.cuda.current_stream(self.gpu).synchronize()

    def has(self, indices: Indices) -> NDArray[np.bool_]:
        """Which of them are here, (n,)."""
        seen: NDArray[np.bool_] = self._seen[self._layout.slots(indices)]
        return seen

    def get(self, index: int) -> Image:
        """(h, w, 3) of a sample that is here, not to be written to; valid as long as it is held."""
        view = self._view(index)
        return view.numpy() if self.gpu is None else view  # DALI asks CUDA for the stream of any tensor

    def put(self, index: int, pixels: torch.Tensor) -> None:
        """Keep a sample's pixels, of this device. Returns when any stream of the device may read them."""
        self._view(index).copy_(pixels)
        if self.gpu is not None:  # once a sample: later epochs wait for nothing
            torch.cuda.current_stream(self.gpu).synchronize()
        self._seen[self._layout.slots(np.array([index]))] = True

    def shape(self, index: int) -> tuple[int, int, int]:
        """(h, w, 3) that a sample must have."""
        return self._layout.shape(index)

    def close(self) -> None:
        """Let go of the memory; it is free once no tensor of it is held."""
        self._pixels = self._pixels[:0].clone()
        self._seen[:] = False

    def _view(self, index: int) -> torch.Tensor:
        return self._pixels[self._layout.bounds(index)].view(self.shape(index))


class CachedSource:
    """Pixels by sample index: from the cache, or decoded and put there."""

    def __init__(self, source: Source, cache: Cache, *, batch: int, threads: int) -> None:
        self._source, self._cache = source, cache
        self._decoder = Decoder(batch, threads, cache.gpu)

    def fetch(self, indices: Indices) -> tuple[list[Image], Indices]:
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
    shards: ShardSet,
    indices: Indices,
    settings: Settings,
    share: Share = lambda word: word,
    device: torch.device = CPU,
) -> HostCache | DeviceCache | None:
    """The cache that the configuration asks for, that of a host shared by its ranks; None for none.

    Args:
        indices: the samples that will be loaded more than once.
        share: how the ranks of a node agree; every rank must call this function.
        device: this rank's.

    Raises:
        UserError: if a cache is asked for and cannot be had.
    """
    if settings.cache == "none":
        return None
    needed = Layout(shards, indices).bytes
    why = _no_room_on_device(needed, settings, device)
    cache: HostCache | None = None
    if why and settings.cache != "device":
        why = _no_room_on_host(needed, settings)
        try:
            cache = None if why else HostCache(shards, indices)
        except OSError as error:
            why = f"no memory can be had ({error})"
    # The first rank of the node decides for all; every rank comes here, lest the others wait for it.
    word = share(cache.address if cache else "" if why else DEVICE)
    if cache is not None and word != cache.address:
        cache.close()
        cache = None
    try:
        if word == DEVICE:
            return DeviceCache(shards, indices, device)
        if word and cache is None:
            cache = HostCache(shards, indices, word)
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"loader.cache={settings.cache}: {reason}; set loader.cache=host") from None
    except OSError as error:
        why = f"the node's ranks cannot share memory ({error})"
    if cache is None and settings.cache != "auto":
        lower = "host" if settings.cache == "device" else "none"
        why = why or "not on the first rank"
        raise UserError(f"loader.cache={settings.cache}: {why}; set loader.cache={lower}")
    if cache is None and why:
        tqdm.write(f"loader.cache=auto keeps no images: {why}", sys.stderr)
    return cache


def _no_room_on_device(needed: int, settings: Settings, device: torch.device) -> str:
    """Why not in the device's memory; empty if there."""
    if settings.cache == "host":
        return "not asked for"
    if device.type != "cuda":
        return "there is no GPU"
    free, _ = torch.cuda.mem_get_info(device)
    room = free if settings.cache == "device" else free // 2  # the rest is for training
    return _no_room(needed, settings, room, "this GPU")


def _no_room_on_host(needed: int, settings: Settings) -> str:
    """Why not in the host's memory; empty if there."""
    return _no_room(needed, settings, available_memory(), "this node")


def _no_room(needed: int, settings: Settings, room: float, where: str) -> str:
    images, allowed = f"the images take {needed / 1e9:.2g} GB decoded", settings.cache_gigabytes
    if needed > 1e9 * allowed:
        return f"{images}, loader.cache_gigabytes allows {allowed:g}"
    return f"{images}, {where} has {room / 1e9:.2g} GB of memory left" if needed > room else ""


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
