"""Killed at any moment, shared by several packers, or both: the bytes are those of one undisturbed packer."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from configs.packing import Pack
from shards import scan
from shards.claims import Part, lock
from shards.images import Ref
from shards.pack import pack
from shards.passes import Passes

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from configs.packing import Pack
from shards import pack, passes, scan
from shards.claims import Part
if __name__ == "__main__":
    passes.CHUNK = scan.CHUNK = 8
    settings = Pack.model_validate_json(sys.argv[1])
    pack.pack(settings, part=Part(int(sys.argv[2]), int(sys.argv[3])), progress=False)
"""


def packing(settings: Pack, rank: int = 0, size: int = 1) -> "subprocess.Popen[str]":
    """A packer in a process of its own, in small chunks."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN, settings.model_dump_json(), str(rank), str(size)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def changed(settings: Pack, **fields: Any) -> Pack:
    """Small shards of re-encoded images, so that every stage has something to leave half done."""
    encode = {"resize": "short_side", "size": 40}
    return Pack.model_validate(settings.model_dump() | {"encode": encode, "samples_per_shard": 9} | fields)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tiny_pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The set that an undisturbed packer makes."""
    settings = changed(tiny_pack, output=tmp_path_factory.mktemp("whole") / "shards")
    pack(settings, progress=False)
    return contents(Path(settings.output))


