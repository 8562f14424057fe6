"""A shard set copied once to a node's own disk, from a URL or a slow mount, every file's sum checked.

    STAGE/NAME-SUM/     the copy: SUM is of its dataset.json, so a set that was packed anew gets a new folder

All processes of a node may ask at once: one holds the lock on the folder and copies, the others wait, and go
on where it ended if it was killed. A file has its name only once its sum is right; `dataset.json` comes last.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs.errors import UserError
from shards.claims import POLL, lock
from shards.files import atomic, sha256, writing
from shards.shardset import MANIFEST

PARALLEL = 8
"""Files copied at once."""
CHUNK = 1 << 22
TRIES = 3
"""Times that a file is copied whose sum is wrong, or whose server fails."""
PAUSE = 1.0
"""Seconds before a server that failed is asked again; then as many more."""
PATIENCE = 30.0
"""Seconds of silence after which a web server has failed."""

Files = Mapping[str, Mapping[str, Any]]


def staged(place: Path | str, stage: Path) -> Path:
    """The folder of a local copy of a shard set, made or completed if need be.

    Args:
        place: the set's folder or URL.
        stage: folder that copies are kept in.

    Raises:
        UserError: if the set cannot be read or a sum is wrong, again and again, or there is no room.
    """
    place = str(place).rstrip("/")
    manifest = b"".join(_chunks(f"{place}/{MANIFEST}"))
    files = _files(manifest, place)
    folder = stage / f"{place.rpartition('/')[2]}-{hashlib.sha256(manifest).hexdigest()[:16]}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        while not _whole(folder, files):
            handle = lock(folder)
            if handle is None:
                time.sleep(POLL)
                continue
            try:
                _complete(place, folder, files)
                with atomic(folder / MANIFEST) as file:
                    file.write(manifest)
            finally:
                os.close(handle)
    return folder


def _files(manifest: bytes, place: str) -> Files:
    """Name -> size and sum of each file of a set."""
    try:
        files: Files = json.loads(manifest)["files"]
        sound = all(
            Path(name).name == name and {"size", "sha256"} <= about.keys() for name, about in files.items()
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{place}/{MANIFEST}: not that of a shard set; make one with `moleprint pack`")
    return files


def _whole(folder: Path, files: Files) -> bool:
    """Whether a copy was finished and no file has gone or changed its size since."""
    return (folder / MANIFEST).is_file() and all(_sized(folder / name, files[name]) for name in files)


def _sized(path: Path, about: Mapping[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == about["size"]


def _complete(place: str, folder: Path, files: Files) -> None:
    """Copy what the folder lacks; what an earlier copier left there is used if its sum is right."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    stop = threading.Event()
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="moleprint-stage") as pool:
        try:
            right = pool.map(
                lambda name: _sized(folder / name, files[name]) and _sum_is(folder / name, files[name]), files
            )
            lacking = [name for name, there in zip(files, right, strict=True) if not there]
            _make_sure_of_room(folder, sum(files[name]["size"] for name in lacking))
            with tqdm(
                total=sum(files[name]["size"] for name in lacking),
                desc=f"stage {place}",
                unit="B",
                unit_scale=True,
                file=sys.stderr,
            ) as bar:
                copies = [
                    pool.submit(_copy, f"{place}/{name}", folder / name, files[name], bar, stop)
                    for name in lacking
                ]
                for copy in copies:
                    copy.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _sum_is(path: Path, about: Mapping[str, Any]) -> bool:
    return sha256(path) == str(about["sha256"])


def _make_sure_of_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: the shard set needs {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free; make "
            "room, or set loader.stage to another disk"
        )


def _copy(
    source: str, target: Path, about: Mapping[str, Any], bar: "tqdm[Any]", stop: threading.Event
) -> None:
    """Copy a file; it gets its name only if its sum is right."""
    failure: UserError
    for attempt in range(TRIES):
        digest = hashlib.sha256()
        try:
            with atomic(target) as file:
                for chunk in _chunks(source):
                    if stop.is_set():
                        raise InterruptedError
                    digest.update(chunk)
                    file.write(chunk)
                    bar.update(len(chunk))
                if digest.hexdigest() != about["sha256"]:
                    raise _WrongSumError
        except _WrongSumError:
            failure = UserError(
                f"{source}: damaged, its sum is not the one that {MANIFEST} has; put the file there again, "
                "or pack the set again"
            )
        except _UnreadableError as error:
            failure = error
            stop.wait(PAUSE * (attempt + 1) if attempt + 1 < TRIES else 0)
        else:
            return
    raise failure


class _WrongSumError(Exception):
    pass


class _UnreadableError(UserError):
    """A file is there, as far as is known, but reading it failed."""


def _chunks(place: str) -> Iterator[bytes]:
    """A file's bytes, from a folder or a URL; whatever its driver raises becomes a UserError."""
    try:
        with _opened(place) as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except GeneratorExit:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{place}: cannot be read (no such file); check the address") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise _UnreadableError(
            f"{place}: cannot be read ({reason}); check the address and the rights to it, and that its "
            "driver is installed (such as s3fs for s3://)"
        ) from error


def _opened(place: str) -> Any:
    if place.startswith(("http://", "https://")):  # fsspec wants drivers for these too
        return urllib.request.urlopen(place, timeout=PATIENCE)
    import fsspec

    return fsspec.open(place, "rb")
