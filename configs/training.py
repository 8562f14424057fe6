"""Fields of the sections `model`, `loss` and `train`: the encoder and how it learns."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from configs.fields import Count, CountOrAuto, NonNegative, Part, Positive, Section, Seed

Mining = Literal["random", "all", "semi_hard", "batch_hard", "easy_positive", "patient_hard"]


def _in_one_line(value: Any, margin: ValidatorFunctionWrapHandler) -> Any:
    """A margin; what is none is one mistake, not one for each thing that it could have been."""
    try:
        return margin(value)
    except ValidationError:
        raise ValueError(
            f"a number above 0, at most 2, or soft was expected, found {json.dumps(value, default=str)}"
        ) from None


Distance = Annotated[float, Field(gt=0, le=2)]
Margin = Annotated[Distance | Literal["soft"], WrapValidator(_in_one_line)]


class Model(Section):
    """The encoder: a backbone whose classifier gives way to a projection onto the unit sphere."""

    backbone: str = "resnet50"
    """A classification backbone of torchvision by its name (`resnet50`, `convnext_tiny`, `efficientnet_b0`,
    `vit_b_16`, `swin_t` …), or `timm/NAME` of timm (an extra: pip install 'moleprint[timm]')."""
    weights: str = "none"
    """What the backbone starts from: `none` (random), `imagenet` (the best that its library has, downloaded),
    a name of torchvision's such as `IMAGENET1K_V2`, or a local state dict (.pth, .safetensors)."""
    embedding_dim: Annotated[int, Field(ge=2)] = 512
    """Length of the L2-normalised embedding."""
    projection: Literal["linear", "mlp"] = "linear"
    """From the backbone's features to the embedding: one layer; or two of the features' width, with batch
    normalisation and ReLU between them (Chen 2020, SimCLR)."""
    bnneck: bool = False
    """Batch normalisation between embedding and classification (Luo 2019): `triplet`, `contrastive` and
    `supcon` act before it, `classification` and `arcface` behind it, and so does all that comes after
    training."""
    freeze: CountOrAuto = 0
    """Stages of the backbone, counted from its input, that stay as they are, batch statistics too. A ResNet
    has 5, its stem being the first, a ViT its blocks and a stem; with all of them the projection alone
    learns."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of a stage of the backbone as a share of the next one's, the projection having `train.lr`
    (Clark 2020, ELECTRA; 0.65 to 0.9 are usual for fine-tuning); 1 is the same for all."""


class Loss(Section):
    """What the encoder minimises: a sum of losses, each times its weight, zero leaving it out."""

    triplet: NonNegative = 0.1
    """Weight of the triplet loss."""
    mining: Mining = "all"
    """The triplets of each anchor, sought in the global batch over all ranks: one at `random`; `all`, those
    without a loss not counted; for every positive the nearest negative beyond it (`semi_hard`, FaceNet); the
    farthest positive with the nearest negative (`batch_hard`), or with the nearest one of the anchor's own
    patient, where there is one (`patient_hard`); the nearest positive with the nearest negative
    (`easy_positive`; an image that is twice in a batch is its own). All grow with the square of the global
    batch."""
    schedule: dict[Mining, Part] = Field(default_factory=dict)
    """Minings that take over from `mining` after a share of `train.epochs`, from easy to hard, such as
    {semi_hard: 0.1, batch_hard: 0.5}; none: `mining` all along."""
    margin: Margin = "soft"
    """Margin of the triplet loss's hinge, in `distance` (0..2); `soft`: log(1 + exp(d⁺ − d⁻)) in place of a
    hinge (Hermans 2017). Validation's triplet loss is a hinge in Euclidean distance with this margin, or with
    0.2 where it is soft: another function than training's."""
    distance: Literal["euclidean", "cosine"] = "euclidean"
    """Of unit vectors, for `triplet` and `contrastive`; `cosine` is 1 − cos."""
    contrastive: NonNegative = 0.0
    """Weight of the contrastive loss (Hadsell 2006) over all pairs."""
    contrastive_margin: Distance = 0.5
    """Distance beyond which the contrastive loss leaves negatives alone."""
    supcon: NonNegative = 0.0
    """Weight of the supervised contrastive loss (Khosla 2020)."""
    supcon_temperature: Annotated[float, Field(ge=1e-3)] = 0.1
    """Temperature of the supervised contrastive loss."""
    arcface: NonNegative = 0.0
    """Weight of the class-balanced additive angular margin loss (Deng 2019)."""
    arcface_margin: Annotated[float, Field(ge=0, lt=3.14)] = 0.5
    """Angle between an embedding and its class that ArcFace adds, radians."""
    arcface_scale: Positive = 30.0
    """Length of the vectors whose logits ArcFace takes."""
    classification: NonNegative = 1.0
    """Weight of the class-balanced cross-entropy of a linear head, dropped after training."""

    @model_validator(mode="after")
    def _something_to_minimise(self) -> "Loss":
        weights = ("triplet", "contrastive", "supcon", "arcface", "classification")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"one of {', '.join(weights[:-1])} and {weights[-1]} must be above 0")
        return self

    @model_validator(mode="after")
    def _one_mining_at_a_time(self) -> "Loss":
        if len(set(self.schedule.values())) < len(self.schedule):
            raise ValueError(f"schedule={self.schedule} lets two minings begin together; give each its share")
        if self.schedule and not self.triplet:
            raise ValueError(f"schedule={self.schedule} is for the triplet loss, whose weight is 0")
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
    micro_batch: CountOrAuto = 0
    """Images that a rank's encoder sees at once; 0 is all of its share. Fewer of them need less memory and a
    second forward pass (GradCache, Gao 2021), while losses and mining still see the global batch; batch
    statistics are then those of a micro-batch."""
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
    centroids of the epoch's training embeddings; with `ema` of the probe images', where there are any, as an
    average of the weights embeds otherwise than they do."""
    tolerance: NonNegative = 1.0
    """How far behind the best such figure a newer epoch may be and still be taken, in standard errors of the
    difference, over groups: the highest of many is often so by luck. 0 takes the best figure's, the first of
    equal ones."""
    checkpoint_every: CountOrAuto = 0
    """Steps between checkpoints besides the one after each epoch; 0 is none."""
    keep: Count = 2
    """Newest checkpoints kept, besides that of the epoch taken."""
    timeout: Annotated[float, Field(gt=0, le=100_000_000)] = 1800
    """Seconds in which a rank makes no step, nor a part of the start, nor embeds a batch, until all ranks end
    and name the one that hangs."""
    allow_changed: tuple[str, ...] = ()
    """Fields (`section.key`, or `shards.sha256`) in which a run may differ from its checkpoint."""
    seed: Seed = 0
    """Seed of weights, order, augmentation and mining."""

    @model_validator(mode="after")
    def _monitors_what_there_is(self) -> "Train":
        if self.monitor in ("knn_roc_auc", "probe_roc_auc") and not self.probe_images:
            raise ValueError(f"monitor={self.monitor} needs probe_images above 0")
        return self
