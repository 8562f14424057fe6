"""How a batch of embeddings lies on the sphere, and whether it has collapsed: for the log, not for
learning."""

import torch

from configs.training import Loss as Settings
from train.distances import Pairs, cosines, diagonal, distances
from train.precision import exact_products

QUANTILES = (0.1, 0.5, 0.9)
RANKED = 256  # embeddings whose effective rank is taken; of many it would cost tens of milliseconds


def spread(embeddings_bd: torch.Tensor) -> torch.Tensor:
    """Root mean square distance of unit vectors (B, D) to their mean: 0 is collapse, 1 all directions."""
    return (1 - embeddings_bd.mean(0).square().sum()).clamp(min=0).sqrt()


def uniformity(embeddings_bd: torch.Tensor) -> torch.Tensor:
    """log of the mean exp(−2 d²) over pairs: 0 is collapse, towards −4 evenly over the sphere.

    Wang and Isola 2020, arXiv 2005.10242, equation 2 with t = 2.
    """
    exponent = 4 * cosines(embeddings_bd) - 4
    exponent = exponent.masked_fill(diagonal(exponent), -torch.inf)
    count = len(embeddings_bd)
    pairs = torch.tensor(max(1, count * (count - 1)), device=exponent.device)
    return torch.logsumexp(exponent.flatten(), 0) - pairs.log()


def effective_rank(embeddings_bd: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of the singular values' shares: 1 (a point, or a line) to min(B, D).

    Roy and Vetterli 2007, "The effective rank", of the vectors as they are, not centred. Waits for the
    device.
    """
    rows = embeddings_bd.double()  # squares of singular values: their roots would be noise in float32
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return torch.exp(torch.special.entr(values / values.sum()).sum())


@torch.no_grad()
@exact_products()
def embedding_figures(
    embeddings_bd: torch.Tensor, labels_b: torch.Tensor, kind: str = "euclidean"
) -> dict[str, float]:
    """Figures of a batch of unit vectors; those of pairs only where it has such pairs.

    It waits for the device and takes milliseconds, so it is for the steps that are logged.

    Returns:
        `uniformity`, `effective_rank` (of 256 at most), `alignment` (mean squared Euclidean distance of
        positive pairs, Wang and Isola 2020, equation 1), and `distance_positive_p10` …
        `distance_negative_p90`, quantiles of the distances of `kind` over all pairs.
    """
    figures = {
        "uniformity": uniformity(embeddings_bd),
        "effective_rank": effective_rank(embeddings_bd[:RANKED]),
    }
    pairs = Pairs.of(labels_b, labels_b)
    d_bb = distances(embeddings_bd, kind)
    if pairs.positive.any():
        figures["alignment"] = (2 - 2 * cosines(embeddings_bd))[pairs.positive].mean()
    for name, mask in (("positive", pairs.positive), ("negative", pairs.negative)):
        ordered = d_bb[mask].sort().values
        for share in QUANTILES if len(ordered) else ():
            figures[f"distance_{name}_p{share * 100:.0f}"] = ordered[round(share * (len(ordered) - 1))]
    return {name: float(value) for name, value in figures.items()}


def collapse(figures: dict[str, float], settings: Settings) -> tuple[str, str] | None:
    """What has gone wrong with the embeddings, its name and a text, or None.

    Nothing is wrong before the first epoch has ended: a network that has learnt nothing sees all things
    alike. The effective rank raises no alarm, since two classes apart as far as can be lie on one line.

    Args:
        figures: a logged line: `epoch`, `spread`, and the mean distances of the triplets where there are any.
    """
    if figures["epoch"] < 1:
        return None
    if figures["spread"] < 0.05:
        text = (
            f"the embeddings are nearly one point (spread {figures['spread']:.3f} of 1); lower train.lr, "
            "begin with an easier loss.mining (loss.schedule brings the harder), or raise loss.classification"
        )
        return "collapse", text
    if not settings.triplet:
        return None
    if "distance_negative" not in figures:
        text = (
            "no batch since the last line held two images of a class and one of another, so that there are "
            "no triplets; take loader.sampler=balanced or patient, or raise loader.global_batch"
        )
        return "no triplets", text
    gap = figures["distance_negative"] - figures["distance_positive"]
    if abs(gap) < (0.01 if settings.margin == "soft" else 0.1 * settings.margin):
        text = (
            f"negatives are as near as positives (by {gap:.3f}), so that triplets teach nothing; raise "
            "loss.classification, lower train.lr, or try another loss.mining"
        )
        return "triplets teach nothing" if settings.margin == "soft" else "stuck at the margin", text
    return None
