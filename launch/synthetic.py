"""Draws the stand-in data set: a table shaped like ISIC 2020's, and a picture for every row of it.

output/metadata.csv   invented patients, or a copy of the table given
output/images/ID.jpg  drawn by launch.lesions
output/NOTICE.txt     says that they are drawn; packing passes it on
output/settings.json  what they were drawn with
"""

import contextlib
import csv
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from configs.errors import UserError
from configs.packing import Pack, Synthetic
from launch.lesions import draw_files, generator
from shards import records
from shards.files import new_folder, read_json
from shards.workers import in_order

SETTINGS = "settings.json"
NOTICE = (
    "These images are drawn by a computer program, not photographed: they show no real skin and no real "
    "patient, and figures measured on them say nothing about medical use."
)

CHUNK = 25
"""Images a worker draws between two reports to the progress bar."""

SITES = {  # about ISIC 2020's shares, blanks included
    "torso": 0.51,
    "lower extremity": 0.26,
    "upper extremity": 0.15,
    "head/neck": 0.05,
    "palms/soles": 0.01,
    "": 0.02,
}


def synthesize(settings: Synthetic, columns: Pack, *, progress: bool = True) -> Path:
    """Draws the data set into `settings.output`, which appears only when it is whole.

    Args:
        settings: what to draw, and where.
        columns: names the columns and classes of `settings.table`; not used for an invented table.
        progress: show a progress bar with its rate.

    Returns:
        The table written, `output/metadata.csv`.

    Raises:
        UserError: if the output holds something already or cannot be written, or the table is unfit.
    """
    output = settings.output.resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty; delete it or choose another synthetic.output")
    if settings.table and not settings.table.is_file():
        raise UserError(f"{settings.table}: table not found; set synthetic.table to a CSV file")
    moles = _moles(settings.table, columns) if settings.table else None
    try:
        with (
            new_folder(output.parent),
            tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch,
        ):
            folder = Path(scratch) / output.name
            (folder / "images").mkdir(parents=True)
            (folder / "NOTICE.txt").write_text(f"{NOTICE}\n", encoding="utf-8")
            (folder / SETTINGS).write_text(json.dumps(_recipe(settings), indent=2), encoding="utf-8")
            table = folder / "metadata.csv"
            if settings.table:
                shutil.copyfile(settings.table, table)
            else:
                _invent(settings, table)
            _draw_all(settings, moles or _moles(table, Pack()), folder / "images", progress)
            os.sync()  # one flush for thousands of small files, before their folder gets its name
            folder.rename(output)
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror or error}); see synthetic.output"
        ) from None
    return settings.output / "metadata.csv"


def check_made_by(settings: Synthetic) -> None:
    """Raises UserError unless the pictures in `settings.output` are what `settings` would draw."""
    drawn = read_json(settings.output / SETTINGS, "moleprint synthesize CONFIG, into another folder")
    other = [f"synthetic.{key}" for key, value in _recipe(settings).items() if drawn.get(key) != value]
    if other:
        raise UserError(
            f"{settings.output}: was drawn with another {', '.join(other)}; delete it to draw again, or set "
            "synthetic.output to another folder"
        )


def _recipe(settings: Synthetic) -> dict[str, Any]:
    """The settings that decide what is drawn."""
    return settings.model_dump(mode="json", exclude={"output", "workers"})


def _moles(table: Path, columns: Pack) -> list[tuple[str, str, bool]]:
    """(image, patient, melanoma) of each row, read and checked as packing will."""
    read = records.read(columns.model_copy(update={"table": table, "sources": {}}))
    names = list(columns.classes)
    melanoma = read.labels == names.index(columns.positive or names[-1])
    return list(zip(read.keys.tolist(), read.groups.tolist(), melanoma.tolist(), strict=True))


def _invent(settings: Synthetic, path: Path) -> None:
    """Writes a table of invented patients, shaped like ISIC 2020's, in no order.

    Most patients have few images and some have many; melanomas go to patients by a risk of their own,
    which neither their skin nor their number of images tells.
    """
    images, patients = settings.images, settings.patients
    if images < patients:
        raise UserError(
            f"synthetic.images: {images} images cannot be shared among {patients} patients; "
            "draw more, or lower synthetic.patients"
        )
    rng = generator(settings.seed, "table")
    least = 2 if images >= 2 * patients else 1
    weight = rng.lognormal(0, 0.8, patients)
    count = least + rng.multinomial(images - least * patients, weight / weight.sum())
    owner = rng.permutation(np.repeat(np.arange(patients), count))
    risk = rng.lognormal(0, 1, patients)[owner]
    melanomas = round(settings.prevalence * images)
    if not 0 < melanomas < images:
        raise UserError(
            f"synthetic.prevalence: {melanomas} melanomas among {images} images leave a class empty; "
            "choose a share between 0 and 1, or draw more"
        )
    target = np.zeros(images, np.int64)
    target[rng.choice(images, melanomas, replace=False, p=risk / risk.sum())] = 1
    sex = rng.choice(["male", "female"], patients)
    age = rng.normal(50, 14, patients).clip(15, 85)
    site = rng.choice(list(SITES), images, p=list(SITES.values()))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["isic_id", "patient_id", "sex", "age_approx", "anatom_site_general", "target"])
        for index, patient in enumerate(owner):
            age_here = "" if rng.random() < 0.01 else 5 * round((age[patient] + rng.uniform(0, 5)) / 5)
            ids = f"SYN_{index:07d}", f"SP_{patient:07d}"
            writer.writerow([*ids, sex[patient], age_here, site[index], target[index]])


def _draw_all(settings: Synthetic, moles: list[tuple[str, str, bool]], folder: Path, progress: bool) -> None:
    """Draws every mole's image into `folder`, over as many processes as the settings say."""
    tasks = ((settings, folder, moles[start : start + CHUNK]) for start in range(0, len(moles), CHUNK))
    with (
        tqdm(total=len(moles), desc="draw", unit="image", disable=not progress) as bar,
        contextlib.closing(in_order(draw_files, tasks, settings.workers)) as done,
    ):
        for drawn in done:
            bar.update(drawn)
