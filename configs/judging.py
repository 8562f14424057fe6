"""Fields of the sections `classifier` and `evaluate`: from embeddings to figures."""

from typing import Annotated, Literal

from pydantic import Field

from configs.fields import Count, CountOrAuto, NonNegative, Positive, Section, Seed, Share


class Classifier(Section):
    """MLP on frozen embeddings."""

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
    balanced: bool = True
    """Weigh the cross-entropy by inverse class frequency."""
    threshold: Literal["youden", "sensitivity", "half"] = "youden"
    """Operating point, chosen on validation: best sensitivity + specificity, a set sensitivity, or
    `half`, a probability of 0.5 at the data's own prevalence."""
    sensitivity: Share = 0.9
    """Sensitivity asked for where `threshold` is `sensitivity`."""
    seed: Seed = 0
    """Seed of weights, order and dropout."""


class Evaluate(Section):
    """Figures and report."""

    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Bootstrap draws of whole patients behind every interval."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Coverage of the intervals."""
    seed: Seed = 0
    """Seed of the bootstrap."""
