"""The packing benchmark gives every row, and its peers pack what we pack."""

import json
import tarfile
from pathlib import Path

import pytest

from configs.errors import UserError
from shards import benchmark, peers
from shards.benchmark import AGAIN, LARGE, MEMORY, OURS, PASS, VERIFY, bench, draw
from shards.pack import pack
from shards.shardset import ShardSet
from shards.timing import REFERENCE, row, table, take_turns


@pytest.mark.slow
def test_every_row_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(48, tmp_path / "rows.json", {"processor": "a processor"}, turns=1)
    rows = json.loads((tmp_path / "rows.json").read_text())
    by_contest: dict[str, dict[str, dict[str, float]]] = {}
    for each in rows:
        by_contest.setdefault(each["contest"], {})[each["name"]] = each
        assert each["environment"] == {"processor": "a processor"}
    assert list(by_contest) == [PASS, AGAIN, LARGE, VERIFY, MEMORY]
    assert list(by_contest[PASS]) == [
        REFERENCE,
        "tar(1)",
        OURS,
        f"{OURS}, exact duplicates only",
        f"{OURS}, header check",
        "decode alone",
    ]
    for name in (PASS, AGAIN, LARGE):
        assert by_contest[name][REFERENCE]["ratio"] == 1
        assert all(each["images_per_second"] > 0 for each in by_contest[name].values())
    assert by_contest[MEMORY][OURS]["megabytes"] > 10
    assert rows[0]["large_psnr"] > 45
    assert min(rows[0]["coding_psnr"], rows[0]["shrinking_psnr"]) > rows[0]["large_psnr"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("tar(1)", "verify --quick", "dB", "MB for 48 images"))


def test_peers_pack_the_same_images(tmp_path: Path) -> None:
    drawn = draw(tmp_path / "drawn", 32, (64, 64), cores=1)
    pack(drawn.settings(tmp_path / "ours", workers=1), progress=False)
    ours = ShardSet.open(tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    peers.shard_writer(drawn.photographs, tmp_path / "theirs")
    peers.tar(drawn.folder, tmp_path)
    with tarfile.open(tmp_path / "theirs" / "shard-000000.tar") as theirs:
        names = [name for name in theirs.getnames() if name.endswith(".jpg")]
        assert sorted(name.removesuffix(".jpg") for name in names) == sorted(ours.keys)
        for index, key in enumerate(ours.keys):
            member = theirs.extractfile(f"{key}.jpg")
            start, size = ours.offsets[index], ours.sizes[index]
            assert member is not None
            assert member.read() == ours.paths[ours.shard[index]].read_bytes()[start : start + size]
    with tarfile.open(tmp_path / "shard-000000.tar") as plain:
        assert len([name for name in plain.getnames() if name.endswith(".jpg")]) == 32


def test_photographs_are_the_same_every_time(tmp_path: Path) -> None:
    one, other = (draw(tmp_path / name, 3, (96, 64), cores=1) for name in ("one", "other"))
    for mine, theirs in zip(one.photographs, other.photographs, strict=True):
        assert Path(mine.path).read_bytes() == Path(theirs.path).read_bytes()
    assert len({Path(each.path).read_bytes() for each in one.photographs}) == 3


def test_memory_counts_the_workers_too() -> None:
    import os

    assert os.getpid() in dict(benchmark._peaks(os.getpid()))
    assert benchmark._peaks(2**22 + 1) == []


def test_turns_are_taken_in_rotation_and_ratios_are_of_neighbours() -> None:
    order: list[str] = []

    def turn(name: str, rate: float) -> float:
        order.append(name)
        return rate * (1 + order.count(name))  # the machine's mood

    rates = take_turns({REFERENCE: lambda: turn("a", 10), "fast": lambda: turn("b", 30)}, turns=3)
    assert order == ["a", "b"] * 3
    found = row("fast", rates)
    assert (found["ratio"], found["ratio_low"], found["ratio_high"]) == (3, 3, 3)
    assert (found["low"], found["images_per_second"], found["high"]) == (60, 90, 120)
    assert "3.00" in table([found])[1] and "ratio" not in row("fast", {"fast": rates["fast"]})


def test_a_folder_for_the_rows_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder, where --json needs a file"):
        bench(10**9, tmp_path, {})
