"""Augmentation parameters: drawn again exactly, off at zero, inside their ranges."""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from configs.loading import Augment
from pipeline.augment import GREY, LUMA, Plan, draw, identity

OFF: dict[str, Any] = {
    "symmetries": False,
    "rotation": 0,
    "scale": (1, 1),
    "shift": 0,
    "brightness": 0,
    "contrast": 0,
    "saturation": 0,
    "hue": 0,
    "blur": 0,
    "cutout": 0,
    "jpeg": 0,
    "occasional": 1,
}
ON: dict[str, Any] = {
    "symmetries": True,
    "rotation": 25,
    "scale": (0.5, 3),
    "shift": 0.1,
    "brightness": 0.3,
    "contrast": 0.4,
    "saturation": 0.5,
    "hue": 20,
    "blur": 2,
    "cutout": 0.5,
    "jpeg": 60,
}
MANY = 4000
PARTS = {
    "linear": ["symmetries", "rotation", "scale"],
    "shift": ["shift"],
    "colour": ["brightness", "contrast", "saturation", "hue"],
    "flaws": ["blur", "cutout", "jpeg"],
}
FLAWS = {"jpeg": [0], "blur": [1], "cutout": [2, 3, 4]}  # columns


def only(*names: str, batch: int = MANY) -> Plan:
    """A plan with these augmentations on and the others off."""
    return draw(Augment(**OFF | {name: ON[name] for name in names}), batch, seed=5, epoch=1, step=2)


def arrays(plan: Plan) -> list[np.ndarray]:
    """The plan's arrays."""
    return [plan.linear, plan.shift, plan.colour, plan.flaws]


def same(one: Plan, other: Plan) -> bool:
    """Whether two plans are equal to the bit."""
    return all(np.array_equal(a, b) for a, b in zip(arrays(one), arrays(other), strict=True))


def test_a_plan_is_drawn_again_exactly_and_differs_elsewhere() -> None:
    places = [(seed, epoch, step) for seed in (0, 1) for epoch in (0, 1) for step in (0, 1)]
    settings = Augment(**ON)
    plans = [draw(settings, 8, seed=s, epoch=e, step=t) for s, e, t in places]
    for i, (seed, epoch, step) in reversed(list(enumerate(places))):
        again = draw(settings, 8, seed=seed, epoch=epoch, step=step)
        assert [j for j, plan in enumerate(plans) if same(plan, again)] == [i]


def test_what_was_drawn_before_there_were_flaws_is_drawn_still() -> None:
    """Figures were published, and trainings begun, with these draws: no new augmentation may change them."""
    digest = hashlib.sha256()
    for settings in (Augment(), Augment(rotation=180), Augment(preset="reference"), Augment(**ON)):
        for epoch, step in ((0, 0), (3, 7)):
            plan = draw(settings, 64, seed=11, epoch=epoch, step=step)
            for part in (plan.linear, plan.shift, plan.colour):
                digest.update(part.tobytes())
    assert digest.hexdigest() == "ed7b5586b381cfa4c85be6adb5f0812847abd73afc4e75e918a9c4b7bbdf0125"


def test_rows_of_a_batch_differ() -> None:
    for values in arrays(only(*ON, batch=64)):
        assert len(np.unique(values.reshape(64, -1), axis=0)) == 64


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_see_their_rows_of_one_plan(world: int) -> None:
    plan, share = only(*ON, batch=16), 16 // world
    slices = [plan[rank * share : (rank + 1) * share] for rank in range(world)]
    for whole, *parts in zip(arrays(plan), *map(arrays, slices), strict=True):
        assert np.array_equal(np.concatenate(parts), whole)


def test_all_at_zero_is_the_image_as_it_is() -> None:
    for drawn, plain in zip(arrays(only(batch=16)), arrays(identity(16)), strict=True):
        np.testing.assert_array_equal(drawn, plain)


@pytest.mark.parametrize("name", ON)
def test_switching_one_on_changes_its_part_alone(name: str) -> None:
    for part, names in PARTS.items():
        drawn, off = getattr(only(name, batch=16), part), getattr(only(batch=16), part)
        assert np.array_equal(drawn, off) == (name not in names)


@pytest.mark.parametrize("name", ON)
def test_switching_one_off_leaves_the_others_as_they_were(name: str) -> None:
    others = [other for other in ON if other != name]
    for part, names in PARTS.items():
        if name not in names:
            assert np.array_equal(getattr(only(*others), part), getattr(only(*ON), part))


@pytest.mark.parametrize("name", FLAWS)
def test_switching_a_flaw_off_leaves_the_others_as_they_were(name: str) -> None:
    others, columns = only(*[other for other in ON if other != name]).flaws, FLAWS[name]
    assert not others[:, columns].any()
    np.testing.assert_array_equal(
        np.delete(others, columns, axis=1), np.delete(only(*ON).flaws, columns, axis=1)
    )


@pytest.mark.parametrize("share", [0, 0.2, 1])
def test_a_flaw_falls_to_its_share_of_the_images_each_by_itself(share: float) -> None:
    settings = Augment(preset="none", blur=2, cutout=0.5, jpeg=60, occasional=share)
    flaws = draw(settings, MANY, seed=5, epoch=1, step=2).flaws
    drew = np.stack([flaws[:, columns[-1]] > 0 for columns in FLAWS.values()])
    np.testing.assert_allclose(drew.mean(axis=1), share, atol=0.02)
    np.testing.assert_allclose((drew[0] & drew[1]).mean(), share**2, atol=0.02)


