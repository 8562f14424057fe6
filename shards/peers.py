"""What packing is measured against: drawn photographs, other ways to pack them, and the codec alone.

Light to import, as worker processes start with it.
"""

import io
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path
from threading import Barrier
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from configs.packing import Encode
from shards.encode import encode

SHARD = 1000
"""Images in a shard, as `pack.samples_per_shard` by default."""
_GRAIN = 6.3  # grey levels, standard deviation: makes 256 × 256 pixels 17 kB at quality 90


class Photograph(NamedTuple):
    """A file, and what its members in a shard say of it."""

    path: str
    label: int
    info: dict[str, Any]

    @property
    def key(self) -> str:
        """The sample's key."""
        return Path(self.path).stem


def draw(task: tuple[str, int, int, int]) -> None:
    """Write a JPEG, quality 90, with as many bytes a pixel as dermoscopy has: skin, a lesion, fine grain.

    Args:
        task: path, number that the photograph is a function of, width and height in pixels.
    """
    path, number, width, height = task
    random = np.random.default_rng(number)
    skin = random.normal((205, 160, 140), 14, (9, 9, 3))
    y, x = np.mgrid[-1:1:24j, -1:1:24j]
    radius = np.hypot(x - random.normal(0, 0.2), y - random.normal(0, 0.2)) + random.normal(0, 0.05, x.shape)
    lesion = 1 - random.uniform(0.3, 0.6) / (1 + np.exp((radius - random.uniform(0.3, 0.7)) * 12))
    pixels = (
        _enlarged(skin, width, height) * (_enlarged(lesion * 255, width, height) / np.float32(255))[..., None]
    )
    top, left = random.integers(0, 64, 2)
    pixels += _grain(width, height)[top : top + height, left : left + width, None]
    jpeg = simplejpeg.encode_jpeg(pixels.clip(0, 255).astype(np.uint8), quality=90, colorsubsampling="420")
    Path(path).write_bytes(jpeg)


def _enlarged(values: NDArray[np.float64], width: int, height: int) -> NDArray[np.uint8]:
    small = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@cache
def _grain(width: int, height: int) -> NDArray[np.float32]:
    """Noise, (height + 64, width + 64), that all photographs of a size have their part of."""
    random = np.random.default_rng(0)
    rough = random.normal(0, _GRAIN, (height + 65, width + 65)).astype(np.float32)
    return (rough[1:, 1:] + rough[:-1, 1:] + rough[1:, :-1] + rough[:-1, :-1]) / np.float32(2)


def shard_writer(photographs: Sequence[Photograph], output: Path, size: int = 0) -> None:
    """The usual script: a loop over the files that fills webdataset's ShardWriter.

    Args:
        size: with Pillow, decode in full, bring to this size by LANCZOS and encode again; 0 packs the bytes
            as they are.
    """
    from webdataset import ShardWriter

    with ShardWriter(str(output / "shard-%06d.tar"), maxcount=SHARD, verbose=0) as shards:
        for photograph in photographs:
            shards.write(_sample(photograph, pillow(photograph.path, size) if size else None))


def write_tar(photographs: Sequence[Photograph], output: Path, size: int) -> None:
    """One shard by webdataset's TarWriter, by Pillow in draft mode: a scaled decode."""
    from webdataset import TarWriter

    with TarWriter(str(output)) as shard:
        for photograph in photographs:
            shard.write(_sample(photograph, pillow(photograph.path, size, draft=True)))


def _sample(photograph: Photograph, jpeg: bytes | None) -> dict[str, Any]:
    return {
        "__key__": photograph.key,
        "jpg": Path(photograph.path).read_bytes() if jpeg is None else jpeg,
        "cls": photograph.label,
        "json": photograph.info,
    }


def pillow(path: str, size: int, *, draft: bool = False) -> bytes:
    """A photograph brought to `size` on its short side, as JPEG of the quality that `Encode` has."""
    file = io.BytesIO()
    settings = Encode()
    shrunk(path, size, draft=draft).save(file, "JPEG", quality=settings.quality, subsampling=0)
    return file.getvalue()


def shrunk(path: str, size: int, *, draft: bool = False) -> Image.Image:
    """A photograph decoded by Pillow and brought to `size` on its short side by LANCZOS."""
    image: Image.Image
    with Image.open(path) as image:
        scale = size / min(image.size)
        target = (round(image.width * scale), round(image.height * scale))
        if draft:
            image.draft("RGB", target)
        return image.resize(target, Image.Resampling.LANCZOS)


def tar(folder: Path, output: Path) -> None:
    """`tar cf`: the files as they are, and nothing of what a shard set needs besides."""
    subprocess.run(["tar", "cf", output / "shard-000000.tar", "-C", folder, "."], check=True)


@contextmanager
def crew(cores: int, folders: Sequence[Path]) -> Iterator[Pool]:
    """Worker processes that have started, imported all they need, and hold the files of folders in memory."""
    spawn = get_context("spawn")
    ready = spawn.Barrier(cores + 1)
    with spawn.Pool(cores, _prepare, (tuple(map(str, folders)), ready)) as pool:
        ready.wait(timeout=300)  # seconds
        yield pool


def _prepare(folders: Sequence[str], ready: Barrier) -> None:
    import webdataset  # noqa: F401

    for folder in folders:
        _contents(folder)
    ready.wait()


@cache
def _contents(folder: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(Path(folder).iterdir())]


def encode_held(folder: str, start: int, stop: int, settings: Encode) -> int:
    """Packing's own check and coding of some of a folder's images, and nothing else.

    Returns:
        How many there were.
    """
    images = _contents(folder)[start:stop]
    for data in images:
        encode(data, settings)
    return len(images)
