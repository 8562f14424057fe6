"""The caller's thread only takes what is ready, and nothing is left behind, however a loader ends."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moments import at_moment, interrupted
from test_loader import SETTINGS, take, training
from test_source import damage

from configs.errors import DamagedDataError
from pipeline.cache import Cache, DeviceCache, HostCache
from pipeline.loader import Batch
from pipeline.producer import Producer
from shards.shardset import ShardSet

ROOT = Path(__file__).parents[2]


def ours() -> set[str]:
    """This process's threads and open files that a loader may have started or opened."""
    found = {f"{thread.name} {thread.native_id}" for thread in threading.enumerate()}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.add(f"{(task / 'comm').read_text().strip()} {task.name}")
    found = {name for name in found if name.startswith(("moleprint", "[DALI]"))}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            file = str(link.readlink())
            if file.endswith(".tar") or file.startswith(("/dev/shm", "/memfd:moleprint")):
                found.add(f"{file} {link.name}")
    return found


@pytest.fixture(autouse=True)
def before() -> Iterator[set[str]]:
    """What there is before a test; nothing more is left after it."""
    gc.collect()
    there = ours()
    yield there
    gc.collect()  # an error's traceback holds what it passed through
    assert not ours() - there


def test_the_callers_thread_reads_nothing(tiny_shards: ShardSet, before: set[str]) -> None:
    seen = set()
    with training(tiny_shards) as loader:
        fetch = loader.source.fetch
        loader.source.fetch = lambda indices: (seen.add(threading.current_thread()), fetch(indices))[1]  # type: ignore[method-assign,func-returns-value]
        take(loader, 8)
        assert len(seen) == 1 and threading.current_thread() not in seen
        assert len(ours() - before) > 3


@pytest.mark.parametrize("read", ["mmap", "pread"])
@pytest.mark.parametrize("cached", [False, True])
def test_closing_ends_all(read: str, cached: bool, tiny_shards: ShardSet, before: set[str]) -> None:
    settings = SETTINGS.model_copy(update={"read": read})
    cache = HostCache(tiny_shards, tiny_shards.split("train")) if cached else None
    loader = training(tiny_shards, settings=settings, cache=cache)
    batches = take(loader, 3)
    copies = [batch.images.clone() for batch in batches]
    loader.close()
    loader.close()
    if cache is not None:
        cache.close()
    assert not ours() - before
    assert all(map(np.array_equal, copies, (batch.images for batch in batches)))
    with pytest.raises(ValueError, match="closed"):
        take(loader, 1)


def test_the_thread_works_on_its_own_gpu_and_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the first GPU, where every new thread begins, nor where training queues what it does."""
    streams: list[object] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda gpu: f"stream of {gpu}")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    none: Any = None
    producer = Producer(none, none, none, lambda inputs: none, size=1, gpu=3, decoded=True)
    with pytest.raises(AttributeError):
        next(producer.batches(0))
    assert streams == ["stream of 3"]


def test_the_last_reference_ends_all(tiny_shards: ShardSet) -> None:
    loader = training(tiny_shards)
    take(loader, 2)
    del loader


def test_an_error_in_the_loop_ends_all(tiny_shards: ShardSet) -> None:
    with pytest.raises(KeyError), training(tiny_shards) as loader:
        for _ in loader:
            raise KeyError


def test_an_error_of_the_thread_comes_out_in_the_callers(tiny_shards: ShardSet, tmp_path: Path) -> None:
    shards = damage(tiny_shards, tiny_shards.split("train")[:9].tolist(), tmp_path / "damaged")
    with training(shards) as loader:
        for _ in range(2):
            with pytest.raises(DamagedDataError, match="moleprint verify"):
                take(loader, 10)


def test_the_last_reference_ends_all_after_an_error_too(tiny_shards: ShardSet, tmp_path: Path) -> None:
    shards = damage(tiny_shards, tiny_shards.split("train")[:9].tolist(), tmp_path / "damaged")
    loader = training(shards)
    with pytest.raises(DamagedDataError):
        take(loader, 10)
    del loader


def test_a_bug_in_the_thread_comes_out_as_it_is(tiny_shards: ShardSet) -> None:
    def broken(indices: object) -> None:
        raise RuntimeError("a bug")

    with training(tiny_shards) as loader:
        batch = next(iter(loader))
        fetch, loader.source.fetch = loader.source.fetch, broken  # type: ignore[method-assign,assignment]
        with pytest.raises(RuntimeError, match="a bug"):
            take(loader, 50)
        loader.source.fetch = fetch  # type: ignore[method-assign]
        loader.seek(0)
        assert np.array_equal(next(iter(loader)).images, batch.images)


def test_ctrl_c_while_waiting_ends_all(tiny_shards: ShardSet, plain_ctrl_c: None) -> None:
    def slow(indices: object, fetch: Callable[..., object]) -> object:
        time.sleep(0.3)
        return fetch(indices)

    with pytest.raises(KeyboardInterrupt), training(tiny_shards) as loader:
        fetch = loader.source.fetch
        loader.source.fetch = lambda indices: slow(indices, fetch)  # type: ignore[method-assign,assignment,return-value]
        threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT]).start()
        take(loader, 100)


def test_ctrl_c_at_any_moment_comes_out_and_loses_no_batch(tiny_shards: ShardSet) -> None:
    """A swallowed one is a run that goes on, a lock left taken one that never ends."""
    with training(tiny_shards) as loader:
        expected = [batch.index.tolist() for batch in take(loader, 8)]
        for moment in count():
            loader.seek(2)
            came = interrupted(lambda: list(loader), moment)
            step = loader.step
            assert [batch.index.tolist() for batch in take(loader, 2)] == expected[step : step + 2]
            if not came:
                break
    assert moment > 500


def test_a_seek_at_any_moment_of_a_batch_skips_none(tiny_shards: ShardSet) -> None:
    """By a signal's handler; Python calls none between looking at the step and counting it."""
    with training(tiny_shards) as loader:
        expected = [batch.index.tolist() for batch in take(loader, 8)]
        for moment in count():
            loader.seek(2)
            got: list[Batch] = []
            came = at_moment(
                lambda got=got: got.extend(take(loader, 1)),  # type: ignore[misc]
                moment,
                lambda: loader.seek(5),
                steps=False,
            )
            # The sought batch, or the one before, where it was counted by then and the sought one comes next.
            assert loader.step in ((5, 6) if came else (3,))
            assert got[0].index.tolist() == expected[5 if loader.step == 6 else 2]
            if not came:
                break
    assert moment > 5


