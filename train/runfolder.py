"""The run folder: what it says of how it came to be, and the encoder it ends with."""

from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from configs.load import dump
from configs.schema import Experiment
from pipeline.environment import environment
from shards.files import read_json, sha256, write_json, write_text
from train import model


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
