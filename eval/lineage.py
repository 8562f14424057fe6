"""Where a run's figures come from: the data, what keeps its splits apart, the encoder, the speed."""

import csv
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import Experiment
from shards.describe import DUPLICATES, pairs_said
from shards.leaks import crossing
from shards.shardset import SPLITS, ShardSet
from train import lines
from train.embeddings import Embeddings

Fact = tuple[str, str]


def data_facts(shards: ShardSet) -> list[Fact]:
    """What a shard set was made from, and how."""
    made = shards.manifest
    facts = []
    for name, source in made["sources"].items():
        tables = [t for t in (source["table"], *source["more_tables"], source["duplicates"]) if t]
        said = "; ".join(f"{table['name']} (sha256 {table['sha256']})" for table in tables)
        facts.append(
            (
                f"source {name}".strip(),
                f"{said or 'shards with their own labels'}; images in {source['images']}",
            )
        )
    settings = made["settings"]
    encode = settings["encode"]
    meaning = "; ".join(f"{name} = {', '.join(map(str, v))}" for name, v in settings["classes"].items())
    how = f"{encode['resize']} {encode['size']} pixels, JPEG quality {encode['quality']} where encoded anew"
    return [
        *facts,
        ("classes", f"column {settings['label_column']}: {meaning}"),
        ("images", how),
        ("rejected", f"{made['rejected']:,} images that could not be used"),
        ("seed of the split", str(settings["seed"])),
        ("shard set", f"sha256 {shards.sha256}"),
    ]


def leak_facts(
    shards: ShardSet | None, data: Mapping[str, Embeddings], group: str
) -> list[tuple[str, str, bool]]:
    """What was checked for this report: claim, what was found, whether it holds."""
    splits = np.array([split for split in SPLITS for _ in data[split].keys])
    total = len(splits)

    def none_cross(what: str, names: list[str | None]) -> None:
        found = crossing(np.array(names, dtype=object), splits)
        distinct = len(set(names) - {None, ""})
        facts.append((f"no {what} in two splits", f"{len(found)} of {distinct:,} {what}s are", not found))

    facts: list[tuple[str, str, bool]] = []
    none_cross(group, [name for split in SPLITS for name in data[split].groups])
    keys = [key for split in SPLITS for key in data[split].keys]
    none_cross("image", list(keys))
    lesions = [name for split in SPLITS for name in _column(data[split], "lesion")]
    if len(lesions) == total and any(lesions) and group != "lesion":
        none_cross("lesion", lesions)
    if shards is not None:
        apart = _copies_apart(shards.folder / DUPLICATES, dict(zip(keys, splits.tolist(), strict=True)))
        found = f"{apart:,} pairs are, of those that packing found: {pairs_said(shards.manifest)}"
        facts.append(("no copy in another split", found, not apart))
    return facts


def _copies_apart(listed: Path, split_of: Mapping[str, str]) -> int:
    """Pairs of copies whose images lie in two splits; a set without copies has no list of them."""
    if not listed.exists():
        return 0
    with listed.open(encoding="utf-8", newline="") as file:
        pairs = [(split_of.get(row["one"]), split_of.get(row["other"])) for row in csv.DictReader(file)]
    return sum(one != other for one, other in pairs if one and other)


def _column(embeddings: Embeddings, name: str) -> list[str | None]:
    column = embeddings.metadata.get(name)
    return [] if column is None else list(column.to_pylist())


def speed_facts(run: Path) -> list[Fact]:
    """Images/s and waiting of training, as it logged them, and the machine."""
    rows = defaultdict(list)
    for row in lines.read(run / lines.FILE):
        if row["stage"] == "encoder":
            for name in ("images_per_second", "data_wait", "val_seconds"):
                if isinstance(row.get(name), int | float):
                    rows[name].append(row[name])
    facts = []
    if rows["images_per_second"]:
        low, middle, high = np.quantile(rows["images_per_second"], [0.1, 0.5, 0.9])
        facts.append(
            ("training", f"{middle:,.0f} images/s, median ({low:,.0f} to {high:,.0f}, tenths cut off)")
        )
    if rows["data_wait"]:
        facts.append(("waiting for data", f"{np.median(rows['data_wait']):.1%} of the time, median"))
    if rows["val_seconds"]:
        facts.append(("validation", f"{np.median(rows['val_seconds']):,.1f} s an epoch, median"))
    return facts


def machine_facts(run: Path) -> list[Fact]:
    """What `environment.json` says of the last stage's machine."""
    path = run / "environment.json"
    if not path.exists():
        return []
    about = json.loads(path.read_text(encoding="utf-8"))
    gpus = about.get("gpus") or ["none"]
    packages = ", ".join(f"{name} {version}" for name, version in about.get("packages", {}).items())
    return [
        ("GPUs", ", ".join(str(gpu.get("name", gpu) if isinstance(gpu, dict) else gpu) for gpu in gpus)),
        ("CPU", f"{about.get('cores')} cores, {about.get('processor')}"),
        ("software", f"Python {about.get('python')}, {packages}"),
        ("commit", str(about.get("git_commit"))),
    ]


def encoder_facts(experiment: Experiment, about: Mapping[str, Any]) -> list[Fact]:
    """Architecture and training of the encoder."""
    if not about:
        return []
    model, loss, train = experiment.model, experiment.loss, experiment.train
    size = about["preprocessing"]["size"]
    facts = [
        (
            "encoder",
            f"{about['backbone']}, {about['embedding_dim']} numbers an image, seen at {size} × {size} pixels",
        ),
        (
            "began from",
            {"none": "random weights", "imagenet": "ImageNet weights"}.get(model.weights, model.weights),
        ),
        ("training", f"{experiment.loader.global_batch} images a step, seed {train.seed}"),
        ("loss", ", ".join(f"{name} {value}" for name, value in loss.model_dump(mode="json").items())),
    ]
    if "epochs" in about:
        chosen = f"by {train.monitor} on validation, train.tolerance {train.tolerance:g}"
        facts.append(("epochs", f"{about['epochs']}; the encoder is that of {about['best_epoch']}, {chosen}"))
    return facts
