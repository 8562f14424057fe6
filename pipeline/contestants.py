"""What `moleprint bench loader` measures, each in a process of its own.

All load the same training images in batches of the same size, augmented by the same strengths; those that
cannot be told an order shuffle in a buffer.
"""

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from configs.errors import UserError
from configs.schema import Experiment
from pipeline import augment, graph, peers
from pipeline.cache import Cache, CachedSource, open_cache
from pipeline.loader import Loader, training_sampler
from pipeline.sampler import Sampler
from pipeline.source import Source
from shards.shardset import ShardSet
from shards.timing import REFERENCE

OURS = "moleprint"
_HOST_CACHE, _DEVICE_CACHE = f"{OURS}, host cache", f"{OURS}, device cache"
CACHES = {_HOST_CACHE: "host", _DEVICE_CACHE: "device"}

# Endless; gives the number of images of each batch once they are on the device.
Batches = Generator[int]


@dataclass(frozen=True)
class Entry:
    """What each of them is given, made anew for each that opens the set."""

    experiment: Experiment
    device: torch.device
    cache: Cache | None = None

    @cached_property
    def shards(self) -> ShardSet:
        """The set."""
        return ShardSet.of(self.experiment)

    @cached_property
    def sampler(self) -> Sampler:
        """Order of the training images."""
        settings, seed = self.experiment.loader, self.experiment.train.seed
        return training_sampler(self.shards, settings, seed=seed, world_size=1)

    @property
    def gpu(self) -> int | None:
        """Its ordinal."""
        return self.device.index if self.device.type == "cuda" else None

    @property
    def workers(self) -> int:
        """Worker processes: one a core."""
        return len(os.sched_getaffinity(0))

    @property
    def threads(self) -> int:
        """DALI threads: as many."""
        return self.experiment.loader.threads or self.workers


def names(device: torch.device) -> list[str]:
    """The contestants on this device, the reference first, the limit last."""
    # On a GPU the loader itself uses DALI's operators.
    absent = {_OPERATORS} if device.type == "cuda" else {_ON_GPU, _DEVICE_CACHE}
    return [name for name in _CONTESTANTS if name not in absent]


def prepare(name: str, experiment: Experiment, device: torch.device) -> Callable[[], Batches]:
    """Do what is done once in a process, such as filling a cache; what is returned opens the set.

    Raises:
        UserError: if there is no such contestant here, and why.
    """
    if device.type == "cuda":
        torch.zeros(1, device=device)  # CUDA has started
    make = _CONTESTANTS[name]
    if make is _opencv:
        _need_albumentations()
    cache = _filled(Entry(experiment, device), CACHES[name]) if name in CACHES else None
    return lambda: make(Entry(experiment, device, cache))


def _filled(entry: Entry, place: str) -> Cache | None:
    """A cache that holds every training image."""
    settings = entry.experiment.loader.model_copy(update={"cache": place})
    train = entry.shards.split("train")
    cache = open_cache(entry.shards, train, settings, device=entry.device)
    assert cache is not None
    source = CachedSource(
        Source(entry.shards, max_bad=0), cache, batch=settings.global_batch, threads=entry.threads
    )
    for start in range(0, len(train), settings.global_batch):
        source.fetch(train[start : start + settings.global_batch])
    source.close()
    return cache


def _need_albumentations() -> None:
    try:
        import albumentations  # noqa: F401
        import cv2  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error}; pip install albumentationsx opencv-python-headless") from None


def _ours(entry: Entry) -> Batches:
    settings, seed = entry.experiment.loader, entry.experiment.train.seed
    with Loader(
        entry.shards,
        entry.sampler,
        settings,
        augmentation=settings.augment,
        seed=seed,
        rank=0,
        world_size=1,
        device=entry.device,
        threads=entry.threads,
        cache=entry.cache,
    ) as loader:
        while True:
            for batch in loader:
                yield len(batch.index)


def _workers(entry: Entry, way: peers.Way) -> Batches:
    batches = peers.data_loader(entry.shards, entry.sampler, way, workers=entry.workers, device=entry.device)
    return (len(images) for images in batches)


def _pillow_v1(entry: Entry) -> Batches:
    return _workers(entry, peers.PillowV1(entry.experiment.loader))


def _torchvision_v2(entry: Entry) -> Batches:
    return _workers(entry, peers.TorchvisionV2(entry.experiment.loader))


def _opencv(entry: Entry) -> Batches:
    return _workers(entry, peers.OpenCV(entry.experiment.loader))


def _decoded_on_gpu(entry: Entry) -> Batches:
    batches = peers.decoded_on_gpu(
        entry.shards, entry.sampler, entry.experiment.loader, workers=entry.workers, device=entry.device
    )
    return (len(images) for images in batches)


def _webdataset(entry: Entry) -> Batches:
    batches = peers.webdataset(
        entry.shards, entry.experiment.loader, workers=entry.workers, device=entry.device
    )
    return (len(images) for images in batches)


