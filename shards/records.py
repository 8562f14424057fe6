"""Metadata tables -> validated records: one key, group, label and source an image."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from configs.errors import UserError
from configs.fields import canonical
from configs.packing import Pack, Source
from shards.images import without_ending
from shards.tables import few, read_table, refuse_blanks, require, texts, typed

_KEY = re.compile(r"(?:(?![./\\])[!-~]){1,90}")
"""Printable ASCII without dot, space and slash, short enough for a member's name in a USTAR header."""


Classes = dict[int, tuple[str | int, ...]]
"""Class index -> the values, or columns, that mean it."""


@dataclass(frozen=True)
class Records:
    """N images of one or more tables, in their order."""

    keys: NDArray[np.object_]
    """(N,) names in the shard set: image ids without a file's ending, behind their source's name if any."""
    ids: NDArray[np.object_]
    """(N,) image ids, without a file's ending."""
    sources: NDArray[np.object_]
    """(N,) names of the sources; empty where there is one without a name."""
    groups: NDArray[np.object_]
    """(N,) group names: patients, or lesions; behind their source's name if any."""
    lesions: NDArray[np.object_]
    """(N,) lesion names, empty where none is known; behind their source's name if any."""
    labels: NDArray[np.int64]
    """(N,) class indices."""
    metadata: pa.Table
    """N rows: the tables' columns but id and group; numbers as numbers, blanks as nulls."""

    def __len__(self) -> int:
        return len(self.keys)

    def rows_by_name(self) -> dict[str, int]:
        """Row of every key, and of every id that one source alone has."""
        times = Counter(self.ids)
        alone = {name: row for row, name in enumerate(self.ids) if times[name] == 1}
        return alone | {key: row for row, key in enumerate(self.keys)}

    def take(self, rows: NDArray[np.int64]) -> "Records":
        """The records at `rows` (k,), in that order."""
        return Records(
            keys=self.keys[rows],
            ids=self.ids[rows],
            sources=self.sources[rows],
            groups=self.groups[rows],
            lesions=self.lesions[rows],
            labels=self.labels[rows],
            metadata=self.metadata.take(rows),
        )


