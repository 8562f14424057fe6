"""Proof, from the shards alone, that a shard set is whole, readable and free of leaks."""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from configs.errors import UserError
from configs.packing import Encode
from shards.encode import encode
from shards.files import sha256
from shards.leaks import crossing
from shards.shardset import MANIFEST, ShardSet
from shards.tables import few
from shards.tar import KINDS, index_text, layout
from shards.workers import Crew

_AS_IT_IS = Encode(resize="none")


class Look(NamedTuple):
    """What a worker found in one tar."""

    problems: list[str]
    contents: list[str]
    """Hex sha256 of each image's bytes."""


class Rows(NamedTuple):
    """What `samples.parquet` says of one tar's n images."""

    keys: list[str]
    labels: list[int]
    groups: list[str]
    lesions: list[str | None]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    crc32: list[int]
    widths: list[int]
    heights: list[int]


def verify(folder: Path | str, *, quick: bool = False, workers: int = 0, progress: bool = True) -> list[str]:
    """Check every sum, member, index line and label, that nothing crosses splits, and decode every image.

    Args:
        folder: the shard set.
        quick: leave out decoding.
        workers: processes; 0 is one a core.
        progress: show a progress bar.

    Returns:
        Lines to print: images, groups and classes per split, and what was checked.

    Raises:
        UserError: naming the first things found wrong, and how many there are.
    """
    contents: list[str] = []
    with Crew(workers) as crew:
        crew.start(look.__module__)
        shards = ShardSet.open(folder)
        problems = [*_folder_problems(shards), *_split_problems(shards)]
        tasks = (
            (path, str(shards.manifest["files"][path.name]["sha256"]), _rows(shards, tar), quick)
            for tar, path in enumerate(shards.paths)
        )
        with tqdm(total=len(shards), desc="verify", unit="image", disable=not progress) as bar:
            for seen in crew.in_order(look, tasks):
                problems += seen.problems
                contents += seen.contents
                bar.update(len(seen.contents))
    if len(contents) == len(shards):
        parts = shards.samples["split"].to_pylist()
        crossed = crossing(np.array(contents, dtype=object), np.array(parts))
        keys = {content: shards.keys[n] for n, content in enumerate(contents)}
        problems += [f"copies of {keys[content]}.jpg are in more than one split" for content in crossed]
    if problems:
        raise UserError(
            f"{folder}: {len(problems)} problems: {few(problems)}; copy it again or run `moleprint pack` anew"
        )
    decoded = "images were not decoded" if quick else "every image decodes"
    return [
        *shards.summary(),
        "verified: no group, lesion or exact copy is in two splits; all sums, members and indices match; "
        + decoded,
    ]


