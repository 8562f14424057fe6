"""What `encoder.json` says of the encoder that a run ends with: is it there, and of which settings?"""

import json
from collections.abc import Mapping
from typing import Any

from configs.errors import UserError
from configs.load import fields, section_of
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


def check_settings(experiment: Experiment, more: Mapping[str, Any]) -> None:
    """Make sure that these are the settings which the run's encoder, and more, was made with.

    Args:
        more: what other parts of the run say that they were made with: section -> settings.

    Raises:
        UserError: a line a difference. What the run's release did not know is as `checkpoint.BEFORE` and
            the defaults have it; what this one no longer knows is none.
    """
    path = experiment.run.folder / "encoder.json"
    about = read_json(path, "moleprint train CONFIG") if path.exists() else {}
    recorded = {**about.get("made_from", {}), **more}
    now, defaults = (_compared(of, recorded) for of in (experiment, Experiment()))
    made = checkpoint.filled(recorded, checkpoint.filled(checkpoint.BEFORE, defaults))
    leaves = [key for key, field in fields(Experiment) if section_of(field.annotation) is None]
    pairs = {key: (_at(made, key), _at(now, key)) for key in leaves}
    lines = [f"  {key}: {a[0]} → {b[0]}" for key, (a, b) in pairs.items() if a and b and a != b]
    if lines:
        config = experiment.run.folder / "config.yaml"
        raise UserError(
            f"{experiment.run.folder}: was made with other settings than these:\n"
            + "\n".join(lines)
            + f"\nwork with those that it was made with, as {config} has them, or make it anew with "
            "`moleprint run CONFIG`"
        )


def _compared(experiment: Experiment, sections: Mapping[str, Any]) -> dict[str, Any]:
    """Those sections, without what changes nothing."""
    return {
        name: getattr(experiment, name).model_dump(mode="json", exclude=checkpoint.FREE.get(name))
        for name in sections
        if name in Experiment.model_fields
    }


def _at(values: Any, key: str) -> tuple[Any] | None:
    """What lies at `section.key`, if there is such a place."""
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return None
        values = values[part]
    return (values,)
