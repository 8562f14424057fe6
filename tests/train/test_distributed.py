"""Several ranks give what one process gives: loss, gradients, embeddings, and a run's log and weights."""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_resume import lines, train_until
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configs.errors import DamagedDataError, UserError
from configs.schema import Experiment
from configs.training import Loss, Model
from shards.shardset import ShardSet
from train import encoder, model
from train.distributed import (
    World,
    barrier,
    broadcast,
    broadcast_buffers,
    check_equal,
    first_on_node,
    gather,
    process_rank,
    union,
    world,
)
from train.embed import embed, evaluation_loader
from train.influence import standard_error
from train.learner import Learner
from train.mining import MININGS
from train.model import Encoder, build
from train.signals import Stop
from train.validation import Embedded, figures

WORLDS = (1, 2, 4)
BATCH, DIM = 16, 6
ALONE = {"triplet": 0, "classification": 0}
OBJECTIVES = {
    **{name: Loss(mining=name, margin=0.3, classification=0) for name in ("all", *MININGS)},
    "soft": Loss(mining="all", margin="soft", classification=0),
    "cosine": Loss(mining="semi_hard", margin=0.2, distance="cosine", classification=0),
    **{name: Loss(**ALONE | {name: 1}) for name in ("contrastive", "supcon", "arcface", "classification")},
    "sum": Loss(mining="semi_hard", margin=0.2, contrastive=0.25, supcon=2, arcface=0.125, classification=3),
}
STEPS = {name: (settings, 0, False) for name, settings in OBJECTIVES.items()}
STEPS |= {f"sum, {n} at a time": (OBJECTIVES["sum"], n, False) for n in (1, 2)}
STEPS |= {"sum, neck": (OBJECTIVES["sum"], 0, True), "sum, neck, 2 at a time": (OBJECTIVES["sum"], 2, True)}
"""Objective, micro-batch (of ranks' 16, 8 and 4 images), neck."""


def small(bnneck: bool) -> Encoder:
    """Without batch statistics, so that a slice of a batch means what it does in the whole; partly frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3), nn.GELU(), nn.Flatten(), nn.Linear(5 * 36, DIM)]
    layers[0].requires_grad_(False)
    return Encoder(nn.Sequential(*layers), "4", Model(embedding_dim=DIM, bnneck=bnneck))


def gradients(step: tuple[Loss, int, bool], rank: int, size: int) -> dict[str, torch.Tensor]:
    """Figures and gradients of two steps on this rank's slices of two batches."""
    settings, micro_batch, bnneck = step
    draw = torch.Generator().manual_seed(5)
    learner: nn.Module = Learner(
        small(bnneck),
        settings,
        embedding_dim=DIM,
        class_weights=torch.tensor([0.7, 1.9]),
        seed=2,
        micro_batch=micro_batch,
    )
    bare = learner
    if dist.is_initialized():
        learner = DistributedDataParallel(learner, gradient_as_bucket_view=True, static_graph=True)
    mine = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    found: dict[str, torch.Tensor] = {}
    for step_number in range(2):  # DDP learns in the first what it does in all others
        images = torch.randn(BATCH, 3, 8, 8, generator=draw)
        labels, groups = torch.arange(BATCH) % 3 % 2, torch.randint(4, (BATCH,), generator=draw)
        uniform = torch.rand(BATCH, 2, generator=draw)
        learner.zero_grad()
        outcome = learner(images[mine], labels[mine], groups[mine], uniform, torch.float32, settings.mining)
        outcome.loss.backward()
        grads = {name: p.grad.clone() for name, p in bare.named_parameters() if p.requires_grad}
        rest = {"embeddings": outcome.embeddings, "labels": outcome.labels}
        found |= {f"{step_number}: {name}": value for name, value in (grads | outcome.figures | rest).items()}
    return found


def collectives(rank: int, size: int) -> dict[str, Any]:
    """What the collectives give on this rank."""
    module = nn.BatchNorm1d(2)
    module.running_mean.fill_(rank)
    module.num_batches_tracked.fill_(rank + 7)
    broadcast_buffers(module)
    barrier()
    return {
        "gather": gather(torch.tensor([[rank, 10 * rank]])),
        "broadcast": broadcast({"rank": rank}),
        "first": first_on_node(f"rank {rank}", World(rank, size, rank % 2, 2)),
        "union": union({rank, rank + 1}),
        "told": told(lambda: check_equal(min(rank, 1), "step")),
        "buffers": (module.running_mean, module.num_batches_tracked),
        "validation": validated(World(rank, size)),
        "stop": stopping(World(rank, size)),
    }


