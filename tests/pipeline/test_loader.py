"""Batches: the same images in the same slots for any number of ranks and after any interruption."""

from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from test_source import alike, damage, spoil

from configs.errors import DamagedDataError, UserError
from configs.loading import Augment
from configs.loading import Loader as Settings
from pipeline.cache import Cache
from pipeline.loader import Batch, Loader, training_sampler
from pipeline.sampler import PADDING, Sequential
from shards.shardset import ShardSet

BATCH = 16
SETTINGS = Settings(global_batch=BATCH, size=32, steps_per_epoch=4)
CPU = torch.device("cpu")


def training(
    shards: ShardSet,
    *,
    rank: int = 0,
    world: int = 1,
    start: int = 0,
    settings: Settings = SETTINGS,
    seed: int = 0,
    threads: int = 1,
    cache: Cache | None = None,
) -> Loader:
    """A loader of the training split."""
    return Loader(
        shards,
        training_sampler(shards, settings, seed=seed, world_size=world),
        settings,
        augmentation=settings.augment,
        seed=seed,
        rank=rank,
        world_size=world,
        device=CPU,
        threads=threads,
        start=start,
        cache=cache,
    )


def sequential(
    shards: ShardSet,
    split: str,
    *,
    rank: int = 0,
    world: int = 1,
    max_bad: float = 0,
    cache: Cache | None = None,
) -> Loader:
    """A loader of each sample of a split, as it is."""
    settings = SETTINGS.model_copy(update={"max_bad": max_bad})
    return Loader(
        shards,
        Sequential(shards.split(split), BATCH),
        settings,
        augmentation=None,
        seed=0,
        rank=rank,
        world_size=world,
        device=CPU,
        threads=1,
        cache=cache,
    )


def take(loader: Loader, count: int) -> list[Batch]:
    """The next batches, over the borders of epochs; each epoch entered must be taken to its end."""
    return list(islice(chain.from_iterable(loader.epoch() for _ in range(count)), count))


def tensors(batch: Batch) -> list[torch.Tensor]:
    """Images, labels, groups, index."""
    return [batch.images, batch.labels, batch.groups, batch.index]


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.fixture(scope="module")
def reference(tiny_shards: ShardSet) -> list[Batch]:
    """The first ten batches of an uninterrupted run on one rank: two epochs and a half."""
    return take(training(tiny_shards), 10)


def test_a_batch_is_what_it_says(reference: list[Batch], tiny_shards: ShardSet) -> None:
    for batch in reference:
        assert batch.images.shape == (BATCH, 3, 32, 32) and batch.images.dtype == torch.float32
        assert all(t.shape == (BATCH,) and t.dtype == torch.int64 for t in tensors(batch)[1:])
        index = batch.index.numpy()
        assert np.isin(index, tiny_shards.split("train")).all()
        assert np.array_equal(batch.labels, tiny_shards.labels[index])
        assert np.array_equal(batch.groups, tiny_shards.groups[index])
        assert batch.images.abs().max() < 1 + 1e-6 and batch.images.std() > 0.1
    assert not torch.equal(reference[0].images, reference[4].images)


@pytest.mark.parametrize("flaw", ["blur", "cutout", "jpeg"])
def test_flaws_of_the_configuration_reach_the_images(
    flaw: str, reference: list[Batch], tiny_shards: ShardSet
) -> None:
    strong = {"blur": 4, "cutout": 0.8, "jpeg": 90}[flaw]
    augment = SETTINGS.augment.model_copy(update={flaw: strong, "occasional": 0.5})
    (batch,) = take(training(tiny_shards, settings=SETTINGS.model_copy(update={"augment": augment})), 1)
    touched = (batch.images != reference[0].images).flatten(1).any(1)
    assert 0 < touched.sum() < BATCH, "some images, and the others are those drawn without it"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_images_are_of_the_type_and_order_asked_for(
    dtype: str, reference: list[Batch], tiny_shards: ShardSet
) -> None:
    settings = SETTINGS.model_copy(update={"dtype": dtype, "channels_last": True})
    (batch,) = take(training(tiny_shards, settings=settings), 1)
    assert batch.images.dtype == getattr(torch, dtype)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(batch.images.float(), reference[0].images, atol=0.005, rtol=0)


@pytest.mark.parametrize("start", range(1, 10))
def test_resuming_at_any_step_goes_on_with_the_same_batches(
    start: int, reference: list[Batch], tiny_shards: ShardSet
) -> None:
    for resumed, whole in zip(take(training(tiny_shards, start=start), 2), reference[start:], strict=False):
        assert same(resumed, whole)


def test_seeking_goes_on_with_the_same_batches(reference: list[Batch], tiny_shards: ShardSet) -> None:
    """Backwards, forwards, into what is prefetched, twice in a row, in the middle of an epoch's loop."""
    with training(tiny_shards) as loader:
        for step in (0, 3, 4, 1, 9, 0, 0, 8):
            loader.seek((step + 5) % 10)
            loader.seek(step)
            assert loader.step == step
            assert same(next(iter(loader)), reference[step]) and loader.step == step + 1
        loader.seek(4)
        for number, batch in enumerate(loader):
            assert same(batch, reference[(4, 5, 2, 3)[number]])
            if number == 1:
                loader.seek(2)
        assert number == 3 and loader.step == 4


