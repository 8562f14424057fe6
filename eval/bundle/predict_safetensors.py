"""Image files -> lines of JSON with calibrated probabilities, by PyTorch: python predict.py IMAGE …

The network is built here from torchvision (or timm) and linear layers; the file holds its tensors alone.
"""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from prepare import ABOUT, tell
from safetensors.torch import load_file
from torch import Tensor, nn


def load(folder: Path) -> Callable[[Any], Any]:
    """Pixels (n, height, width, 3) -> probabilities (n, classes), embeddings (n, dim)."""
    tensors = load_file(folder / ABOUT["model"])
    encoder = _encoder(_below(tensors, "encoder.")).eval()
    members = [_member(_below(tensors, f"members.{number}.")) for number in range(_count(tensors))]

    def run(images: Any) -> Any:
        with torch.inference_mode():
            views = _views(_square(torch.from_numpy(images)))
            total = torch.stack([F.normalize(encoder(view), dim=1) for view in views]).sum(dim=0)
            embeddings = F.normalize(total, dim=1)
            if ABOUT["half"]:
                embeddings = embeddings.half().float()
            mean = torch.stack([member(embeddings) for member in members]).mean(dim=0)
            logits = mean / tensors["temperature"] - tensors["offset"]
            return logits.softmax(dim=1).numpy(), embeddings.numpy()

    return run


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _encoder(tensors: dict[str, Tensor]) -> nn.Sequential:
    """The backbone, its ImageNet classifier replaced by the projection, and the neck if there is one."""
    backbone = _backbone(ABOUT["backbone"], ABOUT["preprocessing"]["size"])
    linear = {name: layer for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear)}
    (place,) = (name for name, layer in linear.items() if layer.out_features == 1000)
    parent, _, last = place.rpartition(".")
    setattr(backbone.get_submodule(parent), last, _projection(_below(tensors, f"backbone.{place}.")))
    backbone.load_state_dict(_below(tensors, "backbone."))
    if not _below(tensors, "neck."):
        return nn.Sequential(backbone)
    neck = nn.BatchNorm1d(ABOUT["embedding_dim"])
    neck.load_state_dict(_below(tensors, "neck."))
    return nn.Sequential(backbone, neck)


def _backbone(name: str, size: int) -> nn.Module:
    if name.startswith("timm/"):
        import timm

        fixed = timm.get_pretrained_cfg(name.removeprefix("timm/"))
        options: dict[str, Any] = {"img_size": size} if fixed is not None and fixed.fixed_input_size else {}
        model: nn.Module = timm.create_model(name.removeprefix("timm/"), num_classes=1000, **options)
        return model
    backbone: nn.Module = torchvision.models.get_model(name, weights=None)
    for keyword, value in (("image_size", size), ("input_size", (size, size))):
        if keyword in inspect.signature(type(backbone)).parameters:
            backbone = torchvision.models.get_model(name, weights=None, **{keyword: value})
    return backbone


def _projection(tensors: dict[str, Tensor]) -> nn.Module:
    """A linear layer, or two with a norm between them."""
    if "weight" in tensors:
        width, before = tensors["weight"].shape
        return nn.Linear(before, width)
    (hidden, before), width = tensors["0.weight"].shape, len(tensors["3.weight"])
    first = nn.Linear(before, hidden, bias="0.bias" in tensors)
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width))


def _count(tensors: dict[str, Tensor]) -> int:
    """Networks of the classifier: an ensemble has several."""
    return len({name.split(".")[1] for name in tensors if name.startswith("members.")})


def _member(tensors: dict[str, Tensor]) -> nn.Sequential:
    """Linear layers of the tensors' widths, LeakyReLU between them."""
    shapes = sorted((int(n.split(".")[0]), t.shape) for n, t in tensors.items() if n.endswith(".weight"))
    layers: list[nn.Module] = []
    for _, (width, before) in shapes:
        layers += [nn.Linear(before, width), nn.LeakyReLU(), nn.Identity()]
    network = nn.Sequential(*layers[:-2])
    network.load_state_dict(tensors)
    return network.eval()


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
    sys.exit(tell(load(Path(__file__).parent), sys.argv[1:]))
