"""The sheet shows what training sees: the loader's images beside their originals."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_source import damage

from configs.errors import DamagedDataError
from configs.loading import Augment
from configs.loading import Loader as Settings
from pipeline.augmented import APART, augmented_sheet, strengths
from shards.shardset import ShardSet
from shards.sheet import CAPTION, GAP, KEY, MARGIN

TILE = 40
STILL = Settings(size=TILE, augment=Augment(preset="none"))


def drawn(shards: ShardSet, path: Path, settings: Settings, **options: int) -> np.ndarray:
    """The sheet's pixels."""
    augmented_sheet(shards, settings, path, **{"seed": 0, "tile": TILE, **options})
    return np.asarray(Image.open(path)).astype(int)


def row_of_tiles(sheet: np.ndarray, versions: int) -> list[np.ndarray]:
    """The first row's original and versions; its place is told by the original's key, far from the head."""
    step = CAPTION + TILE + KEY
    for top in range(MARGIN, len(sheet) - step):
        line = sheet[top, MARGIN : MARGIN + TILE]
        if (line < 235).any(axis=1).all() and (sheet[top - 4, MARGIN : MARGIN + TILE] == 255).all():
            break
    starts = [MARGIN, *(MARGIN + TILE + APART + n * (TILE + GAP) for n in range(versions))]
    return [sheet[top : top + TILE, x : x + TILE] for x in starts]


def test_versions_are_the_original_as_augmented(tiny_shards: ShardSet, tmp_path: Path) -> None:
    still = row_of_tiles(drawn(tiny_shards, tmp_path / "still.png", STILL, versions=3), 3)
    assert np.array_equal(still[1], still[2]) and np.array_equal(still[1], still[3])
    assert np.abs(still[0] - still[1]).mean() < 20, "the central square of it"
    moving = row_of_tiles(drawn(tiny_shards, tmp_path / "moving.png", Settings(size=TILE), versions=3), 3)
    assert np.array_equal(moving[0], still[0])
    for one, other in ((1, 2), (2, 3), (1, 3)):
        assert np.abs(moving[one] - moving[other]).mean() > 8, "each epoch another"


def test_the_sheet_is_a_function_of_set_settings_and_seed(tiny_shards: ShardSet, tmp_path: Path) -> None:
    settings = Settings(size=24, dtype="bfloat16", channels_last=True)
    first, again = (drawn(tiny_shards, tmp_path / "a.png", settings) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, drawn(tiny_shards, tmp_path / "a.png", settings, seed=1))
    rows = [drawn(tiny_shards, tmp_path / "a.png", settings, rows=n).shape[0] for n in (1, 2, 3)]
    assert np.diff(rows).tolist() == [len(tiny_shards.classes) * (TILE + KEY)] * 2


def test_many_rows_are_cut_to_what_viewers_can_show(tiny_shards: ShardSet, tmp_path: Path) -> None:
    assert drawn(tiny_shards, tmp_path / "a.png", STILL, rows=1000, tile=700, versions=1).shape[0] < 7000


def test_a_damaged_sample_is_named(tiny_shards: ShardSet, tmp_path: Path) -> None:
    shards = damage(tiny_shards, tiny_shards.split("train").tolist(), tmp_path / "damaged")
    with pytest.raises(DamagedDataError, match="is damaged"):
        drawn(shards, tmp_path / "a.png", STILL)
    assert not (tmp_path / "a.png").exists()


def test_strengths_name_what_is_on() -> None:
    assert strengths(Augment(preset="none")) == "augmentation: none"
    said = strengths(Augment(jpeg=70, occasional=0.3))
    assert "rotation ±30 degrees" in said and "JPEG quality from 30 (of 30%)" in said and "blur" not in said
    assert "JPEG" not in strengths(Augment(jpeg=70, occasional=0))
