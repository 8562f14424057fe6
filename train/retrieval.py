"""Each sample as a query among all others of its split, in chunks: no N×N matrix is ever in memory.

Shapes: N samples, D embedding, Q queries of a chunk, P others of the query's class, M of other classes.
"""

import numpy as np
import torch

from train.precision import exact_products

COLUMNS = ("recall_at_1", "recall_at_5", "map_at_r", "triplet_loss")
_CELLS = 1 << 22  # of a chunk's distances


@torch.inference_mode()
def queries(
    vectors_nd: torch.Tensor, labels_n: torch.Tensor, *, margin: float, rank: int = 0, world_size: int = 1
) -> torch.Tensor:
    """What each query finds, (N, 4) float64, columns as `COLUMNS`.

    - recall@k: whether one of the k nearest is of its class.
    - MAP@R (Musgrave 2020, arXiv 2003.08505, section 3.1): mean over the R = P nearest of the precision there
      where the sample there is of its class, else of 0.
    - triplet loss: mean of max(0, d(query, p) − d(query, m) + margin) over all its P·M triplets.

    Of two at one distance the one of another class counts as nearer. A sample alone in its class finds NaN.

    Args:
        vectors_nd: unit vectors; distances are Euclidean.
        rank: of `world_size` that share the work: rows of other ranks' queries are 0, so that a sum over the
            ranks is the whole.
    """
    found = torch.zeros(len(vectors_nd), len(COLUMNS), dtype=torch.float64, device=vectors_nd.device)
    for label in torch.unique(labels_n):
        own, other = ((labels_n == label).nonzero()[:, 0], (labels_n != label).nonzero()[:, 0])
        columns = torch.cat([own, other])
        places = torch.arange(len(own), device=own.device)[rank::world_size]
        for place in torch.split(places, max(1, _CELLS // len(columns))):
            d_qn = _distances(vectors_nd[own[place]], vectors_nd[columns])
            d_qn.scatter_(1, place[:, None], torch.inf)  # itself
            d_qp = _sorted(d_qn[:, : len(own)])[:, :-1].contiguous()
            found[own[place]] = _found(d_qp, _sorted(d_qn[:, len(own) :]), margin)
    return found


def averages(found: torch.Tensor, labels_n: torch.Tensor) -> dict[str, float]:
    """The figure of each column of (N, 4): the mean over its class's queries, every class counting the same.

    A share of all queries would say little where 98 % of them are of one class.
    """
    classes = torch.stack([found[labels_n == label].nanmean(0) for label in torch.unique(labels_n)])
    return dict(zip(COLUMNS, classes.nanmean(0).tolist(), strict=True))


def _found(d_qp: torch.Tensor, d_qm: torch.Tensor, margin: float) -> torch.Tensor:
    """The columns (Q, 4) of ascending distances to the query's own class and to others."""
    (rows, p), m = d_qp.shape, d_qm.shape[1]
    if not p:
        return torch.full((rows, len(COLUMNS)), torch.nan, dtype=torch.float64, device=d_qp.device)
    nth = torch.arange(1, p + 1, device=d_qp.device)
    rank_qp = nth + torch.searchsorted(d_qm, d_qp, right=True)
    average_precision = torch.where(rank_qp <= p, nth / rank_qp, 0).sum(1, dtype=torch.float64) / p
    # Of the negatives within a positive's reach, their number and the sum of their distances.
    reach_qp = d_qp + margin
    within_qp = torch.searchsorted(d_qm, reach_qp)
    sums_qm = torch.nn.functional.pad(d_qm.cumsum(1, dtype=torch.float64), (1, 0))
    hinge = (within_qp * reach_qp - sums_qm.gather(1, within_qp)).sum(1) / (p * m)
    first = rank_qp[:, 0]
    return torch.stack([(first <= 1).double(), (first <= 5).double(), average_precision, hinge], dim=1)


def _distances(a_qd: torch.Tensor, b_nd: torch.Tensor) -> torch.Tensor:
    with exact_products():
        return (2 - 2 * (a_qd @ b_nd.T)).clamp_(min=0).sqrt_()


def _sorted(values: torch.Tensor) -> torch.Tensor:
    """Rows in ascending order. On a CPU NumPy's sort, as torch's carries the positions along."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=1))
    return values.sort(1).values
