"""The transform against SciPy, copies near and other images far, the search against a slow loop."""

import io
import subprocess
import sys

import numpy as np
import pytest
import scipy.fft
from PIL import Image

from configs.errors import UserError
from shards.near import FEATURELESS, HASH_BITS, low_frequencies, near_pairs, perceptual_hash


def blotches(seed: int, width: int = 200, height: int = 150) -> Image.Image:
    """A smooth random picture, as rich in frequencies as a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (24, 24), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def compressed(image: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Image.open(io.BytesIO(out.getvalue()))


def apart(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count()


def hashed(image: Image.Image) -> bytes:
    return perceptual_hash(np.asarray(image))


def planted(count: int, seed: int) -> np.ndarray:
    """Random hashes (count, 4); every third is an earlier one with up to 40 bits turned over."""
    draw = np.random.default_rng(seed)
    bits = draw.integers(0, 2, (count, HASH_BITS), dtype=np.uint8)
    for row in range(3, count, 3):
        bits[row] = bits[draw.integers(row)]
        bits[row, draw.choice(HASH_BITS, draw.integers(41), replace=False)] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64)


def slow_pairs(hashes: np.ndarray, distance: int) -> list[tuple[int, int, int]]:
    words = [row.tobytes() for row in hashes]
    every = [(i, j, apart(words[i], words[j])) for i in range(len(words)) for j in range(i + 1, len(words))]
    return [pair for pair in every if pair[2] <= distance]


def test_the_transform_is_scipys() -> None:
    square = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    whole = scipy.fft.dctn(square.astype(np.float64), norm="ortho")
    np.testing.assert_allclose(low_frequencies(square), whole[1:17, 1:17], atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_copies_are_near_and_others_far(seed: int) -> None:
    image = blotches(seed)
    mine = hashed(image)
    copies = {
        "quality 50": compressed(image, 50),
        "twice the size": image.resize((400, 300), Image.Resampling.LANCZOS),
        "smaller": image.resize((156, 117), Image.Resampling.LANCZOS),
        "another shape": image.resize((150, 150), Image.Resampling.LANCZOS),
        "darker": image.point(lambda v: v * 0.55),
    }
    distances = {name: apart(mine, hashed(copy)) for name, copy in copies.items()}
    assert max(distances.values()) <= 16, distances
    assert all(apart(mine, hashed(blotches(other))) > 64 for other in range(100, 120))


def test_half_the_bits_are_set() -> None:
    assert [int.from_bytes(hashed(blotches(seed)), "big").bit_count() for seed in range(5)] == [128] * 5


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (90, 37)])
@pytest.mark.parametrize("level", [0, 77, 255])
def test_an_even_image_is_featureless(shape: tuple[int, int], level: int) -> None:
    assert perceptual_hash(np.full(shape, level, dtype=np.uint8)) == FEATURELESS


def test_stripes_are_featureless() -> None:
    stripes = np.tile(np.arange(0, 256, 2, dtype=np.uint8), (128, 1))
    assert perceptual_hash(stripes) == perceptual_hash(stripes.T) == FEATURELESS


def test_featureless_images_are_near_nothing() -> None:
    hashes = planted(9, 0)
    hashes[[0, 2, 7]] = np.frombuffer(FEATURELESS, np.uint64)
    hashes[8] = hashes[4]
    pairs, distances = near_pairs(hashes, 0)
    assert pairs.tolist() == [[4, 8]] and distances.tolist() == [0]


@pytest.mark.parametrize("count", [2, 3, 33, 700])  # within a block of rows, one more, several
@pytest.mark.parametrize("distance", [0, 1, 24, 40, 100])
def test_all_pairs_are_found(count: int, distance: int) -> None:
    hashes = planted(count, seed=count)
    pairs, distances = near_pairs(hashes, distance)
    found = [(*pair, bits) for pair, bits in zip(pairs.tolist(), distances.tolist(), strict=True)]
    assert found == slow_pairs(hashes, distance)
    assert pairs.dtype == distances.dtype == np.int64


@pytest.mark.parametrize("distance", [30, 100])
def test_pairs_are_found_beyond_a_block(distance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = planted(150, seed=1)
    pairs, distances = near_pairs(hashes, distance)
    monkeypatch.setattr("shards.near._COLUMNS", 7)
    for one, other in zip(near_pairs(hashes, distance), (pairs, distances), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_have_no_pair(count: int) -> None:
    pairs, distances = near_pairs(planted(count, 0), HASH_BITS)
    assert pairs.shape == (0, 2) and distances.shape == (0,)
    assert pairs.dtype == distances.dtype == np.int64


def test_a_small_set_may_be_all_alike() -> None:
    """Up to the limit."""
    pairs, _ = near_pairs(np.repeat(planted(1, 0), 101, axis=0), 0)
    assert len(pairs) == 50 * 101
    assert pairs.tolist() == [[i, j] for i in range(101) for j in range(i + 1, 101)]


@pytest.mark.parametrize(("copies", "distance"), [(102, 0), (600, 12)])
def test_too_many_pairs_are_an_error(copies: int, distance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.near._FEW", 0)
    with pytest.raises(UserError, match=rf"^pack.near_duplicates: .* {distance} bits.*lower"):
        near_pairs(np.repeat(planted(1, 0), copies, axis=0), distance)


def test_importing_it_is_cheap() -> None:
    heavy = "sorted({'numba', 'scipy', 'torch', 'nvidia'} & set(sys.modules))"
    code = f"import sys, shards.near; print({heavy})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
