"""The run folder: what it says of how it came to be, and the encoder it ends with."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from configs.load import dump
from configs.schema import Experiment
from pipeline.environment import environment
from shards.files import read_json, sha256, write_json, write_text
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another run.folder") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is working on this run; wait for it, or choose another run.folder"
            ) from None
        except OSError:
            pass  # a file system without locks: one process at a time is up to the user
        for leftover in folder.rglob(".*.tmp"):
            leftover.unlink()
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # not empty: something was made
            folder.rmdir()


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
    about = read_json(folder / "encoder.json", "moleprint train CONFIG")
    encoder = model.Encoder(about["backbone"], about["embedding_dim"])
    encoder.load(folder / "encoder.safetensors")
    if sha256(folder / "encoder.safetensors") != about["encoder_sha256"]:
        raise UserError(f"{folder}: encoder.safetensors is not the one encoder.json is about; train again")
    model.place(encoder, device)
    return encoder.eval(), about
