"""`moleprint bench train`: images a second of a training step, beside a plain PyTorch script in the same
run."""

import os
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn

from configs.schema import Experiment
from pipeline.environment import environment
from pipeline.loader import Loader, training_sampler
from pipeline.peers import PillowV1, data_loader
from shards.files import write_json
from shards.shardset import ShardSet
from shards.timing import REFERENCE, TURNS, Row, refuse_folder, row, table, take_turns
from train import backbones
from train.distributed import World
from train.encoder import Trainer

# Endless; gives the number of images of each step once it is under way.
Contestant = Generator[int]
RESIDENT = "moleprint, resident batch"


def bench(
    experiment: Experiment, json_file: Path | None, *, warm_up: float = 2.0, seconds: float = 8.0
) -> None:
    """Measure steps of the trainer and of its peers, print a table, and write it as JSON where asked.

    One process, and the first GPU if there is one. Backbone, embedding, images, order and batch are the same
    for all; weights are random, which takes as long.

        reference                   DataLoader, Pillow, torchvision; random triplets; float32, on a GPU in
                                    TensorFloat-32 as `train.tf32` says; Adam
        moleprint                   the trainer's own loader and step
        moleprint, resident batch   the same step on one batch that is there: as fast as no loading would be

    Args:
        json_file: gets a list of rows `{"name", "images_per_second", "low", "high", "ratio", …}`.
        warm_up: seconds of each turn that do not count.
        seconds: seconds of each turn that count, or a step if that takes longer.

    Raises:
        UserError: if there is no shard set, the configuration does not fit it, or `json_file` is a folder.
    """
    refuse_folder(json_file)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        settings = _for_bench(experiment, Path(folder))
        trainer = stack.enter_context(closing(Trainer(settings, World(device=device))))
        trainer.learner.train()
        contestants = {
            REFERENCE: _plain_script(settings, trainer.shards, device),
            "moleprint": _steps(trainer),
            RESIDENT: _resident_steps(trainer),
        }
        for contestant in contestants.values():
            stack.enter_context(closing(contestant))
        turns = {
            name: partial(_turn, contestant, device, warm_up, seconds)
            for name, contestant in contestants.items()
        }
        rates = take_turns(turns)
    rows = [row(name, rates) for name in rates]
    loader = experiment.loader
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "backbone": experiment.model.backbone,
        "size": loader.size,
        "batch": loader.global_batch,
        "precision": str(trainer.precision).removeprefix("torch."),
        "compile": experiment.train.compile,
        "turns": TURNS,
        "seconds": seconds,
        "environment": environment(),
    }
    print("\n".join(_table(rows, about)))
    if json_file:
        write_json(json_file, [each | about for each in rows])


def _for_bench(experiment: Experiment, folder: Path) -> Experiment:
    """The same training, without downloads, and with nothing left behind."""
    return experiment.model_copy(
        update={
            "model": experiment.model.model_copy(update={"weights": "none"}),
            "run": experiment.run.model_copy(update={"folder": folder / "run"}),
            "tracking": experiment.tracking.model_copy(update={"mode": "disabled", "images": 0}),
        }
    )


def _steps(trainer: Trainer) -> Contestant:
    loader: Loader = trainer.data.training
    while True:
        for batch in loader.epoch():
            trainer.train_step(batch)
            yield len(batch.index)


def _resident_steps(trainer: Trainer) -> Contestant:
    batch = next(iter(trainer.data.training.epoch()))
    while True:
        trainer.train_step(batch)
        yield len(batch.index)


def _plain_script(experiment: Experiment, shards: ShardSet, device: torch.device) -> Contestant:
    """What one writes first: a loader with a worker a core, a loop over the batch that draws a triplet for
    each anchor, torch's own triplet loss, Adam, all in float32."""
    settings = experiment.loader
    sampler = training_sampler(shards, settings, seed=experiment.train.seed, world_size=1)
    name, size = experiment.model.backbone, settings.size
    encoder = backbones.create(name, size)
    backbones.project(encoder, backbones.classifier(name, encoder), experiment.model)
    encoder.to(device).train()
    criterion = nn.TripletMarginLoss(margin=1.0)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-4)
    draw = np.random.default_rng(0)
    workers = len(os.sched_getaffinity(0))
    batches = data_loader(shards, sampler, PillowV1(settings), workers=workers, device=device)
    for step, images in enumerate(batches):
        labels = shards.labels[sampler.batch(*divmod(step, sampler.steps))]
        anchors, positives, negatives = np.array(list(_triplets(labels, draw))).T
        vectors = nn.functional.normalize(encoder(images))
        loss = criterion(vectors[anchors], vectors[positives], vectors[negatives])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield len(images)


def _triplets(labels: np.ndarray[Any, Any], draw: np.random.Generator) -> Iterator[tuple[int, int, int]]:
    """(anchor, positive, negative) for every image that has both in its batch."""
    for anchor, label in enumerate(labels):
        others = labels != label
        alike = np.flatnonzero(~others)
        alike, others = alike[alike != anchor], np.flatnonzero(others)
        if len(alike) and len(others):
            yield anchor, int(draw.choice(alike)), int(draw.choice(others))


def _turn(contestant: Contestant, device: torch.device, warm_up: float, seconds: float) -> float:
    """Images a second of a turn; the warm-up fills its queues, and compiles, and does not count."""
    _rate(contestant, device, warm_up)
    return _rate(contestant, device, seconds)


def _rate(contestant: Contestant, device: torch.device, seconds: float) -> float:
    """Images a second over at least so many seconds, in whole steps."""
    images, started = 0, perf_counter()
    while perf_counter() - started < seconds:
        images += next(contestant)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images / (perf_counter() - started)


def _table(rows: list[Row], about: dict[str, Any]) -> list[str]:
    """The rows, aligned, with what they mean."""
    rates = {each["name"]: each["images_per_second"] for each in rows}
    size, cores, compiled = about["size"], about["environment"]["cores"], ", compiled" * about["compile"]
    what = f"{about['backbone']}, {size} × {size} pixels, batches of {about['batch']}, {about['precision']}"
    turns = f"Medians of {about['turns']} turns of {about['seconds']:g} s, taken in rotation"
    share = rates["moleprint"] / rates[RESIDENT]
    exact = "float32" if about["device"] == "CPU" else "float32 (TensorFloat-32 as train.tf32 says)"
    return [
        f"{about['device']}, {cores} cores, {what}{compiled}",
        *table(rows),
        f"{turns}; the interval of a median spans all turns.",
        f"{REFERENCE}: DataLoader with a worker a core, Pillow, torchvision, random triplets, {exact}.",
        f"moleprint trains at {share:.0%} of the speed that a batch already there allows.",
    ]
