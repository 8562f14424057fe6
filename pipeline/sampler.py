"""Which samples make up step `step` of epoch `epoch`: a pure function, the same for any number of ranks.

A sampler yields the global batch; rank r of W takes its slice, so no rank can run out before another:

    global batch   │ b m b m b m b m │      (balanced: the classes alternate, so every slice is balanced)
    2 ranks        │ rank 0  │ rank 1│
    4 ranks        │ 0 │ 1 │ 2 │ 3   │

For sets larger than the page cache the samples can be permuted in windows of shards, drawn anew each epoch:

    shards, shuffled   │ 7 │ 2 │ 5 │ 0 │ 3 │ 6 │ 1 │ 4 │
    windows of 3       │  permuted │  permuted │ perm. │
"""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError
from pipeline.counter import Purpose, generator

Indices = NDArray[np.int64]
_Members = NDArray[np.signedinteger[Any]]
"""Indices of 32 bits where these hold them: an epoch's order then takes half the memory."""
PADDING = -1
_SHARDS, _CIRCLES = 2**63 - 1, 2**63 - 2
"""Streams of the orders of shards and of classes: no class has such a number."""


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


@dataclass(frozen=True)
class Windows:
    """Permute the samples of a few shards at a time instead of the whole split's.

    Every sample is still shown exactly once before any is shown again, and a shard once begun is finished
    within its window. Samples that share a shard are shown nearer to each other than chance would have them:
    packing shuffles before it cuts shards, so that a shard is a random part of its split.

    Replayed through a cache of a fifth of the set, where each read brings 8 neighbours along (128 KiB
    of 16 KB images, as of a mapped file): an epoch of `shuffle` reads 6.6 times the set; in windows, once.
    """

    shard: Indices
    """(N,) each sample's shard, of the whole set."""
    size: int
    """Shards in a window, 1 or more."""


