"""Entry: every sample's embedding, once, whatever the number of ranks. Validation uses it too.

torchrun --nproc-per-node=N -m train.embed CONFIG key=value …
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Never

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tqdm import tqdm

from configs.errors import UserError
from configs.schema import Experiment
from pipeline.cache import Cache
from pipeline.loader import Loader
from pipeline.sampler import PADDING, Indices, Sequential
from shards.files import sha256
from shards.shardset import SPLITS, ShardSet
from train import result, runfolder
from train.distributed import World, beat, broadcast, gather
from train.embeddings import OURS, Embeddings, embeddings_writer, read_meta
from train.entry import start
from train.model import Encoder

BATCH = 32
"""Images through the encoder together, `predict`'s too: with their number kernels change, and last digits."""
ROWS = 8192
"""Samples in a row group: 16 MB of 512 float32."""
PLACES = ("split", "shard", "offset", "size", "crc32")
"""Columns of `samples.parquet` that say where a sample lies, not what it is."""


def evaluation_loader(
    shards: ShardSet,
    indices: Indices,
    experiment: Experiment,
    world: World,
    cache: Cache | None = None,
    *,
    max_bad: float = 0.0,
    batch: int = 0,
) -> Loader:
    """Each of `indices` once, in order, as they are. A damaged one ends it, unless another may stand in.

    Args:
        batch: images of a rank at a time, in place of its share of `loader.global_batch`.
    """
    settings = experiment.loader.model_copy(update={"max_bad": max_bad})
    if batch:
        settings = settings.model_copy(update={"global_batch": batch * world.size})
    return Loader(
        shards,
        Sequential(indices, settings.global_batch),
        settings,
        augmentation=None,
        seed=0,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        threads=world.threads(settings.threads),
        cache=cache,
    )


def embed(
    encoder: Encoder,
    loader: Loader,
    *,
    precision: torch.dtype,
    progress: "tqdm[Never] | None" = None,
) -> tuple[Indices, NDArray[np.float32]]:
    """One epoch of a sequential loader through the encoder.

    Returns:
        indices (n,) and embeddings (n, dim), of all ranks, in the loader's order, padding dropped; the same
        on every rank.
    """
    pieces = list(stream(encoder, loader, precision=precision, progress=progress))
    return np.concatenate([index for index, _ in pieces]), np.concatenate([vectors for _, vectors in pieces])


def stream(
    encoder: Encoder,
    loader: Loader,
    *,
    precision: torch.dtype,
    symmetries: bool = False,
    progress: "tqdm[Never] | None" = None,
) -> Iterator[tuple[Indices, NDArray[np.float32]]]:
    """As `embed`, in pieces of about ROWS samples, so that memory does not grow with their number."""
    was_training = encoder.training
    encoder.eval()
    vectors: list[torch.Tensor] = []
    index: list[torch.Tensor] = []
    try:
        for number, batch in enumerate(loader.epoch(), start=1):
            images = batch.images
            with (
                torch.inference_mode(),
                torch.autocast(images.device.type, dtype=precision, enabled=precision != torch.float32),
            ):
                vectors.append(encode(encoder, images, symmetries=symmetries))
            index.append(batch.index)
            beat("a batch that was embedded")
            if progress is not None:
                left = int((progress.total or 0) - progress.n)  # the last batch is padded
                progress.update(min(len(batch.index) * loader.world_size, left))
            # All ranks take as many steps, so all of them gather at the same ones.
            if len(index) * len(batch.index) * loader.world_size >= ROWS or number == loader.steps:
                yield _gathered(index, vectors)
                index, vectors = [], []
    finally:
        encoder.train(was_training)


def encode(encoder: Encoder, images: torch.Tensor, *, symmetries: bool) -> torch.Tensor:
    """Images (batch, 3, size, size) -> unit vectors (batch, dim).

    Args:
        symmetries: test-time augmentation: the mean over the square's 8 symmetries, brought back to length 1.
    """
    views = [images.rot90(quarter, (2, 3)) for quarter in range(4 if symmetries else 1)]
    views += [view.flip(3) for view in views] if symmetries else []
    total = sum(encoder(view.contiguous(memory_format=torch.channels_last)) for view in views)
    assert isinstance(total, torch.Tensor)
    return F.normalize(total, dim=1) if symmetries else total


