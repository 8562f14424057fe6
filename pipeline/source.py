"""Encoded bytes by sample index, straight from the memory-mapped shards, each checked against its CRC."""

import mmap
import sys
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from configs.errors import DamagedDataError
from pipeline.sampler import Indices
from shards.shardset import SPLITS, ShardSet

Bytes = NDArray[np.uint8]


class Source:
    """Reads JPEG bytes of a shard set; a damaged sample is replaced by a sound one of its split and class.

    The substitute is the next sound index, so that every rank and every rerun picks the same one. Once more
    than `max_bad` of the set's samples are found damaged, the run ends.
    """

    def __init__(self, shards: ShardSet, *, max_bad: float) -> None:
        self._shards, self._allowed = shards, int(max_bad * len(shards.keys))
        self._maps: dict[int, mmap.mmap] = {}
        self.substitutes: dict[int, int] = {}
        """Damaged index -> the index shown in its place."""

    def fetch(self, indices: Indices) -> tuple[list[Bytes], Indices]:
        """Encoded bytes of each index, and the indices they really belong to, (n,).

        Raises:
            DamagedDataError: if more samples are damaged than allowed.
        """
        true = np.array([self.substitutes.get(int(i), int(i)) for i in indices], np.int64)
        data = [self._bytes(int(i)) for i in true]
        for slot, index in enumerate(true):
            if not self._sound(int(index), data[slot]):
                true[slot] = self._substitute(int(index))
                data[slot] = self._bytes(int(true[slot]))
        return data, true

    def _bytes(self, index: int) -> Bytes:
        shard = int(self._shards.shard[index])
        if shard not in self._maps:
            self._maps[shard] = _map(self._shards.paths[shard])
        size, offset = int(self._shards.sizes[index]), int(self._shards.offsets[index])
        return np.frombuffer(self._maps[shard], np.uint8, size, offset)

    def _sound(self, index: int, data: Bytes) -> bool:
        return zlib.crc32(data.data) == int(self._shards.crc32[index])

    def _substitute(self, index: int) -> int:
        if index in self.substitutes:  # twice in one batch
            return self.substitutes[index]
        key, folder = self._shards.keys[index], self._shards.folder
        if len(self.substitutes) >= self._allowed:
            raise DamagedDataError(
                f"{folder}: sample {key} is damaged, and {len(self.substitutes)} others before it; allowed "
                f"are {self._allowed} (loader.max_bad); look with `moleprint verify`, then pack the set again"
            )
        members = next(m for m in map(self._shards.split, SPLITS) if index in m)
        alike = members[self._shards.labels[members] == self._shards.labels[index]]
        for candidate in np.roll(alike, -int(np.searchsorted(alike, index)))[1:]:
            if self._sound(int(candidate), self._bytes(int(candidate))):
                self.substitutes[index] = int(candidate)
                tqdm.write(
                    f"{folder}: sample {key} is damaged, {self._shards.keys[candidate]} stands in for it; "
                    "embedding will refuse the set, so look with `moleprint verify` now",
                    sys.stderr,
                )
                return int(candidate)
        raise DamagedDataError(
            f"{folder}: sample {key} and all of its class and split are damaged; pack the set again"
        )


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DamagedDataError(
            f"{path}: cannot be read ({error.strerror}); is the shard set complete?"
        ) from None
