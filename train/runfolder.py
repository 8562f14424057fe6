"""The run folder: what it says of how it came to be, and the encoder it ends with."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from configs.load import dump
from configs.schema import Experiment
from pipeline.environment import environment
from shards.claims import lock
from shards.files import new_folder, read_json, sha256, write_json, write_text
from train import model


@contextlib.contextmanager
def locked(folder: Path, *, main: bool = True) -> Iterator[None]:
    """Keep other processes from working on a run folder; other ranks than the main one rely on its lock.

    Removes what a killed process left half-written, and the folder if nothing was put into it.

    Raises:
        UserError: if another process holds it.
    """
    if not main:
        yield
        return
    with _held(folder, folder):
        for leftover in folder.rglob(".*.tmp"):
            leftover.unlink()
        yield


@contextlib.contextmanager
def whole_run(folder: Path) -> Iterator[None]:
    """Keep other processes from running an experiment's stages in a row while this one does.

    Raises:
        UserError: if another process does.
    """
    with _held(folder, folder / ".run.lock"):
        try:
            yield
        finally:
            (folder / ".run.lock").unlink(missing_ok=True)


@contextlib.contextmanager
def _held(folder: Path, path: Path) -> Iterator[None]:
    """Make a run folder, and lock it or a file in it."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(new_folder(folder))
            handle = lock(path)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be made ({error.strerror}); choose another run.folder"
            ) from None
        if handle is None:
            raise UserError(
                f"{folder}: another process is working on this run; wait for it, or choose another run.folder"
            )
        stack.callback(os.close, handle)
        yield


def describe(experiment: Experiment) -> None:
    """Write `config.yaml` (resolved) and `environment.json`."""
    folder = experiment.run.folder
    write_text(folder / "config.yaml", dump(experiment))
    write_json(folder / "environment.json", environment())


def save_encoder(folder: Path, encoder: model.Encoder, about: dict[str, Any]) -> None:
    """Write `encoder.safetensors`, then `encoder.json`, which makes it complete."""
    encoder.save(folder / "encoder.safetensors")
    write_json(folder / "encoder.json", {**about, "encoder_sha256": sha256(folder / "encoder.safetensors")})


def load_encoder(folder: Path, device: torch.device) -> tuple[model.Encoder, dict[str, Any]]:
    """The trained encoder, in evaluation mode, and what `encoder.json` says of it.

    Raises:
        UserError: if there is none, or its weights are not the ones it was finished with.
    """
    needs = ("backbone", "embedding_dim", "encoder_sha256", "preprocessing", "encoding", "shards_sha256")
    about = read_json(folder / "encoder.json", "moleprint train CONFIG", needs)
    encoder = model.rebuild(about)
    encoder.load(folder / "encoder.safetensors")
    if sha256(folder / "encoder.safetensors") != about["encoder_sha256"]:
        raise UserError(f"{folder}: encoder.safetensors is not the one encoder.json is about; train again")
    model.place(encoder, device)
    return encoder.eval(), about
