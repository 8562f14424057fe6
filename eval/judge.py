"""All figures of a split: of its images and patients, of parts of it, of its embeddings, of other models
beside."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from configs.judging import Evaluate as Settings
from eval.compare import differences
from eval.curves import decision_curve, reliability_rows
from eval.figures import Detection, Means, estimate, figures
from eval.metrics import Bools, Bootstrap, Floats, Ints
from eval.patients import by_patient, ugly_duckling
from eval.retrieval import per_query, silhouette
from eval.subgroups import subgroups
from train.classifier import Calibrated, Classifier
from train.embeddings import Embeddings

QUERIES = 1000
"""Samples of each class that retrieval asks about."""
ASKED = 0  # purpose of randomness


def judge(
    data: Embeddings, classifier: Classifier, settings: Settings, group: str, *, learned_from: bool
) -> dict[str, Any]:
    """A split, ready for JSON.

    Args:
        group: what a group is, such as `patient`.
        learned_from: whether the classifiers learned from it, which would make most figures vain: then only
            those of images and patients are given.
    """
    classes, positive, threshold = classifier.classes, classifier.positive, classifier.threshold
    bootstrap = Bootstrap(settings.bootstrap, settings.confidence, settings.seed)
    groups, probabilities = data.group_codes(), classifier.probabilities(data.vectors, data.metadata)
    scores, positives = probabilities[:, positive], data.labels == positive
    about: dict[str, Any] = {"bootstrap": bootstrap, "name": classes[positive], "group": group}
    found = figures(
        probabilities,
        data.labels,
        groups,
        classes=classes,
        positive=positive,
        threshold=threshold,
        bootstrap=bootstrap,
        group=group,
        prevalence=settings.prevalence,
    )
    found["patients"] = by_patient(
        scores, positives, groups, threshold=threshold, prevalence=settings.patient_prevalence, **about
    )
    found["ugly_duckling"] = ugly_duckling(scores, positives, groups, **about)
    found["reliability"] = reliability_rows(scores, positives, groups, bootstrap)
    found["decision_curve"] = decision_curve(scores, positives, groups, bootstrap, group, settings.prevalence)
    if learned_from:
        return found
    found["subgroups"] = subgroups(
        scores, positives, groups, data.metadata, settings.subgroups, threshold=threshold, **about
    )
    found["embedding"] = embedding(data, groups, bootstrap, classes, group)
    found["models"] = beside(data, groups, classifier, scores, bootstrap, group)
    found["seeds"] = spread(data, classifier.seeds, positive)
    return found


def beside(
    data: Embeddings, groups: Ints, classifier: Classifier, scores: Floats, bootstrap: Bootstrap, group: str
) -> dict[str, Any]:
    """Model -> the figures of `Detection`, each model at its own threshold, and `difference`: the verdict's
    less the model's."""
    positive, name = classifier.positive, classifier.classes[classifier.positive]
    positives: Bools = data.labels == positive
    verdict = Detection(scores, positives, groups, threshold=classifier.threshold, name=name)
    found = {}
    for model, its in classifier.beside.items():
        other = its.probabilities(data.vectors, data.metadata)[:, positive]
        part = Detection(other, positives, groups, threshold=its.threshold, name=name)
        found[model] = estimate([part], groups, bootstrap, group) | {
            "threshold": its.threshold,
            "difference": differences((verdict, part), (scores, other), positives, groups, bootstrap, group),
        }
    return found


def spread(data: Embeddings, seeds: Sequence[Calibrated], positive: int) -> dict[str, Any]:
    """Figure -> mean, sd and values of the MLP's seeds, each at its own threshold."""
    positives, everyone = data.labels == positive, np.ones((1, len(data.labels)))
    each: list[Mapping[str, Floats]] = []
    for seed in seeds:
        scores = seed.probabilities(data.vectors, data.metadata)[:, positive]
        part = Detection(scores, positives, np.arange(len(scores)), threshold=seed.threshold)
        each.append(part.under(everyone))
    found = {}
    for name in each[0]:
        values = np.array([of[name][0] for of in each])
        if np.isfinite(values).all():
            sd = float(values.std(ddof=1)) if len(values) > 1 else None
            found[name] = {"mean": float(values.mean()), "sd": sd, "values": values.tolist()}
    return found


def embedding(
    data: Embeddings, groups: Ints, bootstrap: Bootstrap, classes: Sequence[str], group: str
) -> dict[str, Any]:
    """Retrieval, class by class and as the mean over classes, and silhouette.

    At most QUERIES samples of each class ask; their neighbours are all samples but those of their own group.
    An interval tells how far other askers would move a figure, among the same neighbours.
    """
    draw = np.random.default_rng((bootstrap.seed, ASKED))
    rows = [np.flatnonzero(data.labels == label) for label in range(len(classes))]
    queries = np.concatenate([np.sort(draw.permutation(of)[:QUERIES]) for of in rows])
    asked = per_query(data.vectors, data.labels, queries=queries, groups=groups)
    values: dict[str, Floats] = {}
    for name, of_query in asked.items():
        for label, its in enumerate(classes):
            values[f"{name}.{its}"] = np.full(len(groups), np.nan)
            chosen = data.labels[queries] == label
            values[f"{name}.{its}"][queries[chosen]] = of_query[chosen]
    parts = [Macro(values, groups, list(asked), classes, group)]
    alone = Means({"silhouette": silhouette(data.vectors, data.labels)}, groups, " in a split of two classes")
    return estimate([*parts, alone], groups, bootstrap, group) | {"queries": len(queries)}


class Macro(Means):
    """Means of each class, and the mean over classes of each figure."""

    def __init__(
        self,
        values: Mapping[str, Floats],
        groups: Ints,
        names: Sequence[str],
        classes: Sequence[str],
        group: str,
    ) -> None:
        super().__init__(values, groups, f" with images that have others of their class in another {group}")
        self._names, self._classes = names, classes

    def under(self, multiplicity: Floats) -> dict[str, Floats]:
        """name -> (b,)."""
        values = super().under(multiplicity)
        for name in self._names:
            values[name] = np.mean([values[f"{name}.{its}"] for its in self._classes], axis=0)
        return values

    def needs(self) -> dict[str, list[tuple[int, str]]]:
        """name -> what it needs."""
        needs = super().needs()
        for name in self._names:
            needs[name] = [need for its in self._classes for need in needs[f"{name}.{its}"]]
        return needs
