"""Every field of an experiment: its type, default, unit and meaning. `moleprint VERB --help` prints these.

All sections live in this one room, at the bottom of the import order, so that a configuration is checked
and explained without loading torch or DALI.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrAuto = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Range = tuple[Positive, Positive]
RGB = tuple[float, float, float]
Dtype = Literal["float32", "float16", "bfloat16"]
Place = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
_WHOLE = re.compile(r"([-+]?\d+)\.0*")
_NAME = re.compile(r"[A-Za-z0-9-]{1,30}")


def canonical(value: object) -> str:
    """A label as it is compared: ` mel ` is `mel`; 1, `1` and `1.0` are one value."""
    text = str(value).strip()
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


class Section(BaseModel):
    """What all sections share: frozen, typed, no unknown key, docstrings as help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Synthetic(Section):
    """Drawn lesions: a stand-in data set that needs no download."""

    output: Path = Path("data/demo/images")
    """Folder to write: `metadata.csv`, `images/ID.jpg`, `NOTICE.txt`. Must not exist yet, or be empty."""
    table: Path | None = None
    """Draw one image for every row of this table, columns and classes as in `pack`."""
    images: Count = 3000
    """Images to draw. Ignored with `table`."""
    patients: Count = 300
    """Patients to share them among, each with one to many. Ignored with `table`."""
    prevalence: Share = 0.2
    """Share of images that show a melanoma. Ignored with `table`."""
    overlap: Share = 0.4
    """How far melanomas and nevi overlap: 0 is trivial, 1 cannot be learned; at 0.4 one who knows asymmetry,
    border, colours and diameter exactly reaches an AUC of 0.94."""
    size: Annotated[int, Field(ge=32, le=1024)] = 256
    """Width and height, pixels."""
    quality: Annotated[int, Field(ge=1, le=100)] = 92
    """JPEG quality."""
    seed: Seed = 0
    """The same seed and settings draw the same bytes, whatever the number of workers."""
    workers: CountOrAuto = 0
    """Processes; 0 is one a core."""


class Ratios(Section):
    """Shares of the splits; they must sum to 1."""

    train: Part = 0.7
    """Share of images the encoder and the classifier learn from."""
    val: Part = 0.1
    """Share that early stopping, temperature and threshold are chosen on."""
    test: Part = 0.2
    """Share that nothing but the report sees."""

    @model_validator(mode="after")
    def _sum_to_one(self) -> "Ratios":
        total = self.train + self.val + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + val + test must be 1, found {total:g}")
        return self


