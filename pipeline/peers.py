"""Other ways to load the same images in the same order, to measure the loader against.

Light to import, as their worker processes start with it.
"""

import io
from collections.abc import Iterator
from multiprocessing import get_context

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from configs.loading import Loader as Settings
from pipeline.sampler import Sampler
from shards.shardset import ShardSet


def torchvision_batches(
    shards: ShardSet, sampler: Sampler, settings: Settings, *, workers: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """The usual way: a DataLoader whose workers decode with Pillow and augment with torchvision.

    Yields:
        images (batch, 3, size, size) float32 on the device, without end.
    """
    loader = DataLoader(
        _Photographs(shards, settings),
        batch_sampler=_Order(sampler),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # A fork would copy locks that the threads of DALI hold.
        multiprocessing_context=get_context("spawn"),
    )
    for images, _ in loader:
        yield images.to(device, non_blocking=True)


class _Photographs(Dataset[tuple[torch.Tensor, int]]):
    """Images by index, each opened as a file of its own, augmented as the loader is told to."""

    def __init__(self, shards: ShardSet, settings: Settings) -> None:
        self._paths, self._shard, self._labels = shards.paths, shards.shard, shards.labels
        self._offsets, self._sizes = shards.offsets, shards.sizes
        strength = settings.augment
        flip = 0.5 * strength.symmetries
        self._transform = transforms.Compose(
            [
                transforms.Resize(settings.size),
                transforms.CenterCrop(settings.size),
                # One affine pass, as cheap as RandomRotation alone.
                transforms.RandomAffine(
                    strength.rotation,
                    translate=(strength.shift, strength.shift),
                    scale=strength.scale,
                    interpolation=InterpolationMode.BILINEAR,
                ),
                transforms.RandomHorizontalFlip(flip),
                transforms.RandomVerticalFlip(flip),
                transforms.ColorJitter(
                    strength.brightness, strength.contrast, strength.saturation, strength.hue / 360
                ),
                transforms.ToTensor(),
                transforms.Normalize(settings.mean, settings.std),
            ]
        )

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with self._paths[self._shard[index]].open("rb") as file:
            file.seek(self._offsets[index])
            image = Image.open(io.BytesIO(file.read(self._sizes[index]))).convert("RGB")
        return self._transform(image), int(self._labels[index])


class _Order:
    """A sampler's batches, epoch after epoch, as a DataLoader asks for them."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        epoch = 0
        while True:
            for step in range(self._sampler.steps):
                yield self._sampler.batch(epoch, step).tolist()
            epoch += 1
