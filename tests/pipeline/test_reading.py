"""Bytes of samples are the same by map and by call; network mounts are known by their type."""

import threading
from pathlib import Path

import numpy as np
import pytest

from configs.errors import DamagedDataError
from pipeline import reading
from pipeline.reading import Calls, Maps, Reader, file_system, reader
from pipeline.source import Source
from shards.shardset import ShardSet

MOUNTS = """\
overlay / overlay rw 0 0
/dev/sda1 /data ext4 rw 0 0
server:/export /data/far nfs4 rw,vers=4.2 0 0
/dev/sdb1 /data/far/near xfs rw 0 0
sshfs#host: /my\\040disk fuse.sshfs rw 0 0
/dev/sdc1 /twice ext4 rw 0 0
//host/share /twice cifs rw 0 0
/dev/sdd1 /windows fuseblk rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind", "network"),
    [
        ("/data/set", "ext4", False),
        ("/data/farther/set", "ext4", False),
        ("/data/far/set", "nfs4", True),
        ("/data/far/near/set", "xfs", False),
        ("/my disk/set/train-000000.tar", "fuse.sshfs", True),
        ("/twice", "cifs", True),
        ("/windows/set", "fuseblk", False),
        ("/elsewhere", "overlay", False),
    ],
)
def test_the_mount_that_a_path_lies_on(path: str, kind: str, network: bool, tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)
    assert file_system(Path(path), mounts) == kind
    assert bool(reading.NETWORK.fullmatch(kind)) == network
    assert file_system(Path(path), tmp_path / "nothing") == ""


def test_a_link_leads_to_its_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"overlay / overlay rw 0 0\nserver:/x {tmp_path.resolve()}/far nfs rw 0 0\n")
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far")
    assert file_system(tmp_path / "link" / "set", mounts) == "nfs"


@pytest.mark.parametrize(("kind", "expected"), [("nfs", Calls), ("ext4", Maps), ("", Maps)])
def test_auto_maps_nothing_on_a_network(
    kind: str, expected: type[Reader], tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "file_system", lambda path: kind)
    for how, found in (("auto", expected), ("mmap", Maps), ("pread", Calls)):
        made = reader(tiny_shards.paths, how)
        assert type(made) is found
        made.close()


def test_both_ways_give_the_same(tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "OPEN_FILES", 1)
    order = np.random.default_rng(0).permutation(len(tiny_shards))
    sources = [Source(tiny_shards, max_bad=0, read=how) for how in ("mmap", "pread")]
    for part in np.split(order, 10):
        one, other = (source.fetch(part)[0] for source in sources)
        assert [a.tobytes() for a in one] == [b.tobytes() for b in other]
    for source in sources:
        source.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("moleprint-read")]


@pytest.mark.parametrize("kind", [Maps, Calls])
def test_a_shard_that_ends_early_gives_what_there_is(kind: type[Maps | Calls], tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    made = kind([tmp_path / "a.tar", tmp_path / "b.tar"])
    spots = [(0, 2, 3), (0, 8, 5), (0, 10, 4), (0, 20, 4)]
    assert [part.tobytes() for part in made.read(spots)] == [b"234", b"89", b"", b""]
    with pytest.raises(DamagedDataError, match=r"b.tar: cannot be read \(No such file"):
        made.read([(1, 0, 1)])
    made.close()


def test_a_server_that_fails_is_an_error_that_names_the_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tar").write_bytes(b"0123456789")

    def fail(*_: int) -> bytes:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("os.pread", fail)
    made = Calls([tmp_path / "a.tar"])
    with pytest.raises(DamagedDataError, match=r"a.tar: cannot be read \(Stale file handle\)"):
        made.read([(0, 0, 1)])
    made.close()


def test_a_call_that_returns_less_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from os import pread

    (tmp_path / "a.tar").write_bytes(bytes(range(100)))
    monkeypatch.setattr("os.pread", lambda file, size, offset: pread(file, min(size, 7), offset))
    made = Calls([tmp_path / "a.tar"])
    assert made.read([(0, 3, 50)])[0].tobytes() == bytes(range(3, 53))
    made.close()
