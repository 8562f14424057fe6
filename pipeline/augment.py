"""Augmentation parameters as a pure function of (seed, epoch, step, slot), a global batch at a time.

Rotation, symmetries, scale and shift are one 2×3 matrix; brightness, contrast, saturation and hue are one
3×4 matrix; blur, cutout and JPEG artefacts are flaws that only some images draw. The DALI graph only applies
them, so it holds no randomness.

Beside torchvision's ColorJitter (mean error on HAM10000, grey levels of 255): brightness and saturation are
equal; contrast turns about 128, not the image's mean grey: a shift in level, 6 at ± 0.2; hue rotates about
the grey axis and keeps the sum of RGB, not HSV's maximum: 2.9 at ± 10°. All four, drawn as by default against
torchvision's in its random order: 3.4, where the jitter itself moves a pixel by 16.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.loading import Augment
from pipeline.counter import Purpose, generator

Float32 = NDArray[np.float32]
Parameters = tuple[Float32, Float32, Float32]
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
GREY = 128.0  # contrast's fixed centre


@dataclass(frozen=True)
class Plan:
    """What happens to each image of a batch, independent of the image's size."""

    linear: Float32
    """(batch, 2, 2): output offset from the centre -> source offset, in shares of the short side."""
    shift: Float32
    """(batch, 2): source offset of the output's centre, in shares of the short side, x then y."""
    colour: Float32
    """(batch, 3, 4): RGB in 0..255 -> RGB, `colour[:, :, :3] @ rgb + colour[:, :, 3]`, before clamping."""
    flaws: Float32
    """(batch, 5): JPEG quality; sigma of the blur, output pixels; centre x, centre y and side of the square
    cut out, in shares of the output's side. A quality, sigma or side of 0 is none."""

    def __getitem__(self, slots: slice) -> "Plan":
        return Plan(self.linear[slots], self.shift[slots], self.colour[slots], self.flaws[slots])

    def parameters(self, widths: NDArray[np.int64], heights: NDArray[np.int64], size: int) -> Parameters:
        """What the graph needs for images of these widths and heights (batch,), shown as size × size pixels.

        Returns:
            matrices (batch, 2, 3), as `matrices` gives them; colours (batch, 3, 4); flaws (batch, 6): JPEG
            quality, sigma, and the left, top, right and bottom pixel border of the square cut out.
        """
        centre, half = self.flaws[:, 2:4], self.flaws[:, 4:] / 2
        borders = np.rint(np.concatenate([centre - half, centre + half], axis=1) * size).clip(0, size)
        flaws = np.concatenate([self.flaws[:, :2], borders * (half > 0)], axis=1).astype(np.float32)
        return self.matrices(widths, heights, size), np.ascontiguousarray(self.colour), flaws

    def matrices(self, widths: NDArray[np.int64], heights: NDArray[np.int64], size: int) -> Float32:
        """(batch, 2, 3) maps of output pixel positions (size × size) to source pixel positions.

        Positions count from the image's corner, so a pixel's centre lies at +0.5.
        """
        short = np.minimum(widths, heights)[:, None]
        centre = np.stack([widths, heights], axis=1) / 2 + self.shift * short
        linear = self.linear * (short / size)[:, :, None]
        offset = centre - linear.sum(axis=2) * (size / 2)
        return np.concatenate([linear, offset[:, :, None]], axis=2).astype(np.float32)


def identity(batch: int) -> Plan:
    """The central square as it is: what evaluation sees."""
    return Plan(
        np.broadcast_to(np.eye(2, dtype=np.float32), (batch, 2, 2)),
        np.zeros((batch, 2), np.float32),
        np.broadcast_to(np.eye(3, 4, dtype=np.float32), (batch, 3, 4)),
        np.zeros((batch, 5), np.float32),
    )


def draw(settings: Augment, batch: int, *, seed: int, epoch: int, step: int) -> Plan:
    """The plan of a global batch (batch,) at a step. Row i is the same whichever rank asks."""
    # One column a parameter, always drawn, so that switching one off leaves the others as they were.
    u = generator(seed, Purpose.AUGMENT, epoch, step).random((batch, 10))
    signed = 2 * u - 1
    symmetry = (u[:, 0] * 8).astype(int) * settings.symmetries
    angle = np.deg2rad(signed[:, 1] * settings.rotation) + (symmetry % 4) * (np.pi / 2)
    low, high = np.log(settings.scale)
    scale = np.exp(low + (high - low) * u[:, 2])
    mirror = np.where(symmetry >= 4, -1.0, 1.0)
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    linear = np.stack([np.stack([cos * mirror, -sin], 1), np.stack([sin * mirror, cos], 1)], 1)
    colour = _colour(
        brightness=1 + signed[:, 5] * settings.brightness,
        contrast=1 + signed[:, 6] * settings.contrast,
        saturation=1 + signed[:, 7] * settings.saturation,
        hue=np.deg2rad(signed[:, 8] * settings.hue),
    )
    shift = signed[:, 3:5] * settings.shift
    flaws = _flaws(settings, batch, seed=seed, epoch=epoch, step=step)
    return Plan(linear.astype(np.float32), shift.astype(np.float32), colour.astype(np.float32), flaws)


def _flaws(settings: Augment, batch: int, *, seed: int, epoch: int, step: int) -> Float32:
    """(batch, 5) as in `Plan`. Each flaw has a stream of its own, so that one more changes no other draw."""

    def uniform(purpose: Purpose, columns: int) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        u = generator(seed, purpose, epoch, step).random((batch, 1 + columns))
        return u[:, 0] < settings.occasional, u[:, 1:]

    flaws = np.zeros((batch, 5))
    if settings.jpeg:
        has, u = uniform(Purpose.JPEG, 1)
        flaws[:, 0] = np.rint(100 - settings.jpeg * u[:, 0]) * has
    if settings.blur:
        has, u = uniform(Purpose.BLUR, 1)
        flaws[:, 1] = settings.blur * u[:, 0] * has
    if settings.cutout:
        has, u = uniform(Purpose.CUTOUT, 3)
        flaws[:, 2:] = u * [1, 1, settings.cutout] * has[:, None]
    return flaws.astype(np.float32)


def _colour(
    brightness: NDArray[np.float64],
    contrast: NDArray[np.float64],
    saturation: NDArray[np.float64],
    hue: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(batch, 3, 4): hue, then saturation, brightness and contrast, as one affine map."""
    saturate = saturation[:, None, None] * np.eye(3) + (1 - saturation)[:, None, None] * LUMA
    gain = (brightness * contrast)[:, None, None]
    linear = gain * (saturate @ _grey_axis_rotation(hue))
    offset = np.broadcast_to((GREY * (1 - contrast))[:, None, None], (len(contrast), 3, 1))
    return np.concatenate([linear, offset], axis=2)


def _grey_axis_rotation(angle: NDArray[np.float64]) -> NDArray[np.float64]:
    """(batch, 3, 3) rotations about (1, 1, 1): Rodrigues' formula. Greys stay as they are."""
    axis = np.full(3, 3**-0.5)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    return np.asarray(cos * np.eye(3) + sin * cross + (1 - cos) * np.outer(axis, axis))
