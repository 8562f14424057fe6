"""Where a shard set is made and where it ends up: a local folder, or a URL that fsspec can write.

Everything unfinished lies in one work folder: `.NAME.partial` beside a local output. The set grows in its
subfolder `set`, which takes the output's name at the very end; a URL gets each shard as it is finished, and
`dataset.json` last.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.packing import Pack
from shards.claims import Part, lock, lock_alone
from shards.files import new_folder, read_json, writing
from shards.shardset import MANIFEST, is_url

_WHOLE_AT_ONCE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "memory"}
"""Protocols under which a file appears only once it is there in full."""
_ATTEMPTS = 100
"""Tries to make and lock a work folder that others delete meanwhile."""
_PATIENCE = 10.0
"""Seconds that a part waits for the last one of a job before it, which is deleting the work."""


@dataclass(frozen=True)
class Output:
    """The place of a shard set, and of the work on it."""

    place: str
    """Folder or URL."""
    work: Path
    """Folder for unfinished work."""

    @classmethod
    def of(cls, settings: Pack) -> "Output":
        """As the configuration says."""
        place = settings.output
        if is_url(place):
            place = place.rstrip("/")
            name = f"moleprint-{hashlib.sha256(place.encode()).hexdigest()[:16]}"
            return cls(place, (settings.work or Path(tempfile.gettempdir())) / name)
        folder = Path(place).resolve()
        if not folder.name:
            raise UserError(f"{folder}: is no new folder; set pack.output to one below it")
        return cls(str(folder), folder.with_name(f".{folder.name}.partial"))

    @property
    def growing(self) -> Path:
        """Folder that the set's files are written into."""
        return self.work / "set"

    @property
    def url(self) -> str:
        """The URL, or empty for a local folder."""
        return self.place if is_url(self.place) else ""

    def refuse_existing(self) -> None:
        """Raise UserError if something is there already that is not this packer's own unfinished work."""
        if self.url:
            with _remote(self.place) as (fs, root):
                there = fs.exists(f"{root}/{MANIFEST}") or (
                    not self.work.exists() and fs.exists(root) and fs.ls(root)
                )
        else:
            output = Path(self.place)
            there = output.exists() and not (output.is_dir() and not any(output.iterdir()))
            if output.is_mount():
                raise UserError(f"{output}: is a mount point; set pack.output to a new folder below it")
        if there:
            raise UserError(f"{self.place}: exists already; delete it, or set pack.output to another folder")

    def packed(self) -> bool:
        """Whether a whole set is there."""
        if not self.url:
            return (Path(self.place) / MANIFEST).is_file()
        with _remote(self.place) as (fs, root):
            return bool(fs.exists(f"{root}/{MANIFEST}"))

    def manifest(self) -> dict[str, Any]:
        """Content of the set's `dataset.json`."""
        if not self.url:
            return dict(read_json(Path(self.place) / MANIFEST, "moleprint pack"))
        with _remote(self.place) as (fs, root):
            return dict(json.loads(fs.cat_file(f"{root}/{MANIFEST}")))

    @contextlib.contextmanager
    def working(self, part: Part, job: str) -> Iterator[None]:
        """Hold the work folder against other packers.

        It stays for the next try, and goes when the set is whole: the last of several parts deletes it, as
        the others look into it until they have seen the end.

        Args:
            job: sum of the settings and tables, which all parts at work must share.

        Raises:
            UserError: if another packer is at work, or the other parts are not of the same job.
        """
        with contextlib.ExitStack() as stack:
            with writing(self.work if self.url else Path(self.place)):
                stack.enter_context(new_folder(self.work.parent))
                handle = self._hold(part)
            stack.callback(os.close, handle)
            whole = False
            try:
                if part.alone:
                    for leftover in self.work.rglob(".*.tmp"):
                        leftover.unlink()
                else:
                    self._agree(stack, job)
                yield
                whole = True
            finally:
                if lock_alone(handle):
                    self._leave(whole)

    def _hold(self, part: Part) -> int:
        """The handle of a lock on the work folder, which several parts share."""
        # A file, not the folder: network file systems keep locks on folders from other hosts.
        path = self.work / "packing.lock"
        patience = 0 if part.alone else _PATIENCE
        for attempt in range(_ATTEMPTS):
            try:
                self.work.mkdir(exist_ok=True)
                handle = lock(path, shared=not part.alone, patience=patience)
                if handle is None:
                    break
                if _is_named(handle, path):
                    self.growing.mkdir(exist_ok=True)
                    return handle
                os.close(handle)  # of a file that was deleted meanwhile: others may hold its successor
            except FileNotFoundError:  # another packer is just deleting the folder
                if attempt == _ATTEMPTS - 1:
                    raise
        raise UserError(f"{self.place}: is being packed by another process; wait for it, or end it")

    def _leave(self, whole: bool) -> None:
        """Delete the work or, where there is more to do, what holds nothing of it."""
        if whole:
            shutil.rmtree(self.work, ignore_errors=True)
            return
        for claim in self.work.glob("*.lock"):
            claim.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something is in them
            self.growing.rmdir()
            self.work.rmdir()

    def _agree(self, stack: contextlib.ExitStack, job: str) -> None:
        """Hold a lock in the job's name; raise UserError if another job's is held."""
        mine = self.work / f"job-{job[:16]}.lock"
        for path in (mine, *self.work.glob("job-*.lock")):
            handle = lock(path, shared=path == mine)
            if handle is None:
                raise UserError(
                    f"{self.place}: others are packing it with other settings or tables; wait for them, end "
                    "them, or set pack.output to another folder"
                )
            if path == mine:
                stack.callback(os.close, handle)
            else:
                os.close(handle)

    def holds(self, files: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether finished files lie where they belong, with their sizes."""
        if self.url:
            with _remote(self.place) as (fs, root):
                return all(
                    fs.exists(f"{root}/{name}") and fs.size(f"{root}/{name}") == about["size"]
                    for name, about in files.items()
                )
        # Another packer may give the set its name between two looks.
        return any(
            all(
                (folder / name).is_file() and (folder / name).stat().st_size == about["size"]
                for name, about in files.items()
            )
            for folder in (self.growing, Path(self.place))
        )

    def finish(self, files: Mapping[str, Any]) -> None:
        """Give the set its name, its manifest last.

        Args:
            files: names of all files of the set but the manifest. Others of an earlier try are deleted.
        """
        keep = {*files, MANIFEST}
        for path in self.growing.iterdir():
            if path.name not in keep:
                path.unlink()
        if self.url:
            with _remote(self.place) as (fs, root):
                for name in {Path(path).name for path in fs.ls(root, detail=False)} - keep:
                    if re.fullmatch(r"[a-z0-9]+-\d{6}\.(tar|idx)", name):
                        fs.rm_file(f"{root}/{name}")
            put(
                self.growing, self.place, sorted(p.name for p in self.growing.iterdir() if p.name != MANIFEST)
            )
            put(self.growing, self.place, [MANIFEST])
        else:
            output = Path(self.place)
            self.refuse_existing()
            with writing(output):
                _flush(self.growing)
                self.growing.rename(output)
                _flush(output.parent)


def _is_named(handle: int, path: Path) -> bool:
    """Whether an open file is the one that a path names now."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def put(folder: Path, url: str, names: list[str]) -> None:
    """Move files of a folder to a URL, each under its final name only once it is whole there.

    Raises:
        UserError: if the place refuses.
    """
    with _remote(url) as (fs, root):
        whole = bool(_WHOLE_AT_ONCE & set([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol))
        if not whole:  # a store of objects has no folders, and must not get a bucket that does not exist
            fs.makedirs(root, exist_ok=True)
        for name in names:
            first = name if whole else f".{name}.tmp"
            fs.put_file(str(folder / name), f"{root}/{first}")
            if not whole:
                fs.mv(f"{root}/{first}", f"{root}/{name}")
            (folder / name).unlink()


@contextlib.contextmanager
def _remote(url: str) -> Iterator[tuple[Any, str]]:
    """A URL's file system and path; whatever its driver raises becomes a UserError."""
    import fsspec

    try:
        fs, root = fsspec.core.url_to_fs(url)
        fs.invalidate_cache()
        yield fs, root.rstrip("/")
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{url}: cannot be written ({reason}); check the address and the rights to it, and that its "
            "driver is installed (such as s3fs for s3://)"
        ) from error


def _flush(folder: Path) -> None:
    """Bring a folder's list of names to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