class Shuffle:
    """A true permutation each epoch; the last batch is filled up from the epoch's own beginning."""

    def __init__(
        self,
        indices: Indices,
        global_batch: int,
        *,
        seed: int,
        steps: int = 0,
        windows: Windows | None = None,
    ) -> None:
        self.steps = steps or -(-len(indices) // global_batch)
        (self._stream,) = _streams({0: _compact(indices)}, seed, windows)
        self._global_batch = global_batch
        self._fixed_steps = bool(steps)

    def batch(self, epoch: int, step: int) -> Indices:
        """Sample indices (global_batch,) of a step."""
        if self._fixed_steps:  # an epoch is a stretch of the endless stream
            return self._stream.take((epoch * self.steps + step) * self._global_batch, self._global_batch)
        order = self._stream.permutation(epoch)
        places = np.arange(step * self._global_batch, (step + 1) * self._global_batch) % len(order)
        return order[places].astype(np.int64)


class Balanced:
    """P classes × K samples a batch, the classes alternating slot by slot; P is all of them unless told.

    Each class is an endless stream of its own permutations, running on from epoch to epoch: no sample is
    seen a second time before all others of its class were seen once.

    With P below C, the number of classes, they take turns: P after P around a circle, which is shuffled again
    as soon as batches and circle end together, so that in time every two classes meet:

        C = 5, P = 2      c a │ e b │ d c │ a e │ b d ║ e d │ a c │ …

    With windows, a window lasts equally long in every class: the largest class has `windows.size` shards in
    it, a class of a tenth of the size ten times as many. A small class is thus permuted as a whole, and its
    samples, few as they are and soon shown again, are what the page cache holds besides the window.
    """

    def __init__(
        self,
        indices: Indices,
        labels: Indices,
        global_batch: int,
        *,
        seed: int,
        steps: int = 0,
        classes_per_batch: int = 0,
        windows: Windows | None = None,
    ) -> None:
        """
        Args:
            indices: ascending.
            labels: (N,) of the whole set, as are all arrays that indices point into.
            steps: an epoch; 0 is as many as the split has batches.
            classes_per_batch: P; 0 is all that the split has.

        Raises:
            UserError: if the split has fewer classes, or they cannot share the global batch.
        """
        self._members = _by_class(indices, labels)
        self._classes_per_batch = classes_per_batch or len(self._members)
        if self._classes_per_batch > len(self._members):
            raise UserError(
                f"loader.classes_per_batch={classes_per_batch} asks for more classes than the "
                f"{len(self._members)} of the training split; 0 takes all of them"
            )
        check_world_size(global_batch, 1, self._classes_per_batch)
        self.steps = steps or -(-len(indices) // global_batch)
        self._seed, self._rows = seed, global_batch // self._classes_per_batch
        self._streams = _streams(self._members, seed, windows)

    def batch(self, epoch: int, step: int) -> Indices:
        """Sample indices (global_batch,) of a step."""
        columns = [
            self._streams[place].take(earlier * self._rows, self._rows)
            for place, earlier in self._turns(epoch * self.steps + step)
        ]
        return np.stack(columns, axis=1).reshape(-1)

    def _turns(self, step: int) -> list[tuple[int, int]]:
        """The classes of a step, ascending, each with the number of earlier steps that had it."""
        circle, batch = len(self._streams), self._classes_per_batch
        rounds = batch // gcd(circle, batch)  # of the circle, until it is shuffled again
        number, place = divmod(step, rounds * circle // batch)
        order = generator(self._seed, Purpose.ORDER, number, _CIRCLES).permutation(circle)
        turns = order[np.arange((place + 1) * batch) % circle]
        earlier = number * rounds + np.bincount(turns[:-batch], minlength=circle)
        return [(c, int(earlier[c])) for c in np.sort(turns[-batch:]).tolist()]


class Patient(Balanced):
    """Balanced, and in every second row negatives come from the positive sample's own patient, if it has any.

    The ugly-duckling comparison: within one patient skin tone, camera and identity tell nothing. The other
    rows keep patients without a positive in play.

    With windows, a patient's own negatives still lie anywhere in the set, unless it was packed with
    `whole_groups`: then they are in the positive's shard, and the window holds them too.
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
        windows: Windows | None = None,
    ) -> None:
        super().__init__(indices, labels, global_batch, seed=seed, steps=steps, windows=windows)
        self._groups = groups
        self._positive = list(self._members).index(positive)
        with_positive = np.zeros(groups.max() + 1, np.bool_)
        with_positive[groups[self._members[positive]]] = True
        self._own = [
            _by_patient(members[with_positive[groups[members]]] if c != positive else members[:0], groups)
            for c, members in self._members.items()
        ]

    def batch(self, epoch: int, step: int) -> Indices:
        """Sample indices (global_batch,) of a step."""
        rows = super().batch(epoch, step).reshape(self._rows, -1)
        draws = generator(self._seed, Purpose.OWN_PATIENT, epoch, step).random(rows.shape)
        patients = self._groups[rows[::2, self._positive]]
        for column, own in enumerate(self._own):
            first, end = np.searchsorted(own, patients << 32), np.searchsorted(own, (patients + 1) << 32)
            chosen = first + (draws[::2, column] * (end - first)).astype(np.int64)
            has = first < end
            rows[::2, column][has] = own[chosen[has]] & 0xFFFFFFFF
        return rows.reshape(-1)


class _Stream:
    """An endless stream of permutations of `members`, open at any position."""

    def __init__(self, members: _Members, seed: int, stream: int) -> None:
        self._members, self._seed, self._stream = members, seed, stream
        # Two, since a batch can lie across the border between permutations.
        self.permutation = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, number: int) -> _Members:
        return generator(self._seed, Purpose.ORDER, number, self._stream).permutation(self._members)

    def take(self, start: int, count: int) -> Indices:
        """Positions start .. start + count of the stream, (count,)."""
        number, position = np.divmod(np.arange(start, start + count), len(self._members))
        taken = np.empty(count, np.int64)
        for n in np.unique(number):
            taken[number == n] = self.permutation(int(n))[position[number == n]]
        return taken


class _WindowedStream(_Stream):
    """The same, the shards shuffled first, then the samples of `window` shards at a time."""

    def __init__(self, members: _Members, seed: int, stream: int, shard: Indices, window: int) -> None:
        super().__init__(members, seed, stream)
        self._runs, self._window = _by_shard(members, shard), window

    def _permutation(self, number: int) -> _Members:
        # The classes share their order of shards, so that those of one size open the same shards together.
        shards = generator(self._seed, Purpose.ORDER, number, _SHARDS).permutation(len(self._runs))
        draw = generator(self._seed, Purpose.ORDER, number, self._stream)
        runs = [self._runs[shard] for shard in shards if len(self._runs[shard])]
        parts = [np.concatenate(runs[i : i + self._window]) for i in range(0, len(runs), self._window)]
        for part in parts:
            draw.shuffle(part)
        return np.concatenate(parts)


def _streams(members: dict[int, _Members], seed: int, windows: Windows | None) -> list[_Stream]:
    """A stream for every class; without windows, or where one window holds all, a plain one."""
    if windows is None:
        return [_Stream(own, seed, c) for c, own in members.items()]
    shards = {c: np.count_nonzero(np.bincount(windows.shard[own])) for c, own in members.items()}
    largest = max(members, key=lambda c: len(members[c]))
    samples = windows.size * len(members[largest]) / shards[largest]  # in a window, of any class
    streams = []
    for c, own in members.items():
        window = max(1, round(samples * shards[c] / len(own)))
        streams.append(
            _WindowedStream(own, seed, c, windows.shard, window)
            if window < shards[c]
            else _Stream(own, seed, c)
        )
    return streams


def _compact(indices: Indices) -> _Members:
    """A permutation draws the same numbers for either width."""
    return indices.astype(np.int32) if indices.max(initial=0) < 2**31 else indices


def _by_class(indices: Indices, labels: Indices) -> dict[int, _Members]:
    """Class -> its members in their order, the classes ascending; one pass, however many there are."""
    own = labels[indices]
    own = own.astype(np.min_scalar_type(own.max()))  # up to 16 bits the sort is a radix sort
    ends = np.cumsum(np.bincount(own))
    parts = np.split(_compact(indices)[np.argsort(own, kind="stable")], ends[:-1])
    return {c: part for c, part in enumerate(parts) if len(part)}


def _by_shard(members: _Members, shard: Indices) -> list[_Members]:
    """Views of each shard's members, for every shard of the set."""
    own = shard[members]
    order = np.argsort(own, kind="stable")  # quick: those of a shard set are in order already
    return np.split(members[order], np.searchsorted(own[order], np.arange(1, shard.max() + 1)))


def _by_patient(members: _Members, groups: Indices) -> Indices:
    """(n,) patient × 2**32 + index, ascending: a patient's members are a stretch, found by bisection."""
    return np.sort(groups[members] << 32 | members)
