"""The encoder: a backbone with a projection to unit vectors."""

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from configs.errors import UserError
from configs.training import Model as Settings
from shards.files import atomic
from train import backbones
from train.weights import load_backbone

ARCHITECTURE = ("backbone", "embedding_dim", "projection", "bnneck")
"""Fields of `model` that say how an encoder is built; encoder.json keeps them."""


class Encoder(nn.Module):
    """Images (batch, 3, H, W) -> L2-normalised embeddings (batch, embedding_dim), float32."""

    def __init__(self, backbone: nn.Module, projection: str, settings: Settings) -> None:
        """
        Args:
            backbone: images -> features (batch, embedding_dim).
            projection: name of the backbone's last module, which makes them.
        """
        super().__init__()
        self.backbone = backbone
        self.stages = backbones.stages(backbone, projection)
        if settings.bnneck:
            self.neck = nn.BatchNorm1d(settings.embedding_dim)
            self.neck.bias.requires_grad_(
                False
            )  # so that the classes lie around the origin (Luo 2019, section 3.5)
        self._frozen: list[str] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.embed(self.features(images))[1]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (batch, 3, H, W) -> vectors (batch, embedding_dim) of any length, float32."""
        if not torch.is_autocast_enabled(images.device.type):
            images = images.float()  # the loader may give half types, which then fit no weights
        features: torch.Tensor = self.backbone(images)
        return features.float()

    def embed(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (batch, embedding_dim) -> unit vectors before and behind the neck; without one, the same.

        Losses of distances act on the former, those of classes on the latter, the embedding (Luo 2019,
        arXiv 1903.07071).
        """
        metric = F.normalize(features, dim=1)
        return metric, F.normalize(self.neck(features), dim=1) if hasattr(self, "neck") else metric

    def freeze(self, count: int) -> None:
        """Let the first stages learn nothing, nor count batch statistics, nor drop paths.

        Raises:
            UserError: if there are fewer.
        """
        if count > len(self.stages):
            named = " │ ".join(" ".join(stage) for stage in self.stages)
            raise UserError(
                f"model.freeze={count}: the backbone has {len(self.stages)} stages ({named}); "
                "freeze as many at most"
            )
        self._frozen = [name for stage in self.stages[:count] for name in stage]
        for name, parameter in self.backbone.named_parameters():
            if any(f"{name}.".startswith(f"{part}.") for part in self._frozen):
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        modules = dict(self.backbone.named_modules())
        for name in self._frozen:
            if name in modules:  # else it is a parameter
                modules[name].eval()
        return self

    def save(self, path: Path) -> None:
        """Write the weights atomically as safetensors."""
        with atomic(path) as file:
            file.write(save({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}))

    def load(self, path: Path) -> None:
        """Read weights that `save` wrote.

        Raises:
            UserError: if they are missing, damaged, or of another architecture.
        """
        try:
            self.load_state_dict(load_file(path))
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: no weights of this encoder ({reason}); train again") from None


def build(settings: Settings, *, size: int, seed: int) -> Encoder:
    """A fresh encoder: random by seed, or with backbone weights from its library or a file.

    Args:
        size: width and height of the images.

    Raises:
        UserError: if there is no such backbone, it cannot take such images, or the weights cannot be had
            or do not fit it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = backbones.create(settings.backbone, size)
        projection = backbones.classifier(settings.backbone, backbone)
        backbones.project(backbone, projection, settings)
        encoder = Encoder(backbone, projection, settings)
    backbones.check_size(backbone, settings.backbone, size)
    if settings.weights != "none":
        load_backbone(backbone, projection, settings, size)
    encoder.freeze(settings.freeze)
    return encoder


def rebuild(about: dict[str, Any]) -> Encoder:
    """The encoder that encoder.json is about, to load weights into; what older files do not say is the
    default."""
    fields = {name: about[name] for name in ARCHITECTURE if name in about}
    return build(Settings(**fields), size=about["preprocessing"]["size"], seed=0)


def place(module: nn.Module, device: torch.device) -> None:
    """Move a module to a device, its kernels channels-last: the layout that convolutions are fastest in."""
    module.to(device)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type that `train.precision` means on a device."""
    if precision != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    if device.type != "cuda":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16
