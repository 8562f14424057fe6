"""Retrieval figures: against pytorch-metric-learning and slow loops, any chunk and any world size."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.reducers import MeanReducer
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from train import retrieval
from train.retrieval import COLUMNS, averages, queries

MARGIN = 0.2


def samples(count: int = 90, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors (count, 7) that their unbalanced classes (count,) are seen in."""
    draw = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, generator=draw) ** 2 * classes).long()
    vectors = torch.randn(count, 7, generator=draw) + 0.9 * F.one_hot(labels, 7)
    return F.normalize(vectors, dim=1), labels


@pytest.mark.parametrize("classes", [2, 3])
def test_recall_and_map_at_r_are_those_of_pytorch_metric_learning(classes: int) -> None:
    vectors, labels = samples(classes=classes)
    theirs = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(LpDistance()),
        device=torch.device("cpu"),
    ).get_accuracy(vectors, labels)
    recall, _, map_at_r, _ = queries(vectors, labels, margin=MARGIN).mean(0).tolist()
    assert recall == pytest.approx(theirs["precision_at_1"], abs=1e-9)
    assert map_at_r == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)


def test_averages_let_every_class_count_the_same() -> None:
    vectors, labels = samples()
    theirs = AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(LpDistance()),
        avg_of_avgs=True,
        device=torch.device("cpu"),
    ).get_accuracy(vectors, labels)
    ours = averages(queries(vectors, labels, margin=MARGIN), labels)
    assert ours["recall_at_1"] == pytest.approx(theirs["precision_at_1"], abs=1e-9)
    assert ours["map_at_r"] == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)


def test_the_triplet_loss_of_two_even_classes_is_that_of_all_triplets() -> None:
    vectors, _ = samples(40)
    labels = torch.arange(40) % 2
    theirs = TripletMarginLoss(margin=MARGIN, distance=LpDistance(), reducer=MeanReducer())(vectors, labels)
    ours = averages(queries(vectors, labels, margin=MARGIN), labels)
    assert ours["triplet_loss"] == pytest.approx(float(theirs), rel=1e-5)


def test_every_column_is_that_of_a_slow_loop() -> None:
    vectors, labels = samples(30)
    distance = torch.cdist(vectors.double(), vectors.double()).numpy()
    for query, found in enumerate(queries(vectors, labels, margin=MARGIN).numpy()):
        others = [i for i in np.argsort(distance[query]) if i != query]
        hits = [int(labels[i] == labels[query]) for i in others]
        r = sum(hits)
        precision = [sum(hits[: k + 1]) / (k + 1) * hits[k] for k in range(r)]
        hinges = [
            max(0, distance[query, p] - distance[query, n] + MARGIN)
            for p in others
            for n in others
            if labels[p] == labels[query] != labels[n]
        ]
        expected = (max(hits[:1]), max(hits[:5]), sum(precision) / r, np.mean(hinges))
        np.testing.assert_allclose(
            found, expected, atol=1e-6, err_msg=str(dict(zip(COLUMNS, found, strict=True)))
        )


@pytest.mark.parametrize("cells", [1, 200, 1 << 22])
@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_ranks_and_chunks_change_nothing(cells: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, labels = samples()
    whole = queries(vectors, labels, margin=MARGIN)
    monkeypatch.setattr(retrieval, "_CELLS", cells)
    parts = [queries(vectors, labels, margin=MARGIN, rank=r, world_size=size) for r in range(size)]
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-6)
    assert (torch.stack([(p != 0).any(1) for p in parts]).sum(0) <= 1).all()  # each by one rank


def test_a_sample_alone_in_its_class_counts_for_none() -> None:
    vectors, labels = samples()
    lonely = torch.cat([labels, torch.tensor([9])])
    found = queries(torch.cat([vectors, vectors[:1]]), lonely, margin=MARGIN)
    assert found[-1].isnan().all() and not found[:-1].isnan().any()
    assert not any(np.isnan(value) for value in averages(found, lonely).values())


def test_of_two_at_one_distance_the_other_class_is_nearer() -> None:
    vectors = F.normalize(torch.ones(4, 3), dim=1)  # a collapsed encoder finds nothing
    found = queries(vectors, torch.tensor([0, 0, 1, 1]), margin=MARGIN)
    assert found[:, 0].tolist() == [0] * 4 and (found[:, 2] == 0).all()
    torch.testing.assert_close(found[:, 3], torch.full((4,), MARGIN, dtype=torch.float64))


def test_memory_is_that_of_a_chunk() -> None:
    """20,000 samples have 1.6 GB of distances; a chunk's are 16 MB."""
    tracked: list[int] = []
    vectors, labels = samples(20_000, classes=2)
    keep = retrieval._distances

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        tracked.append(len(a) * len(b) * 4)
        return keep(a, b)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_distances", watched)
        queries(vectors, labels, margin=MARGIN, rank=3, world_size=200)
    assert 1e6 < max(tracked) <= 4 * retrieval._CELLS
