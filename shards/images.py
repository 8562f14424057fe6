"""Where the encoded bytes of images lie: in a folder, a tar, a zip, an HDF5 file, or WebDataset shards.

Light to import: worker processes start with it.
"""

import os
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.errors import UserError

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"),
    *(".gif", ".ppm", ".pgm", ".jp2", ".avif"),
)
"""Image files are known by these endings, in either case."""
BLOCK = 512
"""Bytes of a block of a tar."""
LARGEST = 1 << 29
"""Bytes of an encoded image, at most: an uncompressed one with as many pixels as are allowed fits."""


class Ref(NamedTuple):
    """The encoded bytes of one image."""

    path: str
    """File that holds them."""
    name: str
    """What to call the image: its path below the folder, or its name in an archive."""
    stamp: str
    """Changes when the file does: its size and time of modification."""
    offset: int = 0
    """First byte in the file."""
    size: int = -1
    """Bytes; −1 is the rest of the file."""
    member: str = ""
    """Name in a zip or HDF5 file, which `offset` and `size` say nothing of."""


def without_ending(text: str) -> str:
    """An image id without a file's ending."""
    stem, ending = os.path.splitext(text)  # noqa: PTH122 - half a million names
    return stem if ending.lower() in SUFFIXES else text


def locate(ids: Sequence[str], images: str, scratch: Path) -> list[Ref]:
    """The bytes of every image id, sought by their file's name without its ending.

    Args:
        ids: image ids without a file's ending.
        images: a folder, a .tar, .zip or .hdf5 file, or WebDataset shards.
        scratch: folder that images which must be streamed from a URL are copied to, once.

    Raises:
        UserError: if the place or an image is missing or unreadable, or an id has more than one image.
    """
    found: dict[str, list[Ref]] = {}
    for stem, ref in entries(images, scratch):
        found.setdefault(stem, []).append(ref)
    missing, located = [], []
    for key in ids:
        here = found.get(key, [])
        if len(here) > 1:
            several = ", ".join(sorted(ref.name for ref in here)[:3])
            raise UserError(f"{images}: image id {key} has {len(here)} files ({several}); keep one")
        located += here
        if not here:
            missing.append(key)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{images}: {len(missing)} of the table's {len(ids)} images not found "
            f"({', '.join(missing[:3])}{more}); {len(found)} images are there and below; set pack.images to "
            "their place, or take the rows out of the table"
        )
    return located


def is_web(images: str) -> bool:
    """Whether a place is WebDataset shards, not a folder or a single archive."""
    several = "://" in images or "{" in images or "::" in images or images.endswith((".tar.gz", ".tgz"))
    return several and not Path(images).is_dir()


def is_local_tar(shard: str) -> bool:
    """Whether a shard's images can be read where they lie."""
    return shard.endswith(".tar") and Path(shard).is_file()


