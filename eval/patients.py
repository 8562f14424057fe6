"""What a clinician asks of a patient, not of an image: is there a melanoma, and which of the lesions is
it?"""

from typing import Any

import numpy as np

from eval.figures import Detection, Means, estimate
from eval.metrics import Bools, Bootstrap, Floats, Ints


def by_patient(
    scores: Floats,
    positives: Bools,
    groups: Ints,
    *,
    threshold: float,
    bootstrap: Bootstrap,
    name: str,
    group: str,
    prevalence: float | None = None,
) -> dict[str, Any]:
    """The figures of `Detection` with patients for images: a patient's score is that of the worst image.

    Args:
        scores: (n,) probability of the positive class.
        positives: (n,) whether an image is of that class.
        groups: (n,) patient of each image, codes from 0 without gaps.
    """
    count = int(groups.max()) + 1
    worst = np.full(count, -np.inf)
    np.maximum.at(worst, groups, scores)
    has = np.bincount(groups, positives, minlength=count) > 0
    patients = np.arange(count)
    part = Detection(worst, has, patients, threshold=threshold, name=name, prevalence=prevalence)
    return estimate([part], patients, bootstrap, group) | {"groups": count, "positive": int(has.sum())}


def ugly_duckling(
    scores: Floats, positives: Bools, groups: Ints, *, bootstrap: Bootstrap, name: str, group: str
) -> dict[str, Any]:
    """Within a patient: does a melanoma rank before that patient's other lesions?

    Over the patients with images of both kinds, each counting as one: `top_1`, how often the image of the
    highest score is of a melanoma (shared where several tie), `top_1_by_chance`, how often a blind choice
    would be, and `within_auc`, the mean of the patients' own ROC-AUCs. (The ugly duckling sign: Grob &
    Bonerandi 1998.)
    """
    count = int(groups.max()) + 1
    found = np.full((3, count), np.nan)
    order = np.argsort(groups, kind="stable")
    borders = np.cumsum(np.bincount(groups, minlength=count))[:-1]
    for patient, rows in enumerate(np.split(order, borders)):
        is_positive = positives[rows]
        if is_positive.all() or not is_positive.any():
            continue
        of, others = scores[rows][is_positive], scores[rows][~is_positive]
        first = scores[rows] == scores[rows].max()
        better = (of[:, None] > others).mean() + (of[:, None] == others).mean() / 2
        found[:, patient] = is_positive[first].mean(), is_positive.mean(), better
    what = f" with images both of {name} and not"
    values = dict(zip(("top_1", "top_1_by_chance", "within_auc"), found, strict=True))
    part = Means(values, np.arange(count), what)
    return estimate([part], np.arange(count), bootstrap, group) | {"groups": int(np.isfinite(found[0]).sum())}