def test_flaws_fill_their_ranges() -> None:
    flaws = only("blur", "cutout", "jpeg").flaws
    assert fills(flaws[:, 0], 40, 100) and np.array_equal(flaws[:, 0], flaws[:, 0].round())
    assert fills(flaws[:, 1], 0, 2) and fills(flaws[:, 4], 0, 0.5)
    assert fills(flaws[:, 2], 0, 1) and fills(flaws[:, 3], 0, 1)
    worst = draw(Augment(jpeg=99, occasional=1), MANY, seed=0, epoch=0, step=0).flaws
    assert worst[:, 0].min() == 1, "no JPEG has a quality of 0"


def test_the_square_cut_out_keeps_inside_the_image() -> None:
    flaws = np.array([[0, 0, 0.5, 0.25, 0.5], [50, 1, 0, 1, 0.5], [0, 0, 0.4, 0.4, 0]], np.float32)
    *_, pixels = replace(identity(3), flaws=flaws).parameters(np.full(3, 90), np.full(3, 70), 32)
    np.testing.assert_array_equal(pixels, [[0, 0, 8, 0, 24, 16], [50, 1, 0, 24, 8, 32], [0, 0, 0, 0, 0, 0]])


def fills(values: np.ndarray, low: float, high: float) -> bool:
    """Whether values lie in a range and reach into both of its ends."""
    margin = 0.01 * (high - low)
    return low - 1e-5 <= values.min() < low + margin and high - margin < values.max() <= high + 1e-5


def test_rotation_scale_and_shift_fill_their_ranges() -> None:
    linear = only("rotation", "scale").linear.astype(float)
    magnification = np.linalg.det(linear) ** -0.5
    angle = np.rad2deg(np.arctan2(linear[:, 1, 0], linear[:, 0, 0]))
    np.testing.assert_allclose(
        linear @ linear.transpose(0, 2, 1) * magnification[:, None, None] ** 2,
        np.tile(np.eye(2), (MANY, 1, 1)),
        atol=1e-5,
    )
    assert fills(angle, -25, 25)
    assert fills(np.log(magnification), np.log(0.5), np.log(3))
    assert abs(np.log(magnification).mean() - np.log(1.5) / 2) < 0.03
    for axis in only("shift").shift.T:
        assert fills(axis, -0.1, 0.1)


def test_the_eight_symmetries_are_as_likely() -> None:
    linear = only("symmetries").linear.round(5) + 0.0
    kinds, counts = np.unique(linear, axis=0, return_counts=True)
    assert len(kinds) == 8
    assert (np.square(counts - MANY / 8) / (MANY / 8)).sum() < 24.3  # chi-squared, 7 degrees, p = 0.001
    assert set(np.unique(kinds)) == {-1, 0, 1}


def test_colours_follow_their_formulas() -> None:
    rgb = np.array([200.0, 90.0, 30.0])

    def coloured(name: str, pixel: np.ndarray) -> np.ndarray:
        colour = only(name).colour.astype(float)
        return colour[:, :, :3] @ pixel + colour[:, :, 3]

    factor = coloured("brightness", rgb) / rgb
    assert fills(factor[:, 0], 0.7, 1.3) and np.ptp(factor, axis=1).max() < 1e-5
    factor = (coloured("contrast", rgb) - GREY) / (rgb - GREY)
    assert fills(factor[:, 0], 0.6, 1.4) and np.ptp(factor, axis=1).max() < 1e-5
    grey = LUMA @ rgb
    factor = (coloured("saturation", rgb) - grey) / (rgb - grey)
    assert fills(factor[:, 0], 0.5, 1.5) and np.ptp(factor, axis=1).max() < 1e-5
    turned = coloured("hue", rgb)
    np.testing.assert_allclose(turned.sum(1), rgb.sum(), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(rgb), rtol=1e-5)
    away, plain = turned - rgb.mean(), rgb - rgb.mean()
    angle = np.rad2deg(np.arctan2(np.cross(plain, away) @ np.full(3, 3**-0.5), away @ plain))
    assert fills(angle, -20, 20)


def test_greys_stay_grey() -> None:
    colour = only("brightness", "contrast", "saturation", "hue").colour.astype(float)
    mapped = colour[:, :, :3] @ np.full(3, 77.0) + colour[:, :, 3]
    assert np.ptp(mapped, axis=1).max() < 1e-3


@pytest.mark.parametrize(("width", "height", "size"), [(64, 64, 64), (100, 60, 32), (61, 240, 128)])
def test_identity_maps_the_corners_to_those_of_the_central_square(width: int, height: int, size: int) -> None:
    (matrix,) = identity(1).matrices(np.array([width]), np.array([height]), size)
    corners = matrix @ np.array([[0, size, 0, size], [0, 0, size, size], [1, 1, 1, 1]])
    short = min(width, height)
    x, y = (width - short) / 2, (height - short) / 2
    np.testing.assert_allclose(
        corners, [[x, x + short, x, x + short], [y, y, y + short, y + short]], atol=1e-3
    )


def test_a_shift_is_in_shares_of_the_short_side() -> None:
    plan = replace(identity(1), shift=np.array([[0.25, -0.5]], np.float32))
    args = np.array([100]), np.array([60]), 32
    np.testing.assert_allclose(
        plan.matrices(*args)[0, :, 2] - identity(1).matrices(*args)[0, :, 2], [15, -30], atol=1e-4
    )
