"""What a shard set says of itself: `samples.parquet` and `dataset.json`."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs.errors import UserError
from configs.packing import Pack
from shards import leaks
from shards.files import sha256
from shards.plan import Plan
from shards.records import Records
from shards.scan import Fact
from shards.shardset import COLUMNS, FORMAT_VERSION, NOTICE, summary
from shards.tables import few
from shards.tar import Shard

DUPLICATES, REJECTED = "duplicates.csv", "rejected.csv"


def samples_table(settings: Pack, plan: Plan, facts: Sequence[Fact], shards: Sequence[Shard]) -> pa.Table:
    """`samples.parquet`: what every reader needs, then the source tables' columns."""
    records, mine = plan.records, [facts[row] for row in plan.rows]
    columns: dict[str, Any] = {
        "index": np.arange(len(records)),
        "key": pa.array(records.keys, pa.string()),
        "split": pa.array(np.array(settings.split_names)[plan.splits]),
        "shard": pa.array(
            [f"{name}.tar" for name, rows in plan.shards.items() for _ in range(rows.start, rows.stop)]
        ),
        "offset": np.array([offset for shard in shards for offset in shard.offsets], dtype=np.int64),
        "size": np.array([fact.size for fact in mine], dtype=np.int64),
        "crc32": np.array([fact.crc32 for fact in mine], dtype=np.uint32),
        "width": np.array([fact.width for fact in mine], dtype=np.int64),
        "height": np.array([fact.height for fact in mine], dtype=np.int64),
        "original_width": np.array([fact.original_width for fact in mine], dtype=np.int64),
        "original_height": np.array([fact.original_height for fact in mine], dtype=np.int64),
        "label": records.labels,
        "group": pa.array(records.groups, pa.string()),
        "lesion": pa.array([name or None for name in records.lesions], pa.string()),
        "source": pa.array(records.sources, pa.string()),
    }
    columns = {name: columns[name] for name in COLUMNS}
    for name in records.metadata.column_names:
        free = name
        while free in columns:
            free = f"source_{free}"
        columns[free] = records.metadata[name]
    return pa.table(columns)


def manifest(
    settings: Pack,
    plan: Plan,
    tables: Records,
    samples: pa.Table,
    files: dict[str, Any],
    rejected: int,
) -> dict[str, Any]:
    """`dataset.json`: what the set was made from and how, and what every file must be."""
    classes, records = tuple(settings.classes), plan.records
    splits = {}
    for part, name in enumerate(settings.split_names):
        rows = plan.splits == part
        counts = np.bincount(records.labels[rows], minlength=len(classes)).tolist()
        splits[name] = {
            "images": int(rows.sum()),
            "groups": len(set(records.groups[rows])),
            "classes": dict(zip(classes, counts, strict=True)),
        }
    kinds = np.bincount(plan.pairs.kinds, minlength=len(leaks.KINDS)).tolist()
    one, other = tables.groups[plan.pairs.rows].T
    for column in ("group", "lesion"):
        assert not leaks.crossing(samples[column].to_pylist(), samples["split"].to_pylist()), column
    return {
        "version": FORMAT_VERSION,
        "sources": _sources(settings),
        "split_files": _split_files(settings),
        "settings": _settings(settings),
        "classes": classes,
        "positive": settings.positive or classes[-1],
        "splits": splits,
        "duplicates": dict(zip(leaks.KINDS, kinds, strict=True))
        | {"pairs_across_groups": int((one != other).sum()), "dropped": plan.dropped},
        "rejected": rejected,
        "files": files,
        **_notice(settings),
    }


def fingerprint(settings: Pack) -> str:
    """Sum of all settings and tables that decide a set; the images, which may be many, are left out."""
    said = {"settings": _settings(settings), "sources": _sources(settings), "files": _split_files(settings)}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _sources(settings: Pack) -> dict[str, Any]:
    return {
        name: {
            "table": _file(source.table, "table"),
            "more_tables": [_file(path, "more_tables") for path in source.more_tables],
            "images": Path(source.images).name,
            "duplicates": _file(source.duplicates, "duplicates"),
        }
        for name, source in settings.each_source.items()
    }


