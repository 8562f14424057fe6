"""What training and validation read: three loaders, and the decoded images that they share."""

import numpy as np
import torch

from configs.schema import Experiment
from pipeline.cache import open_cache
from pipeline.loader import Batch, Loader
from pipeline.sampler import Sampler
from shards.shardset import ShardSet
from train import validation
from train.distributed import World, first_on_node
from train.embed import evaluation_loader


class Data:
    """The loaders of one rank."""

    def __init__(
        self, shards: ShardSet, sampler: Sampler, experiment: Experiment, world: World, start: int
    ) -> None:
        """
        Args:
            sampler: of the training split.
            start: steps already done.
        """
        settings, self._settings = experiment.train, experiment.loader
        self._classes = shards.classes
        train, held = shards.split("train"), shards.split("val")
        self.cache = open_cache(
            shards,
            np.concatenate([train, held]),
            experiment.loader,
            lambda word: str(first_on_node(word, world)),
            world.device,
        )
        self.training = Loader(
            shards,
            sampler,
            experiment.loader,
            augmentation=experiment.loader.augment,
            seed=settings.seed,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            threads=world.threads(experiment.loader.threads),
            start=start,
            cache=self.cache,
        )
        self.held = evaluation_loader(shards, held, experiment, world, self.cache)
        self.known: Loader | None = None
        """Training samples as they are, for kNN and the probe; damaged ones are replaced as in training."""
        if settings.probe_images:
            drawn = validation.draw(shards.labels, train, settings.probe_images, seed=settings.seed)
            bad = experiment.loader.max_bad
            self.known = evaluation_loader(shards, drawn, experiment, world, self.cache, max_bad=bad)

    def pictures(self, batch: Batch, count: int) -> tuple[torch.Tensor, list[str]]:
        """The first images of a batch in 0..1, and their classes' names."""
        mean, std = (
            torch.tensor(v, device=batch.images.device)[:, None, None]
            for v in (self._settings.mean, self._settings.std)
        )
        names = [self._classes[label] for label in batch.labels[:count].tolist()]
        return batch.images[:count] * std + mean, names

    def close(self) -> None:
        """End the loaders' threads and let go of the cache."""
        for loader in (self.training, self.held, self.known):
            if loader is not None:
                loader.close()
        if self.cache is not None:
            self.cache.close()
