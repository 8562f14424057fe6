"""What several packers share is done by one of them, by another if that one is killed, and seen to change."""

import contextlib
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import webdataset
from pyarrow import csv

from configs.errors import UserError
from configs.packing import Pack
from shards import passes, webshards
from shards.claims import Part
from shards.output import Output
from shards.pack import pack
from shards.passes import Passes

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from shards.claims import lock
print(lock(Path(sys.argv[1])) is not None, flush=True)
time.sleep(600)
"""


def write_shards(folder: Path, settings: Pack, images: Callable[[Path], bytes] = Path.read_bytes) -> None:
    """Two shards of the tiny set, with what its table says inside."""
    folder.mkdir(exist_ok=True)
    rows = csv.read_csv(settings.table).to_pylist()
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"web-{number}.tar")) as writer:
            for row in rows[number::2]:
                image = images(Path(settings.images) / f"{row['isic_id']}.jpg")
                about = {"patient": row["patient_id"]}
                writer.write({"__key__": row["isic_id"], "jpg": image, "cls": row["target"], "json": about})


@pytest.fixture
def source(tiny_pack: Pack, tmp_path: Path) -> Pack:
    """Settings whose images and labels come from shards at a URL."""
    write_shards(tmp_path / "source", tiny_pack)
    columns = {"id_column": "key", "group_column": "patient", "label_column": "cls", "table": None}
    place = {"images": f"file://{tmp_path}/source/web-{{0..1}}.tar", "output": tmp_path / "shards"}
    return Pack.model_validate(tiny_pack.model_dump() | columns | place | {"workers": 1})


def contents(settings: Pack) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(settings.output).iterdir()}


def alone(settings: Pack) -> dict[str, bytes]:
    """What one packer makes of the same."""
    settings = settings.model_copy(update={"output": f"{settings.output}-alone"})
    pack(settings, progress=False)
    return contents(settings)


@contextlib.contextmanager
def held(claim: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has claimed a job and does nothing."""
    claim.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(claim)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    with process:
        yield process
        process.kill()


def count_calls(monkeypatch: pytest.MonkeyPatch, place: object, name: str) -> "Counter[str]":
    """How often a function is called, by its first argument."""
    plain, counts = getattr(place, name), Counter[str]()

    def counted(first: Any, *others: Any) -> Any:
        counts[str(first)] += 1
        return plain(first, *others)

    monkeypatch.setattr(place, name, counted)
    return counts


def test_each_shard_is_fetched_and_near_ones_are_sought_by_one_of_many(
    source: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = alone(source)
    fetches = count_calls(monkeypatch, webshards, "fetch")
    searches = count_calls(monkeypatch, passes, "find_pairs")
    with ThreadPoolExecutor(3) as pool:
        packers = [pool.submit(pack, source, part=Part(rank, 3), progress=False) for rank in range(3)]
        made = [packer.result(timeout=60) for packer in packers]
    assert made[0] == made[1] == made[2]
    assert contents(source) == whole
    assert sorted(fetches.values()) == [1, 1] and sorted(searches.values()) == [1]
    assert not Output.of(source).work.exists()


@pytest.mark.parametrize("claimed", ["fetch", "near"])
def test_one_who_is_killed_over_a_claim_is_made_up_for(
    claimed: str, source: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, work = alone(source), Output.of(source).work
    claim = webshards.paths(f"{source.images[:-10]}1.tar", work)[1].with_suffix(".lock")
    if claimed == "near":
        with monkeypatch.context() as patch:
            patch.setattr("shards.passes.Passes.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                pack(source, part=Part(0, 2), progress=False)
        (found,) = work.glob("near-*.npy")
        found.unlink()
        claim = found.with_suffix(".lock")
    waited = count_calls(monkeypatch, sys.modules["shards.claims"].time, "sleep")
    with held(claim) as other, ThreadPoolExecutor(1) as pool:
        packer = pool.submit(pack, source, part=Part(0, 2), progress=False)
        while not waited:
            assert not packer.done()
        assert not packer.done()
        other.send_signal(signal.SIGKILL)
        packer.result(timeout=60)
    assert contents(source) == whole


def test_a_shard_that_changes_between_two_runs_is_packed_anew(
    source: Pack, tiny_pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("shards.passes.Passes.write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pack(source, progress=False)
    write_shards(tmp_path / "source", tiny_pack, lambda path: path.read_bytes() + path.name.encode())
    fetches = count_calls(monkeypatch, webshards, "fetch")
    pack(source, progress=False)
    said = capsys.readouterr().err
    assert all(f"web-{n}.tar: changed since it was fetched" in said for n in range(2))
    assert sorted(fetches.values()) == [1, 1]
    assert contents(source) == alone(source)


def test_a_shard_that_changes_meanwhile_is_an_error_and_then_packed_anew(
    source: Pack, tiny_pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Passes.write

    def change_first(*arguments: Any) -> Any:
        write_shards(tmp_path / "source", tiny_pack, lambda path: path.read_bytes() + b"more")
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("shards.passes.Passes.write", change_first)
        with pytest.raises(UserError, match=r"web-0.tar: changed while it was being packed; run the same"):
            pack(source, progress=False)
    pack(source, progress=False)
    assert contents(source) == alone(source)


def test_shards_are_read_from_wherever_fsspec_can(source: Pack, tmp_path: Path) -> None:
    """As from s3://, which the webdataset package does not know by itself."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/source/", "/bucket/", recursive=True)
    there = source.model_copy(update={"images": "memory://bucket/web-{0..1}.tar"})
    pack(there, progress=False)
    made = contents(there)
    whole = alone(source)
    assert made.keys() == whole.keys()
    assert all(made[name] == whole[name] for name in made if name != "dataset.json")
    assert webshards.identity("memory://bucket/web-0.tar")


def test_a_place_that_cannot_be_asked_has_no_identity() -> None:
    for url in ("pipe:cat nothing.tar", "http://127.0.0.1:9/a.tar", "nosuch://place/a.tar"):
        assert webshards.identity(url) == ""
