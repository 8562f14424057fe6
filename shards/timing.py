"""What benchmarks share: contestants take turns; their rates become rows, a table and a JSON file."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from configs.errors import UserError

REFERENCE = "reference"
TURNS = 6  # the fewest whose extremes hold the median with 95 % confidence: they miss it once in 2**5
Row = dict[str, Any]
_NAME = 34  # characters


def refuse_folder(json_file: Path | None) -> None:
    """Raise UserError, before anything is measured, where the rows could not be written at its end."""
    if json_file and json_file.is_dir():
        raise UserError(f"{json_file}: a folder, where --json needs a file; add a name such as bench.json")


def take_turns(contestants: Mapping[str, Callable[[], float]], turns: int = TURNS) -> dict[str, list[float]]:
    """Let each have its turn, again and again: whatever else the machine does falls on all of them.

    Args:
        contestants: name -> a turn, which gives the images a second that it measured.

    Returns:
        Name -> images a second of each of its turns.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    with tqdm(total=turns * len(contestants), unit="turn") as bar:
        for _ in range(turns):
            for name, turn in contestants.items():
                bar.set_description(name)
                rates[name].append(turn())
                bar.set_postfix_str(f"{rates[name][-1]:,.0f} images/s")
                bar.update()
    return rates


def row(name: str, rates: Mapping[str, Sequence[float]]) -> Row:
    """Medians over the turns; `ratio` is that of turns side by side, which share the machine's moods.

    Where there is no reference among the contestants, there is no ratio either.
    """
    own = rates[name]
    found = {"name": name, "images_per_second": median(own), "low": min(own), "high": max(own)}
    if REFERENCE not in rates:
        return found
    ratios = [mine / theirs for mine, theirs in zip(own, rates[REFERENCE], strict=True)]
    return found | {"ratio": median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}


def table(rows: Sequence[Row], title: str = "") -> list[str]:
    """The rows, aligned, under a head."""
    lines = [
        f"{title:{_NAME}}{'images/s':>10}{'95 % interval':>20}{f'× {REFERENCE}':>14}{'95 % interval':>16}"
    ]
    for each in rows:
        interval = f"{each['low']:,.0f} – {each['high']:,.0f}"
        line = f"{each['name']:{_NAME}}{each['images_per_second']:>10,.0f}{interval:>20}"
        if "ratio" in each:
            ratio_interval = f"{each['ratio_low']:.2f} – {each['ratio_high']:.2f}"
            line += f"{each['ratio']:>14.2f}{ratio_interval:>16}"
        lines.append(line)
    return lines
