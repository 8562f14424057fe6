"""A sampler's windows: as many shards at a time, for sets larger than the page cache."""

import numpy as np
import pytest
from test_sampler import BATCH, GROUPS, INDICES, LABELS, SAMPLERS, SHARD, epochs

from configs.loading import Loader as Settings
from pipeline.loader import training_sampler
from pipeline.sampler import Balanced, Indices, Patient, Sampler, Shuffle, Windows
from shards.shardset import ShardSet


@pytest.mark.parametrize("window", [1, 3, 4, 22])
def test_a_windows_shards_are_shown_whole_before_the_next_ones(window: int) -> None:
    shards_of_split = np.unique(SHARD[INDICES])
    orders = []
    for epoch in epochs(Shuffle(INDICES, 1, seed=4, windows=Windows(SHARD, window)), 3):
        order = epoch.ravel()
        assert np.array_equal(np.sort(order), INDICES)
        left, opened = order, []
        while len(left):
            first_seen = SHARD[left][np.sort(np.unique(SHARD[left], return_index=True)[1])]
            wanted = first_seen[:window]
            count = int(np.isin(SHARD[INDICES], wanted).sum())
            assert set(SHARD[left[:count]]) == set(wanted)
            opened.append(frozenset(wanted.tolist()))
            left = left[count:]
        assert len(opened) == -(-len(shards_of_split) // window)
        orders.append(tuple(opened))
    assert len(set(orders)) == 3, "each epoch shuffles the shards"


@pytest.mark.parametrize("batch", [1, 24, 150])
def test_any_stretch_of_steps_touches_few_shards(batch: int) -> None:
    """240 shards of 50, windows of 12: as many samples as a window has lie in two windows at most."""
    indices = np.arange(12_000)
    shard = indices // 50
    sampler = Shuffle(indices, batch, seed=0, steps=12_000 // batch, windows=Windows(shard, 12))
    order = np.concatenate([sampler.batch(0, step) for step in range(sampler.steps)])
    for start in range(0, len(order), 70):
        assert len(set(shard[order[start : start + 600]])) <= 24
    plain = Shuffle(indices, 600, seed=0).batch(0, 0)
    assert len(set(shard[plain])) > 200


def test_windows_last_equally_long_in_every_class() -> None:
    """Classes of 4,800, 4,800 and 60 samples in 240 shards; 12 shards hold 5 % of the large classes."""
    labels = np.where(np.arange(9_660) < 60, 2, np.arange(9_660) % 2)
    labels = np.random.default_rng(0).permutation(labels)
    indices = np.arange(9_660)
    shard = indices * 240 // 9_660
    rows = epochs(Balanced(indices, labels, 30, seed=0, windows=Windows(shard, 12)), 2).reshape(-1, 3)
    stretch = 220  # just less than the 240 samples that a large class has in a window
    for start in range(0, len(rows) - stretch, 37):
        touched = shard[rows[start : start + stretch, :2]]
        assert len(set(touched[:, 0])) <= 26 and len(set(touched[:, 1])) <= 26
        assert len(set(touched.ravel())) <= 36, "classes of one size are in the same shards"
    plain = epochs(Balanced(indices, labels, 30, seed=0), 2).reshape(-1, 3)
    assert np.array_equal(rows[:, 2], plain[:, 2]), "the small class is permuted as a whole"


@pytest.mark.parametrize("name", ["shuffle", "balanced", "patient"])
def test_one_window_of_all_shards_is_no_window(name: str) -> None:
    whole = Windows(SHARD, 23)
    make: dict[str, Sampler] = {
        "shuffle": Shuffle(INDICES, BATCH, seed=0, windows=whole),
        "balanced": Balanced(INDICES, LABELS, BATCH, seed=0, windows=whole),
        "patient": Patient(INDICES, LABELS, GROUPS, BATCH, positive=1, seed=0, windows=whole),
    }
    assert np.array_equal(epochs(make[name], 3), epochs(SAMPLERS[name](0), 3))


def test_the_first_shard_is_any_shard() -> None:
    """Each of 4 shards opens the epoch equally often: chi-squared, 3 degrees of freedom."""
    windows = Windows(np.arange(20) // 5, 1)
    first = [int(Shuffle(np.arange(20), 5, seed=0, windows=windows).batch(e, 0)[0]) // 5 for e in range(800)]
    assert (np.square(np.bincount(first, minlength=4) - 200) / 200).sum() < 16.3  # p = 0.001


@pytest.mark.parametrize("sampler", ["shuffle", "balanced", "patient"])
def test_the_configured_window_is_used(sampler: str, tiny_shards: ShardSet) -> None:
    def order(window: int) -> Indices:
        settings = Settings.model_validate({"sampler": sampler, "global_batch": 4, "window": window})
        return epochs(training_sampler(tiny_shards, settings, seed=0, world_size=1))

    shards = len(np.unique(tiny_shards.shard[tiny_shards.split("train")]))
    assert shards > 1 and not np.array_equal(order(1), order(0))
    assert np.array_equal(order(shards), order(0))
