"""Proof, from the shards alone, that a shard set is whole, readable and free of leaks."""

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from PIL import Image
from tqdm import tqdm

from configs.errors import UserError
from shards.files import sha256
from shards.records import few
from shards.shardset import MANIFEST, SPLITS, ShardSet
from shards.tar import Member, index_text, members


def verify(folder: Path, *, quick: bool = False, progress: bool = True) -> list[str]:
    """Check every sum, member, index line and label, and, unless `quick`, decode every image.

    Args:
        folder: the shard set.
        quick: leave out decoding.
        progress: show a progress bar.

    Returns:
        Lines to print: images, groups and classes per split, and what was checked.

    Raises:
        UserError: naming the first things found wrong, and how many there are.
    """
    shards = ShardSet.open(folder)
    problems = [*_folder_problems(shards), *_split_problems(shards)]
    bar = tqdm(total=len(shards), desc="verify", unit="image", disable=not progress)
    # Threads: checksums and decoding, where the time goes, release the interpreter's lock.
    with bar, ThreadPoolExecutor() as pool:
        tars = range(len(shards.paths))
        for tar, found in enumerate(pool.map(lambda tar: list(_tar_problems(shards, tar, quick)), tars)):
            problems += found
            bar.update(int(np.count_nonzero(shards.shard == tar)))
    if problems:
        raise UserError(
            f"{folder}: {len(problems)} problems: {few(problems)}; copy it again or run `moleprint pack` anew"
        )
    decoded = "images were not decoded" if quick else "every image decodes"
    return [*shards.summary(), f"verified: no group is in two splits; all sums and indices match; {decoded}"]


def _folder_problems(shards: ShardSet) -> Iterator[str]:
    """Files whose sum is wrong, and shards that nothing knows of: a reader given `*.tar` would read them."""
    files = shards.manifest["files"]
    for name, about in files.items():
        if sha256(shards.folder / name) != about["sha256"]:
            yield f"{name} does not match its sum in {MANIFEST}"
    for stray in sorted(shards.folder.glob("*.tar")):
        if stray.name not in files:
            yield f"{stray.name} is not part of the set"


def _split_problems(shards: ShardSet) -> Iterator[str]:
    """Groups in two splits, classes missing from one, counts that differ from the manifest's."""
    samples = shards.samples
    spread = samples.group_by("group").aggregate([("split", "count_distinct")])
    for group in spread.filter(pc.field("split_count_distinct") > 1)["group"].to_pylist():
        yield f"group {group} is in more than one split"
    for name in SPLITS:
        rows = shards.split(name)
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


def _tar_problems(shards: ShardSet, tar: int, quick: bool) -> Iterator[str]:
    """Where a tar, its index and its samples' rows disagree."""
    path = shards.paths[tar]
    rows = np.flatnonzero(shards.shard == tar)
    try:
        found = members(path)
    except (tarfile.TarError, OSError) as error:
        yield f"{path.name} cannot be read ({error})"
        return
    keys = shards.keys[rows]
    if [member.name for member in found] != [
        f"{key}.{kind}" for key in keys for kind in ("jpg", "cls", "json")
    ]:
        yield f"{path.name} does not hold the members that samples.parquet lists"
        return
    triples = list(zip(found[::3], found[1::3], found[2::3], strict=True))
    index = path.with_suffix(".idx")
    if index.read_text(encoding="utf-8", errors="replace") != index_text(triples):
        yield f"{index.name} is not the index of {path.name}"
    with path.open("rb") as file:
        for row, triple in zip(rows.tolist(), triples, strict=True):
            payloads = []
            for member in triple:
                file.seek(member.offset)
                payloads.append(file.read(member.size))
            reason = _sample_problem(shards, row, triple[0], payloads, quick)
            if reason:
                yield f"{triple[0].name} in {path.name} {reason}"


def _sample_problem(
    shards: ShardSet, row: int, image: Member, payloads: list[bytes], quick: bool
) -> str | None:
    """What is wrong with a sample, or None. `payloads`: the bytes of its .jpg, .cls and .json."""
    jpeg, label, info = payloads
    if (image.offset, image.size) != (shards.offsets[row], shards.sizes[row]):
        return "lies elsewhere than samples.parquet says"
    if zlib.crc32(jpeg) != shards.crc32[row]:
        return "does not match its checksum"
    said = {
        "key": shards.keys[row],
        "label": int(shards.labels[row]),
        "group": shards.group_names[shards.groups[row]],
    }
    try:
        told = json.loads(info)
        if int(label) != said["label"] or {name: told.get(name) for name in said} != said:
            return "has another label or group than samples.parquet says"
    except (ValueError, AttributeError):
        return "has no readable label"
    if quick:
        return None
    try:
        with Image.open(io.BytesIO(jpeg)) as decoded:
            decoded.load()
    except Exception as error:  # damaged bytes make Pillow's decoders raise almost anything
        return f"cannot be decoded ({' '.join(str(error).split())})"
    if (decoded.format, decoded.mode, decoded.size) != (
        "JPEG",
        "RGB",
        (shards.widths[row], shards.heights[row]),
    ):
        return "is not the upright RGB JPEG of the size that samples.parquet says"
    return None
