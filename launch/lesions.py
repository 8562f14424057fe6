"""Draws one dermoscopy-like picture of a mole: a pure function of (seed, patient, image, class).

Light is absorbed on its way through the skin and back (Beer-Lambert), so a picture is

    skin · exp(-Σ amount of a pigment · its absorption),   then veils, hairs, lens and sensor,

which darkens a mole on any skin tone as melanin does. The class moves four numbers and nothing else: the
A, B, C and D of the ABCD rule (asymmetry, border, colour, diameter; after Nachbar et al. 1994), each a
standard normal over patients and images, shifted for melanomas. All else belongs to the patient or the
photograph and never sees the class.

Lengths are in half sides: a picture spans -1..1, x to the right and y down. Maps are float32 (S, S),
pictures float32 (3, S, S) in 0..1, S the side in pixels.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from configs.packing import Synthetic

Map = npt.NDArray[np.floating[Any]]

LARGEST_SHIFT = 1.8
"""Standard deviations between the classes in each of A, B, C and D where they overlap least."""
OWN_SHARE = 0.35
"""Share of the variance of A, B, C and D that a patient's moles have in common: the family likeness."""

MELANIN = (0.60, 0.80, 0.92)  # absorption in red, green, blue
BLOOD = (0.10, 0.75, 0.62)
PALE = (0.94, 0.78, 0.71)  # skin without melanin
BROWN, BLACK = (0.45, 0.65, 0.70), (1.5, 1.5, 1.4)
BLUE_GREY = (0.42, 0.46, 0.53)
HAIR = np.array([[0.08, 0.06, 0.05], [0.22, 0.13, 0.08], [0.5, 0.36, 0.2]], np.float32)


@dataclass(frozen=True)
class Patient:
    """What a patient's pictures share: skin, hairs, dermatoscope and the ordinary mole."""

    melanin: float
    """Melanin of the skin, 0.05 (fair) to about 1.4 (dark)."""
    redness: float
    """Blood in the skin."""
    hairs: float
    """Hairs in a picture, on average."""
    hair_colour: Map
    """Colour of hairs and of a ruler's ticks, (3,)."""
    circle: float
    """Radius of the dermatoscope's dark surround; 1.5 and more lies outside the picture."""
    vignette: float
    """Light lost at a distance of 1."""
    white_balance: Map
    """Gain of each channel, (3,)."""
    blur: float
    """Radius of the optics' blur, half sides."""
    noise: float
    """Range of the sensor's noise."""
    pigment: Map
    """Absorption of the moles' pigment, (3,)."""
    texture: float
    """-1: a pigment network, dark lines around pale holes; 1: dark globules."""
    spacing: float
    """Distance between the holes or globules."""
    ordinary: Map
    """A, B, C and D of the patient's ordinary mole, standard normal, (4,)."""


@dataclass(frozen=True)
class Scene:
    """What one photograph adds, whatever it shows."""

    centre: tuple[float, float]
    """Where the mole lies, x and y."""
    exposure: float
    """Gain of the light."""
    light: tuple[float, float]
    """Slope of the light along x and y."""
    hairs: int
    """Hairs across the picture."""
    bubbles: int
    """Bubbles in the gel."""
    ruler: bool
    """A ruler's ticks along one side."""


