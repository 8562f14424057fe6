"""One short training run, whole, for all that compare with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from configs.schema import Experiment
from shards.shardset import ShardSet
from train.distributed import world
from train.encoder import run

STEPS, EPOCHS = 4, 2

Make = Callable[..., Experiment]


@contextmanager
def single() -> Iterator[None]:
    """One thread: images so small gain nothing by more, and where others work wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with mock.patch.object(torch, "set_num_threads"):
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """In every test here."""
    with single():
        yield


@pytest.fixture(scope="session")
def tiny_experiment(tiny_shards: ShardSet) -> Make:
    """Makes the experiment of a run folder: 2 epochs of 4 steps, a checkpoint every 3."""

    def make(folder: Path, **sections: dict[str, Any]) -> Experiment:
        settings: dict[str, dict[str, Any]] = {
            "pack": {"output": tiny_shards.folder},
            "loader": {"global_batch": 8, "size": 32, "steps_per_epoch": STEPS, "threads": 1},
            "model": {"backbone": "timm/test_resnet", "embedding_dim": 16},
            "loss": {"mining": "random"},
            "train": {"epochs": EPOCHS, "patience": 0, "checkpoint_every": 3, "probe_images": 0},
            "tracking": {"mode": "disabled", "log_every": 1},
            "run": {"folder": folder},
        }
        merged = {name: settings.get(name, {}) | sections.get(name, {}) for name in settings | sections}
        return Experiment.model_validate(merged)

    return make


@pytest.fixture(scope="session")
def trained(tiny_experiment: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("trained")
    with single(), world() as here:
        run(tiny_experiment(folder), here)
    return folder
