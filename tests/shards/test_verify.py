"""A sound set is vouched for; every kind of damage is named."""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import UserError
from shards.files import sha256
from shards.shardset import ShardSet
from shards.verify import verify


@pytest.fixture
def copy(tiny_shards: ShardSet, tmp_path: Path) -> Path:
    """A copy of the tiny shard set, to damage."""
    return Path(shutil.copytree(tiny_shards.folder, tmp_path / "copy"))


def vouch(folder: Path) -> None:
    """Bring the manifest's sizes and sums in line with the files, as a forger would."""
    path = folder / "dataset.json"
    manifest = json.loads(path.read_text())
    for name, about in manifest["files"].items():
        about |= {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    path.write_text(json.dumps(manifest))


def edit_manifest(folder: Path, **values: Any) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_samples(folder: Path, column: str, change: Callable[[list[Any]], None]) -> None:
    table = pq.read_table(folder / "samples.parquet")
    values = table[column].to_pylist()
    change(values)
    place = table.column_names.index(column)
    kind = table.schema.field(column).type
    pq.write_table(table.set_column(place, column, pa.array(values, kind)), folder / "samples.parquet")
    vouch(folder)


def flip(path: Path, offset: int, mask: int = 0xFF) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


@pytest.mark.parametrize("quick", [False, True])
def test_a_sound_set_is_vouched_for(tiny_shards: ShardSet, quick: bool) -> None:
    lines = verify(tiny_shards.folder, quick=quick, workers=1, progress=False)
    assert lines[:-1] == tiny_shards.summary()
    assert lines[0].split() == ["images", "groups", "benign", "melanoma"]
    assert lines[4].split()[:3] == ["all", "120", "24"]
    assert ("not decoded" in lines[-1]) == quick


def damaged(folder: Path, *words: str, quick: bool = True) -> None:
    with pytest.raises(UserError) as caught:
        verify(folder, quick=quick, workers=1, progress=False)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_flipped_byte_is_found_by_its_sum_and_by_its_checksum(copy: Path, tiny_shards: ShardSet) -> None:
    row = tiny_shards.split("val")[3]
    tar = copy / tiny_shards.paths[tiny_shards.shard[row]].name
    flip(tar, int(tiny_shards.offsets[row]) + 400)
    damaged(copy, tar.name, "does not match its sum")
    vouch(copy)
    damaged(copy, "1 problems", f"{tiny_shards.keys[row]}.jpg", tar.name, "checksum")


def test_a_truncated_tar_is_found_by_its_size_and_by_its_members(copy: Path) -> None:
    tar = copy / "test-000000.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    damaged(copy, "test-000000.tar has", "bytes instead of")
    vouch(copy)
    damaged(copy, "test-000000.tar")


def test_swapped_indices_are_found_even_with_forged_sums(copy: Path) -> None:
    one, other = (copy / f"train-00000{n}.idx" for n in (0, 1))
    texts = one.read_bytes(), other.read_bytes()
    one.write_bytes(texts[1])
    other.write_bytes(texts[0])
    vouch(copy)
    damaged(copy, "2 problems", "train-000000.idx is not the index of train-000000.tar")


def test_bytes_that_do_not_decode_are_found_behind_matching_sums(copy: Path, tiny_shards: ShardSet) -> None:
    row = int(tiny_shards.split("test")[0])
    tar = copy / tiny_shards.paths[tiny_shards.shard[row]].name
    start, size = int(tiny_shards.offsets[row]), int(tiny_shards.sizes[row])
    data = bytearray(tar.read_bytes())
    data[start : start + size] = bytes(size)
    tar.write_bytes(data)
    edit_samples(copy, "crc32", lambda values: values.__setitem__(row, zlib.crc32(bytes(size))))
    verify(copy, quick=True, workers=1, progress=False)
    damaged(copy, tiny_shards.keys[row], "cannot be decoded", quick=False)


def test_a_leak_is_found(copy: Path, tiny_shards: ShardSet) -> None:
    train, test = tiny_shards.split("train")[0], tiny_shards.split("test")[0]
    patient = tiny_shards.group_names[tiny_shards.groups[train]]
    edit_samples(copy, "group", lambda values: values.__setitem__(int(test), patient))
    damaged(copy, f"group {patient} is in more than one split", "another label or group")


def test_a_lesion_in_two_splits_is_found(copy: Path, tiny_shards: ShardSet) -> None:
    both = [int(tiny_shards.split(name)[0]) for name in ("train", "val")]
    edit_samples(copy, "lesion", lambda values: [values.__setitem__(n, "L1") for n in both])
    damaged(copy, "lesion L1 is in more than one split")


def test_an_exact_copy_in_two_splits_is_found(copy: Path, tiny_shards: ShardSet) -> None:
    """A forger writes a training image over a test image of the same length, sums and all."""
    lengths = {int(size): n for n, size in enumerate(tiny_shards.sizes) if n in tiny_shards.split("train")}
    target = next((int(n) for n in tiny_shards.split("test") if int(tiny_shards.sizes[n]) in lengths), None)
    if target is None:  # no two of a length: pad the image with bytes after its end
        pytest.skip("the tiny set has no two images of one length in train and test")
    source = lengths[int(tiny_shards.sizes[target])]
    tars = [copy / tiny_shards.paths[tiny_shards.shard[n]].name for n in (source, target)]
    start, size = int(tiny_shards.offsets[source]), int(tiny_shards.sizes[source])
    jpeg = tars[0].read_bytes()[start : start + size]
    data = bytearray(tars[1].read_bytes())
    place = int(tiny_shards.offsets[target])
    data[place : place + size] = jpeg
    tars[1].write_bytes(data)
    edit_samples(copy, "crc32", lambda values: values.__setitem__(target, zlib.crc32(jpeg)))
    damaged(copy, "copies of", "are in more than one split")


def test_a_split_that_the_shards_name_denies_is_found(copy: Path, tiny_shards: ShardSet) -> None:
    row = int(tiny_shards.split("val")[0])
    edit_samples(copy, "split", lambda values: values.__setitem__(row, "train"))
    damaged(copy, "names another split than the shard")


def test_a_wrong_label_is_found(copy: Path) -> None:
    edit_samples(copy, "label", lambda values: values.__setitem__(0, 1 - values[0]))
    damaged(copy, "another label or group", "split train holds")


def test_a_split_without_a_class_is_found(copy: Path, tiny_shards: ShardSet) -> None:
    val = tiny_shards.split("val")
    edit_samples(copy, "label", lambda values: [values.__setitem__(int(n), 0) for n in val])
    damaged(copy, "split val has no melanoma")


def test_a_stray_shard_is_found(copy: Path) -> None:
    shutil.copy(copy / "val-000000.tar", copy / "val-000001.tar")
    damaged(copy, "val-000001.tar is not part of the set")


def test_opening_refuses_what_is_no_sound_shard_set(copy: Path, tmp_path: Path) -> None:
    def refused(*words: str) -> None:
        with pytest.raises(UserError) as caught:
            ShardSet.open(copy)
        assert all(word in str(caught.value) for word in words), str(caught.value)

    flip(copy / "samples.parquet", 40)
    refused("samples.parquet", "sum")
    (copy / "train-000000.tar").unlink()
    refused("train-000000.tar is missing")
    edit_manifest(copy, version=1)
    refused("format version 1", "reads 3", "delete it", "moleprint pack")
    (copy / "dataset.json").write_text('{"version": 1')
    refused("dataset.json", "moleprint pack")
    (copy / "dataset.json").unlink()
    refused("not a shard set", "moleprint pack")
