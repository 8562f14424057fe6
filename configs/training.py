"""Fields of the sections `model`, `loss` and `train`: the encoder and how it learns."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

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


Monitor = Literal[
    "roc_auc", "knn_roc_auc", "probe_roc_auc", "map_at_r", "recall_at_1", "recall_at_5", "triplet_loss"
]


class Train(Section):
    """How the encoder is trained, validated and kept."""

    epochs: Count = 30
    """Epochs at most."""
    patience: CountOrAuto = 10
    """Epochs without a better figure of `monitor` before stopping; 0 never stops early."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW (Loshchilov 2019), or SGD with momentum; fused on a GPU."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD alone."""
    nesterov: bool = True
    """Whether SGD's momentum is Nesterov's."""
    lr: Positive = 3e-4
    """Peak learning rate, for the global batch as it is."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Of the learning rate after the warm-up: half a cosine to zero, steps down, or as it is."""
    step_epochs: Count = 10
    """Epochs between two steps down, counted from the start."""
    step_factor: Positive = 0.1
    """What a step down multiplies the learning rate by."""
    weight_decay: NonNegative = 0.05
    """Decoupled from the loss in AdamW, part of the gradient in SGD; none on biases and norms."""
    warmup: NonNegative = 1.0
    """Epochs of linear warm-up."""
    grad_clip: NonNegative = 1.0
    """Largest gradient norm; 0 does not clip."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay a step of an exponential average of the weights, such as 0.999, less in the first steps. It is
    then what is validated and exported. 0 is off."""
    max_bad_steps: Count = 20
    """Steps in a row that may be skipped because the loss or a gradient is not finite."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Autocast: `auto` is bfloat16 where the GPU has it, float16 with a scaled loss on older GPUs,
    float32 on a CPU."""
    tf32: bool = True
    """Whether a GPU may multiply float32 in TensorFloat-32; losses and validation do not."""
    compile: bool = False
    """Compile the encoder with torch.compile."""
    sync_batchnorm: bool = True
    """Batch statistics over all ranks; on GPUs only."""
    processes: CountOrAuto = 0
    """Processes `moleprint train` and `embed` start; 0 is one a GPU, or one without any."""
    validate_every: Count = 1
    """Epochs between validations; there is one after the last epoch too."""
    probe_images: CountOrAuto = 1024
    """Training images, as many of each class, that are embedded at each validation for its kNN and its linear
    probe to learn from; 0 leaves both out."""
    monitor: Monitor = "roc_auc"
    """Validation figure that chooses the best epoch and stops early. `roc_auc` is by the distances to the
    centroids of the epoch's training embeddings."""
    checkpoint_every: CountOrAuto = 0
    """Steps between checkpoints besides the one after each epoch; 0 is none."""
    keep: Count = 2
    """Newest checkpoints kept, besides that of the best epoch."""
    timeout: Positive = 1800
    """Seconds without a step after which all ranks end and name the one that hangs."""
    allow_changed: tuple[str, ...] = ()
    """Fields (`section.key`, or `shards.sha256`) in which a run may differ from its checkpoint."""
    seed: Seed = 0
    """Seed of weights, order, augmentation and mining."""

    @model_validator(mode="after")
    def _monitors_what_there_is(self) -> "Train":
        if self.monitor in ("knn_roc_auc", "probe_roc_auc") and not self.probe_images:
            raise ValueError(f"monitor={self.monitor} needs probe_images above 0")
        return self
