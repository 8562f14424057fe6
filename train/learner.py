"""The encoder with its objective in one forward pass, so that DDP sees every parameter and one loss.

this rank's images ──► encoder ──► gathered from all ranks ──► distances, mining, losses of the global batch
   in micro-batches, if they would not fit at once
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from configs.errors import UserError
from configs.training import Loss as Settings
from train.collapse import spread
from train.distances import Pairs, distances
from train.distributed import gather, gather_with_gradient
from train.gradcache import in_micro_batches
from train.losses import arcface, contrastive, supcon, triplet
from train.model import Encoder
from train.precision import exact_products


class Outcome(NamedTuple):
    """A step of the global batch B; the same on every rank.

    A tuple, since DDP must find the loss in it: in anything that it cannot take apart, such as a dataclass, a
    static graph's first step would go by without its reduction, and without a word.
    """

    loss: torch.Tensor
    embeddings: torch.Tensor
    """(B, dim), detached."""
    labels: torch.Tensor
    """(B,)."""
    figures: dict[str, torch.Tensor]
    """Scalars on the device, for the log."""


class Learner(nn.Module):
    """The weighted sum of losses that the configuration asks for, over all ranks' samples.

    Every rank computes the same loss of the same embeddings, so heads have the same gradient everywhere and
    DDP's mean leaves it as it is.
    """

    def __init__(
        self,
        encoder: Encoder,
        settings: Settings,
        *,
        embedding_dim: int,
        class_weights: torch.Tensor,
        seed: int,
        micro_batch: int = 0,
    ) -> None:
        """
        Args:
            class_weights: (classes,) weights of the cross-entropies.
            micro_batch: images that the encoder sees at once; 0 is all of the rank's.
        """
        super().__init__()
        self.encoder, self._settings, self._micro_batch = encoder, settings, micro_batch
        self.class_weights: torch.Tensor
        self.register_buffer("class_weights", class_weights, persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if settings.classification:
                self.head = nn.Linear(embedding_dim, len(class_weights))
                # Unit vectors give small logits; a learned scale lets it saturate: NormFace, Wang 2017.
                self.log_scale = nn.Parameter(torch.tensor(10.0).log())
            if settings.arcface:
                self.centres = nn.Linear(embedding_dim, len(class_weights), bias=False)

    def forward(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        groups: torch.Tensor,
        uniform: torch.Tensor,
        precision: torch.dtype,
        mining: str,
    ) -> Outcome:
        """
        Args:
            images: this rank's (batch, 3, H, W).
            labels: this rank's (batch,).
            groups: this rank's (batch,) patients (or lesions).
            uniform: (B, 2) draws in [0, 1) for random mining, the same on every rank.
            precision: of the encoder's autocast.
            mining: of the triplet loss at this step, `train.mining.mining_at`.

        Raises:
            UserError: if the micro-batches do not share this rank's images, or are too small.
        """
        features = self._features(images, precision)
        features, labels, groups = gather_with_gradient(features), gather(labels), gather(groups)
        with exact_products():
            metric, embeddings = self.encoder.embed(features)
            losses, figures = self._losses(metric, embeddings, labels, groups, uniform, mining)
        total = embeddings.new_zeros(())
        for name, loss in losses.items():
            total = total + getattr(self._settings, name) * loss
        figures |= {name: loss.detach() for name, loss in losses.items()}
        figures |= {"spread": spread(embeddings.detach()), "loss": total.detach()}
        return Outcome(total, embeddings.detach(), labels, figures)

    def _features(self, images: torch.Tensor, precision: torch.dtype) -> torch.Tensor:
        """(batch, dim) of this rank's images, in micro-batches where asked."""

        def run(images: torch.Tensor) -> torch.Tensor:
            with torch.autocast(images.device.type, dtype=precision, enabled=precision != torch.float32):
                try:
                    return self.encoder.features(images)
                except ValueError as error:
                    if "more than 1 value per channel" not in str(error):
                        raise
                    raise UserError(
                        "a batch norm cannot learn of one image at a time: set train.micro_batch (or "
                        "loader.global_batch / ranks) to 2 or more, or model.projection=linear"
                    ) from None

        count = self._micro_batch or len(images)
        if count >= len(images):
            return run(images)
        if len(images) % count:
            raise UserError(
                f"train.micro_batch={count} does not divide the {len(images)} images of a rank "
                "(loader.global_batch / ranks); choose one that does, or 0"
            )
        return in_micro_batches(run, self.encoder.backbone, images, count)

    def _losses(
        self,
        metric: torch.Tensor,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        groups: torch.Tensor,
        uniform: torch.Tensor,
        mining: str,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Losses by the name of their weight, and figures of the triplets."""
        settings, losses, figures = self._settings, {}, {}
        pairs = Pairs.of(labels, groups)
        d_bb = distances(metric, settings.distance) if settings.triplet or settings.contrastive else None
        if d_bb is not None and settings.triplet:
            margin = None if settings.margin == "soft" else settings.margin
            mined = triplet(d_bb, pairs, mining=mining, margin=margin, uniform_b2=uniform)
            losses["triplet"] = mined.loss
            figures = {
                "active_triplets": mined.active,
                "distance_positive": mined.positive,
                "distance_negative": mined.negative,
            }
        if d_bb is not None and settings.contrastive:
            losses["contrastive"] = contrastive(d_bb, pairs, margin=settings.contrastive_margin)
        if settings.supcon:
            losses["supcon"] = supcon(metric, pairs, temperature=settings.supcon_temperature)
        if settings.arcface:
            losses["arcface"] = arcface(
                embeddings,
                labels,
                self.centres.weight,
                margin=settings.arcface_margin,
                scale=settings.arcface_scale,
                class_weights_c=self.class_weights,
            )
        if settings.classification:
            logits = self.head(self.log_scale.exp() * embeddings)
            losses["classification"] = F.cross_entropy(logits, labels, self.class_weights)
        return losses, figures
