"""A finished run of the tiny data set, whose encoder has learned nothing: made in seconds, once."""

from pathlib import Path

import pytest
import torch

from configs.packing import Pack
from configs.schema import Experiment
from shards.shardset import ShardSet
from train import model, runfolder
from train.classify import fit
from train.distributed import world
from train.embed import run as embed


@pytest.fixture(scope="session")
def finished(tiny_pack: Pack, tiny_shards: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    experiment = Experiment.model_validate(
        {
            "pack": tiny_pack.model_dump() | {"output": str(tiny_shards.folder)},
            "loader": {"size": 32, "threads": 1, "global_batch": 8},
            "model": {"backbone": "resnet18", "embedding_dim": 16},
            "classifier": {"epochs": 4, "hidden": (8,), "folds": 0, "seeds": 1},
            "evaluate": {"bootstrap": 100},
            "tracking": {"mode": "disabled"},
            "run": {"folder": folder},
        }
    )
    encoder = model.build(experiment.model, size=32, seed=0)
    with torch.no_grad():
        encoder.train()(torch.randn(64, 3, 32, 32))  # statistics for batch normalisation
    about = {
        **experiment.model.model_dump(include=set(model.ARCHITECTURE)),
        "preprocessing": experiment.loader.model_dump(include={"size", "mean", "std"}),
        "encoding": tiny_shards.manifest["settings"]["encode"],
        "classes": tiny_shards.classes,
        "positive": tiny_shards.positive,
        "shards_sha256": tiny_shards.sha256,
        "notice": "",
    }
    folder.mkdir()
    runfolder.describe(experiment)
    runfolder.save_encoder(folder, encoder.eval(), about)
    with world() as here:
        embed(experiment, here)
    fit(experiment, progress=False)
    return folder
