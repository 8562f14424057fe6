"""Entry: train the encoder.

torchrun --nproc-per-node=N -m train.encoder CONFIG key=value …

The result does not depend on interruptions: order, augmentation, mining, dropout and learning rate are
functions of the step, and a checkpoint holds the rest (weights and their average, optimiser, class centroids
of the epoch, figures not yet logged, early stopping).
"""

import time
from contextlib import closing
from typing import Any, Never

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configs.errors import RESUMABLE, UserError
from configs.schema import Experiment
from pipeline.counter import Purpose, generator
from pipeline.loader import Batch, Loader, training_sampler
from shards.shardset import ShardSet
from train import checkpoint, model, result, runfolder, validation
from train.centroids import Centroids
from train.collapse import collapse, embedding_figures, spread
from train.console import Console
from train.data import Data
from train.distributed import World, barrier, beat, broadcast_buffers, check_equal, union
from train.ema import Average
from train.embed import embed
from train.entry import start
from train.guard import REMEDY, Guard
from train.learner import Learner, Outcome
from train.meter import Meter, gpu_memory
from train.mining import mining_at
from train.optimisation import Optimisation
from train.parameters import parameter_groups
from train.precision import allow_tf32
from train.profiler import Profiler
from train.progress import Progress
from train.saver import Saver
from train.schedule import learning_rate
from train.signals import Stop, StoppedError
from train.tracking import Tracker
from train.validation import Embedded


def run(experiment: Experiment, world: World) -> None:
    """Train from the newest checkpoint, or from the start, to the end; write the best encoder."""
    with runfolder.locked(experiment.run.folder, main=world.main), Stop(world) as stop:
        trainer = Trainer(experiment, world)
        with closing(trainer), trainer.tracker:
            trainer.train(stop)


