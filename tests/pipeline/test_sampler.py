"""The order is a pure function of (seed, epoch, step), whatever the number of ranks."""

import hashlib
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from configs.errors import UserError
from pipeline.sampler import (
    PADDING,
    Balanced,
    Indices,
    Patient,
    Sampler,
    Sequential,
    Shuffle,
    check_world_size,
    rank_slice,
)

BATCH = 24
WORLDS = [1, 2, 3, 4, 6, 12]  # with two classes, all that divide the batch into balanced slices
SEEDS = [0, 1, 2**63 - 1]


def cohort(classes: int = 2) -> tuple[Indices, Indices, Indices]:
    """(indices, labels, groups): a training split of 150 scattered over 230 samples of 40 patients.

    Class 0 is common; half of the patients have nothing else.
    """
    draw = np.random.default_rng(7)
    groups = draw.integers(0, 40, 230)
    labels = np.where((groups % 2 == 1) & (draw.random(230) < 0.4), draw.integers(1, classes, 230), 0)
    return np.sort(draw.permutation(230)[:150]), labels, groups


INDICES, LABELS, GROUPS = cohort()
SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "sequential": lambda seed: Sequential(INDICES, BATCH),
    "shuffle": lambda seed: Shuffle(INDICES, BATCH, seed=seed),
    "shuffle with steps": lambda seed: Shuffle(INDICES, BATCH, seed=seed, steps=4),
    "balanced": lambda seed: Balanced(INDICES, LABELS, BATCH, seed=seed),
    "balanced with steps": lambda seed: Balanced(INDICES, LABELS, BATCH, seed=seed, steps=3),
    "patient": lambda seed: Patient(INDICES, LABELS, GROUPS, BATCH, positive=1, seed=seed),
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


@pytest.mark.parametrize("name", ["balanced", "balanced with steps", "patient"])
@pytest.mark.parametrize("world", WORLDS)
def test_every_ranks_slice_is_balanced(name: str, world: int) -> None:
    sampler = SAMPLERS[name](0)
    check_world_size(BATCH, world, classes=2)
    for batch in epochs(sampler, 2).reshape(-1, BATCH):
        for rank in range(world):
            counts = Counter(LABELS[batch[rank_slice(batch, rank, world)]].tolist())
            assert counts[0] == counts[1] == BATCH // world // 2


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_no_sample_repeats_before_all_of_its_class_were_seen(classes: int) -> None:
    indices, labels, _ = cohort(classes)
    order = epochs(Balanced(indices, labels, BATCH, seed=1), 8).ravel()
    for label in range(classes):
        members = indices[labels[indices] == label]
        seen = order[labels[order] == label]
        assert len(seen) == len(order) // classes > 2 * len(members) or label == 0
        for start in range(0, len(seen), len(members)):
            one_pass = seen[start : start + len(members)]
            assert len(set(one_pass)) == len(one_pass)


def test_negatives_of_every_second_row_are_the_patients_own() -> None:
    sampler = SAMPLERS["patient"](0)
    own = {g: set(INDICES[(GROUPS[INDICES] == g) & (LABELS[INDICES] == 0)]) for g in range(40)}
    offered, seen = Counter[int](), set()
    plain = epochs(SAMPLERS["balanced"](0), 6).reshape(-1, 2)
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