def _gathered(index: list[torch.Tensor], vectors: list[torch.Tensor]) -> tuple[Indices, NDArray[np.float32]]:
    """Consecutive batches of this rank -> those of all ranks, in the sampler's order, padding dropped."""
    all_index, all_vectors = (
        # (ranks, batches, slots, …): a global batch is its ranks' slices one after the other.
        gather(torch.stack(rows)[None]).transpose(0, 1).flatten(0, 2).cpu().numpy()
        for rows in (index, vectors)
    )
    kept = all_index != PADDING
    return all_index[kept], all_vectors[kept]


def run(experiment: Experiment, world: World) -> None:
    """Write RUN/embeddings/SPLIT.parquet for every split, unless they are there already."""
    with runfolder.locked(experiment.run.folder, main=world.main):
        _run(experiment, world)


def _run(experiment: Experiment, world: World) -> None:
    shards = ShardSet.of(experiment)
    beat("opening the shard set")
    encoder, about = runfolder.load_encoder(experiment.run.folder, world.device)
    if about["shards_sha256"] != shards.sha256:
        raise UserError(
            f"{experiment.run.folder}: its encoder was trained on another shard set than {shards.folder}; "
            "train again in another run.folder, or give the shard set it was trained on as pack.output"
        )
    result.check_settings(experiment, {})
    if broadcast(finished(experiment, shards)):
        if world.main:
            print("embeddings: made before by this encoder, of this shard set; nothing to do", flush=True)
        return
    if world.main:
        runfolder.describe(experiment)
    order = np.concatenate([shards.split(split) for split in SPLITS])
    with (
        evaluation_loader(shards, order, experiment, world, batch=BATCH) as loader,
        tqdm(total=len(order), desc="embed", unit="image", disable=not world.main) as progress,
    ):
        pieces = stream(
            encoder,
            loader,
            precision=torch.float32,  # as predict does
            symmetries=experiment.embed.symmetries,
            progress=progress,
        )
        if world.main:
            meta = {key: about[key] for key in ("encoder_sha256", "shards_sha256", "classes", "positive")}
            meta["embed"] = experiment.embed.model_dump(mode="json")
            write_splits(experiment.run.folder, shards, pieces, meta)
        for _ in pieces:  # every rank takes part to the end
            pass


def finished(experiment: Experiment, shards: ShardSet) -> bool:
    """Whether the run folder holds this encoder's embeddings of this shard set, made as they would be now."""
    folder = experiment.run.folder
    try:
        metas = [read_meta(folder, split) for split in SPLITS]
        encoder = sha256(folder / "encoder.safetensors")
    except (UserError, OSError):
        return False
    wanted = (encoder, shards.sha256, experiment.embed.model_dump(mode="json"))
    return all((m["encoder_sha256"], m["shards_sha256"], m.get("embed")) == wanted for m in metas)


def write_splits(
    folder: Path,
    shards: ShardSet,
    pieces: Iterator[tuple[Indices, NDArray[np.float32]]],
    meta: dict[str, Any],
) -> None:
    """Write a stream of all splits' embeddings, one split after the other, to a file each.

    Args:
        pieces: indices (n,) and vectors (n, dim); together every sample once, in the order of SPLITS.
    """
    index, vectors = next(pieces)
    for split in SPLITS:
        expected = shards.split(split)
        with embeddings_writer(folder, split) as write:
            write(_piece(shards, index[:0], vectors[:0], meta))
            done = 0
            while done < len(expected):
                if not len(index):
                    index, vectors = next(pieces)
                count = min(len(index), len(expected) - done)
                assert np.array_equal(index[:count], expected[done : done + count]), (
                    "each sample exactly once"
                )
                write(_piece(shards, index[:count], vectors[:count], meta))
                index, vectors, done = index[count:], vectors[count:], done + count
    assert not len(index), "more than the set holds"


def _piece(
    shards: ShardSet, index: Indices, vectors: NDArray[np.float32], meta: dict[str, Any]
) -> Embeddings:
    rows = shards.samples.drop_columns([*PLACES, *OURS[:-1]]).take(pa.array(index))
    return Embeddings(
        index=index,
        keys=shards.keys[index].tolist(),
        groups=[shards.group_names[code] for code in shards.groups[index]],
        labels=shards.labels[index],
        vectors=vectors,
        meta=meta,
        metadata={name: rows[name] for name in rows.column_names},
    )


if __name__ == "__main__":
    start(run)
