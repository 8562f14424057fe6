"""What packing does image by image and shard by shard: jobs that several packers and their workers share."""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from configs.packing import Pack
from shards import webshards
from shards.claims import Job, Part, complete
from shards.images import Ref
from shards.near import find_pairs, found_pairs
from shards.output import Output
from shards.plan import Plan
from shards.scan import CHUNK, Chunk, Fact, chunk_paths, digest, found, payload, scan
from shards.tar import Sample, Shard, finish_shard
from shards.webshards import Fetched
from shards.workers import Crew

Ints = NDArray[np.int64]
Result = TypeVar("Result")
_VERSION = 1  # of how shards are written: a change of it writes all anew
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class Passes:
    """The passes of one packer."""

    settings: Pack
    output: Output
    part: Part
    crew: Crew
    progress: bool

    def start(self) -> None:
        """Let the workers start while the tables are read."""
        self.crew.start(scan.__module__, finish_shard.__module__)

    def fetch(self) -> dict[str, str]:
        """Bring what must be streamed into the work folder: URL -> what it was then."""
        sources = self.settings.each_source.values()
        urls = list(dict.fromkeys(url for source in sources for url in webshards.to_fetch(source)))

        def job(url: str) -> Job[Fetched]:
            name = webshards.paths(url, self.output.work)[1].stem
            return Job(name, lambda: (url, self.output.work), lambda: self._still(url))

        with tqdm(desc="fetch", total=len(urls), unit="shard", disable=not (urls and self._shown)) as bar:
            found = self._complete([job(url) for url in urls], webshards.fetch, lambda _: bar.update())
        return {url: about.identity for url, about in zip(urls, found, strict=True)}

    def look(self, refs: Sequence[Ref]) -> list[Chunk]:
        """The first pass over all images."""
        work, encode = self.output.work, self.settings.encode
        hashed = self.settings.near_duplicates is not None

        def job(number: int) -> Job[Chunk]:
            mine = refs[number * CHUNK : (number + 1) * CHUNK]
            expected = digest(mine, encode, hashed)
            return Job(
                f"chunk-{number:06d}",
                lambda: (work, number, expected, mine, encode, hashed),
                lambda: found(work, number, expected),
            )

        jobs = [job(number) for number in range(-(-len(refs) // CHUNK))]
        with _Bar("check", len(refs), self._shown) as bar:
            return self._complete(jobs, scan, lambda chunk: bar.add(len(chunk.facts), chunk.bytes))

    def near(self, hashes: NDArray[np.uint64], distance: int) -> tuple[Ints, Ints]:
        """`near_pairs`, sought by one of the packers."""
        said = hashlib.sha256(hashes.tobytes() + bytes((distance,))).hexdigest()
        path = self.output.work / f"near-{said[:16]}.npy"
        job = Job(path.stem, lambda: (path, hashes, distance), lambda: found_pairs(path))
        (pairs,) = self._complete([job], find_pairs, lambda _: None)
        return pairs[:, :2], pairs[:, 2]

    def write(self, plan: Plan, refs: Sequence[Ref], facts: Sequence[Fact]) -> list[Shard]:
        """The second pass: every shard."""
        work, output = self.output.work, self.output
        classes = tuple(self.settings.classes)

        def job(name: str, images: slice) -> Job[Shard]:
            def said() -> tuple[list[Sample], str]:
                samples = _samples_of(plan, images, refs, facts, classes, work)
                return samples, _digest(name, samples, [facts[row].sha256 for row in plan.rows[images]])

            def arguments() -> tuple[Any, ...]:
                return (output.growing, work, name, *said(), output.url)

            def finished() -> Shard | None:
                try:
                    done = json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
                    shard = Shard(done["offsets"], done["files"])
                except (OSError, ValueError, KeyError):
                    return None
                return shard if done["digest"] == said()[1] and output.holds(shard.files) else None

            return Job(name, arguments, finished)

        def size(shard: Shard) -> int:
            return max(int(about["size"]) for about in shard.files.values())

        jobs = [job(name, images) for name, images in plan.shards.items()]
        with _Bar("write", len(plan.records), self._shown) as bar:
            return self._complete(jobs, finish_shard, lambda shard: bar.add(len(shard.offsets), size(shard)))

    @property
    def _shown(self) -> bool:
        """Whether this packer is the one that shows progress bars."""
        return self.progress and not self.part.rank

    def _still(self, url: str) -> Fetched | None:
        """What was fetched of a shard, unless it is another one by now."""
        found = webshards.fetched(url, self.output.work)
        if found and found.identity != webshards.identity(url):
            tqdm.write(f"{url}: changed since it was fetched; it is fetched and packed anew", file=sys.stderr)
            return None
        return found

    def _complete(
        self,
        jobs: Sequence[Job[Result]],
        function: Callable[..., Result],
        report: Callable[[Result], object],
    ) -> list[Result]:
        return complete(jobs, function, self.output.work, self.part, self.crew, report)


def _digest(name: str, samples: Sequence[Sample], contents: Sequence[str]) -> str:
    """Of all that decides a shard."""
    said = hashlib.sha256(f"{_VERSION} {name}".encode())
    for sample, content in zip(samples, contents, strict=True):
        said.update(f"\n{sample.key} {sample.label} {content} ".encode() + sample.info)
    return said.hexdigest()


def _samples_of(
    plan: Plan,
    images: slice,
    refs: Sequence[Ref],
    facts: Sequence[Fact],
    classes: Sequence[str],
    work: Path,
) -> list[Sample]:
    records, samples = plan.records, []
    chunks = sorted({int(row) // CHUNK for row in plan.rows[images]})
    paths = {chunk: tuple(map(str, chunk_paths(work, chunk))) for chunk in chunks}
    for place, metadata in enumerate(records.metadata[images].to_pylist(), start=images.start):
        row, label = int(plan.rows[place]), int(records.labels[place])
        info = {
            "key": records.keys[place],
            "label": label,
            "class": classes[label],
            "group": records.groups[place],
            **({"lesion": records.lesions[place]} if records.lesions[place] else {}),
            **({"source": records.sources[place]} if records.sources[place] else {}),
            "metadata": metadata,
        }
        data, listing = paths[row // CHUNK]
        ref, text = payload(data, facts[row], refs[row]), _JSON.encode(info)
        samples.append(Sample(records.keys[place], ref, facts[row].crc32, listing, label, text.encode()))
    return samples


class _Bar:
    """Images a second, megabytes a second, time left."""

    def __init__(self, name: str, images: int, shown: bool) -> None:
        self._bar = tqdm(total=images, desc=name, unit="image", disable=not shown)
        self._bytes, self._started = 0, time.perf_counter()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, images: int, size: int) -> None:
        self._bytes += size
        rate = self._bytes / 1e6 / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{rate:,.0f} MB/s", refresh=False)
        self._bar.update(images)
