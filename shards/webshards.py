"""Existing WebDataset shards as a source, local or at URLs, read through the `webdataset` package."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from configs.errors import UserError
from shards.files import atomic, write_text
from shards.images import SUFFIXES, Ref, stamp

STAGED = 1
"""Version of what `staged` leaves in its folder."""


def expand(images: str) -> list[str]:
    """The shards' paths or URLs: `{000..009}` ranges and `::` spelt out, as webdataset does."""
    from webdataset.shardlists import expand_urls

    return [str(url) for url in expand_urls(images)]


def table(images: str) -> pa.Table:
    """What the shards say of their samples: columns `key`, `cls` and the fields of `.json`, all as text."""
    rows = [
        {"key": Path(sample["__key__"]).name} | _described(sample)
        for url in tqdm(expand(images), desc="read labels", unit="shard")
        for sample in _samples(url)
    ]
    if not rows:
        raise UserError(f"{images}: no samples in these shards; correct pack.images, or give a pack.table")
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names})


def staged(url: str, folder: Path) -> Iterator[tuple[str, Ref]]:
    """(stem, bytes) of every image of a shard, which is streamed once and its images kept in `folder`."""
    name = f"stage-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    data, listing = folder / f"{name}.bin", folder / f"{name}.json"
    if not _is_staged(data, listing):
        entries = []
        with atomic(data) as file:
            for sample in tqdm(_samples(url), desc=f"fetch {Path(url).name}", unit="image", leave=False):
                for ending, payload in _images(sample):
                    stem = Path(sample["__key__"]).name
                    entries.append((stem, f"{sample['__key__']}.{ending}", file.tell(), len(payload)))
                    file.write(payload)
        write_text(listing, json.dumps({"version": STAGED, "url": url, "images": entries}))
    mark = stamp(data.stat())
    for stem, member, offset, size in json.loads(listing.read_text())["images"]:
        yield stem, Ref(str(data), f"{url} {member}", mark, offset, size)


def _is_staged(data: Path, listing: Path) -> bool:
    try:
        said = json.loads(listing.read_text(encoding="utf-8"))
        needs = sum(size for *_, size in said["images"])
        return bool(said["version"] == STAGED and data.stat().st_size == needs)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _samples(url: str) -> Iterator[dict[str, Any]]:
    import webdataset

    try:
        yield from webdataset.WebDataset([url], shardshuffle=False, empty_check=False)
    except Exception as error:  # whatever a URL's own reader raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{url}: cannot be read as a WebDataset shard ({reason}); check the address in pack.images"
        ) from None


def _images(sample: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    for ending, payload in sample.items():
        if f".{ending.rpartition('.')[2].lower()}" in SUFFIXES:
            yield ending, payload


def _described(sample: dict[str, Any]) -> dict[str, str]:
    """Label and metadata of a sample as text; values that are lists or mappings are left out."""
    said: dict[str, Any] = {}
    if "json" in sample:
        try:
            fields = json.loads(sample["json"])
        except ValueError as error:
            raise UserError(f"{sample['__url__']}: {sample['__key__']}.json is not JSON ({error})") from None
        if isinstance(fields, dict):
            said |= (
                {**fields.pop("metadata", {}), **fields}
                if isinstance(fields.get("metadata"), dict)
                else fields
            )
    if "cls" in sample:
        said["cls"] = sample["cls"].decode("utf-8", "replace")
    said.pop("key", None)
    return {name: str(v) for name, v in said.items() if v is not None and not isinstance(v, (list, dict))}
