"""Figures of how embeddings lie on the sphere, and the warnings that they raise."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.training import Loss
from train.collapse import collapse, effective_rank, embedding_figures, spread, uniformity


def vectors(count: int = 40, dim: int = 6) -> torch.Tensor:
    """Unit vectors (count, dim), anyhow."""
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(0)), dim=1)


def test_spread_is_zero_at_collapse_and_one_in_all_directions() -> None:
    assert spread(torch.eye(4)[[1, 1, 1]]) == 0
    assert spread(torch.cat([torch.eye(4), -torch.eye(4)])) == 1
    given = vectors()
    expected = (given - given.mean(0)).square().sum(1).mean().sqrt()
    torch.testing.assert_close(spread(given), expected)


def test_uniformity_is_that_of_the_paper() -> None:
    given = vectors()
    expected = F.pdist(given).square().mul(-2).exp().mean().log()  # as its appendix has it
    torch.testing.assert_close(uniformity(given), expected)
    assert uniformity(torch.eye(4)[[1, 1, 1]]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_the_effective_rank_is_the_entropys(shape: tuple[int, int]) -> None:
    given = vectors(*shape)
    values = np.linalg.svd(given.double().numpy(), compute_uv=False)
    shares = values / values.sum()
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert float(effective_rank(given)) == pytest.approx(expected, rel=1e-6)
    assert 5 < expected < 6


@pytest.mark.parametrize(("rank", "rows"), [(1, [2, 2, 2]), (2, [0, 1, 1, 0]), (4, [0, 1, 2, 3])])
def test_the_effective_rank_counts_directions(rank: int, rows: list[int]) -> None:
    assert float(effective_rank(torch.eye(8)[rows])) == pytest.approx(rank, abs=1e-6)


@pytest.mark.parametrize("kind", ["euclidean", "cosine"])
def test_figures_are_those_of_all_pairs(kind: str) -> None:
    given, labels = vectors(), torch.arange(40) % 3
    figures = embedding_figures(given, labels, kind)
    squared = torch.cdist(given.double(), given.double()).square()
    of_kind = squared.sqrt() if kind == "euclidean" else squared / 2
    for name, mask in {
        "positive": (labels[:, None] == labels) & ~torch.eye(40, dtype=torch.bool),
        "negative": labels[:, None] != labels,
    }.items():
        expected = np.quantile(of_kind[mask].numpy(), (0.1, 0.5, 0.9), method="nearest")
        found = [figures[f"distance_{name}_p{percent}"] for percent in (10, 50, 90)]
        assert found == pytest.approx(expected, abs=1e-2)
        if name == "positive":
            assert figures["alignment"] == pytest.approx(float(squared[mask].mean()), rel=1e-5)
    assert figures["uniformity"] == pytest.approx(float(uniformity(given)))
    assert figures["effective_rank"] == pytest.approx(float(effective_rank(given)))


def test_what_a_batch_has_no_pairs_for_is_left_out() -> None:
    alone = embedding_figures(vectors(3), torch.arange(3)).keys()
    assert (
        "alignment" not in alone and "distance_positive_p50" not in alone and "distance_negative_p50" in alone
    )
    one_class = embedding_figures(vectors(3), torch.zeros(3, dtype=torch.long)).keys()
    assert "distance_negative_p50" not in one_class and "distance_positive_p50" in one_class


HEALTHY = {"epoch": 1.5, "spread": 0.6, "distance_positive": 0.4, "distance_negative": 0.9}


@pytest.mark.parametrize(
    ("changes", "settings", "name"),
    [
        ({}, {}, None),
        ({"spread": 0.04}, {}, "collapse"),
        ({"spread": 0.04, "epoch": 0.9}, {}, None),
        ({"distance_negative": 0.405}, {}, "triplets teach nothing"),
        ({"distance_negative": 0.41}, {"margin": 0.2}, "stuck at the margin"),
        ({"distance_negative": 0.405, "epoch": 0.9}, {}, None),
        ({"distance_negative": 0.405}, {"triplet": 0}, None),
        ({"distance_negative": 0.42}, {}, None),
        ({"distance_negative": 0.45}, {"margin": 0.2}, None),
        ({"distance_negative": 0.45}, {"margin": 1}, "stuck at the margin"),
        ({"distance_negative": 0.3}, {"mining": "batch_hard"}, None),  # whose triplets are in the wrong order
    ],
)
def test_a_collapse_is_called_by_its_name(
    changes: dict[str, float], settings: dict[str, object], name: str | None
) -> None:
    found = collapse(HEALTHY | changes, Loss(**settings))  # type: ignore[arg-type]
    assert (found[0] if found else None) == name


def test_no_triplets_is_not_stuck_at_the_margin() -> None:
    """The remedy is another: batches that hold more than one class."""
    none = {"epoch": 1.5, "spread": 0.6}
    found = collapse(none, Loss())
    assert found and found[0] == "no triplets" and "loader.sampler=balanced" in found[1]
    assert collapse(none, Loss(triplet=0)) is None
