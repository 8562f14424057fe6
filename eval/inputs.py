"""What the user names -> the encoded images it means, one after the other; what cannot be read says why.

files, folders ─┐
globs           │                      ┌─ Ref (bytes of a file, or in an archive)
tables          ├──► Listing ──► Image ┼─ bytes (shards)
- (stdin)       │    (lazy)            └─ UserError (the image, or the whole place, cannot be read)
shards, archives┘
"""

import glob
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pyarrow as pa

from configs.errors import UserError
from shards.images import Ref, entries, is_web, read, without_ending
from shards.shardset import MANIFEST
from shards.tables import few, read_table, texts

STDIN = "-"
TABLES = (".csv", ".tsv", ".tab", ".parquet")
SHARDS = (".tar", ".tar.gz", ".tgz")
ARCHIVES = (".zip", ".hdf5", ".h5")
PATH_COLUMN = "path"


class Image(NamedTuple):
    """One image that was asked for."""

    name: str
    """What to call it: the path given, the id in a table, or the member of an archive behind its path."""
    data: Ref | bytes | UserError
    """Where its encoded bytes lie, the bytes themselves, or why there are none."""
    metadata: Mapping[str, str] = MappingProxyType({})
    """What its table or shard says of it; a blank is the empty string."""

    @property
    def file_name(self) -> str:
        """Name whose ending promises a format, below the folder or in the archive."""
        return self.data.name if isinstance(self.data, Ref) else self.name

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            UserError: the reason why there are none.
        """
        if isinstance(self.data, UserError):
            raise self.data
        return self.data if isinstance(self.data, bytes) else read(self.data)


@dataclass(frozen=True)
class Listing:
    """Images in order, found as they are asked for."""

    images: Iterator[Image]
    count: int | None
    """How many; None where only reading would tell."""


def listing(given: Sequence[str | Path], *, images: str | None = None, id_columns: Sequence[str]) -> Listing:
    """All images that the words of a command line mean.

    Args:
        given: image files; folders; globs; .tar, .zip and .hdf5 files; shard sets; WebDataset shards as paths
            or URLs with `{000..009}` and `::`; tables with a column `path` (from the table's folder on) or an
            id; `-` for a path a line on standard input.
        images: the place where the ids of tables are sought; the table's own folder if not given.
        id_columns: columns that hold an id, the first that a table has counts.

    Raises:
        UserError: for a table that cannot be read or has no such column, a place of ids that is not there, or
            a glob that nothing matches.
    """
    parts = [part for word in given for part in _parts(str(word), images, id_columns)]
    counts = [part.count for part in parts]
    total = None if None in counts else sum(count for count in counts if count is not None)
    return Listing((image for part in parts for image in part.images), total)


def _parts(word: str, images: str | None, id_columns: Sequence[str]) -> list[Listing]:
    path = Path(word)
    kind = path.suffix.lower()
    if word == STDIN:
        lines = (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer if line.strip())
        return [Listing((_file(line) for line in lines), None)]
    if path.is_dir():
        return [_shard_set(path) if (path / MANIFEST).is_file() else _folder(path)]
    if kind in TABLES:
        return [_table(path, images, id_columns)]
    if kind in ARCHIVES and path.exists():
        return [Listing(_guarded(word, lambda: _archive(word)), None)]
    if path.exists() and not word.endswith(SHARDS):
        return [Listing(iter([_file(word)]), 1)]
    if "://" in word or "{" in word or "::" in word or (word.endswith(SHARDS) and not glob.has_magic(word)):
        from shards.webshards import expand

        return [_shard(url) for url in expand(word)]
    if glob.has_magic(word):
        matches = sorted(glob.glob(word, recursive=True))  # noqa: PTH207 - as a shell reads it
        if path.name == "**":  # which finds folders, and beside them all that is in them
            matches = [match for match in matches if not os.path.isdir(match)] or matches[:1]  # noqa: PTH112
        if not matches:
            raise UserError(f"{word}: nothing has such a name; correct the pattern")
        return [part for match in matches for part in _parts(match, images, id_columns)]
    return [Listing(iter([_file(word)]), 1)]  # a missing file has its line like any other


def _file(name: str) -> Image:
    return Image(name, Ref(name, name, ""))


def _folder(folder: Path) -> Listing:
    try:
        # Names alone: a folder may hold a million images.
        names = sorted(ref.name for _, ref in entries(str(folder), Path()))
    except UserError as error:
        return Listing(iter([Image(str(folder), error)]), 1)
    if not names:
        return Listing(iter([Image(str(folder), UserError("no images in this folder and below"))]), 1)
    return Listing((_file(str(folder / name)) for name in names), len(names))


def _shard_set(folder: Path) -> Listing:
    parts = [_shard(str(tar)) for tar in sorted(folder.glob("*.tar"))]
    return Listing((image for part in parts for image in part.images), None)


def _shard(url: str) -> Listing:
    return Listing(_guarded(url, lambda: _streamed(url)), None)


def _streamed(url: str) -> Iterator[Image]:
    from shards.webshards import streamed

    for name, data, metadata in streamed(url):
        yield Image(f"{url}/{name}", data, metadata)


def _archive(path: str) -> Iterator[Image]:
    for _, ref in entries(path, Path()):
        yield Image(f"{path}/{ref.name}", ref)


def _guarded(place: str, images: Callable[[], Iterable[Image]]) -> Iterator[Image]:
    """The images of a place, and a line for the place itself where it cannot be read, or not to its end."""
    found = False
    try:
        for image in images():
            found = True
            yield image
    except UserError as error:
        yield Image(place, error)
        return
    if not found:
        yield Image(place, UserError("no images in it"))


def _table(path: Path, images: str | None, id_columns: Sequence[str]) -> Listing:
    table = read_table(path, "the table")
    known = (PATH_COLUMN, *id_columns)
    column = next((name for name in known if name in table.column_names), None)
    if column is None:
        raise UserError(
            f"{path}: no column that names images: it has {few(table.column_names, 8)}; one of "
            f"{few(known, 8)} is needed"
        )
    values = texts(table, column)
    found: Iterator[Image]
    if column == PATH_COLUMN:
        found = (_in_row(path, number, value) for number, value in enumerate(values, 1))
    else:
        place = images or str(path.parent)
        if not is_web(place) and not Path(place).exists():
            raise UserError(f"{place}: no such folder or file; correct --images")
        found = _by_id(path, values, place)
    return Listing((image._replace(metadata=_row(table, n)) for n, image in enumerate(found)), len(values))


def _row(table: pa.Table, number: int) -> dict[str, str]:
    return {name: table[name][number].as_py() or "" for name in table.column_names}


def _in_row(table: Path, number: int, value: str) -> Image:
    if not value:
        return Image(f"{table} row {number}", UserError("its path is blank"))
    return Image(value, Ref(str(table.parent / value), value, ""))


def _by_id(table: Path, ids: Sequence[str], place: str) -> Iterator[Image]:
    with tempfile.TemporaryDirectory() as scratch:
        wanted = {without_ending(text) for text in ids}
        found: dict[str, list[Ref]] = {}
        for stem, ref in entries(place, Path(scratch)):
            if stem in wanted:
                found.setdefault(stem, []).append(ref)
        for number, text in enumerate(ids, 1):
            here = found.get(without_ending(text), [])
            if not text:
                yield Image(f"{table} row {number}", UserError("its id is blank"))
            elif len(here) == 1:
                yield Image(text, here[0])
            elif here:
                several = few(sorted(ref.name for ref in here))
                yield Image(text, UserError(f"{len(here)} images of this id in {place} ({several})"))
            else:
                yield Image(text, UserError(f"no image of this id in {place}; give its place with --images"))
