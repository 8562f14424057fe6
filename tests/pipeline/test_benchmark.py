"""The benchmark measures what it says: the same images, turn by turn, and what its figures mean."""

import json
import multiprocessing
from collections.abc import Generator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from test_source import damage

from configs.errors import UserError
from configs.loading import Augment
from configs.loading import Loader as Settings
from configs.schema import Experiment
from pipeline import benchmark
from pipeline.loader import Loader, training_sampler
from pipeline.peers import torchvision_batches
from shards.shardset import ShardSet
from shards.timing import TURNS, row, take_turns

CPU = torch.device("cpu")
STILL = Augment(
    symmetries=False, rotation=0, scale=(1, 1), shift=0, brightness=0, contrast=0, saturation=0, hue=0
)


def experiment(shards: ShardSet) -> Experiment:
    return Experiment.model_validate(
        {"pack": {"output": shards.folder}, "loader": {"global_batch": 8, "size": 32}}
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
    with closing(torchvision_batches(tiny_shards, sampler, settings, workers=1, device=CPU)) as peer:
        for _ in range(2):  # epochs
            for batch in loader.epoch():
                images = next(peer)
                assert images.shape == batch.images.shape and images.dtype == torch.float32
                apart = (images[:, None] - batch.images[None]).abs().mean((2, 3, 4))
                assert apart.argmin(1).tolist() == list(range(8)), "each is nearest to its own"
                assert apart.diagonal().max() < 0.05  # of a range of 2; the two shrink images differently
    assert not multiprocessing.active_children()


def test_turns_rotate_and_only_what_comes_after_the_warm_up_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = [0.0], []

    def contestant(name: str, seconds: list[float]) -> Generator[int]:
        for taken in seconds:
            clock[0] += taken
            log.append(name)
            yield 10

    # A turn: the first batch, one of warm-up, then whole batches until a second is over.
    slow = [9.0, 1.0, 0.5, 0.5] * TURNS
    fast = [9.0, 1.0, 0.25, 0.25, 0.25, 0.25] * TURNS
    monkeypatch.setattr(benchmark, "perf_counter", lambda: clock[0])
    contestants = {"slow": contestant("slow", slow), "fast": contestant("fast", fast)}
    rates = take_turns({name: partial(benchmark._turn, c, CPU, 1.0, 1.0) for name, c in contestants.items()})
    assert rates == {"slow": [20.0] * TURNS, "fast": [40.0] * TURNS}
    assert log == (["slow"] * 4 + ["fast"] * 6) * TURNS


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
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # one worker, to start it sooner
    file = tmp_path / "new" / "loader.json"
    benchmark.bench(experiment(tiny_shards), file, warm_up=0, seconds=0.05)
    rows = json.loads(file.read_text())
    names = [each["name"] for each in rows]
    assert names[:2] == ["reference", "moleprint"] and names[-1] == "decode only"
    assert rows[0]["ratio"] == 1
    for each in rows:
        assert 0 < each["low"] <= each["images_per_second"] <= each["high"]
        assert each["environment"]["packages"]["torch"] == torch.__version__.partition("+")[0]
        assert each["shards_sha256"] == tiny_shards.sha256
    printed = capsys.readouterr().out.splitlines()
    assert [line[:34].strip() for line in printed[2:-2]] == names
    assert not multiprocessing.active_children()


def test_a_damaged_sample_is_told_before_anything_is_measured(tiny_shards: ShardSet, tmp_path: Path) -> None:
    bad = int(tiny_shards.split("train")[3])
    shards = damage(tiny_shards, [bad], tmp_path / "damaged")
    with pytest.raises(UserError, match=f"sample {tiny_shards.keys[bad]} is damaged"):
        benchmark.bench(experiment(shards), tmp_path / "loader.json")
    assert not (tmp_path / "loader.json").exists()