def read(settings: Pack, work: Path = Path()) -> Records:
    """Read and validate the metadata tables of all sources.

    Args:
        work: folder with what was fetched of shards that are their own table.

    Raises:
        UserError: for a table that cannot be read, a missing column, a row without id or group, an id given
            twice or unfit for a key, a label that belongs to no class, a class without an image.
    """
    index = {label: number for number, label in enumerate(settings.classes)}
    parts = [_read(name, source, index, work) for name, source in settings.each_source.items()]
    tables = pa.concat_tables([part.metadata for part in parts], promote_options="default")
    columns = {name: typed(tables[name].combine_chunks()) for name in tables.column_names}
    records = Records(
        keys=np.concatenate([part.keys for part in parts]),
        ids=np.concatenate([part.ids for part in parts]),
        sources=np.concatenate([part.sources for part in parts]),
        groups=np.concatenate([part.groups for part in parts]),
        lesions=np.concatenate([part.lesions for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        metadata=pa.table(columns) if columns else tables,
    )
    _refuse_empty_classes(settings, records.labels, work)
    return records


def read_pairs(settings: Pack, records: Records) -> NDArray[np.int64]:
    """Listed duplicates as rows (m, 2) of `records`; pairs with an image outside the tables are left out.

    An id means the image of the list's own source, else that of the only other source that has it.

    Raises:
        UserError: if a list cannot be read, has not two columns, or names no pair of the tables.
    """
    known = records.rows_by_name()
    pairs: dict[tuple[int, int], None] = {}  # a list that several sources share is read for each of them
    for name, source in settings.each_source.items():
        if source.duplicates:
            own = {records.ids[row]: int(row) for row in np.flatnonzero(records.sources == name)}
            found = _read_pairs(source.duplicates, known | own)
            pairs |= dict.fromkeys(pair for pair in found if pair[0] != pair[1])
    return np.array(list(pairs), dtype=np.int64).reshape(-1, 2)


def table_of(source: Source, work: Path) -> pa.Table:
    """All columns of a source as text, further tables joined by id."""
    if source.table is None:
        from shards.webshards import table

        return table(source.images, work)
    table = read_table(source.table, "pack.table")
    require(table, source.table, source.id_column, "pack.id_column")
    for path in source.more_tables:
        table = _join(table, read_table(path, "pack.more_tables"), path, source.id_column)
    return table


def _read(name: str, source: Source, index: dict[str, int], work: Path) -> Records:
    """The records of one source, metadata still as text. `index`: of every class of the set."""
    path = source.table or source.images
    table = table_of(source, work)
    require(table, path, source.id_column, "pack.id_column")
    require(table, path, source.group_column, "pack.group_column")
    ids = _ids(path, table, source.id_column)
    groups = texts(table, source.group_column)
    if source.blank_groups == "own":
        groups = [group or f"alone-{key}" for key, group in zip(ids, groups, strict=True)]
    refuse_blanks(
        path, groups, f"group (column '{source.group_column}')", "; or set pack.blank_groups to own"
    )
    lesion = source.lesion_column
    lesions = texts(table, lesion) if lesion in table.column_names else [""] * len(ids)
    own = {index[label]: values for label, values in source.classes.items()}
    labels = _one_hot(own, path, ids, table) if source.one_hot else _labels(source, own, path, ids, table)
    labelled = {source.label_column, source.lesion_column}
    others = [
        n for n in table.column_names if n and n not in {source.id_column, source.group_column} - labelled
    ]

    if name and len(longest := max(ids, key=len)) + len(name) + 1 > 90:
        raise UserError(
            f"{path}: image id {longest} is too long for a file's name in a shard behind its source's name "
            f"{name}_ (90 characters); give pack.sources a shorter name"
        )

    def named(values: Sequence[str], joint: str) -> NDArray[np.object_]:
        return np.array([f"{name}{joint}{v}" if name and v else v for v in values], dtype=object)

    return Records(
        keys=named(ids, "_"),
        ids=np.array(ids, dtype=object),
        sources=np.array([name] * len(ids), dtype=object),
        groups=named(groups, "/"),
        lesions=named(lesions, "/"),
        labels=labels,
        metadata=table.select(others),
    )


def _join(table: pa.Table, other: pa.Table, path: Path, id_column: str) -> pa.Table:
    """The columns of `other` that `table` lacks, by id. Ids that `other` lacks get blanks."""
    require(other, path, id_column, "pack.id_column")
    row = {without_ending(text): number for number, text in enumerate(texts(other, id_column))}
    if len(row) < other.num_rows:
        raise UserError(
            f"{path}: {other.num_rows - len(row)} image ids occur more than once; keep one row each"
        )
    rows = pa.array([row.get(without_ending(text)) for text in texts(table, id_column)], pa.int64())
    if rows.null_count == len(rows):
        raise UserError(
            f"{path}: has none of the table's images in column '{id_column}'; see pack.more_tables"
        )
    for name in other.column_names:
        if name and name not in table.column_names:
            table = table.append_column(name, other[name].take(rows))
    return table


def _ids(path: object, table: pa.Table, column: str) -> list[str]:
    ids = [without_ending(text) for text in texts(table, column)]
    refuse_blanks(path, ids, f"image id (column '{column}')")
    twice = [key for key, count in Counter(ids).items() if count > 1]
    if twice:
        raise UserError(
            f"{path}: {len(twice)} image ids occur more than once ({few(twice)}); keep one row each"
        )
    unfit = [repr(key) for key in ids if not _KEY.fullmatch(key)]
    if unfit:
        raise UserError(
            f"{path}: {len(unfit)} image ids cannot name a file in a shard ({few(unfit)}); use at most 90 "
            "ASCII characters without dot, space and slash"
        )
    return ids


def _labels(
    source: Source, classes: Classes, path: object, ids: Sequence[str], table: pa.Table
) -> NDArray[np.int64]:
    """Class indices (N,) from the label column."""
    column = source.label_column
    require(table, path, column, "pack.label_column")
    meaning = {canonical(value): index for index, values in classes.items() for value in values}
    rest = meaning.pop("*", None)
    values = [canonical(text) for text in texts(table, column)]
    refuse = [n for n, value in enumerate(values) if value not in meaning and (rest is None or not value)]
    if refuse:
        found = [f"{value!r} ({count})" for value, count in Counter(values[n] for n in refuse).most_common()]
        raise UserError(
            f"{path}: {len(refuse)} labels belong to no class, first at image {ids[refuse[0]]}; column "
            f"'{column}' holds {few(found, 8)}; pack.classes knows {few(list(meaning), 8)}"
        )
    return np.array([meaning.get(value, rest) for value in values], dtype=np.int64)


def _one_hot(classes: Classes, path: object, ids: Sequence[str], table: pa.Table) -> NDArray[np.int64]:
    """Class indices (N,) from the columns that `classes` names: exactly one of them must be 1 in each row."""
    index, hot = [], []
    for number, columns in classes.items():
        for column in map(str, columns):
            require(table, path, column, "pack.classes")
            index.append(number)
            hot.append([canonical(text) == "1" for text in texts(table, column)])
    matrix = np.array(hot)  # (columns, N)
    wrong = np.flatnonzero(matrix.sum(axis=0) != 1)
    if len(wrong):
        raise UserError(
            f"{path}: {len(wrong)} images have not exactly one 1 in the columns that pack.classes names, "
            f"first {ids[wrong[0]]}; name all columns, or take the rows out"
        )
    return np.asarray(np.array(index)[matrix.argmax(axis=0)], dtype=np.int64)


def _refuse_empty_classes(settings: Pack, labels: NDArray[np.int64], work: Path) -> None:
    counts = np.bincount(labels, minlength=len(settings.classes))
    empty = [name for name, count in zip(settings.classes, counts, strict=True) if not count]
    if not empty:
        return
    where: list[Any] = [source.table or source.images for source in settings.each_source.values()]
    held = ""
    if not settings.one_hot and not settings.sources:
        column = settings.label_column
        values = sorted(set(map(canonical, texts(table_of(settings, work), column))))
        held = f"; column '{column}' holds {few(values, 8)}"
    raise UserError(
        f"{few(where)}: no image of class {few(empty)}{held}; correct pack.classes or pack.label_column"
    )


def _read_pairs(path: Path, row: dict[str, int]) -> list[tuple[int, int]]:
    table = read_table(path, "pack.duplicates")
    columns = [name for name in table.column_names if name]
    if len(columns) != 2:
        raise UserError(f"{path}: pack.duplicates must have two columns of image ids, found {columns}")
    if all(without_ending(name) in row for name in columns):
        raise UserError(
            f"{path}: its first line is a pair of images ({', '.join(columns)}), which would be taken for "
            "the columns' names; put a line such as one,other before it"
        )
    ids = [[without_ending(text) for text in texts(table, name)] for name in columns]
    pairs = [(row[one], row[other]) for one, other in zip(*ids, strict=True) if one in row and other in row]
    if not pairs:
        raise UserError(
            f"{path}: none of its {table.num_rows} pairs is in the table (first: {ids[0][0]}, {ids[1][0]}); "
            "give the list that belongs to this table, or leave pack.duplicates out"
        )
    return pairs
