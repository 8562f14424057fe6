"""Existing WebDataset shards as a source, local or at URLs, read through the `webdataset` package.

A shard that must be streamed, or read through for its labels, is so once, whoever of several packers does it:
the work folder gets `fetch-….json`, which lists its images and what it says of each, and `fetch-….bin`, the
images' bytes, unless the shard is a local tar, which they are read from.
"""

import hashlib
import json
import math
import re
import urllib.request
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from configs.errors import UserError
from configs.packing import Source
from shards.files import atomic, write_text
from shards.images import BLOCK, SUFFIXES, Ref, entries, is_local_tar, is_web, stamp

_VERSION = 2  # of what `fetch` leaves behind
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ")  # gzip, bzip2, xz
_PATIENCE = 30.0  # seconds that a server has to say what a file is


class Fetched(NamedTuple):
    """What was found in a shard."""

    identity: str
    """What the shard was when it was fetched, as `identity` tells."""
    images: list[tuple[str, str, int, int]]
    """Stem, name in the shard, offset and size in the .bin; empty for a local tar."""
    samples: list[dict[str, str]]
    """`key`, and the texts of `.cls` and `.json` where there are any."""


def expand(images: str) -> list[str]:
    """The shards' paths or URLs: `{000..009}` ranges and `::` spelt out, as webdataset does."""
    from webdataset.shardlists import expand_urls

    return [str(url) for url in expand_urls(images)]


def to_fetch(source: Source) -> list[str]:
    """The shards of a source that must be fetched: those that are no local tars, or all for their labels."""
    if not is_web(source.images) and source.table:
        return []
    return [url for url in expand(source.images) if source.table is None or not is_local_tar(url)]


def table(images: str, folder: Path) -> pa.Table:
    """What fetched shards say of their samples: columns `key`, `cls` and the fields of `.json`, as text."""
    rows = []
    for url in expand(images):
        found = fetched(url, folder)
        assert found is not None, url
        rows += [{"key": sample["key"]} | _described(url, sample) for sample in found.samples]
    if not rows:
        raise UserError(f"{images}: no samples in these shards; correct pack.images, or give a pack.table")
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names})


def staged(url: str, folder: Path) -> Iterator[tuple[str, Ref]]:
    """(stem, bytes) of every image of a shard, fetched into `folder` unless it has been already."""
    images = (fetched(url, folder) or fetch(url, folder)).images
    data = paths(url, folder)[0]
    mark = stamp(data.stat())
    for stem, member, offset, size in images:
        yield stem, Ref(str(data), f"{url} {member}", mark, offset, size)


def streamed(url: str) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """(name, bytes, what the shard says of it) of every image as it comes in; nothing is kept."""
    for sample in _samples(url):
        for ending, payload in _images(sample):
            yield f"{sample['__key__']}.{ending}", payload, _described(url, _told(sample))


def fetch(url: str, folder: Path) -> Fetched:
    """Stream a shard once, and keep in `folder` what packing needs of it.

    Raises:
        UserError: if it cannot be read, or changed meanwhile.
    """
    data, listing = paths(url, folder)
    before, keep = identity(url), not is_local_tar(url)
    if not keep:
        deque(entries(url, folder), maxlen=0)  # raises where the tar is damaged
    found = Fetched(before, [], [])
    with atomic(data) as file:
        for sample in _samples(url):
            key = sample["__key__"]
            found.samples.append(_told(sample))
            for ending, payload in _images(sample) if keep else ():
                found.images.append((Path(key).name, f"{key}.{ending}", file.tell(), len(payload)))
                file.write(payload)
    if identity(url) != before:
        raise UserError(f"{url}: changed while it was being fetched; run the same command again")
    write_text(listing, json.dumps({"version": _VERSION, "url": url, **found._asdict()}))
    return found


