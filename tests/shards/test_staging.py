"""A set copied to a node: once, whole, with the sums it must have, whatever was left there."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from test_output import memory

from configs.errors import UserError
from configs.schema import Experiment
from shards import staging
from shards.shardset import ShardSet
from shards.staging import staged

__all__ = ["memory"]  # a fixture

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def remote(tiny_shards: ShardSet, tmp_path: Path) -> Path:
    """A copy of the set that may be spoilt."""
    return shutil.copytree(tiny_shards.folder, tmp_path / "far" / "set")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was read at its place."""
    counts: Counter[str] = Counter()
    plain = staging._chunks

    def chunks(place: str) -> Iterator[bytes]:
        counts[place.rpartition("/")[2]] += 1
        return plain(place)

    monkeypatch.setattr(staging, "_chunks", chunks)
    return counts


@pytest.mark.parametrize("kind", ["folder", "path", "file://", "memory://"])
def test_a_copy_is_the_set(
    kind: str, tiny_shards: ShardSet, remote: Path, memory: Any, tmp_path: Path, fetched: Counter[str]
) -> None:
    memory.put(str(remote), "/bucket/set", recursive=True)
    place = {"folder": str(remote), "path": remote, "file://": f"file://{remote}"}.get(
        kind, "memory://bucket/set/"
    )
    folder = staged(place, tmp_path / "stage")
    assert contents(folder) == contents(tiny_shards.folder)
    assert folder.parent == tmp_path / "stage" and folder.name.startswith("set-")
    assert set(fetched.values()) == {1}
    shards = ShardSet.open(folder)
    assert shards.sha256 == tiny_shards.sha256 and shards.samples.equals(tiny_shards.samples)
    assert staged(place, tmp_path / "stage") == folder
    assert fetched == dict.fromkeys(contents(folder), 1) | {"dataset.json": 2}


def test_an_experiment_opens_its_copy(remote: Path, tiny_shards: ShardSet, tmp_path: Path) -> None:
    def experiment(**loader: Any) -> Experiment:
        return Experiment.model_validate({"pack": {"output": f"file://{remote}"}, "loader": loader})

    with pytest.raises(UserError, match=r"cannot be read in place.*loader.stage"):
        ShardSet.of(experiment())
    shards = ShardSet.of(experiment(stage=tmp_path / "stage"))
    assert shards.folder.parent == tmp_path / "stage" and shards.sha256 == tiny_shards.sha256


