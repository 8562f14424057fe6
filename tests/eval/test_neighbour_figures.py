"""Retrieval and silhouette equal slow loops of their definitions, and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import silhouette_samples

from eval.retrieval import per_query, silhouette


def case(seed=0, n=60, classes=3):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, n)
    vectors = draw.normal(size=(n, 6)) + 2 * np.eye(6)[labels]
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return vectors, labels, draw.integers(0, 20, n)


@pytest.mark.parametrize("grouped", [False, True])
def test_it_equals_a_loop_over_sorted_neighbours(grouped):
    vectors, labels, groups = case()
    owners = groups if grouped else np.arange(len(labels))
    found = per_query(vectors, labels, groups=groups if grouped else None, chunk=7)
    for query in range(len(labels)):
        others = np.flatnonzero(owners != owners[query])
        order = others[np.argsort(-(vectors[others] @ vectors[query]), kind="stable")]
        right = labels[order] == labels[query]
        total = right.sum()
        precisions = [right[: i + 1].mean() * right[i] for i in range(total)]
        assert found["map_at_r"][query] == pytest.approx(np.sum(precisions) / total)
        for k in (1, 5, 10):
            assert found[f"recall_at_{k}"][query] == right[:k].any()


def test_some_are_asked_about_and_one_alone_in_its_class_finds_nothing():
    vectors, labels, _ = case()
    queries = np.array([5, 3, 40])
    asked, all_of_them = per_query(vectors, labels, queries=queries), per_query(vectors, labels)
    assert all(np.array_equal(asked[name], all_of_them[name][queries]) for name in asked)
    labels[0] = 9  # alone in its class: nothing could be found
    assert np.isnan(per_query(vectors, labels)["recall_at_1"][0])


def test_silhouette_is_that_of_scikit_learn():
    vectors, labels, _ = case()
    labels[0] = 9
    expected = silhouette_samples(vectors.astype(float), labels, metric="cosine")
    assert silhouette(vectors, labels) == pytest.approx(expected, abs=1e-6)
    assert silhouette(3 * vectors, labels) == pytest.approx(expected, abs=1e-6)
    assert np.isnan(silhouette(vectors, np.zeros_like(labels))).all()


@pytest.mark.filterwarnings("error")
def test_a_collapsed_encoder_has_no_silhouette():
    vectors = np.repeat(np.random.default_rng(0).normal(size=(1, 64)), 30, axis=0).astype(np.float32)
    assert not silhouette(vectors, np.arange(30) % 2).any()
