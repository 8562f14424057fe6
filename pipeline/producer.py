"""What the loader's background thread does: plan a step, fetch its images, run them through the graph.

sampler ──► plan ──► fetch (CRC, substitutes) ──► DALI graph ──► Ready
                          ▲ an image that cannot be decoded: replaced, and the step done again
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from nvidia.dali.pipeline import Pipeline

from pipeline import augment, graph
from pipeline.cache import Fetcher
from pipeline.decode import undecodable
from pipeline.reading import Bytes
from pipeline.sampler import PADDING, Indices
from pipeline.source import Source


@dataclass(frozen=True)
class Step:
    """One rank's share of a step, before its images are made."""

    wanted: Indices
    """(batch,) indices, with padding."""
    filler: int
    """What padding shows, and is marked: the global batch's first sample."""
    plan: augment.Plan


@dataclass(frozen=True)
class Ready:
    """A rank's share of a step, its images made."""

    images: Any
    """What the pipeline gave, on the device."""
    shown: Indices
    """(batch,) indices of what the images show."""
    index: Indices
    """(batch,) the same, with padding."""


@dataclass(frozen=True)
class _Fed:
    """What DALI was given and has not yet given back; it may read these very arrays until then."""

    turn: int
    wanted: Indices
    shown: Indices
    inputs: graph.Inputs


class Producer:
    """Makes batches, in order, from any step on. Used by one thread."""

    def __init__(
        self,
        plan: Callable[[int], Step],
        fetcher: Fetcher,
        source: Source,
        build: Callable[[Callable[[], graph.Inputs]], Pipeline],
        *,
        size: int,
        gpu: int | None,
        decoded: bool,
    ) -> None:
        """
        Args:
            plan: the step of a number.
            fetcher: `source`, or a cache of its images.
            build: makes the graph from what calls for a step's inputs.
            size: width and height of the images to make.
            decoded: whether `fetcher` gives pixels.
        """
        self._plan, self._fetcher, self._source, self._build = plan, fetcher, source, build
        self._size, self._gpu, self._decoded = size, gpu, decoded
        self._pipeline: Pipeline | None = build(self._inputs)
        self._fed: deque[_Fed] = deque()
        self._next = self._turn = 0

    def batches(self, start: int) -> Generator[Ready]:
        """The batches from a step on, without end.

        Raises:
            DamagedDataError: if more samples are damaged than allowed.
        """
        if self._gpu is not None:
            # A thread begins on the first GPU, and on the stream where training queues its work: there copies
            # out of the device's cache would wait for that.
            torch.cuda.set_stream(torch.cuda.Stream(self._gpu))  # type: ignore[no-untyped-call]
        self._turn += 1  # what DALI still has in hand of an earlier call is dropped as it comes out
        self._next = due = start
        while True:
            try:
                self._pipeline = self._pipeline or self._build(self._inputs)
                (images,) = self._pipeline.run()
            except BaseException as error:
                # Whatever state the error left it in; what it had in hand is made again.
                self._pipeline, fed = None, list(self._fed)
                self._fed.clear()
                self._next = due
                # An error of our own comes out as it is; DALI's own names no sample.
                if not isinstance(error, RuntimeError) or self._decoded or not self._replace_culprits(fed):
                    raise
                continue
            done = self._fed.popleft()
            if done.turn == self._turn:
                due += 1
                padded = np.where(done.wanted == PADDING, PADDING, done.shown)
                ready = Ready(images, done.shown, padded)
                del images, done
                yield ready
                del ready  # the trainer's alone now

    def close(self) -> None:
        """End DALI's threads; then what they may have been reading can go."""
        self._pipeline = None
        self._fed.clear()
        self._fetcher.close()

    def _inputs(self) -> graph.Inputs:
        """DALI calls this once for every batch it prepares ahead, in the thread that runs it."""
        step = self._plan(self._next)
        data, shown = self._fetcher.fetch(np.where(step.wanted == PADDING, step.filler, step.wanted))
        self._next += 1
        shards = self._source.shards
        parameters = step.plan.parameters(shards.widths[shown], shards.heights[shown], self._size)
        inputs = data, *parameters
        self._fed.append(_Fed(self._turn, step.wanted, shown, inputs))
        return inputs

    def _replace_culprits(self, fed: list[_Fed]) -> bool:
        """Replace what cannot be decoded in the first batch that holds any of it; whether there is one."""
        for batch in fed:
            culprits = batch.shown[undecodable(cast(Sequence[Bytes], batch.inputs[0]), self._gpu)]
            for index in np.unique(culprits).tolist():
                self._source.condemn(index)
            if len(culprits):
                return True
        return False
