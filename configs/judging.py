"""Fields of the sections `embed`, `classifier` and `evaluate`: from embeddings to figures."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.fields import Count, CountOrAuto, NonNegative, Part, Positive, Section, Seed, Share


class Embed(Section):
    """Embeddings of every sample."""

    dtype: Literal["float32", "float16"] = "float32"
    """How they are kept; `float16` halves the files, and is exact to 3 decimals."""
    symmetries: bool = False
    """Test-time augmentation, in `predict` too: the mean over the square's 8 symmetries, in 8 times the
    time."""


class Search(Section):
    """Values of the MLP that cross-validation chooses among; where none are given, the one of `classifier`
    holds."""

    hidden: tuple[tuple[Count, ...], ...] = ()
    """Widths of the hidden layers, such as [[256, 64], [512]]."""
    dropout: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = ()
    """Dropout."""
    lr: tuple[Positive, ...] = ()
    """Learning rate."""
    weight_decay: tuple[NonNegative, ...] = ()
    """AdamW's weight decay."""


class Classifier(Section):
    """An MLP on frozen embeddings, and baselines beside it."""

    model: Literal["mlp", "logistic_regression", "knn", "nearest_mean", "best"] = "mlp"
    """Which one gives the verdict: the others are fitted and judged beside it. `best` is the one of the
    highest ROC-AUC in cross-validation."""
    hidden: tuple[Count, ...] = (256, 64)
    """Widths of the hidden layers, each followed by LeakyReLU and dropout."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Dropout."""
    lr: Positive = 1e-3
    """Learning rate of AdamW."""
    weight_decay: NonNegative = 1e-2
    """AdamW's weight decay."""
    batch: Count = 256
    """Embeddings a step."""
    epochs: Count = 80
    """Epochs at most."""
    patience: CountOrAuto = 15
    """Epochs without a lower validation loss before stopping; 0 never stops early."""
    imbalance: Literal["weights", "sampling", "undersampling", "none"] = "weights"
    """What the MLP and logistic regression do about rare classes: `weights` of inverse frequency in the
    loss, `sampling` of as many from each class in every epoch, or `undersampling`, all classes cut to the
    size of the rarest. The probabilities are brought back to the prevalence of the data."""
    metadata: tuple[str, ...] = ()
    """Extra inputs of the MLP and of logistic regression: age, sex, site, or columns of the source tables.
    What is missing is marked, and filled with train's median or `unknown`."""
    folds: CountOrAuto = 5
    """Folds of train + val, by patient, for cross-validation, which chooses hyper-parameters: 4 or more, or
    0 for none. There are fewer where too few patients have a melanoma, and none where fewer than 4 have."""
    search: Search = Search()
    seeds: Count = 3
    """Networks trained, each from a seed of its own; their spread is reported. The first is that of
    `seed`."""
    ensemble: Literal["none", "seeds", "folds"] = "none"
    """`seeds`: the mean of these networks gives the verdict, not the first. `folds`: the mean of one network
    for each fold of train, stopped early by that fold."""
    threshold: Literal["youden", "sensitivity", "specificity", "cost", "half"] = "youden"
    """Operating point, chosen on validation: best sensitivity + specificity, a set sensitivity or
    specificity, the lowest cost, or `half`, a probability of 0.5 at the data's own prevalence."""
    sensitivity: Share = 0.9
    """Sensitivity asked for where `threshold` is `sensitivity`."""
    specificity: Share = 0.9
    """Specificity asked for where `threshold` is `specificity`."""
    cost: Positive = 20.0
    """False alarms that one missed positive weighs, where `threshold` is `cost`."""
    seed: Seed = 0
    """Seed of weights, order, dropout and folds."""

    @model_validator(mode="after")
    def _check_folds(self) -> Self:
        if 0 < self.folds < 4:
            raise ValueError(
                f"folds={self.folds} leaves too little to learn from when two are left out; set 4 "
                "or more, or 0"
            )
        return self


class Evaluate(Section):
    """Figures and report."""

    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Bootstrap draws of whole patients behind every interval."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Coverage of the intervals."""
    seed: Seed = 0
    """Seed of the bootstrap, and of the samples that retrieval asks about."""
    prevalence: Part | None = None
    """Share of images that are of the positive class where the model is to be used, at which PPV, NPV, the
    number flagged and net benefit are told, the latter of probabilities brought to it; that of the split if
    not given."""
    patient_prevalence: Part | None = None
    """The same of patients."""
    subgroups: tuple[str, ...] = ("sex", "age", "site", "image_size", "source")
    """What figures are told by: age (in bands), sex, site, image_size (before packing), source, or columns
    of the shard set."""