def fetched(url: str, folder: Path) -> Fetched | None:
    """What `fetch` found earlier, if it is still there."""
    data, listing = paths(url, folder)
    try:
        said = json.loads(listing.read_text(encoding="utf-8"))
        whole = said["version"] == _VERSION and data.stat().st_size == sum(n for *_, n in said["images"])
        return Fetched(said["identity"], said["images"], said["samples"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def identity(url: str) -> str:
    """What changes when a shard does, as far as its place says: size, time of modification, entity tag.

    Empty where the place says nothing of it, or cannot be asked.
    """
    try:
        if url.startswith(("http://", "https://")):
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
                said = [answer.headers.get(name) for name in ("Content-Length", "Last-Modified", "ETag")]
        else:
            import fsspec

            fs, path = fsspec.core.url_to_fs(url)
            about = fs.info(path)
            said = [about.get("size"), about.get("ETag") or about.get("etag"), fs.modified(path)]
    except Exception:  # a command in place of a URL, a driver that is not installed, a server's refusal
        return ""
    return " ".join(str(value) for value in said if value is not None)


def paths(url: str, folder: Path) -> tuple[Path, Path]:
    """The .bin and .json of a fetched shard."""
    name = folder / f"fetch-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    return name.with_suffix(".bin"), name.with_suffix(".json")


def _samples(url: str) -> Iterator[dict[str, Any]]:
    from webdataset.gopen import gopen, gopen_schemes
    from webdataset.tariterators import group_by_keys, tar_file_expander

    scheme = url.partition("://")[0]
    if "://" in url and scheme != "file":
        gopen_schemes.setdefault(scheme, _open_by_fsspec)  # such as s3, which webdataset does not know
    try:
        stream = _Stream(gopen(url))
        yield from group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))
        cut = stream.cut()
    except Exception as error:  # whatever a URL's own reader raises
        raise UserError(
            f"{url}: cannot be read as a WebDataset shard ({_reason(error)}); check the address, "
            "which must be that of a tar"
        ) from None
    if cut:
        raise UserError(f"{url}: breaks off: a tar without its end; copy it again")


def _reason(error: Exception) -> str:
    """What went wrong, without the objects and the command that the package adds."""
    said = getattr(error, "strerror", None) or next((a for a in error.args if isinstance(a, str)), "")
    if status := re.search(r"exit (\d+) \(read\)", said):
        return f"its download ended with status {status[1]}"
    return " ".join(said.split()) or type(error).__name__


class _Stream:
    """A shard as it comes in, and its first and last bytes: only they tell whether it came whole."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._first, self._last = stream, b"", b""

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`."""
        data: bytes = self._stream.read(size)
        self._first = self._first or data[:6]
        self._last = (self._last + data)[-BLOCK:]
        return data

    def cut(self) -> bool:
        """Whether it ends other than with a tar's block of zeros; of a compressed one its reader says so."""
        while self.read(1 << 16):
            pass
        return not self._first.startswith(_COMPRESSED) and self._last != bytes(BLOCK)


def _open_by_fsspec(url: str, mode: str, *_: Any, **__: Any) -> Any:
    import fsspec

    return fsspec.open(url, mode).open()


def _images(sample: dict[str, Any]) -> list[tuple[str, bytes]]:
    """Ending and bytes of a sample's image: `jpg` goes before such as `mask.png`, which says more."""
    images = [item for item in sample.items() if f".{item[0].rpartition('.')[2].lower()}" in SUFFIXES]
    return [item for item in images if "." not in item[0]] or images


def _told(sample: dict[str, Any]) -> dict[str, str]:
    """A sample's key, and the text of its label and metadata."""
    kinds = [kind for kind in ("cls", "json") if kind in sample]
    return {"key": Path(sample["__key__"]).name} | {
        kind: sample[kind].decode("utf-8", "replace") for kind in kinds
    }


def _described(url: str, sample: dict[str, str]) -> dict[str, str]:
    """Label and metadata of a sample as text; blanks, lists and mappings are left out."""
    said: dict[str, Any] = {}
    if "json" in sample:
        try:
            fields = json.loads(sample["json"])
        except ValueError as error:
            raise UserError(f"{url}: {sample['key']}.json is not JSON ({error})") from None
        if isinstance(fields, dict):
            said |= (
                {**fields.pop("metadata", {}), **fields}
                if isinstance(fields.get("metadata"), dict)
                else fields
            )
    if "cls" in sample:
        said["cls"] = sample["cls"]
    said.pop("key", None)
    return {name: str(value) for name, value in said.items() if _told_of(value)}


def _told_of(value: object) -> bool:
    """Whether a field says something: pandas writes its blanks as NaN."""
    blank = value is None or (isinstance(value, float) and math.isnan(value))
    return not blank and not isinstance(value, (list, dict))
