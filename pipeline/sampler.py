"""Which samples make up step `step` of epoch `epoch`: a pure function, the same for any number of ranks.

A sampler yields the global batch; rank r of W takes its slice, so no rank can run out before another:

    global batch   │ b m b m b m b m │      (balanced: the classes alternate, so every slice is balanced)
    2 ranks        │ rank 0  │ rank 1│
    4 ranks        │ 0 │ 1 │ 2 │ 3   │
"""

from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from pipeline.counter import Purpose, generator

Indices = NDArray[np.int64]
PADDING = -1


class Sampler(Protocol):
    """What the loader needs of any sampler."""

    steps: int
    """Steps an epoch."""

    def batch(self, epoch: int, step: int) -> Indices:
        """Sample indices (global_batch,) of a step."""


def rank_slice(batch: Indices, rank: int, world_size: int) -> slice:
    """The slots of a global batch that belong to a rank.

    Raises:
        UserError: if the ranks do not divide the batch.
    """
    check_world_size(len(batch), world_size)
    share = len(batch) // world_size
    return slice(rank * share, (rank + 1) * share)


def check_world_size(global_batch: int, world_size: int, classes: int = 1) -> None:
    """Raises UserError unless every rank's slice is whole (and holds as many samples of every class)."""
    if global_batch % (world_size * classes):
        unit = world_size * classes
        near = max(unit, round(global_batch / unit) * unit)
        why = f"{world_size} ranks" + (f" × {classes} classes" if classes > 1 else "")
        raise UserError(f"loader.global_batch={global_batch} cannot be shared by {why}; try {near}")


class Sequential:
    """Each index once, in order; the last batch is padded with −1."""

    def __init__(self, indices: Indices, global_batch: int) -> None:
        self.steps = -(-len(indices) // global_batch)
        self._padded = np.full(self.steps * global_batch, PADDING, np.int64)
        self._padded[: len(indices)] = indices
        self._global_batch = global_batch

    def batch(self, epoch: int, step: int) -> Indices:
        """Sample indices (global_batch,) of a step; every epoch is the same."""
        return self._padded[step * self._global_batch :][: self._global_batch].copy()


class Shuffle:
    """A true permutation each epoch; the last batch is filled up from the epoch's own beginning."""

    def __init__(self, indices: Indices, global_batch: int, *, seed: int, steps: int = 0) -> None:
        self.steps = steps or -(-len(indices) // global_batch)
        self._stream = _Stream(indices, seed, stream=0)
        self._global_batch = global_batch
        self._fixed_steps = bool(steps)

    def batch(self, epoch: int, step: int) -> Indices:
        """Sample indices (global_batch,) of a step."""
        if self._fixed_steps:  # an epoch is a stretch of the endless stream
            return self._stream.take((epoch * self.steps + step) * self._global_batch, self._global_batch)
        order = self._stream.permutation(epoch)
        return order[np.arange(step * self._global_batch, (step + 1) * self._global_batch) % len(order)]


class Balanced:
    """As many samples of every class in a batch, the classes alternating slot by slot.

    Each class is an endless stream of its own permutations, running on from epoch to epoch: no sample is
    seen a second time before all others of its class were seen once.
    """

    def __init__(
        self, indices: Indices, labels: Indices, global_batch: int, *, seed: int, steps: int = 0
    ) -> None:
        classes = np.unique(labels[indices])
        check_world_size(global_batch, 1, len(classes))
        self.steps = steps or -(-len(indices) // global_batch)
        self._rows = global_batch // len(classes)
        self._streams = [_Stream(indices[labels[indices] == c], seed, stream=int(c)) for c in classes]

    def batch(self, epoch: int, step: int) -> Indices:
        """Sample indices (global_batch,) of a step."""
        start = (epoch * self.steps + step) * self._rows
        return np.stack([stream.take(start, self._rows) for stream in self._streams], axis=1).reshape(-1)


class Patient(Balanced):
    """Balanced, and in every second row negatives come from the positive sample's own patient, if it has any.

    The ugly-duckling comparison: within one patient skin tone, camera and identity tell nothing. The other
    rows keep patients without a positive in play.
    """

    def __init__(
        self,
        indices: Indices,
        labels: Indices,
        groups: Indices,
        global_batch: int,
        *,
        positive: int,
        seed: int,
        steps: int = 0,
    ) -> None:
        super().__init__(indices, labels, global_batch, seed=seed, steps=steps)
        self._seed, self._groups = seed, groups
        self._classes = [int(c) for c in np.unique(labels[indices])]
        self._positive = self._classes.index(positive)
        self._own: dict[tuple[int, int], Indices] = {}
        by_group = indices[np.argsort(groups[indices], kind="stable")]
        for members in np.split(by_group, np.flatnonzero(np.diff(groups[by_group])) + 1):
            if (labels[members] == positive).any():
                for c in self._classes:
                    self._own[int(groups[members[0]]), c] = members[labels[members] == c]

    def batch(self, epoch: int, step: int) -> Indices:
        """Sample indices (global_batch,) of a step."""
        rows = super().batch(epoch, step).reshape(self._rows, -1).copy()
        draws = generator(self._seed, Purpose.OWN_PATIENT, epoch, step).random(rows.shape)
        for row in range(0, self._rows, 2):
            patient = int(self._groups[rows[row, self._positive]])
            for column, c in enumerate(self._classes):
                own = self._own[patient, c]
                if column != self._positive and len(own):
                    rows[row, column] = own[int(draws[row, column] * len(own))]
        return rows.reshape(-1)


class _Stream:
    """An endless stream of permutations of `members`, open at any position."""

    def __init__(self, members: Indices, seed: int, stream: int) -> None:
        self._members, self._seed, self._stream = members, seed, stream
        self.permutation = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, number: int) -> Indices:
        return generator(self._seed, Purpose.ORDER, number, self._stream).permutation(self._members)

    def take(self, start: int, count: int) -> Indices:
        """Positions start .. start + count of the stream, (count,)."""
        number, position = np.divmod(np.arange(start, start + count), len(self._members))
        taken = np.empty(count, np.int64)
        for n in np.unique(number):
            taken[number == n] = self.permutation(int(n))[position[number == n]]
        return taken
