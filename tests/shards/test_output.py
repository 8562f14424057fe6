"""A set at a URL is the local one, byte for byte, its manifest last; or an error that says what to do."""

from pathlib import Path
from typing import Any

import fsspec
import pytest

from configs.errors import UserError
from configs.packing import Pack
from shards.output import Output
from shards.pack import pack
from shards.shardset import ShardSet


def changed(settings: Pack, **fields: Any) -> Pack:
    return Pack.model_validate(settings.model_dump() | fields)


@pytest.fixture
def memory() -> Any:
    """fsspec's file system in memory, empty."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


def test_a_set_in_memory_is_the_local_one(
    tiny_pack: Pack, tiny_shards: ShardSet, memory: Any, tmp_path: Path
) -> None:
    put = memory.put_file
    order: list[str] = []
    memory.put_file = lambda source, target, **more: (
        order.append(Path(target).name),
        put(source, target, **more),
    )
    try:
        made = pack(changed(tiny_pack, output="memory://bucket/set", work=tmp_path / "work"), progress=False)
    finally:
        memory.put_file = put
    there = {Path(name).name: memory.cat_file(name) for name in memory.find("/bucket/set")}
    assert there == {path.name: path.read_bytes() for path in tiny_shards.folder.iterdir()}
    assert order[-1] == "dataset.json" and sorted(order) == sorted(there)
    assert made == tiny_shards.manifest
    assert not list(tmp_path.iterdir())


def test_processes_write_to_a_url_too(tiny_pack: Pack, tiny_shards: ShardSet, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/there"
    pack(changed(tiny_pack, output=url, work=tmp_path / "work", workers=2), progress=False)
    there = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    assert there == {path.name: path.read_bytes() for path in tiny_shards.folder.iterdir()}


def test_an_interrupted_upload_goes_on(
    tiny_pack: Pack, tiny_shards: ShardSet, memory: Any, tmp_path: Path
) -> None:
    settings = changed(tiny_pack, output="memory://bucket/set", work=tmp_path)
    put, puts = memory.put_file, iter(range(100))

    def fail_third(source: str, target: str, **more: Any) -> None:
        if next(puts) == 2:
            raise ConnectionError("the network\nis gone")
        put(source, target, **more)

    memory.put_file = fail_third
    try:
        with pytest.raises(
            UserError, match=r"memory://bucket/set: cannot be written \(the network is gone\)"
        ):
            pack(settings, progress=False)
        assert not memory.exists("/bucket/set/dataset.json")
        pack(settings, progress=False)
    finally:
        memory.put_file = put
    there = {Path(name).name: memory.cat_file(name) for name in memory.find("/bucket/set")}
    assert there == {path.name: path.read_bytes() for path in tiny_shards.folder.iterdir()}
    assert next(puts) == 2 + 2 + 1 + 2 * len(tiny_shards.paths) - 2  # the first shard was not sent again


def test_a_url_that_holds_something_is_refused(tiny_pack: Pack, memory: Any, tmp_path: Path) -> None:
    memory.pipe_file("/bucket/set/theirs.txt", b"x")
    with pytest.raises(UserError, match=r"memory://bucket/set: exists already"):
        pack(changed(tiny_pack, output="memory://bucket/set", work=tmp_path), progress=False)
    assert memory.find("/bucket/set") == ["/bucket/set/theirs.txt"]
    assert not list(tmp_path.iterdir())


def test_an_unknown_kind_of_url_is_one_clear_line(tiny_pack: Pack, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"nosuch://bucket/set: cannot be written .*driver is installed"
    ) as caught:
        pack(changed(tiny_pack, output="nosuch://bucket/set", work=tmp_path), progress=False)
    assert "\n" not in str(caught.value)


def test_a_set_at_a_url_is_not_read_in_place() -> None:
    with pytest.raises(UserError, match="copy it to a local folder first"):
        ShardSet.open("s3://bucket/set")


@pytest.mark.parametrize(("output", "words"), [("/", "is no new folder"), ("x" * 250, "File name too long")])
def test_a_folder_that_cannot_be_is_one_clear_line(output: str, words: str, tiny_pack: Pack) -> None:
    with pytest.raises(UserError, match=f"{words}.*"):
        pack(changed(tiny_pack, output=output), progress=False)


def test_a_slash_at_the_end_makes_no_other_url() -> None:
    one, other = (Output.of(Pack(output=f"s3://bucket/set{end}")) for end in ("", "/"))
    assert one == other
