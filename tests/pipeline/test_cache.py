"""Images kept decoded give the same batches to the byte, one copy for all ranks of a node."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_loader import SETTINGS, Batch, same, sequential, take, tensors, training
from test_source import alike, damage, spoil

from configs.errors import DamagedDataError, UserError
from configs.loading import Loader as Settings
from pipeline import cache as module
from pipeline.cache import CachedSource, DeviceCache, HostCache, available_memory, open_cache
from pipeline.decode import Decoder, UndecodableError
from pipeline.sampler import Indices
from pipeline.source import Source
from shards.shardset import ShardSet


@pytest.fixture(scope="module")
def reference(tiny_shards: ShardSet) -> list[Batch]:
    """Three epochs of batches, each decoded anew."""
    with training(tiny_shards) as loader:
        return take(loader, 12)


def on_cpu(shards: ShardSet, indices: Indices) -> DeviceCache:
    """What keeps pixels on a GPU, on the CPU: all but the copy."""
    return DeviceCache(shards, indices, torch.device("cpu"))


either = pytest.mark.parametrize("make", [HostCache, on_cpu])


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of a decoder was given."""
    counts: list[int] = []
    plain = Decoder.__call__

    def count(decoder: Decoder, data: Any) -> Any:
        counts.append(len(data))
        return plain(decoder, data)

    monkeypatch.setattr(Decoder, "__call__", count)
    return counts


@either
def test_batches_are_the_same_and_each_image_is_decoded_once(
    make: Any, reference: list[Batch], tiny_shards: ShardSet, decoded: list[int]
) -> None:
    assert len({(w, h) for w, h in zip(tiny_shards.widths, tiny_shards.heights, strict=True)}) > 20
    cache = make(tiny_shards, tiny_shards.split("train"))
    for _ in range(2):
        with training(tiny_shards, cache=cache) as loader:
            assert all(map(same, take(loader, 12), reference))
    assert sum(decoded) == cache.has(tiny_shards.split("train")).sum()
    assert np.isin(
        np.concatenate([b.index for b in reference]), np.flatnonzero(cache._layout._slots >= 0)
    ).all()
    cache.close()


@either
def test_two_loaders_of_one_process_share_it(make: Any, tiny_shards: ShardSet, decoded: list[int]) -> None:
    splits = [tiny_shards.split("train"), tiny_shards.split("val")]
    cache = make(tiny_shards, np.concatenate(splits))
    for split, indices in zip(("train", "val"), splits, strict=True):
        with sequential(tiny_shards, split) as plain, sequential(tiny_shards, split, cache=cache) as cached:
            for _ in range(3):
                assert all(map(same, list(cached), list(plain)))
        assert cache.has(indices).all()
    assert sum(decoded) == sum(map(len, splits))


def rank(number: int, folder: Path, address: Any, addresses: Any, results: Any) -> None:
    """A rank's batches, from a cache that it makes (rank 0) or is told of."""
    shards = ShardSet.open(folder)
    cache = HostCache(shards, shards.split("train"), address)
    if not number:
        addresses.put(cache.address)
    with training(shards, rank=number, world=2, cache=cache) as loader:
        batches = [[tensor.numpy() for tensor in tensors(batch)] for batch in take(loader, 12)]
    results.put((number, batches, int(cache.has(shards.split("train")).sum())))
    addresses.get()  # the other has seen what is in it


def test_two_processes_share_one_copy(reference: list[Batch], tiny_shards: ShardSet) -> None:
    context = multiprocessing.get_context("spawn")
    addresses, results = context.Queue(), context.Queue()
    first = context.Process(target=rank, args=(0, tiny_shards.folder, "", addresses, results))
    first.start()
    address = addresses.get(timeout=60)
    second = context.Process(target=rank, args=(1, tiny_shards.folder, address, addresses, results))
    second.start()
    found = sorted((results.get(timeout=60) for _ in range(2)), key=lambda item: item[0])
    cache = HostCache(tiny_shards, tiny_shards.split("train"), address)
    for _ in range(2):
        addresses.put("seen")
    first.join(60)
    second.join(60)
    assert [first.exitcode, second.exitcode] == [0, 0]
    for number, whole in enumerate(reference):
        for together, *parts in zip(tensors(whole), *(shares[number] for _, shares, _ in found), strict=True):
            assert np.array_equal(np.concatenate(parts), together)
    shown = np.unique(np.concatenate([batch.index for batch in reference]))
    assert cache.has(shown).all(), "both put theirs into the same memory, which outlives them here"
    with pytest.raises(OSError, match=str(first.pid)):
        HostCache(tiny_shards, tiny_shards.split("train"), address)


