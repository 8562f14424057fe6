"""Near duplicates: a perceptual hash of each photograph, and all pairs of hashes that differ in few bits.

A photograph that was compressed anew, resized or scanned again has other bytes but nearly the same hash. Of
the 50 million pairs of different lesions in HAM10000 one is within 32 bits, and it is one photograph under
two names; the next, at 36, are two small dark moles amid bare skin. Of the 3,207 pairs of one lesion 103 are,
and most of the others about 128 apart, as two lesions are: only a group column tells of those.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from configs.errors import UserError
from shards.files import atomic

HASH_BITS = 256
FEATURELESS = bytes(HASH_BITS // 8)
"""The hash of an image without structure: of any other, at least half the bits are set."""

_SIDE = 64  # pixels of the square that is transformed
_LOW = 16  # frequencies along each axis, from the first above 0
_ROUNDING = 12**-0.5  # grey levels, standard deviation: what rounding pixels to 8 bits adds to a coefficient
_ROWS, _COLUMNS = 32, 4096  # hashes compared with each other at a time: their bits stay in a core's cache
_MOST_BY_TWO = 40  # bits: chance leaves two words, 128 bits, so close once in 100,000 pairs
_FEW = 1_000_000  # pairs that are no burden, be the images few and all alike
_MOST = 50  # pairs an image


def _cosines(side: int, frequencies: int) -> NDArray[np.float64]:
    """Rows 1 ... frequencies of the orthonormal DCT-II matrix, (frequencies, side)."""
    angles = np.pi / side * np.outer(np.arange(1, frequencies + 1), np.arange(side) + 0.5)
    return np.asarray(np.sqrt(2 / side) * np.cos(angles), dtype=np.float64)


_COSINES = _cosines(_SIDE, _LOW)


def low_frequencies(square: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Frequencies 1 ... 16 along both axes, (16, 16), of the orthonormal DCT-II of a (64, 64) square.

    Two small products, since a worker that imports scipy.fft waits as long as for thousands of hashes.
    """
    return np.asarray(_COSINES @ square @ _COSINES.T, dtype=np.float64)


def perceptual_hash(grey: NDArray[np.uint8]) -> bytes:
    """What an image looks like in 256 bits: pHash (Zauner 2010), with 16 x 16 frequencies in place of 8 x 8.

    The image is brought to 64 x 64 whatever its shape. Each frequency gives one bit: is it above the median?
    Those constant along an axis are left out, as in pHash: they tell the dark rim of the dermoscope's view,
    and where the mole is, more than what it looks like.

    Args:
        grey: (height, width), any size.

    Returns:
        32 bytes, row by row; `FEATURELESS` where most frequencies are weaker than the rounding of pixels, as
        in an all-black image: its bits would be noise, or the same for every such image.
    """
    # A triangle filter: with a box, resized copies are three times as many bits apart (HAM10000).
    if grey.shape != (_SIDE, _SIDE):
        grey = np.asarray(Image.fromarray(grey).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR))
    values = low_frequencies(grey).ravel()
    half = HASH_BITS // 2
    if np.partition(np.abs(values), half)[half] < _ROUNDING:
        return FEATURELESS
    return np.packbits(values >= np.partition(values, half)[half]).tobytes()


def near_pairs(hashes: NDArray[np.uint64], distance: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All pairs of images whose hashes differ in at most `distance` bits; featureless images are in none.

    Each hash is compared with each other one, on all cores: 33,126 take half a second on two, 401,059
    a minute.

    Args:
        hashes: (n, 4), the bytes of `perceptual_hash` as they lie in memory.
        distance: bits; 0 for equal hashes only.

    Returns:
        pairs (m, 2) of rows, the lower one first, in ascending order, and their distances (m,) in bits.

    Raises:
        UserError: there are more than 50 pairs an image.
    """
    rows = np.flatnonzero(hashes.any(axis=1))
    words = np.ascontiguousarray(hashes[rows].T)
    most = max(_MOST * len(hashes), _FEW)
    total, parts = 0, [np.empty((3, 0), dtype=np.int64)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for part in pool.map(lambda start: _compare(words, start, distance), range(0, len(rows), _ROWS)):
            total += part.shape[1]
            parts.append(part)
            if total > most:
                pool.shutdown(cancel_futures=True)
                raise UserError(
                    f"pack.near_duplicates: more than {_MOST} pairs an image are within {distance} bits, too "
                    "many to be copies of each other; tied, most images would land in one split. Set it "
                    "lower (32 suits photographs), or remove the copies if there really are so many"
                )
    one, other, bits = np.concatenate(parts, axis=1)
    order = np.lexsort((other, one))
    return rows[np.stack([one, other], axis=1)[order]], bits[order]


def find_pairs(path: Path, hashes: NDArray[np.uint64], distance: int) -> NDArray[np.int64]:
    """`near_pairs` as one array (m, 3) of row, later row and distance, kept in a file."""
    pairs, bits = near_pairs(hashes, distance)
    found = np.concatenate([pairs, bits[:, None]], axis=1)
    with atomic(path) as file:
        np.save(file, found)
    return found


def found_pairs(path: Path) -> NDArray[np.int64] | None:
    """What `find_pairs` has kept, if it has."""
    try:
        return np.asarray(np.load(path))
    except (OSError, ValueError, EOFError):
        return None


def _compare(words: NDArray[np.uint64], start: int, distance: int) -> NDArray[np.int64]:
    """Pairs of a hash in start ... start + _ROWS - 1 with a later one.

    Args:
        words: (4, n), one hash a column.

    Returns:
        (3, m): row, later row, distance in bits.
    """
    # Half of one word's bits differ by chance, so that a few words settle nearly all pairs.
    settle = 2 if distance <= _MOST_BY_TWO else 3
    mine, found = words[:, start : start + _ROWS, None], [np.empty((3, 0), dtype=np.int64)]
    for first in range(start, words.shape[1], _COLUMNS):
        others = words[:, None, first : first + _COLUMNS]
        bits = np.bitwise_count(mine[0] ^ others[0])
        for word in range(1, settle):
            bits += np.bitwise_count(mine[word] ^ others[word])
        if bits.min() > distance:
            continue
        one, other = np.divmod(np.flatnonzero(bits <= distance), bits.shape[1])
        one, other = one + start, other + first
        exact = np.bitwise_count(words[:, one] ^ words[:, other]).sum(axis=0, dtype=np.int64)
        found.append(np.stack([one, other, exact])[:, (one < other) & (exact <= distance)])
    return np.concatenate(found, axis=1)