def test_many_at_once_copy_once(
    remote: Path, tmp_path: Path, fetched: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = staging._copy
    monkeypatch.setattr(staging, "_copy", lambda *given: (time.sleep(0.05), plain(*given))[1])
    monkeypatch.setattr(staging, "POLL", 0.01)
    found: list[Path] = []
    ranks = [
        threading.Thread(target=lambda: found.append(staged(remote, tmp_path / "stage"))) for _ in range(6)
    ]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert len(found) == 6 and len(set(found)) == 1 and contents(found[0]) == contents(remote)
    assert fetched.pop("dataset.json") == 6 and set(fetched.values()) == {1}


COPY = """
import sys, time
from pathlib import Path
from shards import staging
plain = staging._copy
def slow(*given):
    time.sleep(float(sys.argv[3]))
    plain(*given)
    print(given[1].name, flush=True)
staging._copy, staging.PARALLEL = slow, 1
print(staging.staged(sys.argv[1], Path(sys.argv[2])), flush=True)
"""


def copying(remote: Path, stage: Path, seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", COPY, str(remote), str(stage), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_another_goes_on_where_one_was_killed(remote: Path, tmp_path: Path, fetched: Counter[str]) -> None:
    process = copying(remote, tmp_path / "stage", 0.3)
    assert process.stdout is not None
    done = [process.stdout.readline().strip() for _ in range(2)]
    process.kill()
    process.communicate()
    folder = staged(remote, tmp_path / "stage")
    assert contents(folder) == contents(remote)
    assert set(contents(folder)) - set(fetched) >= set(done), "those that were finished are not copied again"


def test_one_that_waits_goes_on_when_the_other_is_killed(remote: Path, tmp_path: Path) -> None:
    first = copying(remote, tmp_path / "stage", 0.2)
    assert first.stdout is not None
    first.stdout.readline()
    second = copying(remote, tmp_path / "stage", 0)
    time.sleep(1.0)
    first.kill()
    first.communicate()
    said, errors = second.communicate(timeout=30)
    assert second.returncode == 0, errors
    assert contents(Path(said.splitlines()[-1])) == contents(remote)


def test_what_an_ended_copier_left_is_checked(remote: Path, tmp_path: Path, fetched: Counter[str]) -> None:
    """The manifest is missing, so the copy was not finished; a file with a wrong sum is copied again."""
    folder = staged(remote, tmp_path / "stage")
    (folder / "dataset.json").unlink()
    (folder / ".train-000000.tar.xyz.tmp").write_bytes(b"half")
    tar = bytearray((folder / "train-000001.tar").read_bytes())
    tar[5000] ^= 1
    (folder / "train-000001.tar").write_bytes(tar)
    fetched.clear()
    assert staged(remote, tmp_path / "stage") == folder and contents(folder) == contents(remote)
    assert fetched == {"dataset.json": 1, "train-000001.tar": 1}


@pytest.mark.parametrize("hurt", ["cut", "gone"])
def test_a_finished_copy_that_lost_something_is_mended(
    hurt: str, remote: Path, tmp_path: Path, fetched: Counter[str]
) -> None:
    folder = staged(remote, tmp_path / "stage")
    if hurt == "gone":
        (folder / "val-000000.tar").unlink()
    else:
        (folder / "val-000000.tar").write_bytes(b"short")
    fetched.clear()
    assert staged(remote, tmp_path / "stage") == folder and contents(folder) == contents(remote)
    assert fetched == {"dataset.json": 1, "val-000000.tar": 1}


def test_a_file_that_is_damaged_at_its_place_is_never_taken(
    remote: Path, tmp_path: Path, fetched: Counter[str]
) -> None:
    tar = bytearray((remote / "val-000000.tar").read_bytes())
    tar[5000] ^= 1
    (remote / "val-000000.tar").write_bytes(tar)
    with pytest.raises(UserError, match=r"far/set/val-000000.tar: damaged, its sum is not the one"):
        staged(remote, tmp_path / "stage")
    assert fetched["val-000000.tar"] == staging.TRIES, "it was tried again"
    (folder,) = (tmp_path / "stage").iterdir()
    assert not {"dataset.json", "val-000000.tar"} & set(contents(folder)) and not list(folder.glob(".*"))
    with pytest.raises(UserError, match="not a shard set"):
        ShardSet.open(folder)


def test_an_error_on_the_way_is_mended_by_a_second_try(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, wrong = staging._chunks, iter([True])

    def chunks(place: str) -> Iterator[bytes]:
        for chunk in plain(place):
            yield bytes(len(chunk)) if place.endswith("train-000000.tar") and next(wrong, False) else chunk

    monkeypatch.setattr(staging, "_chunks", chunks)
    assert contents(staged(remote, tmp_path / "stage")) == contents(remote)


class Failing(SimpleHTTPRequestHandler):
    """A web server that is busy at first, and then breaks off."""

    faults: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        fault = self.faults.pop() if self.faults and self.path.endswith("train-000000.tar") else ""
        if fault == "busy":
            self.send_error(503)
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "99999")
            self.end_headers()
            self.wfile.write(b"half")
        else:
            super().do_GET()

    def log_message(self, *_: Any) -> None: ...


def test_a_web_server_may_fail_now_and_then(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "PAUSE", 0.01)
    handler = partial(Failing, directory=str(remote.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}"
        Failing.faults[:] = ["cut", "busy"]
        try:
            folder = staged(f"{address}/set", tmp_path / "stage")
            assert contents(folder) == contents(remote) and not Failing.faults
            with pytest.raises(UserError, match=r"nowhere/dataset.json: cannot be read \(HTTP Error 404"):
                staged(f"{address}/nowhere", tmp_path / "stage")
            Failing.faults[:] = ["busy"] * staging.TRIES
            with pytest.raises(UserError, match=r"train-000000.tar: cannot be read \(HTTP Error 503"):
                staged(f"{address}/set", tmp_path / "other")
        finally:
            server.shutdown()


def test_a_set_packed_anew_is_another_copy(remote: Path, tmp_path: Path) -> None:
    first = staged(remote, tmp_path / "stage")
    about = json.loads((remote / "dataset.json").read_text())
    (remote / "dataset.json").write_text(json.dumps(about | {"notice": "packed anew"}))
    second = staged(remote, tmp_path / "stage")
    assert second != first and contents(second) == contents(remote) != contents(first)


def test_mistakes_are_one_clear_line(remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = tmp_path / "stage"
    with pytest.raises(UserError, match=r"nowhere/dataset.json: cannot be read \(no such file\)"):
        staged(tmp_path / "nowhere", stage)
    with pytest.raises(UserError, match=r"nosuch://bucket/set/dataset.json: cannot be read .*driver"):
        staged("nosuch://bucket/set", stage)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*cannot be written"):
        staged(remote, tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=r"needs 0.00 GB more, 0.00 GB are free; make room.*loader.stage"):
            staged(remote, stage)
    (remote / "train-000001.idx").unlink()
    with pytest.raises(UserError, match=r"train-000001.idx: cannot be read \(no such file\)"):
        staged(remote, stage)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"files": {"../x": {"size": 1, "sha256": ""}}}', '{"files": {"x": {}}}']
)
def test_a_manifest_that_is_none_copies_nothing(text: str, remote: Path, tmp_path: Path) -> None:
    (remote / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"set/dataset.json: not that of a shard set"):
        staged(remote, tmp_path / "stage")
    assert not (tmp_path / "stage").exists()


def test_fsspec_caches_no_old_manifest(memory: Any, remote: Path, tmp_path: Path) -> None:
    memory.put(str(remote), "/bucket/set", recursive=True)
    first = staged("memory://bucket/set", tmp_path)
    about = json.loads((remote / "dataset.json").read_text()) | {"notice": "new"}
    fsspec.filesystem("memory").pipe_file("/bucket/set/dataset.json", json.dumps(about).encode())
    assert staged("memory://bucket/set", tmp_path) != first