def test_a_loop_shows_an_epoch_and_the_next_goes_on(reference: list[Batch], tiny_shards: ShardSet) -> None:
    with training(tiny_shards, start=2) as loader:
        shown = [*loader, *loader]
        for batch in loader:
            shown.append(batch)
            break
        shown.append(next(iter(loader)))
    assert len(shown) == 8 and all(map(same, shown, reference[2:]))


def test_epochs_end_where_they_should(tiny_shards: ShardSet) -> None:
    loader = training(tiny_shards, start=6)
    assert [len(list(loader.epoch())) for _ in range(3)] == [2, 4, 4]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_see_the_same_images_in_the_same_slots(
    world: int, reference: list[Batch], tiny_shards: ShardSet
) -> None:
    ranks = [take(training(tiny_shards, rank=rank, world=world, start=3), 2) for rank in range(world)]
    for whole, *parts in zip(reference[3:], *ranks, strict=False):
        for together, *shares in zip(tensors(whole), *map(tensors, parts), strict=True):
            assert torch.equal(torch.cat(shares), together)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("prefetch", [1, 4])
def test_threads_and_prefetch_change_nothing(
    threads: int, prefetch: int, reference: list[Batch], tiny_shards: ShardSet
) -> None:
    settings = SETTINGS.model_copy(update={"prefetch": prefetch})
    other = training(tiny_shards, settings=settings, threads=threads)
    assert all(map(same, take(other, 3), reference[:3]))


def test_batches_stay_as_they_were_while_others_are_made(
    reference: list[Batch], tiny_shards: ShardSet
) -> None:
    loader = training(tiny_shards)
    kept, copies = [], []
    for batch in take(loader, 8):
        kept.append(batch)
        copies.append([t.clone() for t in tensors(batch)])
    del loader
    for batch, copy, known in zip(kept, copies, reference, strict=False):
        assert all(map(torch.equal, tensors(batch), copy)) and same(batch, known)
    assert len({batch.images.data_ptr() for batch in kept}) == len(kept)


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("world", [1, 4])
def test_evaluation_shows_every_sample_once(split: str, world: int, tiny_shards: ShardSet) -> None:
    loaders = [sequential(tiny_shards, split, rank=rank, world=world) for rank in range(world)]
    assert len({loader.steps for loader in loaders}) == 1
    for _ in range(2):  # and again the next time
        index = torch.cat([batch.index for loader in loaders for batch in loader.epoch()]).numpy()
        assert (index == PADDING).sum() == len(index) - len(tiny_shards.split(split))
        assert np.array_equal(np.sort(index[index != PADDING]), tiny_shards.split(split))


