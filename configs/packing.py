"""Fields of the sections `synthetic` and `pack`: from a table and images to a shard set."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.fields import Count, CountOrAuto, Part, Place, Section, Seed, Share, canonical

_NAME = re.compile(r"[A-Za-z0-9-]{1,30}")


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
    classes: dict[str, tuple[str | int, ...]] = Field({"benign": (0,), "melanoma": (1,)})
    """Class name -> the label column's values that mean it; `"*"` means all others. The order of
    `pack.classes` is the class index; a source may name some of them, in any order."""
    duplicates: Path | None = None
    """CSV with a header and two columns of image ids, listed as duplicates of each other (ISIC 2020 has one).
    An id that several sources have means this source's; SOURCE_ID names another's."""

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

    sources: dict[str, Source] = Field({})
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
    split_files: dict[str, Path] = Field({})
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
