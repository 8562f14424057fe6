"""Tables of any kind -> text, column by column, so that no type is guessed from the first rows alone."""

import contextlib
import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import csv

from configs.errors import UserError

_WHOLE = r"^-?\d+$"
_NUMBER = r"^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$"


def few(items: Sequence[object], limit: int = 3) -> str:
    """The first few of many, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more


def read_table(path: Path, key: str) -> pa.Table:
    """Read a CSV, TSV (.tsv, .tab) or Parquet (.parquet) table; every column becomes text, a blank a null.

    Columns of a Parquet table that have no text, such as lists, are left out.

    Args:
        path: the table.
        key: the configuration's key that named it, for messages.

    Raises:
        UserError: if it cannot be read, has no rows, or a column twice.
    """
    kind = path.suffix.lower()
    name = {".parquet": "Parquet", ".tsv": "TSV", ".tab": "TSV"}.get(kind, "CSV")
    try:
        table = _parquet(path) if name == "Parquet" else _text(path, "\t" if name == "TSV" else ",")
    except FileNotFoundError:
        raise UserError(f"{path}: table not found; set {key} to a CSV, TSV or Parquet file") from None
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        utf8 = "" if name == "Parquet" else " in UTF-8"
        raise UserError(f"{path}: cannot be read as a {name} table{utf8} ({reason}); see {key}") from None
    names = [column.strip() for column in table.column_names]
    twice = sorted(column for column, count in Counter(names).items() if column and count > 1)
    if twice:
        raise UserError(f"{path}: column {few(twice)} is there twice; rename or delete one")
    if not table.num_rows:
        raise UserError(f"{path}: has a header and no rows; set {key} to the full table")
    return table.rename_columns(names)


def _text(path: Path, delimiter: str) -> pa.Table:
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with csv.open_csv(path, parse_options=parse) as start:
        names = start.schema.names
    as_text = csv.ConvertOptions(column_types={n: pa.string() for n in names}, strings_can_be_null=True)
    return csv.read_csv(path, parse_options=parse, convert_options=as_text)


def _parquet(path: Path) -> pa.Table:
    table = pq.read_table(path)
    columns = {}
    for name in table.column_names:
        with contextlib.suppress(pa.ArrowNotImplementedError, pa.ArrowInvalid):
            column = table[name]
            if pa.types.is_floating(column.type):
                column = pc.if_else(pc.is_nan(column), None, column)
            columns[name] = pc.cast(column, pa.string())
    return pa.table(columns)


def require(table: pa.Table, path: object, column: str, key: str) -> None:
    """Raise UserError, with the nearest column, unless a table has a column."""
    if column in table.column_names:
        return
    near = difflib.get_close_matches(column, table.column_names, n=1)
    raise UserError(
        f"{path}: no column '{column}'; it has {', '.join(filter(None, table.column_names))}; "
        f"set {key}" + (f", perhaps to {near[0]}" if near else " to one of them")
    )


def texts(table: pa.Table, column: str) -> list[str]:
    """A column's values, trimmed; a blank is the empty string."""
    return [(text or "").strip() for text in table.column(column).to_pylist()]


def refuse_blanks(path: object, values: Sequence[str], what: str, remedy: str = "") -> None:
    """Raise UserError if any of the values is blank."""
    blank = [number for number, text in enumerate(values, start=1) if not text]
    if blank:
        raise UserError(
            f"{path}: {len(blank)} rows have no {what}: data row {few(blank)}; fill it in, or take them out"
            + remedy
        )


def typed(column: Any) -> Any:
    """A column of text as int64 or float64 where every value is a plain, finite number, else as it is."""
    if pc.all(pc.match_substring_regex(column, _NUMBER)).as_py():
        whole = pc.all(pc.match_substring_regex(column, _WHOLE)).as_py()
        for kind in (pa.int64(),) if whole else (pa.float64(),):  # a whole number too long for one is a name
            with contextlib.suppress(pa.ArrowInvalid):
                numbers = column.cast(kind)
                if pc.all(pc.is_finite(numbers)).as_py():
                    return numbers
    return column
