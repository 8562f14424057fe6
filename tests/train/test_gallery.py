"""What W&B is shown of the validation split."""

import numpy as np

from train.gallery import hardest_triplets


def test_the_hardest_triplets_are_those_of_a_slow_loop() -> None:
    draw = np.random.default_rng(7)
    vectors = draw.normal(size=(40, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = draw.integers(0, 3, 40)
    labels[labels == 2] = np.where(np.arange((labels == 2).sum()) == 0, 2, 1)  # one that has no positive
    expected = []
    for a in range(40):
        apart = np.linalg.norm(vectors - vectors[a], axis=1)
        same = [i for i in range(40) if labels[i] == labels[a] and i != a]
        other = [i for i in range(40) if labels[i] != labels[a]]
        if same:
            p, n = max(same, key=lambda i: apart[i]), min(other, key=lambda i: apart[i])
            expected.append((apart[n] - apart[p], (a, p, n)))
    rows, apart = hardest_triplets(vectors, labels, 6)
    assert [tuple(row) for row in rows] == [row for _, row in sorted(expected)[:6]]
    assert np.allclose(apart[:, 1] - apart[:, 0], [gap for gap, _ in sorted(expected)[:6]], atol=1e-5)
