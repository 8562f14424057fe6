"""embeddings/SPLIT.parquet: the embedding of every sample of a split, addressed by its index."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.errors import UserError
from shards.files import atomic, read_json

MADE_BY = "moleprint embed CONFIG"
OURS = ("index", "key", "group", "label", "embedding")
"""Columns of the file that are not metadata."""


@dataclass(frozen=True)
class Embeddings:
    """One split through the frozen encoder; row i of every field is the same sample."""

    index: NDArray[np.int64]
    """(n,) index in the shard set, each once."""
    keys: list[str]
    """Sample keys."""
    groups: list[str]
    """The patient (or lesion) of each sample."""
    labels: NDArray[np.int64]
    """(n,) class index."""
    vectors: NDArray[np.float32]
    """(n, dim) embeddings."""
    meta: dict[str, Any]
    """`encoder_sha256`, `shards_sha256`, `classes` (names), `positive` (class index), `embed` (settings)."""
    metadata: Mapping[str, pa.ChunkedArray] = field(default_factory=dict)
    """Column -> (n,) of `samples.parquet`: sizes, lesion, source, and the source tables' own."""

    def group_codes(self) -> NDArray[np.int64]:
        """(n,) the groups as integers from 0, without gaps."""
        return np.unique(np.array(self.groups), return_inverse=True)[1].astype(np.int64)


def embeddings_path(run: Path, split: str) -> Path:
    """Where a run keeps the embeddings of a split."""
    return run / "embeddings" / f"{split}.parquet"


def write_embeddings(run: Path, split: str, embeddings: Embeddings) -> None:
    """Write one split's embeddings, whole or not at all."""
    with embeddings_writer(run, split) as write:
        write(embeddings)


@contextlib.contextmanager
def embeddings_writer(run: Path, split: str) -> Iterator[Callable[[Embeddings], None]]:
    """A function that takes one split's embeddings piece by piece, each a row group of the file.

    Pieces come in the order of their indices; memory holds one at a time. The file appears, whole, when the
    block ends without an error. The first piece says what all are made from, and how wide: float16 where its
    settings say so, else float32.
    """
    last = -1
    with atomic(embeddings_path(run, split)) as file, contextlib.ExitStack() as stack:
        writer: pq.ParquetWriter | None = None

        def write(piece: Embeddings) -> None:
            nonlocal writer, last
            assert len(np.unique(piece.index)) == len(piece.index), "a sample appears twice"
            assert not len(piece.index) or piece.index.min() > last, "a piece out of order"
            last = int(piece.index.max(initial=last))
            table = _table(piece)
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(file, table.schema))
            writer.write_table(table, row_group_size=max(1, len(table)))

        yield write
        assert writer is not None, "a file needs at least one piece, if of no rows"


def _table(piece: Embeddings) -> pa.Table:
    kind = pa.float16() if piece.meta.get("embed", {}).get("dtype") == "float16" else pa.float32()
    values = piece.vectors.ravel().astype(kind.to_pandas_dtype())
    table = pa.table(
        {
            "index": pa.array(piece.index, pa.int64()),
            "key": pa.array(piece.keys, pa.string()),
            "group": pa.array(piece.groups, pa.string()),
            "label": pa.array(piece.labels, pa.int64()),
            **{name: column for name, column in piece.metadata.items() if name not in OURS},
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(values, kind), piece.vectors.shape[1]),
        }
    )
    return table.replace_schema_metadata({"moleprint": json.dumps(piece.meta)})


def read_meta(run: Path, split: str) -> dict[str, Any]:
    """What a split's embeddings were made from, without reading them.

    Raises:
        UserError: if the file is missing or is not ours, naming the command that makes it.
    """
    path = embeddings_path(run, split)
    try:
        metadata = pq.read_schema(path).metadata or {}
        if b"moleprint" not in metadata:
            raise ValueError("its moleprint metadata are missing")
        meta: dict[str, Any] = json.loads(metadata[b"moleprint"])
    except FileNotFoundError:
        raise UserError(f"{path}: not found; make it with `{MADE_BY}`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); make it again with `{MADE_BY}`") from None
    return meta


def read_embeddings(run: Path, split: str) -> Embeddings:
    """One split's embeddings, in the order of the shard set, float32 however they are kept.

    Raises:
        UserError: if the file is missing, damaged, empty, made by another encoder than the run's, or holds
            a value that is not finite.
    """
    path, meta = embeddings_path(run, split), read_meta(run, split)
    _refuse_stale(run, meta)
    try:
        table = pq.read_table(path)
        order = np.argsort(table["index"].to_numpy(), kind="stable")
        rows = table.drop_columns(["embedding"]).take(order)
        embeddings = Embeddings(
            index=rows["index"].to_numpy().copy(),
            keys=rows["key"].to_pylist(),
            groups=rows["group"].to_pylist(),
            labels=rows["label"].to_numpy().copy(),
            vectors=_vectors(table["embedding"])[order],
            meta=meta,
            metadata={name: rows[name] for name in rows.column_names if name not in OURS},
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({error}); make it again with `{MADE_BY}`") from None
    if not len(embeddings.index):
        raise UserError(f"{path}: holds no sample; give the {split} split a larger share in pack.ratios")
    broken = int((~np.isfinite(embeddings.vectors)).any(axis=1).sum())
    if broken:
        raise UserError(
            f"{path}: {broken} of {len(embeddings.keys)} embeddings are not finite, so the encoder diverged; "
            f"train it again with a lower train.lr, then `{MADE_BY}`"
        )
    return embeddings


def _vectors(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """(n, dim), copied once whatever the number of chunks."""
    out = np.empty((len(column), column.type.list_size), np.float32)
    start = 0
    for chunk in column.chunks:
        out[start : start + len(chunk)] = chunk.flatten().to_numpy().reshape(len(chunk), -1)
        start += len(chunk)
    return out


def _refuse_stale(run: Path, meta: dict[str, Any]) -> None:
    path = run / "encoder.json"
    if (
        path.exists()
        and read_json(path, "moleprint train CONFIG")["encoder_sha256"] != meta["encoder_sha256"]
    ):
        raise UserError(f"{run}: its embeddings are an earlier encoder's; make them again with `{MADE_BY}`")