def generator(*key: str | int) -> np.random.Generator:
    """Random numbers as a pure function of a key such as (seed, purpose, patient, image)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest)))


@lru_cache(maxsize=64)
def patient_of(seed: int, patient: str) -> Patient:
    """The patient of that name."""
    rng = generator(seed, "patient", patient)
    return Patient(
        melanin=0.05 + 1.35 * rng.beta(0.8, 1.6),
        redness=rng.uniform(0.02, 0.24),
        hairs=rng.choice([0, 3, 12, 30], p=[0.4, 0.3, 0.2, 0.1]),
        hair_colour=rng.choice(HAIR),
        circle=rng.uniform(1.02, 1.3) if rng.random() < 0.25 else 2.0,
        vignette=rng.uniform(0, 0.22),
        white_balance=rng.normal(1, [0.03, 0.015, 0.05]).astype(np.float32),
        blur=rng.uniform(0.002, 0.006),
        noise=rng.uniform(0.03, 0.09),
        pigment=(rng.lognormal(0, 0.22) * rng.normal([0.56, 0.9, 1.08], [0.1, 0.08, 0.1])).astype(np.float32),
        texture=rng.uniform(-1, 1),
        spacing=rng.uniform(0.05, 0.085),
        ordinary=rng.standard_normal(4, dtype=np.float32),
    )


def scene_of(seed: int, patient: str, image: str) -> Scene:
    """What the photograph of that name adds."""
    rng = generator(seed, "scene", patient, image)
    x, y = rng.normal(0, 0.07, 2)
    across, down = rng.normal(0, 0.07, 2)
    return Scene(
        centre=(float(x), float(y)),
        exposure=rng.lognormal(0, 0.07),
        light=(float(across), float(down)),
        hairs=int(rng.poisson(patient_of(seed, patient).hairs)),
        bubbles=int(rng.choice(4, p=[0.9, 0.05, 0.03, 0.02])),
        ruler=bool(rng.random() < 0.07),
    )


def abcd(seed: int, patient: str, image: str, melanoma: bool, overlap: float) -> Map:
    """Asymmetry, border, colour and diameter of a mole, (4,): N(0, 1), melanomas N(shift, 1).

    With these four known, melanomas are told from nevi at AUC Φ(√2 · shift), shift = 1.8 · (1 - overlap):
    0.5 at overlap 1, 0.94 at 0.4, 0.995 at 0. Who knows the patient's other moles does better.
    """
    own = generator(seed, "abcd", patient, image).standard_normal(4, dtype=np.float32)
    ordinary = patient_of(seed, patient).ordinary
    shift = LARGEST_SHIFT * (1 - overlap) * melanoma
    mole: Map = math.sqrt(OWN_SHARE) * ordinary + math.sqrt(1 - OWN_SHARE) * own + shift
    return mole


def draw_files(settings: Synthetic, folder: Path, moles: Sequence[tuple[str, str, bool]]) -> int:
    """Draws `folder/IMAGE.jpg` for each (image, patient, melanoma); returns how many."""
    for image, patient, melanoma in moles:
        photo = draw(settings.seed, patient, image, melanoma, overlap=settings.overlap, size=settings.size)
        photo.save(folder / f"{image}.jpg", quality=settings.quality)
    return len(moles)


def draw(seed: int, patient: str, image: str, melanoma: bool, *, overlap: float, size: int) -> Image.Image:
    """The photograph of a mole, RGB, `size` pixels square."""
    owner, scene = patient_of(seed, patient), scene_of(seed, patient, image)
    rng = generator(seed, "photograph", patient, image)
    picture = _skin(rng, owner, size)
    # The mole has its own numbers, so that not one pixel outside it can tell the class.
    features = abcd(seed, patient, image, melanoma, overlap)
    _add_mole(generator(seed, "mole", patient, image), picture, owner, scene.centre, features)
    if scene.hairs or scene.ruler:
        picture += _ink(rng, scene, size) * (owner.hair_colour[:, None, None] - picture)
    picture *= _light(owner, scene, size) * owner.white_balance[:, None, None]
    _add_bubbles(rng, picture, scene.bubbles)
    picture += owner.noise * (rng.random(picture.shape, np.float32) - 0.5)
    pixels = (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    photo = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return photo.filter(ImageFilter.BoxBlur(owner.blur * size / 2))


def _skin(rng: np.random.Generator, owner: Patient, size: int) -> Map:
    """(3, S, S): the patient's tone, mottled by blood and melanin, with the skin's fine grain."""
    mottle = _noise(rng, size, 4) * 0.6 + _noise(rng, size, 11) * 0.4
    grain = _noise(rng, size, 40) * 0.5 + _noise(rng, size, 90) * 0.5
    blood = owner.redness * (1 + 0.5 * mottle)
    melanin = owner.melanin * (1 + 0.06 * mottle) + 0.03 * grain
    return _rgb(PALE) * np.exp(-(melanin * _rgb(MELANIN) + blood * _rgb(BLOOD)))


def _add_mole(
    rng: np.random.Generator, picture: Map, owner: Patient, centre: tuple[float, float], features: Map
) -> None:
    """Puts a mole on the skin in `picture`, touching no pixel outside it."""
    asymmetry, border, colour, diameter = features.tolist()
    radius = min(0.31 * math.exp(0.24 * diameter), 0.8)
    lopsided = min(0.055 * math.exp(0.6 * asymmetry), 0.26)
    ragged = min(0.028 * math.exp(0.6 * border), 0.12)
    outline, edge = _outline(rng, radius, lopsided, ragged)
    warp = radius * (0.03 + 0.8 * ragged)

    size = picture.shape[-1]  # only the window that the mole can reach is computed: twice as fast
    reach = float((outline + edge).max()) + 4 * warp
    side = min(size, math.ceil(reach * size))
    left, top = (min(max(round((at + 1 - reach) * size / 2), 0), size - side) for at in centre)
    window = np.s_[..., top : top + side, left : left + side]
    grid_x, grid_y = _grid(size)
    x, y = grid_x[window] - centre[0], grid_y[window] - centre[1]

    warp_x, warp_y, blotch, fade = (_noise(rng, side, cells) for cells in (4, 4, 8, 3))
    fine_x, fine_y = warp_x + 0.6 * _noise(rng, side, 12), warp_y + 0.6 * _noise(rng, side, 12)
    distance = _length(x + warp * fine_x, y + warp * fine_y)
    at = ((np.arctan2(y, x) + math.pi) * ((len(outline) - 1) / (2 * math.pi))).astype(np.intp)
    border_at = outline[at]
    mask = _step(0.5 + 0.5 * (border_at - distance) / edge[at])

    direction = rng.uniform(0, 2 * math.pi)
    tilt = x * (math.cos(direction) / radius) + y * (math.sin(direction) / radius)
    amount = 0.8 + 0.35 * (1 - distance / border_at).clip(0) + 0.16 * blotch
    amount += (2.2 * lopsided * tilt).clip(-0.5, 0.5)
    pattern = _lattice(x + 0.035 * warp_x, y + 0.035 * warp_y, owner.spacing, rng.uniform(0, math.pi))
    amount += owner.texture * (0.2 + 0.3 * _step(0.5 + 0.8 * fade)) * pattern
    absorbed = mask * amount.clip(0.1) * owner.pigment[:, None, None]
    x, y = x / radius + 0.12 * fine_x, y / radius + 0.12 * fine_y
    picture[window] = _colours(rng, picture[window], absorbed, mask, (x, y, blotch), colour)


def _outline(rng: np.random.Generator, radius: float, lopsided: float, ragged: float) -> tuple[Map, Map]:
    """Radius and width of the border at 1,024 angles from -π to π, each (1024,).

    Low harmonics give the shape: the second its ordinary length, the first and third what no axis mirrors.
    High ones give a ragged border, which also ends abruptly in some directions.
    """
    angle = np.linspace(-math.pi, math.pi, 1024, dtype=np.float32)
    harmonic = np.arange(1, 19)
    height = 0.5 * ragged * (4 / harmonic) ** 0.7
    height[:4] = 0.7 * lopsided, 0.09, lopsided, 0.3 * lopsided
    height *= rng.uniform(0.75, 1.25, len(harmonic))
    phase = rng.uniform(0, 2 * math.pi, len(harmonic))
    shape = 1 + height @ np.cos(harmonic[:, None] * angle + phase[:, None])
    abrupt = 0.5 + 0.5 * np.cos(rng.integers(2, 5) * angle + rng.uniform(0, 2 * math.pi))
    width = 0.34 / (1 + 30 * ragged * abrupt)
    return (radius * shape.clip(0.45)).astype(np.float32), (radius * width).astype(np.float32)


def _colours(
    rng: np.random.Generator, skin: Map, absorbed: Map, mask: Map, place: tuple[Map, Map, Map], colour: float
) -> Map:
    """(3, S, S): skin and mole with patches of more colours, as many and as strong as `colour` says.

    Dark brown comes first; black, red, white regression and a blue-grey veil follow in any order. `place`
    holds x and y in radii of the mole, and a noise that frays the patches.
    """
    x, y, fray = place
    bright = skin.mean((1, 2), keepdims=True)
    veils = {"white": bright**0.6, "blue": 1.25 * np.sqrt(bright.mean()) * _rgb(BLUE_GREY)}
    laid = []
    for rank, kind in enumerate(["brown", *rng.permutation(["black", "red", "white", "blue"])]):
        angle, away, extent = rng.uniform(0, 2 * math.pi), rng.uniform(0.1, 0.7), rng.uniform(0.35, 0.65)
        strength = min(math.exp(0.6 * colour) - 0.3 - rank, 1)
        if strength <= 0:
            break
        apart = _length(x - away * math.cos(angle), y - away * math.sin(angle))
        patch = strength * mask * _step(0.4 + 0.9 * (1 - apart / extent) + 0.35 * fray)
        if kind in veils:
            laid.append((patch, veils[kind]))
        elif kind == "red":
            absorbed = absorbed * (1 - 0.45 * patch) + 0.7 * patch * _rgb(BLOOD)
        else:
            absorbed = absorbed + patch * _rgb(BROWN if kind == "brown" else BLACK)
    picture = skin * np.exp(-absorbed)
    for patch, veil in laid:
        picture += 0.6 * patch * (veil - picture)
    return picture


def _ink(rng: np.random.Generator, scene: Scene, size: int) -> Map:
    """(S, S): how much of each pixel hairs and ruler ticks cover, 0..1."""
    scale = 2  # drawn twice as large, then averaged: Pillow's lines have hard edges
    canvas = Image.new("L", (scale * size, scale * size))
    pen = ImageDraw.Draw(canvas)
    t = np.linspace(0, 1, 20)[:, None]
    lie = rng.uniform(0, math.pi)
    for _ in range(scene.hairs):
        middle, angle, length = rng.uniform(-1, 1, 2), rng.normal(lie, 0.5), rng.uniform(0.3, 1)
        along = np.array([np.cos(angle), np.sin(angle)])
        bend = rng.normal(0, 0.15) * np.array([-along[1], along[0]])
        points = middle + (2 * t - 1) * length * along + (2 * t - 1) ** 2 * bend
        width = max(1, round(rng.uniform(0.005, 0.013) * size * scale / 2))
        pen.line([*map(tuple, (points + 1) * size)], fill=int(rng.uniform(130, 235)), width=width)
    if scene.ruler:
        start, step = rng.uniform(0, 0.1) * size, 0.055 * scale * size
        for tick in range(20):
            along_side = start + tick * step
            end = scale * size * (0.075 if tick % 5 == 0 else 0.04)
            pen.line([(along_side, 0), (along_side, end)], fill=220, width=max(1, round(size / 90)))
        canvas = canvas.transpose(Image.Transpose(int(rng.integers(2, 5)))) if rng.random() < 0.7 else canvas
    return np.asarray(canvas.reduce(scale), np.float32) / 255


def _light(owner: Patient, scene: Scene, size: int) -> Map:
    """(S, S): how much light each pixel gets, from slope, vignette and the dermatoscope's dark surround."""
    x, y = _grid(size)
    from_centre = _length(x, y)
    light = scene.exposure * (1 + scene.light[0] * x + scene.light[1] * y)
    light *= 1 - owner.vignette * from_centre**2
    if owner.circle < 1.5:
        light *= 0.04 + 0.96 * _step((owner.circle - from_centre) / 0.05)
    return light


