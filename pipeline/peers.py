"""Other ways to load the same images, to measure the loader against: those of PyTorch and its libraries.

Light to import, as their worker processes start with it. They augment by the configuration's strengths, but
for blur, cutout and JPEG artefacts.
"""

import io
import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import io as codec
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

from configs.loading import Loader as Settings
from pipeline.sampler import Sampler
from shards.shardset import ShardSet

Way = Callable[[bytes], torch.Tensor]
"""From a JPEG to an image (3, size, size) float32, augmented and normalised."""
SHUFFLED = 1000
"""Images in the buffer of loaders that shuffle in one."""


def data_loader(
    shards: ShardSet,
    sampler: Sampler,
    way: Way,
    *,
    workers: int,
    device: torch.device,
    collate: Callable[[Sequence[Any]], Any] | None = None,
) -> Generator[Any]:
    """A DataLoader whose workers read each image by itself and treat it in some way; our order, without end.

    Yields:
        images (batch, 3, size, size) on the device, or what `collate` makes of what `way` gives.
    """
    loader = DataLoader(
        _Photographs(shards, way),
        batch_sampler=_Order(sampler),
        num_workers=workers,
        pin_memory=device.type == "cuda" and collate is None,
        # A fork would copy locks that the threads of DALI hold.
        multiprocessing_context=get_context("spawn"),
        collate_fn=collate,
    )
    for images in loader:
        yield images if collate else images.to(device, non_blocking=True)


def decoded_on_gpu(
    shards: ShardSet, sampler: Sampler, settings: Settings, *, workers: int, device: torch.device
) -> Generator[torch.Tensor]:
    """A DataLoader of bytes; nvJPEG by torchvision decodes them by batches, v2 augments each on the GPU."""
    augment = _version2(settings)
    encoded = data_loader(shards, sampler, _as_bytes, workers=workers, device=device, collate=_as_they_are)
    with closing(encoded):
        for batch in encoded:
            images = codec.decode_jpeg(list(batch), mode=codec.ImageReadMode.RGB, device=device)
            yield torch.stack([augment(image) for image in images])


def webdataset(
    shards: ShardSet, settings: Settings, *, workers: int, device: torch.device
) -> Generator[torch.Tensor]:
    """The webdataset library's pipeline, its shards drawn again and again, Pillow and v2 in its workers."""
    import webdataset as wds

    chosen = np.unique(shards.shard[shards.split("train")])
    dataset = (
        wds.WebDataset(
            [str(shards.paths[shard]) for shard in chosen], resampled=True, shardshuffle=False, seed=0
        )
        .shuffle(SHUFFLED)
        .to_tuple("jpg")
        .map_tuple(PillowV2(settings))
        .batched(settings.global_batch, partial=False)
    )
    loader = wds.WebLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        multiprocessing_context=get_context("spawn"),
    )
    for (images,) in loader:
        yield images.to(device, non_blocking=True)


class PillowV1:
    """Pillow and torchvision's first transforms: what the reference recipe uses."""

    def __init__(self, settings: Settings) -> None:
        self._augment = transforms.Compose(
            [
                *_geometry(transforms, settings),
                transforms.ColorJitter(**_jitter(settings)),
                transforms.ToTensor(),
                transforms.Normalize(settings.mean, settings.std),
            ]
        )

    def __call__(self, jpeg: bytes) -> torch.Tensor:
        image: torch.Tensor = self._augment(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        return image


class PillowV2:
    """Pillow and torchvision's second transforms."""

    def __init__(self, settings: Settings) -> None:
        self._augment = _version2(settings)

    def __call__(self, jpeg: bytes) -> torch.Tensor:
        image: torch.Tensor = self._augment(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        return image


class TorchvisionV2:
    """torchvision's own decoder and its second transforms, on tensors."""

    def __init__(self, settings: Settings) -> None:
        self._augment = _version2(settings)

    def __call__(self, jpeg: bytes) -> torch.Tensor:
        image: torch.Tensor = self._augment(codec.decode_jpeg(_as_bytes(jpeg), codec.ImageReadMode.RGB))
        return image


class OpenCV:
    """OpenCV and AlbumentationsX, which whoever wants this row installs: it is no dependency of ours."""

    def __init__(self, settings: Settings) -> None:
        import albumentations

        augment = settings.augment
        flip = 0.5 * augment.symmetries
        jitter = {
            f"{name}_range": (1 - strength, 1 + strength) if name != "hue" else (-strength, strength)
            for name, strength in _jitter(settings).items()
        }
        self._augment = albumentations.Compose(
            [
                albumentations.SmallestMaxSize(settings.size),
                albumentations.CenterCrop(settings.size, settings.size),
                albumentations.Affine(
                    scale=augment.scale,
                    translate_percent=(-augment.shift, augment.shift),
                    rotate=(-augment.rotation, augment.rotation),
                    p=1,
                ),
                albumentations.HorizontalFlip(p=flip),
                albumentations.VerticalFlip(p=flip),
                albumentations.ColorJitter(**jitter, p=1),
                albumentations.Normalize(settings.mean, settings.std),
            ]
        )

    def __call__(self, jpeg: bytes) -> torch.Tensor:
        import cv2

        cv2.setNumThreads(0)  # a worker a core already
        image = cv2.cvtColor(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        return torch.from_numpy(np.ascontiguousarray(self._augment(image=image)["image"].transpose(2, 0, 1)))


def _version2(settings: Settings) -> Any:
    """torchvision's second transforms, of a Pillow image or a tensor (3, h, w)."""
    return v2.Compose(
        [
            *_geometry(v2, settings),
            v2.ColorJitter(**_jitter(settings)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(settings.mean, settings.std),
        ]
    )


def _geometry(library: Any, settings: Settings) -> list[Any]:
    strength = settings.augment
    flip = 0.5 * strength.symmetries
    return [
        library.Resize(settings.size),
        library.CenterCrop(settings.size),
        # One affine pass, as cheap as RandomRotation alone.
        library.RandomAffine(
            strength.rotation,
            translate=(strength.shift, strength.shift),
            scale=strength.scale,
            interpolation=InterpolationMode.BILINEAR,
        ),
        library.RandomHorizontalFlip(flip),
        library.RandomVerticalFlip(flip),
    ]


def _jitter(settings: Settings) -> dict[str, float]:
    strength = settings.augment
    return {
        "brightness": strength.brightness,
        "contrast": strength.contrast,
        "saturation": strength.saturation,
        "hue": min(0.5, strength.hue / 360),  # of a turn
    }


def _as_bytes(jpeg: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)


def _as_they_are(samples: Sequence[Any]) -> Sequence[Any]:
    return samples


class _Photographs(Dataset[torch.Tensor]):
    """Images by index, each opened as a file of its own."""

    def __init__(self, shards: ShardSet, way: Way) -> None:
        self._paths, self._shard = shards.paths, shards.shard
        self._offsets, self._sizes, self._way = shards.offsets, shards.sizes, way

    def __getitem__(self, index: int) -> torch.Tensor:
        file = os.open(self._paths[self._shard[index]], os.O_RDONLY)
        try:
            return self._way(os.pread(file, int(self._sizes[index]), int(self._offsets[index])))
        finally:
            os.close(file)


class _Order:
    """A sampler's batches, epoch after epoch, as a DataLoader asks for them."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def __iter__(self) -> Iterator[list[int]]:
        for epoch in itertools.count():
            for step in range(self._sampler.steps):
                yield self._sampler.batch(epoch, step).tolist()
