"""Heat maps: Grad-CAM of the called class, beside the formula written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from configs.errors import UserError
from eval.heatmap import HeatMaps, _last_feature_maps, overlay
from eval.predict import Predictor

PLAIN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def test_the_heat_is_that_of_the_paper(finished: Path, tmp_path: Path) -> None:
    """ReLU of the feature maps weighted by the mean gradient of the class's log-odds (Selvaraju 2017)."""
    network = Predictor(finished, device="cpu").network.eval()
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    called = np.array([0, 1, 1])
    heat = HeatMaps(network, 64, tmp_path, **PLAIN).heat(images, called, np.empty((3, 0), np.float32))

    backbone = network.encoder.backbone
    stem = nn.Sequential(*list(backbone.children())[:-2])
    maps = stem(images)
    maps.retain_grad()
    embeddings = F.normalize(backbone.fc(maps.mean(dim=(2, 3))), dim=1)
    p = network.log_probabilities(embeddings).exp()[torch.arange(3), torch.from_numpy(called)]
    torch.log(p / (1 - p)).sum().backward()
    weighted = (maps.grad.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True).relu()
    expected = F.interpolate(weighted, (64, 64), mode="bilinear")[:, 0].detach()
    expected /= expected.amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)
    assert heat == pytest.approx(expected.numpy(), abs=1e-3)
    assert heat.max() == pytest.approx(1) and heat.min() >= 0


def test_what_is_cold_stays_as_it_is_and_what_is_hot_does_not() -> None:
    pixels = np.full((256, 256, 3), 90, np.uint8)
    heat = np.zeros((256, 256), np.float32)
    heat[:128] = 1
    picture = np.asarray(overlay(pixels, heat))
    assert (picture[:, :256] == 90).all() and (picture[200:, 264:] == 90).all()
    assert np.abs(picture[:100, 264:].astype(int) - 90).max() > 50


def test_a_backbone_without_feature_maps_is_refused() -> None:
    class Tokens(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(2).transpose(1, 2)

    tokens = nn.Sequential(nn.Conv2d(3, 4, 3), Tokens(), nn.Linear(4, 4))
    with pytest.raises(UserError, match="for convolutional networks"):
        _last_feature_maps(tokens, torch.zeros(1, 3, 8, 8))
    maps = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert _last_feature_maps(maps, torch.zeros(1, 3, 8, 8)) is maps[1]
