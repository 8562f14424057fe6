"""The live view: every whole line and no other, whatever happens to the file; figures as they are logged."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.errors import UserError
from launch import watch
from launch.watch import Log, frame, sparkline


def line(step: int, stage: str = "encoder", **figures: Any) -> str:
    """A line of metrics.jsonl."""
    return json.dumps({"stage": stage, "step": step, "time": 1e9 + step, **figures}) + "\n"


def drawn(run: Path, *texts: str, now: float = 1e9 + 100) -> str:
    """A frame as text."""
    (run / "metrics.jsonl").write_text("".join(texts))
    log = Log(run / "metrics.jsonl")
    log.update()
    console = Console(file=io.StringIO(), width=140)
    console.print(frame(run, log.rows, now))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_growing_log_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = Log(path)
    log.update()
    assert log.rows == []
    text = "".join(line(step) for step in (1, 2, 3)).encode()
    with path.open("wb", buffering=0) as file:
        for size in range(1, len(text) + 1):  # written byte by byte
            file.write(text[size - 1 : size])
            log.update()
            assert len(log.rows) == text[:size].count(b"\n")
    assert [row["step"] for row in log.rows] == [1, 2, 3]


def test_a_log_that_was_cut_is_read_anew(tmp_path: Path) -> None:
    """As a resumed run does: a new file under the old name, or the old one shorter."""
    path = tmp_path / "metrics.jsonl"
    log = Log(path)
    path.write_text("".join(line(step) for step in range(1, 9)))
    log.update()
    (tmp_path / "new").write_text("".join(line(step) for step in (1, 2, 30, 40, 50, 60, 70, 80, 90)))
    (tmp_path / "new").replace(path)
    log.update()
    assert [row["step"] for row in log.rows][:3] == [1, 2, 30]
    path.write_text(line(1))
    log.update()
    assert [row["step"] for row in log.rows] == [1]


@pytest.mark.parametrize(
    "damage", ["\0\0\0\n", "{}\n", "[1]\n", '{"stage": "encoder"}\n', '{"st\n', "\xff\n"]
)
def test_damaged_lines_are_left_out(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1).encode() + damage.encode("latin-1") + line(2).encode())
    log = Log(path)
    log.update()
    assert [row["step"] for row in log.rows] == [1, 2]


def test_the_figures_of_the_log_are_shown(tmp_path: Path) -> None:
    figures = {"loss": 0.5, "images_per_second": 1234.4, "data_wait": 0.031, "seconds_left": 3725.0}
    memory = {"gpu_memory": 11.26, "gpu_memory_total": 79.6}
    shown = drawn(
        tmp_path,
        line(10, loss=0.9, epoch=0.5),
        line(20, epoch=1.25, **figures, **memory),
        line(20, val_roc_auc=0.8125, epoch=1.25),
    )
    for words in ("step 20", "epoch 1.25", "1:02:05 left", "last line 1:20 ago", "0.5000", "0.9000"):
        assert words in shown
    for words in ("1,234", "3.1%", "0.812", "11.3 of 80", "█"):
        assert words in shown
    assert "triplet" not in shown
    (tmp_path / "encoder.json").write_text("{}")
    assert "finished" in drawn(tmp_path, line(10, loss=0.9))
    assert "classifier" in drawn(tmp_path, line(10, loss=0.9), line(1, "classifier", loss=0.4))


def test_a_run_without_a_line_waits_and_none_is_told(tmp_path: Path) -> None:
    assert "no line in metrics.jsonl yet" in drawn(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        watch.watch(tmp_path / "nowhere", once=True)


def test_it_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live: what is appended meanwhile appears; Ctrl-C ends it."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1, loss=0.75))
    console = Console(file=io.StringIO(), width=140, force_terminal=True)
    naps = iter((line(2, loss=0.25), None))

    def nap(seconds: float) -> None:
        text = next(naps)
        if text is None:
            raise KeyboardInterrupt
        with path.open("a") as file:
            file.write(text)

    monkeypatch.setattr(time, "sleep", nap)
    with pytest.raises(KeyboardInterrupt):
        watch.watch(tmp_path, console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0.7500" in said and "0.2500" in said


def test_a_narrow_terminal_gets_short_curves_not_cut_ones(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(line(step, loss=1 / step) for step in range(1, 200)))
    console = Console(file=io.StringIO(), width=80)
    watch.watch(tmp_path, once=True, console=console)
    assert "▁" in console.file.getvalue() and "…" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_curve_is_scaled_and_shortened() -> None:
    assert sparkline([0, 1], 9) == "▁█" and sparkline([3.0], 9) == "▁" and sparkline([2, 2, 2], 9) == "▁▁▁"
    assert sparkline(range(800), width=8) == "▁▂▃▄▅▆▇█"
    assert len(sparkline(range(1000), 48)) == 48
