"""What benchmarks share: contestants take turns; their rates become rows, a table and a JSON file."""

import os
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


def table(rows: Sequence[Row], title: str = "", more: Mapping[str, str] | None = None) -> list[str]:
    """The rows, aligned, under a head.

    Args:
        more: columns besides: key of a row -> what stands above it.
    """
    more = more or {}
    head = f"{title:{_NAME}}{'images/s':>10}{'95 % interval':>20}{f'× {REFERENCE}':>14}{'95 % interval':>16}"
    lines = [head + "".join(f"{text:>{_wide(text)}}" for text in more.values())]
    for each in rows:
        interval = f"{each['low']:,.0f} – {each['high']:,.0f}"
        line = f"{each['name']:{_NAME}}{each['images_per_second']:>10,.0f}{interval:>20}"
        if "ratio" in each:
            ratio_interval = f"{each['ratio_low']:.2f} – {each['ratio_high']:.2f}"
            line += f"{each['ratio']:>14.2f}{ratio_interval:>16}"
        for key, text in more.items():
            figure = f"{each[key]:,.0f}" if each[key] >= 100 else f"{each[key]:.2f}"
            line += f"{figure:>{_wide(text)}}"
        lines.append(line)
    return lines


def _wide(heading: str) -> int:
    return max(10, len(heading) + 2)


def family(parent: int) -> list[int]:
    """Process ids of a process and of all below it."""
    found, left = [], [parent]
    while left:
        found.append(left.pop())
        try:
            tasks = list(Path(f"/proc/{found[-1]}/task").iterdir())
            left += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:  # it has ended
            pass
    return found


def cpu_seconds() -> float:
    """CPU time of this process and of all below it so far, those that have ended included."""
    ticks = 0
    for process in family(os.getpid()):
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            continue
        ticks += sum(map(int, stat.rpartition(")")[2].split()[11:15]))  # own and children's; user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(parent: int) -> int:
    """Bytes that a process and all below it hold; what they share counts once, files in memory not at all.

    Files, such as libraries and mapped shards, are shared with whoever else reads them and make way.
    """
    kilobytes = 0
    for process in family(parent):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        kilobytes += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))
    return 1024 * kilobytes
