"""The encoder with its objective in one forward pass, so that DDP sees every parameter and one loss."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from configs.training import Loss as Settings
from train.distributed import gather, gather_with_gradient
from train.losses import triplet
from train.model import Encoder


@dataclass(frozen=True)
class Outcome:
    """A step of the global batch B; the same on every rank."""

    loss: torch.Tensor
    embeddings: torch.Tensor
    """(B, dim), detached."""
    labels: torch.Tensor
    """(B,)."""
    figures: dict[str, torch.Tensor]
    """Scalars on the device, for the log."""


class Learner(nn.Module):
    """`triplet × triplet loss + classification × class-balanced cross-entropy`, over all ranks' samples."""

    def __init__(
        self,
        encoder: Encoder,
        settings: Settings,
        *,
        embedding_dim: int,
        class_weights: torch.Tensor,
        seed: int,
    ) -> None:
        """
        Args:
            class_weights: (classes,) weights of the cross-entropy.
        """
        super().__init__()
        self.encoder, self._settings = encoder, settings
        self.class_weights: torch.Tensor
        self.register_buffer("class_weights", class_weights, persistent=False)
        if settings.classification:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.head = nn.Linear(embedding_dim, len(class_weights))
            # Unit vectors give small logits; a learned scale lets the softmax saturate (Wang 2017, NormFace).
            self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor, uniform: torch.Tensor, precision: torch.dtype
    ) -> Outcome:
        """
        Args:
            images: this rank's (batch, 3, H, W).
            labels: this rank's (batch,).
            uniform: (B, 2) draws in [0, 1) for random mining, the same on every rank.
            precision: of the encoder's autocast.
        """
        with torch.autocast(images.device.type, dtype=precision, enabled=precision != torch.float32):
            embeddings = self.encoder(images)
        embeddings, labels = gather_with_gradient(embeddings), gather(labels)
        total = embeddings.new_zeros(())
        figures = {"spread": spread(embeddings.detach())}
        if self._settings.triplet:
            mined = triplet(
                embeddings,
                labels,
                mining=self._settings.mining,
                margin=self._settings.margin,
                uniform_b2=uniform,
            )
            total = total + self._settings.triplet * mined.loss
            figures |= {
                "triplet": mined.loss.detach(),
                "active_triplets": mined.active,
                "distance_positive": mined.positive,
                "distance_negative": mined.negative,
            }
        if self._settings.classification:
            logits = self.head(self.log_scale.exp() * embeddings)
            cross_entropy = F.cross_entropy(logits, labels, self.class_weights)
            total = total + self._settings.classification * cross_entropy
            figures["classification"] = cross_entropy.detach()
        return Outcome(total, embeddings.detach(), labels, figures | {"loss": total.detach()})


def spread(embeddings: torch.Tensor) -> torch.Tensor:
    """Root mean square distance of unit vectors (n, dim) to their mean: 0 is collapse, 1 all directions."""
    return (1 - embeddings.mean(0).square().sum()).clamp(min=0).sqrt()
