"""Table and images -> shard set: read, check, split, then encode and write in parallel.

All is written into `.NAME.partial` beside the output, which takes its final name at the very end: a folder
under that name is whole. Every byte is a function of the input and the settings alone.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from configs.errors import UserError
from configs.schema import Pack
from shards.files import atomic, sha256, write_json, writing
from shards.plan import Plan, make_plan
from shards.records import few, locate
from shards.shardset import COLUMNS, FORMAT_VERSION, MANIFEST, NOTICE, SAMPLES, SPLITS, ShardSet
from shards.tar import Row, Sample, Shard, write_shard
from shards.workers import in_order


def pack(settings: Pack, *, progress: bool = True) -> ShardSet:
    """Make a shard set, and open it.

    Args:
        settings: the `pack` section of a configuration.
        progress: show a progress bar.

    Raises:
        UserError: for any mistake in the settings, the table or the images; nothing is left behind.
    """
    output = settings.output.resolve()
    _refuse_existing(output)
    plan = make_plan(settings)
    files = locate(plan.records.keys, settings.images)
    with writing(output), _partial(output) as folder:
        written = _write_shards(folder, settings, plan, files, progress)
        samples = _samples(plan, written)
        with atomic(folder / SAMPLES) as file:
            pq.write_table(samples, file)
        sums = {name: about for shard in written for name, about in shard.files.items()}
        table = folder / SAMPLES
        sums[SAMPLES] = {"size": table.stat().st_size, "sha256": sha256(table)}
        write_json(folder / MANIFEST, _manifest(settings, plan, sums))
        _refuse_existing(output)
        folder.rename(output)
    return ShardSet.open(settings.output)


def check_made_by(shards: ShardSet, settings: Pack) -> None:
    """Make sure that a shard set is what `settings` would make, as far as their tables are at hand.

    Raises:
        UserError: naming what differs.
    """
    made = shards.manifest["settings"]
    differ = [
        f"pack.{key} is {value}, was {made.get(key)}"
        for key, value in _settings(settings).items()
        if value != made.get(key)
    ]
    for key in ("table", "duplicates"):
        path, was = getattr(settings, key), shards.manifest[key]
        if path and was and not path.is_file():
            continue  # the tables may be gone, the shards are whole without them
        if (path and sha256(path)) != (was and was["sha256"]):
            differ.append(f"pack.{key} is {path}, was {'another ' + was['name'] if was else None}")
    if differ:
        raise UserError(
            f"{shards.folder}: was packed with other settings: {few(differ)}; delete it, or set "
            "pack.output to another folder"
        )


def _refuse_existing(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: exists already; delete it, or set pack.output to another folder")


@contextlib.contextmanager
def _partial(output: Path) -> Iterator[Path]:
    """An empty `.NAME.partial` beside `output`, locked against a second packer; deleted unless renamed."""
    folder = output.with_name(f".{output.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: is being packed by another process; wait for it, or end it") from None
        except OSError:
            pass  # a file system without locks: packing there alone is up to the user
        try:
            for leftover in folder.iterdir():  # of a packer that was killed
                leftover.unlink()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _write_shards(folder: Path, settings: Pack, plan: Plan, files: list[Path], progress: bool) -> list[Shard]:
    """Every tar with its index, in the order of the plan.

    Raises:
        UserError: naming the images that cannot be used.
    """
    tasks = (
        (folder, name, _shard_samples(settings, plan, files, images), settings.short_side, settings.quality)
        for name, images in plan.shards.items()
    )
    shards: list[Shard] = []
    bar = tqdm(total=len(plan.records), desc="pack", unit="image", disable=not progress)
    with bar, contextlib.closing(in_order(write_shard, tasks, settings.workers)) as written:
        for shard in written:
            shards.append(shard)
            bar.update(len(shard.rows) + len(shard.rejected))
    rejected = [image for shard in shards for image in shard.rejected]
    if rejected:
        raise UserError(
            f"{settings.images}: {len(rejected)} of {len(files)} images cannot be used: {few(rejected)}; "
            "replace the files, or take the rows out of the table"
        )
    return shards


def _shard_samples(settings: Pack, plan: Plan, files: list[Path], images: slice) -> list[Sample]:
    records, classes = plan.records, tuple(settings.classes)
    samples = []
    for row, metadata in enumerate(records.metadata[images].to_pylist(), start=images.start):
        key, label = records.keys[row], int(records.labels[row])
        said = {"key": key, "label": label, "class": classes[label], "group": records.groups[row]}
        samples.append(Sample(key, files[row], label, said | {"metadata": metadata}))
    return samples


def _samples(plan: Plan, shards: list[Shard]) -> pa.Table:
    """`samples.parquet`: what every reader needs, then the source table's columns."""
    facts = np.array([row for shard in shards for row in shard.rows], dtype=np.int64)  # (N, fields of Row)
    columns: dict[str, Any] = {
        "index": np.arange(len(facts)),
        "key": pa.array(plan.records.keys, pa.string()),
        "split": pa.array(np.array(SPLITS)[plan.splits]),
        "shard": pa.array(
            [f"{name}.tar" for name, rows in plan.shards.items() for _ in range(rows.start, rows.stop)]
        ),
        **dict(zip(Row._fields, facts.T, strict=True)),
        "label": plan.records.labels,
        "group": pa.array(plan.records.groups, pa.string()),
    }
    columns["crc32"] = columns["crc32"].astype(np.uint32)
    columns = {name: columns[name] for name in COLUMNS}
    for name in plan.records.metadata.column_names:
        free = name
        while free in columns:
            free = f"source_{free}"
        columns[free] = plan.records.metadata[name]
    return pa.table(columns)


def _manifest(settings: Pack, plan: Plan, files: dict[str, dict[str, int | str]]) -> dict[str, Any]:
    """`dataset.json`: what the set was made from and how, and what every file must be."""
    classes, records = tuple(settings.classes), plan.records
    splits = {}
    for part, name in enumerate(SPLITS):
        rows = plan.splits == part
        counts = np.bincount(records.labels[rows], minlength=len(classes)).tolist()
        splits[name] = {
            "images": int(rows.sum()),
            "groups": len(set(records.groups[rows])),
            "classes": dict(zip(classes, counts, strict=True)),
        }
    notice = settings.table.with_name(NOTICE)
    text = notice.read_text(encoding="utf-8", errors="replace").strip() if notice.is_file() else ""
    return {
        "version": FORMAT_VERSION,
        "table": _source(settings.table),
        "duplicates": _source(settings.duplicates),
        "settings": _settings(settings),
        "classes": classes,
        "positive": settings.positive or classes[-1],
        "splits": splits,
        "files": files,
        **({"notice": text} if text else {}),
    }


def _source(path: Path | None) -> dict[str, str] | None:
    return {"name": path.name, "sha256": sha256(path)} if path else None


def _settings(settings: Pack) -> dict[str, Any]:
    """All but what differs from machine to machine without effect on a byte."""
    of_this_machine = {"table", "images", "output", "duplicates", "workers"}
    return settings.model_dump(mode="json", exclude=of_this_machine)
