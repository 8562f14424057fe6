"""What a run tells the world: `metrics.jsonl` always, Weights & Biases where it can be reached. Rank 0 only.

W&B is a window, never a condition: if it cannot be reached the run goes on and its log waits on disk.
"""

import json
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import wandb

from configs.schema import Experiment
from shards.files import atomic, read_json, write_json, writing


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
        self._stage, self._folder = stage, experiment.run.folder
        self.run_id: str | None = None
        self._wandb: Any = None
        self._lines = self._folder / "metrics.jsonl"
        self._active = rank == 0
        if not self._active:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self.run_id = _run_id(self._folder, run_id)
        _drop_lines(self._lines, stage, after)
        self._wandb = _start(experiment, stage, self.run_id)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line of figures at a step."""
        if not self._active:
            return
        line = {"stage": self._stage, "step": step, "time": round(time.time(), 3), **values}
        with writing(self._lines), self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._wandb:
            self._wandb.log({f"{self._stage}/{k}": v for k, v in {"step": step, **values}.items()})

    def images(self, name: str, images: torch.Tensor, captions: list[str]) -> None:
        """Sample images (n, 3, H, W) in 0..1."""
        if self._wandb:
            pixels = (images.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
            pictures = [wandb.Image(p, caption=c) for p, c in zip(pixels, captions, strict=True)]
            self._wandb.log({f"{self._stage}/{name}": pictures})

    def figures(self, values: dict[str, float], pictures: dict[str, Path]) -> None:
        """The stage's final figures and plots, in the run's summary."""
        if self._wandb:
            self._wandb.summary.update({f"{self._stage}/{k}": v for k, v in values.items()})
            self._wandb.log({f"{self._stage}/{k}": wandb.Image(str(path)) for k, path in pictures.items()})

    def alert(self, title: str, text: str) -> None:
        """Something to look at, which W&B sends on by mail or chat where the user asked for that."""
        if self._wandb:
            self._wandb.alert(title=title, text=text)

    def close(self, failed: bool = False) -> None:
        """Flush and leave W&B."""
        if self._wandb:
            self._wandb.finish(exit_code=int(failed))
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


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
        try:
            row = json.loads(line)
        except ValueError:
            continue
        ours = isinstance(row, dict) and {"stage", "step"} <= row.keys() and line.endswith("\n")
        if ours and (row["stage"] != stage or row["step"] <= after):
            kept.append(line)
    with atomic(path) as file:
        file.write("".join(kept).encode())


def _start(experiment: Experiment, stage: str, run_id: str) -> Any:
    settings = experiment.tracking
    mode = _mode(settings.mode)
    if mode == "disabled":
        return None
    arguments: dict[str, Any] = {
        "project": settings.project,
        "entity": settings.entity,
        "name": settings.name or experiment.run.folder.name,
        "tags": list(settings.tags),
        "id": run_id,
        "resume": "allow" if mode == "online" else None,
        "dir": str(experiment.run.folder),
        "config": experiment.model_dump(mode="json"),
        "settings": wandb.Settings(silent=True, init_timeout=30, console="off"),
    }
    try:
        run = wandb.init(mode=mode, **arguments)
    except wandb.errors.Error as error:
        reason = str(error).splitlines()[0]
        print(f"W&B cannot be reached ({reason}); logging offline, send later with `wandb sync`", flush=True)
        run = wandb.init(mode="offline", **{**arguments, "resume": None})
    run.define_metric(f"{stage}/step", hidden=True)
    run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
    return run


def _mode(asked: str) -> Any:
    """`auto`: what WANDB_MODE says, else online where a key is configured, else offline."""
    if asked != "auto":
        return asked
    of_environment = wandb.setup().settings.mode
    if of_environment in ("offline", "disabled"):
        return of_environment
    try:
        return "online" if wandb.login(prompt=False) else "offline"
    except wandb.errors.Error as error:
        print(f"W&B: {str(error).splitlines()[0]}; logging offline, send later with `wandb sync`", flush=True)
        return "offline"
