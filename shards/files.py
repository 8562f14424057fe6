"""Files that appear whole or not at all: written under a temporary name, flushed to disk, then renamed."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from configs.errors import UserError

_BUFFER = 1 << 20  # bytes


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes `path`: raises UserError where the system refuses, for want of room or rights."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); make room or get the right to write "
            "there, or choose another place"
        ) from error


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """Make a folder and its parents for a block; then those that it made and that stayed empty go."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # something was put into it
                folder.rmdir()


@contextlib.contextmanager
def atomic(path: Path, *, flush: bool = True) -> Iterator[IO[bytes]]:
    """Open `path` for writing; it appears under its name only when the block ends without an error.

    Args:
        flush: bring it to disk first, so that a power cut leaves no half under the name either. Without, its
            reader must find that out.

    Raises:
        UserError: if it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb", buffering=_BUFFER) as file:
                yield file
                if flush:
                    file.flush()
                    os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder to fill; it takes the place of `folder` when the block ends without an error.

    Raises:
        UserError: if it cannot be written.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
            fresh = Path(name) / "new"
            fresh.mkdir()
            yield fresh
            if folder.exists():
                folder.rename(Path(name) / "old")
            fresh.rename(folder)


def write_text(path: Path, text: str, *, flush: bool = True) -> None:
    """Write UTF-8 text atomically, `flush` as for `atomic`."""
    with atomic(path, flush=flush) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the given order; NaN is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, made_by: str, keys: Sequence[str] = ()) -> Any:
    """Read a JSON file of ours: a mapping with at least `keys`.

    Raises:
        UserError: if it is missing or damaged, naming the command that makes it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        lacking = [key for key in keys if key not in value] if isinstance(value, dict) else ["a mapping"]
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        return value
    except FileNotFoundError:
        raise UserError(f"{path}: not found; make it with `{made_by}`") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); make it again with `{made_by}`") from None


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
