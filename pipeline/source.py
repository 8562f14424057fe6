"""Encoded bytes by sample index, each checked against its CRC; damaged ones are replaced."""

import sys
import zlib
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from configs.errors import DamagedDataError
from pipeline.reading import Bytes, reader
from pipeline.sampler import Indices
from shards.shardset import SPLITS, ShardSet


class Source:
    """Reads JPEG bytes of a shard set; a damaged sample is replaced by a sound one of its split and class.

    The substitute is the next sound index, so that every rank and every rerun picks the same one. Once more
    than `max_bad` of the set's samples are found damaged, the run ends. Training counts those of all ranks
    together at each logged line.
    """

    def __init__(self, shards: ShardSet, *, max_bad: float, read: str = "auto") -> None:
        """
        Args:
            max_bad: share of the set's samples that may be replaced.
            read: `mmap`, `pread`, or `auto`: as the place of the shards asks for.
        """
        self.shards = shards
        self.allowed = int(max_bad * len(shards))
        """Samples that may be replaced."""
        self._reader = reader(shards.paths, read)
        self.substitutes: dict[int, int] = {}
        """Damaged index -> the index shown in its place."""
        self._undecodable: set[int] = set()

    def fetch(self, indices: Indices) -> tuple[list[Bytes], Indices]:
        """Encoded bytes of each index, and the indices they really belong to, (n,).

        Raises:
            DamagedDataError: if more samples are damaged than allowed.
        """
        true = self.replaced(indices)
        data = self._read(true)
        for slot, (index, crc) in enumerate(
            zip(true.tolist(), self.shards.crc32[true].tolist(), strict=True)
        ):
            if zlib.crc32(data[slot].data) != crc:
                true[slot] = self._substitute(index)
                (data[slot],) = self._read(true[slot : slot + 1])
        return data, true

    def replaced(self, indices: Indices) -> Indices:
        """The indices (n,), those known to be damaged replaced."""
        if not self.substitutes:
            return np.array(indices, np.int64)
        return np.array([self.substitutes.get(i, i) for i in indices.tolist()], np.int64)

    def condemn(self, index: int) -> None:
        """Replace a sample that cannot be decoded although its bytes are those that were packed.

        Raises:
            DamagedDataError: if more samples are damaged than allowed.
        """
        self._undecodable.add(index)
        for damaged in [i for i, shown in self.substitutes.items() if shown == index]:
            del self.substitutes[damaged]
            self._substitute(damaged)
        self._substitute(index)

    def close(self) -> None:
        """Let go of threads and files."""
        self._reader.close()

    def _read(self, indices: Indices) -> list[Bytes]:
        columns = (self.shards.shard, self.shards.offsets, self.shards.sizes)
        return self._reader.read(list(zip(*(column[indices].tolist() for column in columns), strict=True)))

    def _sound(self, index: int) -> bool:
        if index in self._undecodable:
            return False
        (data,) = self._read(np.array([index]))
        return zlib.crc32(data.data) == int(self.shards.crc32[index])

    def _substitute(self, index: int) -> int:
        if index in self.substitutes:  # twice in one batch
            return self.substitutes[index]
        key, folder = self.shards.keys[index], self.shards.folder
        wrong = "cannot be decoded" if index in self._undecodable else "is damaged"
        if len(self.substitutes) >= self.allowed:
            raise DamagedDataError(
                f"{folder}: sample {key} {wrong}, and {len(self.substitutes)} others before it; allowed "
                f"are {self.allowed} (loader.max_bad); look with `moleprint verify`, then pack the set again"
            )
        for candidate in self._alike(index):
            if self._sound(candidate):
                self.substitutes[index] = candidate
                tqdm.write(
                    f"{folder}: sample {key} {wrong}, {self.shards.keys[candidate]} stands in for it; "
                    "embedding will refuse the set, so look with `moleprint verify` now",
                    sys.stderr,
                )
                return candidate
        raise DamagedDataError(
            f"{folder}: sample {key} and all of its class and split are damaged; pack the set again"
        )

    def _alike(self, index: int) -> Sequence[int]:
        """Indices of a sample's split and class, from the one after it on and round."""
        members = next(m for m in map(self.shards.split, SPLITS) if index in m)
        alike = members[self.shards.labels[members] == self.shards.labels[index]]
        others: list[int] = np.roll(alike, -int(np.searchsorted(alike, index)))[1:].tolist()
        return others
