"""Columns are read once, into arrays."""

import pytest

from shards.shardset import SPLITS, ShardSet


def test_the_split_column_is_read_once(tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = ShardSet.open(tiny_shards.folder)
    names = fresh.samples["split"].to_pylist()
    first = {name: fresh.split(name).tolist() for name in SPLITS}
    monkeypatch.setattr(ShardSet, "_codes", None)  # asked again, it would fail
    for name in SPLITS:
        assert fresh.split(name).tolist() == first[name] == [i for i, n in enumerate(names) if n == name]
        assert fresh.split(name).dtype == "int64"
    with pytest.raises(ValueError, match="no split 'valid'; there are train, val, test"):
        fresh.split("valid")