def _operators(entry: Entry) -> Batches:
    """Our graph with DALI's own operators, as on a GPU, in place of the fused pass."""
    settings = entry.experiment.loader
    pipeline = graph.build(
        _inputs(entry),
        batch=settings.global_batch,
        size=settings.size,
        mean=settings.mean,
        std=settings.std,
        threads=entry.threads,
        prefetch=settings.prefetch,
        augmentation=settings.augment,
        dtype=settings.dtype,
        channels_last=settings.channels_last,
        one_pass=False,
    )
    return _runs(pipeline)


def _decode_only(entry: Entry) -> Batches:
    """As fast as any pipeline with this decoder can be."""
    inputs = _inputs(entry)

    def decode() -> Any:
        encoded = fn.external_source(lambda: inputs()[0], batch=True, dtype=types.UINT8, ndim=1)
        return _decoded(encoded, entry)

    return _runs(_built(decode, entry))


def _dalis_reader(entry: Entry) -> Batches:
    """DALI as its documentation shows it: its reader of WebDataset shards, and an operator for each thing."""
    settings, drawn = entry.experiment.loader, entry.experiment.loader.augment
    shards, size = entry.shards, entry.experiment.loader.size
    train = shards.split("train")
    paths = [shards.paths[number] for number in np.unique(shards.shard[train])]
    fits = (np.minimum(shards.widths[train], shards.heights[train]) == size).all()

    def between(low: float, high: float) -> Any:
        return fn.random.uniform(range=[low, high]) if low < high else low

    def around(middle: float, strength: float) -> Any:
        return between(middle - strength, middle + strength)

    def documented() -> Any:
        encoded = fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=["jpg"],
            random_shuffle=True,
            initial_fill=peers.SHUFFLED,
        )
        images = _decoded(encoded, entry)
        if not fits or drawn.scale != (1, 1):
            images = fn.resize(images, resize_shorter=size * between(*drawn.scale))
        if drawn.rotation:
            images = fn.rotate(images, angle=around(0, drawn.rotation), keep_size=True, fill_value=0)
        if drawn.brightness or drawn.contrast or drawn.saturation or drawn.hue:
            images = fn.color_twist(
                images,
                brightness=around(1, drawn.brightness),
                contrast=around(1, drawn.contrast),
                saturation=around(1, drawn.saturation),
                hue=around(0, drawn.hue),
            )
        if drawn.symmetries:
            images = fn.flip(images, horizontal=fn.random.coin_flip(), vertical=fn.random.coin_flip())
        return fn.crop_mirror_normalize(
            images,
            dtype=types.FLOAT,
            crop=(size, size),
            crop_pos_x=around(0.5, drawn.shift),
            crop_pos_y=around(0.5, drawn.shift),
            out_of_bounds_policy="pad",
            mean=[255 * value for value in settings.mean],
            std=[255 * value for value in settings.std],
        )

    return _runs(_built(documented, entry))


def _inputs(entry: Entry) -> Callable[[], graph.Inputs]:
    """What our loader feeds its graph, batch after batch."""
    settings, seed, steps = entry.experiment.loader, entry.experiment.train.seed, count()
    source, sampler, shards = Source(entry.shards, max_bad=0), entry.sampler, entry.shards

    def inputs() -> graph.Inputs:
        epoch, step = divmod(next(steps), sampler.steps)
        data, index = source.fetch(sampler.batch(epoch, step))
        plan = augment.draw(settings.augment, len(index), seed=seed, epoch=epoch, step=step)
        return data, *plan.parameters(shards.widths[index], shards.heights[index], settings.size)

    return inputs


def _decoded(encoded: Any, entry: Entry) -> Any:
    decoder = "cpu" if entry.gpu is None else "mixed"
    return fn.decoders.image(encoded, device=decoder, output_type=types.RGB)


def _built(define: Callable[[], Any], entry: Entry) -> Pipeline:
    settings = entry.experiment.loader
    pipeline: Pipeline = pipeline_def(
        define,
        batch_size=settings.global_batch,
        num_threads=entry.threads,
        device_id=entry.gpu,
        prefetch_queue_depth=settings.prefetch,
        seed=0,
    )()
    pipeline.build()
    return pipeline


def _runs(pipeline: Pipeline) -> Batches:
    while True:
        (images,) = pipeline.run()
        yield len(images)


_OPERATORS, _ON_GPU = f"{OURS}, DALI operators", "DataLoader + decode_jpeg(cuda) + v2"
_CONTESTANTS: dict[str, Callable[[Entry], Batches]] = {
    REFERENCE: _pillow_v1,
    OURS: _ours,
    _HOST_CACHE: _ours,
    _DEVICE_CACHE: _ours,
    _OPERATORS: _operators,
    "DataLoader + decode_jpeg + v2": _torchvision_v2,
    _ON_GPU: _decoded_on_gpu,
    "DataLoader + AlbumentationsX": _opencv,
    "webdataset + Pillow + v2": _webdataset,
    "DALI's webdataset reader": _dalis_reader,
    "decode only": _decode_only,
}