def test_an_interrupted_close_can_be_repeated(tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until DALI ends: what is raised in a destructor Python drops, whoever wrote it."""
    close = Producer.close

    def undisturbed(producer: Producer) -> None:
        sys.settrace(None)
        close(producer)

    monkeypatch.setattr(Producer, "close", undisturbed)
    for moment in count(0, 4):
        loader = training(tiny_shards)
        take(loader, 4)
        came = interrupted(loader.close, moment)
        loader.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "moleprint-loader"]
        if not came:
            break
    assert moment > 40


@pytest.mark.parametrize("step", ["weakref.finalize", "atexit.register"])
def test_an_interrupted_beginning_leaves_nothing(
    step: str, tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        training(tiny_shards)


SCRIPT = """
import sys, time, torch
sys.path.insert(0, "tests/pipeline")
from pathlib import Path
from shards.shardset import ShardSet
from pipeline.cache import HostCache
from test_loader import training
shards = ShardSet.open(Path(sys.argv[1]))
kept = HostCache(shards, shards.split("train")) if sys.argv[2] == "host" else None
loader = training(shards, cache=kept)
print("ready", flush=True)
held = [str(link.resolve()) for link in Path("/proc/self/fd").iterdir()]
assert not [name for name in held if name.startswith("/dev/shm")], held
assert "/dev/shm" not in Path("/proc/self/maps").read_text()
for number in range(10**9):
    for batch in loader:
        pass
    if number == 3:
        print("running", flush=True)
    if sys.argv[3] == "end" and number == 4:
        break
    if sys.argv[3] == "raise" and number == 4:
        raise KeyError("mine")
"""


@pytest.mark.parametrize("cache", ["none", "host"])
@pytest.mark.parametrize("how", ["end", "raise", "interrupt", "kill"])
def test_a_process_ends_at_once_and_leaves_nothing(cache: str, how: str, tiny_shards: ShardSet) -> None:
    """Without closing anything: at its end, by an error, by Ctrl-C, killed."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tiny_shards.folder), cache, how],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "running\n"], process.communicate()[1]
    if how in ("interrupt", "kill"):
        process.send_signal(signal.SIGINT if how == "interrupt" else signal.SIGKILL)
    told = time.monotonic()
    _, said = process.communicate(timeout=600)
    assert time.monotonic() - told < max(5, told - begun)  # a busy machine is as slow at starting one
    expected = {"end": 0, "raise": 1, "interrupt": -signal.SIGINT, "kill": -signal.SIGKILL}
    assert process.returncode == expected[how], said
    last = {"end": "", "raise": "KeyError: 'mine'\n", "interrupt": "KeyboardInterrupt\n", "kill": ""}
    assert said.endswith(last[how]) and said.count("Traceback") == (how in ("raise", "interrupt")), said
    assert "terminate" not in said and "Fatal" not in said


def resident() -> int:
    """Bytes of this process's memory that are not files."""
    text = Path("/proc/self/status").read_text()
    found = {line.split(":")[0]: line.split()[1] for line in text.splitlines() if line.startswith("Rss")}
    return 1024 * (int(found["RssAnon"]) + int(found["RssShmem"]))


@pytest.mark.parametrize("kept", ["none", "host", "device"])
def test_memory_stays_flat_over_epochs_and_seeks(kept: str, tiny_shards: ShardSet) -> None:
    train = tiny_shards.split("train")
    cache: Cache | None = None
    if kept == "host":
        cache = HostCache(tiny_shards, train)
    elif kept == "device":  # tests/gpu tries it where it is another's memory
        cache = DeviceCache(tiny_shards, train, torch.device("cpu"))
    with training(tiny_shards, cache=cache) as loader:
        used = []
        for epoch in range(60):
            for _ in loader:
                pass
            if epoch % 5 == 0:
                loader.seek(epoch)
            if epoch >= 20:
                used.append(resident())
    slope = np.polyfit(np.arange(len(used)), used, 1)[0]
    assert slope < 16 * 32 * 32 * 3 * 4 / 4, "bytes an epoch: less than a quarter of a batch's images"
    if cache is not None:
        cache.close()
