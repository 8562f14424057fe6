"""A set at a glance: its facts in words, and each split and class as tiles that show what was packed."""

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from configs.packing import Pack
from shards.facts import describe
from shards.pack import pack
from shards.shardset import ShardSet
from shards.sheet import MOST_HEIGHT, contact_sheet, evenly, make_tile, plan_bands, shortened


def test_the_facts_are_those_of_the_set(tiny_shards: ShardSet) -> None:
    lines = describe(tiny_shards)
    summary = tiny_shards.summary()
    assert lines[: len(summary)] == summary
    said = {line.split()[0]: line for line in lines[len(summary) + 1 :]}
    tars = [path.stat().st_size for path in tiny_shards.paths]
    assert f"{len(tars)} tars" in said["files"]
    sizes = tiny_shards.sizes
    assert all(f"{n:,}" in said["image"] for n in (sizes.min(), sizes.max()))
    assert f"{sum(tars) / 1e6:,.1f} MB" in said["files"]
    images = np.bincount(tiny_shards.groups)
    classes = [len(set(tiny_shards.labels[tiny_shards.groups == group])) for group in range(len(images))]
    assert f"median {np.median(images):g} images, at most {images.max()};" in said["group"]
    assert f"{sum(n > 1 for n in classes)} of {len(images)} groups" in said["group"]
    assert f"width {tiny_shards.widths.min()} to {tiny_shards.widths.max()}" in " ".join(lines)
    blank = sum(not sex for sex in tiny_shards.samples["sex"].to_pylist()) / len(tiny_shards)
    assert f"sex {blank:.1%}" in said["metadata"]
    assert "0 exact" in said["duplicates"] and "0 images" in said["rejected"]
    assert "sex" in said["metadata"] and "notice" not in said and "originals" not in said
    assert max(map(len, lines)) <= 100


def test_bands_are_split_by_split_and_class_by_class(tiny_shards: ShardSet) -> None:
    bands, remarks = plan_bands(tiny_shards, columns=8, rows=2, tile=128)
    assert not remarks
    expected = [
        f"{name} · {label} · {about['classes'][label]:,} image"
        for name, about in tiny_shards.manifest["splits"].items()
        for label in tiny_shards.classes
    ]
    assert [band.caption.removesuffix("s") for band in bands] == expected
    assert [band.positive for band in bands] == [False, True] * 3
    for band, name in zip(bands, np.repeat(["train", "val", "test"], 2), strict=True):
        assert len(band.shown) <= 16
        assert set(tiny_shards.labels[band.shown]) == {int(band.positive)}
        assert np.isin(band.shown, tiny_shards.split(name)).all()


def test_a_sheet_shows_the_images_that_were_packed(tiny_shards: ShardSet, tmp_path: Path) -> None:
    for path in (tmp_path / "one.png", tmp_path / "new" / "two.png"):
        contact_sheet(tiny_shards, path, columns=4, rows=1, tile=64)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "new" / "two.png").read_bytes()
    sheet = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"))
    bands, _ = plan_bands(tiny_shards, columns=4, rows=1, tile=64)
    for index in (bands[0].shown[0], bands[3].shown[0]):
        tile = np.asarray(make_tile(*stored(tiny_shards, int(index)), side=64))
        windows = np.lib.stride_tricks.sliding_window_view(sheet[:, 24 : 24 + 64], (64, 64, 3))
        assert (windows[:, 0, 0] == tile).all(axis=(1, 2, 3)).any()


def stored(shards: ShardSet, index: int) -> tuple[bytes, int]:
    """A sample's JPEG and checksum."""
    data = shards.paths[shards.shard[index]].read_bytes()[shards.offsets[index] :][: shards.sizes[index]]
    return data, int(shards.crc32[index])


def jpeg(size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (200, 40, 40)).save(out, "JPEG", quality=95)
    return out.getvalue()


@pytest.mark.parametrize("size", [(400, 200), (90, 300), (20, 20), (3000, 1)])
def test_tiles_are_letterboxed_not_stretched(size: tuple[int, int]) -> None:
    data = jpeg(size)
    tile = make_tile(data, zlib.crc32(data), 60)
    assert tile is not None and tile.size == (60, 60)
    red = np.asarray(tile)[..., 1] < 130
    height, width = red.any(axis=1).sum(), red.any(axis=0).sum()
    scale = 60 / max(size)
    assert (width, height) == (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1))
    assert abs(red.any(axis=1).argmax() - (60 - height) // 2) <= 1
    assert abs(red.any(axis=0).argmax() - (60 - width) // 2) <= 1


def test_damaged_images_get_a_tile_that_says_so(tiny_shards: ShardSet, tmp_path: Path) -> None:
    data, crc32 = stored(tiny_shards, 0)
    assert make_tile(data, crc32 + 1, 64) is None
    for cut in (b"", b"no image", data[:100], data[: len(data) // 2]):  # the checksum is right
        assert make_tile(cut, zlib.crc32(cut), 64) is None
    gone = ShardSet(tmp_path, tiny_shards.manifest, tiny_shards.samples, tiny_shards.sha256)
    contact_sheet(gone, tmp_path / "sheet.png")
    pink = (np.asarray(Image.open(tmp_path / "sheet.png")) == (250, 226, 226)).all(axis=2)
    bands, _ = plan_bands(gone, columns=8, rows=2, tile=128)
    assert pink.sum() > 0.8 * 128**2 * sum(len(band.shown) for band in bands)


def test_many_bands_do_not_make_a_giant(tiny_pack: Pack, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"folds": 8, "output": tmp_path / "shards", "near_duplicates": None}
    pack(Pack.model_validate(tiny_pack.model_dump() | fields), progress=False)
    shards = ShardSet.open(tmp_path / "shards")
    contact_sheet(shards, tmp_path / "sheet.png", columns=2, rows=6, tile=400)
    assert Image.open(tmp_path / "sheet.png").height < MOST_HEIGHT + 400
    bands, remarks = plan_bands(shards, columns=2, rows=6, tile=400)
    assert "1 row a band instead of 6" in remarks[0] and "not shown: " in remarks[1]
    assert len(bands) < 16


def test_samples_are_chosen_evenly() -> None:
    assert evenly(np.arange(100), 4).tolist() == [12, 37, 62, 87]
    assert evenly(np.arange(3), 8).tolist() == [0, 1, 2]
    assert len(evenly(np.arange(0), 8)) == 0


def test_long_names_lose_their_middle() -> None:
    font = ImageFont.load_default(size=12)
    short = shortened("ISIC_0000000000000000000000001", font, 80)
    assert short.startswith("ISIC") and short.endswith("1") and "…" in short
    assert font.getlength(short) <= 80
    assert shortened("short", font, 80) == "short"


def test_nothing_positive_is_refused(tiny_shards: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        contact_sheet(tiny_shards, tmp_path / "sheet.png", columns=0)
    assert not list(tmp_path.iterdir())