def stopping(here: World) -> list[bool]:
    """What a rank is answered after each step if the last rank is told to stop in the third, as on GPUs."""
    stop, answers = Stop(here), []
    stop._lag = 3
    for step in range(8):
        stop._told |= step == 2 and here.rank == here.size - 1
        answers.append(stop.agreed())
    return [*answers, stop.agreed(now=True), not stop._flags]


def validated(here: World) -> dict[str, float]:
    """Validation figures of some vectors, and how sure the monitored one is."""
    held = Embedded(
        np.arange(41),
        nn.functional.normalize(torch.randn(41, 5, generator=torch.Generator().manual_seed(1))).numpy(),
        np.arange(41) % 5 // 3,
    )
    found = figures(
        held,
        held,
        held.vectors[:, 0],
        np.arange(41) // 2,
        positive=1,
        margin=0.2,
        monitor="map_at_r",
        world=here,
    )
    return {**found.values, "error": standard_error(found.parts)}


def told(check: Callable[[], None]) -> str:
    """What the user is told, empty if all is well."""
    try:
        check()
    except UserError as error:
        return str(error)
    return ""


def embeddings(experiment: Experiment, here: World) -> tuple[np.ndarray, np.ndarray]:
    """(index, vectors) of the validation split by a fresh encoder."""
    shards = ShardSet.open(experiment.pack.output)
    loader = evaluation_loader(shards, shards.split("val"), experiment, here)
    return embed(
        build(experiment.model, size=experiment.loader.size, seed=3), loader, precision=torch.float32
    )


def without_statistics(settings: Model, *, size: int, seed: int) -> Encoder:
    """An encoder that a batch's parts mean the same to as the whole: groups, not batches, are normalised."""
    encoder = build(settings, size=size, seed=seed)
    for module in list(encoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(8, child.num_features))
    return encoder


