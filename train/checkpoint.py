"""Checkpoints that appear whole, survive a damaged newest one, and refuse another configuration's run."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from configs.schema import Experiment
from shards.files import atomic

# What may change between the parts of one run: none of it changes the result.
FREE: dict[str, Any] = {
    "loader": {
        "threads": True,
        "prefetch": True,
        "max_bad": True,
        # On a GPU a cache means the CPU's decoder, which rounds differently; what it holds depends on memory.
        **dict.fromkeys(("read", "stage", "cache", "cache_gigabytes"), True),
        "channels_last": True,  # training brings images into that order anyway
        "augment": {"preset"},  # its values count, wherever they come from
    },
    "train": {"processes", "checkpoint_every", "keep", "compile"},
}


@dataclass
class Progress:
    """How far a run is: with the weights and the optimiser, all that resuming needs."""

    step: int = 0
    """Steps done, over all epochs."""
    best_auc: float = -1.0
    """Best validation ROC-AUC so far."""
    best_step: int = 0
    """The step it was seen at."""
    stale: int = 0
    """Epochs since."""
    run_id: str | None = None
    """The W&B run."""
    history: list[float] = field(default_factory=list)
    """Validation ROC-AUC of every epoch."""


def save(folder: Path, fingerprint: str, progress: Progress, tensors: dict[str, Any], *, keep: int) -> None:
    """Write `step-NNNNNNNN.pt`, then remove all but the newest `keep`."""
    state = {"fingerprint": fingerprint, "progress": asdict(progress), **tensors}
    with atomic(folder / f"step-{progress.step:08d}.pt") as file:
        torch.save(state, file)
    for old in _newest_first(folder)[keep:]:
        old.unlink()


def load(folder: Path, fingerprint: str, *, say: bool = True) -> tuple[Progress, dict[str, Any]] | None:
    """The newest readable checkpoint, or None where there is none; `say` if a damaged one is passed over.

    Raises:
        UserError: if it belongs to another configuration or shard set, or if every checkpoint is damaged.
    """
    paths = _newest_first(folder)
    for path in paths:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            progress = Progress(**state.pop("progress"))
            made_by = state.pop("fingerprint")
        except Exception as error:  # whatever damaged bytes provoke; the one before may be sound
            if say:
                print(f"{path}: damaged checkpoint passed over ({type(error).__name__})", flush=True)
            continue
        old, new = completed(json.loads(made_by)), json.loads(fingerprint)
        if old != new:
            raise UserError(
                f"{folder}: holds checkpoints of another configuration, differing in "
                f"{_difference(old, new)}; choose another run.folder, or remove that one"
            )
        return progress, state
    if paths:
        raise UserError(f"{folder}: every checkpoint is damaged; remove the folder to start again")
    return None


def fingerprint(experiment: Experiment, shards_sha256: str) -> str:
    """All that determines the encoder, as JSON: equal for the parts of one run."""
    parts: dict[str, Any] = {
        name: getattr(experiment, name).model_dump(mode="json", exclude=FREE.get(name))
        for name in ("loader", "model", "loss", "train")
    }
    return json.dumps({**parts, "shards": {"sha256": shards_sha256}}, sort_keys=True)


def completed(made_by: dict[str, Any]) -> dict[str, Any]:
    """What an older version recorded, and the defaults of fields it did not know, which change nothing."""
    return _filled(made_by, json.loads(fingerprint(Experiment(), "")))


def _filled(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    nested = {k: _filled(v, defaults.get(k, {})) for k, v in given.items() if isinstance(v, dict)}
    return defaults | given | nested


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [f"{s}.{k}" for s in new for k in new[s] if old.get(s, {}).get(k) != new[s][k]]
    return ", ".join(keys) or "keys this version does not know"


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)
