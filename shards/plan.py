"""Which image goes into which split and shard: decided from the tables and what was found of the images."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from configs.fields import canonical
from configs.packing import Pack
from shards.images import without_ending
from shards.leaks import KINDS, Pairs, Search, duplicates, join
from shards.near import near_pairs
from shards.records import Records, read_pairs
from shards.scan import Fact
from shards.split import Purpose, connect, generator, split, tie, undersample
from shards.tables import few

Ints = NDArray[np.int64]
UNDEALT = -1


@dataclass(frozen=True)
class Plan:
    """The shard set to be."""

    records: Records
    """N images, in the order of their index in the shard set."""
    rows: Ints
    """(N,) row of each in the tables."""
    splits: Ints
    """(N,) index in `pack.split_names`, ascending."""
    shards: dict[str, slice]
    """Name of each tar, without its ending -> the images it holds."""
    pairs: Pairs
    """Duplicates among all images of the tables, by their rows there."""
    dropped: int
    """Images left out as copies of others, as the configuration asks."""


def make_plan(
    settings: Pack, records: Records, facts: Sequence[Fact] | None = None, search: Search = near_pairs
) -> Plan:
    """Drop what is rejected and thin as asked, deal groups to splits, shuffle, cut into shards.

    What ties two groups does so even where the images that tell of it are left out.

    Args:
        records: all images of the tables.
        facts: what was found of each; None plans from the tables alone, to find their mistakes early.
        search: what finds near duplicates.

    Raises:
        UserError: for a mistake in a list of duplicates or of a split; for a split that lacks a class.
    """
    pairs = Pairs.of(read_pairs(settings, records), "listed")
    rows = np.arange(len(records))
    if facts is not None:
        pairs = join([pairs, duplicates(facts, settings.near_duplicates, search)])
        rows = np.flatnonzero([not fact.reason for fact in facts])
    units = tie(_codes(records.groups), np.concatenate([pairs.rows, _chains(records.lesions)]))
    given = _given_to_units(settings, records, units)
    free = [part for part in range(len(settings.split_names)) if not (given == part).any()]

    usable = len(rows)
    if settings.duplicates_action == "drop":
        rows = _without_listed(records, pairs, rows)
    dropped = usable - len(rows)
    if settings.undersample:
        rows = rows[undersample(records.labels[rows], settings.seed)]
    kept = records.take(rows)
    groups = _codes(kept.groups)
    splits = _deal(settings, kept, units[rows], given[rows], free)
    _refuse_gaps(settings, kept, groups, splits)

    order, ends = _order(settings, groups, splits)
    sizes = np.array([facts[row].size if facts else 0 for row in rows[order]], dtype=np.int64)
    shards = _cut(settings, splits[order], sizes, ends)
    return Plan(kept.take(order), rows[order], splits[order], shards, pairs, dropped)


def _codes(names: NDArray[Any]) -> Ints:
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def _chains(names: NDArray[Any]) -> Ints:
    """Pairs (m, 2) that join all images of one name; blanks are no names."""
    first: dict[str, int] = {}
    pairs = [(first.setdefault(name, n), n) for n, name in enumerate(names) if name]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _without_listed(records: Records, pairs: Pairs, rows: Ints) -> Ints:
    """Of images listed as duplicates, directly or through others, keep the first usable one in id order."""
    together = connect(len(records), pairs.rows[pairs.kinds == KINDS.index("listed")])
    by_id = rows[np.argsort(records.keys[rows], kind="stable")]
    return np.sort(by_id[np.unique(together[by_id], return_index=True)[1]])


def _given_to_units(settings: Pack, records: Records, units: Ints) -> Ints:
    """(N,) the split that the configuration gives each image's unit, or UNDEALT."""
    names = settings.split_names
    given = _given(settings, records)
    chosen = np.full(int(units.max()) + 1, UNDEALT)
    for part in range(len(names)):
        mine = np.unique(units[given == part])
        torn = mine[chosen[mine] != UNDEALT]
        if len(torn):
            inside = np.flatnonzero(units == torn[0])
            one = inside[given[inside] == chosen[torn[0]]][0]
            other = inside[given[inside] == part][0]
            raise UserError(
                f"the given split leaks: {records.keys[one]} is in {names[chosen[torn[0]]]} and "
                f"{records.keys[other]} in {names[part]}, {_why_tied(records, one, other)}"
                + (f"; and {len(torn) - 1} more" if len(torn) > 1 else "")
                + "; correct pack.split_column or pack.split_files"
            )
        chosen[mine] = part
    return chosen[units]


def _deal(settings: Pack, records: Records, units: Ints, splits: Ints, free: Sequence[int]) -> Ints:
    """Index (N,) of each image's split: as given where it is, dealt among the `free` ones for the others."""
    left = np.flatnonzero(splits == UNDEALT)
    if not len(left):
        return splits
    if not free:
        raise UserError(
            f"{len(left)} images are in no split, first {records.keys[left[0]]}; give them one, or leave "
            "a split out for them"
        )
    asked = _ratios(settings)[free]
    dealt = split(_codes(units[left]), records.labels[left], tuple(asked / asked.sum()), settings.seed)
    splits = splits.copy()
    splits[left] = np.array(free)[dealt]
    return splits


def _ratios(settings: Pack) -> NDArray[np.float64]:
    if settings.folds:
        return np.full(settings.folds, 1 / settings.folds)
    return np.array([settings.ratios.train, settings.ratios.val, settings.ratios.test])


