"""`moleprint bench`: images a second of the loader, and of its peers in the same run on the same images."""

import os
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline
from tqdm import tqdm

from configs.schema import Experiment
from pipeline import augment, graph
from pipeline.environment import environment
from pipeline.loader import Loader, training_sampler
from pipeline.peers import torchvision_batches
from pipeline.sampler import Sampler
from pipeline.source import Source
from shards.files import write_json
from shards.shardset import ShardSet
from shards.timing import REFERENCE, TURNS, Row, refuse_folder, row, table, take_turns

# Endless; gives the number of images of each batch once they are on the device.
Contestant = Generator[int]


def bench(
    experiment: Experiment, json_file: Path | None, *, warm_up: float = 1.5, seconds: float = 3.0
) -> None:
    """Measure the loader and its peers, print a table, and write it as JSON where asked.

    One process, all cores, and the first GPU if there is one. The contestants take turns, so that whatever
    else the machine does falls on all of them.

    Args:
        json_file: gets a list of rows `{"name", "images_per_second", "low", "high", "ratio", …}`.
        warm_up: seconds of each turn that do not count: the turn before may still be filling its queue.
        seconds: seconds of each turn that count.

    Raises:
        UserError: if there is no shard set, a sample of it is damaged, a batch cannot be shared by the
            classes, or `json_file` is a folder.
    """
    refuse_folder(json_file)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    shards = ShardSet.of(experiment)
    source = _read_once(shards)
    with ExitStack() as stack:
        contestants = {
            name: stack.enter_context(closing(contestant))
            for name, contestant in _contestants(experiment, shards, source, device).items()
        }
        rates = take_turns(
            {
                name: partial(_turn, contestant, device, warm_up, seconds)
                for name, contestant in contestants.items()
            }
        )
    rows = [row(name, rates) for name in rates]
    settings = experiment.loader
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "size": settings.size,
        "batch": settings.global_batch,
        "turns": TURNS,
        "seconds": seconds,
        "shards_sha256": shards.sha256,
        "environment": environment(),
    }
    print("\n".join(_table(rows, about)))
    if json_file:
        write_json(json_file, [each | about for each in rows])


def _read_once(shards: ShardSet) -> Source:
    """Check every training image's bytes; from here on all contestants find them in the page cache."""
    source = Source(shards, max_bad=0)
    for index in tqdm(shards.split("train"), desc="read", unit="image"):
        source.fetch(np.array([index]))
    return source


def _contestants(
    experiment: Experiment, shards: ShardSet, source: Source, device: torch.device
) -> dict[str, Contestant]:
    """All load the same images in the same order and batches, augmented as the configuration says."""
    settings, seed = experiment.loader, experiment.train.seed
    cores = len(os.sched_getaffinity(0))
    threads = settings.threads or cores
    sampler = training_sampler(shards, settings, seed=seed, world_size=1)
    loader = Loader(
        shards,
        sampler,
        settings,
        augmentation=settings.augment,
        seed=seed,
        rank=0,
        world_size=1,
        device=device,
        threads=threads,
    )
    plain = torchvision_batches(shards, sampler, settings, workers=cores, device=device)
    contestants = {REFERENCE: (len(images) for images in plain), "moleprint": _batches(loader)}
    gpu = device.index if device.type == "cuda" else None
    if gpu is None:  # on a GPU the loader itself uses them
        operators = graph.build(
            _inputs(experiment, shards, sampler, source),
            batch=settings.global_batch,
            size=settings.size,
            mean=settings.mean,
            std=settings.std,
            threads=threads,
            prefetch=settings.prefetch,
            augmentation=settings.augment,
            dtype=settings.dtype,
            channels_last=settings.channels_last,
            one_pass=False,
        )
        contestants["moleprint, DALI operators"] = _runs(operators)
    inputs = _inputs(experiment, shards, sampler, source)
    contestants["decode only"] = _runs(
        _decoder(inputs, settings.global_batch, threads, settings.prefetch, gpu)
    )
    return contestants


def _inputs(
    experiment: Experiment, shards: ShardSet, sampler: Sampler, source: Source
) -> Callable[[], graph.Inputs]:
    """What the loader feeds its graph, batch after batch."""
    settings, seed, steps = experiment.loader, experiment.train.seed, count()

    def inputs() -> graph.Inputs:
        epoch, step = divmod(next(steps), sampler.steps)
        data, index = source.fetch(sampler.batch(epoch, step))
        plan = augment.draw(settings.augment, len(index), seed=seed, epoch=epoch, step=step)
        return data, *plan.parameters(shards.widths[index], shards.heights[index], settings.size)

    return inputs


def _decoder(
    inputs: Callable[[], graph.Inputs], batch: int, threads: int, prefetch: int, gpu: int | None
) -> Pipeline:
    """Decodes and does nothing else: as fast as any pipeline with this decoder can be."""

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch, num_threads=threads, device_id=gpu, prefetch_queue_depth=prefetch
    )
    def decode() -> Any:
        encoded = fn.external_source(lambda: inputs()[0], batch=True, dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, device="cpu" if gpu is None else "mixed", output_type=types.RGB)

    pipeline: Pipeline = decode()
    pipeline.build()
    return pipeline


def _batches(loader: Loader) -> Contestant:
    while True:
        for batch in loader.epoch():
            yield len(batch.index)


def _runs(pipeline: Pipeline) -> Contestant:
    while True:
        (images,) = pipeline.run()
        yield len(images)


def _turn(contestant: Contestant, device: torch.device, warm_up: float, seconds: float) -> float:
    """Images a second of a turn: the first batch, which may start processes, and the warm-up do not count."""
    next(contestant)
    _rate(contestant, device, warm_up)
    return _rate(contestant, device, seconds)


def _rate(contestant: Contestant, device: torch.device, seconds: float) -> float:
    """Images a second over at least so many seconds, in whole batches."""
    images, started = 0, perf_counter()
    while perf_counter() - started < seconds:
        images += next(contestant)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images / (perf_counter() - started)


def _table(rows: list[Row], about: dict[str, Any]) -> list[str]:
    """The rows, aligned, with what they mean."""
    cores, size = about["environment"]["cores"], about["size"]
    lines = [
        f"{about['device']}, {cores} cores, {size} × {size} pixels, batches of {about['batch']}",
        *table(rows),
    ]
    turns = f"Medians of {about['turns']} turns of {about['seconds']:g} s, taken in rotation"
    return [
        *lines,
        f"{turns}; the interval of a median spans all turns.",
        f"{REFERENCE}: DataLoader with a worker a core, Pillow, torchvision transforms.",
    ]
