"""Metadata as inputs of a classifier, and as what a sample is sorted by: age, sex, site, or any column.

Tables call the same thing by many names; ROLES knows them. What is blank, or says that it is unknown, is
missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from configs.errors import UserError
from shards.shardset import COLUMNS

Metadata = Mapping[str, pa.ChunkedArray]

ROLES = {
    "age": ("age", "age_approx", "age_approximate", "patient_age"),
    "sex": ("sex", "gender"),
    "site": (
        *("anatom_site_general", "anatom_site_general_challenge", "anatom_site", "localization", "site"),
        *("anatom_site_special", "tbp_lv_location_simple"),
    ),
}
"""Role -> the columns that may tell it, the first that does goes first."""
MISSING = frozenset({"", "unknown", "nan", "na", "n/a", "none", "null"})
OF_PACKING = frozenset(COLUMNS)
"""What packing says of a sample, and nothing says of an image that is new."""
NUMBERS = frozenset({"age"})
"""Roles that are numbers, however a table writes them."""


@dataclass(frozen=True)
class Number:
    """A number, standardised; what is missing becomes the median and sets an indicator."""

    name: str
    median: float
    mean: float
    scale: float

    def encode(self, values: Sequence[Any]) -> NDArray[np.float32]:
        """(n,) -> (n, 2)."""
        numbers = np.array(values, dtype=np.float64)
        missing = np.isnan(numbers)
        filled = np.where(missing, self.median, numbers)
        return np.stack([(filled - self.mean) / self.scale, missing], axis=1).astype(np.float32)


@dataclass(frozen=True)
class Category:
    """One of some values, one-hot; what is missing, or was not met in train, is `unknown`, the last."""

    name: str
    values: tuple[str, ...]

    def encode(self, values: Sequence[Any]) -> NDArray[np.float32]:
        """(n,) -> (n, values + 1)."""
        codes = {value.lower(): code for code, value in enumerate(self.values)}
        unknown = len(self.values)
        return np.eye(unknown + 1, dtype=np.float32)[[codes.get(value, unknown) for value in values]]


@dataclass(frozen=True)
class Inputs:
    """How metadata become numbers; fitted on train alone, and kept with the classifier."""

    fields: tuple[Number | Category, ...] = ()

    @classmethod
    def fit(cls, metadata: Metadata, names: Sequence[str]) -> "Inputs":
        """Of the training samples' metadata.

        Raises:
            UserError: if a name is neither a role that a column tells nor a column of the source tables.
        """
        return cls(tuple(_fit(metadata, name) for name in names))

    def encode(self, metadata: Metadata, count: int) -> NDArray[np.float32]:
        """(count, width) of samples; a column that they lack is missing in all."""
        parts = [
            field.encode(read(metadata, field.name, number=isinstance(field, Number)) or [None] * count)
            for field in self.fields
        ]
        return np.concatenate([np.empty((count, 0), np.float32), *parts], axis=1)

    def describe(self) -> list[dict[str, Any]]:
        """For a JSON file."""
        return [
            {key: list(value) if isinstance(value, tuple) else value for key, value in vars(field).items()}
            for field in self.fields
        ]

    @classmethod
    def of(cls, described: Sequence[Mapping[str, Any]]) -> "Inputs":
        """From what `describe` gave."""
        return cls(
            tuple(
                Category(d["name"], tuple(d["values"])) if "values" in d else Number(**d) for d in described
            )
        )


def read(metadata: Metadata, name: str, *, number: bool | None = None) -> list[Any] | None:
    """(n,) values of a role or a column: floats or texts, None where missing; None where no column tells
    it. Texts are in lower case, and columns go by any: tables write both as they like.

    Args:
        number: floats are wanted, else texts, whatever the column holds: a table may write numbers as text,
            and what is no number is missing then. None: as `is_number` says.
    """
    columns = _columns(metadata, name)
    if not columns:
        return None
    as_numbers = is_number(metadata, name) if number is None else number
    return _first([(_numbers if as_numbers else _texts)(column) for column in columns])


def is_number(metadata: Metadata, name: str) -> bool:
    """Whether `read` gives numbers."""
    if name in NUMBERS:
        return True
    types = [column.type for column in _columns(metadata, name)]
    return all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in types)


def _columns(metadata: Metadata, name: str) -> list[pa.ChunkedArray]:
    """What may tell a role or is a column, in whatever case it is written, as it was asked for first."""
    if name in OF_PACKING:
        return [metadata[name]] if name in metadata else []
    wanted = [*ROLES.get(name, (name,))]
    found = [column for column in wanted if column in metadata]
    for like in wanted:
        found += [
            column for column in metadata if column.lower() == like.lower() and column not in OF_PACKING
        ]
    return [metadata[column] for column in dict.fromkeys(found)]


def _fit(metadata: Metadata, name: str) -> Number | Category:
    values = read(metadata, name)
    if values is None or name in OF_PACKING:
        roles, own = (
            (role for role in ROLES if read(metadata, role)),
            (c for c in metadata if c not in OF_PACKING),
        )
        has = ", ".join(dict.fromkeys([*roles, *own])) or "none"
        raise UserError(f"classifier.metadata: no column of the tables tells '{name}'; they have: {has}")
    known = [value for value in values if value is not None]
    if not is_number(metadata, name):
        return Category(name, tuple(sorted(set(known))))
    if not known:
        return Number(name, median=0.0, mean=0.0, scale=1.0)
    median = float(np.median(known))
    filled = np.array([median if value is None else value for value in values])
    return Number(name, median, float(filled.mean()), float(filled.std()) or 1.0)


def _first(columns: Sequence[Sequence[Any]]) -> list[Any]:
    """The first value that is there, row by row."""
    return [next((value for value in row if value is not None), None) for row in zip(*columns, strict=True)]


def _numbers(column: pa.ChunkedArray) -> list[float | None]:
    numbers = [_number(value) for value in column.to_pylist()]
    return [value if value is not None and np.isfinite(value) else None for value in numbers]


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    texts = pc.utf8_lower(pc.utf8_trim_whitespace(column.cast(pa.string()))).to_pylist()
    return [text if text is not None and text not in MISSING else None for text in texts]
