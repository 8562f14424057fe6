"""Entry: train the encoder.

torchrun --nproc-per-node=N -m train.encoder CONFIG key=value …

The result does not depend on interruptions: order, augmentation, mining and learning rate are functions of
the step, and a checkpoint holds the rest (weights, optimiser, class centroids of the epoch, early stopping).
"""

import json
import math
import sys
import time
from contextlib import closing
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configs.errors import UserError
from configs.schema import Experiment
from configs.training import Train as Settings
from pipeline.cache import open_cache
from pipeline.counter import Purpose, generator
from pipeline.loader import Batch, Loader, training_sampler
from shards.files import read_json, sha256
from shards.shardset import ShardSet
from train import checkpoint, model, runfolder
from train.centroids import Centroids
from train.checkpoint import Progress
from train.console import Console
from train.distributed import (
    World,
    barrier,
    broadcast,
    broadcast_buffers,
    check_equal,
    first_on_node,
    total,
)
from train.embed import embed, evaluation_loader
from train.entry import start
from train.learner import Learner, Outcome, spread
from train.meter import Meter, gpu_memory
from train.profiler import Profiler
from train.tracking import Tracker

DIVERGED = "lower train.lr, or set train.precision=float32; a new run.folder starts from the beginning"


def run(experiment: Experiment, world: World) -> None:
    """Train from the newest checkpoint, or from the start, to the end; write the best encoder."""
    with runfolder.locked(experiment.run.folder, main=world.main):
        trainer = Trainer(experiment, world)
        with closing(trainer), trainer.tracker:
            while not trainer.finished:
                trainer.train_epoch()
                trainer.validate()
                trainer.save()
            trainer.export()


def finished(experiment: Experiment) -> bool:
    """Whether the run folder holds the encoder of this configuration and shard set."""
    try:
        needs = ("made_from", "encoder_sha256")
        about = read_json(experiment.run.folder / "encoder.json", "moleprint train CONFIG", needs)
        shards = ShardSet.of(experiment)
        weights = sha256(experiment.run.folder / "encoder.safetensors")
    except (UserError, OSError):
        return False
    made_from = json.loads(checkpoint.fingerprint(experiment, shards.sha256))
    same = checkpoint.completed(about["made_from"]) == made_from
    return bool(same and about["encoder_sha256"] == weights)


