"""embeddings/SPLIT.parquet: the embedding of every sample of a split, addressed by its index."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs.errors import UserError
from shards.files import atomic, read_json

MADE_BY = "moleprint embed CONFIG"


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
    """`encoder_sha256`, `shards_sha256`, `classes` (names), `positive` (class index)."""

    def group_codes(self) -> NDArray[np.int64]:
        """(n,) the groups as integers from 0, without gaps."""
        return np.unique(np.array(self.groups), return_inverse=True)[1].astype(np.int64)


def embeddings_path(run: Path, split: str) -> Path:
    """Where a run keeps the embeddings of a split."""
    return run / "embeddings" / f"{split}.parquet"


def write_embeddings(run: Path, split: str, embeddings: Embeddings) -> None:
    """Write one split's embeddings, whole or not at all."""
    n, dim = embeddings.vectors.shape
    assert len(np.unique(embeddings.index)) == n, "a sample appears twice"
    table = pa.table(
        {
            "index": pa.array(embeddings.index, pa.int64()),
            "key": pa.array(embeddings.keys, pa.string()),
            "group": pa.array(embeddings.groups, pa.string()),
            "label": pa.array(embeddings.labels, pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(embeddings.vectors.ravel(), pa.float32()), dim
            ),
        }
    ).replace_schema_metadata({"moleprint": json.dumps(embeddings.meta)})
    with atomic(embeddings_path(run, split)) as file:
        pq.write_table(table, file)


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
    """One split's embeddings, in the order of the shard set.

    Raises:
        UserError: if the file is missing, damaged, empty, made by another encoder than the run's, or holds
            a value that is not finite.
    """
    path, meta = embeddings_path(run, split), read_meta(run, split)
    _refuse_stale(run, meta)
    try:
        table = pq.read_table(path).sort_by("index")
        vectors = table["embedding"].combine_chunks()
        embeddings = Embeddings(
            index=table["index"].to_numpy().copy(),
            keys=table["key"].to_pylist(),
            groups=table["group"].to_pylist(),
            labels=table["label"].to_numpy().copy(),
            vectors=vectors.flatten().to_numpy().copy().reshape(len(table), vectors.type.list_size),
            meta=meta,
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


def _refuse_stale(run: Path, meta: dict[str, Any]) -> None:
    path = run / "encoder.json"
    if (
        path.exists()
        and read_json(path, "moleprint train CONFIG")["encoder_sha256"] != meta["encoder_sha256"]
    ):
        raise UserError(f"{run}: its embeddings are an earlier encoder's; make them again with `{MADE_BY}`")
