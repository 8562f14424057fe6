"""What a run tells the world: `metrics.jsonl` always, Weights & Biases where it can be reached. Rank 0 only.

W&B is a window, never a condition: it has a thread of its own, so that training waits for no network; what it
cannot be told is on disk.
"""

import io
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import wandb
from PIL import Image

from configs.schema import Experiment
from pipeline.environment import environment
from shards.files import atomic, read_json, write_json, writing
from shards.shardset import ShardSet
from train import artifacts, gallery, lines
from train.gallery import Floats, Ints
from train.signals import StoppedError
from train.window import PATIENCE, REACHED, Call, Window


class Tracker:
    """One stage's log.

    Every stage has a step axis of its own: W&B drops steps that do not rise, as after a resume."""

    def __init__(
        self, experiment: Experiment, stage: str, *, rank: int = 0, after: int = 0, run_id: str | None = None
    ) -> None:
        """
        Args:
            stage: `encoder`, `classifier` or `evaluate`: the prefix of what is logged.
            rank: others than 0 log nothing.
            after: the step this stage goes on from; later lines of an interrupted run are dropped.
            run_id: the W&B run of a checkpoint; the run folder's own, if it has one, goes first.
        """
        self._stage, self._folder, self._settings = stage, experiment.run.folder, experiment.tracking
        self._told: set[str] = set()
        self.run_id: str | None = None
        self._window: Window | None = None
        self._lines = self._folder / lines.FILE
        self._active = rank == 0
        if not self._active:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        _drop_lines(self._lines, stage, after)
        # W&B's word home of its own errors: where the network swallows it, the process would wait at its end.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        mode = _mode(self._settings.mode)
        of_agent = wandb.setup().settings.run_id if mode != "disabled" else None  # a sweep's, WANDB_RUN_ID
        self.run_id = run = _run_id(self._folder, run_id or of_agent)
        if mode != "disabled":
            self._window = Window(lambda: _start(experiment, stage, run, mode))

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line of figures at a step; those that are not finite are left out of it, and an alert."""
        if not self._active:
            return
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"stage": self._stage, "step": step, "time": round(time.time(), 3), **finite}
        with writing(self._lines), self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._do(lambda run: run.log(self._named({"step": step, **finite})))
        if broken := ", ".join(sorted(values.keys() - finite.keys())):
            self.alert(step, "not finite", broken)

    def images(self, name: str, images: torch.Tensor, captions: list[str]) -> None:
        """Sample images (n, 3, H, W) in 0..1."""
        if self._window:
            pixels = (images.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
            self._show(
                lambda: {name: [wandb.Image(p, caption=c) for p, c in zip(pixels, captions, strict=True)]}
            )

    def dataset(self, shards: ShardSet, place: Path | str) -> None:
        """The shard set, as the artifact that this run uses.

        Args:
            shards: the set as it was opened.
            place: where it lies for all, a folder or a URL.
        """
        if self._settings.artifacts:
            self._do(lambda run: artifacts.use(run, artifacts.dataset(shards, place)))

    def encoder(self) -> None:
        """The run folder's encoder, as an artifact that this run made."""
        if self._settings.artifacts:
            self._do(lambda run: run.log_artifact(artifacts.encoder(self._folder), aliases=["best"]))

    def embeddings(self, step: int, shards: ShardSet, index: Ints, vectors: Floats) -> None:
        """The hardest triplets of a split, and its embeddings in a plane.

        Args:
            index: (n,) of samples in the set.
            vectors: (n, dim) their embeddings.
        """
        triplets, points = self._settings.triplets, self._settings.projection
        if triplets:
            self._show(
                lambda: {
                    "step": step,
                    "hardest_triplets": gallery.triplets(shards, index, vectors, triplets),
                }
            )
        if points:
            self._show(lambda: {"step": step, **gallery.projection(shards, index, vectors, points)})

    def figures(self, values: dict[str, float], pictures: dict[str, Path]) -> None:
        """The stage's final figures and plots, in the run's summary."""
        self._do(lambda run: run.summary.update(self._named(values)))
        if self._window and pictures:
            loaded = {name: path.read_bytes() for name, path in pictures.items()}  # they may be replaced
            self._show(lambda: {name: _picture(data) for name, data in loaded.items()})

    def alert(self, step: int, title: str, text: str) -> None:
        """Something to look at, once by each title: on the console, and by W&B's mail or chat."""
        if not self._active or title in self._told:
            return
        self._told.add(title)
        print(f"warning: step {step}: {title}: {text}", file=sys.stderr, flush=True)
        self._alert(title, f"step {step}: {text}", "WARN")

    def close(self, failed: bool = False) -> None:
        """Flush and leave W&B."""
        if self._window:
            self._window.close(failed)
            self._window = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, StoppedError):
            self._alert(f"{self._stage} ended", str(error) or type(error).__name__, "ERROR")
        self.close(failed=kind is not None)

    def _show(self, make: Callable[[], dict[str, Any]]) -> None:
        """Log what W&B's thread makes."""
        self._do(lambda run: run.log(self._named(make())))

    def _alert(self, title: str, text: str, level: str) -> None:
        self._do(lambda run: run.alert(title=title, text=text, level=level))

    def _do(self, call: Call) -> None:
        if self._window:
            self._window.do(call)

    def _named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{self._stage}/{name}": value for name, value in values.items()}


