"""Duplicates: those listed, exact ones by content, near ones by perceptual hash; and what crosses splits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.near import FEATURELESS, near_pairs
from shards.scan import Fact

Ints = NDArray[np.int64]
KINDS = ("listed", "exact", "near")


@dataclass(frozen=True)
class Pairs:
    """Pairs of images that must not be on two sides of a split."""

    rows: Ints
    """(m, 2) images."""
    kinds: Ints
    """(m,) index in KINDS."""
    distances: Ints
    """(m,) bits of 256 in which the perceptual hashes differ; −1 where it was not asked for."""

    @classmethod
    def of(cls, rows: Ints, kind: str, distances: Ints | None = None) -> "Pairs":
        """All of one kind."""
        unknown = np.full(len(rows), -1, np.int64)
        return cls(rows, np.full(len(rows), KINDS.index(kind)), unknown if distances is None else distances)


def join(parts: Sequence[Pairs]) -> Pairs:
    """Pairs of several kinds as one."""
    return Pairs(*(np.concatenate([getattr(p, n) for p in parts]) for n in ("rows", "kinds", "distances")))


Search = Callable[[NDArray[np.uint64], int], tuple[Ints, Ints]]


def duplicates(facts: Sequence[Fact], distance: int | None, search: Search = near_pairs) -> Pairs:
    """Exact and near duplicates among scanned images.

    Of k equal images the first is paired with each other one; near pairs are sought among the firsts.

    Args:
        facts: what was found of each image.
        distance: most bits of 256 in which the hashes of near duplicates differ; None seeks exact ones only.
        search: what finds the near ones.

    Raises:
        UserError: if the distance ties images without end.
    """
    usable = np.array([n for n, fact in enumerate(facts) if not fact.reason], dtype=np.int64)
    first: dict[str, int] = {}
    exact = np.array(
        [(one, n) for n in usable.tolist() if (one := first.setdefault(facts[n].sha256, n)) != n],
        dtype=np.int64,
    ).reshape(-1, 2)
    pairs = [Pairs.of(exact, "exact", np.zeros(len(exact), np.int64))]
    if distance is not None:
        unlike = FEATURELESS.hex()
        rows = np.array([n for n in first.values() if facts[n].hash not in ("", unlike)], dtype=np.int64)
        raw = b"".join(bytes.fromhex(facts[n].hash) for n in rows)
        near, bits = search(np.frombuffer(raw, np.uint64).reshape(len(rows), -1), distance)
        pairs.append(Pairs.of(rows[near], "near", bits))
    return join(pairs)


def crossing(names: NDArray[Any], splits: NDArray[Any]) -> list[str]:
    """Names that occur in more than one split, sorted; blanks are no names.

    Args:
        names: (N,) group, lesion or content of each image.
        splits: (N,) split of each image.
    """
    table = pa.table({"name": pa.array(names, pa.string()), "split": pa.array(splits)})
    spread = table.group_by("name").aggregate([("split", "count_distinct")])
    many = np.asarray(spread["split_count_distinct"]) > 1
    return sorted(name for name in spread.filter(pa.array(many))["name"].to_pylist() if name)


def report(pairs: Pairs, keys: NDArray[Any], groups: NDArray[Any], splits: NDArray[Any]) -> pa.Table:
    """`duplicates.csv`: every pair, what makes it one, and the split that both are in.

    Args:
        keys, groups, splits: (N,) of all images of the tables; the split is empty where one was left out.
    """
    one, other = pairs.rows.T
    return pa.table(
        {
            "one": pa.array(keys[one], pa.string()),
            "other": pa.array(keys[other], pa.string()),
            "kind": pa.array(np.array(KINDS)[pairs.kinds]),
            "distance": pa.array(pairs.distances, mask=pairs.distances < 0),
            "same_group": pa.array(groups[one] == groups[other]),
            "split_of_one": pa.array(splits[one], pa.string()),
            "split_of_other": pa.array(splits[other], pa.string()),
        }
    )
