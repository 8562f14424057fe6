"""The benchmark measures what it says: the same images, turn by turn, and what its figures mean."""

import json
import multiprocessing
import os
import signal
from collections.abc import Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loader import sequential
from test_source import damage

from configs.errors import UserError
from configs.loading import Augment
from configs.loading import Loader as Settings
from configs.schema import Experiment
from pipeline import benchmark, peers
from pipeline.benchmark import Contestant
from pipeline.contestants import CACHES, OURS, names, prepare
from pipeline.loader import Loader, training_sampler
from pipeline.source import Source
from shards.shardset import ShardSet
from shards.timing import REFERENCE, TURNS, row, take_turns

CPU = torch.device("cpu")
STILL = Augment(preset="none")
HOST_CACHE = next(iter(CACHES))


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker a loader, to start it sooner."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})


def none_left() -> bool:
    """Whether all processes that a test started end of themselves."""
    for child in multiprocessing.active_children():
        child.join(60)
    return not multiprocessing.active_children()


def experiment(shards: ShardSet, **loader: Any) -> Experiment:
    return Experiment.model_validate(
        {"pack": {"output": shards.folder}, "loader": {"global_batch": 8, "size": 32, **loader}}
    )


def test_the_reference_loads_the_same_images_in_the_same_order(tiny_shards: ShardSet) -> None:
    settings = Settings(global_batch=8, size=32, augment=STILL, steps_per_epoch=2)
    sampler = training_sampler(tiny_shards, settings, seed=3, world_size=1)
    loader = Loader(
        tiny_shards,
        sampler,
        settings,
        augmentation=STILL,
        seed=3,
        rank=0,
        world_size=1,
        device=CPU,
        threads=1,
    )
    way = peers.PillowV1(settings)
    with loader, closing(peers.data_loader(tiny_shards, sampler, way, workers=1, device=CPU)) as peer:
        for _ in range(2):  # epochs
            for batch in loader:
                images = next(peer)
                assert images.shape == batch.images.shape and images.dtype == torch.float32
                apart = (images[:, None] - batch.images[None]).abs().mean((2, 3, 4))
                assert apart.argmin(1).tolist() == list(range(8)), "each is nearest to its own"
                assert apart.diagonal().max() < 0.05  # of a range of 2; the two shrink images differently
    assert none_left()


@pytest.mark.parametrize("way", [peers.PillowV1, peers.PillowV2, peers.TorchvisionV2, peers.OpenCV])
def test_every_way_shows_an_image_as_we_do_and_augments_it(way: Any, tiny_shards: ShardSet) -> None:
    if way is peers.OpenCV:
        pytest.importorskip("albumentations", reason="AlbumentationsX is no dependency")
    with sequential(tiny_shards, "test") as loader:
        batch = next(iter(loader))
    jpegs, _ = Source(tiny_shards, max_bad=0).fetch(batch.index.numpy())
    still = way(Settings(size=32, augment=STILL))
    images = torch.stack([still(jpeg.tobytes()) for jpeg in jpegs])
    assert images.shape == batch.images.shape and images.dtype == torch.float32
    assert (images - batch.images).abs().mean((1, 2, 3)).max() < 0.06  # of a range of 2
    moving = way(Settings(size=32))
    moved = torch.stack([moving(jpeg.tobytes()) for jpeg in jpegs])
    assert (moved - images).abs().mean((1, 2, 3)).median() > 0.06


@pytest.mark.parametrize("scale", [(1, 1), (0.85, 1.15)])
@pytest.mark.parametrize("name", sorted({*names(CPU)} - {REFERENCE, OURS, HOST_CACHE}))
def test_every_contestant_makes_batches(name: str, scale: Any, tiny_shards: ShardSet) -> None:
    if "DataLoader" in name:
        pytest.skip("another way for the reference's workers, tried above")
    if "Pillow" in name and scale == (1, 1):
        pytest.skip("starts processes: once is enough")
    settings = experiment(tiny_shards, augment={"preset": "reference", "scale": scale})
    with closing(prepare(name, settings, CPU)()) as batches:
        assert [next(batches) for _ in range(20)] == [8] * 20, "further than an epoch"
    assert none_left()


