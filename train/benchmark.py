"""`moleprint bench step`: the share of a training step that is spent waiting for data."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import repeat
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from configs.schema import Experiment, Run, Tracking
from pipeline.environment import environment
from pipeline.loader import Batch, Loader
from shards.files import write_json
from shards.timing import REFERENCE, TURNS, Row, refuse_folder, row, table, take_turns
from train.distributed import world
from train.encoder import Trainer

OURS = "moleprint"


def bench(
    experiment: Experiment,
    json_file: Path | None,
    *,
    warm_up: float = 2.0,
    seconds: float = 5.0,
    turns: int = TURNS,
) -> None:
    """Measure training steps fed by the loader beside the same steps on one batch that is always there.

    The steps are those of training: its model (of random weights), loss, optimiser and precision, in one
    process, on the first GPU if there is one. The two take turns.

    Args:
        json_file: gets a list of rows `{"name", "images_per_second", "low", "high", "ratio", …}`.
        warm_up: seconds of each turn that do not count: the turn before let the loader get ahead.
        seconds: seconds of each turn that count.
        turns: how often each is measured.

    Raises:
        UserError: if there is no shard set, or the configuration cannot be trained.
    """
    refuse_folder(json_file)
    with TemporaryDirectory(prefix="moleprint-bench-") as folder, world() as here:
        trainer = Trainer(_aside(experiment, Path(folder)), here)
        with closing(trainer), trainer.tracker:
            trainer.learner.train()
            batches = _endless(trainer.data.training)
            contestants = {
                REFERENCE: _Turns(trainer, repeat(next(batches)), warm_up, seconds),
                OURS: _Turns(trainer, batches, warm_up, seconds),
            }
            rates = take_turns({name: each.turn for name, each in contestants.items()}, turns)
        device = here.device
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "backbone": experiment.model.backbone,
        "precision": str(trainer.precision).removeprefix("torch."),
        "size": experiment.loader.size,
        "batch": experiment.loader.global_batch,
        "cache": experiment.loader.cache,
        "turns": turns,
        "seconds": seconds,
        "shards_sha256": trainer.shards.sha256,
        "environment": environment(),
    }
    rows = [row(name, rates) | contestants[name].figures() for name in rates]
    print("\n".join(_report(rows, about)))
    if json_file:
        write_json(json_file, [each | about for each in rows])


class _Turns:
    """Steps on batches of one origin, and how long each turn waited for them."""

    def __init__(self, trainer: Trainer, batches: Iterator[Batch], warm_up: float, seconds: float) -> None:
        self._trainer, self._batches = trainer, batches
        self._warm_up, self._seconds = warm_up, seconds
        self._waits, self._steps = list[float](), list[float]()

    def turn(self) -> float:
        """Images a second of a turn."""
        self._run(self._warm_up)
        steps, waited, taken = self._run(self._seconds)
        self._waits.append(waited / taken)
        self._steps.append(taken / steps)
        return steps * self._trainer.experiment.loader.global_batch / taken

    def figures(self) -> Row:
        """Share of the time spent waiting, with its interval, and milliseconds a step."""
        return {
            "data_wait": median(self._waits),
            "data_wait_low": min(self._waits),
            "data_wait_high": max(self._waits),
            "step_milliseconds": 1000 * median(self._steps),
        }

    def _run(self, seconds: float) -> tuple[int, float, float]:
        """Steps, seconds waited for data, seconds in all, until the device has caught up."""
        trainer, steps, waited, began = self._trainer, 0, 0.0, perf_counter()
        while not steps or perf_counter() - began < seconds:
            asked = perf_counter()
            batch = next(self._batches)
            waited += perf_counter() - asked
            outcome, _ = trainer.train_step(batch)
            trainer.centroids.add(outcome.embeddings, outcome.labels, trainer.good)
            trainer.progress.step += 1
            steps += 1
        if batch.images.is_cuda:
            torch.cuda.synchronize(batch.images.device)
        return steps, waited, perf_counter() - began


def _aside(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment in a folder of its own, from random weights, told to no one."""
    return experiment.model_copy(
        update={
            "run": Run(folder=folder),
            "tracking": Tracking(mode="disabled"),
            "model": experiment.model.model_copy(update={"weights": "none"}),
        }
    )


def _endless(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader


def _report(rows: Sequence[Row], about: dict[str, Any]) -> list[str]:
    """The rows, aligned, with what they mean."""
    ours = next(each for each in rows if each["name"] == OURS)
    wait = f"{ours['data_wait']:.1%} [{ours['data_wait_low']:.1%}, {ours['data_wait_high']:.1%}]"
    size, batch, precision = about["size"], about["batch"], about["precision"]
    shared = ", as decoding takes cores from the step" if about["device"] == "CPU" else ""
    turns = f"Medians of {about['turns']} turns of {about['seconds']:g} s, taken in rotation"
    return [
        f"{about['device']}, {about['backbone']}, {precision}, {size} × {size} pixels, batches of {batch}",
        *table(rows, more={"step_milliseconds": "ms a step"}),
        f"Waiting for data: {wait} of a step. Speed: {ours['ratio']:.1%} of a resident batch's{shared}.",
        f"{turns}; the interval of a median spans all turns.",
        f"{REFERENCE}: the same step on one batch that is always there.",
    ]
