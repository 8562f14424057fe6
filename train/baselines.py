"""The baselines that keep the MLP honest: logistic regression, k nearest neighbours, nearest class mean.

scikit-learn fits them; what is kept of them are arrays. Each gives logits (n, classes), as the MLP does, and
is calibrated as it is.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid, NearestNeighbors
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from train.perceptron import Examples, Floats, Ints

PENALTIES = (1.0, 0.1, 0.01)
"""Weights of logistic regression's L2 penalty, beside the mean loss, that cross-validation chooses among."""
NEIGHBOURS = (10, 30, 100)
"""Numbers of neighbours that it chooses among."""
NEVER = -30.0  # logit of a class that was not met: a probability of 1e-13
HEAT = 0.07  # temperature of the neighbours' votes
ITERATIONS = 100


class Model(Protocol):
    """Something that judges samples."""

    def logits(self, vectors: NDArray[np.float32], extra: NDArray[np.float32]) -> Floats:
        """Embeddings (n, dim) and metadata (n, width) -> (n, classes)."""


@dataclass(frozen=True)
class Linear:
    """Logistic regression on standardised inputs, the standardisation folded into its weights."""

    weight: Floats
    """(classes, dim + width)."""
    bias: Floats
    """(classes,)."""

    @classmethod
    def fit(
        cls, examples: Examples, classes: int, penalties: Sequence[float], *, weighted: bool
    ) -> "list[Linear]":
        """One for each penalty, each from where the one before ended.

        Args:
            weighted: weigh classes by inverse frequency.
        """
        scaler = StandardScaler()
        inputs = scaler.fit_transform(examples.inputs)
        model = LogisticRegression(
            class_weight="balanced" if weighted else None, max_iter=ITERATIONS, warm_start=True
        )
        found = []
        for penalty in penalties:
            # One thread: products this small gain little by more, and on a busy machine wait for the slowest.
            with threadpool_limits(limits=1), warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", ConvergenceWarning
                )  # ended early, it is penalised a little more
                model.set_params(C=1 / (penalty * len(inputs))).fit(inputs, examples.labels)
            coefficients, intercept = model.coef_, model.intercept_
            if len(model.classes_) == 2:  # one row, of the second class against the first
                coefficients = np.concatenate([-coefficients / 2, coefficients / 2])
                intercept = np.concatenate([-intercept / 2, intercept / 2])
            weight, bias = np.zeros((classes, inputs.shape[1])), np.full(classes, NEVER)
            weight[model.classes_] = coefficients / scaler.scale_
            bias[model.classes_] = intercept - weight[model.classes_] @ scaler.mean_
            found.append(cls(weight, bias))
        return found

    def logits(self, vectors: NDArray[np.float32], extra: NDArray[np.float32]) -> Floats:
        """Embeddings (n, dim) and metadata (n, width) -> (n, classes)."""
        return np.asarray(
            np.concatenate([vectors, extra], axis=1).astype(np.float64) @ self.weight.T + self.bias
        )


@dataclass(frozen=True)
class Means:
    """Nearest class mean: logits are squared distances to them, in units of the spread about them.

    It judges by the embedding alone: distances and metadata have no unit in common.
    """

    means: Floats
    """(classes, dim)."""
    spread: float
    """Mean squared distance of a training sample to its class's mean."""

    @classmethod
    def fit(cls, vectors: NDArray[np.float32], labels: Ints, classes: int) -> "Means":
        """Of training embeddings; a class that was not met lies infinitely far."""
        model = NearestCentroid().fit(vectors, labels)
        means = np.full((classes, vectors.shape[1]), np.inf)
        means[model.classes_] = model.centroids_
        spread = float(((vectors - means[labels]) ** 2).sum(axis=1).mean())
        return cls(means, spread or 1.0)

    def logits(self, vectors: NDArray[np.float32], extra: NDArray[np.float32]) -> Floats:
        """Embeddings (n, dim) -> (n, classes)."""
        squares = np.stack([((vectors - mean) ** 2).sum(axis=1) for mean in self.means], axis=1)
        return np.asarray(np.maximum(-squares / self.spread, NEVER))


@dataclass(frozen=True)
class Neighbours:
    """k nearest neighbours by cosine, each voting with exp(cos / 0.07) (Wu et al. 2018, "Unsupervised Feature
    Learning via Non-Parametric Instance Discrimination"). By the embedding alone, as `Means`."""

    known: NDArray[np.float32]
    """(m, dim) unit training embeddings."""
    labels: Ints
    """(m,)."""
    k: int
    classes: int

    def logits(self, vectors: NDArray[np.float32], extra: NDArray[np.float32]) -> Floats:
        """Embeddings (n, dim) -> (n, classes)."""
        cosines, neighbours = nearest(self.known, vectors, self.k)
        return votes(cosines, self.labels[neighbours], self.classes)


def nearest(known: NDArray[np.float32], vectors: NDArray[np.float32], k: int) -> tuple[Floats, Ints]:
    """Cosines (n, k) and rows (n, k) of the k nearest of known (m, dim) to vectors (n, dim), nearest
    first."""
    index = NearestNeighbors(n_neighbors=min(k, len(known)), algorithm="brute").fit(known)
    distances, rows = index.kneighbors(vectors)
    return 1 - distances.astype(np.float64) ** 2 / 2, rows


def votes(cosines: Floats, labels: Ints, classes: int) -> Floats:
    """Logits (n, classes) of neighbours (n, k): log shares, with one vote more shared by all classes."""
    weights = np.exp((cosines - cosines.max(axis=1, keepdims=True)) / HEAT)
    counts = np.stack([(weights * (labels == label)).sum(axis=1) for label in range(classes)], axis=1)
    more = weights.mean(axis=1, keepdims=True)
    return np.asarray(np.log((counts + more / classes) / (weights.sum(axis=1, keepdims=True) + more)))
