"""The shard set: a folder of tars, their indices, `samples.parquet` and, written last, `dataset.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import Experiment
from shards.files import read_json, sha256
from shards.tables import few

FORMAT_VERSION = 3
SPLITS = ("train", "val", "test")
MANIFEST = "dataset.json"
SAMPLES = "samples.parquet"
NOTICE = "NOTICE.txt"
"""Lies beside a source table, where it has something to say that no reader must miss."""
COLUMNS = (
    *("index", "key", "split", "shard", "offset", "size", "crc32", "width", "height"),
    *("original_width", "original_height", "label", "group", "lesion", "source"),
)
"""Columns of `samples.parquet` before those of the source tables. `shard` is the tar's file name, `width` and
`height` are those of the JPEG in it, `original_…` of the image that it was made from, upright."""

_NEEDED = ("settings", "sources", "classes", "positive", "splits", "duplicates", "rejected", "files")
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ShardSet:
    """N samples in tars; everything about them is addressed by their index, 0 ... N - 1."""

    folder: Path
    manifest: Mapping[str, Any]
    """Content of `dataset.json`."""
    samples: pa.Table
    """`samples.parquet`: N rows."""
    sha256: str
    """Of `dataset.json`, with the fold: the set's identity, since it holds the sums of all other files."""
    fold: int = 0
    """Of a set packed in folds: the one that is the test set."""

    @classmethod
    def open(cls, place: Path | str, fold: int = 0) -> "ShardSet":
        """Open a shard set: every file's size is compared, no tar's content is read.

        Args:
            place: its folder.
            fold: of a set packed in folds: the one that is the test set.

        Raises:
            UserError: if the folder is no shard set, of another format version, incomplete or damaged.
        """
        if is_url(place):
            raise UserError(
                f"{place}: a set at a URL cannot be read in place; copy it to a local folder first, or set "
                "loader.stage to a folder that training copies it to"
            )
        folder = Path(place)
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(
                f"{folder}: not a shard set, it has no {MANIFEST}; make one with `moleprint pack`"
            )
        manifest = read_json(path, "moleprint pack")
        version = manifest.get("version") if isinstance(manifest, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{folder}: shard set of format version {version}, this release reads {FORMAT_VERSION}; "
                "delete it, or set pack.output to another folder, and pack again with `moleprint pack`"
            )
        read_json(path, "moleprint pack", _NEEDED)
        wrong = []
        for name, about in manifest["files"].items():
            file = folder / name
            if not file.is_file():
                wrong.append(f"{name} is missing")
            elif file.stat().st_size != about["size"]:
                wrong.append(f"{name} has {file.stat().st_size} bytes instead of {about['size']}")
            elif name == SAMPLES and sha256(file) != about["sha256"]:
                wrong.append(f"{name} does not match its sum")
        if wrong:
            raise UserError(
                f"{folder}: damaged shard set: {few(wrong)}; copy it again or run `moleprint pack` anew"
            )
        folds = manifest["settings"]["folds"]
        if fold >= max(folds, 1):
            has = f"has {folds} folds, counted from 0" if folds else "is not packed in folds"
            raise UserError(
                f"{folder}: there is no fold {fold}, the set {has}; set loader.fold or pack.folds"
            )
        identity = f"{sha256(path)}-fold{fold}" if folds else sha256(path)
        return cls(folder, manifest, _read_samples(folder / SAMPLES), identity, fold)

    @classmethod
    def of(cls, experiment: Experiment) -> "ShardSet":
        """Open an experiment's shard set, copied to this node first where `loader.stage` asks for it.

        Raises:
            UserError: as `open` does, or if the set cannot be copied.
        """
        place: Path | str = experiment.pack.output
        stage = experiment.loader.stage
        if stage is not None:
            from shards.staging import staged  # it imports this module

            place = staged(place, stage)
        return cls.open(place, experiment.loader.fold)

    def __len__(self) -> int:
        return int(self.samples.num_rows)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Class names; their order is the class index."""
        return tuple(self.manifest["classes"])

    @property
    def positive(self) -> int:
        """Index of the class that figures are about."""
        return self.classes.index(self.manifest["positive"])

    @property
    def notice(self) -> str:
        """What readers must not miss about the data, such as that they are drawn; empty if nothing."""
        return str(self.manifest.get("notice", ""))

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """The tars, in the order of their samples."""
        return tuple(self.folder / name for name in self.manifest["files"] if name.endswith(".tar"))

    @cached_property
    def keys(self) -> NDArray[np.object_]:
        """(N,) image ids."""
        return np.array(self.samples["key"].to_pylist(), dtype=object)

    @cached_property
    def labels(self) -> Ints:
        """(N,) class indices."""
        return self._ints("label")

    @cached_property
    def group_names(self) -> tuple[str, ...]:
        """Group names; their order is the code in `groups`."""
        return self._coded_groups[0]

    @cached_property
    def groups(self) -> Ints:
        """(N,) group codes."""
        return self._coded_groups[1]

    @cached_property
    def shard(self) -> Ints:
        """(N,) index of the sample's tar in `paths`."""
        return self._codes("shard", [path.name for path in self.paths])

    @cached_property
    def offsets(self) -> Ints:
        """(N,) first byte of the JPEG in its tar."""
        return self._ints("offset")

    @cached_property
    def sizes(self) -> Ints:
        """(N,) bytes of the JPEG."""
        return self._ints("size")

    @cached_property
    def crc32(self) -> NDArray[np.uint32]:
        """(N,) checksum of the JPEG."""
        return np.asarray(self.samples["crc32"], dtype=np.uint32)

    @cached_property
    def widths(self) -> Ints:
        """(N,) pixels."""
        return self._ints("width")

    @cached_property
    def heights(self) -> Ints:
        """(N,) pixels."""
        return self._ints("height")

    def jpeg(self, index: int) -> bytes:
        """A sample's encoded image as it lies there, unchecked; raises OSError."""
        with self.paths[self.shard[index]].open("rb") as file:
            file.seek(int(self.offsets[index]))
            data: bytes = file.read(int(self.sizes[index]))
            return data

    def split(self, name: str) -> Ints:
        """Indices (n,) of a split's samples, ascending. The fold after the test set is for validation."""
        if name not in SPLITS:
            raise ValueError(f"no split '{name}'; there are {', '.join(SPLITS)}")
        parts = self.parts
        if parts == SPLITS:
            return np.flatnonzero(self._parts == parts.index(name)).astype(np.int64)
        held_out = {"test": self.fold, "val": (self.fold + 1) % len(parts)}
        if name in held_out:
            return np.flatnonzero(self._parts == held_out[name]).astype(np.int64)
        return np.flatnonzero(~np.isin(self._parts, list(held_out.values()))).astype(np.int64)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that groups were dealt to: train, val, test, or folds."""
        return tuple(self.manifest["splits"])

    def summary(self) -> list[str]:
        """Images, groups and images of each class per split, with their shares: lines to print."""
        return summary(self.manifest)

    @cached_property
    def _coded_groups(self) -> tuple[tuple[str, ...], Ints]:
        coded = self.samples["group"].combine_chunks().dictionary_encode()
        return tuple(coded.dictionary.to_pylist()), coded.indices.to_numpy().astype(np.int64)

    @cached_property
    def _parts(self) -> Ints:
        """(N,) index of the sample's part in `parts`."""
        return self._codes("split", self.parts)

    def _codes(self, column: str, names: Sequence[str]) -> Ints:
        return np.asarray(pc.index_in(self.samples[column], pa.array(names)), dtype=np.int64)

    def _ints(self, column: str) -> Ints:
        return np.asarray(self.samples[column], dtype=np.int64)


def _read_samples(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}); copy it again") from None
    lacking = [name for name in COLUMNS if name not in table.column_names]
    if lacking:
        raise UserError(f"{path}: lacks the columns {few(lacking)}; pack the set again")
    return table


def is_url(place: Path | str) -> bool:
    """Whether a place is a URL such as s3://bucket/set, not a folder."""
    return isinstance(place, str) and "://" in place


def summary(manifest: Mapping[str, Any]) -> list[str]:
    """Images, groups and images of each class per split of `dataset.json`, with their shares."""
    splits: dict[str, dict[str, Any]] = manifest["splits"]
    rows = [["", "images", "groups", *manifest["classes"]]]
    flat = {
        name: [about["images"], about["groups"], *about["classes"].values()] for name, about in splits.items()
    }
    totals = [sum(column) for column in zip(*flat.values(), strict=True)]
    for name, counts in flat.items():
        rows.append([name, *(f"{n:,} ({n / of:.1%})" for n, of in zip(counts, totals, strict=True))])
    rows.append(["all", *(f"{total:,}" for total in totals)])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's rows with its columns under each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
