"""Batches on the device. The loader's whole state is one number: the steps done."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from configs.errors import UserError
from configs.schema import Augment
from configs.schema import Loader as Settings
from pipeline import augment, graph
from pipeline.sampler import (
    PADDING,
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

    Prefetching runs on across the border between epochs, so no epoch starts with an empty queue.
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
    ) -> None:
        """
        Args:
            augmentation: None shows every image as it is.
            threads: DALI threads of this rank.
            start: steps already done, over all epochs.

        Raises:
            UserError: if the ranks cannot share the global batch.
        """
        self.source = Source(shards, max_bad=settings.max_bad)
        self.steps, self.world_size = sampler.steps, world_size
        self._shards, self._sampler, self._size = shards, sampler, settings.size
        self._augmentation, self._seed, self._device = augmentation, seed, device
        self._dtype, self._channels_last = settings.dtype, settings.channels_last
        self._slots = rank_slice(sampler.batch(0, 0), rank, world_size)
        self._done = self._asked = start
        self._ahead: deque[tuple[Indices, Indices]] = deque()
        self._pipeline = graph.build(
            self._inputs,
            batch=self._slots.stop - self._slots.start,
            size=settings.size,
            mean=settings.mean,
            std=settings.std,
            threads=threads,
            prefetch=settings.prefetch,
            augmentation=augmentation,
            dtype=settings.dtype,
            channels_last=settings.channels_last,
            gpu=device.index if device.type == "cuda" else None,
        )

    def epoch(self) -> Iterator[Batch]:
        """The batches from the current step to the end of its epoch."""
        while True:
            yield self._next()
            if self._done % self.steps == 0:
                return

    def _inputs(self) -> graph.Inputs:
        """DALI calls this once for every batch it prepares ahead."""
        epoch, step = divmod(self._asked, self.steps)
        wanted = self._sampler.batch(epoch, step)
        plan = (
            augment.draw(self._augmentation, len(wanted), seed=self._seed, epoch=epoch, step=step)
            if self._augmentation
            else augment.identity(len(wanted))
        )
        first, wanted, plan = wanted[0], wanted[self._slots], plan[self._slots]
        # Padding shows the batch's first sample, and is marked.
        data, index = self.source.fetch(np.where(wanted == PADDING, first, wanted))
        self._asked += 1
        self._ahead.append((index, np.where(wanted == PADDING, PADDING, index)))
        return data, *plan.parameters(self._shards.widths[index], self._shards.heights[index], self._size)

    def _next(self) -> Batch:
        (images,) = self._pipeline.run()  # an error in `_inputs` comes out of here as it is
        shown, index = self._ahead.popleft()
        self._done += 1
        return Batch(
            # DALI's tensor owns its memory until this view of it is gone: no copy is needed.
            images=graph.tensor(images, self._dtype, channels_last=self._channels_last),
            labels=self._to_device(self._shards.labels[shown]),
            groups=self._to_device(self._shards.groups[shown]),
            index=self._to_device(index),
        )

    def _to_device(self, values: Indices) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor


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
