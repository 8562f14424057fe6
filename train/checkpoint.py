"""Checkpoints that appear whole, survive a damaged newest one, and refuse another configuration's run."""

import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from configs.errors import UserError
from configs.schema import Experiment
from shards.files import atomic, writing
from train.progress import Progress

# What may change between the parts of one run: none of it changes the result, but for rounding.
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
    "train": {
        "processes",
        "checkpoint_every",
        "keep",
        "compile",
        "timeout",
        "max_bad_steps",
        "allow_changed",
    },
}

BEFORE: dict[str, Any] = {"train": {"tolerance": 0.0}}
"""What fields amounted to in versions that did not know them, where it is not their default."""


def save(folder: Path, fingerprint: str, progress: Progress, tensors: dict[str, Any], *, keep: int) -> None:
    """Write `step-NNNNNNNN.pt`, then remove all but the newest `keep` up to it and that of the best step.

    It is a zip file, whose CRC-32 of every tensor `load` verifies.

    Raises:
        UserError: if it cannot be written, as for want of room; the others stay.
    """
    state = {"fingerprint": fingerprint, "progress": asdict(progress), **tensors}
    path = _path(folder, progress.step)
    with atomic(path) as file:
        torch.save(state, file)
    with writing(path):
        _flush(folder)  # the new name is on disk before an old one goes
        paths = _newest_first(folder)
        # A newer one was damaged, or the run would have gone on from there.
        newest = paths[paths.index(path) :][:keep]
        for other in paths:
            if other not in (*newest, _path(folder, progress.best_step)):
                other.unlink()


def load(
    folder: Path, fingerprint: str, *, allowed: Iterable[str] = (), say: bool = True
) -> tuple[Progress, dict[str, Any]] | None:
    """The newest readable checkpoint, or None where there is none; `say` if a damaged one is passed over.

    Args:
        allowed: `section.key` that may differ from what it was made by.

    Raises:
        UserError: if it belongs to another configuration or shard set, or if every checkpoint is damaged.
    """
    paths = _newest_first(folder)
    for path in paths:
        try:
            with path.open("rb") as file:
                state = _verified(file)
            progress = Progress.of(state.pop("progress"))
            made_by = json.loads(state.pop("fingerprint"))
        except Exception as error:  # whatever damaged bytes provoke; the one before may be sound
            if say:
                print(f"{path}: damaged checkpoint passed over ({_reason(error)})", flush=True)
            continue
        _check_same(folder, completed(made_by), json.loads(fingerprint), allowed)
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
    """What an older version recorded, and what the fields amounted to that it did not know."""
    return filled(made_by, filled(BEFORE, json.loads(fingerprint(Experiment(), ""))))


def filled(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What is given, and the defaults of all else."""
    nested = {k: filled(v, defaults.get(k, {})) for k, v in given.items() if isinstance(v, dict)}
    return defaults | given | nested


def _check_same(folder: Path, old: dict[str, Any], new: dict[str, Any], allowed: Iterable[str]) -> None:
    """Raises UserError, a line a difference, if a run would go on as another one."""
    before, after = _leaves(old), _leaves(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    refused = [key for key in keys if not any(f"{key}.".startswith(f"{name}.") for name in allowed)]
    if refused:
        lines = [f"  {key}: {before.get(key, 'unknown')} → {after.get(key, 'unknown')}" for key in refused]
        raise UserError(
            f"{folder}: holds checkpoints of another configuration, differing in\n"
            + "\n".join(lines)
            + "\nchoose another run.folder, or go on all the same with "
            + f"train.allow_changed=[{','.join(refused)}]"
        )


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train.lr": 0.1, …}` of a nested mapping."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _verified(file: IO[bytes]) -> dict[str, Any]:
    """The content of a checkpoint whose every part has its checksum; torch itself would not look."""
    broken = zipfile.ZipFile(file).testzip()
    if broken:
        raise ValueError(f"the checksum of {broken} is wrong")
    file.seek(0)
    return dict(torch.load(file, map_location="cpu", weights_only=True))


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)