def _add_bubbles(rng: np.random.Generator, picture: Map, bubbles: int) -> None:
    """Puts bubbles of the gel into `picture`: a bright rim and a glint."""
    x, y = _grid(picture.shape[-1])
    for _ in range(bubbles):
        dx, dy, radius = x - rng.uniform(-0.95, 0.95), y - rng.uniform(-0.95, 0.95), rng.uniform(0.03, 0.13)
        distance = _length(dx, dy)
        rim = np.exp(-(((distance - radius) / 0.012) ** 2))
        glint = np.exp((_length(dx + radius / 2, dy + radius / 2) / 0.02) ** 2 * -1)
        picture += 0.12 * rim + 0.4 * glint + 0.03 * _step((radius - distance) / 0.02)


def _lattice(x: Map, y: Map, spacing: float, turn: float) -> Map:
    """Three waves at 60°: a honeycomb, 1 at the middle of its cells and -0.5 on their walls, (S, S)."""
    total = np.zeros_like(x)
    for angle in (turn, turn + math.pi / 3, turn - math.pi / 3):
        total += np.cos((math.cos(angle) * x + math.sin(angle) * y) * (2 * math.pi / spacing))
    return total / 3


def _noise(rng: np.random.Generator, size: int, cells: int) -> Map:
    """Smooth noise of about unit variance with `cells` bumps a side, (S, S)."""
    grid = 1.3 * rng.standard_normal((cells + 3, cells + 3), dtype=np.float32)
    box = (1.5, 1.5, cells + 1.5, cells + 1.5)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC, box))


@lru_cache(maxsize=2)
def _grid(size: int) -> tuple[Map, Map]:
    """x and y of each pixel's middle, (S, S) each."""
    side = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    x, y = np.meshgrid(side, side)
    return x, y


def _length(x: Map, y: Map) -> Map:
    """Like np.hypot, which takes ten times as long to guard against overflow."""
    return np.sqrt(x * x + y * y)


def _rgb(colour: tuple[float, float, float]) -> Map:
    """(3, 1, 1), to multiply maps with."""
    return np.array(colour, np.float32)[:, None, None]


def _step(t: Map) -> Map:
    """The smoothstep 3t² - 2t³ from 0 at t = 0 to 1 at t = 1."""
    t = t.clip(0, 1)
    return t * t * (3 - 2 * t)
