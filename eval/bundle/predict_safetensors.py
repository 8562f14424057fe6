"""Image files -> calibrated probabilities, by PyTorch: python predict.py IMAGE …

The network is built here from torchvision and linear layers; the file holds its tensors alone.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from prepare import ABOUT, pixels
from safetensors.torch import load_file
from torch import Tensor, nn


def load(folder: Path) -> Callable[[Any], Any]:
    """Pixels (n, height, width, 3) -> probabilities (n, classes), embeddings (n, dim)."""
    tensors = load_file(folder / ABOUT["model"])
    backbone = torchvision.models.get_model(ABOUT["backbone"], weights=None)
    backbone.fc = nn.Linear(backbone.fc.in_features, ABOUT["embedding_dim"])
    backbone.load_state_dict(_below(tensors, "encoder.backbone."))
    head = _below(tensors, "classifier.")
    weights = sorted((int(n.split(".")[0]), len(t)) for n, t in head.items() if n.endswith(".weight"))
    classifier = nn.Sequential(*_layers([ABOUT["embedding_dim"], *(width for _, width in weights)]))
    classifier.load_state_dict(head)
    backbone.eval()
    classifier.eval()

    def run(images: Any) -> Any:
        with torch.inference_mode():
            views = _views(_square(torch.from_numpy(images)))
            total = torch.stack([F.normalize(backbone(view), dim=1) for view in views]).sum(dim=0)
            embeddings = F.normalize(total, dim=1)
            logits = classifier(embeddings) / tensors["temperature"] - tensors["offset"]
            return logits.softmax(dim=1).numpy(), embeddings.numpy()

    return run


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _layers(widths: list[int]) -> list[nn.Module]:
    pairs = itertools.pairwise(widths)
    layers: list[nn.Module] = [
        layer for pair in pairs for layer in (nn.Linear(*pair), nn.LeakyReLU(), nn.Identity())
    ]
    return layers[:-2]


def _square(images: Tensor) -> Tensor:
    """The central square, brought to the network's size by bilinear sampling, and normalised."""
    size, mean, std = (ABOUT["preprocessing"][key] for key in ("size", "mean", "std"))
    height, width = images.shape[1:3]
    top, bottom, down = _taps(height, min(height, width), size)
    left, right, across = _taps(width, min(height, width), size)
    rows = images.float()
    rows = torch.lerp(rows[:, top], rows[:, bottom], down[:, None, None])
    square = torch.lerp(rows[:, :, left], rows[:, :, right], across[:, None])
    return ((square / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)


def _taps(side: int, short: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a side: the two source pixels of each output pixel, and the second one's weight."""
    at = ((torch.arange(size) + 0.5) * short / size + (side - short) / 2 - 0.5).clamp(0, side - 1)
    first = at.long()
    return first, (first + 1).clamp(max=side - 1), at - first


def _views(images: Tensor) -> list[Tensor]:
    """The image, or its 8 symmetries."""
    if not ABOUT["symmetries"]:
        return [images]
    turned = [images.rot90(quarter, (2, 3)) for quarter in range(4)]
    return turned + [view.flip(3) for view in turned]


if __name__ == "__main__":
    run = load(Path(__file__).parent)
    for name in sys.argv[1:]:
        probabilities, _ = run(pixels(Path(name).read_bytes()))
        print(name, dict(zip(ABOUT["classes"], map(float, probabilities[0]), strict=True)))