def test_what_is_not_here_is_told_why(tiny_shards: ShardSet) -> None:
    small = experiment(tiny_shards, cache_gigabytes=1e-6)
    with pytest.raises(UserError, match="cache_gigabytes"):
        prepare(HOST_CACHE, small, CPU)
    with pytest.raises(UserError, match="cache_gigabytes"):
        Contestant(HOST_CACHE, small, CPU, 0, 0)
    assert none_left()


def test_turns_rotate_and_only_what_comes_after_the_warm_up_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log, cpu = [0.0], [], [0.0]

    def contestant(name: str, seconds: list[float]) -> Generator[int]:
        for taken in seconds:
            clock[0] += taken
            cpu[0] += 2 * taken
            log.append(name)
            yield 10

    # A turn: two batches of warm-up, then whole batches until a second is over after the first.
    slow = [9.0, 1.0, 0.5, 0.5, 0.5] * TURNS
    fast = [9.0, 1.0, 0.25, 0.25, 0.25, 0.25, 0.25] * TURNS
    monkeypatch.setattr(benchmark, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(benchmark, "cpu_seconds", lambda: cpu[0])
    contestants = {"slow": contestant("slow", slow), "fast": contestant("fast", fast)}
    burnt = []

    def turn(batches: Generator[int]) -> float:
        rate, of_1000 = benchmark._turn(batches, CPU, 1.0, 1.0)
        burnt.append(of_1000)
        return rate

    rates = take_turns({name: partial(turn, c) for name, c in contestants.items()})
    assert rates == {"slow": [20.0] * TURNS, "fast": [40.0] * TURNS}
    assert burnt == [100.0, 50.0] * TURNS
    assert log == (["slow"] * 5 + ["fast"] * 7) * TURNS


def test_ratios_are_those_of_turns_side_by_side() -> None:
    # The machine halves its speed midway: rates spread, the ratio does not.
    rates = {"reference": [100.0, 110, 90, 50, 55, 45], "moleprint": [600.0, 660, 540, 300, 330, 270]}
    found = row("moleprint", rates)
    assert (found["low"], found["images_per_second"], found["high"]) == (270, 435, 660)
    assert [found[key] for key in ("ratio_low", "ratio", "ratio_high")] == pytest.approx([6, 6, 6])


def test_bench_prints_a_table_and_writes_its_rows(
    tiny_shards: ShardSet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = [REFERENCE, OURS, HOST_CACHE]
    monkeypatch.setattr(benchmark, "names", lambda _: chosen)
    file = tmp_path / "new" / "loader.json"
    benchmark.bench(experiment(tiny_shards, cache_gigabytes=1e-6), file, warm_up=0, seconds=0.05)
    rows = json.loads(file.read_text())
    assert [each["name"] for each in rows] == chosen[:2]
    assert rows[0]["ratio"] == 1
    for each in rows:
        assert 0 < each["low"] <= each["images_per_second"] <= each["high"]
        assert each["environment"]["packages"]["torch"] == torch.__version__.partition("+")[0]
        assert each["shards_sha256"] == tiny_shards.sha256
        assert 0 < each["first_batch_seconds"] < 60 and each["cpu_seconds_per_1000"] > 0
        assert 50 < each["megabytes"] < 5000
    assert rows[0]["first_batch_seconds"] > rows[1]["first_batch_seconds"], "it starts a process"
    printed = capsys.readouterr().out.splitlines()
    assert [line[:34].strip() for line in printed[2:4]] == chosen[:2]
    assert printed[4].startswith(f"left out: {HOST_CACHE}: ") and "cache_gigabytes" in printed[4]
    assert none_left()


def test_a_loader_that_dies_ends_the_benchmark(tiny_shards: ShardSet) -> None:
    with Contestant(OURS, experiment(tiny_shards), CPU, 0, 0) as contestant:
        assert contestant.turn() > 0
        assert contestant._process.pid
        os.kill(contestant._process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="process of moleprint has ended"):
            contestant.turn()
    assert none_left()


def test_a_damaged_sample_is_told_before_anything_is_measured(tiny_shards: ShardSet, tmp_path: Path) -> None:
    bad = int(tiny_shards.split("train")[3])
    shards = damage(tiny_shards, [bad], tmp_path / "damaged")
    with pytest.raises(UserError, match=f"sample {tiny_shards.keys[bad]} is damaged"):
        benchmark.bench(experiment(shards), tmp_path / "loader.json")
    assert not (tmp_path / "loader.json").exists()
