"""Embeddings on a plane, to look at."""

import numpy as np
from numpy.typing import NDArray


def components(
    fitted: NDArray[np.float32], shown: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where samples lie along the first two principal components of others.

    Args:
        fitted: (m, dim) samples that the components are of.
        shown: (n, dim) samples to place; dim is 2 or more.

    Returns:
        (n, 2) places, and (2,) the components' shares of the variance.
    """
    variances, directions = np.linalg.eigh(np.cov(fitted, rowvar=False, dtype=np.float64))  # ascending
    places = (shown - fitted.mean(axis=0, dtype=np.float64)) @ directions[:, :-3:-1]
    return places, variances[:-3:-1] / max(variances.sum(), np.finfo(float).tiny)
