"""`metrics.jsonl`, the lines that all stages of a run log, read back."""

import json
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"
"""Its name in a run folder."""
Row = dict[str, Any]


def parse(line: str | bytes) -> Row | None:
    """A line of a stage at a step; None if it is cut short by a crash, or damaged."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    known = isinstance(row, dict) and {"stage", "step"} <= row.keys()
    return row if known else None


def read(log: Path) -> list[Row]:
    """All whole lines of a log, in order; none where there is no log yet."""
    if not log.exists():
        return []
    return [row for line in log.read_bytes().splitlines() if (row := parse(line))]
