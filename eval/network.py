"""Pixels -> embedding -> calibrated probabilities as one PyTorch module: to be exported, and looked into."""

import copy

import numpy as np
import torch
from torch import nn

from configs.errors import UserError
from train.baselines import Linear, Means
from train.classifier import Classifier
from train.embed import encode
from train.model import Encoder
from train.perceptron import Floats, Networks


class Network(nn.Module):
    """Normalised images (n, 3, size, size) -> probabilities (n, classes), embeddings (n, dim)."""

    def __init__(self, encoder: Encoder, classifier: Classifier) -> None:
        """
        Raises:
            UserError: if the classifier's verdict is that of neighbours, which no network gives.
        """
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.members = nn.ModuleList(_members(classifier))
        self.temperature: torch.Tensor
        self.offset: torch.Tensor
        self.register_buffer("temperature", torch.tensor(classifier.temperature))
        self.register_buffer("offset", torch.from_numpy(np.log(classifier.verdict.class_weights)).float())
        self._symmetries, self._half = classifier.symmetries, classifier.half

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embeddings = encode(self.encoder, images, symmetries=self._symmetries)
        if self._half:
            embeddings = embeddings.half().float()
        return self.log_probabilities(embeddings).exp(), embeddings

    def log_probabilities(self, inputs: torch.Tensor) -> torch.Tensor:
        """Calibrated, embeddings and the classifier's metadata (n, dim + width) -> (n, classes)."""
        logits = torch.stack([member(inputs) for member in self.members]).mean(dim=0)
        return torch.log_softmax(logits / self.temperature - self.offset, dim=1)


class Whole(nn.Module):
    """RGB pixels uint8 (n, height, width, 3) of any size -> probabilities (n, classes), embeddings (n, dim).

    Before the network comes what `pipeline.fused` does to an image that is not augmented: the central square,
    brought to size × size by bilinear sampling without antialiasing, edges repeated, then normalised.
    """

    def __init__(
        self, network: Network, *, size: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.network, self._size = network, size
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", 255 * torch.tensor(mean))
        self.register_buffer("std", 255 * torch.tensor(std))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = pixels.shape[1], pixels.shape[2]
        short = torch.sym_min(height, width)  # type: ignore[no-untyped-call]
        top, bottom, down = self._taps(height, short)
        left, right, across = self._taps(width, short)
        rows = pixels.float()
        rows = torch.lerp(rows[:, top], rows[:, bottom], down[:, None, None])
        square = torch.lerp(rows[:, :, left], rows[:, :, right], across[:, None])
        probabilities, embeddings = self.network(((square - self.mean) / self.std).permute(0, 3, 1, 2))
        return probabilities, embeddings

    def _taps(self, side: int, short: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Along a side, (size,) each: the two source pixels of each output pixel, the second one's weight."""
        steps = torch.arange(self._size, device=self.mean.device) + 0.5
        at = (steps * short / self._size + (side - short) / 2 - 0.5).clamp(min=0)
        first = at.long().clamp(max=side - 1)
        return first, (first + 1).clamp(max=side - 1), at - first


def _members(classifier: Classifier) -> list[nn.Sequential]:
    """The networks whose mean logits give the verdict; a baseline is one of a single layer."""
    model = classifier.verdict.model
    if isinstance(model, Networks):
        return [copy.deepcopy(member).float() for member in model.members]
    if isinstance(model, Linear):
        return [_linear(model.weight, model.bias)]
    if isinstance(model, Means) and np.isfinite(model.means).all():
        # Of a unit vector v the squared distance to a mean m is 1 - 2vm + m², which is linear in v.
        squares = (model.means**2).sum(axis=1)
        return [_linear(2 * model.means / model.spread, -(1 + squares) / model.spread)]
    raise UserError(
        f"the classifier's verdict is that of {classifier.name}, which is no network and has no gradient; "
        "classify again with another classifier.model, such as mlp"
    )


def _linear(weight: Floats, bias: Floats) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    return nn.Sequential(layer)