class Encode(Section):
    """What an image in a shard is: an upright sRGB JPEG. One that fits as it is passes through untouched."""

    resize: Literal["none", "short_side", "long_side", "crop", "pad", "stretch"] = "short_side"
    """`short_side`, `long_side`: larger images are shrunk until that side is `size`; `crop`, `pad`,
    `stretch`: every image becomes a square of `size`, by its central square, by black bars, or by
    distortion; `none` keeps every size."""
    size: Annotated[int, Field(ge=1, le=65500)] = 256
    """Side that `resize` brings images to, with antialiasing, pixels."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """JPEG quality where an image must be encoded again."""
    subsampling: Literal["444", "422", "420"] = "444"
    """Chroma where an image must be encoded again; `444` is full resolution: colour is a diagnostic sign."""
    check: Literal["decode", "header"] = "decode"
    """`decode`: every image is decoded in full, so that all that is packed is known to decode; `header`:
    JPEGs that fit are taken at their word, where the source is trusted and speed counts."""


class Source(Section):
    """A table and its images."""

    table: Path | None = Path("data/demo/images/metadata.csv")
    """CSV, TSV or Parquet table, one row an image; null where the images are WebDataset shards whose own
    `.json` and `.cls` members are the table, the label in column `cls`, the id in column `key`."""
    more_tables: tuple[Path, ...] = ()
    """Further tables with the same ids, whose columns are added (ISIC 2019 has labels and metadata apart)."""
    images: Place = "data/demo/images/images"
    """Folder (searched with its subfolders; a file's stem is its id), .tar, .zip, .hdf5 of encoded images by
    id, or WebDataset shards: paths or URLs with `{000000..000009}` ranges, several joined by `::`."""
    id_column: str = "isic_id"
    """Column with the image id, with or without a file's ending."""
    group_column: str = "patient_id"
    """Column whose values never cross splits: the patient, or the lesion where no patient is known."""
    blank_groups: Literal["refuse", "own"] = "refuse"
    """Rows without a group: an error, or each a group of its own."""
    lesion_column: str = "lesion_id"
    """Column whose values never cross splits either, where the table has it; blanks mean nothing."""
    label_column: str = "target"
    """Column with the label."""
    one_hot: bool = False
    """The values in `classes` are not of `label_column` but names of columns; the one that holds 1 counts."""
    classes: dict[str, tuple[str | int, ...]] = {"benign": (0,), "melanoma": (1,)}
    """Class name -> the label column's values that mean it; `"*"` means all others. The order of
    `pack.classes` is the class index; a source may name some of them, in any order."""
    duplicates: Path | None = None
    """CSV with two columns of image ids, listed as duplicates of each other (ISIC 2020 has one)."""

    @model_validator(mode="after")
    def _classes_make_sense(self) -> "Source":
        values = [canonical(v) for given in self.classes.values() for v in given]
        twice = sorted({v for v in values if values.count(v) > 1})
        if twice:
            raise ValueError(f"classes: the label values {twice} belong to more than one class")
        if self.one_hot and "*" in values:
            raise ValueError("classes: with one_hot every column is named, so `*` means nothing")
        return self


class Pack(Source):
    """Table and images -> shard set."""

    sources: dict[str, Source] = {}
    """Several sets packed into one: name -> table, images and columns, as above; what one leaves out is as
    given above. Ids and groups get their source's name in front, so groups of two sources never meet."""
    output: Place = "data/demo/shards"
    """Folder of the shard set, which must not exist yet or be empty; or a URL that fsspec can write, such as
    s3://bucket/isic2020."""
    work: Path | None = None
    """Where the output is a URL: folder that unfinished work is kept under, the system's temporary files if
    not given. All packers that share one set must see it. A local output has its work beside it."""
    positive: str = ""
    """The class that figures are about; empty is the last of `classes`."""
    duplicates_action: Literal["tie", "drop"] = "tie"
    """Listed duplicates: `tie` keeps both, and their groups in one split; `drop` keeps the first by id."""
    near_duplicates: Annotated[int, Field(ge=0, le=64)] | None = 32
    """Images whose perceptual hashes differ in at most this many of 256 bits are near duplicates: their
    groups stay in one split. 32 ties re-encoded, resized and recoloured copies, and one pair in 50 million
    of HAM10000's that are none; take 24 for hundreds of thousands of images. null looks for exact
    duplicates only, which always tie."""
    undersample: bool = False
    """Draw, by seed, as many images of every class as the rarest one has, before the split."""
    ratios: Ratios = Ratios()
    """Shares of the splits."""
    folds: CountOrAuto = 0
    """Folds for cross-validation, 3 or more: groups are dealt to equal folds instead of by `ratios`, and
    `loader.fold` chooses which is the test set; 0 is one train/val/test split."""
    split_column: str = ""
    """Column that says an image's split (train, val, test, or a fold's number). Rows where it is blank are
    dealt to the splits that it never names."""
    split_files: dict[str, Path] = {}
    """Split -> text file of image ids, one a line, that belong to it with their groups. All others are dealt
    to the splits without a file."""
    seed: Seed = 0
    """Seed of undersampling, split and the order inside the shards."""
    encode: Encode = Encode()
    """What an image in a shard is."""
    max_rejected: Share = 0.01
    """Share of the images that may be unusable, each listed in `rejected.csv`; more is an error."""
    samples_per_shard: Count = 1000
    """Images in a shard, at most."""
    megabytes_per_shard: CountOrAuto = 0
    """Megabytes (10⁶ bytes) of images in a shard, at most; 0 is no limit."""
    whole_groups: bool = False
    """Keep the images of a group side by side and in one shard, be it beyond the limits; the order is then
    shuffled by groups."""
    workers: CountOrAuto = 0
    """Processes; 0 is one a core."""

    @model_validator(mode="after")
    def _makes_sense(self) -> "Pack":
        if len(self.classes) < 2:
            raise ValueError(f"classes: at least two are needed, found {list(self.classes)}")
        if self.positive and self.positive not in self.classes:
            raise ValueError(f"positive: '{self.positive}' is none of the classes {list(self.classes)}")
        if self.folds and self.folds < 3:
            raise ValueError(f"folds: 3 or more are needed, for train, val and test; found {self.folds}")
        if self.split_column and self.split_files:
            raise ValueError("split_files: give these or split_column, not both")
        unknown = [name for name in self.split_files if name not in self.split_names]
        if unknown:
            raise ValueError(f"split_files: no split {unknown}; there are {list(self.split_names)}")
        for name, source in self.sources.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"sources: a name is letters, digits and hyphens, found '{name}'")
            foreign = [c for c in source.classes if c not in self.classes]
            if "classes" in source.model_fields_set and foreign:
                raise ValueError(f"sources.{name}.classes: {foreign} are not among pack.classes")
        return self

    @property
    def split_names(self) -> tuple[str, ...]:
        """Names of the parts that groups are dealt to: they begin the shards' names."""
        return tuple(f"fold{n}" for n in range(self.folds)) if self.folds else ("train", "val", "test")

    @property
    def each_source(self) -> dict[str, Source]:
        """Name -> source, whole; a single unnamed one if no `sources` are given."""
        shared = {name: getattr(self, name) for name in Source.model_fields}
        return {
            name: Source.model_construct(
                **shared | {field: getattr(given, field) for field in given.model_fields_set}
            )
            for name, given in (self.sources or {"": self}).items()
        }