class Trainer:
    """All that one training run holds on one rank."""

    def __init__(self, experiment: Experiment, world: World) -> None:
        self.experiment, self.settings, self.world = experiment, experiment.train, world
        self.folder = experiment.run.folder
        self.shards = ShardSet.of(experiment)
        beat("opening the shard set")
        sampler = training_sampler(
            self.shards, experiment.loader, seed=self.settings.seed, world_size=world.size
        )
        self.steps = sampler.steps
        self.fingerprint = checkpoint.fingerprint(experiment, self.shards.sha256)
        folder, allowed = self.folder / "checkpoints", self.settings.allow_changed
        barrier()  # rank 0 has locked the folder: whoever had it before writes no checkpoint any more
        saved = checkpoint.load(folder, self.fingerprint, allowed=allowed, say=world.main)
        self.progress, state = saved or (Progress(), {})
        check_equal((self.progress.step, self.steps, self.fingerprint), "checkpoint or configuration")
        self._build()
        self._restore(state)
        beat("building the encoder")
        self._distribute()
        if world.main:
            runfolder.describe(experiment)
        self.saver = Saver(folder, self.fingerprint, keep=self.settings.keep)
        self.data = Data(self.shards, sampler, experiment, world, self.progress.step)
        self.tracker = Tracker(
            experiment, "encoder", rank=world.rank, after=self.progress.step, run_id=self.progress.run_id
        )
        self.tracker.dataset(self.shards, experiment.pack.output)
        self.progress.run_id = self.tracker.run_id
        self.profiler = Profiler(experiment.tracking.profile, self.folder, world.rank)
        self.console = Console(
            steps=self.steps, epochs=self.settings.epochs, start=self.progress.step, active=world.main
        )

    def _build(self) -> None:
        """Encoder, objective, optimiser, and what watches over them."""
        settings, device = self.settings, self.world.device
        if not self.world.main:
            barrier()  # rank 0 downloads weights first, the others find them cached
        self.encoder = model.build(
            self.experiment.model, size=self.experiment.loader.size, seed=settings.seed
        )
        if self.world.main:
            barrier()
        learner = Learner(
            self.encoder,
            self.experiment.loss,
            embedding_dim=self.experiment.model.embedding_dim,
            class_weights=self._class_weights(),
            seed=settings.seed,
            micro_batch=settings.micro_batch,
        )
        if device.type == "cuda" and self.world.size > 1 and settings.sync_batchnorm:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.encoder.backbone)  # type: ignore[no-untyped-call]
        model.place(learner, device)
        self.bare = learner
        self.precision = model.autocast_dtype(settings.precision, device)
        groups = parameter_groups(
            learner,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            layer_decay=self.experiment.model.layer_decay,
        )
        self.optimisation = Optimisation(groups, settings, device=device, precision=self.precision)
        self.centroids = Centroids(len(self.shards.classes), self.experiment.model.embedding_dim, device)
        self.meter = Meter()
        self.best: dict[str, torch.Tensor] = {}
        self.good = torch.tensor(True, device=device)

    def _restore(self, state: dict[str, Any]) -> None:
        """What `_state` put into a checkpoint; older ones lack some of it."""
        if state:
            try:
                self.bare.load_state_dict(state["learner"])
                self.optimisation.load(state)
            except (RuntimeError, ValueError) as error:
                reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
                raise UserError(
                    f"{self.folder}: its checkpoints are of another encoder or an older version ({reason}); "
                    "choose another run.folder"
                ) from None
            self.centroids.load(state["centroids"])
            self.best = state["best"]
        if "figures" in state:
            self.meter.load(state["figures"], self.world.device)
        limits = {"limit": self.settings.max_bad_steps, "world_size": self.world.size}
        self.guard = Guard(self.bare, device=self.world.device, **limits)
        if "guard" in state:
            self.guard.load(state["guard"])
        self.skipped = state.get("skipped_told", 0)
        self.average = Average(self.encoder, self.settings.ema) if self.settings.ema else None
        if self.average and state.get("ema"):
            self.average.load(state["ema"])

    def _state(self) -> dict[str, Any]:
        return {
            "learner": self.bare.state_dict(),
            **self.optimisation.state(),
            "ema": self.average.state() if self.average else {},
            "centroids": self.centroids.state(),
            "guard": self.guard.state(),
            "skipped_told": self.skipped,
            "figures": self.meter.state(),
            "best": self.best,
        }

    def _distribute(self) -> None:
        """What makes it fast, and one of many."""
        if self.world.device.type == "cuda":
            allow_tf32(self.settings.tf32)
            torch.backends.cudnn.benchmark = True  # every batch has the same shape
        if self.settings.compile:
            self.encoder.backbone.compile(dynamic=False)
        self.learner: nn.Module = self.bare
        if self.world.size > 1:
            barrier()  # DDP waits for the others, and the watchdog would not know
            ids = [self.world.local_rank] if self.world.device.type == "cuda" else None
            self.learner = DistributedDataParallel(
                self.bare, device_ids=ids, gradient_as_bucket_view=True, static_graph=True
            )

    def train(self, stop: Stop) -> None:
        """Epoch by epoch to the end; saved, and ended by StoppedError, where a signal says so."""
        while not self.finished:
            self.train_epoch(stop)
            if self.validation_due:
                self.validate()
            self.save(torch.ones_like(self.good))  # validated, though its last step may have been bad
            if stop.agreed(now=True):
                self.leave()
        self.export()

    @property
    def finished(self) -> bool:
        """All epochs done, or no better validation figure for as long as the configuration waits."""
        patience = self.settings.patience
        if self.progress.step % self.steps:
            return False
        tired = bool(patience) and self.progress.stale >= patience
        return tired or self.progress.step >= self.settings.epochs * self.steps

    @property
    def validation_due(self) -> bool:
        """Whether the epoch that has just ended is one of those that are validated."""
        epoch = self.progress.step // self.steps
        return epoch % self.settings.validate_every == 0 or epoch == self.settings.epochs

    def train_epoch(self, stop: Stop) -> None:
        """From the current step to the end of its epoch."""
        self.learner.train()
        images = self.experiment.loader.global_batch
        if self.progress.step % self.steps == 0:
            self.centroids.clear()
        for batch in self.meter.waiting(iter(self.data.training)):
            if self.progress.step == 0:
                self.tracker.images("augmented", *self.data.pictures(batch, self.experiment.tracking.images))
            outcome, norm = self.train_step(batch)
            self.centroids.add(outcome.embeddings, outcome.labels, self.good)
            self.meter.add(images, {**outcome.figures, "grad_norm": norm}, self.good)
            self.progress.step += 1
            self.profiler.step(self.progress.step)
            beat(f"step {self.progress.step}")
            ended = self.progress.step % self.steps == 0
            if ended or self._due(self.experiment.tracking.log_every):
                self._log(outcome)
            if stop.agreed() and not ended:
                self.leave()
            if self._due(self.settings.checkpoint_every) and not ended:
                self.save(self.good)

    def train_step(self, batch: Batch) -> tuple[Outcome, torch.Tensor]:
        """One optimiser step, taken if it is `good`; returns what happened and the gradient's norm."""
        beat(f"reading the images of step {self.progress.step + 1}")
        epoch, step = divmod(self.progress.step, self.steps)
        draws = generator(self.settings.seed, Purpose.MINING, epoch, step)
        uniform = draws.random((self.experiment.loader.global_batch, 2), dtype=np.float32)
        self._seed_dropout(epoch, step)
        outcome: Outcome = self.learner(
            batch.images.contiguous(memory_format=torch.channels_last),
            batch.labels,
            batch.groups,
            torch.from_numpy(uniform).to(self.world.device, non_blocking=True),
            self.precision,
            mining_at(self.experiment.loss, self.progress.step / (self.settings.epochs * self.steps)),
        )
        self.optimisation.backward(outcome.loss)
        norm = self.optimisation.clip()
        self.good = self.guard.judge(self.progress.step + 1, outcome.loss, norm, outcome.embeddings)
        rate = learning_rate(self.settings, self.progress.step, self.steps)
        self.optimisation.step(rate, self.good)
        if self.average:
            self.average.update(self.progress.step, self.good)
        return outcome, norm

    def validate(self) -> None:
        """Figures of the validation split, under all ranks; keeps the best encoder."""
        started = time.perf_counter()
        encoder = self.average.encoder if self.average else self.encoder
        broadcast_buffers(encoder)
        held = self._embedded(encoder, self.data.held)
        known = self._embedded(encoder, self.data.known) if self.data.known else None
        positive, centroids = self.shards.positive, self.centroids
        if self.average and known:  # the epoch's embeddings are not those of the averaged weights
            centroids = Centroids.of(known.vectors, known.labels, len(self.shards.classes))
        margin, monitor = self.experiment.loss.margin, self.settings.monitor
        figures = validation.figures(
            held,
            known,
            centroids.score(held.vectors, positive),
            self.shards.groups[held.index],
            positive=positive,
            margin=validation.MARGIN if margin == "soft" else margin,
            monitor=monitor,
            world=self.world,
        )
        if self.progress.note(
            figures.values,
            figures.parts,
            of=f"{monitor} {self.shards.sha256}",
            settings=self.settings,
            steps=self.steps,
        ):
            self.best = {k: v.detach().cpu().clone() for k, v in encoder.state_dict().items()}
        self.tracker.log(
            self.progress.step,
            {
                "epoch": self.progress.step / self.steps,
                **{f"val_{name}": value for name, value in figures.values.items()},
                "val_spread": float(spread(torch.from_numpy(held.vectors))),
                "val_seconds": time.perf_counter() - started,
            },
        )
        self.tracker.embeddings(self.progress.step, self.shards, held.index, held.vectors)
        self.console.say(self.progress.said(monitor, self.steps))
        self.meter.reset()

    def save(self, good: torch.Tensor) -> None:
        """Checkpoint this step, if it is good, while training goes on.

        Every rank holds the same state: rank 0 writes it.
        """
        if self.world.main:
            self.saver.save(self.progress, self._state(), good)

    def leave(self) -> Never:
        """Save this step, and end on all ranks."""
        self.save(torch.ones_like(self.good))
        if self.world.main:
            self.saver.settle(must=True)
        barrier()  # a launcher ends the others when one has ended
        raise StoppedError(
            f"told to stop: step {self.progress.step} is saved, the same command goes on from there "
            f"(exit status {RESUMABLE})"
        )

    def export(self) -> None:
        """Write the best encoder as the run's."""
        if not self.world.main:
            return
        self.saver.settle()
        self.encoder.load_state_dict(self.best)
        about = result.describe(self.experiment, self.shards, self.progress, self.steps)
        runfolder.save_encoder(self.folder, self.encoder, about)
        best = {f"best_val_{name}": value for name, value in self.progress.best_figures.items()}
        self.tracker.figures(best, {})
        self.tracker.encoder()

    def close(self) -> None:
        """Wait for a checkpoint that is being written, end the loaders' threads, let go of the cache."""
        self.profiler.close()
        self.saver.close()
        self.data.close()

    def _due(self, every: int) -> bool:
        return bool(every) and self.progress.step % every == 0

    def _seed_dropout(self, epoch: int, step: int) -> None:
        """Make what this rank drops out a function of the step; torch draws it from its global generators."""
        draws = generator(self.settings.seed, Purpose.DROPOUT, epoch, step)
        torch.manual_seed(int(draws.integers(1 << 63, size=self.world.size)[self.world.rank]))

    def _class_weights(self) -> torch.Tensor:
        """Weights (classes,) that make every class count the same in the batches that the sampler draws."""
        classes = len(self.shards.classes)
        if self.experiment.loader.sampler != "shuffle":
            return torch.ones(classes)
        labels = self.shards.labels[self.shards.split("train")]
        return torch.from_numpy(len(labels) / classes / np.bincount(labels, minlength=classes)).float()

    def _log(self, outcome: Outcome) -> None:
        """Log the steps since the last line; here alone the host waits for the device."""
        self.saver.look()
        figures, skipped = self.meter.read(), self.guard.check()
        if skipped > self.skipped:
            self.skipped = skipped
            self.tracker.alert(self.progress.step, "not finite", f"steps skipped so far: {skipped}; {REMEDY}")
        figures |= {
            "epoch": self.progress.step / self.steps,
            "lr": learning_rate(self.settings, self.progress.step - 1, self.steps),
            "skipped_steps": skipped,
            "replaced_samples": self._replaced(),
            "seconds_left": self.console.seconds_left(self.progress.step),
            **gpu_memory(self.world.device),
        }
        if self.world.main and self.good:  # or the embeddings may be no numbers
            distance = self.experiment.loss.distance
            figures |= embedding_figures(outcome.embeddings, outcome.labels, distance)
            if found := collapse(figures, self.experiment.loss):
                self.tracker.alert(self.progress.step, *found)
        self.tracker.log(self.progress.step, figures)
        self.console.show(self.progress.step, figures)

    def _replaced(self) -> int:
        """Training samples that any rank has replaced; a rank by itself only knows of those that it drew.

        Raises:
            UserError: if they are more than allowed.
        """
        source = self.data.training.source
        replaced = len(union(set(source.substitutes)))
        if replaced > source.allowed:
            raise UserError(
                f"{self.shards.folder}: {replaced} samples are damaged or cannot be decoded, over all ranks "
                f"together; allowed are {source.allowed} (loader.max_bad); look with `moleprint verify`, "
                "then pack the set again"
            )
        return replaced

    def _embedded(self, encoder: model.Encoder, loader: Loader) -> Embedded:
        index, vectors = embed(encoder, loader, precision=self.precision)
        if not np.isfinite(vectors).all():
            raise UserError(f"the encoder diverged in the epoch before step {self.progress.step}: {REMEDY}")
        return Embedded(index, vectors, self.shards.labels[index])


if __name__ == "__main__":
    start(run)
