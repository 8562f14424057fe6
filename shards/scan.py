"""The first pass: every image is read, checked and, where it does not fit as it is, encoded again.

Images are taken in chunks of the table. A chunk leaves `chunk-NNNNNN.bin`, the JPEGs that had to be encoded
again, and, written last, `chunk-NNNNNN.json`, what was found of each image. A later run that finds a chunk
made from the same files and settings takes it as it is. Light to import: worker processes start with it.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from configs.errors import UserError
from configs.packing import Encode
from shards.encode import Encoded, encode
from shards.files import atomic, write_text
from shards.images import Ref, read
from shards.near import perceptual_hash

VERSION = 2
"""Of what this pass finds and makes: a change of it makes every chunk anew."""
CHUNK = 256
"""Images in a chunk: some seconds of work for large photographs."""


class Fact(NamedTuple):
    """What was found of one image."""

    reason: str
    """Why it cannot be used; empty if it can, and then the rest means something."""
    encoded: bool = False
    """Whether it was encoded again, so that its JPEG is `size` bytes at `offset` of the chunk's .bin."""
    offset: int = 0
    size: int = 0
    crc32: int = 0
    width: int = 0
    height: int = 0
    original_width: int = 0
    """Of the image that was given, upright, pixels."""
    original_height: int = 0
    sha256: str = ""
    """Of the JPEG, in hex."""
    hash: str = ""
    """Perceptual hash in hex; empty where none was asked for or the image has no features."""


@dataclass(frozen=True)
class Chunk:
    """What was found of a chunk's images."""

    number: int
    digest: str
    """Of all that decides the chunk: files, settings, version."""
    facts: list[Fact]

    @property
    def bytes(self) -> int:
        """Bytes of its JPEGs."""
        return sum(fact.size for fact in self.facts)


def chunk_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """The .bin and .json of a chunk."""
    name = folder / f"chunk-{number:06d}"
    return name.with_suffix(".bin"), name.with_suffix(".json")


def digest(refs: Sequence[Ref], settings: Encode, hashed: bool) -> str:
    """Of all that decides a chunk."""
    said = json.dumps([VERSION, settings.model_dump(mode="json"), hashed, refs])
    return hashlib.sha256(said.encode()).hexdigest()


def found(folder: Path, number: int, expected: str) -> Chunk | None:
    """A chunk that an earlier run left, if it is the one expected and whole: nothing forced it to disk."""
    data, listing = chunk_paths(folder, number)
    try:
        said = json.loads(listing.read_text(encoding="utf-8"))
        if said["digest"] != expected:
            return None
        facts = [Fact(*fact) for fact in said["facts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    encoded = [fact for fact in facts if fact.encoded]
    held = data.read_bytes() if encoded and data.is_file() else b""
    if any(zlib.crc32(held[fact.offset : fact.offset + fact.size]) != fact.crc32 for fact in encoded):
        return None
    return Chunk(number, expected, facts)


def scan(
    folder: Path, number: int, expected: str, refs: Sequence[Ref], settings: Encode, hashed: bool
) -> Chunk:
    """Read, check and encode the images of a chunk.

    Args:
        hashed: compute perceptual hashes.

    Raises:
        UserError: if the chunk cannot be written. A bad image is no error: its fact says why it is bad.
    """
    data, listing = chunk_paths(folder, number)
    # Not forced to disk, which would cost a tenth of the time: `found` looks before it believes.
    with atomic(data, flush=False) as file:
        facts = [_fact(ref, settings, hashed, file) for ref in refs]
    if not any(fact.encoded for fact in facts):
        data.unlink()
    write_text(listing, json.dumps({"digest": expected, "facts": facts}), flush=False)
    return Chunk(number, expected, facts)


def _fact(ref: Ref, settings: Encode, hashed: bool, file: IO[bytes]) -> Fact:
    try:
        source = read(ref)
        encoded = encode(source, settings, name=ref.name, grey=hashed)
    except UserError as error:
        return Fact(reason=str(error))
    offset = 0
    if encoded.jpeg is not source:
        offset = file.tell()
        file.write(encoded.jpeg)
    return Fact(
        reason="",
        encoded=encoded.jpeg is not source,
        offset=offset,
        size=len(encoded.jpeg),
        crc32=zlib.crc32(encoded.jpeg),
        width=encoded.width,
        height=encoded.height,
        original_width=encoded.original[0],
        original_height=encoded.original[1],
        sha256=hashlib.sha256(encoded.jpeg).hexdigest(),
        hash=_hash(encoded),
    )


def _hash(encoded: Encoded) -> str:
    return "" if encoded.grey is None else perceptual_hash(encoded.grey).hex()


def payload(data: str, fact: Fact, ref: Ref) -> Ref:
    """Where a scanned image's JPEG lies now, `data` being the .bin of its chunk."""
    return Ref(data, ref.name, "", fact.offset, fact.size) if fact.encoded else ref
