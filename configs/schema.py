"""An experiment: all its sections. `moleprint VERB --help` prints every field, unit, default and meaning.

    fields.py ◄── packing.py · loading.py · training.py · judging.py ◄── schema.py

They lie at the bottom of the import order, so that a configuration is checked and explained without loading
torch or DALI.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.fields import Count, CountOrAuto, Section
from configs.judging import Classifier, Embed, Evaluate
from configs.loading import Loader
from configs.packing import Pack, Synthetic
from configs.training import Loss, Model, Train


class Tracking(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online where a key is configured (`wandb login` or WANDB_API_KEY), else offline."""
    project: str = "moleprint"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; the account's default if not given."""
    name: str | None = None
    """Run name; the run folder's name if not given."""
    group: str | None = None
    """Runs that W&B shows together, such as the folds of one set or the seeds of one recipe."""
    tags: tuple[str, ...] = ()
    """Run tags."""
    log_every: Count = 10
    """Steps between logged lines."""
    images: CountOrAuto = 16
    """Augmented training images logged once at the start."""
    triplets: CountOrAuto = 8
    """Hardest triplets of the validation split shown at each validation; 0 shows none."""
    projection: CountOrAuto = 2000
    """Validation samples at most in the table and plot of embeddings, at each validation; 0 makes none."""
    artifacts: bool = True
    """Whether the shard set (by reference) and the encoder become W&B artifacts, with lineage."""
    profile: Annotated[str, Field(pattern=r"^\d+:\d+$")] | None = None
    """Steps FIRST:LAST that torch's profiler traces on every rank, such as 20:25, to RUN/trace/*.json.gz."""

    @model_validator(mode="after")
    def _profiles_something(self) -> "Tracking":
        if self.profile and int(self.profile.split(":")[0]) >= int(self.profile.split(":")[1]):
            raise ValueError(f"profile: the last step must come after the first, found {self.profile}")
        return self


class Run(Section):
    """Where results go."""

    folder: Path = Path("runs/demo")
    """Run folder: config, checkpoints, weights, embeddings, metrics, report."""


class Experiment(Section):
    """One YAML file: one experiment."""

    synthetic: Synthetic | None = None
    """Present: `moleprint run` draws this data set first."""
    pack: Pack = Pack()
    loader: Loader = Loader()
    model: Model = Model()
    loss: Loss = Loss()
    train: Train = Train()
    embed: Embed = Embed()
    classifier: Classifier = Classifier()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()
    run: Run = Run()