def read(ref: Ref) -> bytes:
    """The encoded bytes.

    Raises:
        UserError: if they cannot be read.
    """
    try:
        if not ref.member:
            # With no file object: a third of the time. Not blocking: a pipe would wait for a writer for ever.
            handle = os.open(ref.path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                size = ref.size if ref.size >= 0 else os.fstat(handle).st_size
                _refuse_giant(size)
                return os.pread(handle, size, ref.offset)
            finally:
                os.close(handle)
        if ref.path.lower().endswith(".zip"):
            return _from_zip(ref)
        return _from_hdf5(ref)
    except UserError:
        raise
    except Exception as error:  # damaged archives make their readers raise almost anything
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot be read ({reason})") from None


def _from_zip(ref: Ref) -> bytes:
    archive = _zip(ref.path)
    _refuse_giant(archive.getinfo(ref.member).file_size)
    return archive.read(ref.member)


def _from_hdf5(ref: Ref) -> bytes:
    data = _hdf5(ref.path)[ref.member]
    _refuse_giant(getattr(data, "nbytes", 0))
    value = data[()]
    return value if isinstance(value, bytes) else np.asarray(value).tobytes()


def _refuse_giant(size: int) -> None:
    if size > LARGEST:
        raise UserError(f"{size:,} bytes are too many for a photograph (at most {LARGEST:,})")


def entries(images: str, scratch: Path) -> Iterator[tuple[str, Ref]]:
    """(name without folder and ending, bytes) of every image in a place, as for `locate`."""
    path = Path(images)
    kind = path.suffix.lower()
    if path.is_dir():
        yield from _in_folder(path)
    elif is_web(images):
        from shards import webshards

        for shard in webshards.expand(images):
            yield from _in_tar(Path(shard)) if is_local_tar(shard) else webshards.staged(shard, scratch)
    elif not path.is_file():
        raise UserError(
            f"{images}: no such folder or file; set pack.images to the folder or archive of the images"
        )
    elif kind == ".tar":
        yield from _in_tar(path)
    elif kind == ".zip":
        yield from _in_zip(path)
    elif kind in (".hdf5", ".h5"):
        yield from _in_hdf5(path)
    else:
        raise UserError(
            f"{images}: not a kind of archive that is known; images are taken from a folder, a .tar, .zip or "
            ".hdf5 file, or WebDataset shards"
        )


def stamp(about: os.stat_result) -> str:
    """What changes when a file does."""
    return f"{about.st_size} {about.st_mtime_ns}"


def _in_folder(folder: Path) -> Iterator[tuple[str, Ref]]:
    left, seen, start = [str(folder)], set(), len(str(folder)) + 1
    try:
        while left:
            below = left.pop()
            about = os.stat(below)  # noqa: PTH116 - links to folders are followed, but never in a circle
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            with os.scandir(below) as entries:
                for entry in entries:
                    stem, ending = os.path.splitext(entry.name)  # noqa: PTH122 - half a million names
                    if entry.is_dir():
                        left.append(entry.path)
                    elif ending.lower() in SUFFIXES or (not ending and entry.is_file()):
                        mark = stamp(entry.stat()) if entry.is_file() else ""  # a broken link is no end
                        yield stem, Ref(entry.path, entry.path[start:], mark)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror})") from None


def _in_tar(path: Path) -> Iterator[tuple[str, Ref]]:
    mark = stamp(path.stat())
    places: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isreg():
                    places[info.name] = info.offset_data, info.size
                # tar(1) stores a file with two names once, and the second name as a link to the first.
                place = places.get(info.linkname if info.islnk() else info.name)
                stem = without_ending(Path(info.name).name)
                if place and stem != Path(info.name).name:
                    yield stem, Ref(str(path), info.name, mark, *place)
            end = _block(path, tar.offset)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: cannot be read as an uncompressed tar ({error}); copy it again") from None
    if end != bytes(BLOCK):  # tarfile takes whatever is no header for the end
        raise UserError(f"{path}: breaks off or is damaged after {len(places)} members; copy it again")


def _block(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(BLOCK)


def _in_zip(path: Path) -> Iterator[tuple[str, Ref]]:
    mark = stamp(path.stat())
    try:
        names = _zip(str(path)).namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path}: cannot be read as a zip ({error}); copy it again") from None
    for name in names:
        stem = without_ending(Path(name).name)
        if stem != Path(name).name:
            yield stem, Ref(str(path), name, mark, member=name)


def _in_hdf5(path: Path) -> Iterator[tuple[str, Ref]]:
    mark = stamp(path.stat())
    try:
        names = list(_hdf5(str(path)))
    except OSError as error:
        raise UserError(f"{path}: cannot be read as HDF5 ({error}); copy it again") from None
    for name in names:
        yield without_ending(name), Ref(str(path), name, mark, member=name)


@lru_cache(maxsize=8)
def _zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@lru_cache(maxsize=8)
def _hdf5(path: str) -> Any:
    import h5py

    return h5py.File(path, "r")