def final_names_are_whole(folder: Path, whole: dict[str, bytes]) -> None:
    """Whatever has its final name holds its final bytes."""
    assert not folder.exists()
    for path in (folder.parent / f".{folder.name}.partial" / "set").glob("[!.]*"):
        assert path.read_bytes() == whole[path.name]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_at_random_moments_changes_no_byte(
    workers: int, tiny_pack: Pack, whole: dict[str, bytes], tmp_path: Path
) -> None:
    settings = changed(tiny_pack, output=tmp_path / "shards", workers=workers)
    began = time.monotonic()
    process = packing(changed(tiny_pack, output=tmp_path / "timed", workers=workers))
    assert process.wait(timeout=120) == 0
    usual = time.monotonic() - began
    draw = random.Random(workers)
    for _ in range(8):
        process = packing(settings)
        time.sleep(usual * draw.uniform(0.4, 1.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if Path(settings.output).exists():
            break
        final_names_are_whole(Path(settings.output), whole)
    if not Path(settings.output).exists() or (tmp_path / ".shards.partial").exists():
        process = packing(settings)
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert contents(Path(settings.output)) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "timed"]


class Killed(BaseException):
    """Stands for a kill: nothing of the packer's own may run after it."""


@pytest.mark.parametrize("moment", range(0, 84, 2))
def test_an_end_at_any_rename_changes_no_byte(
    moment: int, tiny_pack: Pack, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every finished file gets its name by a rename; here the packer ends at the nth of them."""
    monkeypatch.setattr("shards.passes.CHUNK", 8)
    renames = iter(range(10_000))

    def rename(path: Path, target: Path, plain: Any) -> Any:
        number = next(renames)
        if number == moment:
            raise Killed
        done = plain(path, target)
        if number == moment + 1:  # an end just after a rename
            raise Killed
        return done

    settings = changed(tiny_pack, output=tmp_path / "shards", workers=1)
    with monkeypatch.context() as patch:
        for name in ("replace", "rename"):
            plain = getattr(Path, name)
            patch.setattr(Path, name, lambda path, target, plain=plain: rename(path, target, plain))
        try:
            pack(settings, progress=False)
        except Killed:
            patch.undo()
            if (tmp_path / "shards").exists():
                assert contents(tmp_path / "shards") == whole
            else:
                final_names_are_whole(tmp_path / "shards", whole)
            pack(settings, progress=False)
    assert contents(tmp_path / "shards") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def count_scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that are read and checked from here on."""
    seen: list[str] = []
    plain = scan.read

    def read(ref: Ref) -> bytes:
        seen.append(ref.name)
        return plain(ref)

    monkeypatch.setattr(scan, "read", read)
    return seen


def test_only_what_changed_is_looked_at_again(
    tiny_pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.passes.CHUNK", 8)
    images = tmp_path / "images"
    images.mkdir()
    for path in Path(tiny_pack.images).iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    sound = (images / "TINY_0017.jpg").read_bytes()
    (images / "TINY_0017.jpg").write_bytes(sound[:300])
    settings = changed(tiny_pack, images=images, output=tmp_path / "shards", max_rejected=0, workers=1)
    seen = count_scans(monkeypatch)
    with pytest.raises(ValueError, match="1 of 120 images cannot be used: TINY_0017"):
        pack(settings, progress=False)
    assert len(seen) == 120
    listed = (tmp_path / "shards.rejected.csv").read_text()
    assert listed.splitlines()[0] == '"key","file","reason"' and "TINY_0017" in listed.splitlines()[1]
    seen.clear()
    (images / "TINY_0017.jpg").write_bytes(sound)
    pack(changed(settings, seed=5), progress=False)
    assert 0 < len(seen) <= 8 and "TINY_0017.jpg" in seen
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "shards"]


def test_chunks_that_a_power_cut_left_empty_are_made_again(
    tiny_pack: Pack, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names reach the disk before contents may: zeros, or nothing, under a chunk's name."""
    monkeypatch.setattr("shards.passes.CHUNK", 8)
    settings = changed(tiny_pack, output=tmp_path / "shards", workers=1)
    with monkeypatch.context() as patch:
        patch.setattr("shards.passes.Passes.write", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            pack(settings, progress=False)
    chunks = sorted((tmp_path / ".shards.partial").glob("chunk-*.bin"))
    assert len(chunks) == 15
    chunks[0].write_bytes(bytes(chunks[0].stat().st_size))
    chunks[1].write_bytes(b"")
    chunks[2].unlink()
    chunks[3].with_suffix(".json").write_bytes(bytes(100))
    seen = count_scans(monkeypatch)
    pack(settings, progress=False)
    assert len(seen) == 4 * 8
    assert contents(tmp_path / "shards") == whole


def test_an_image_that_changes_between_the_passes_is_noticed(
    tiny_pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Passes.write

    def change_first(*arguments: Any) -> Any:
        image = next(iter(Path(settings.images).iterdir()))
        image.write_bytes(image.read_bytes() + b"x")
        return plain(*arguments)

    (tmp_path / "images").mkdir()
    for path in Path(tiny_pack.images).iterdir():
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    settings = Pack.model_validate(
        tiny_pack.model_dump() | {"images": tmp_path / "images", "output": tmp_path / "shards"}
    )
    monkeypatch.setattr("shards.passes.Passes.write", change_first)
    with pytest.raises(ValueError, match="changed while it was being packed; run the same command again"):
        pack(settings, progress=False)
    monkeypatch.undo()
    pack(settings, progress=False)
    assert (tmp_path / "shards" / "dataset.json").exists()


@pytest.mark.slow
def test_several_packers_share_the_work_and_one_may_be_killed(
    tiny_pack: Pack, whole: dict[str, bytes], tmp_path: Path
) -> None:
    settings = changed(tiny_pack, output=tmp_path / "shards", workers=1)
    others = [packing(settings, rank, 4) for rank in range(3)]
    doomed = packing(settings, 3, 4)
    time.sleep(0.8)
    doomed.kill()
    doomed.communicate()
    for process in others:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert contents(tmp_path / "shards") == whole
    late = packing(settings, 3, 4)
    assert late.wait(timeout=60) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_part_alone_does_the_whole_work(tiny_pack: Pack, whole: dict[str, bytes], tmp_path: Path) -> None:
    settings = changed(tiny_pack, output=tmp_path / "shards", workers=1)
    made = pack(settings, part=Part(2, 3), progress=False)
    assert contents(tmp_path / "shards") == whole
    assert pack(settings, part=Part(0, 3), progress=False) == made


def test_parts_of_unlike_jobs_refuse_each_other(tiny_pack: Pack, tmp_path: Path) -> None:
    from shards.describe import fingerprint
    from shards.output import Output

    settings = changed(tiny_pack, output=tmp_path / "shards", workers=1)
    other = changed(settings, seed=5)
    with (
        Output.of(settings).working(Part(0, 2), fingerprint(settings)),
        pytest.raises(ValueError, match="others are packing it with other settings or tables"),
    ):
        pack(other, part=Part(1, 2), progress=False)
    made = pack(settings, part=Part(0, 2), progress=False)
    with pytest.raises(ValueError, match=r"was packed with other settings: pack.seed is 5, was 0"):
        pack(other, part=Part(1, 2), progress=False)
    assert pack(settings, part=Part(1, 2), progress=False) == made


def test_a_part_that_comes_while_the_work_is_being_deleted_finds_its_own_lock(
    tiny_pack: Pack, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = threading.Event()
    plain = time.sleep
    monkeypatch.setattr("shards.claims.time.sleep", lambda seconds: (waited.set(), plain(seconds)))
    settings = changed(tiny_pack, output=tmp_path / "shards", workers=1)
    work = tmp_path / ".shards.partial"
    work.mkdir()
    before = lock(work / "packing.lock")
    assert before is not None
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(pack, settings, part=Part(1, 2), progress=False)
        assert waited.wait(timeout=60)
        shutil.rmtree(work)
        os.close(before)
        late.result(timeout=60)
    assert contents(tmp_path / "shards") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_parts_that_fail_leave_no_locks_behind(tiny_pack: Pack, tmp_path: Path) -> None:
    settings = changed(tiny_pack, output=tmp_path / "shards", label_column="nosuch", workers=1)
    with pytest.raises(ValueError, match="no column 'nosuch'"):
        pack(settings, part=Part(0, 2), progress=False)
    assert not list(tmp_path.iterdir())


def test_a_lone_packer_and_parts_refuse_each_other(
    tiny_pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.output._PATIENCE", 0.1)
    from shards.describe import fingerprint
    from shards.output import Output

    settings = changed(tiny_pack, output=tmp_path / "shards")
    for inside, outside in ((Part(), Part(0, 2)), (Part(0, 2), Part()), (Part(), Part())):
        with (
            Output.of(settings).working(inside, fingerprint(settings)),
            pytest.raises(ValueError, match="is being packed by another process"),
        ):
            pack(settings, part=outside, progress=False)
    assert not list(tmp_path.iterdir())
