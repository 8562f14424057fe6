"""Batches on a GPU are those of the CPU, and stay whole while the GPU lags behind."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs.loading import Augment
from configs.loading import Loader as Settings
from pipeline import augment, graph
from pipeline.cache import Cache, DeviceCache, open_cache
from pipeline.loader import Batch, Loader, training_sampler
from pipeline.source import Source
from shards.shardset import ShardSet

SIZE = 48
SETTINGS = Settings(global_batch=16, size=SIZE, steps_per_epoch=12)


def loader(shards: ShardSet, device: torch.device, cache: Cache | None = None) -> Loader:
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
        cache=cache,
    )


FLAWED = Augment(jpeg=60, blur=2, cutout=0.5, occasional=0.5)


def grey_levels(
    shards: ShardSet, settings: Augment, *, gpu: int | None, decoded: bool = False, **options: Any
) -> np.ndarray:
    """The training images, augmented, out of the graph: (n, 3, size, size) in 0..255."""
    index = shards.split("train")
    data, _ = Source(shards, max_bad=0).fetch(index)
    if decoded:
        data = [np.array(Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB")) for jpeg in data]
    plan = augment.draw(settings, len(index), seed=0, epoch=0, step=0)
    inputs = data, *plan.parameters(shards.widths[index], shards.heights[index], SIZE)
    layout = {name: options[name] for name in ("dtype", "channels_last") if name in options}
    pipeline = graph.build(
        lambda: inputs,
        batch=len(index),
        size=SIZE,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        threads=2,
        prefetch=1,
        gpu=gpu,
        augmentation=settings,
        decoded=decoded,
        **options,
    )
    (images,) = pipeline.run()
    tensor = graph.tensor(images, **layout)
    order = torch.channels_last if options.get("channels_last") else torch.contiguous_format
    assert tensor.dtype == getattr(torch, options.get("dtype", "float32"))
    assert tensor.is_contiguous(memory_format=order)
    return tensor.float().cpu().numpy() * 255


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("flawed", [False, True])
def test_the_graph_of_operators_gives_the_pixels_of_the_fused_pass(
    tiny_shards: ShardSet, device: torch.device, flawed: bool, decoded: bool
) -> None:
    settings = FLAWED if flawed else SETTINGS.augment
    fused = grey_levels(tiny_shards, settings, gpu=None, one_pass=True)
    operators = grey_levels(tiny_shards, settings, gpu=device.index, one_pass=False, decoded=decoded)
    difference = np.abs(operators - fused).mean((1, 2, 3))
    # Decoders round their own way, and the operators round to whole grey levels in between. A GPU's JPEG
    # artefacts are not libjpeg's to the bit, which few images may show.
    assert np.median(difference) < 1 and difference.max() < (3 if flawed else 1), difference
    assert np.abs(np.roll(fused, 1, axis=0) - fused).mean() > 10, "the images do differ from each other"


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_types_and_memory_orders_hold_the_same_pixels(
    tiny_shards: ShardSet, device: torch.device, dtype: str, channels_last: bool
) -> None:
    options: dict[str, Any] = {"gpu": device.index, "one_pass": False}
    plain = grey_levels(tiny_shards, FLAWED, **options)
    images = grey_levels(tiny_shards, FLAWED, **options, dtype=dtype, channels_last=channels_last)
    step = 255 * torch.finfo(getattr(torch, dtype)).eps
    np.testing.assert_allclose(images, plain, rtol=0, atol=step)


def test_labels_and_index_are_those_of_the_cpu(tiny_shards: ShardSet, device: torch.device) -> None:
    here, there = loader(tiny_shards, torch.device("cpu")), loader(tiny_shards, device)
    for mine, other in zip(here.epoch(), there.epoch(), strict=True):
        assert {t.device for t in (other.images, other.labels, other.groups, other.index)} == {device}
        assert other.images.shape == (16, 3, SIZE, SIZE) and other.images.dtype == torch.float32
        for name in ("index", "labels", "groups"):
            assert torch.equal(getattr(mine, name), getattr(other, name).cpu())
        difference = (mine.images - other.images.cpu()).abs().mean((1, 2, 3)) * 255 * SETTINGS.std[0]
        assert difference.max() < 1


def test_images_kept_on_the_device_give_the_batches_of_those_decoded_anew(
    tiny_shards: ShardSet, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = DeviceCache(tiny_shards, tiny_shards.split("train"), device)
    with loader(tiny_shards, device) as plain, loader(tiny_shards, device, cache) as cached:
        for epoch in range(4):
            if epoch == 3:  # by now all have been seen
                monkeypatch.setattr("pipeline.decode.Decoder.__call__", None)
            for decoded, kept in zip(plain, cached, strict=True):
                assert kept.images.device == device and torch.equal(kept.index, decoded.index)
                assert torch.equal(kept.images, decoded.images)
    assert cache.has(tiny_shards.split("train")).all()


def test_auto_keeps_images_on_the_gpu(tiny_shards: ShardSet, gpu: torch.device) -> None:
    settings = SETTINGS.model_copy(update={"cache": "auto"})
    assert isinstance(open_cache(tiny_shards, np.arange(9), settings, device=gpu), DeviceCache)


@pytest.mark.parametrize("kept", [False, True])
def test_batches_stay_whole_while_the_gpu_is_behind(
    tiny_shards: ShardSet, device: torch.device, kept: bool
) -> None:
    """DALI may not fill memory anew that kernels still waiting on torch's stream are going to read."""

    def copies(*, behind: bool) -> torch.Tensor:
        cache = DeviceCache(tiny_shards, tiny_shards.split("train"), device) if kept else None
        with loader(tiny_shards, device, cache) as batches:
            return torch.stack([copy(batch, behind) for epoch in range(2) for batch in batches]).cpu()

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


@pytest.mark.parametrize("kept", [False, True])
def test_gpu_memory_does_not_grow(tiny_shards: ShardSet, gpu: torch.device, kept: bool) -> None:
    cache = DeviceCache(tiny_shards, tiny_shards.split("train"), gpu) if kept else None
    batches = loader(tiny_shards, gpu, cache)

    def used_after_an_epoch() -> int:
        for batch in batches.epoch():
            assert batch.images.isfinite().all()
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info(gpu)
        return total - free

    settled = [used_after_an_epoch() for _ in range(5)][-1]
    later = [used_after_an_epoch() for _ in range(20)][-1]
    assert later == pytest.approx(settled, abs=8 << 20)