def test_it_is_no_file(tiny_shards: ShardSet) -> None:
    cache = HostCache(tiny_shards, np.arange(len(tiny_shards)))
    assert os.stat(cache.address).st_nlink == 0, "it has no name, so none can be left behind"  # noqa: PTH116
    other = HostCache(tiny_shards, np.arange(len(tiny_shards)), cache.address)
    pixels = torch.full(cache.shape(7), 9, dtype=torch.uint8)
    other.put(7, pixels)
    assert np.array_equal(cache.get(7), pixels) and cache.has(np.array([6, 7])).tolist() == [False, True]
    with pytest.raises(OSError, match="not a cache of these images"):
        HostCache(tiny_shards, np.arange(3), cache.address)
    cache.close()
    other.close()


@either
@pytest.mark.parametrize("hurt", [damage, spoil])
def test_bad_samples_are_replaced_as_without_a_cache(
    make: Any,
    hurt: Callable[..., ShardSet],
    reference: list[Batch],
    tiny_shards: ShardSet,
    tmp_path: Path,
) -> None:
    bad = int(reference[1].index[3])
    first = alike(tiny_shards, bad)[0]
    shards = hurt(tiny_shards, [bad, first], tmp_path / "bad")
    cache = make(shards, shards.split("train"))
    two = SETTINGS.model_copy(update={"max_bad": 2 / len(shards)})
    with training(shards, settings=two) as plain, training(shards, settings=two, cache=cache) as cached:
        assert all(map(same, take(cached, 12), take(plain, 12)))
        assert cached.source.substitutes == plain.source.substitutes and cached.source.substitutes
    with (
        pytest.raises(DamagedDataError, match=rf"sample {shards.keys[bad]}|sample {shards.keys[first]}"),
        sequential(shards, "train", cache=cache) as loader,
    ):
        list(loader)


@either
def test_an_image_of_another_size_than_the_table_says_is_damaged(make: Any, tiny_shards: ShardSet) -> None:
    wrong = ShardSet.open(tiny_shards.folder)
    wrong.__dict__["widths"] = wrong.widths + (np.arange(len(wrong)) == 5)
    source = Source(wrong, max_bad=1)
    cached = CachedSource(source, make(wrong, np.arange(len(wrong))), batch=4, threads=1)
    _, shown = cached.fetch(np.array([4, 5]))
    assert shown.tolist() == [4, source.substitutes[5]]
    cached.close()


def test_the_decoder_names_all_that_it_cannot_decode(tiny_shards: ShardSet) -> None:
    data, _ = Source(tiny_shards, max_bad=0).fetch(np.arange(5))
    decoder = Decoder(5, 1)
    junk = np.arange(200, dtype=np.uint8)
    for _ in range(2):
        with pytest.raises(UndecodableError) as caught:
            decoder([data[0], junk, data[2], data[3][:100], data[4]])
        assert caught.value.positions == [1, 3]
        assert [image.shape[2] for image in decoder(data[:3])] == [3] * 3
    decoder.close()