_COLOURS = ("brightness", "contrast", "saturation", "hue")
_NO_AUGMENTATION: dict[str, Any] = {
    "symmetries": False,
    "scale": (1, 1),
    **dict.fromkeys(("rotation", "shift", *_COLOURS, "blur", "cutout", "jpeg"), 0),
}
AUGMENT_PRESETS: dict[str, dict[str, Any]] = {
    "dermoscopy": {},  # the defaults of the fields
    "reference": _NO_AUGMENTATION
    | {"symmetries": True, "rotation": 30}
    | dict(zip(_COLOURS, (0.2, 0.2, 0.2, 18), strict=True)),
    "none": _NO_AUGMENTATION,
}


class Augment(Section):
    """Strength of each augmentation; zero is off."""

    preset: Literal["dermoscopy", "reference", "none"] = "dermoscopy"
    """Where the values not given come from: `dermoscopy`, the defaults shown here; `reference`, the published
    recipe (no scale, no shift, hue 18); `none`, all off. A run's own config.yaml gives every value, so there
    another preset changes nothing."""
    symmetries: bool = True
    """Flips and quarter turns: the 8 symmetries of the square, each as likely."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 30
    """Rotation drawn from ± this many degrees."""
    scale: Range = (0.85, 1.15)
    """Magnification, drawn log-uniformly between these; 1 shows the short side in full."""
    shift: Share = 0.05
    """Shift drawn from ± this share of the side, along each axis."""
    brightness: Share = 0.2
    """Factor drawn from 1 ± this."""
    contrast: Share = 0.2
    """Factor about mid-grey drawn from 1 ± this."""
    saturation: Share = 0.2
    """Factor drawn from 1 ± this."""
    hue: Annotated[float, Field(ge=0, le=180)] = 10
    """Rotation about the grey axis drawn from ± this many degrees."""
    blur: Annotated[float, Field(ge=0, le=5)] = 0
    """Gaussian blur: the largest sigma, in pixels of what the encoder sees."""
    cutout: Share = 0
    """A square filled with `loader.mean`: its largest side, as a share of the image's."""
    jpeg: Annotated[float, Field(ge=0, le=99)] = 0
    """JPEG artefacts, as if saved once more: quality drawn from 100 down to 100 − this."""
    occasional: Share = 0.2
    """Probability that an image gets `blur`; and so, each by itself, `cutout` and `jpeg`."""

    @model_validator(mode="before")
    @classmethod
    def _values_of_the_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("preset")
        filled = (AUGMENT_PRESETS.get(name, {}) if isinstance(name, str) else {}) | given
        # Past this point pydantic no longer knows that a list comes from JSON, which has no tuples.
        return {key: tuple(value) if isinstance(value, list) else value for key, value in filled.items()}


