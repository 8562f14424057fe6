"""Fields of the sections `model`, `loss` and `train`: the encoder and how it learns."""

from typing import Literal

from pydantic import model_validator

from configs.fields import Count, CountOrAuto, NonNegative, Positive, Section, Seed


class Model(Section):
    """The encoder."""

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"] = "resnet50"
    """torchvision classification backbone."""
    weights: str = "none"
    """`none` (random), `imagenet` (downloaded by torchvision), or a local state dict (.pth, .safetensors)."""
    embedding_dim: Count = 512
    """Length of the L2-normalised embedding."""


class Loss(Section):
    """What the encoder minimises: `triplet × triplet loss + classification × cross-entropy`."""

    triplet: NonNegative = 1.0
    """Weight of the triplet loss."""
    mining: Literal["random", "semi_hard", "batch_hard"] = "semi_hard"
    """Negatives (and positives) of each anchor, sought in the global batch over all ranks."""
    margin: Positive = 0.2
    """Margin of the triplet loss, in Euclidean distance of unit vectors (0..2)."""
    classification: NonNegative = 1.0
    """Weight of the class-balanced cross-entropy of a linear head, dropped after training."""

    @model_validator(mode="after")
    def _something_to_minimise(self) -> "Loss":
        if not self.triplet and not self.classification:
            raise ValueError("one of triplet and classification must be above 0")
        return self


class Train(Section):
    """How the encoder is trained."""

    epochs: Count = 30
    """Epochs at most."""
    patience: CountOrAuto = 10
    """Epochs without a better validation AUC before stopping; 0 never stops early."""
    lr: Positive = 3e-4
    """Peak learning rate of AdamW, for the global batch as it is."""
    weight_decay: NonNegative = 0.05
    """AdamW's weight decay; none on biases and norms."""
    warmup: NonNegative = 1.0
    """Epochs of linear warm-up, then a cosine to zero."""
    grad_clip: NonNegative = 1.0
    """Largest gradient norm; 0 does not clip."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast: `auto` is bfloat16 where the GPU has it, float32 elsewhere."""
    compile: bool = False
    """Compile the encoder with torch.compile."""
    sync_batchnorm: bool = True
    """Batch statistics over all ranks; on GPUs only."""
    processes: CountOrAuto = 0
    """Processes `moleprint train` and `embed` start; 0 is one a GPU, or one without any."""
    checkpoint_every: CountOrAuto = 0
    """Steps between checkpoints besides the one after each epoch; 0 is none."""
    keep: Count = 2
    """Newest checkpoints kept."""
    seed: Seed = 0
    """Seed of weights, order, augmentation and mining."""
