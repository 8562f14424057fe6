"""Validation figures of frozen embeddings: retrieval, nearest neighbours, a linear probe."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.counter import Purpose, generator
from pipeline.sampler import Indices
from train import influence, retrieval
from train.distributed import World, broadcast, sum_over_ranks
from train.precision import exact_products

NEIGHBOURS, TEMPERATURE = 20, 0.07  # of the weighted kNN of Wu 2018 (arXiv 1805.01978), as DINO evaluates by
MARGIN = 0.2  # of the triplet loss's hinge, where training's is soft
PROBE_C = 0.1  # inverse strength of the probe's L2 penalty, on standardised embeddings


@dataclass(frozen=True)
class Figures:
    """Of a validation."""

    values: dict[str, float]
    parts: influence.Floats
    """What each group of the split contributes to the monitored one (groups,); see `train.influence`."""


@dataclass(frozen=True)
class Embedded:
    """Samples (n,) of a set, their embeddings (n, dim) and classes (n,)."""

    index: NDArray[np.int64]
    vectors: NDArray[np.float32]
    labels: NDArray[np.int64]


def figures(
    held: Embedded,
    known: Embedded | None,
    score: NDArray[np.float32],
    groups: NDArray[np.int64],
    *,
    positive: int,
    margin: float,
    monitor: str,
    world: World,
) -> Figures:
    """Figures of the validation split, the same on every rank; the ranks share the retrieval.

    Args:
        held: the validation split, the same on every rank.
        known: training samples that kNN and the linear probe learn from; without any there is neither.
        score: of each validation sample (n,), which `roc_auc` is of.
        groups: of each validation sample (n,).
    """
    vectors, labels = (torch.from_numpy(a).to(world.device) for a in (held.vectors, held.labels))
    found = retrieval.queries(vectors, labels, margin=margin, rank=world.rank, world_size=world.size)
    found = sum_over_ranks(found)
    scores: dict[str, NDArray[np.floating]] = {"roc_auc": score}
    if known is not None:
        scores["knn_roc_auc"] = neighbours(vectors, known, positive).cpu().numpy()
        scores["probe_roc_auc"] = linear_probe(held.vectors, known, positive)
    truth = held.labels == positive
    values = {name: float(roc_auc_score(truth, its)) for name, its in scores.items()}
    values |= retrieval.averages(found, labels)
    if monitor in scores:
        each = influence.of_auc(scores[monitor], truth)
    else:
        each = influence.of_mean(found[:, retrieval.COLUMNS.index(monitor)].cpu().numpy(), held.labels)
    result: Figures = broadcast(Figures(values, influence.over_groups(each, groups)))
    return result


def neighbours(vectors: torch.Tensor, known: Embedded, positive: int, k: int = NEIGHBOURS) -> torch.Tensor:
    """Share (n,) of the positive class among each one's k nearest, weighted by exp(cosine / temperature)."""
    others, labels = (torch.from_numpy(a).to(vectors.device) for a in (known.vectors, known.labels))
    shares = []
    with torch.inference_mode(), exact_products():
        for part in torch.split(vectors, 4096):
            cosine, nearest = (part @ others.T).topk(min(k, len(others)), dim=1)
            weight = ((cosine - 1) / TEMPERATURE).exp()
            shares.append((weight * (labels[nearest] == positive)).sum(1) / weight.sum(1))
    return torch.cat(shares)


def linear_probe(vectors: NDArray[np.float32], known: Embedded, positive: int) -> NDArray[np.float64]:
    """Log-odds (n,) of the positive class by a logistic regression on standardised embeddings."""
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=PROBE_C, class_weight="balanced", max_iter=1000)
    )
    probe.fit(known.vectors, known.labels == positive)
    return np.asarray(probe.decision_function(vectors))


def draw(labels: NDArray[np.int64], indices: Indices, count: int, *, seed: int) -> Indices:
    """`count` of the indices, ascending, as many of each class; fewer where a class has not that many."""
    shuffled = generator(seed, Purpose.PROBE, 0, 0).permutation(indices)
    classes = np.unique(labels[indices])
    chosen = [shuffled[labels[shuffled] == label][: count // len(classes)] for label in classes]
    return np.sort(np.concatenate(chosen))
