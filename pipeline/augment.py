"""Augmentation parameters as a pure function of (seed, epoch, step, slot), a global batch at a time.

Rotation, symmetries, scale and shift are one 2×3 matrix; brightness, contrast, saturation and hue are one
3×4 matrix. The DALI graph only applies them, so it holds no randomness.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.schema import Augment
from pipeline.counter import Purpose, generator

Float32 = NDArray[np.float32]
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

    def __getitem__(self, slots: slice) -> "Plan":
        return Plan(self.linear[slots], self.shift[slots], self.colour[slots])

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
    return Plan(linear.astype(np.float32), shift.astype(np.float32), colour.astype(np.float32))


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
