"""Samples -> one uncompressed tar and its DALI index. Light to import: worker processes start with this."""

import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from configs.errors import UserError
from shards.encode import encode
from shards.files import atomic, sha256, write_text

BLOCK = 512
_MTIME = 1_577_836_800  # 2020-01-01: fixed, so that bytes repeat; not 0, which tar(1) warns of


@dataclass(frozen=True)
class Sample:
    """An image to pack, with what its members say of it."""

    key: str
    path: Path
    label: int
    info: Mapping[str, Any]
    """Content of `KEY.json`."""


class Row(NamedTuple):
    """What `samples.parquet` holds of a packed image."""

    offset: int
    """First byte of the JPEG in the tar."""
    size: int
    """Bytes of the JPEG."""
    crc32: int
    width: int
    height: int


class Member(NamedTuple):
    """One file in a tar."""

    name: str
    """`KEY.EXTENSION`; keys hold no dot."""
    offset: int
    """First byte of the payload, a multiple of 512."""
    size: int
    """Bytes of the payload."""


@dataclass(frozen=True)
class Shard:
    """What writing a shard leaves behind."""

    rows: list[Row]
    """One an image, in order."""
    files: dict[str, dict[str, int | str]]
    """File name -> size and sha256, of the tar and its index."""
    rejected: list[str]
    """Images that cannot be used and why; with any, nothing was kept."""


def write_shard(folder: Path, name: str, samples: Sequence[Sample], short_side: int, quality: int) -> Shard:
    """Encode `samples` into `NAME.tar` and `NAME.idx`; look at all of them even if some cannot be used."""
    rows: list[Row] = []
    rejected: list[str] = []
    index: list[list[Member]] = []
    tar, idx = folder / f"{name}.tar", folder / f"{name}.idx"
    with atomic(tar) as file:
        for sample in samples:
            try:
                encoded = encode(sample.path.read_bytes(), short_side=short_side, quality=quality)
            except (UserError, OSError) as error:
                rejected.append(f"{sample.key} ({sample.path}: {error})")
                continue
            info = json.dumps(sample.info, ensure_ascii=False, allow_nan=False).encode()
            members = [
                append(file, f"{sample.key}.jpg", encoded.jpeg),
                append(file, f"{sample.key}.cls", str(sample.label).encode()),
                append(file, f"{sample.key}.json", info),
            ]
            index.append(members)
            _, offset, size = members[0]
            rows.append(Row(offset, size, zlib.crc32(encoded.jpeg), encoded.width, encoded.height))
        file.write(bytes(2 * BLOCK))
    write_text(idx, index_text(index))
    files: dict[str, dict[str, int | str]] = {
        path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in (tar, idx)
    }
    return Shard(rows, files, rejected)


def append(file: IO[bytes], name: str, payload: bytes) -> Member:
    """Write one USTAR member at the end of `file`."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(payload), _MTIME
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(payload + bytes(-len(payload) % BLOCK))
    return Member(name, offset, len(payload))


def members(path: Path) -> list[Member]:
    """All members of a tar, in order, as the standard library reads them.

    Raises:
        tarfile.TarError: if the tar is damaged.
    """
    with tarfile.open(path, "r:") as tar:
        return [Member(info.name, info.offset_data, info.size) for info in tar]


def index_text(samples: Iterable[Sequence[Member]]) -> str:
    """DALI's index, version 1.2: the number of samples, then `extension offset size name` of each member."""
    lines = [
        " ".join(f"{m.name.partition('.')[2]} {m.offset} {m.size} {m.name}" for m in sample)
        for sample in samples
    ]
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"
