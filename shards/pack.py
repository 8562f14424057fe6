"""Tables and images -> shard set, in two passes: look at every image, then deal them out and write shards.

Between the two, everything that decides the set is known: what each image holds, and which of them are
duplicates. Every byte is a function of the input and the settings alone. Both passes leave each finished
piece in the work folder, where the same command finds it after any interruption.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from configs.errors import UserError
from configs.packing import Pack
from shards import leaks, webshards
from shards.claims import ALONE, POLL, Part, lock
from shards.describe import DUPLICATES, REJECTED, check_made_by, fingerprint, manifest, samples_table
from shards.files import atomic, sha256, write_json, writing
from shards.images import Ref, locate
from shards.output import Output
from shards.passes import Passes
from shards.plan import Plan, make_plan
from shards.records import Records, read
from shards.scan import Fact
from shards.shardset import MANIFEST, SAMPLES
from shards.tar import Shard
from shards.workers import Crew


def pack(settings: Pack, *, part: Part = ALONE, progress: bool = True) -> dict[str, Any]:
    """Make a shard set, alone or as one of several packers.

    Args:
        settings: the `pack` section of a configuration.
        part: which one of how many packers with the same settings, on any number of hosts that share the
            output's file system. All of them return when the set is whole.
        progress: show progress bars.

    Returns:
        Content of `dataset.json`; where the same settings have made the set already, it stays as it is.

    Raises:
        UserError: for any mistake in the settings, the tables or the images. Finished pieces stay for the
            next try.
    """
    output = Output.of(settings)
    with writing(output.work if output.url else Path(output.place)):
        if not output.packed():
            output.refuse_existing()
    with output.working(part, fingerprint(settings)), Crew(settings.workers) as crew:
        if output.packed():
            made = output.manifest()
            check_made_by(made, settings, output.place)
            if progress and part.alone:
                print("packed already, by these settings; nothing is left to do", file=sys.stderr)
            return made
        passes = Passes(settings, output, part, crew, progress)
        passes.start()
        fetched = passes.fetch()
        records = read(settings, output.work)
        make_plan(settings, records)
        refs = _locate(settings, records, output.work)
        facts = [fact for chunk in passes.look(refs) for fact in chunk.facts]
        rejected = _rejected(settings, records, refs, facts, output)
        plan = make_plan(settings, records, facts, passes.near)
        shards = passes.write(plan, refs, facts)
        _once(output, lambda: _conclude(settings, records, plan, facts, shards, rejected, fetched, output))
    return output.manifest()


def _locate(settings: Pack, records: Records, scratch: Path) -> list[Ref]:
    """Where the bytes of each image lie, (N,)."""
    refs: list[Ref] = []
    for name, source in settings.each_source.items():
        refs += locate(records.ids[records.sources == name].tolist(), source.images, scratch)
    return refs


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
            "file": pa.array([_printable(refs[row].name) for row in bad], pa.string()),
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


def _printable(name: str) -> str:
    """A file's name as UTF-8 can hold it: the system's may be any bytes."""
    return name.encode(errors="replace").decode()


def _beside(output: Output) -> Path:
    if output.url:
        return output.work / REJECTED
    return Path(f"{output.place}.{REJECTED}")


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
