"""Metadata table and image folder -> validated records: one key, group, label and file an image."""

import contextlib
import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv

from configs.errors import UserError
from configs.schema import Pack, canonical

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""Image files are known by these endings, in either case."""

_KEY = re.compile(r"(?:(?![./\\])[!-~]){1,90}")
"""Printable ASCII without dot, space and slash, short enough for a member's name in a USTAR header."""

_NUMBER = r"^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$"


@dataclass(frozen=True)
class Records:
    """N images of a table, in its order."""

    keys: NDArray[np.object_]
    """(N,) image ids, without a file's ending."""
    groups: NDArray[np.object_]
    """(N,) group names: patients, or lesions."""
    labels: NDArray[np.int64]
    """(N,) class indices."""
    metadata: pa.Table
    """N rows: the table's columns but id and group; numbers as numbers, blanks as nulls."""

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: NDArray[np.int64]) -> "Records":
        """The records at `rows` (k,), in that order."""
        return Records(self.keys[rows], self.groups[rows], self.labels[rows], self.metadata.take(rows))


def few(items: Sequence[object], limit: int = 3) -> str:
    """The first few of many, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more


def read(settings: Pack) -> Records:
    """Read and validate the metadata table.

    Raises:
        UserError: for a table that cannot be read, a missing column, a row without id or group, an id given
            twice or unfit for a key, a label that belongs to no class.
    """
    path = settings.table
    table = _read_csv(path, "pack.table")
    for key in ("id_column", "group_column", "label_column"):
        _require(table, path, getattr(settings, key), f"pack.{key}")
    keys = _keys(path, table, settings.id_column)
    groups = _texts(table, settings.group_column)
    _refuse_blanks(path, groups, f"group (column '{settings.group_column}')")
    labels = _labels(settings, keys, _texts(table, settings.label_column))
    others = table.drop_columns(list({settings.id_column, settings.group_column} - {settings.label_column}))
    metadata = pa.table({name: _typed(others.column(name)) for name in others.column_names if name})
    return Records(np.array(keys, dtype=object), np.array(groups, dtype=object), labels, metadata)


def read_pairs(path: Path, keys: NDArray[np.object_]) -> NDArray[np.int64]:
    """Listed duplicates as rows (m, 2) of `keys` (n,); pairs with an image outside the table are left out.

    Raises:
        UserError: if the list cannot be read, has not two columns, or names no pair of the table.
    """
    table = _read_csv(path, "pack.duplicates")
    columns = [name for name in table.column_names if name]
    if len(columns) != 2:
        raise UserError(f"{path}: pack.duplicates must have two columns of image ids, found {columns}")
    row = {key: number for number, key in enumerate(keys)}
    ids = [[_without_suffix(text) for text in _texts(table, name)] for name in columns]
    pairs = [(row[one], row[other]) for one, other in zip(*ids, strict=True) if one in row and other in row]
    if not pairs:
        raise UserError(
            f"{path}: none of its {table.num_rows} pairs is in the table (first: {ids[0][0]}, {ids[1][0]}); "
            "give the list that belongs to this table, or leave pack.duplicates out"
        )
    return np.array(pairs, dtype=np.int64)


def locate(keys: Iterable[str], folder: Path) -> list[Path]:
    """The image file of every key, sought in `folder` and its subfolders by its name without the ending.

    Raises:
        UserError: if the folder or an image is missing, or a key has more than one file.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; set pack.images to the folder that holds the images")
    files: dict[str, list[Path]] = {}
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            if file.suffix.lower() in SUFFIXES:
                files.setdefault(file.stem, []).append(file)
    missing, located = [], []
    for key in keys:
        found = files.get(key, [])
        if len(found) > 1:
            several = few(sorted(str(file.relative_to(folder)) for file in found))
            raise UserError(f"{folder}: image id {key} has {len(found)} files ({several}); keep one")
        located += found
        if not found:
            missing.append(key)
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of the table's {len(missing) + len(located)} images not found "
            f"({few(missing)}); {len(files)} images are there and below; set pack.images to their folder, "
            "or take the rows out of the table"
        )
    return located


