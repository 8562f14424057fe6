"""Heat maps of what drove a verdict: Grad-CAM, laid over what the encoder saw."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from configs.errors import UserError
from eval.network import Network
from shards.files import atomic

SHOWN = 256  # least side of a picture, pixels
GAP = 8  # between the two pictures, pixels
OPACITY = 0.6  # of the hottest spot

Pixels = NDArray[np.uint8]


class HeatMaps:
    """Writes a PNG an image: what the encoder saw, and beside it the same under its heat map.

    Grad-CAM (Selvaraju et al. 2017) of the called class's log-odds, at the last feature maps of the backbone,
    by captum. Each map is scaled by its own largest value: it says where the evidence lies, not how much
    there is. Test-time augmentation is left out: the image is seen once, upright.
    """

    def __init__(
        self, network: Network, size: int, folder: Path, *, mean: Sequence[float], std: Sequence[float]
    ):
        """
        Raises:
            UserError: if captum is not installed, or the backbone has no feature maps.
        """
        try:
            from captum.attr import LayerGradCam
        except ImportError:
            raise UserError("--heatmap needs captum: pip install 'moleprint[heatmap]'") from None
        device = next(network.parameters()).device
        probe = torch.zeros(1, 3, size, size, device=device)
        layer = _last_feature_maps(network.encoder, probe)

        def log_odds(images: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
            log_p = network.log_probabilities(torch.cat([network.encoder(images), extra], dim=1))
            return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))

        self._cam, self._folder, self._names = LayerGradCam(log_odds, layer), folder, Counter[str]()
        self._mean, self._std = (torch.tensor(v, device=device)[:, None, None] for v in (mean, std))

    def heat(
        self, images: torch.Tensor, called: NDArray[np.int64], extra: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Where the evidence for the called classes (n,) lies in images (n, 3, size, size), 0..1.

        Args:
            extra: (n, width), metadata as the classifier takes them.

        Returns:
            (n, size, size).
        """
        from captum.attr import LayerAttribution

        target = torch.from_numpy(called).to(images.device)
        beside = torch.from_numpy(extra).to(images.device)
        maps = self._cam.attribute(images.contiguous(), target, (beside,), relu_attributions=True)
        maps = LayerAttribution.interpolate(maps.detach(), images.shape[2:], "bilinear")[:, 0]
        most = maps.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
        heat: NDArray[np.float32] = (maps / most).cpu().numpy()
        return heat

    def write(
        self,
        images: torch.Tensor,
        called: NDArray[np.int64],
        extra: NDArray[np.float32],
        names: Sequence[str],
    ) -> list[Path]:
        """One PNG for each of images (n, 3, size, size), called after its file; the paths.

        Args:
            called, extra: as for `heat`.

        Raises:
            UserError: if one cannot be written.
        """
        seen = ((images * self._std + self._mean).clamp(0, 1) * 255).round().byte()
        pixels = seen.permute(0, 2, 3, 1).cpu().numpy()
        return [
            self._write(*picture)
            for picture in zip(pixels, self.heat(images, called, extra), names, strict=True)
        ]

    def _write(self, pixels: Pixels, heat: NDArray[np.float32], name: str) -> Path:
        stem = PurePath(name).stem
        self._names[stem] += 1
        again = f"-{self._names[stem]}" if self._names[stem] > 1 else ""
        path = self._folder / f"{stem}{again}.png"
        with atomic(path, flush=False) as file:
            overlay(pixels, heat).save(file, "PNG")
        return path


def overlay(pixels: Pixels, heat: NDArray[np.float32]) -> Image.Image:
    """An image (h, w, 3), and beside it the same under its heat map (h, w), 0..1."""
    side = max(SHOWN, len(pixels))
    plain = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    strength = np.asarray(Image.fromarray(heat).resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)
    colours = matplotlib.colormaps["inferno"](strength)[:, :, :3] * 255
    opacity = OPACITY * strength[:, :, None]
    mixed = np.asarray(plain) * (1 - opacity) + colours * opacity
    both = Image.new("RGB", (2 * side + GAP, side), "white")
    both.paste(plain, (0, 0))
    both.paste(Image.fromarray(mixed.round().astype(np.uint8)), (side + GAP, 0))
    return both


def _last_feature_maps(encoder: nn.Module, probe: torch.Tensor) -> nn.Module:
    """The last module to give anything that is laid out in space.

    Raises:
        UserError: if that is not channels of feature maps, as a transformer's tokens are not.
    """
    given: list[tuple[nn.Module, torch.Size]] = []
    hooks = [
        module.register_forward_hook(
            lambda module, _, out: (
                given.append((module, out.shape)) if isinstance(out, torch.Tensor) else None
            )
        )
        for module in encoder.modules()
    ]
    try:
        with torch.inference_mode():
            encoder(probe)
    finally:
        for hook in hooks:
            hook.remove()
    spatial = [(module, shape) for module, shape in given if len(shape) > 2 and max(shape[2:]) > 1]
    module, shape = spatial[-1]
    if len(shape) != 4 or shape[2] != shape[3]:
        raise UserError(
            "--heatmap: the backbone ends in no feature maps, which Grad-CAM needs: it is for convolutional "
            "networks; leave it out"
        )
    return module
