"""`moleprint watch RUN`: a live view of a run folder, drawn from its `metrics.jsonl` alone.

It only reads: the run may be on another host whose folder is mounted here, and nothing need be running. Lines
that are half written, or damaged, are left out; a log that a resumed run has cut is read anew.
"""

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from configs.errors import UserError
from train.console import clock
from train.lines import FILE, Row, parse

INTERVAL = 1.0
"""Seconds between two looks."""
BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 48
"""Characters of a curve at most."""
FIGURES = 60
"""Characters beside it."""
QUIET = 120
"""Seconds without a line after which that is said in colour."""
CURVES: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "encoder": (
        ("loss", "loss", ".4f"),
        ("triplet", "triplet loss", ".4f"),
        ("classification", "cross-entropy", ".4f"),
        ("val_roc_auc", "validation AUC", ".3f"),
        ("spread", "spread", ".3f"),
        ("active_triplets", "active triplets", ".0%"),
        ("grad_norm", "gradient norm", ".3f"),
        ("lr", "learning rate", ".2e"),
        ("images_per_second", "images/s", ",.0f"),
        ("data_wait", "waiting for data", ".1%"),
        ("gpu_memory", "GPU memory, GiB", ".1f"),
    ),
    "classifier": (
        ("loss", "loss", ".4f"),
        ("val_loss", "validation loss", ".4f"),
        ("val_roc_auc", "validation AUC", ".3f"),
    ),
}
"""Stage: its figures as (name, title, format); those that a run does not log are left out."""


class Log:
    """The whole lines of a file that grows, and may be replaced by a shorter one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file, self._read = (0, 0), 0
        self.rows: list[Row] = []

    def update(self) -> None:
        """Take in what is new."""
        try:
            with self._path.open("rb") as file:  # opened each time: a network mount then asks its server
                about = os.fstat(file.fileno())
                if (about.st_dev, about.st_ino) != self._file or about.st_size < self._read:
                    self._file, self._read, self.rows = (about.st_dev, about.st_ino), 0, []
                file.seek(self._read)
                whole, newline, _ = file.read().rpartition(b"\n")
        except FileNotFoundError:
            return
        self._read += len(whole) + len(newline)
        self.rows += [row for line in whole.splitlines() if (row := parse(line))]


def watch(run: Path, *, once: bool = False, console: Console | None = None) -> None:
    """Show a run until Ctrl-C, or `once`.

    Raises:
        UserError: if there is no such folder.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; give the run folder (run.folder) of an experiment")
    console = console or Console()
    log = Log(run / FILE)

    def look() -> RenderableType:
        log.update()
        return frame(run, log.rows, time.time(), width=min(WIDTH, max(8, console.width - FIGURES)))

    if once:
        console.print(look())
        return
    with Live(look(), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(INTERVAL)
            live.update(look(), refresh=True)


def frame(run: Path, rows: Sequence[Row], now: float, *, width: int = WIDTH) -> RenderableType:
    """One picture of a run.

    Args:
        rows: of its log.
        now: seconds since 1970.
        width: characters of a curve.
    """
    stages = [stage for stage in CURVES if any(row["stage"] == stage for row in rows)]
    if not stages:
        waiting = Text("no line in metrics.jsonl yet: it comes with the first logged steps", style="dim")
        return Panel(waiting, title=str(run), title_align="left")
    parts: list[RenderableType] = []
    for stage in stages:
        mine = [row for row in rows if row["stage"] == stage]
        parts += [_head(run, stage, mine, now), _curves(stage, mine, width)]
    return Panel(Group(*parts), title=str(run), title_align="left")


def _head(run: Path, stage: str, rows: Sequence[Row], now: float) -> Text:
    """Where a stage stands, in a line."""
    last = rows[-1]
    text = Text(stage, style="bold")
    text.append(f"  step {last['step']:,}", style="not bold")
    if "epoch" in last:
        text.append(f"  epoch {last['epoch']:.2f}", style="not bold")
    if stage == "encoder" and (run / "encoder.json").exists():
        return text.append("  finished", style="green")
    if left := next((row["seconds_left"] for row in reversed(rows) if "seconds_left" in row), None):
        text.append(f"  {clock(left)} left at most", style="not bold cyan")
    quiet = max(0.0, now - last.get("time", now))  # the other host's clock may be ahead
    style = "bold red" if quiet > QUIET else "not bold dim"
    return text.append(f"  last line {clock(quiet)} ago", style=style)


def _curves(stage: str, rows: Sequence[Row], width: int) -> Table:
    series: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float):
                series[name].append(value)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title, justify in (
        ("", "left"),
        ("now", "right"),
        ("least", "right"),
        ("most", "right"),
        ("", "left"),
    ):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for name, title, form in CURVES[stage]:
        if values := series[name]:
            now, least, most = (format(v, form) for v in (values[-1], min(values), max(values)))
            if name == "gpu_memory" and series["gpu_memory_total"]:
                now += f" of {series['gpu_memory_total'][-1]:.0f}"
            table.add_row(title, f"[bold]{now}", least, most, f"[cyan]{sparkline(values, width)}")
    return table


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve in at most `width` characters, each the mean of its share of the values."""
    count = min(width, len(values))
    parts = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)
