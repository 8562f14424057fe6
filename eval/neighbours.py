"""How a new image lies among those that the encoder learned from: the nearest, and whether they are near."""

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from eval.metrics import Floats, Ints
from train.embeddings import Embeddings

RANK = 10
"""The neighbour whose distance counts: a single one may be a stray."""
QUANTILE = 0.99
"""Share of the validation images that lie no farther."""
MOST = 2000
"""Validation images that the limit is taken from, evenly spaced in the split, at most."""
CHUNK = 1 << 14  # training images compared at a time: with MOST others 130 MB

RULE = f"their {RANK}th nearest training image is farther than that of {QUANTILE:.0%} of validation images"


class Known:
    """The training split's embeddings, to be asked for neighbours.

    The distance to the k-th neighbour among normalised embeddings tells images of another kind from those
    learned from (Sun et al. 2022, "Out-of-Distribution Detection with Deep Nearest Neighbors"). The limit
    comes from validation alone and is the same each time.
    """

    def __init__(self, train: Embeddings, val: Embeddings, device: torch.device) -> None:
        self.train = train
        self.rank = min(RANK, len(train.keys))
        self._val = val.vectors[:: -(-len(val.keys) // MOST)]
        self._vectors = torch.from_numpy(train.vectors).to(device)

    @cached_property
    def limit(self) -> float:
        """Distance beyond which an image is out of distribution."""
        return float(np.quantile(self.distance(self._val), QUANTILE))

    def distance(self, vectors: NDArray[np.float32]) -> Floats:
        """Euclidean distance (n,) of embeddings (n, dim) to their `rank`-th nearest training image."""
        return self.nearest(vectors, self.rank)[1][:, -1]

    def nearest(self, vectors: NDArray[np.float32], count: int) -> tuple[Ints, Floats]:
        """Rows of the training split and distances, (n, count) each, nearest first; fewer if it has fewer."""
        query = torch.from_numpy(vectors).to(self._vectors.device)
        alike = torch.empty(len(vectors), 0, device=query.device)
        rows = torch.empty(len(vectors), 0, dtype=torch.int64, device=query.device)
        for start in range(0, len(self._vectors), CHUNK):
            # Of unit vectors the nearest are the most alike: |a - b|² = 2 - 2ab.
            here = query @ self._vectors[start : start + CHUNK].T
            best = here.topk(min(count, here.shape[1]), dim=1)
            alike, rows = torch.cat([alike, best.values], 1), torch.cat([rows, best.indices + start], 1)
            kept = alike.topk(min(count, alike.shape[1]), dim=1).indices
            alike, rows = alike.gather(1, kept), rows.gather(1, kept)
        found = rows.cpu().numpy()
        # Anew in float64: of a copy the distance is 0, which 2 - 2ab would miss by rounding.
        away = self.train.vectors[found].astype(np.float64) - vectors[:, None]
        distances = np.sqrt((away**2).sum(axis=2))
        order = np.argsort(distances, axis=1, kind="stable")
        return np.take_along_axis(found, order, 1), np.take_along_axis(distances, order, 1)
