"""What `encoder.json` says of the encoder that a run ends with, and whether it is there."""

import json
from typing import Any

from configs.errors import UserError
from configs.schema import Experiment
from shards.files import read_json, sha256
from shards.shardset import ShardSet
from train import checkpoint
from train.model import ARCHITECTURE
from train.progress import Progress


def describe(experiment: Experiment, shards: ShardSet, progress: Progress, steps: int) -> dict[str, Any]:
    """All that its users need to know.

    Args:
        steps: of an epoch.
    """
    loader = experiment.loader
    return {
        **experiment.model.model_dump(include=set(ARCHITECTURE)),
        "preprocessing": {"size": loader.size, "mean": loader.mean, "std": loader.std},
        "encoding": shards.manifest["settings"]["encode"],
        "classes": shards.classes,
        "positive": shards.positive,
        "shards_sha256": shards.sha256,
        "validation_roc_auc": progress.best_figures["roc_auc"],
        "validation": progress.best_figures,
        "best_epoch": progress.best_step // steps,
        "epochs": progress.step // steps,
        "notice": shards.notice,
        "made_from": json.loads(checkpoint.fingerprint(experiment, shards.sha256)),
    }


def finished(experiment: Experiment) -> bool:
    """Whether the run folder holds the encoder of this configuration and shard set."""
    try:
        needs = ("made_from", "encoder_sha256")
        about = read_json(experiment.run.folder / "encoder.json", "moleprint train CONFIG", needs)
        shards = ShardSet.of(experiment)
        weights = sha256(experiment.run.folder / "encoder.safetensors")
    except (UserError, OSError):
        return False
    made_from = json.loads(checkpoint.fingerprint(experiment, shards.sha256))
    same = checkpoint.completed(about["made_from"]) == made_from
    return bool(same and about["encoder_sha256"] == weights)
