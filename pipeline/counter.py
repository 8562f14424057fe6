"""Random numbers as a pure function of (seed, purpose, epoch, step): any draw can be drawn again, alone."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a draw is for: streams of different purposes share no numbers."""

    ORDER = 1
    OWN_PATIENT = 2
    AUGMENT = 3
    MINING = 4
    BLUR = 5
    CUTOUT = 6
    JPEG = 7
    PROBE = 8
    DROPOUT = 9


def generator(seed: int, purpose: Purpose, epoch: int = 0, step: int = 0) -> np.random.Generator:
    """A generator keyed by its arguments; counter-based (Philox 4×64, Salmon 2011), microseconds to make.

    Epoch and step are the high words of the counter, so that 2**128 draws lie between neighbours.
    """
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, step, epoch]))