def _read_csv(path: Path, key: str) -> pa.Table:
    """Every column as text with blanks as nulls, so that no type is guessed from the first rows alone."""
    parse = csv.ParseOptions(newlines_in_values=True)
    try:
        with csv.open_csv(path, parse_options=parse) as start:
            names = start.schema.names
        as_text = csv.ConvertOptions(column_types={n: pa.string() for n in names}, strings_can_be_null=True)
        table = csv.read_csv(path, parse_options=parse, convert_options=as_text)
    except FileNotFoundError:
        raise UserError(f"{path}: table not found; set {key} to a CSV file") from None
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as a CSV table in UTF-8 ({reason}); see {key}") from None
    names = [name.strip() for name in names]
    twice = sorted(name for name, count in Counter(names).items() if name and count > 1)
    if twice:
        raise UserError(f"{path}: column {few(twice)} is there twice; rename or delete one")
    if not table.num_rows:
        raise UserError(f"{path}: has a header and no rows; set {key} to the full table")
    return table.rename_columns(names)


def _require(table: pa.Table, path: Path, column: str, key: str) -> None:
    if column in table.column_names:
        return
    near = difflib.get_close_matches(column, table.column_names, n=1)
    raise UserError(
        f"{path}: no column '{column}'; it has {', '.join(filter(None, table.column_names))}; "
        f"set {key}" + (f", perhaps to {near[0]}" if near else " to one of them")
    )


def _texts(table: pa.Table, column: str) -> list[str]:
    """A column's values, trimmed; a blank is the empty string."""
    return [(text or "").strip() for text in table.column(column).to_pylist()]


def _refuse_blanks(path: Path, texts: Sequence[str], what: str) -> None:
    blank = [number for number, text in enumerate(texts, start=1) if not text]
    if blank:
        raise UserError(
            f"{path}: {len(blank)} rows have no {what}: data row {few(blank)}; fill it in, or take them out"
        )


def _without_suffix(text: str) -> str:
    suffix = Path(text).suffix
    return text.removesuffix(suffix) if suffix.lower() in SUFFIXES else text


def _keys(path: Path, table: pa.Table, column: str) -> list[str]:
    keys = [_without_suffix(text) for text in _texts(table, column)]
    _refuse_blanks(path, keys, f"image id (column '{column}')")
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise UserError(
            f"{path}: {len(twice)} image ids occur more than once ({few(twice)}); keep one row each"
        )
    unfit = [repr(key) for key in keys if not _KEY.fullmatch(key)]
    if unfit:
        raise UserError(
            f"{path}: {len(unfit)} image ids cannot name a file in a shard ({few(unfit)}); use at most 90 "
            "ASCII characters without dot, space and slash"
        )
    return keys


def _labels(settings: Pack, keys: Sequence[str], texts: Sequence[str]) -> NDArray[np.int64]:
    """Class indices (N,). Every class must occur."""
    path, column = settings.table, settings.label_column
    meaning = {
        canonical(value): index for index, values in enumerate(settings.classes.values()) for value in values
    }
    values = [canonical(text) for text in texts]
    unknown = [number for number, value in enumerate(values) if value not in meaning]
    if unknown:
        found = [f"{value!r} ({count})" for value, count in Counter(values[n] for n in unknown).most_common()]
        raise UserError(
            f"{path}: {len(unknown)} labels belong to no class, first at image {keys[unknown[0]]}; column "
            f"'{column}' holds {few(found, 8)}; pack.classes knows {few(list(meaning), 8)}"
        )
    labels = np.array([meaning[value] for value in values], dtype=np.int64)
    counts = np.bincount(labels, minlength=len(settings.classes))
    empty = [name for name, count in zip(settings.classes, counts, strict=True) if not count]
    if empty:
        raise UserError(
            f"{path}: no image of class {few(empty)}; column '{column}' holds {few(sorted(set(values)), 8)}; "
            "correct pack.classes or pack.label_column"
        )
    return labels


def _typed(column: Any) -> Any:
    """A column of text as int64 or float64 where every value is a plain, finite number, else as it is."""
    if pc.all(pc.match_substring_regex(column, _NUMBER)).as_py():
        for kind in (pa.int64(), pa.float64()):
            with contextlib.suppress(pa.ArrowInvalid):
                numbers = column.cast(kind)
                if pc.all(pc.is_finite(numbers)).as_py():
                    return numbers
    return column