def learning_rate(settings: Settings, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up, then half a cosine to zero (Loshchilov 2017), as a function of the steps done."""
    warm = settings.warmup * steps_per_epoch
    if step < warm:
        return settings.lr * (step + 1) / math.ceil(warm)
    share = (step - warm) / max(1, settings.epochs * steps_per_epoch - warm)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class Trainer:
    """All that one training run holds on one rank."""

    def __init__(self, experiment: Experiment, world: World) -> None:
        self.experiment, self.settings, self.world = experiment, experiment.train, world
        self.folder = experiment.run.folder
        self.shards = ShardSet.of(experiment)
        self.fingerprint = checkpoint.fingerprint(experiment, self.shards.sha256)
        sampler = training_sampler(
            self.shards, experiment.loader, seed=self.settings.seed, world_size=world.size
        )
        self.steps = sampler.steps
        saved = checkpoint.load(self.folder / "checkpoints", self.fingerprint, say=world.main)
        self.progress, state = saved or (Progress(), None)
        check_equal((self.progress.step, self.steps, self.fingerprint), "checkpoint or configuration")
        self.best: dict[str, torch.Tensor] = state["best"] if state else {}
        self._build(state)
        if world.main:
            runfolder.describe(experiment)
        loaded = np.concatenate([self.shards.split("train"), self.shards.split("val")])
        self.cache = open_cache(
            self.shards, loaded, experiment.loader, lambda word: str(first_on_node(word, world))
        )
        self.loader = Loader(
            self.shards,
            sampler,
            experiment.loader,
            augmentation=experiment.loader.augment,
            seed=self.settings.seed,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            threads=world.threads(experiment.loader.threads),
            start=self.progress.step,
            cache=self.cache,
        )
        self.validation = evaluation_loader(
            self.shards, self.shards.split("val"), experiment, world, self.cache
        )
        self.tracker = Tracker(
            experiment, "encoder", rank=world.rank, after=self.progress.step, run_id=self.progress.run_id
        )
        self.tracker.dataset(self.shards, experiment.pack.output)
        self.progress.run_id = self.tracker.run_id
        self.meter = Meter()
        self.profiler = Profiler(experiment.tracking.profile, self.folder, world.rank)
        self.console = Console(
            steps=self.steps, epochs=self.settings.epochs, start=self.progress.step, active=world.main
        )

    def _build(self, state: dict[str, Any] | None) -> None:
        """Encoder, objective, optimiser, and their state if the run goes on."""
        settings, device = self.settings, self.world.device
        if not self.world.main:
            barrier()  # rank 0 downloads weights first, the others find them cached
        self.encoder = model.build(self.experiment.model, seed=settings.seed)
        if self.world.main:
            barrier()
        learner = Learner(
            self.encoder,
            self.experiment.loss,
            embedding_dim=self.experiment.model.embedding_dim,
            class_weights=self._class_weights(),
            seed=settings.seed,
        )
        if device.type == "cuda" and self.world.size > 1 and settings.sync_batchnorm:
            nn.SyncBatchNorm.convert_sync_batchnorm(learner)  # type: ignore[no-untyped-call]
        model.place(learner, device)
        self.centroids = Centroids(len(self.shards.classes), self.experiment.model.embedding_dim, device)
        self.optimizer = torch.optim.AdamW(_decay_groups(learner, settings.weight_decay), lr=settings.lr)
        if state:
            learner.load_state_dict(state["learner"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.centroids.load(state["centroids"])
        self.precision = model.autocast_dtype(settings.precision, device)
        if settings.compile:
            self.encoder.compile()
        self.bare = learner
        self.learner: nn.Module = learner
        if self.world.size > 1:
            ids = [self.world.local_rank] if device.type == "cuda" else None
            self.learner = DistributedDataParallel(learner, device_ids=ids, gradient_as_bucket_view=True)

    @property
    def finished(self) -> bool:
        """All epochs done, or no better validation figure for as long as the configuration waits."""
        patience = self.settings.patience
        if self.progress.step % self.steps:
            return False
        tired = bool(patience) and self.progress.stale >= patience
        return tired or self.progress.step >= self.settings.epochs * self.steps

    def train_epoch(self) -> None:
        """From the current step to the end of its epoch."""
        self.learner.train()
        if self.progress.step % self.steps == 0:
            self.centroids.clear()
        for batch in self.meter.waiting(iter(self.loader)):
            if self.progress.step == 0:
                self._log_images(batch)
            outcome, norm = self.train_step(batch)
            self.centroids.add(outcome.embeddings, outcome.labels)
            self.progress.step += 1
            self.profiler.step(self.progress.step)
            self.meter.add(self.experiment.loader.global_batch, {**outcome.figures, "grad_norm": norm})
            ended = self.progress.step % self.steps == 0
            saving = self._due(self.settings.checkpoint_every) and not ended
            if saving or ended or self._due(self.experiment.tracking.log_every):
                self._log()  # refuses a loss that is not finite
            if saving:
                self.save()

    def train_step(self, batch: Batch) -> tuple[Outcome, torch.Tensor]:
        """One optimiser step; returns what happened and the gradient's norm."""
        epoch, step = divmod(self.progress.step, self.steps)
        rate = learning_rate(self.settings, self.progress.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        draws = generator(self.settings.seed, Purpose.MINING, epoch, step)
        uniform = draws.random((self.experiment.loader.global_batch, 2), dtype=np.float32)
        outcome: Outcome = self.learner(
            batch.images.contiguous(memory_format=torch.channels_last),
            batch.labels,
            torch.from_numpy(uniform).to(self.world.device, non_blocking=True),
            self.precision,
        )
        self.optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()  # type: ignore[no-untyped-call]
        limit = self.settings.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.learner.parameters(), limit)
        self.optimizer.step()
        return outcome, norm

    def validate(self) -> None:
        """ROC-AUC of the validation split against this epoch's class centroids; keeps the best encoder."""
        started = time.perf_counter()
        broadcast_buffers(self.encoder)
        index, vectors = embed(self.encoder, self.validation, precision=self.precision)
        if not np.isfinite(vectors).all():
            raise UserError(f"the encoder diverged in the epoch before step {self.progress.step}: {DIVERGED}")
        positive = self.shards.positive
        auc = broadcast(
            float(
                roc_auc_score(self.shards.labels[index] == positive, self.centroids.score(vectors, positive))
            )
        )
        self.progress.history.append(auc)
        self.progress.stale += 1
        if auc > self.progress.best_auc:
            self.progress.best_auc, self.progress.best_step, self.progress.stale = auc, self.progress.step, 0
            self.best = {k: v.detach().cpu().clone() for k, v in self.encoder.state_dict().items()}
        self.tracker.log(
            self.progress.step,
            {
                "epoch": self.progress.step / self.steps,
                "val_roc_auc": auc,
                "val_spread": float(spread(torch.from_numpy(vectors))),
                "val_seconds": time.perf_counter() - started,
            },
        )
        self.tracker.embeddings(self.progress.step, self.shards, index, vectors)
        if self.world.main:
            best = "best" if not self.progress.stale else f"best {self.progress.best_auc:.3f}"
            print(
                f"epoch {self.progress.step // self.steps}: validation AUC {auc:.3f} ({best})",
                file=sys.stderr,
                flush=True,
            )
        self.meter.reset()

    def save(self) -> None:
        """Checkpoint this step. Every rank holds the same state, so rank 0 writes it."""
        if self.world.main:
            state = {
                "learner": self.bare.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "centroids": self.centroids.state(),
                "best": self.best,
            }
            folder = self.folder / "checkpoints"
            checkpoint.save(folder, self.fingerprint, self.progress, state, keep=self.settings.keep)

    def export(self) -> None:
        """Write the best encoder as the run's."""
        if not self.world.main:
            return
        self.encoder.load_state_dict(self.best)
        loader = self.experiment.loader
        about = {
            **self.experiment.model.model_dump(include={"backbone", "embedding_dim"}),
            "preprocessing": {"size": loader.size, "mean": loader.mean, "std": loader.std},
            "encoding": self.shards.manifest["settings"]["encode"],
            "classes": self.shards.classes,
            "positive": self.shards.positive,
            "shards_sha256": self.shards.sha256,
            "validation_roc_auc": self.progress.best_auc,
            "best_epoch": self.progress.best_step // self.steps,
            "epochs": self.progress.step // self.steps,
            "notice": self.shards.notice,
            "made_from": json.loads(self.fingerprint),
        }
        runfolder.save_encoder(self.folder, self.encoder, about)
        self.tracker.figures({"best_val_roc_auc": self.progress.best_auc}, {})
        self.tracker.encoder()

    def close(self) -> None:
        """End the loaders' threads and let go of the cache."""
        self.profiler.close()
        self.loader.close()
        self.validation.close()
        if self.cache is not None:
            self.cache.close()

    def _due(self, every: int) -> bool:
        return bool(every) and self.progress.step % every == 0

    def _class_weights(self) -> torch.Tensor:
        """Weights (classes,) that make every class count the same in the batches that the sampler draws."""
        classes = len(self.shards.classes)
        if self.experiment.loader.sampler != "shuffle":
            return torch.ones(classes)
        labels = self.shards.labels[self.shards.split("train")]
        return torch.from_numpy(len(labels) / classes / np.bincount(labels, minlength=classes)).float()

    def _log(self) -> None:
        """Log the steps since the last line; here alone the host waits for the device."""
        figures = self.meter.read()
        if not math.isfinite(figures["loss"]):
            raise UserError(f"the loss is {figures['loss']} at step {self.progress.step}: {DIVERGED}")
        figures |= {
            "epoch": self.progress.step / self.steps,
            "lr": self.optimizer.param_groups[0]["lr"],
            "replaced_samples": total(len(self.loader.source.substitutes), self.world.device),
            "seconds_left": self.console.seconds_left(self.progress.step),
            **gpu_memory(self.world.device),
        }
        self.tracker.log(self.progress.step, figures)
        self.console.show(self.progress.step, figures)

    def _log_images(self, batch: Batch) -> None:
        settings = self.experiment.loader
        count = self.experiment.tracking.images
        mean, std = (
            torch.tensor(v, device=batch.images.device)[:, None, None] for v in (settings.mean, settings.std)
        )
        names = [self.shards.classes[label] for label in batch.labels[:count].tolist()]
        self.tracker.images("augmented", batch.images[:count] * std + mean, names)


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases, norms and scales do not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


if __name__ == "__main__":
    start(run)
