"""Entry: every sample's embedding, once, whatever the number of ranks. Validation uses it too.

torchrun --nproc-per-node=N -m train.embed CONFIG key=value …
"""

from typing import Any, Never

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from configs.errors import UserError
from configs.schema import Experiment
from pipeline.cache import Cache
from pipeline.loader import Loader
from pipeline.sampler import PADDING, Indices, Sequential
from shards.files import sha256
from shards.shardset import SPLITS, ShardSet
from train import runfolder
from train.distributed import World, gather
from train.embeddings import Embeddings, read_meta, write_embeddings
from train.entry import start
from train.model import Encoder


def evaluation_loader(
    shards: ShardSet,
    indices: Indices,
    experiment: Experiment,
    world: World,
    cache: Cache | None = None,
    *,
    max_bad: float = 0.0,
) -> Loader:
    """Each of `indices` once, in order, as they are. A damaged one ends it, unless another may stand in."""
    settings = experiment.loader.model_copy(update={"max_bad": max_bad})
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


@torch.inference_mode()
def embed(
    encoder: Encoder,
    loader: Loader,
    *,
    precision: torch.dtype,
    progress: "tqdm[Never] | None" = None,
    world: World | None = None,
) -> tuple[Indices, NDArray[np.float32]]:
    """One epoch of a sequential loader through the encoder.

    Args:
        world: whose watchdog is told of every batch.

    Returns:
        indices (n,) ascending and embeddings (n, dim), of all ranks, padding dropped; the same on every rank.
    """
    was_training = encoder.training
    encoder.eval()
    vectors, index = [], []
    for batch in loader.epoch():
        images = batch.images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, dtype=precision, enabled=precision != torch.float32):
            vectors.append(encoder(images))
        index.append(batch.index)
        if world is not None:
            world.beat("a batch that was embedded")
        if progress is not None:
            left = int((progress.total or 0) - progress.n)  # the last batch is padded
            progress.update(min(len(batch.index) * loader.world_size, left))
    encoder.train(was_training)
    all_index = gather(torch.cat(index)).cpu().numpy()
    all_vectors = gather(torch.cat(vectors)).cpu().numpy()
    kept = np.flatnonzero(all_index != PADDING)
    order = kept[np.argsort(all_index[kept], kind="stable")]
    return all_index[order], all_vectors[order]


def run(experiment: Experiment, world: World) -> None:
    """Write RUN/embeddings/SPLIT.parquet for every split."""
    with runfolder.locked(experiment.run.folder, main=world.main):
        _run(experiment, world)


def _run(experiment: Experiment, world: World) -> None:
    shards = ShardSet.of(experiment)
    encoder, about = runfolder.load_encoder(experiment.run.folder, world.device)
    if about["shards_sha256"] != shards.sha256:
        raise UserError(
            f"{experiment.run.folder}: its encoder was trained on another shard set than {shards.folder}; "
            "train again in another run.folder, or give the shard set it was trained on as pack.output"
        )
    indices = np.arange(len(shards))
    if world.main:
        runfolder.describe(experiment)
    with (
        evaluation_loader(shards, indices, experiment, world) as loader,
        tqdm(total=len(indices), desc="embed", unit="image", disable=not world.main) as progress,
    ):
        # In float32, as predict does.
        index, vectors = embed(encoder, loader, precision=torch.float32, progress=progress, world=world)
    assert np.array_equal(index, indices), "every sample exactly once"
    if world.main:
        for split in SPLITS:
            write_embeddings(experiment.run.folder, split, _of_split(shards, split, vectors, about))


def finished(experiment: Experiment, shards: ShardSet) -> bool:
    """Whether the run folder holds this encoder's embeddings of this shard set."""
    folder = experiment.run.folder
    try:
        metas = [read_meta(folder, split) for split in SPLITS]
        encoder = sha256(folder / "encoder.safetensors")
    except (UserError, OSError):
        return False
    return all(m["encoder_sha256"] == encoder and m["shards_sha256"] == shards.sha256 for m in metas)


def _of_split(
    shards: ShardSet, split: str, vectors: NDArray[np.float32], about: dict[str, Any]
) -> Embeddings:
    index = shards.split(split)
    return Embeddings(
        index=index,
        keys=shards.keys[index].tolist(),
        groups=[shards.group_names[code] for code in shards.groups[index]],
        labels=shards.labels[index],
        vectors=vectors[index],
        meta={key: about[key] for key in ("encoder_sha256", "shards_sha256", "classes", "positive")},
    )


if __name__ == "__main__":
    start(run)