def work(
    rank: int, folder: Path, whole: Experiment, cut: Experiment, cached: Experiment, elastic: Experiment
) -> None:
    """All that one rank does, in groups of 1, then of 2 and of 4."""
    torch.set_num_threads(1)
    for world_size in WORLDS:
        if rank >= world_size:
            continue
        store = folder / f"store-{world_size}"
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=600),  # the ranks of 4 wait for those of 2 and 1
        )
        here = World(rank, world_size, rank, world_size)
        found = {name: gradients(step, rank, world_size) for name, step in STEPS.items()}
        results = (found, collectives(rank, world_size), embeddings(whole, here))
        torch.save(results, folder / f"rank-{rank}-of-{world_size}.pt")
        if world_size == 2:
            encoder.run(whole, here)
            train_until(7, cut, here)
            encoder.run(cut, here)
            encoder.run(cached, here)
            with mock.patch.object(model, "build", without_statistics):
                train_until(5, elastic, here)
            if rank == 0:
                shutil.copytree(folder / "elastic", folder / "elastic-1")
        if world_size == 4:
            with mock.patch.object(model, "build", without_statistics):
                encoder.run(elastic, here)
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tiny_experiment: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with every rank's results and two runs of 2 ranks; the modules are loaded once for all."""
    folder = tmp_path_factory.mktemp("ranks")
    cached = tiny_experiment(folder / "cached", loader={"cache": "host", "read": "pread", "prefetch": 1})
    runs = [tiny_experiment(folder / name) for name in ("whole", "cut")]
    arguments = (folder, *runs, cached, tiny_experiment(folder / "elastic"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.encoder", "timm"])
    processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=700)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * 4
    yield folder


def results(folder: Path, size: int) -> list[Any]:
    """What each rank of a group of `size` found."""
    return [torch.load(folder / f"rank-{rank}-of-{size}.pt", weights_only=False) for rank in range(size)]


@cache
def of_one(name: str) -> dict[str, torch.Tensor]:
    """Figures and gradients of one process that sees the whole batch at once."""
    settings, _, bnneck = STEPS[name]
    return gradients((settings, 0, bnneck), 0, 1)


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("name", STEPS)
def test_gradients_of_many_ranks_are_those_of_one(size: int, name: str, ranks: Path) -> None:
    settings, expected = STEPS[name][0], of_one(name)
    assert expected["1: encoder.backbone.1.weight"].abs().max() > 1e-3
    assert ("1: head.weight" in expected) == (settings.classification > 0)
    assert ("1: centres.weight" in expected) == (settings.arcface > 0)
    for found, _, _ in results(ranks, size):
        assert found[name].keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                found[name][key], value, atol=1e-5, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.parametrize("size", WORLDS)
def test_collectives(size: int, ranks: Path) -> None:
    for rank, (_, found, _) in enumerate(results(ranks, size)):
        assert found["first"] == f"rank {rank - rank % 2}"
        assert found["gather"].tolist() == [[rank, 10 * rank] for rank in range(size)]
        assert found["broadcast"] == {"rank": 0}
        assert found["union"] == set(range(size + 1))
        others = list(range(1, size))
        assert f"ranks {others} have another step than rank 0" in found["told"] or not others
        mean, count = found["buffers"]
        assert mean.tolist() == [0, 0] and count == 7
        heard = 2 if size == 1 else 5  # others' word is read three steps late
        assert found["stop"] == [False] * heard + [True] * (10 - heard)
        assert found["validation"] == pytest.approx(validated(World()), abs=1e-7)


@pytest.mark.parametrize("size", WORLDS)
def test_embeddings_of_many_ranks_are_those_of_one(
    size: int, ranks: Path, tiny_experiment: Any, tiny_shards: ShardSet
) -> None:
    index, vectors = embeddings(tiny_experiment(ranks), World())
    assert np.array_equal(index, tiny_shards.split("val")) and len(index) % 8
    for _, _, (its_index, its_vectors) in results(ranks, size):
        assert np.array_equal(its_index, index)
        np.testing.assert_allclose(its_vectors, vectors, atol=1e-5)


def test_a_run_of_two_ranks_resumes_exactly(ranks: Path) -> None:
    whole, cut = ((ranks / name / "encoder.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut
    logged = [
        [json.loads(line) for line in (ranks / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    keys = ("step", "loss", "val_roc_auc", "grad_norm", "spread")
    assert len(logged[0]) == 8 + 2  # rank 1 logged nothing
    assert [[row.get(k) for k in keys] for row in logged[0]] == [
        [row.get(k) for k in keys] for row in logged[1]
    ]


def test_a_run_of_two_ranks_goes_on_with_another_number(
    ranks: Path, tiny_experiment: Any, tmp_path: Path
) -> None:
    """With one, here, and with four."""
    with mock.patch.object(model, "build", without_statistics):
        encoder.run(tiny_experiment(tmp_path / "alone"), World())
        encoder.run(tiny_experiment(ranks / "elastic-1"), World())
    folders = (tmp_path / "alone", ranks / "elastic-1", ranks / "elastic")
    alone, *others = ([row for row in lines(run) if "loss" in row] for run in folders)
    for mine in others:
        assert [row["step"] for row in mine] == list(range(1, 9))
        for name in ("loss", "triplet", "spread"):
            assert [row[name] for row in mine] == pytest.approx([row[name] for row in alone], rel=2e-3), name
    assert len({round(row["loss"], 3) for row in alone}) == 8  # other samples would be seen


def test_a_run_of_two_ranks_that_keep_images_decoded_is_the_same(ranks: Path) -> None:
    whole, cached = ((ranks / name / "encoder.safetensors").read_bytes() for name in ("whole", "cached"))
    assert whole == cached


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    rows = torch.ones(2, 3)
    with world() as here:
        assert (here.rank, here.size, here.main, process_rank()) == (0, 1, True, 0)
        assert not dist.is_initialized()
        assert gather(rows) is rows and broadcast("x") == "x"
        barrier()


def test_an_error_does_not_wait_for_the_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving the group would: they may stand in a collective that this rank never comes to."""
    settings = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="bad"), world():
        assert dist.is_initialized()
        raise UserError("bad")
    assert dist.is_initialized()
    dist.destroy_process_group()
    with world():
        assert dist.is_initialized()
    assert not dist.is_initialized()


def test_threads_are_shared_among_the_ranks_of_a_host() -> None:
    cores = len(os.sched_getaffinity(0))
    assert World(local_size=1).threads(0) == cores
    assert World(local_size=4 * cores).threads(0) == 1
    assert World(local_size=2).threads(7) == 7


def test_a_rank_is_silent_only_where_another_speaks() -> None:
    """Others end quietly after a rank that told why it ended; so it must be one that tells."""
    assert UserError("of a host").spoken_by(0) and not UserError("of a host").spoken_by(1)
    assert DamagedDataError("of one rank").spoken_by(1)
