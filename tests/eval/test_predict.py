"""An output that cannot be written is refused before time is spent on it."""

from pathlib import Path

import pytest

from configs.errors import UserError
from eval.predict import check_output


def test_outputs_that_can_be_written_pass_and_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "old.csv").touch()
    for output in (None, Path("out.csv"), tmp_path / "old.csv", tmp_path / "new" / "deeper" / "out.csv"):
        check_output(output)
    assert [path.name for path in tmp_path.iterdir()] == ["old.csv"]


def test_outputs_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, reason in {
        tmp_path: "is not a file",
        Path(): "is not a file",
        Path("/dev/null"): "is not a file",
        tmp_path / "file" / "out.csv": "cannot be written .Not a directory",
        tmp_path / "file" / "deeper" / "out.csv": "cannot be written .Not a directory",
        Path("/proc/out.csv"): "cannot be written",
        tmp_path / ("x" * 300): "File name too long",
    }.items():
        with pytest.raises(UserError, match=reason):
            check_output(output)
