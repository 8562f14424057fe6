"""The four kinds of classifiers, each fitted alike: on training samples, with validation to stop early by."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from configs.judging import Classifier as Settings
from train import perceptron
from train.baselines import NEIGHBOURS, PENALTIES, Linear, Means, Model, Neighbours, nearest, votes
from train.embeddings import Embeddings
from train.metadata import Inputs, Metadata
from train.perceptron import Epoch, Examples, Floats, Ints, Networks, class_weights


@dataclass(frozen=True)
class Samples:
    """Embeddings with all that a classifier may know of them."""

    vectors: NDArray[np.float32]
    """(n, dim)."""
    labels: Ints
    """(n,) class indices."""
    groups: Sequence[str]
    """(n,) patients."""
    metadata: Metadata
    """Column -> (n,)."""

    @classmethod
    def of(cls, *splits: Embeddings) -> "Samples":
        """Of one split, or of several in a row."""
        columns = [name for name in splits[0].metadata if all(name in split.metadata for split in splits)]
        return cls(
            np.concatenate([split.vectors for split in splits]),
            np.concatenate([split.labels for split in splits]),
            [group for split in splits for group in split.groups],
            {
                name: pa.chunked_array([chunk for split in splits for chunk in split.metadata[name].chunks])
                for name in columns
            },
        )

    def group_codes(self) -> Ints:
        """(n,) the patients as integers from 0."""
        return np.unique(np.array(self.groups), return_inverse=True)[1].astype(np.int64)

    def take(self, rows: Ints) -> "Samples":
        """Some of them, in this order."""
        return Samples(
            self.vectors[rows],
            self.labels[rows],
            [self.groups[row] for row in rows],
            {name: column.take(pa.array(rows)) for name, column in self.metadata.items()},
        )

    def examples(self, inputs: Inputs) -> Examples:
        """What the MLP and logistic regression see."""
        return Examples(np.concatenate([self.vectors, self.extra(inputs)], axis=1), self.labels)

    def extra(self, inputs: Inputs) -> NDArray[np.float32]:
        """(n, width) metadata as numbers."""
        return inputs.encode(self.metadata, len(self.labels))


@dataclass(frozen=True)
class Fitted:
    """A model, and what its logits are relative to."""

    model: Model
    inputs: Inputs
    weights: Floats
    """(classes,) how much more of each class it was shown than the data hold, as by a weighted loss."""
    about: dict[str, Any] = field(default_factory=dict)
    """What else there is to say of how it was fitted."""

    def logits(self, samples: Samples) -> Floats:
        """(n, classes), not yet brought back to the prevalence of the data."""
        return self.model.logits(samples.vectors, samples.extra(self.inputs))


class Family(ABC):
    """Classifiers of one kind that differ in hyper-parameters."""

    name: str
    grid: Sequence[dict[str, Any]]
    """Hyper-parameters of its candidates."""

    def __init__(self, settings: Settings, classes: int) -> None:
        self.settings, self.classes = settings, classes

    @abstractmethod
    def fit(self, train: Samples, val: Samples, grid: Sequence[dict[str, Any]]) -> Iterator[Fitted]:
        """One for each of some hyper-parameters; `val` may stop it early, it learns nothing else from it."""

    def unseen(
        self, samples: Samples, parts: Sequence[Ints], left_out: Sequence[int]
    ) -> Iterator[list[Floats]]:
        """Fit each candidate on the folds that are not left out; of these, the next one stops it early.

        Args:
            parts: rows of each fold.

        Yields:
            For each candidate the logits (n, classes), at the data's prevalence, of each fold left out.
        """
        learned, stop = roles(len(parts), left_out)
        train = samples.take(np.concatenate([parts[number] for number in learned]))
        others = [samples.take(parts[number]) for number in left_out]
        for fitted in self.fit(train, samples.take(parts[stop]), self.grid):
            yield [fitted.logits(other) - np.log(fitted.weights) for other in others]

    def offset(self, labels: Ints) -> Floats:
        """`Fitted.weights` of models that `classifier.imbalance` applies to."""
        if self.settings.imbalance == "none":
            return np.ones(self.classes)
        return class_weights(labels, self.classes)


class Perceptron(Family):
    """The MLP."""

    name = "mlp"

    def __init__(self, settings: Settings, classes: int) -> None:
        super().__init__(settings, classes)
        self.grid = [{}]
        for key, values in settings.search.model_dump().items():
            if values:
                self.grid = [{**point, key: value} for point in self.grid for value in values]

    def fit(self, train: Samples, val: Samples, grid: Sequence[dict[str, Any]]) -> Iterator[Fitted]:
        """One network for each."""
        for point in grid:
            yield self.member(train, val, point, 0)

    def member(
        self,
        train: Samples,
        val: Samples,
        point: dict[str, Any],
        number: int,
        *,
        inputs: Inputs | None = None,
        device: str = "cpu",
        each_epoch: Callable[[Epoch], None] | None = None,
    ) -> Fitted:
        """The network of a number, which is its seed beside `classifier.seed`."""
        settings = self.settings.model_copy(update=point)
        inputs = inputs or Inputs.fit(train.metadata, settings.metadata)
        network, epoch = perceptron.train(
            train.examples(inputs),
            val.examples(inputs),
            self.classes,
            settings,
            member=number,
            device=device,
            each_epoch=each_epoch,
        )
        return Fitted(Networks([network]), inputs, self.offset(train.labels), {"best_epoch": epoch})


class Logistic(Family):
    """Logistic regression."""

    name = "logistic_regression"
    grid = tuple({"l2": penalty} for penalty in PENALTIES)

    def fit(self, train: Samples, val: Samples, grid: Sequence[dict[str, Any]]) -> Iterator[Fitted]:
        """One for each penalty."""
        inputs, settings = Inputs.fit(train.metadata, self.settings.metadata), self.settings
        weights, examples = self.offset(train.labels), train.examples(inputs)
        if settings.imbalance == "undersampling":
            examples = examples.take(perceptron.undersample(train.labels, seed=settings.seed, member=0))
        weighted = settings.imbalance in ("weights", "sampling")  # of which sampling is a noisy form
        for model in Linear.fit(examples, self.classes, [point["l2"] for point in grid], weighted=weighted):
            yield Fitted(model, inputs, weights)


class NearestMean(Family):
    """Nearest class mean: it takes all classes for equally frequent."""

    name = "nearest_mean"
    grid = ({},)

    def fit(self, train: Samples, val: Samples, grid: Sequence[dict[str, Any]]) -> Iterator[Fitted]:
        """The one there is."""
        yield Fitted(
            Means.fit(train.vectors, train.labels, self.classes),
            Inputs(),
            class_weights(train.labels, self.classes),
        )


class NearestNeighbours(Family):
    """k nearest neighbours: their shares are those of the data, however imbalanced."""

    name = "knn"
    grid = tuple({"k": k} for k in NEIGHBOURS)

    def __init__(self, settings: Settings, classes: int) -> None:
        super().__init__(settings, classes)
        self._found: dict[tuple[int, int], tuple[Floats, Ints]] = {}

    def fit(self, train: Samples, val: Samples, grid: Sequence[dict[str, Any]]) -> Iterator[Fitted]:
        """One for each k."""
        for point in grid:
            model = Neighbours(train.vectors, train.labels, point["k"], self.classes)
            yield Fitted(model, Inputs(), np.ones(self.classes))

    def unseen(
        self, samples: Samples, parts: Sequence[Ints], left_out: Sequence[int]
    ) -> Iterator[list[Floats]]:
        """As above, but fold by fold: each fold's neighbours in each other are found once, for all that
        ask."""
        learned, _ = roles(len(parts), left_out)
        merged = []
        for asked in left_out:
            found = [self._between(samples, parts, asked, known) for known in learned]
            cosines, labels = (np.concatenate(side, axis=1) for side in zip(*found, strict=True))
            order = np.argsort(-cosines, axis=1, kind="stable")
            merged.append([np.take_along_axis(side, order, axis=1) for side in (cosines, labels)])
        for point in self.grid:
            k = point["k"]
            yield [votes(cosines[:, :k], labels[:, :k], self.classes) for cosines, labels in merged]

    def _between(
        self, samples: Samples, parts: Sequence[Ints], asked: int, known: int
    ) -> tuple[Floats, Ints]:
        """Cosines and labels (n, k) of one fold's neighbours in another."""
        if (asked, known) not in self._found:
            vectors = samples.vectors
            cosines, rows = nearest(vectors[parts[known]], vectors[parts[asked]], max(NEIGHBOURS))
            self._found[asked, known] = cosines, samples.labels[parts[known]][rows]
        return self._found[asked, known]


FAMILIES = (Perceptron, Logistic, NearestNeighbours, NearestMean)


def roles(folds: int, left_out: Sequence[int]) -> tuple[list[int], int]:
    """Folds to learn from, and the one to stop early by: the next after the first that is left out."""
    others = [(left_out[0] + step) % folds for step in range(1, folds)]
    stop, *learned = [number for number in others if number not in left_out]
    return learned, stop