def _split_files(settings: Pack) -> dict[str, Any]:
    return {name: _file(path, "split_files") for name, path in settings.split_files.items()}


def _notice(settings: Pack) -> dict[str, str]:
    tables = [source.table for source in settings.each_source.values() if source.table]
    notices = [path.with_name(NOTICE) for path in tables]
    texts = [path.read_text(encoding="utf-8", errors="replace").strip() for path in notices if path.is_file()]
    text = "\n".join(dict.fromkeys(filter(None, texts)))
    return {"notice": text} if text else {}


def _file(path: Path | None, key: str) -> dict[str, str] | None:
    if path is None:
        return None
    try:
        return {"name": path.name, "sha256": sha256(path)}
    except FileNotFoundError:
        raise UserError(f"{path}: not found; correct pack.{key}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); see pack.{key}") from None


def _settings(settings: Pack) -> dict[str, Any]:
    """All but what differs from machine to machine without effect on a byte."""
    places = {"table", "more_tables", "images", "duplicates"}
    return settings.model_dump(
        mode="json",
        exclude={
            **dict.fromkeys(places | {"output", "work", "workers", "split_files"}, True),
            "sources": dict.fromkeys(settings.sources, places),
        },
    )


def said(made: Mapping[str, Any], place: object) -> list[str]:
    """Lines to print of a set that was just packed."""
    lines = [str(place), *summary(made), f"duplicates, each pair in one split: {pairs_said(made)}"]
    if made["rejected"]:
        lines.append(f"rejected: {made['rejected']:,} images, listed in {REJECTED}")
    return lines


def pairs_said(made: Mapping[str, Any]) -> str:
    """How many duplicates were found, in words."""
    found = made["duplicates"]
    text = ", ".join(f"{found[kind]:,} {kind}" for kind in leaks.KINDS)
    if any(found[kind] for kind in leaks.KINDS):
        text += f"; {found['pairs_across_groups']:,} of them between groups"
    return text + (f"; {found['dropped']:,} listed images dropped" if found["dropped"] else "")


def check_made_by(made: Mapping[str, Any], settings: Pack, where: object) -> None:
    """Make sure that a shard set is what `settings` would make, as far as their tables are at hand.

    Args:
        made: content of the set's `dataset.json`.
        where: the set, for messages.

    Raises:
        UserError: naming what differs.
    """
    if made.get("version") != FORMAT_VERSION:
        raise UserError(
            f"{where}: a shard set of format version {made.get('version')}, this release makes "
            f"{FORMAT_VERSION}; delete it, or set pack.output to another folder"
        )
    before, now = made["settings"], _settings(settings)
    differ = [
        f"pack.{key} is {now[key]}, was {before.get(key)}" for key in now if now[key] != before.get(key)
    ]
    for name, source in settings.each_source.items():
        was = made["sources"].get(name, {})
        prefix = f"pack.sources.{name}." if name else "pack."
        paths = {"table": source.table, "duplicates": source.duplicates}
        differ += _changed(prefix, paths, was)
        more, more_was = source.more_tables, was.get("more_tables", [])
        if len(more) != len(more_was):
            differ.append(f"{prefix}more_tables are {len(more)}, were {len(more_was)}")
        for path, before_it in zip(more, more_was, strict=False):
            differ += _changed(prefix, {"more_tables": path}, {"more_tables": before_it})
    differ += _changed("pack.split_files.", settings.split_files, made["split_files"])
    if differ:
        raise UserError(
            f"{where}: was packed with other settings: {few(differ)}; delete it, or set "
            "pack.output to another folder"
        )


def _changed(prefix: str, paths: Mapping[str, Path | None], was: dict[str, Any]) -> list[str]:
    differ = []
    for key, path in paths.items():
        before = was.get(key)
        if path and before and not path.is_file():
            continue  # the tables may be gone, the shards are whole without them
        if (path and sha256(path)) != (before and before["sha256"]):
            differ.append(f"{prefix}{key} is {path}, was {'another ' + before['name'] if before else None}")
    return differ