def _picture(data: bytes) -> wandb.Image:
    return wandb.Image(Image.open(io.BytesIO(data)))


def _run_id(folder: Path, known: str | None) -> str:
    """The one W&B run of a run folder."""
    path = folder / "wandb.json"
    if path.exists():
        return str(read_json(path, "moleprint train CONFIG, after deleting it")["id"])
    run_id = known or uuid.uuid4().hex[:8]
    write_json(path, {"id": run_id})
    return run_id


def _drop_lines(path: Path, stage: str, after: int) -> None:
    """Keep what other stages wrote, and this one up to `after`; a half-written last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        row = lines.parse(line) if line.endswith("\n") else None
        if row and (row["stage"] != stage or row["step"] <= after):
            kept.append(line)
    with atomic(path) as file:
        file.write("".join(kept).encode())


def _start(experiment: Experiment, stage: str, run_id: str, mode: str) -> Any:
    """Begin the W&B run, or go on with it; offline where it cannot be reached."""
    settings = experiment.tracking
    about = environment()
    arguments: dict[str, Any] = {
        "project": settings.project,
        "entity": settings.entity,
        "group": settings.group,
        "name": settings.name or experiment.run.folder.name,
        "tags": list(settings.tags),
        "id": run_id,
        "resume": "allow" if mode == "online" else None,
        "dir": str(experiment.run.folder),
        "config": {**experiment.model_dump(mode="json"), "environment": about},
        "settings": wandb.Settings(
            silent=True,
            console="off",
            init_timeout=REACHED,
            finish_timeout=PATIENCE,
            git_commit=about["git_commit"],
        ),
    }
    try:
        run = wandb.init(mode=mode, **arguments)
    except wandb.errors.Error as error:
        reason = str(error).splitlines()[0]
        print(
            f"W&B cannot be reached ({reason}); logging offline, send later with `wandb sync`",
            file=sys.stderr,
            flush=True,
        )
        wandb.teardown()  # its service holds the id of the run that could not begin
        run = wandb.init(mode="offline", **{**arguments, "resume": None})
    run.define_metric(f"{stage}/step", hidden=True)
    run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    return run


def _mode(asked: str) -> str:
    """`auto`: what WANDB_MODE says, else online where a key is configured, else offline; asks no network."""
    if asked != "auto":
        return asked
    settings = wandb.setup().settings
    if settings.mode in ("offline", "disabled"):
        return str(settings.mode)
    return "online" if settings.api_key or wandb.login(prompt=False) else "offline"
