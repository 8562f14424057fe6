"""Class centroids of training embeddings: a validation score that needs no second pass over an epoch."""

from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray


class Centroids:
    """Sums (classes, dim) of unit vectors; every rank adds the global batch, so all hold the same."""

    def __init__(self, classes: int, dim: int, device: torch.device) -> None:
        self._sums = torch.zeros(classes, dim, device=device)

    @classmethod
    def of(cls, vectors: NDArray[np.float32], labels: NDArray[np.int64], classes: int) -> Self:
        """Of embeddings (n, dim) and their class indices (n,)."""
        centroids = cls(classes, vectors.shape[1], torch.device("cpu"))
        centroids.add(torch.from_numpy(vectors), torch.from_numpy(labels), torch.tensor(True))
        return centroids

    def clear(self) -> None:
        """Start an epoch."""
        self._sums.zero_()

    def add(self, embeddings: torch.Tensor, labels: torch.Tensor, good: torch.Tensor) -> None:
        """Add a batch: embeddings (batch, dim), labels (batch,); nothing where `good`, a scalar, is false."""
        self._sums.index_add_(0, labels, torch.where(good, embeddings.float(), 0))

    def score(self, vectors: NDArray[np.float32], positive: int) -> NDArray[np.float32]:
        """How much nearer each of (n, dim) is to the positive centroid than to any other: (n,), cosine."""
        centres = torch.nn.functional.normalize(self._sums, dim=1).cpu().numpy()
        cosine = vectors @ centres.T
        others = np.delete(cosine, positive, axis=1).max(axis=1)
        return np.asarray(cosine[:, positive] - others)

    def state(self) -> torch.Tensor:
        """For a checkpoint."""
        return self._sums

    def load(self, sums: torch.Tensor) -> None:
        """From a checkpoint."""
        self._sums.copy_(sums)
