"""Fields of the section `loader`: from a shard set to augmented batches on the device."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs.fields import RGB, Count, CountOrAuto, Dtype, Positive, Range, Section, Share

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
    """Share of the set's images that training may replace for being damaged, over all ranks together, which
    are counted at each logged line; elsewhere none may."""
    read: Literal["auto", "mmap", "pread"] = "auto"
    """How shards are read: mapped into memory, or by calls, several at a time; `auto` does the latter on
    network mounts, where a failing map would kill the process."""
    stage: Path | None = None
    """Folder on this node's own disk that the shard set is copied to once, sums checked; needed for a set
    at a URL, of use for one on a slow mount."""
    cache: Literal["none", "host", "device", "auto"] = "none"
    """Where training and validation images are kept decoded, so that later epochs need not decode: `host`
    is one copy in a node's memory, shared by its ranks, decoded by the CPU; `device` is in the memory of each
    rank's GPU, decoded by it; `auto` is `device` if they fit in half of what a GPU has left, else `host` if
    they fit there, else `none`."""
    cache_gigabytes: Positive = 8.0
    """Memory that the cache may take on each node, or on each GPU, gigabytes of 1e9 bytes."""

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