def look(path: Path, expected: str, rows: Rows, quick: bool) -> Look:
    """Check one tar, its index and its images against what is said of them."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return Look([f"{path.name} cannot be read ({error.strerror})"], [])
    problems = []
    if hashlib.sha256(data).hexdigest() != expected:
        problems.append(f"{path.name} does not match its sum in {MANIFEST}")
    names = [f"{key}.{kind}" for key in rows.keys for kind in KINDS]
    found = layout(data, names)
    if found is None:
        return Look([*problems, f"{path.name} does not hold the members that samples.parquet lists"], [])
    index = path.with_suffix(".idx")
    if index.read_bytes() != index_text([found[n : n + 3] for n in range(0, len(found), 3)]).encode():
        problems.append(f"{index.name} is not the index of {path.name}")
    whole, contents = memoryview(data), []
    for row in range(len(rows.keys)):
        image, *others = found[3 * row : 3 * row + 3]
        jpeg, label, info = (whole[m.offset : m.offset + m.size] for m in (image, *others))
        contents.append(hashlib.sha256(jpeg).hexdigest())
        reason = _elsewhere(rows, row, image.offset, image.size)
        reason = reason or _mislabelled(rows, row, jpeg, bytes(label), bytes(info))
        reason = reason or (None if quick else _undecodable(rows, row, bytes(jpeg)))
        if reason:
            problems.append(f"{image.name} in {path.name} {reason}")
    return Look(problems, contents)


def _elsewhere(rows: Rows, row: int, offset: int, size: int) -> str | None:
    if (offset, size) != (rows.offsets[row], rows.sizes[row]):
        return "lies elsewhere than samples.parquet says"
    return None


def _mislabelled(rows: Rows, row: int, jpeg: memoryview, label: bytes, info: bytes) -> str | None:
    if zlib.crc32(jpeg) != rows.crc32[row]:
        return "does not match its checksum"
    said: dict[str, Any] = {
        "key": rows.keys[row],
        "label": rows.labels[row],
        "group": rows.groups[row],
        "lesion": rows.lesions[row],
    }
    try:
        told = json.loads(info)
        if int(label) != said["label"] or {name: told.get(name) for name in said} != said:
            return "has another label or group than samples.parquet says"
    except (ValueError, AttributeError):
        return "has no readable label"
    return None


def _undecodable(rows: Rows, row: int, jpeg: bytes) -> str | None:
    """Packing's own check: bytes that it would pass through untouched are sound."""
    try:
        encoded = encode(jpeg, _AS_IT_IS)
    except UserError as error:
        return f"cannot be decoded ({error})"
    if encoded.jpeg is not jpeg or (encoded.width, encoded.height) != (rows.widths[row], rows.heights[row]):
        return "is not the upright RGB JPEG of the size that samples.parquet says"
    return None


def _rows(shards: ShardSet, tar: int) -> Rows:
    rows = np.flatnonzero(shards.shard == tar)
    return Rows(
        keys=shards.keys[rows].tolist(),
        labels=shards.labels[rows].tolist(),
        groups=[shards.group_names[code] for code in shards.groups[rows]],
        lesions=shards.samples["lesion"].take(rows).to_pylist(),
        offsets=shards.offsets[rows],
        sizes=shards.sizes[rows],
        crc32=shards.crc32[rows].tolist(),
        widths=shards.widths[rows].tolist(),
        heights=shards.heights[rows].tolist(),
    )


def _folder_problems(shards: ShardSet) -> Iterator[str]:
    """Files whose sum is wrong, and shards that nothing knows of: a reader given `*.tar` would read them."""
    files = shards.manifest["files"]
    for name, about in files.items():
        # The workers sum the tars, which they read anyway.
        if not name.endswith(".tar") and sha256(shards.folder / name) != about["sha256"]:
            yield f"{name} does not match its sum in {MANIFEST}"
    for stray in sorted([*shards.folder.glob("*.tar"), *shards.folder.glob("*.idx")]):
        if stray.name not in files:
            yield f"{stray.name} is not part of the set"


def _split_problems(shards: ShardSet) -> Iterator[str]:
    """Groups or lesions in two splits, classes missing from one, counts that differ from the manifest's."""
    samples = shards.samples
    parts = samples["split"].to_numpy()
    if parts.tolist() != [name.rpartition("-")[0] for name in samples["shard"].to_pylist()]:
        yield "samples.parquet names another split than the shard that a sample lies in"
    for column in ("group", "lesion"):
        for name in crossing(samples[column].to_numpy(), parts):
            yield f"{column} {name} is in more than one split"
    for name in shards.parts:
        rows = np.flatnonzero(parts == name)
        counts = np.bincount(shards.labels[rows], minlength=len(shards.classes)).tolist()
        classes = dict(zip(shards.classes, counts, strict=True))
        found = {"images": len(rows), "groups": len(np.unique(shards.groups[rows])), "classes": classes}
        yield from (f"split {name} has no {label}" for label, count in classes.items() if not count)
        if found != shards.manifest["splits"][name]:
            yield f"split {name} holds {found}, {MANIFEST} says {shards.manifest['splits'][name]}"
    if not np.array_equal(samples["index"].to_numpy(), np.arange(len(shards))):
        yield "samples.parquet is out of order"
    if len(set(shards.keys)) != len(shards):
        yield "samples.parquet holds a key twice"
