"""A tiny data set that everything is tried on: drawn in a blink, the same bytes every time."""

import csv
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.packing import Pack
from shards.pack import pack
from shards.shardset import ShardSet

PATIENTS = 24
IMAGES = 120


def pytest_addoption(parser: pytest.Parser) -> None:
    """How often each fault of tests/train/test_faults.py is tried."""
    parser.addoption("--tries", type=int, default=1, help="tries of each fault, at random moments")


def pytest_configure() -> None:
    """Ctrl-C means Ctrl-C in what tests start, also where a shell runs them in the background."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a try."""
    if "attempt" in metafunc.fixturenames:
        metafunc.parametrize("attempt", range(metafunc.config.getoption("tries")))


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `metadata.csv` and `images/`: 120 blobs of 24 patients, about a third of them positive.

    A positive blob is wider and darker than its patient's others, on the patient's own skin tone.
    """
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "images").mkdir()
    draw = np.random.default_rng(2020)
    skin = draw.integers(150, 220, (PATIENTS, 3))
    rows = []
    for number in range(IMAGES):
        patient = number % PATIENTS if number < 2 * PATIENTS else int(draw.integers(PATIENTS))
        positive = int(draw.random() < 0.3)
        height, width = draw.integers(48, 65, 2)
        y, x = np.ogrid[:height, :width]
        centre = np.array([height, width]) / 2 + draw.normal(0, 2, 2)
        radius = draw.normal(16 if positive else 9, 1.5)
        inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        pixels = np.where(inside[..., None], skin[patient] * (0.35 if positive else 0.6), skin[patient])
        noisy = (pixels + draw.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
        key = f"TINY_{number:04d}"
        Image.fromarray(noisy).save(folder / "images" / f"{key}.jpg", quality=92)
        rows.append(
            {
                "isic_id": key,
                "patient_id": f"P{patient:02d}",
                "target": positive,
                "sex": ("male", "female", "")[number % 3],
                "age_approx": "" if number % 10 == 0 else 20 + 5 * (patient % 12),
                "anatom_site_general": ("torso", "head/neck", "lower extremity", "")[number % 4],
            }
        )
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="session")
def tiny_pack(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """Settings that pack the tiny images into shards of at most 40 samples."""
    return Pack(
        table=tiny_images / "metadata.csv",
        images=tiny_images / "images",
        output=tmp_path_factory.mktemp("packed") / "shards",
        samples_per_shard=40,
        workers=1,
    )


@pytest.fixture(scope="session")
def tiny_shards(tiny_pack: Pack) -> ShardSet:
    """The tiny images, packed and opened."""
    pack(tiny_pack, progress=False)
    return ShardSet.open(tiny_pack.output)


@pytest.fixture
def plain_ctrl_c() -> Iterator[None]:
    """Python's own handling of Ctrl-C: torchrun, tried by other tests, leaves its own in place."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
