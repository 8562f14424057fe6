"""The melanoma classifier: a small MLP on frozen embeddings, calibrated, with an operating point.

Validation alone chooses the best epoch, the temperature and the threshold; the test split stays unseen.
"""

import copy
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from configs.errors import UserError
from configs.judging import Classifier as Settings
from configs.schema import Experiment
from shards.files import atomic, read_json, write_json
from train.calibration import choose_threshold, fit_temperature, nll, softmax
from train.embeddings import Embeddings, read_embeddings, read_meta

MADE_BY = "moleprint classify CONFIG"
WEIGHTS, ORDER, DROPOUT = range(3)  # purposes of randomness


class Log(Protocol):
    """Where the figures of an epoch go; `train.tracking.Tracker` is one."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values at an optimiser step."""


@dataclass(frozen=True)
class Classifier:
    """A fitted classifier, ready to be asked."""

    network: nn.Sequential
    """(n, dim) embeddings -> (n, classes) logits, in float64 so that the batch's size cannot matter."""
    classes: list[str]
    positive: int
    """Index of the class that figures and threshold are about."""
    threshold: float
    """The positive class is called where its probability reaches this."""
    temperature: float
    class_weights: list[float]
    """(classes,) weights of the loss that the network was trained with."""
    made_from: dict[str, Any]
    """sha256 of encoder and shard set, and the settings."""
    sha256: str
    """Of classifier.safetensors."""

    def probabilities(self, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
        """Calibrated class probabilities of embeddings: (n, dim) -> (n, classes)."""
        return softmax(_logits(self.network, vectors) / self.temperature - np.log(self.class_weights))


def fit(
    experiment: Experiment, *, device: str = "cpu", tracker: Log | None = None, progress: bool = True
) -> dict[str, Any]:
    """Train the MLP on the train split, calibrate it on validation, write classifier.{safetensors,json}.

    Two fits of the same embeddings and settings write the same bytes.

    Returns:
        What classifier.json holds.

    Raises:
        UserError: if embeddings are missing or do not belong together, a class is missing, or it diverges.
    """
    run, settings = experiment.run.folder, experiment.classifier
    train, val = read_embeddings(run, "train"), read_embeddings(run, "val")
    classes, positive = train.meta["classes"], train.meta["positive"]
    _check(train, val, run)
    counts = np.bincount(train.labels, minlength=len(classes))
    class_weights = (
        len(train.labels) / (len(classes) * counts) if settings.balanced else np.ones(len(classes))
    )

    # fork_rng: initialisation and dropout draw from torch's global generators, which are put back after.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        network, best_epoch = _train(train, val, class_weights, settings, device, tracker, progress)

    blob = safetensors.torch.save({name: t.cpu().contiguous() for name, t in network.state_dict().items()})
    logits, offset = _logits(network.cpu().double().eval(), val.vectors), np.log(class_weights)
    temperature = fit_temperature(logits, val.labels, offset)
    probabilities = softmax(logits / temperature - offset)
    scores, positives = probabilities[:, positive], val.labels == positive
    record = {
        "dim": train.vectors.shape[1],
        "hidden": list(settings.hidden),
        "classes": classes,
        "positive": positive,
        "threshold": choose_threshold(scores, positives, settings.threshold, settings.sensitivity),
        "threshold_rule": settings.threshold,
        "temperature": temperature,
        "class_weights": class_weights.tolist(),
        "best_epoch": best_epoch,
        "val": {
            "nll": nll(probabilities, val.labels),
            "nll_before_temperature": nll(softmax(logits - offset), val.labels),
            "roc_auc": float(roc_auc_score(positives, scores)),
            "pr_auc": float(average_precision_score(positives, scores)),
        },
        "made_from": _made_from(train.meta, settings),
        "sha256": hashlib.sha256(blob).hexdigest(),
    }
    with atomic(run / "classifier.safetensors") as file:
        file.write(blob)
    write_json(run / "classifier.json", record)
    return record


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
        network = mlp([record["dim"], *record["hidden"], len(record["classes"])])
        network.load_state_dict(safetensors.torch.load(blob))
        return Classifier(
            network=network.double().eval(),
            **{key: record[key] for key in ("classes", "positive", "threshold", "temperature")},
            **{key: record[key] for key in ("class_weights", "made_from", "sha256")},
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be used ({error}); make it again with `{MADE_BY}`") from None


def finished(experiment: Experiment) -> bool:
    """Whether the run's classifier was made from its present embeddings with the present settings."""
    run = experiment.run.folder
    try:
        return bool(load(run).made_from == _made_from(read_meta(run, "train"), experiment.classifier))
    except UserError:
        return False


def mlp(dims: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers of these widths; LeakyReLU and dropout after each but the last."""
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(dims):
        layers += [nn.Linear(width, following), nn.LeakyReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


def _check(train: Embeddings, val: Embeddings, run: Path) -> None:
    if train.meta != val.meta:
        raise UserError(
            f"{run / 'embeddings'}: train and val come from different encoders or shard sets; "
            "make them again with `moleprint embed CONFIG`"
        )
    classes, positive = train.meta["classes"], train.meta["positive"]
    for index, name in enumerate(classes):
        if not (train.labels == index).any():
            raise UserError(
                f"class '{name}' has no sample in train, so it cannot be learned; check pack.classes"
            )
    kinds = len(np.unique(val.labels == positive))
    if kinds < 2:
        raise UserError(
            f"val: all or none of its {len(val.labels)} samples are '{classes[positive]}', so no threshold "
            "can be chosen on it; pack again with a larger pack.ratios.val or another pack.seed"
        )


def _train(
    train: Embeddings,
    val: Embeddings,
    class_weights: NDArray[np.float64],
    settings: Settings,
    device: str,
    tracker: Log | None,
    progress: bool,
) -> tuple[nn.Sequential, int]:
    """The network of the epoch with the lowest validation loss, and that epoch, from 1."""
    x, val_x = torch.from_numpy(train.vectors).to(device), torch.from_numpy(val.vectors).to(device)
    y, val_y = torch.from_numpy(train.labels).to(device), torch.from_numpy(val.labels).to(device)
    weight = torch.from_numpy(class_weights).float().to(device)
    positives, positive = val.labels == train.meta["positive"], train.meta["positive"]

    torch.manual_seed(_seed(settings.seed, WEIGHTS, 0))
    network = mlp([x.shape[1], *settings.hidden, len(weight)], settings.dropout).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay)
    steps = -(-len(y) // settings.batch)
    best_loss, best_epoch, best_state = float("inf"), 0, network.state_dict()
    with tqdm(total=settings.epochs * len(y), unit="image", desc="classify", disable=not progress) as bar:
        for epoch in range(1, settings.epochs + 1):
            loss = _epoch(network, optimizer, x, y, weight, settings, epoch)
            with torch.inference_mode():
                logits = network.eval()(val_x)
                val_loss = F.cross_entropy(logits, val_y, weight).item()
            if not np.isfinite(loss + val_loss):
                raise UserError(
                    f"classifier: the loss is {loss + val_loss} in epoch {epoch}; lower classifier.lr"
                )
            if tracker:
                score = (logits[:, positive] - logits.logsumexp(1)).cpu().numpy()
                auc = float(roc_auc_score(positives, score))
                values = {"epoch": epoch, "loss": loss, "val_loss": val_loss, "val_roc_auc": auc}
                tracker.log(epoch * steps, values)
            bar.update(len(y))
            bar.set_postfix(epoch=epoch, loss=f"{loss:.3f}", val_loss=f"{val_loss:.3f}", refresh=False)
            if val_loss < best_loss:
                best_loss, best_epoch = val_loss, epoch
                best_state = copy.deepcopy(network.state_dict())
            elif settings.patience and epoch - best_epoch >= settings.patience:
                break
        bar.total = bar.n  # full, though it stopped early
    network.load_state_dict(best_state)
    return network, best_epoch


def _epoch(
    network: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    settings: Settings,
    epoch: int,
) -> float:
    """One pass over the embeddings in a fresh order; returns the mean loss."""
    network.train()
    torch.manual_seed(_seed(settings.seed, DROPOUT, epoch))
    order = np.random.default_rng((settings.seed, ORDER, epoch)).permutation(len(y))
    total = torch.zeros((), device=x.device)
    for batch in torch.split(torch.from_numpy(order).to(x.device), settings.batch):
        loss = F.cross_entropy(network(x[batch]), y[batch], weight)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        total += loss.detach() * len(batch)
    return total.item() / len(y)


def _logits(network: nn.Sequential, vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    with torch.inference_mode():
        return np.asarray(network(torch.from_numpy(vectors).double()).numpy())


def _made_from(meta: dict[str, Any], settings: Settings) -> dict[str, Any]:
    ids = {key: meta[key] for key in ("encoder_sha256", "shards_sha256")}
    return {**ids, "settings": settings.model_dump(mode="json")}


def _seed(*entropy: int) -> int:
    """64 bits for torch.manual_seed from (seed, purpose, epoch)."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