def test_a_decoder_that_fails_at_all_blames_no_image(
    tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a CUDA error, say; the images must not be taken for damaged."""

    class Broken:
        def run(self) -> None:
            raise RuntimeError("CUDA error")

    cached = training(tiny_shards, cache=HostCache(tiny_shards, tiny_shards.split("train")))
    monkeypatch.setattr("pipeline.decode._pipeline", lambda *_: Broken())
    monkeypatch.setattr("pipeline.graph.build", lambda *_, **__: Broken())
    broken = training(tiny_shards)
    for each in (broken, cached):
        with each, pytest.raises(RuntimeError, match="CUDA error"):
            next(iter(each))
        assert not each.source.substitutes


def test_settings(tiny_shards: ShardSet, capsys: pytest.CaptureFixture[str]) -> None:
    every = np.arange(len(tiny_shards))
    settings = Settings(cache="none")
    assert open_cache(tiny_shards, every, settings) is None
    for kind in ("host", "auto"):
        made = open_cache(tiny_shards, every, Settings(cache=kind))
        assert made is not None
        made.close()
    assert not capsys.readouterr().err
    small = {"cache_gigabytes": 1e-4}
    assert open_cache(tiny_shards, every, Settings(cache="auto", **small)) is None
    said = capsys.readouterr().err
    assert "loader.cache=auto keeps no images: the images take" in said and "cache_gigabytes" in said
    with pytest.raises(
        UserError, match=r"loader.cache=host: the images take .* loader.cache_gigabytes allows"
    ):
        open_cache(tiny_shards, every, Settings(cache="host", **small))
    assert open_cache(tiny_shards, every[:3], Settings(cache="auto", **small)) is not None
    with pytest.raises(UserError, match=r"loader.cache=device: there is no GPU; set loader.cache=host"):
        open_cache(tiny_shards, every, Settings(cache="device"))


def test_more_than_the_memory_that_is_left_is_not_taken(
    tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 1e5)
    with pytest.raises(UserError, match=r"this node has 0.0001 GB of memory left"):
        open_cache(tiny_shards, np.arange(len(tiny_shards)), Settings(cache="host"))


def test_the_first_rank_of_a_node_decides(tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    every = np.arange(len(tiny_shards))
    first = open_cache(tiny_shards, every, Settings(cache="host"))
    assert first is not None
    second = open_cache(tiny_shards, every, Settings(cache="host"), lambda mine: first.address)
    assert second is not None
    second.put(3, torch.ones(second.shape(3), dtype=torch.uint8))
    assert first.has(np.array([3])).all()
    assert open_cache(tiny_shards, every, Settings(cache="auto"), lambda mine: "") is None
    with pytest.raises(UserError, match="not on the first rank"):
        open_cache(tiny_shards, every, Settings(cache="host"), lambda mine: "")
    monkeypatch.setattr(module, "available_memory", lambda: 1.0)
    late = open_cache(tiny_shards, every, Settings(cache="host"), lambda mine: first.address)
    assert late is not None and late.has(np.array([3])).all(), "the first has what this one finds missing"
    monkeypatch.undo()
    with pytest.raises(UserError, match="the node's ranks cannot share memory"):
        open_cache(tiny_shards, every, Settings(cache="host"), lambda mine: "/proc/0/fd/3")
    assert open_cache(tiny_shards, every, Settings(cache="auto"), lambda mine: "/proc/0/fd/3") is None


def test_a_rank_without_memory_keeps_no_other_waiting(
    tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> int:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("os.memfd_create", refuse)
    asked: list[str] = []
    with pytest.raises(UserError, match=r"no memory can be had .*Cannot allocate"):
        open_cache(
            tiny_shards, np.arange(9), Settings(cache="host"), lambda mine: (asked.append(mine), "")[1]
        )
    assert asked == [""]


def test_memory_left_is_that_of_the_control_group_too(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert available_memory(tmp_path) == float("inf")
    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:   4000 kB\n")
    assert available_memory(tmp_path) == 4000 * 1024
    write("proc/self/cgroup", "0::/job/step\n")
    write("sys/fs/cgroup/job/memory.max", "3000000\n")
    write("sys/fs/cgroup/job/memory.current", "2500000\n")
    write("sys/fs/cgroup/job/memory.stat", "anon 5\ninactive_file 100000\nactive_file 400000\n")
    write("sys/fs/cgroup/job/step/memory.max", "max\n")
    assert available_memory(tmp_path) == 1_000_000
    assert 1e6 < available_memory() < 1e14


def test_settings_change_no_batch(tiny_shards: ShardSet, reference: list[Batch]) -> None:
    settings = SETTINGS.model_copy(update={"read": "pread", "prefetch": 5})
    cache = HostCache(tiny_shards, tiny_shards.split("train"))
    with training(tiny_shards, settings=settings, threads=3, cache=cache) as loader:
        assert all(map(same, take(loader, 5), reference))
        loader.seek(1)
        assert all(map(same, take(loader, 11), reference[1:]))


@either
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_augmentation_and_type_is_the_same(make: Any, dtype: str, tiny_shards: ShardSet) -> None:
    strong = {"blur": 3, "cutout": 0.5, "jpeg": 80, "occasional": 0.5}
    settings = SETTINGS.model_copy(
        update={
            "augment": SETTINGS.augment.model_copy(update=strong),
            "dtype": dtype,
            "channels_last": dtype != "float32",
        }
    )
    cache = make(tiny_shards, tiny_shards.split("train"))
    with (
        training(tiny_shards, settings=settings) as plain,
        training(tiny_shards, settings=settings, threads=2, cache=cache) as cached,
    ):
        assert all(map(same, take(cached, 12), take(plain, 12)))


class Gpu:
    """A GPU's memory as torch tells of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: float) -> None:
        self.made: list[torch.device] = []
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (int(free), int(2 * free)))
        monkeypatch.setattr(module, "DeviceCache", lambda *given: self.made.append(given[2]) or "on the GPU")


