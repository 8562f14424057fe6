"""A shard set at a glance, in words: splits, files, sizes, groups, metadata, duplicates."""

import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.describe import pairs_said
from shards.shardset import COLUMNS, ShardSet
from shards.tables import few

Ints = NDArray[np.int64]

LINE = 100
"""Characters of a printed line, before it is wrapped."""
MOST_SIZES, MOST_SOURCES, MOST_COLUMNS = 3, 8, 60
"""How many of each are named in print; the others are counted."""


def describe(shards: ShardSet) -> list[str]:
    """Lines to print: the splits' summary, then files, images, groups, metadata, duplicates and notice."""
    facts = [
        ("files", _files(shards)),
        ("image", _spread(shards.sizes, "bytes")),
        ("size", _pixels(shards, "")),
        ("originals", _pixels(shards, "original_") if _resized(shards) else ""),
        ("group", _groups(shards)),
        ("sources", _sources(shards)),
        ("metadata", _metadata(shards)),
        ("duplicates", f"{pairs_said(shards.manifest)} (pairs, when packing)"),
        ("rejected", f"{counted(shards.manifest['rejected'], 'image')} when packing"),
        ("notice", shards.notice),
    ]
    left = max(len(name) for name, _ in facts) + 2
    lines = [*shards.summary(), ""]
    for name, text in facts:
        if text:
            lines += textwrap.wrap(
                text,
                LINE,
                initial_indent=f"{name:<{left}}",
                subsequent_indent=" " * left,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return lines


def _files(shards: ShardSet) -> str:
    total = sum(int(shards.manifest["files"][path.name]["size"]) for path in shards.paths)
    return f"{counted(len(shards.paths), 'tar')}, {total / 1e6:,.1f} MB"


def _spread(values: Ints, unit: str) -> str:
    return f"median {np.median(values):,.0f} {unit}, from {values.min():,} to {values.max():,}"


def _resized(shards: ShardSet) -> bool:
    return any(shards.samples[side] != shards.samples[f"original_{side}"] for side in ("width", "height"))


def _pixels(shards: ShardSet, which: str) -> str:
    sides = [np.asarray(shards.samples[f"{which}{side}"]) for side in ("width", "height")]
    sizes, counts = np.unique(np.stack(sides), axis=1, return_counts=True)
    if len(counts) == 1:
        return f"{sizes[0, 0]:,} × {sizes[1, 0]:,} pixels, all images"
    common = np.argsort(-counts, kind="stable")[:MOST_SIZES]
    named = ", ".join(f"{sizes[0, n]:,} × {sizes[1, n]:,} ({_share(counts[n], len(shards))})" for n in common)
    more = f" and {len(counts) - MOST_SIZES:,} more" if len(counts) > MOST_SIZES else ""
    widths, heights = (f"{side.min():,} to {side.max():,}" for side in sizes)
    return f"{named}{more}; width {widths}, height {heights} pixels"


def _groups(shards: ShardSet) -> str:
    images = np.bincount(shards.groups)
    seen = np.unique(shards.groups * len(shards.classes) + shards.labels)  # one code a group and class
    mixed = int((np.bincount(seen // len(shards.classes)) > 1).sum())
    return (
        f"median {counted(float(np.median(images)), 'image')}, at most {images.max():,}; {mixed:,} of "
        f"{counted(len(images), 'group')} ({_share(mixed, len(images))}) with more than one class"
    )


def _sources(shards: ShardSet) -> str:
    """Empty if there is one."""
    per_source = shards.samples["source"].value_counts().to_pylist()
    if len(per_source) < 2:
        return ""
    ranked = sorted(per_source, key=lambda one: (-one["counts"], one["values"]))
    return few([f"{one['values']} {_of(one['counts'], len(shards))}" for one in ranked], MOST_SOURCES)


def _metadata(shards: ShardSet) -> str:
    names = [name for name in shards.samples.column_names if name not in COLUMNS]
    if not names:
        return "no columns"
    blanks = {name: _blanks(shards.samples[name]) for name in names}
    gaps = sorted((name for name in names if blanks[name]), key=lambda name: -blanks[name])
    parts = []
    if gaps:
        listed = [f"{name} {_share(blanks[name], len(shards))}" for name in gaps]
        parts.append(f"blank in {few(listed, MOST_COLUMNS)}")
    if full := [name for name in names if not blanks[name]]:
        parts.append(f"no blanks in {few(full, MOST_COLUMNS)}")
    return f"{counted(len(names), 'column')}; {'; '.join(parts)}"


def _blanks(column: pa.ChunkedArray) -> int:
    blank = pc.is_null(column, nan_is_null=True)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        blank = pc.or_(blank, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), False))
    return int(pc.sum(blank).as_py() or 0)


def counted(number: float, noun: str) -> str:
    """A number with its noun, in the plural unless it is one."""
    return f"{number:,.12g} {noun}" if number == 1 else f"{number:,.12g} {noun}s"


def _share(part: float, whole: float) -> str:
    """A percentage that says 0% and 100% of nothing less than none and all."""
    if 0 < part < 0.0005 * whole:
        return "<0.1%"
    if 0.9995 * whole <= part < whole:
        return ">99.9%"
    return f"{part / whole:.1%}"


def _of(part: int, whole: int) -> str:
    return f"{part:,} ({_share(part, whole)})"
