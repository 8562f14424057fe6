"""The melanoma classifier of a run: the model that gives the verdict, those beside it, all calibrated alike.

`train.classify` makes it. It is kept as arrays and JSON: nothing that is loaded can run code.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from configs.errors import UserError
from configs.judging import Classifier as Settings
from configs.schema import Experiment
from shards.files import atomic, read_json, write_json
from train.baselines import Linear, Means, Model, Neighbours
from train.calibration import softmax
from train.embeddings import read_embeddings, read_meta
from train.metadata import Inputs, Metadata
from train.perceptron import Floats, Networks, mlp

MADE_BY = "moleprint classify CONFIG"
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Calibrated:
    """A model with what makes probabilities and calls of its logits."""

    model: Model
    inputs: Inputs
    class_weights: Sequence[float]
    """(classes,) how much more of each class the model was shown than the data hold."""
    temperature: float
    threshold: float
    """The positive class is called where its probability reaches this."""

    def probabilities(self, vectors: NDArray[np.float32], metadata: Metadata | None = None) -> Floats:
        """Calibrated class probabilities, (n, dim) -> (n, classes).

        Args:
            metadata: columns (n,) that `classifier.metadata` may ask for; one that lacks is missing in all.
        """
        logits = self.model.logits(vectors, self.inputs.encode(metadata or {}, len(vectors)))
        return softmax(logits / self.temperature - np.log(self.class_weights))


@dataclass(frozen=True)
class Classifier:
    """A fitted classifier, ready to be asked."""

    name: str
    """The model that gives the verdict: `mlp`, `logistic_regression`, `knn` or `nearest_mean`."""
    verdict: Calibrated
    beside: Mapping[str, Calibrated]
    """The other models, by name."""
    seeds: Sequence[Calibrated]
    """The MLP from each seed."""
    classes: list[str]
    positive: int
    """Index of the class that figures and threshold are about."""
    made_from: dict[str, Any]
    """sha256 of encoder and shard set, how the embeddings were made, and the settings."""
    sha256: str
    """Of classifier.safetensors."""

    @property
    def threshold(self) -> float:
        """The verdict's."""
        return self.verdict.threshold

    @property
    def temperature(self) -> float:
        """The verdict's."""
        return self.verdict.temperature

    @property
    def symmetries(self) -> bool:
        """Whether embeddings are means over the square's symmetries."""
        return bool((self.made_from["embed"] or {}).get("symmetries"))

    @property
    def half(self) -> bool:
        """Whether embeddings are kept in float16, and judged as rounded to it."""
        return (self.made_from["embed"] or {}).get("dtype") == "float16"

    def probabilities(self, vectors: NDArray[np.float32], metadata: Metadata | None = None) -> Floats:
        """The verdict's, as `Calibrated.probabilities`."""
        return self.verdict.probabilities(vectors, metadata)


def save(
    run: Path, record: Mapping[str, Any], models: Mapping[str, Model], seeds: Sequence[Model]
) -> dict[str, Any]:
    """Write classifier.safetensors, then classifier.json, which makes it complete.

    Args:
        record: what is known of the models, for `load`.
        models: all four by name.
        seeds: the MLP from each seed.

    Returns:
        What classifier.json holds: the record, and the sha256 of the other file.
    """
    tensors: dict[str, Tensor] = {}
    for name, model in models.items():
        if isinstance(model, Linear):
            tensors |= {f"{name}.{key}": torch.from_numpy(value) for key, value in vars(model).items()}
        elif isinstance(model, Means):
            tensors[f"{name}.means"] = torch.from_numpy(model.means)
            tensors[f"{name}.spread"] = torch.tensor(model.spread, dtype=torch.float64)
        elif isinstance(model, Networks) and model not in seeds:
            tensors |= _of_networks("ensemble", [model])
    tensors |= _of_networks("seed", seeds)
    blob = safetensors.torch.save(tensors)
    whole = {**record, "sha256": hashlib.sha256(blob).hexdigest()}
    with atomic(run / "classifier.safetensors") as file:
        file.write(blob)
    write_json(run / "classifier.json", whole)
    return whole


