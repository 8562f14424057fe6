"""Principal components, beside scikit-learn's."""

import numpy as np
from sklearn.decomposition import PCA

from train.plane import components


def test_the_components_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(1)
    fitted, shown = (draw.normal(size=(count, 8)).astype(np.float32) for count in (50, 20))
    theirs = PCA(2, svd_solver="full").fit(fitted)
    places, shares = components(fitted, shown)
    assert np.allclose(np.abs(places), np.abs(theirs.transform(shown)), atol=1e-4)
    assert np.allclose(shares, theirs.explained_variance_ratio_, atol=1e-6)
