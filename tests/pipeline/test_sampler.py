"""The order is a pure function of (seed, epoch, step), whatever the number of ranks."""

import hashlib
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
from pydantic import ValidationError

from configs.errors import UserError
from configs.loading import Loader as Settings
from pipeline.loader import training_sampler
from pipeline.sampler import (
    PADDING,
    Balanced,
    Indices,
    Patient,
    Sampler,
    Sequential,
    Shuffle,
    Windows,
    check_world_size,
    rank_slice,
)
from shards.shardset import ShardSet

BATCH = 24
WORLDS = [1, 2, 3, 4, 6, 12]  # with two classes, all that divide the batch into balanced slices
SEEDS = [0, 1, 2**63 - 1]


def cohort(classes: int = 2) -> tuple[Indices, Indices, Indices]:
    """(indices, labels, groups): a training split of 150 scattered over 230 samples of 40 patients.

    Class 0 is common; half of the patients, those from 20 on, have nothing else.
    """
    draw = np.random.default_rng(7)
    groups = draw.integers(0, 40, 230)
    labels = np.where((groups % 2 == 1) & (draw.random(230) < 0.4), draw.integers(1, classes, 230), 0)
    return (
        np.sort(draw.permutation(230)[:150]),
        labels,
        np.where(groups % 2 == 1, groups // 2, 20 + groups // 2),
    )


INDICES, LABELS, GROUPS = cohort()
FIVE = cohort(5)[1]
SHARD = np.arange(230) // 10
WINDOWS = Windows(SHARD, 4)
SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "sequential": lambda seed: Sequential(INDICES, BATCH),
    "shuffle": lambda seed: Shuffle(INDICES, BATCH, seed=seed),
    "shuffle with steps": lambda seed: Shuffle(INDICES, BATCH, seed=seed, steps=4),
    "balanced": lambda seed: Balanced(INDICES, LABELS, BATCH, seed=seed),
    "balanced with steps": lambda seed: Balanced(INDICES, LABELS, BATCH, seed=seed, steps=3),
    "balanced, 3 of 5 classes": lambda seed: Balanced(INDICES, FIVE, BATCH, seed=seed, classes_per_batch=3),
    "patient": lambda seed: Patient(INDICES, LABELS, GROUPS, BATCH, positive=1, seed=seed),
    "shuffle in windows": lambda seed: Shuffle(INDICES, BATCH, seed=seed, windows=WINDOWS),
    "shuffle with steps in windows": lambda seed: Shuffle(
        INDICES, BATCH, seed=seed, steps=4, windows=WINDOWS
    ),
    "balanced in windows": lambda seed: Balanced(INDICES, LABELS, BATCH, seed=seed, windows=WINDOWS),
    "patient in windows": lambda seed: Patient(
        INDICES, LABELS, GROUPS, BATCH, positive=1, seed=seed, windows=WINDOWS
    ),
}
FROZEN = {
    "sequential": "8c4aec0689beeeef",
    "shuffle": "2f6e0d229bdeb756",
    "shuffle with steps": "3e2bdefb87c62be4",
    "balanced": "68ccbd90b63885f2",
    "balanced with steps": "9c76eb3974324d79",
    "patient": "a621e943b7f783d6",
}
"""SHA-256 (its beginning) of orders as released: runs half done and published figures depend on them."""


def epochs(sampler: Sampler, count: int = 1) -> Indices:
    """(count, steps, batch): the first epochs, in order."""
    return np.array([[sampler.batch(e, s) for s in range(sampler.steps)] for e in range(count)])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_any_step_can_be_asked_alone_and_in_any_order(name: str, seed: int) -> None:
    in_order = epochs(SAMPLERS[name](seed), 4)
    sampler = SAMPLERS[name](seed)
    places = [(e, s) for e in range(4) for s in range(sampler.steps)]
    for place in np.random.default_rng(0).permutation(len(places)):
        epoch, step = places[place]
        assert np.array_equal(sampler.batch(epoch, step), in_order[epoch, step])
    assert np.array_equal(SAMPLERS[name](seed).batch(3, 1), in_order[3, 1])


