"""No leak over any seed, shares where they were asked for."""

from pathlib import Path

import numpy as np
import pytest

from configs.packing import Pack
from shards.plan import make_plan
from shards.records import read
from shards.shardset import SPLITS
from shards.split import connect, split, tie, undersample

RATIOS = (0.7, 0.1, 0.2)
ISIC = Path(__file__).parents[3] / "shared/data/isic2020"


def cohort(seed: int, patients: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Patients with one to fifty images each, a class of about 3 %: (group, label) of each image."""
    draw = np.random.default_rng(seed)
    sizes = np.minimum(50, draw.geometric(0.1, patients))
    groups = draw.permutation(np.repeat(np.arange(patients), sizes))
    return groups, (draw.random(len(groups)) < 0.03 + 0.1 * (groups % 7 == 0)).astype(np.int64)


@pytest.mark.parametrize("seed", range(25))
def test_no_group_or_listed_duplicate_crosses_splits(seed: int) -> None:
    groups, labels = cohort(seed)
    pairs = np.random.default_rng(seed).integers(0, len(groups), (30, 2))
    parts = split(tie(groups, pairs), labels, RATIOS, seed)
    assert all(len(set(parts[groups == group])) == 1 for group in range(groups.max() + 1))
    assert (parts[pairs[:, 0]] == parts[pairs[:, 1]]).all()
    assert set(parts) == {0, 1, 2}


@pytest.mark.parametrize("seed", range(10))
def test_shares_of_images_groups_and_classes_are_near_those_asked(seed: int) -> None:
    groups, labels = cohort(seed, patients=1000)
    parts = split(groups, labels, RATIOS, seed)
    first = np.unique(groups, return_index=True)[1]
    for part, ratio in enumerate(RATIOS):
        mine = parts == part
        assert mine.mean() == pytest.approx(ratio, abs=0.01)
        assert mine[first].mean() == pytest.approx(ratio, abs=0.01)
        assert mine[labels == 1].mean() == pytest.approx(ratio, abs=0.01)


def test_sizes_of_groups_are_stratified() -> None:
    groups, labels = cohort(0, patients=1000)
    parts = split(groups, labels, RATIOS, 0)
    sizes, first = np.bincount(groups), np.unique(groups, return_index=True)[1]
    means = [sizes[parts[first] == part].mean() for part in range(3)]
    assert means == pytest.approx([sizes.mean()] * 3, rel=0.05)


def test_the_seed_decides_and_repeats() -> None:
    groups, labels = cohort(1)
    one, again, other = (split(groups, labels, RATIOS, seed) for seed in (3, 3, 4))
    assert (one == again).all() and (one != other).any()


@pytest.mark.parametrize("seed", range(20))
def test_three_positive_groups_reach_three_splits(seed: int) -> None:
    groups = np.repeat(np.arange(60), 5)
    labels = np.isin(groups, [7, 20, 41]).astype(np.int64)
    parts = split(groups, labels, RATIOS, seed)
    assert set(parts[labels == 1]) == {0, 1, 2}


def test_connect_follows_chains() -> None:
    assert connect(6, np.array([[4, 5], [1, 4], [0, 3]])).tolist() == [0, 1, 2, 0, 1, 1]


def test_undersample_evens_out_the_classes() -> None:
    labels = np.array([0] * 50 + [1] * 7 + [2] * 20)
    rows = undersample(labels, 0)
    assert np.bincount(labels[rows]).tolist() == [7, 7, 7]
    assert len(set(rows)) == 21 and (np.diff(rows) > 0).all()
    assert rows.tolist() == undersample(labels, 0).tolist() != undersample(labels, 1).tolist()


@pytest.mark.skipif(not ISIC.is_dir(), reason=f"needs the ISIC 2020 tables in {ISIC}")
@pytest.mark.parametrize("action", ["tie", "drop"])
def test_the_real_isic_2020_table_splits_as_asked(action: str) -> None:
    duplicates = ISIC / "ISIC_2020_Training_Duplicates.csv"
    settings = Pack(
        table=ISIC / "ISIC_2020_Training_GroundTruth_v2.csv",
        id_column="image_name",
        duplicates=duplicates,
        duplicates_action=action,
    )
    plan = make_plan(settings, read(settings))
    pairs = [line.split(",") for line in duplicates.read_text().split()[1:]]
    split_of = dict(zip(plan.records.keys, plan.splits, strict=True))
    if action == "drop":
        assert len(plan.records) == 33_126 - 425
        assert all((one in split_of) != (other in split_of) for one, other in pairs)
        assert all(min(pair) in split_of for pair in pairs)
    else:
        assert len(plan.records) == 33_126
        assert all(split_of[one] == split_of[other] for one, other in pairs)
    patients = [set(plan.records.groups[plan.splits == part]) for part in range(3)]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 2056
    melanoma = plan.records.labels == 1
    for part, ratio in enumerate(RATIOS):
        mine = plan.splits == part
        shares = [mine.mean(), len(patients[part]) / 2056, mine[melanoma].mean()]
        assert shares == pytest.approx([ratio] * 3, abs=0.01), SPLITS[part]
