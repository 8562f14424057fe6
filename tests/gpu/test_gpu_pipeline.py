"""Batches on a GPU are those of the CPU, and stay whole while the GPU lags behind."""

import numpy as np
import pytest
import torch

from configs.schema import Loader as Settings
from pipeline import augment, graph
from pipeline.loader import Batch, Loader, training_sampler
from pipeline.source import Source
from shards.shardset import ShardSet

SIZE = 48
SETTINGS = Settings(global_batch=16, size=SIZE, steps_per_epoch=12)


def loader(shards: ShardSet, device: torch.device) -> Loader:
    return Loader(
        shards,
        training_sampler(shards, SETTINGS, seed=0, world_size=1),
        SETTINGS,
        augmentation=SETTINGS.augment,
        seed=0,
        rank=0,
        world_size=1,
        device=device,
        threads=2,
    )


def grey_levels(shards: ShardSet, *, gpu: int | None, one_pass: bool) -> np.ndarray:
    """The training images, augmented, out of the graph: (n, 3, size, size) in 0..255."""
    index = shards.split("train")
    data, _ = Source(shards, max_bad=0).fetch(index)
    plan = augment.draw(SETTINGS.augment, len(index), seed=0, epoch=0, step=0)
    matrices = plan.matrices(shards.widths[index], shards.heights[index], SIZE)
    inputs = data, matrices, np.ascontiguousarray(plan.colour)
    pipeline = graph.build(
        lambda: inputs,
        batch=len(index),
        size=SIZE,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        threads=2,
        prefetch=1,
        gpu=gpu,
        one_pass=one_pass,
    )
    (images,) = pipeline.run()
    return torch.utils.dlpack.from_dlpack(images.as_tensor()).cpu().numpy() * 255


def test_the_graph_of_operators_gives_the_pixels_of_the_fused_pass(
    tiny_shards: ShardSet, device: torch.device
) -> None:
    fused = grey_levels(tiny_shards, gpu=None, one_pass=True)
    operators = grey_levels(tiny_shards, gpu=device.index, one_pass=False)
    difference = np.abs(operators - fused).mean((1, 2, 3))
    # Decoders round their own way, and the operators round to whole grey levels in between.
    assert difference.max() < 1, difference
    assert np.abs(np.roll(fused, 1, axis=0) - fused).mean() > 10, "the images do differ from each other"


def test_labels_and_index_are_those_of_the_cpu(tiny_shards: ShardSet, device: torch.device) -> None:
    here, there = loader(tiny_shards, torch.device("cpu")), loader(tiny_shards, device)
    for mine, other in zip(here.epoch(), there.epoch(), strict=True):
        assert {t.device for t in (other.images, other.labels, other.groups, other.index)} == {device}
        assert other.images.shape == (16, 3, SIZE, SIZE) and other.images.dtype == torch.float32
        for name in ("index", "labels", "groups"):
            assert torch.equal(getattr(mine, name), getattr(other, name).cpu())
        difference = (mine.images - other.images.cpu()).abs().mean((1, 2, 3)) * 255 * SETTINGS.std[0]
        assert difference.max() < 1


def test_batches_stay_whole_while_the_gpu_is_behind(tiny_shards: ShardSet, device: torch.device) -> None:
    """DALI may not fill memory anew that kernels still waiting on torch's stream are going to read."""

    def copies(*, behind: bool) -> torch.Tensor:
        kept = [copy(batch, behind) for batch in loader(tiny_shards, device).epoch()]
        return torch.stack(kept).cpu()

    def copy(batch: Batch, behind: bool) -> torch.Tensor:
        if behind and device.type == "cuda":
            square = torch.full((4096, 4096), 1e-4, device=device)
            for _ in range(40):
                square = square @ square
        images = batch.images.clone()
        if not behind and device.type == "cuda":
            torch.cuda.synchronize()
        return images

    assert torch.equal(copies(behind=True), copies(behind=False))


def test_gpu_memory_does_not_grow(tiny_shards: ShardSet, gpu: torch.device) -> None:
    batches = loader(tiny_shards, gpu)

    def used_after_an_epoch() -> int:
        for batch in batches.epoch():
            assert batch.images.isfinite().all()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info(gpu)
        return total - free

    settled = [used_after_an_epoch() for _ in range(5)][-1]
    later = [used_after_an_epoch() for _ in range(20)][-1]
    assert later == pytest.approx(settled, abs=8 << 20)