GPU = torch.device("cuda", 1)


def test_auto_takes_the_gpu_if_half_its_memory_holds_the_images(
    tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = np.arange(len(tiny_shards))
    needed = int((tiny_shards.widths * tiny_shards.heights * 3).sum())
    auto, device = Settings(cache="auto"), Settings(cache="device")
    words: list[str] = []

    def share(word: str) -> str:
        words.append(word)
        return word

    gpu = Gpu(monkeypatch, 2.1 * needed)
    assert open_cache(tiny_shards, every, auto, share, GPU) == "on the GPU"
    gpu = Gpu(monkeypatch, 1.1 * needed)
    assert open_cache(tiny_shards, every, device, share, GPU) == "on the GPU" and gpu.made == [GPU]
    assert words == ["device", "device"]
    assert isinstance(open_cache(tiny_shards, every, auto, share, GPU), HostCache)
    assert isinstance(open_cache(tiny_shards, every, Settings(cache="host"), share, GPU), HostCache)
    gpu = Gpu(monkeypatch, 0.9 * needed)
    with pytest.raises(UserError, match=r"loader.cache=device: the images take .*, this GPU has .* left"):
        open_cache(tiny_shards, every, device, share, GPU)
    small = device.model_copy(update={"cache_gigabytes": 1e-4})
    with pytest.raises(UserError, match=r"loader.cache=device: .* loader.cache_gigabytes allows 0.0001"):
        open_cache(tiny_shards, every, small, share, GPU)
    assert not gpu.made


def test_the_first_rank_decides_for_its_nodes_gpus_too(
    tiny_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = np.arange(len(tiny_shards))
    gpu = Gpu(monkeypatch, 1e3)
    assert open_cache(tiny_shards, every, Settings(cache="auto"), lambda mine: "device", GPU) == "on the GPU"
    monkeypatch.setattr(module, "DeviceCache", out_of_memory)
    with pytest.raises(UserError, match=r"loader.cache=auto: no memory left; set loader.cache=host"):
        open_cache(tiny_shards, every, Settings(cache="auto"), lambda mine: "device", GPU)
    assert gpu.made == [GPU]
    kept = open_cache(tiny_shards, every, Settings(cache="host"))
    assert isinstance(kept, HostCache)
    Gpu(monkeypatch, 1e9)
    other = open_cache(tiny_shards, every, Settings(cache="auto"), lambda mine: kept.address, GPU)
    assert isinstance(other, HostCache)


def out_of_memory(*given: Any) -> None:
    raise torch.OutOfMemoryError("no memory left\nand much more")