def _given(settings: Pack, records: Records) -> Ints:
    """(N,) the split that the configuration's column or files give an image, or UNDEALT."""
    names = {name: part for part, name in enumerate(settings.split_names)}
    given = np.full(len(records), UNDEALT)
    if settings.split_column:
        column = settings.split_column
        if column not in records.metadata.column_names:
            for key in ("id_column", "group_column"):
                if column in {getattr(source, key) for source in settings.each_source.values()}:
                    raise UserError(
                        f"pack.split_column is '{column}', as pack.{key} is; name the column that says which "
                        f"split an image is in ({', '.join(names)}), or leave it out to split by group"
                    )
            raise UserError(f"no table has a column '{column}'; correct pack.split_column")
        also = {str(n): n for n in range(settings.folds)} or {"training": 0, "validation": 1, "valid": 1}
        known = names | also
        cells = records.metadata[column].to_pylist()
        values = ["" if cell is None else canonical(cell).lower() for cell in cells]
        wrong = [n for n, value in enumerate(values) if value and value not in known]
        if wrong:
            raise UserError(
                f"pack.split_column: {len(wrong)} images are in no known split, first "
                f"{records.keys[wrong[0]]} in '{values[wrong[0]]}'; there are {', '.join(names)}"
            )
        given = np.array([known.get(value, UNDEALT) for value in values])
    for name, path in settings.split_files.items():
        rows = _listed(path, records)
        twice = rows[(given[rows] != UNDEALT) & (given[rows] != names[name])]
        if len(twice):
            raise UserError(
                f"{path}: {len(twice)} images are in another split's file too, first "
                f"{records.keys[twice[0]]}; take them out of one; see pack.split_files"
            )
        given[rows] = names[name]
    return given


def _listed(path: Path, records: Records) -> Ints:
    """Rows of the ids, or keys, in a file."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: cannot be read ({reason}); see pack.split_files") from None
    ids = [without_ending(line.strip()) for line in lines if line.strip()]
    row = records.rows_by_name()
    unknown = [name for name in ids if name not in row]
    if unknown or not ids:
        raise UserError(
            f"{path}: {len(unknown)} of its {len(ids)} lines are the id of no image, or of several sources' "
            f"({few(unknown)}); correct it (SOURCE_ID names one source's image); see pack.split_files"
        )
    return np.array([row[name] for name in ids])


def _why_tied(records: Records, one: int, other: int) -> str:
    if records.groups[one] == records.groups[other]:
        return f"both of group {records.groups[one]}"
    if records.lesions[one] and records.lesions[one] == records.lesions[other]:
        return f"both of lesion {records.lesions[one]}"
    return "tied by duplicates, perhaps over other images"


def _refuse_gaps(settings: Pack, records: Records, groups: Ints, splits: Ints) -> None:
    classes = tuple(settings.classes)
    gaps = [
        f"{name} has no {label}"
        for part, name in enumerate(settings.split_names)
        for index, label in enumerate(classes)
        if not ((splits == part) & (records.labels == index)).any()
    ]
    if gaps:
        have = [f"{len(np.unique(groups[records.labels == i]))} with {c}" for i, c in enumerate(classes)]
        raise UserError(
            f"the split cannot be stratified: {few(gaps)}; of {len(np.unique(groups))} groups there are "
            f"{', '.join(have)}; every split needs one of each class: add groups, or change "
            f"{'pack.folds' if settings.folds else 'pack.ratios'}"
        )


def _order(settings: Pack, groups: Ints, splits: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Shuffled images (N,), split by split, and whether a shard may end after each, (N,)."""
    order = []
    for part in range(len(settings.split_names)):
        mine = np.flatnonzero(splits == part)
        draw = generator(settings.seed, Purpose.ORDER, part)
        shuffled = draw.permutation(mine)
        if settings.whole_groups:
            place = draw.permutation(int(groups.max()) + 1)
            shuffled = shuffled[np.argsort(place[groups[shuffled]], kind="stable")]
        order.append(shuffled)
    joined = np.concatenate(order)
    ends = np.ones(len(joined), dtype=bool)
    if settings.whole_groups:
        ends[:-1] = groups[joined[1:]] != groups[joined[:-1]]
    return joined, ends


def _cut(settings: Pack, splits: Ints, sizes: Ints, ends: NDArray[np.bool_]) -> dict[str, slice]:
    """Name of each shard -> its images. Alike in number, or filled one by one where bytes or groups count."""
    shards = {}
    for part, name in enumerate(settings.split_names):
        mine = np.flatnonzero(splits == part)
        if settings.megabytes_per_shard or settings.whole_groups:
            most = settings.megabytes_per_shard * 1_000_000 or np.inf
            cuts = _filled(sizes[mine], np.flatnonzero(ends[mine]) + 1, settings.samples_per_shard, most)
        else:
            pieces = -(-len(mine) // settings.samples_per_shard)
            cuts = np.cumsum([len(chunk) for chunk in np.array_split(mine, pieces)]).tolist()
        for piece, (start, stop) in enumerate(pairwise([0, *cuts])):
            shards[f"{name}-{piece:06d}"] = slice(int(mine[0]) + start, int(mine[0]) + stop)
    return shards


def _filled(sizes: Ints, allowed: Ints, samples: int, most: float) -> list[int]:
    """Where shards end: at the last allowed place within both limits, or the next one if there is none."""
    total = np.cumsum(sizes)
    cuts = [0]
    while cuts[-1] < len(sizes):
        start = cuts[-1]
        before = total[start - 1] if start else 0
        fits = min(start + samples, int(np.searchsorted(total, before + most, side="right")))
        last = int(np.searchsorted(allowed, fits, side="right")) - 1
        beyond = int(np.searchsorted(allowed, start, side="right"))
        cuts.append(int(allowed[max(last, beyond)]))
    return cuts[1:]