def test_evaluation_images_do_not_depend_on_the_batch(tiny_shards: ShardSet) -> None:
    whole = list(sequential(tiny_shards, "test").epoch())
    parts = [list(sequential(tiny_shards, "test", rank=rank, world=2).epoch()) for rank in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(batch.images, torch.cat([share.images for share in shares]))


def test_a_damaged_sample_is_replaced_where_the_graph_has_conditionals(
    reference: list[Batch], tiny_shards: ShardSet, tmp_path: Path
) -> None:
    """The source's own Python runs as it is written, also in a graph whose conditionals DALI rewrites."""
    bad = int(reference[1].index[3])
    shards = damage(tiny_shards, [bad], tmp_path / "damaged")
    augment = SETTINGS.augment.model_copy(update={"jpeg": 50.0, "occasional": 0.5})
    loader = training(shards, settings=SETTINGS.model_copy(update={"augment": augment}))
    batches = take(loader, 3)
    assert loader.source.substitutes == {bad: alike(tiny_shards, bad)[0]}
    assert all(torch.isfinite(batch.images).all() for batch in batches)


@pytest.mark.parametrize("world", [1, 2])
def test_a_damaged_sample_is_replaced_and_counted(
    world: int, reference: list[Batch], tiny_shards: ShardSet, tmp_path: Path
) -> None:
    bad = int(reference[1].index[3])
    substitute = alike(tiny_shards, bad)[0]
    shards = damage(tiny_shards, [bad], tmp_path / "damaged")
    loaders = [training(shards, rank=rank, world=world) for rank in range(world)]
    ranks = [take(loader, 6) for loader in loaders]
    shown = [torch.cat(parts) for parts in zip(*[[b.index for b in rank] for rank in ranks], strict=True)]
    for whole, index in zip(reference, shown, strict=False):
        assert torch.equal(index, torch.where(whole.index == bad, substitute, whole.index))
    images = torch.cat([rank[1].images for rank in ranks])
    unharmed = shown[1] == reference[1].index
    assert torch.equal(images[unharmed], reference[1].images[unharmed]) and not unharmed[3]
    counted = [loader.source.substitutes for loader in loaders]
    assert all(one in ({}, {bad: substitute}) for one in counted) and {bad: substitute} in counted


@pytest.mark.parametrize("world", [1, 2])
def test_a_sample_that_cannot_be_decoded_is_replaced_and_counted(
    world: int,
    reference: list[Batch],
    tiny_shards: ShardSet,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its sum is right, so only the decoder finds it; the step is done again, the others are as they were."""
    bad = int(reference[1].index[3])
    first, second = alike(tiny_shards, bad)[:2]
    shards = spoil(tiny_shards, [bad, first], tmp_path / "spoilt")
    two = SETTINGS.model_copy(update={"max_bad": 2 / len(shards)})
    loaders = [training(shards, rank=rank, world=world, settings=two) for rank in range(world)]
    ranks = [take(loader, 8) for loader in loaders]
    for number, whole in enumerate(reference[:8]):
        index = torch.cat([rank[number].index for rank in ranks])
        replaced = torch.isin(whole.index, torch.tensor([bad, first]))
        assert torch.equal(index, torch.where(replaced, second, whole.index))
        images = torch.cat([rank[number].images for rank in ranks])
        assert torch.equal(images[~replaced], whole.images[~replaced])
        assert torch.equal(torch.cat([rank[number].labels for rank in ranks]), whole.labels)
    found = {index: shown for loader in loaders for index, shown in loader.source.substitutes.items()}
    assert found[bad] == second and set(found) <= {bad, first}
    assert f"sample {shards.keys[bad]} cannot be decoded, {shards.keys[second]} stands in" in (
        capsys.readouterr().err
    )
    with training(shards, settings=two) as loader:  # and after a seek, or resumed
        loader.seek(1)
        assert int(next(iter(loader)).index[3]) == second


def test_more_that_cannot_be_decoded_than_allowed_names_the_sample(
    tiny_shards: ShardSet, tmp_path: Path
) -> None:
    bad = int(tiny_shards.split("val")[2])
    shards = spoil(tiny_shards, [bad], tmp_path / "spoilt")
    with pytest.raises(DamagedDataError, match=rf"sample {shards.keys[bad]} cannot be decoded.*max_bad"):
        list(sequential(shards, "val"))


def test_more_damage_than_allowed_is_the_users_error(tiny_shards: ShardSet, tmp_path: Path) -> None:
    shards = damage(tiny_shards, [int(i) for i in tiny_shards.split("train")[:9]], tmp_path / "damaged")
    with pytest.raises(DamagedDataError, match="moleprint verify"):
        take(training(shards), 10)


def test_padding_needs_no_sample_of_another_split(tiny_shards: ShardSet, tmp_path: Path) -> None:
    """A validation split can be read whole although the set's first sample, of another split, is damaged."""
    assert 0 not in tiny_shards.split("val")
    shards = damage(tiny_shards, [0], tmp_path / "damaged")
    index = torch.cat([batch.index for batch in sequential(shards, "val").epoch()])
    assert (index == PADDING).any() and set(index.tolist()) - {PADDING} == set(shards.split("val").tolist())


@pytest.mark.parametrize(
    ("sampler", "batch", "world", "expected"),
    [
        ("balanced", 16, 3, "3 ranks × 2 classes; try 18"),
        ("patient", 6, 2, "2 ranks × 2 classes; try 8"),
        ("shuffle", 16, 3, "3 ranks; try 15"),
    ],
)
def test_ranks_that_cannot_share_the_batch(
    sampler: str, batch: int, world: int, expected: str, tiny_shards: ShardSet
) -> None:
    settings = Settings(sampler=sampler, global_batch=batch)
    with pytest.raises(UserError, match=expected):
        training_sampler(tiny_shards, settings, seed=0, world_size=world)


@pytest.mark.parametrize("sampler", ["balanced", "patient", "shuffle"])
def test_the_configured_sampler_is_used(sampler: str, tiny_shards: ShardSet) -> None:
    settings = SETTINGS.model_copy(update={"sampler": sampler, "steps_per_epoch": 0})
    made = training_sampler(tiny_shards, settings, seed=0, world_size=1)
    assert type(made).__name__.lower() == sampler
    assert made.steps == -(-len(tiny_shards.split("train")) // BATCH)


def test_augmentation_can_be_off(tiny_shards: ShardSet) -> None:
    off = Augment(
        symmetries=False, rotation=0, scale=(1, 1), shift=0, brightness=0, contrast=0, saturation=0, hue=0
    )
    settings = SETTINGS.model_copy(update={"augment": off})
    (plain,) = take(training(tiny_shards, settings=settings), 1)
    every = list(sequential(tiny_shards, "train").epoch())
    images = {int(i): image for batch in every for i, image in zip(batch.index, batch.images, strict=True)}
    assert torch.equal(plain.images, torch.stack([images[int(i)] for i in plain.index]))
