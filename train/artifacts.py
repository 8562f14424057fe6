"""W&B artifacts, so that a run shows what it was made from and what it made: shard set -> run -> encoder."""

import re
from pathlib import Path
from typing import Any

import wandb

from shards.files import read_json
from shards.shardset import MANIFEST, ShardSet, is_url

ABOUT = ("backbone", "embedding_dim", "preprocessing", "classes", "shards_sha256", "encoder_sha256")


def dataset(shards: ShardSet, place: Path | str) -> wandb.Artifact:
    """A shard set by reference: nothing of it is sent but its sum and counts.

    Args:
        shards: the set as it was opened.
        place: where it lies for all, a folder or a URL.
    """
    where = str(place).rstrip("/") if is_url(place) else Path(place).resolve().as_uri()
    manifest = shards.manifest
    counts = {key: manifest[key] for key in ("splits", "classes")}
    parent, last = where.split("/")[-2:]
    name = _name(parent if last == "shards" else last, "shards")  # those of several sets are called so
    artifact = wandb.Artifact(name, "dataset", metadata={"sha256": shards.sha256, **counts})
    # Unread, a reference looks the same to W&B whatever is there; the sum makes another set another version.
    artifact.add_reference(f"{where}/{MANIFEST}", name=MANIFEST, checksum=False)
    with artifact.new_file("SHA256") as file:
        file.write(f"{shards.sha256}  {MANIFEST}\n")
    return artifact


def encoder(folder: Path) -> wandb.Artifact:
    """The encoder of a run folder, with its description."""
    about = read_json(folder / "encoder.json", "moleprint train CONFIG")
    kept = {key: about[key] for key in ABOUT if key in about}
    artifact = wandb.Artifact(_name(folder.resolve().name, "encoder"), "model", metadata=kept)
    for name in ("encoder.safetensors", "encoder.json"):
        artifact.add_file(str(folder / name))
    return artifact


def use(run: Any, artifact: wandb.Artifact) -> None:
    """Declare an artifact that may not exist yet as an input of a run.

    `run.use_artifact` would wait for the network, and refuses offline runs; `wandb sync` knows this call.
    """
    run._log_artifact(artifact, is_user_created=True, use_after_commit=True)


def _name(*parts: str) -> str:
    return re.sub(r"[^\w.-]+", "-", "-".join(parts))
