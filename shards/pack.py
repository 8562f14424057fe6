"""Tables and images -> shard set, in two passes: look at every image, then deal them out and write shards.

Between the two, everything that decides the set is known: what each image holds, and which of them are
duplicates. Every byte is a function of the input and the settings alone. Both passes leave each finished
piece in the work folder, where the same command finds it after any interruption.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv
from tqdm import tqdm

from configs.errors import UserError
from configs.packing import Pack
from shards import leaks, webshards
from shards.claims import ALONE, POLL, Job, Part, complete, lock
from shards.describe import DUPLICATES, REJECTED, check_made_by, fingerprint, manifest, samples_table
from shards.files import atomic, sha256, write_json
from shards.images import Ref, locate
from shards.near import find_pairs, found_pairs
from shards.output import Output
from shards.plan import Plan, make_plan
from shards.records import Records, read
from shards.scan import CHUNK, Chunk, Fact, chunk_paths, digest, found, payload, scan
from shards.shardset import MANIFEST, SAMPLES
from shards.tar import Sample, Shard, finish_shard
from shards.webshards import Fetched
from shards.workers import Crew

_VERSION = 1  # of how shards are written: a change of it writes all anew
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


def pack(settings: Pack, *, part: Part = ALONE, progress: bool = True) -> dict[str, Any]:
    """Make a shard set, alone or as one of several packers.

    Args:
        settings: the `pack` section of a configuration.
        part: which one of how many packers with the same settings, on any number of hosts that share the
            output's file system. All of them return when the set is whole.
        progress: show progress bars.

    Returns:
        Content of `dataset.json`.

    Raises:
        UserError: for any mistake in the settings, the tables or the images. Finished pieces stay for the
            next try.
    """
    output = Output.of(settings)
    continued = not part.alone or output.work.exists()  # perhaps ended just before the work was deleted
    if not (continued and output.packed()):
        output.refuse_existing()
    with output.working(part, fingerprint(settings)), Crew(settings.workers) as crew:
        if output.packed():
            check_made_by(output.manifest(), settings, output.place)
            return output.manifest()
        crew.start(scan.__module__, finish_shard.__module__)
        fetched = _fetch(settings, output, part, crew, progress)
        records = read(settings, output.work)
        make_plan(settings, records)
        refs = _locate(settings, records, output.work)
        chunks = _scan(settings, refs, output, part, crew, progress)
        facts = [fact for chunk in chunks for fact in chunk.facts]
        rejected = _rejected(settings, records, refs, facts, output)
        plan = make_plan(settings, records, facts, partial(_near, output, part, crew))
        shards = _write(plan, settings, refs, facts, output, part, crew, progress)
        _once(output, lambda: _conclude(settings, records, plan, facts, shards, rejected, fetched, output))
    return output.manifest()


def _fetch(settings: Pack, output: Output, part: Part, crew: Crew, progress: bool) -> dict[str, str]:
    """Bring what must be streamed into the work folder: URL -> what it was then."""

    def still(url: str) -> Fetched | None:
        found = webshards.fetched(url, output.work)
        if found and found.identity != webshards.identity(url):
            tqdm.write(f"{url}: changed since it was fetched; it is fetched and packed anew", file=sys.stderr)
            return None
        return found

    def job(url: str) -> Job[Fetched]:
        name = webshards.paths(url, output.work)[1].stem
        return Job(name, lambda: (url, output.work), lambda: still(url))

    urls = list(
        dict.fromkeys(u for source in settings.each_source.values() for u in webshards.to_fetch(source))
    )
    shown = bool(urls) and progress and not part.rank
    with tqdm(total=len(urls), desc="fetch", unit="shard", disable=not shown) as bar:
        found = complete(
            [job(url) for url in urls],
            webshards.fetch,
            output.work,
            part,
            crew,
            lambda _: bar.update(),
        )
    return {url: about.identity for url, about in zip(urls, found, strict=True)}


def _near(output: Output, part: Part, crew: Crew, hashes: Any, distance: int) -> tuple[Any, Any]:
    """`near_pairs`, by one of the packers."""
    said = hashlib.sha256(hashes.tobytes() + bytes((distance,))).hexdigest()
    path = output.work / f"near-{said[:16]}.npy"
    job = Job(path.stem, lambda: (path, hashes, distance), lambda: found_pairs(path))
    (found,) = complete([job], find_pairs, output.work, part, crew, lambda _: None)
    return found[:, :2], found[:, 2]


def _locate(settings: Pack, records: Records, scratch: Path) -> list[Ref]:
    """Where the bytes of each image lie, (N,)."""
    refs: list[Ref] = []
    for name, source in settings.each_source.items():
        refs += locate(records.ids[records.sources == name].tolist(), source.images, scratch)
    return refs


def _scan(
    settings: Pack, refs: Sequence[Ref], output: Output, part: Part, crew: Crew, progress: bool
) -> list[Chunk]:
    """The first pass."""
    hashed = settings.near_duplicates is not None

    def job(number: int) -> Job[Chunk]:
        mine = refs[number * CHUNK : (number + 1) * CHUNK]
        expected = digest(mine, settings.encode, hashed)
        return Job(
            f"chunk-{number:06d}",
            lambda: (output.work, number, expected, mine, settings.encode, hashed),
            lambda: found(output.work, number, expected),
        )

    jobs = [job(number) for number in range(-(-len(refs) // CHUNK))]
    with _Bar("check", len(refs), progress and not part.rank) as bar:
        return complete(
            jobs,
            scan,
            output.work,
            part,
            crew,
            lambda chunk: bar.add(len(chunk.facts), chunk.bytes),
        )


def _rejected(
    settings: Pack, records: Records, refs: Sequence[Ref], facts: Sequence[Fact], output: Output
) -> pa.Table:
    """`rejected.csv`: the images that cannot be used, and why.

    Raises:
        UserError: if there are more than allowed; the table then lies beside the output.
    """
    bad = [row for row, fact in enumerate(facts) if fact.reason]
    table = pa.table(
        {
            "key": pa.array([records.keys[row] for row in bad], pa.string()),
            "file": pa.array([refs[row].name for row in bad], pa.string()),
            "reason": pa.array([facts[row].reason for row in bad], pa.string()),
        }
    )
    beside = _beside(output)
    if len(bad) > settings.max_rejected * len(facts) or len(bad) == len(facts):
        with atomic(beside) as file:
            csv.write_csv(table, file)
        told = [f"{records.keys[row]} ({refs[row].name}: {facts[row].reason})" for row in bad[:3]]
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(
            f"{len(bad)} of {len(facts)} images cannot be used: {', '.join(told)}{more}; all are listed in "
            f"{beside}; replace the files, take the rows out of the table, or raise pack.max_rejected; the "
            f"other images will not be looked at again ({output.work})"
        )
    beside.unlink(missing_ok=True)
    return table


def _beside(output: Output) -> Path:
    if output.url:
        return output.work / REJECTED
    return Path(f"{output.place}.{REJECTED}")


def _write(
    plan: Plan,
    settings: Pack,
    refs: Sequence[Ref],
    facts: Sequence[Fact],
    output: Output,
    part: Part,
    crew: Crew,
    progress: bool,
) -> list[Shard]:
    """The second pass."""
    classes = tuple(settings.classes)

    def job(name: str, images: slice) -> Job[Shard]:
        def said() -> tuple[list[Sample], str]:
            samples = _samples_of(plan, images, refs, facts, classes, output.work)
            return samples, _digest(name, samples, [facts[row].sha256 for row in plan.rows[images]])

        def arguments() -> tuple[Any, ...]:
            return (output.growing, output.work, name, *said(), output.url)

        def finished() -> Shard | None:
            try:
                done = json.loads((output.work / f"{name}.json").read_text(encoding="utf-8"))
                shard = Shard(done["offsets"], done["files"])
            except (OSError, ValueError, KeyError):
                return None
            return shard if done["digest"] == said()[1] and output.holds(shard.files) else None

        return Job(name, arguments, finished)

    jobs = [job(name, images) for name, images in plan.shards.items()]
    with _Bar("write", len(plan.records), progress and not part.rank) as bar:
        return complete(
            jobs,
            finish_shard,
            output.work,
            part,
            crew,
            lambda shard: bar.add(len(shard.offsets), max(int(f["size"]) for f in shard.files.values())),
        )


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


def _once(output: Output, conclude: Callable[[], None]) -> None:
    """Let one packer conclude the set; the others wait until it has."""
    while not output.packed():
        handle = lock(output.work / "finish.lock")
        if handle is None:
            time.sleep(POLL)
            continue
        try:
            if not output.packed():
                conclude()
        finally:
            os.close(handle)


def _conclude(
    settings: Pack,
    records: Records,
    plan: Plan,
    facts: Sequence[Fact],
    shards: Sequence[Shard],
    rejected: pa.Table,
    fetched: Mapping[str, str],
    output: Output,
) -> None:
    """Write the tables and, last, the manifest.

    Raises:
        UserError: if a shard at a URL is no longer what it was when it was fetched.
    """
    for url, identity in fetched.items():
        if webshards.identity(url) != identity:
            raise UserError(f"{url}: changed while it was being packed; run the same command again")
    samples = samples_table(settings, plan, facts, shards)
    files = {name: about for shard in shards for name, about in shard.files.items()}

    def add(name: str, write_table: Callable[[pa.Table, IO[bytes]], None], table: pa.Table) -> None:
        path = output.growing / name
        with atomic(path) as file:
            write_table(table, file)
        files[name] = {"size": path.stat().st_size, "sha256": sha256(path)}

    add(SAMPLES, pq.write_table, samples)
    if len(plan.pairs.rows):
        splits = np.full(len(records), "", dtype=object)
        splits[plan.rows] = np.array(settings.split_names, dtype=object)[plan.splits]
        add(DUPLICATES, csv.write_csv, leaks.report(plan.pairs, records.keys, records.groups, splits))
    if rejected.num_rows:
        add(REJECTED, csv.write_csv, rejected)
    described = manifest(settings, plan, records, samples, files, rejected.num_rows)
    write_json(output.growing / MANIFEST, described)
    output.finish(files)


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
