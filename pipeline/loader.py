"""Batches on the device. The loader's whole state is one number: the steps done."""

import atexit
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from configs.errors import UserError
from configs.loading import Augment
from configs.loading import Loader as Settings
from pipeline import augment, graph
from pipeline.ahead import Ahead
from pipeline.cache import Cache, CachedSource, DeviceCache, Fetcher
from pipeline.producer import Producer, Ready, Step
from pipeline.sampler import (
    Balanced,
    Indices,
    Patient,
    Sampler,
    Shuffle,
    Windows,
    check_world_size,
    rank_slice,
)
from pipeline.source import Source
from shards.shardset import ShardSet

IN_THE_MAKING = 2
"""Batches that DALI works on: one is read and planned while another is decoded."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch, on the device."""

    images: torch.Tensor
    """(batch, 3, size, size), normalised; type and memory order as `loader.dtype` and `channels_last` say."""
    labels: torch.Tensor
    """(batch,) int64 class indices."""
    groups: torch.Tensor
    """(batch,) int64 patient codes."""
    index: torch.Tensor
    """(batch,) int64 rows of the shard set; −1 marks padding, to be dropped."""


class Loader:
    """An endless stream of batches, cut into epochs.

        for batch in loader: …      from the current step to the end of its epoch; again: the next epoch
        loader.step                 steps done, over all epochs: all of the loader's state
        loader.seek(step)           go on from any step, backwards too

    A thread of its own reads, checks, plans and waits for DALI, which decodes and augments in threads of its
    own: the caller's thread only takes what is ready. Prefetching runs on across the border between epochs,
    so no epoch starts with an empty queue. `close`, the end of a `with` block, or the end of the last
    reference to the loader ends the threads; there are no processes, and no names in any folder.
    """

    def __init__(
        self,
        shards: ShardSet,
        sampler: Sampler,
        settings: Settings,
        *,
        augmentation: Augment | None,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
        threads: int,
        start: int = 0,
        cache: Cache | None = None,
    ) -> None:
        """
        Args:
            augmentation: None shows every image as it is.
            threads: DALI threads of this rank.
            start: steps already done, over all epochs.
            cache: where the sampler's images are kept decoded; None decodes them each time.

        Raises:
            UserError: if the ranks cannot share the global batch.
        """
        self.source = Source(shards, max_bad=settings.max_bad, read=settings.read)
        self.steps, self.world_size = sampler.steps, world_size
        self.step = start
        """Steps done, over all epochs."""
        self._shards, self._device = shards, device
        self._dtype, self._channels_last = settings.dtype, settings.channels_last
        slots = rank_slice(sampler.batch(0, 0), rank, world_size)
        batch, gpu = slots.stop - slots.start, device.index if device.type == "cuda" else None
        fetcher: Fetcher = self.source
        if cache is not None:
            fetcher = CachedSource(self.source, cache, batch=batch, threads=threads)
        self._producer = Producer(
            _planner(sampler, slots, augmentation, seed),
            fetcher,
            self.source,
            lambda inputs: graph.build(
                inputs,
                batch=batch,
                size=settings.size,
                mean=settings.mean,
                std=settings.std,
                threads=threads,
                prefetch=IN_THE_MAKING,
                augmentation=augmentation,
                decoded=cache is not None,
                resident=isinstance(cache, DeviceCache),
                dtype=settings.dtype,
                channels_last=settings.channels_last,
                gpu=gpu,
            ),
            size=settings.size,
            gpu=gpu,
            decoded=cache is not None,
        )
        self._ahead: Ahead[Ready] = Ahead(self._producer.batches, settings.prefetch)
        # Not a method of the loader, which nothing that the thread holds may keep alive.
        self._end = weakref.finalize(self, _end, self._ahead, self._producer)
        # Called at the interpreter's end before DALI's own, which ends pipelines that the thread may be in.
        atexit.register(self._end)
        self._ahead.start()

    def __iter__(self) -> Iterator[Batch]:
        """As `epoch`."""
        return self.epoch()

    def epoch(self) -> Iterator[Batch]:
        """The batches from the current step to the end of its epoch.

        Raises:
            DamagedDataError: if more samples are damaged than allowed.
            ValueError: if the loader is closed.
        """
        while True:
            yield self._next()
            if self.step % self.steps == 0:
                return

    def seek(self, step: int) -> None:
        """Go on after `step` steps, counted over all epochs; returns at once, whatever is prefetched."""
        self.step = step

    def close(self) -> None:
        """End the threads and let go of files; batches that were taken stay as they are."""
        _end(self._ahead, self._producer)
        self._end.detach()  # not before: interrupted, it has yet to be closed
        atexit.unregister(self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next(self) -> Batch:
        while True:
            step = self.step
            batch = self._on_device(self._ahead.get(step))
            if self.step == step:  # else a signal's handler has sought another meanwhile
                self.step = step + 1
                return batch

    def _on_device(self, ready: Ready) -> Batch:
        return Batch(
            # DALI's tensor owns its memory until this view of it is gone: no copy is needed. Viewed in the
            # caller's thread, whose stream is to wait for DALI's.
            images=graph.tensor(ready.images, self._dtype, channels_last=self._channels_last),
            labels=self._to_device(self._shards.labels[ready.shown]),
            groups=self._to_device(self._shards.groups[ready.shown]),
            index=self._to_device(ready.index),
        )

    def _to_device(self, values: Indices) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor


def _planner(
    sampler: Sampler, slots: slice, augmentation: Augment | None, seed: int
) -> Callable[[int], Step]:
    """Step number -> a rank's share of it."""

    def plan(number: int) -> Step:
        epoch, step = divmod(number, sampler.steps)
        wanted = sampler.batch(epoch, step)
        changes = (
            augment.draw(augmentation, len(wanted), seed=seed, epoch=epoch, step=step)
            if augmentation
            else augment.identity(len(wanted))
        )
        return Step(wanted[slots], int(wanted[0]), changes[slots])

    return plan


def _end(ahead: Ahead[Ready], producer: Producer) -> None:
    ahead.close()
    producer.close()


def training_sampler(shards: ShardSet, settings: Settings, *, seed: int, world_size: int) -> Sampler:
    """The sampler of the training split that the configuration names.

    Raises:
        UserError: if the ranks (and classes, for balanced samplers) cannot share the global batch.
    """
    indices, batch, steps = shards.split("train"), settings.global_batch, settings.steps_per_epoch
    if batch < 2 * world_size:
        raise UserError(
            f"loader.global_batch={batch} leaves {world_size} ranks less than 2 images each, and one has no "
            f"statistics; set it to {2 * world_size} or more"
        )
    windows = Windows(shards.shard, settings.window) if settings.window else None
    if settings.sampler == "shuffle":
        check_world_size(batch, world_size)
        return Shuffle(indices, batch, seed=seed, steps=steps, windows=windows)
    classes = len(shards.classes)
    check_world_size(batch, world_size, min(settings.classes_per_batch or classes, classes))
    if settings.sampler == "balanced":
        return Balanced(
            indices,
            shards.labels,
            batch,
            seed=seed,
            steps=steps,
            classes_per_batch=settings.classes_per_batch,
            windows=windows,
        )
    return Patient(
        indices,
        shards.labels,
        shards.groups,
        batch,
        positive=shards.positive,
        seed=seed,
        steps=steps,
        windows=windows,
    )