def load(run: Path) -> Classifier:
    """The classifier of a run.

    Raises:
        UserError: if there is none, or its two files do not belong together.
    """
    record = read_json(run / "classifier.json", MADE_BY)
    path = run / "classifier.safetensors"
    try:
        blob = path.read_bytes()
        if hashlib.sha256(blob).hexdigest() != record["sha256"]:
            raise ValueError("its sha256 is not the one in classifier.json")
        tensors, inputs = safetensors.torch.load(blob), Inputs.of(record["metadata"])
        about = {record["model"]: record, **record["beside"]}
        models = {
            name: _calibrated(_model(name, tensors, record, its, run), inputs, its)
            for name, its in about.items()
        }
        seeds = _networks("seed", tensors, record)
        return Classifier(
            name=record["model"],
            verdict=models.pop(record["model"]),
            beside=models,
            seeds=[
                _calibrated(Networks([network]), inputs, its)
                for network, its in zip(seeds, record["seeds"], strict=True)
            ],
            **{key: record[key] for key in ("classes", "positive", "made_from", "sha256")},
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be used ({error}); make it again with `{MADE_BY}`") from None


def finished(experiment: Experiment) -> bool:
    """Whether the run's classifier was made from its present embeddings with the present settings."""
    run = experiment.run.folder
    try:
        return bool(load(run).made_from == made_from(read_meta(run, "train"), experiment.classifier))
    except UserError:
        return False


def made_from(meta: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What a classifier rests on: `meta` of its embeddings, and its settings."""
    ids = {key: meta.get(key) for key in ("encoder_sha256", "shards_sha256", "embed")}
    return {**ids, "settings": settings.model_dump(mode="json")}


def _of_networks(prefix: str, models: Sequence[Model]) -> dict[str, Tensor]:
    members = [member for model in models if isinstance(model, Networks) for member in model.members]
    return {
        f"{prefix}.{number}.{name}": tensor.float().contiguous()
        for number, member in enumerate(members)
        for name, tensor in member.state_dict().items()
    }


def _networks(prefix: str, tensors: Tensors, record: Mapping[str, Any]) -> list[torch.nn.Sequential]:
    own = [name.split(".", 2)[1:] for name in tensors if name.startswith(f"{prefix}.")]
    found = []
    for number in range(len({number for number, _ in own})):
        network = mlp([record["inputs"], *record["hidden"], len(record["classes"])])
        network.load_state_dict(
            {name: tensors[f"{prefix}.{number}.{name}"] for its, name in own if its == str(number)}
        )
        found.append(network)
    return found


def _model(
    name: str, tensors: Tensors, record: Mapping[str, Any], its: Mapping[str, Any], run: Path
) -> Model:
    if name == "logistic_regression":
        return Linear(*(tensors[f"{name}.{key}"].numpy() for key in ("weight", "bias")))
    if name == "nearest_mean":
        return Means(tensors[f"{name}.means"].numpy(), float(tensors[f"{name}.spread"]))
    if name == "knn":
        return Remembered(run, its["hyperparameters"]["k"], len(record["classes"]))
    seeds = _networks("seed", tensors, record)
    return Networks(_networks("ensemble", tensors, record) or seeds[:1])


@dataclass(frozen=True)
class Remembered:
    """The run's k nearest neighbours: they are its training embeddings, read when they are first asked."""

    run: Path
    k: int
    classes: int

    def logits(self, vectors: NDArray[np.float32], extra: NDArray[np.float32]) -> Floats:
        """Embeddings (n, dim) -> (n, classes)."""
        return self._model.logits(vectors, extra)

    @cached_property
    def _model(self) -> Neighbours:
        train = read_embeddings(self.run, "train")
        return Neighbours(train.vectors, train.labels, self.k, self.classes)


def _calibrated(model: Model, inputs: Inputs, its: Mapping[str, Any]) -> Calibrated:
    return Calibrated(model, inputs, its["class_weights"], its["temperature"], its["threshold"])
