"""The graph against Pillow and torchvision given the same parameters, by either of its ways.

Errors are in grey levels of 255. The fused pass differs by float32's rounding alone; DALI's operators round
to whole grey levels after the warp, the colour and the blur. Artefacts are libjpeg's own, as Pillow's are.
"""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_graph import FLAWED, HEIGHTS, JPEGS, MEAN, STRONG, WIDTHS, decoded, grey_levels
from torchvision.transforms.v2.functional import gaussian_blur

from configs.loading import Augment
from pipeline import augment

SIZE = 64
SETTINGS = {
    "blur": Augment(preset="none", blur=2.5, occasional=1),
    "cutout": Augment(preset="none", cutout=0.6, occasional=1),
    "jpeg": Augment(preset="none", jpeg=80, occasional=1),
    "warp and colour": STRONG,
    "all": FLAWED,
}


def oracle(data: np.ndarray, matrix: np.ndarray, colour: np.ndarray, flaws: np.ndarray) -> np.ndarray:
    """(3, SIZE, SIZE) grey levels: Pillow's codec, torch's sampling and torchvision's blur, in float64."""
    quality, sigma, *borders = flaws.tolist()
    pixels = decoded(data)
    if quality > 0:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=int(quality))
        pixels = decoded(np.frombuffer(file.getvalue(), np.uint8))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].double()
    centres = torch.arange(SIZE, dtype=torch.float64) + 0.5
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)], dim=-1) @ torch.from_numpy(matrix.astype(float)).T
    grid = 2 * places / torch.tensor([pixels.shape[1], pixels.shape[0]]) - 1
    out = torch.nn.functional.grid_sample(image, grid[None], padding_mode="border", align_corners=False)
    affine = torch.from_numpy(colour.astype(float))
    out = torch.einsum("ij,bjyx->biyx", affine[:, :3], out) + affine[:, 3, None, None]
    out = out.clamp(0, 255)
    if sigma > 0:
        out = gaussian_blur(out, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)
    left, top, right, bottom = map(int, borders)
    out[..., top:bottom, left:right] = 255 * torch.tensor(MEAN)[:, None, None]
    return np.asarray(out[0])


def errors(settings: Augment, *, one_pass: bool) -> tuple[float, float, float]:
    """Largest mean error of an image, largest error of a pixel, and how far images are from one another."""
    means, most, apart = [], [], []
    for step in range(4):
        plan = augment.draw(settings, len(JPEGS), seed=4, epoch=0, step=step)
        images = grey_levels(plan, JPEGS, size=SIZE, one_pass=one_pass, augmentation=settings)
        parameters = plan.parameters(WIDTHS, HEIGHTS, SIZE)
        expected = np.stack([oracle(*each) for each in zip(JPEGS, *parameters, strict=True)])
        means.append(np.abs(images - expected).mean(axis=(1, 2, 3)).max())
        most.append(np.abs(images - expected).max())
        apart.append(np.abs(expected - np.roll(expected, 1, axis=0)).mean())
    return max(means), max(most), min(apart)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_fused_pass_is_pillow_and_torchvision_to_rounding(name: str) -> None:
    mean, most, apart = errors(SETTINGS[name], one_pass=True)
    assert mean < 1e-3 and most < 1e-2, (mean, most)
    assert apart > 20, "the images do differ from each other"


@pytest.mark.parametrize("name", SETTINGS)
def test_dalis_operators_are_pillow_and_torchvision_to_a_grey_level(name: str) -> None:
    mean, most, _ = errors(SETTINGS[name], one_pass=False)
    assert mean < 0.5 and most < 2.5, (mean, most)


@pytest.mark.parametrize("name", ["blur", "cutout", "jpeg"])
def test_a_flaw_is_seen_by_those_who_drew_it_alone(name: str) -> None:
    settings = SETTINGS[name].model_copy(update={"occasional": 0.5})
    plan = augment.draw(settings, len(JPEGS), seed=1, epoch=0, step=0)
    drew = plan.flaws.any(axis=1)
    assert drew.any() and not drew.all()
    for one_pass in (True, False):
        plain = grey_levels(augment.identity(len(JPEGS)), JPEGS, one_pass=one_pass)
        flawed = grey_levels(plan, JPEGS, one_pass=one_pass, augmentation=settings)
        moved = np.abs(flawed - plain).mean(axis=(1, 2, 3))
        assert (moved[drew] > 0.05).all() and not moved[~drew].any(), (drew, moved)
