"""Samples -> one uncompressed tar and its DALI index. Light to import: worker processes start with this."""

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from configs.errors import UserError
from shards.files import atomic, sha256, write_text
from shards.images import BLOCK, Ref, read

KINDS = ("jpg", "cls", "json")
"""Endings of a sample's members, in their order."""
_MTIME = 1_577_836_800  # 2020-01-01: fixed, so that bytes repeat; not 0, which tar(1) warns of


class Sample(NamedTuple):
    """An image to pack, with what its members say of it."""

    key: str
    ref: Ref
    """Where its JPEG lies."""
    crc32: int
    """Of its JPEG when it was looked at."""
    listing: str
    """File of what was found then; deleted if it is no longer true, so that the next run looks again."""
    label: int
    info: bytes
    """Content of `KEY.json`."""


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

    offsets: list[int]
    """First byte of each image's JPEG in the tar."""
    files: dict[str, dict[str, int | str]]
    """File name -> size and sha256, of the tar and its index."""


def finish_shard(
    growing: Path, work: Path, name: str, samples: Sequence[Sample], expected: str, url: str
) -> Shard:
    """Write a shard, send it to its URL if it has one, and note in the work folder that it is finished.

    Args:
        expected: sum of all that decides the shard, by which a later run knows it again.
    """
    shard = write_shard(growing, name, samples)
    if url:
        from shards.output import put

        put(growing, url, list(shard.files))
    done = {"digest": expected, "offsets": shard.offsets, "files": shard.files}
    write_text(work / f"{name}.json", json.dumps(done))
    return shard


def write_shard(folder: Path, name: str, samples: Sequence[Sample]) -> Shard:
    """Write `samples` into `NAME.tar` and `NAME.idx`.

    Raises:
        UserError: if an image is not what it was when it was looked at, or the files cannot be written.
    """
    index: list[list[Member]] = []
    tar, idx = folder / f"{name}.tar", folder / f"{name}.idx"
    with atomic(tar) as file:
        summed = _Summed(file)
        for sample in samples:
            index.append(_write_sample(summed, sample))
        summed.write(bytes(2 * BLOCK))
    write_text(idx, index_text(index))
    files: dict[str, dict[str, int | str]] = {
        tar.name: {"size": summed.size, "sha256": summed.sum.hexdigest()},
        idx.name: {"size": idx.stat().st_size, "sha256": sha256(idx)},
    }
    return Shard([members[0].offset for members in index], files)


class _Summed:
    """A file being written, and the sum of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.size, self.sum = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.sum.update(data)
        self.size += len(data)


def _write_sample(file: _Summed, sample: Sample) -> list[Member]:
    try:
        jpeg = read(sample.ref)
    except UserError as error:
        Path(sample.listing).unlink(missing_ok=True)
        raise UserError(f"{sample.ref.name}: {error}; run the same command again") from None
    if zlib.crc32(jpeg) != sample.crc32:
        Path(sample.listing).unlink(missing_ok=True)
        raise UserError(f"{sample.ref.name}: changed while it was being packed; run the same command again")
    payloads = (jpeg, str(sample.label).encode(), sample.info)
    members, blocks, start = [], [], file.size
    for kind, payload in zip(KINDS, payloads, strict=True):
        name, size = f"{sample.key}.{kind}", len(payload)
        members.append(Member(name, start + BLOCK, size))
        blocks += [ustar_header(name, size), payload, bytes(-size % BLOCK)]
        start += BLOCK + size + -size % BLOCK
    file.write(b"".join(blocks))
    return members


def _template() -> bytes:
    info = tarfile.TarInfo()
    info.mtime = _MTIME
    return info.tobuf(tarfile.USTAR_FORMAT)


_BLANK = _template()
_BLANK_SUM = sum(_BLANK[:124] + _BLANK[136:148] + b" " * 8 + _BLANK[156:])


def ustar_header(name: str, size: int) -> bytes:
    """The block before a member: the standard library's, byte for byte, at a tenth of its time.

    Args:
        name: ASCII, at most 100 characters.
        size: bytes of the payload, below 8 GiB.
    """
    named, sized = name.encode("ascii"), b"%011o\0" % size
    assert len(named) <= 100 and len(sized) == 12, name
    checksum = b"%06o\0 " % (_BLANK_SUM + sum(named) + sum(sized))
    return b"".join(
        (named, bytes(100 - len(named)), _BLANK[100:124], sized, _BLANK[136:148], checksum, _BLANK[156:])
    )


def layout(data: bytes, names: Sequence[str]) -> list[Member] | None:
    """The members of a tar that holds just `names`, in that order, each after `ustar_header`'s block.

    Args:
        data: all bytes of the tar.

    Returns:
        None if it holds anything else: other names, headers or order, a gap, or no proper end.
    """
    found, start = [], 0
    for name in names:
        header = data[start : start + BLOCK]
        digits = header[124:135]
        if len(header) < BLOCK or not digits.isdigit():
            return None
        size = int(digits, 8) if not set(digits) & set(b"89") else -1
        if size < 0 or header != ustar_header(name, size):
            return None
        found.append(Member(name, start + BLOCK, size))
        start += BLOCK + size + -size % BLOCK
    return found if data[start:] == bytes(2 * BLOCK) else None


def index_text(samples: Iterable[Sequence[Member]]) -> str:
    """DALI's index, version 1.2: the number of samples, then `extension offset size name` of each member."""
    lines = [
        " ".join(f"{m.name.partition('.')[2]} {m.offset} {m.size} {m.name}" for m in sample)
        for sample in samples
    ]
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"