class Loader(Section):
    """Shard set -> batches on the device."""

    sampler: Literal["shuffle", "balanced", "patient"] = "balanced"
    """`shuffle`: a true permutation of the epoch; `balanced`: as many of each class in every rank's slice;
    `patient`: balanced, and negatives from the positives' own patients where they have any."""
    global_batch: Count = 64
    """Images a step over all ranks together; a multiple of the ranks (balanced: ranks × classes a batch)."""
    classes_per_batch: CountOrAuto = 0
    """`balanced` only: classes in a batch, 2 or more, in turns that show all of them equally often; 0 is all.
    With many classes, fewer of them a batch leave more images of each to compare."""
    window: CountOrAuto = 0
    """Shards whose images are shuffled together, the shards themselves shuffled first; 0 is the whole split.
    Only for sets larger than the page cache (of which `window` shards should take less than half): reading
    then stays local. `patient` also wants `pack.whole_groups`, since a patient's images lie anywhere else."""
    steps_per_epoch: CountOrAuto = 0
    """Steps an epoch; 0 is as many as show each training image once (balanced: as many as the set has)."""
    fold: CountOrAuto = 0
    """Of a set packed in folds: the one that is the test set; the next is validation, the rest training."""
    size: Annotated[int, Field(ge=16, le=1024)] = 224
    """Width and height the encoder sees, pixels: the central square of an image, scaled."""
    mean: RGB = (0.5, 0.5, 0.5)
    """Mean of each channel, of pixels scaled to 0..1."""
    std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5)
    """Standard deviation of each channel, of pixels scaled to 0..1."""
    dtype: Dtype = "float32"
    """Type of the images; half types halve the memory traffic."""
    channels_last: bool = False
    """Memory order of the images: channels side by side, which convolutions like, instead of planes."""
    augment: Augment = Augment()
    """Augmentation of the training split; other splits see none."""
    threads: CountOrAuto = 0
    """DALI threads a rank; 0 shares the cores among the ranks of this host."""
    prefetch: Count = 2
    """Batches held ready ahead of the trainer; two more are in the making."""
    max_bad: Share = 0.01
    """Share of the set's images that training may replace for being damaged; elsewhere none may."""
    read: Literal["auto", "mmap", "pread"] = "auto"
    """How shards are read: mapped into memory, or by calls, several at a time; `auto` does the latter on
    network mounts, where a failing map would kill the process."""
    stage: Path | None = None
    """Folder on this node's own disk that the shard set is copied to once, sums checked; needed for a set
    at a URL, of use for one on a slow mount."""
    cache: Literal["none", "host", "device", "auto"] = "none"
    """Where decoded images are kept, so that later epochs need not decode: `host` is one copy in a node's
    memory, shared by its ranks, decoded by the CPU; `auto` is `host` if training and validation images fit,
    else `none`."""
    cache_gigabytes: Positive = 8.0
    """Memory that the cache may take on each node, gigabytes of 1e9 bytes."""

    @model_validator(mode="after")
    def _classes_to_compare(self) -> "Loader":
        if self.classes_per_batch and self.sampler != "balanced":
            raise ValueError(
                f"classes_per_batch={self.classes_per_batch} is for sampler balanced, not {self.sampler}; "
                "set it to 0"
            )
        if self.classes_per_batch == 1:
            raise ValueError(
                "classes_per_batch=1 leaves a batch no other class to compare; set it to 0, or 2 or more"
            )
        return self


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
    tags: tuple[str, ...] = ()
    """Run tags."""
    log_every: Count = 10
    """Steps between logged lines."""
    images: CountOrAuto = 16
    """Augmented training images logged once at the start."""


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
    classifier: Classifier = Classifier()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()
    run: Run = Run()
