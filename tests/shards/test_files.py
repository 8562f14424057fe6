"""A file is there whole or not at all, and one that cannot be written is the user's to know of."""

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from shards.files import atomic, write_json, write_text


def test_a_file_is_replaced_whole_with_the_usual_rights(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for text in ("first", "second"):
        write_text(path, text)
        assert path.read_text() == text
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), UserError("a mistake")])
def test_other_errors_pass_through_and_leave_the_old_file(tmp_path: Path, error: BaseException) -> None:
    write_text(tmp_path / "file", "old")
    with pytest.raises(type(error)) as caught, atomic(tmp_path / "file") as file:
        file.write(b"half")
        raise error
    assert caught.value is error
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"^.*/a\.json: cannot be written \(No space left on device\); make room"
    ):
        write_json(tmp_path / "a.json", {})
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("file/a", "file/b/c", "folder", "x" * 300):
        with pytest.raises(UserError, match=rf"{name}: cannot be written \(.+\)"):
            write_text(tmp_path / name, "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