@pytest.mark.parametrize("name", FROZEN)
def test_the_order_is_that_of_earlier_versions(name: str) -> None:
    digest = hashlib.sha256()
    for seed in SEEDS:
        sampler = SAMPLERS[name](seed)
        for epoch in (0, 1, 7):
            for step in range(sampler.steps):
                digest.update(sampler.batch(epoch, step).astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == FROZEN[name]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_share_one_order(name: str, world: int) -> None:
    sampler = SAMPLERS[name](0)
    batch = sampler.batch(1, 0)
    slices = [batch[rank_slice(batch, rank, world)] for rank in range(world)]
    assert {len(part) for part in slices} == {BATCH // world}
    assert np.array_equal(np.concatenate(slices), batch)


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("name", ["sequential", "shuffle", "shuffle in windows"])
def test_the_ranks_shares_are_disjoint_and_complete(name: str, world: int) -> None:
    indices, batch = np.arange(3 * 840), 840
    windows = Windows(indices // 60, 5) if "windows" in name else None
    sampler: Sampler = Sequential(indices, batch)
    if name != "sequential":
        sampler = Shuffle(indices, batch, seed=0, windows=windows)
    shares = [[part[rank_slice(part, rank, world)] for part in epochs(sampler)[0]] for rank in range(world)]
    seen = np.concatenate([np.concatenate(share) for share in shares])
    assert np.array_equal(np.sort(seen), indices)
    # Step by step the ranks together show the same, however many they are.
    for step in range(sampler.steps):
        together = np.concatenate([share[step] for share in shares])
        assert np.array_equal(together, sampler.batch(0, step))


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("name", ["balanced", "patient", "balanced in windows", "patient in windows"])
def test_every_one_of_1_to_8_ranks_has_a_balanced_share(name: str, world: int) -> None:
    size = 2 * 840
    windows = WINDOWS if "windows" in name else None
    sampler: Sampler = Balanced(INDICES, LABELS, size, seed=0, windows=windows)
    if "patient" in name:
        sampler = Patient(INDICES, LABELS, GROUPS, size, positive=1, seed=0, windows=windows)
    for epoch in range(3):
        batch = sampler.batch(epoch, 0)
        for rank in range(world):
            assert LABELS[batch[rank_slice(batch, rank, world)]].sum() * 2 == size // world


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "sequential"])
def test_seeds_and_epochs_differ(name: str) -> None:
    orders = [tuple(epoch.ravel()) for seed in SEEDS for epoch in epochs(SAMPLERS[name](seed), 3)]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_the_split_is_drawn_from(name: str) -> None:
    assert set(epochs(SAMPLERS[name](0), 3).ravel()) <= {*INDICES, PADDING}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_caller_cannot_spoil_the_order(name: str) -> None:
    sampler = SAMPLERS[name](0)
    batch = sampler.batch(0, 0)
    kept = batch.copy()
    batch[:] = 0
    assert np.array_equal(sampler.batch(0, 0), kept)


@pytest.mark.parametrize("count", [1, 23, 24, 25, 150])
def test_sequential_shows_each_once_and_marks_the_padding(count: int) -> None:
    sampler = Sequential(INDICES[:count], BATCH)
    order = epochs(sampler).ravel()
    assert sampler.steps == -(-count // BATCH)
    assert np.array_equal(order[:count], INDICES[:count])
    assert (order[count:] == PADDING).all()


@pytest.mark.parametrize("batch", [1, 7, 24, 150, 200])
def test_every_shuffled_epoch_is_a_whole_permutation(batch: int) -> None:
    for epoch in epochs(Shuffle(INDICES, batch, seed=3), 3):
        order = epoch.ravel()
        assert np.array_equal(np.sort(order[: len(INDICES)]), INDICES)
        assert np.array_equal(order[len(INDICES) :], order[: len(order) - len(INDICES)])


def test_shuffling_is_uniform() -> None:
    """Each of 5 samples comes first equally often: chi-squared, 4 degrees of freedom."""
    first = [int(Shuffle(np.arange(5), 5, seed=0).batch(epoch, 0)[0]) for epoch in range(2000)]
    counts = np.bincount(first, minlength=5)
    assert (np.square(counts - 400) / 400).sum() < 18.5  # p = 0.001


def test_short_epochs_run_through_the_whole_set() -> None:
    order = epochs(Shuffle(INDICES, BATCH, seed=0, steps=4), 5).ravel()
    passes = order[: len(order) // 150 * 150].reshape(-1, 150)
    assert len(passes) == 3
    assert all(np.array_equal(np.sort(one), INDICES) for one in passes)


@pytest.mark.parametrize("name", ["balanced", "balanced with steps", "patient", "balanced in windows"])
@pytest.mark.parametrize("world", WORLDS)
def test_every_ranks_slice_is_balanced(name: str, world: int) -> None:
    sampler = SAMPLERS[name](0)
    check_world_size(BATCH, world, classes=2)
    for batch in epochs(sampler, 2).reshape(-1, BATCH):
        for rank in range(world):
            counts = Counter(LABELS[batch[rank_slice(batch, rank, world)]].tolist())
            assert counts[0] == counts[1] == BATCH // world // 2


@pytest.mark.parametrize("windows", [None, Windows(SHARD, 1), WINDOWS])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_no_sample_repeats_before_all_of_its_class_were_seen(classes: int, windows: Windows | None) -> None:
    indices, labels, _ = cohort(classes)
    order = epochs(Balanced(indices, labels, BATCH, seed=1, windows=windows), 8).ravel()
    for label in range(classes):
        members = indices[labels[indices] == label]
        seen = order[labels[order] == label]
        assert len(seen) == len(order) // classes > 2 * len(members) or label == 0
        for start in range(0, len(seen), len(members)):
            one_pass = seen[start : start + len(members)]
            assert len(set(one_pass)) == len(one_pass)


@pytest.mark.parametrize(
    "name", ["balanced", "balanced with steps", "balanced, 3 of 5 classes", "balanced in windows"]
)
def test_the_samples_of_a_class_are_used_evenly(name: str) -> None:
    """Counts differ by one at most from the start to any place, so by two over a stretch between any two."""
    labels = FIVE if "5" in name else LABELS
    order = epochs(SAMPLERS[name](2), 12).ravel()
    for label in np.unique(labels[INDICES]):
        members = INDICES[labels[INDICES] == label]
        counts = np.cumsum(order[labels[order] == label][:, None] == members, axis=0)  # (place, member)
        assert (np.ptp(counts, axis=1) <= 1).all()
        for start in range(0, len(counts), 7):
            assert (np.ptp(counts[start:] - counts[start], axis=1) <= 2).all()


@pytest.mark.parametrize(("classes", "chosen"), [(3, 2), (4, 2), (5, 3), (7, 4), (8, 8)])
def test_classes_take_turns(classes: int, chosen: int) -> None:
    labels = np.arange(40 * classes) % classes
    sampler = Balanced(np.arange(len(labels)), labels, chosen * 6, seed=0, classes_per_batch=chosen, steps=50)
    met = set()
    shown = labels[epochs(sampler, 2).reshape(-1, 6, chosen)]
    for rows in shown:
        assert (rows == rows[0]).all() and len(
            set(rows[0])
        ) == chosen  # P classes × K, and so any rank's rows
        met |= set(combinations(rows[0].tolist(), 2))
    counts = np.cumsum((shown[:, 0, :, None] == np.arange(classes)).sum(axis=1), axis=0)  # (step, class)
    assert (np.ptp(counts, axis=1) <= 1).all(), "no class is ever two turns behind"
    assert len(met) == classes * (classes - 1) // 2, "every two classes are compared"


def test_all_classes_named_are_all_classes() -> None:
    named = Balanced(INDICES, FIVE, 25, seed=0, classes_per_batch=5)
    assert np.array_equal(epochs(named, 2), epochs(Balanced(INDICES, FIVE, 25, seed=0), 2))


def test_classes_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match="classes_per_batch=6 asks for more classes than the 5"):
        Balanced(INDICES, FIVE, BATCH, seed=0, classes_per_batch=6)
    with pytest.raises(ValidationError, match="is for sampler balanced, not patient"):
        Settings(sampler="patient", classes_per_batch=2)
    with pytest.raises(ValidationError, match="no other class to compare"):
        Settings(classes_per_batch=1)


def test_the_configured_classes_per_batch_are_used(tiny_shards: ShardSet) -> None:
    settings = Settings(sampler="balanced", global_batch=4, classes_per_batch=2)
    all_of_them = Settings(sampler="balanced", global_batch=4)
    made = [training_sampler(tiny_shards, s, seed=0, world_size=1) for s in (settings, all_of_them)]
    assert np.array_equal(epochs(made[0]), epochs(made[1]))
    with pytest.raises(UserError, match="more classes than the 2"):
        training_sampler(
            tiny_shards, settings.model_copy(update={"classes_per_batch": 3}), seed=0, world_size=1
        )


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("name", ["sequential", "shuffle", "balanced", "patient"])
def test_an_epochs_plan_takes_40_bytes_a_sample(name: str, windows: bool) -> None:
    """10 million samples: 400 MB at the most, making it and holding two epochs' orders included."""
    count = 300_000
    draw = np.random.default_rng(0)
    indices, labels, groups = (
        np.arange(count),
        draw.integers(0, 2, count),
        draw.integers(0, count // 8, count),
    )
    some = Windows(indices // 1000, 16) if windows else None
    make: dict[str, Callable[[], Sampler]] = {
        "sequential": lambda: Sequential(indices, 256),
        "shuffle": lambda: Shuffle(indices, 256, seed=0, windows=some),
        "balanced": lambda: Balanced(indices, labels, 256, seed=0, windows=some),
        "patient": lambda: Patient(indices, labels, groups, 256, positive=1, seed=0, windows=some),
    }
    tracemalloc.start()
    try:
        sampler = make[name]()
        for epoch in range(3):
            sampler.batch(epoch, 0)
            sampler.batch(epoch, sampler.steps - 1)
        assert tracemalloc.get_traced_memory()[1] < 40 * count
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("windows", [None, WINDOWS])
def test_negatives_of_every_second_row_are_the_patients_own(windows: Windows | None) -> None:
    sampler = Patient(INDICES, LABELS, GROUPS, BATCH, positive=1, seed=0, windows=windows)
    own = {g: set(INDICES[(GROUPS[INDICES] == g) & (LABELS[INDICES] == 0)]) for g in range(40)}
    offered, seen = Counter[int](), set()
    plain = epochs(Balanced(INDICES, LABELS, BATCH, seed=0, windows=windows), 6).reshape(-1, 2)
    for number, (negative, positive) in enumerate(epochs(sampler, 6).reshape(-1, 2)):
        assert (LABELS[negative], LABELS[positive]) == (0, 1)
        assert positive == plain[number, 1]
        patient = GROUPS[positive]
        if number % 2 == 0 and own[patient]:
            assert negative in own[patient]
            offered[patient] += 1
            seen.add(negative)
        else:
            assert negative == plain[number, 0]
    assert len(offered) > 10
    assert seen == set().union(*(own[patient] for patient in offered))


def test_a_patient_without_negatives_keeps_the_plain_ones() -> None:
    indices, labels, groups = np.arange(8), np.array([0, 0, 0, 0, 1, 1, 1, 1]), np.arange(8)
    patient = Patient(indices, labels, groups, 4, positive=1, seed=0)
    balanced = Balanced(indices, labels, 4, seed=0)
    assert np.array_equal(epochs(patient, 3), epochs(balanced, 3))


@pytest.mark.parametrize(
    ("batch", "world", "classes"), [(64, 3, 1), (64, 3, 2), (8, 16, 1), (10, 4, 2), (1, 7, 3)]
)
def test_a_wrong_world_size_comes_with_a_batch_that_works(batch: int, world: int, classes: int) -> None:
    with pytest.raises(
        UserError, match=rf"loader\.global_batch={batch} cannot be shared by {world} ranks"
    ) as caught:
        check_world_size(batch, world, classes)
    suggestion = int(str(caught.value).rsplit("try ", 1)[1])
    check_world_size(suggestion, world, classes)
    assert abs(suggestion - batch) <= world * classes


def test_a_batch_that_the_classes_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="3 classes; try 24"):
        Balanced(np.arange(9), np.arange(9) % 3, 25, seed=0)
    with pytest.raises(UserError, match="5 ranks; try 25"):
        rank_slice(np.arange(BATCH), 0, 5)
