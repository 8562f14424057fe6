"""Which image goes into which split and shard, decided from the tables alone, before any image is opened."""

from dataclasses import dataclass

import numpy as np

from configs.errors import UserError
from configs.schema import Pack
from shards.records import Records, few, read, read_pairs
from shards.shardset import SPLITS, Ints
from shards.split import Purpose, connect, generator, split, tie, undersample


@dataclass(frozen=True)
class Plan:
    """The shard set to be."""

    records: Records
    """N images, in the order of their index in the shard set."""
    splits: Ints
    """(N,) index in SPLITS, ascending."""
    shards: dict[str, slice]
    """Name of each tar, without its ending -> the images it holds."""


def make_plan(settings: Pack) -> Plan:
    """Read the table, thin it as asked, deal groups to splits, shuffle each split, cut it into shards.

    Raises:
        UserError: for any mistake in the table or the duplicates list; for a split that lacks a class.
    """
    records = read(settings)
    pairs = np.empty((0, 2), dtype=np.int64)
    if settings.duplicates:
        pairs = read_pairs(settings.duplicates, records.keys)
        if settings.duplicates_action == "drop":
            records, pairs = _drop_duplicates(records, pairs), pairs[:0]
    if settings.undersample:
        rows = undersample(records.labels, settings.seed)
        place = np.full(len(records), -1)
        place[rows] = np.arange(len(rows))
        records, pairs = records.take(rows), place[pairs]
        pairs = pairs[(pairs >= 0).all(axis=1)]
    groups = np.unique(records.groups, return_inverse=True)[1].astype(np.int64)
    ratios = tuple(getattr(settings.ratios, name) for name in SPLITS)
    splits = split(tie(groups, pairs), records.labels, ratios, settings.seed)
    _refuse_gaps(records, groups, splits, tuple(settings.classes))

    rows = np.concatenate(
        [
            generator(settings.seed, Purpose.ORDER, part).permutation(np.flatnonzero(splits == part))
            for part in range(len(SPLITS))
        ]
    )
    shards = {}
    start = 0
    for part, count in enumerate(np.bincount(splits)):
        pieces = -(-count // settings.samples_per_shard)
        for piece, chunk in enumerate(np.array_split(np.arange(start, start + count), pieces)):
            shards[f"{SPLITS[part]}-{piece:06d}"] = slice(int(chunk[0]), int(chunk[-1]) + 1)
        start += count
    return Plan(records.take(rows), splits[rows], shards)


def _drop_duplicates(records: Records, pairs: Ints) -> Records:
    """Of images that are listed as duplicates, directly or through others, keep the first in id order."""
    by_id = np.argsort(records.keys)
    rank = np.argsort(by_id)
    first = connect(len(records), rank[pairs])[rank]  # lowest rank among each image's duplicates
    return records.take(np.flatnonzero(first == rank))


def _refuse_gaps(records: Records, groups: Ints, splits: Ints, classes: tuple[str, ...]) -> None:
    gaps = [
        f"{name} has no {label}"
        for part, name in enumerate(SPLITS)
        for index, label in enumerate(classes)
        if not ((splits == part) & (records.labels == index)).any()
    ]
    if gaps:
        have = [f"{len(np.unique(groups[records.labels == i]))} with {c}" for i, c in enumerate(classes)]
        raise UserError(
            f"the split cannot be stratified: {few(gaps)}; of {len(np.unique(groups))} groups there are "
            f"{', '.join(have)}; every split needs one of each class: add groups, or change pack.ratios"
        )
