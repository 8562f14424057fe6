"""Bytes by index, checked; a damaged sample is replaced the same way everywhere, and counted."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import DamagedDataError, UserError
from pipeline.source import Source
from shards.files import sha256
from shards.shardset import ShardSet


def damage(shards: ShardSet, indices: list[int], copy: Path) -> ShardSet:
    """A copy of a shard set with one bit flipped in the middle of some samples' JPEGs."""
    shutil.copytree(shards.folder, copy)
    for index in indices:
        tar = copy / shards.paths[shards.shard[index]].name
        data = bytearray(tar.read_bytes())
        data[int(shards.offsets[index] + shards.sizes[index] // 2)] ^= 1
        tar.write_bytes(data)
    return ShardSet.open(copy)


def spoil(shards: ShardSet, indices: list[int], copy: Path) -> ShardSet:
    """A copy of a shard set whose packer took some samples that cannot be decoded: their sums are right."""
    shutil.copytree(shards.folder, copy)
    sums = shards.crc32.copy()
    for index in indices:
        tar, offset = copy / shards.paths[shards.shard[index]].name, int(shards.offsets[index])
        data = bytearray(tar.read_bytes())
        size = int(shards.sizes[index])
        data[offset : offset + size] = bytes(reversed(data[offset : offset + size]))
        tar.write_bytes(data)
        sums[index] = zlib.crc32(data[offset : offset + size])
    samples = pq.read_table(copy / "samples.parquet")
    samples = samples.set_column(samples.column_names.index("crc32"), "crc32", pa.array(sums))
    pq.write_table(samples, copy / "samples.parquet")
    about = json.loads((copy / "dataset.json").read_text())
    path = copy / "samples.parquet"
    about["files"]["samples.parquet"] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (copy / "dataset.json").write_text(json.dumps(about))
    return ShardSet.open(copy)


def alike(shards: ShardSet, index: int) -> list[int]:
    """Indices of a sample's split and class, from the one after it on and round."""
    (members,) = [m for m in map(shards.split, ("train", "val", "test")) if index in m]
    members = members[shards.labels[members] == shards.labels[index]]
    return [*members[members > index], *members[members < index]]


def test_bytes_are_those_of_the_packed_images(tiny_shards: ShardSet, tiny_images: Path) -> None:
    order = np.random.default_rng(0).permutation(len(tiny_shards))
    source = Source(tiny_shards, max_bad=0)
    data, true = source.fetch(order)
    assert np.array_equal(true, order) and not source.substitutes
    for index, found in zip(order, data, strict=True):
        assert found.tobytes() == (tiny_images / "images" / f"{tiny_shards.keys[index]}.jpg").read_bytes()


def test_a_damaged_sample_is_replaced_by_the_next_sound_one(tiny_shards: ShardSet, tmp_path: Path) -> None:
    bad = int(tiny_shards.split("train")[3])
    first, second, third = alike(tiny_shards, bad)[:3]
    shards = damage(tiny_shards, [bad, first, second], tmp_path / "damaged")
    for order in ([bad, 7, first], [first], [second, bad], [bad, bad]):
        source = Source(shards, max_bad=3 / len(shards))
        data, true = source.fetch(np.array(order))
        broken = {i for i in order if i in (bad, first, second)}
        assert source.substitutes == dict.fromkeys(broken, third)
        assert true.tolist() == [third if i in broken else i for i in order]
        again, true_again = source.fetch(np.array(order))
        sound, _ = Source(tiny_shards, max_bad=0).fetch(true)
        assert [d.tobytes() for d in data] == [d.tobytes() for d in again] == [d.tobytes() for d in sound]
        assert np.array_equal(true, true_again)


def test_one_damaged_sample_counts_once(tiny_shards: ShardSet, tmp_path: Path) -> None:
    bad = int(tiny_shards.split("train")[0])
    source = Source(damage(tiny_shards, [bad], tmp_path / "damaged"), max_bad=1 / len(tiny_shards))
    source.fetch(np.array([bad, bad, bad]))
    source.fetch(np.array([bad]))
    assert list(source.substitutes) == [bad]


def test_more_damage_than_allowed_ends_it(tiny_shards: ShardSet, tmp_path: Path) -> None:
    bad = [int(i) for i in tiny_shards.split("train")[:2]]
    shards = damage(tiny_shards, bad, tmp_path / "damaged")
    source = Source(shards, max_bad=1 / len(shards))
    source.fetch(np.array(bad[:1]))
    with pytest.raises(
        DamagedDataError, match=rf"sample {shards.keys[bad[1]]} is damaged, and 1 others.*max_bad"
    ):
        source.fetch(np.array(bad))
    with pytest.raises(DamagedDataError, match=rf"sample {shards.keys[bad[0]]} is damaged"):
        Source(shards, max_bad=0).fetch(np.array(bad))


def test_condemned_samples_are_replaced_in_any_order(tiny_shards: ShardSet, tmp_path: Path) -> None:
    """A stand-in that proves to be no better is replaced too, so that the order of discovery is no matter."""
    bad = int(tiny_shards.split("train")[3])
    first, second, third = alike(tiny_shards, bad)[:3]
    damaged = damage(tiny_shards, [second], tmp_path / "damaged")
    for order in ([bad, first], [first, bad]):
        source = Source(damaged, max_bad=3 / len(damaged))
        for index in order:
            source.condemn(index)
        source.fetch(np.array([second]))
        assert source.substitutes == dict.fromkeys([bad, first, second], third)
        assert source.replaced(np.array([bad, 7, first])).tolist() == [third, 7, third]
    source = Source(damaged, max_bad=1 / len(damaged))
    source.condemn(first)
    with pytest.raises(
        DamagedDataError, match=rf"sample {damaged.keys[bad]} cannot be decoded, and 1 others"
    ):
        source.condemn(bad)


def test_a_class_without_a_sound_sample_ends_it(tiny_shards: ShardSet, tmp_path: Path) -> None:
    members = tiny_shards.split("val")
    members = [int(i) for i in members[tiny_shards.labels[members] == 1]]
    shards = damage(tiny_shards, members, tmp_path / "damaged")
    with pytest.raises(DamagedDataError, match="all of its class and split are damaged"):
        Source(shards, max_bad=1).fetch(np.array(members))


def test_a_shard_that_went_away_is_named(tiny_shards: ShardSet, tmp_path: Path) -> None:
    shards = damage(tiny_shards, [], tmp_path / "copy")
    shards.paths[0].unlink()
    with pytest.raises(UserError, match=rf"{shards.paths[0].name}: cannot be read \(No such file"):
        Source(shards, max_bad=0).fetch(np.array([0]))
    shards.paths[0].touch()
    with pytest.raises(UserError, match=rf"{shards.paths[0].name}: cannot be read \(.* empty"):
        Source(shards, max_bad=0, read="mmap").fetch(np.array([0]))
