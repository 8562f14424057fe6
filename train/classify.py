"""Entry: from embeddings to a classifier: a small MLP, and baselines beside it, all calibrated alike.

    train ──► MLP from several seeds, logistic regression, k nearest neighbours, nearest class mean
    val   ──► the epoch to stop at, temperature, operating threshold
    train + val, in folds of patients ──► hyper-parameters, and what each model is worth
    (train.crossvalidation)

The test split stays unseen.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score
from tqdm import tqdm

from configs.errors import UserError
from configs.judging import Classifier as Settings
from configs.schema import Experiment
from train import classifier
from train.calibration import choose_threshold, fit_temperature, nll, softmax
from train.crossvalidation import FIGURES, LEAST, Outcome, assign, cross_validate
from train.embeddings import Embeddings, read_embeddings
from train.families import FAMILIES, Family, Fitted, Perceptron, Samples
from train.perceptron import Epoch, Networks


class Log(Protocol):
    """Where the figures of an epoch go; `train.tracking.Tracker` is one."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values at an optimiser step."""


def fit(
    experiment: Experiment, *, device: str = "cpu", tracker: Log | None = None, progress: bool = True
) -> dict[str, Any]:
    """Fit all models on the train split, calibrate them on validation, write classifier.{safetensors,json}.

    Two fits of the same embeddings and settings write the same bytes.

    Args:
        device: where the MLP is trained.

    Returns:
        What classifier.json holds.

    Raises:
        UserError: if embeddings are missing or do not belong together, a class is missing, or it diverges.
    """
    run, settings = experiment.run.folder, experiment.classifier
    of_train, of_val = read_embeddings(run, "train"), read_embeddings(run, "val")
    _check(of_train, of_val, run)
    classes, positive = of_train.meta["classes"], of_train.meta["positive"]
    train, val = Samples.of(of_train), Samples.of(of_val)
    families = [family(settings, len(classes)) for family in FAMILIES]
    outcomes = _cross_validate(families, Samples.of(of_train, of_val), settings, positive, progress)
    points = {family.name: _point(family, outcomes) for family in families}

    with _told(settings, val, positive, tracker, progress) as each_epoch:
        mlp = Perceptron(settings, len(classes))
        seeds = [
            mlp.member(
                train, val, points["mlp"], number, device=device, each_epoch=None if number else each_epoch
            )
            for number in range(settings.seeds)
        ]
        verdict = _ensemble(mlp, train, seeds, points["mlp"], positive, device)
    fitted = {
        family.name: verdict
        if family.name == mlp.name
        else next(family.fit(train, val, [points[family.name]]))
        for family in families
    }
    about = {
        name: {
            **_calibrate(model, val, positive, settings),
            "hyperparameters": points[name],
            "cross_validation": _describe(name, families, outcomes),
        }
        for name, model in fitted.items()
    }
    name = settings.model if settings.model != "best" else _best(families, outcomes)
    of_seeds = [_calibrate(model, val, positive, settings) for model in seeds]
    record = {
        "model": name,
        **about.pop(name),
        "threshold_rule": settings.threshold,
        "classes": classes,
        "positive": positive,
        "hidden": list(settings.model_copy(update=points["mlp"]).hidden),
        "inputs": train.vectors.shape[1] + train.extra(verdict.inputs).shape[1],
        "metadata": verdict.inputs.describe(),
        "beside": about,
        "seeds": of_seeds,
        "choice": _describe("best", families, outcomes),
        "made_from": classifier.made_from(of_train.meta, settings),
    }
    return classifier.save(
        run, record, {key: its.model for key, its in fitted.items()}, [m.model for m in seeds]
    )


def summary(record: Mapping[str, Any]) -> list[str]:
    """The models, and what validation and cross-validation say of them: lines to print."""
    about = {record["model"]: record, **record["beside"]}
    lines = [f"  {'ROC-AUC':<22}{'validation':<13}cross-validation (mean ± sd over folds of train + val)"]
    for name, its in about.items():
        said = f"  {name:<22}{its['val']['roc_auc']:<13.3f}{_said(its['cross_validation'])}"
        lines.append(f"{said}  <- gives the verdict" if name == record["model"] else said)
    if record["choice"]:
        lines.append(f"  {'choice of the best':<35}{_said(record['choice'])}")
    aucs = [seed["val"]["roc_auc"] for seed in record["seeds"]]
    if len(aucs) > 1:
        spread = f"{np.mean(aucs):.3f} ± {np.std(aucs, ddof=1):.3f}"
        lines.append(f"  {f'mlp, {len(aucs)} seeds':<22}{spread}")
    if record["cross_validation"]:
        lines.append(
            "  (the encoder has learned from train: cross-validation compares, the test split tells)"
        )
    return lines


def _said(cross_validation: Mapping[str, Any] | None) -> str:
    return "{mean:.3f} ± {sd:.3f}".format(**cross_validation["roc_auc"]) if cross_validation else "none"


def _check(train: Embeddings, val: Embeddings, run: Path) -> None:
    if train.meta != val.meta:
        raise UserError(
            f"{run / 'embeddings'}: train and val come from different encoders or shard sets; "
            "make them again with `moleprint embed CONFIG`"
        )
    classes, positive = train.meta["classes"], train.meta["positive"]
    for index, name in enumerate(classes):
        if not (train.labels == index).any():
            raise UserError(
                f"class '{name}' has no sample in train, so it cannot be learned; check pack.classes"
            )
    kinds = len(np.unique(val.labels == positive))
    if kinds < 2:
        raise UserError(
            f"val: all or none of its {len(val.labels)} samples are '{classes[positive]}', so no threshold "
            "can be chosen on it; pack again with a larger pack.ratios.val or another pack.seed"
        )


def _cross_validate(
    families: Sequence[Family], samples: Samples, settings: Settings, positive: int, progress: bool
) -> dict[str, Outcome]:
    """By family's name, and `best`; empty where none is asked for, or too few patients allow it."""
    fold = assign(samples.labels, samples.group_codes(), positive, settings.folds, settings.seed)
    if fold is None:
        needing = [f"search.{key}" for key, values in settings.search.model_dump().items() if values]
        needing += ["model=best"] if settings.model == "best" else []
        if needing:
            raise UserError(
                f"classifier.{needing[0]} needs cross-validation: classifier.folds of {LEAST} or more, and "
                "as many patients of both kinds in train and val"
            )
        return {}
    with tqdm(total=len(families), unit="model", desc="cross-validate", disable=not progress) as bar:
        across = settings.model == "best"
        return cross_validate(families, samples, fold, positive, across=across, done=bar.update)


def _point(family: Family, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """The hyper-parameters chosen; the middle of the grid where nothing could choose."""
    return family.grid[outcomes[family.name].chosen if outcomes else len(family.grid) // 2]


def _best(families: Sequence[Family], outcomes: Mapping[str, Outcome]) -> str:
    return [family.name for family in families for _ in family.grid][outcomes["best"].chosen]


def _describe(
    name: str, families: Sequence[Family], outcomes: Mapping[str, Outcome]
) -> dict[str, Any] | None:
    """What cross-validation says of a choice: its figures over the folds, and every candidate's mean."""
    if name not in outcomes:
        return None
    outcome = outcomes[name]
    tried = [(its.name, point) for its in families for point in its.grid if name in (its.name, "best")]
    means = outcome.candidates[..., 0].mean(axis=1)
    return {
        **{
            figure: {"mean": float(values.mean()), "sd": float(values.std(ddof=1)), "folds": values.tolist()}
            for figure, values in zip(FIGURES, outcome.nested.T, strict=True)
        },
        "candidates": [
            {"model": model, "hyperparameters": point, "roc_auc": float(mean)}
            for (model, point), mean in zip(tried, means, strict=True)
        ],
    }


def _ensemble(
    mlp: Perceptron,
    train: Samples,
    seeds: Sequence[Fitted],
    point: dict[str, Any],
    positive: int,
    device: str,
) -> Fitted:
    """The MLP that gives a verdict: the first seed's, or the mean of several."""
    first, settings = seeds[0], mlp.settings
    if settings.ensemble == "none":
        return first
    members = list(seeds)
    if settings.ensemble == "folds":
        fold = assign(train.labels, train.group_codes(), positive, settings.folds, settings.seed)
        if fold is None:
            raise UserError(
                f"classifier.ensemble=folds needs classifier.folds of {LEAST} or more, and as many patients "
                "of both kinds in train; try ensemble=seeds"
            )
        members = [
            mlp.member(
                train.take(np.flatnonzero(fold != number)),
                train.take(np.flatnonzero(fold == number)),
                point,
                number,
                inputs=first.inputs,
                device=device,
            )
            for number in range(int(fold.max()) + 1)
        ]
    networks = [
        network for its in members if isinstance(its.model, Networks) for network in its.model.members
    ]
    return Fitted(Networks(networks), first.inputs, first.weights, {"members": len(networks)})


def _calibrate(fitted: Fitted, val: Samples, positive: int, settings: Settings) -> dict[str, Any]:
    """Temperature and threshold by the validation split, and its figures."""
    logits, offset = fitted.logits(val), np.log(fitted.weights)
    temperature = fit_temperature(logits, val.labels, offset)
    probabilities = softmax(logits / temperature - offset)
    scores, positives = probabilities[:, positive], val.labels == positive
    asked = {key: getattr(settings, key) for key in ("sensitivity", "specificity", "cost")}
    return {
        "threshold": choose_threshold(scores, positives, settings.threshold, **asked),
        "temperature": temperature,
        "class_weights": fitted.weights.tolist(),
        **fitted.about,
        "val": {
            "nll": nll(probabilities, val.labels),
            "nll_before_temperature": nll(softmax(logits - offset), val.labels),
            "roc_auc": float(roc_auc_score(positives, scores)),
            "pr_auc": float(average_precision_score(positives, scores)),
        },
    }


@contextlib.contextmanager
def _told(
    settings: Settings, val: Samples, positive: int, tracker: Log | None, progress: bool
) -> Iterator[Callable[[Epoch], None]]:
    """What shows and logs the epochs of the first network."""
    positives = val.labels == positive
    with tqdm(total=settings.epochs, unit="epoch", desc="classify", disable=not progress) as bar:

        def tell(epoch: Epoch) -> None:
            losses = {"loss": epoch.loss, "val_loss": epoch.val_loss}
            if tracker:
                logits = epoch.val_logits
                score = (logits[:, positive] - logits.logsumexp(1)).cpu().numpy()
                auc = float(roc_auc_score(positives, score))
                tracker.log(epoch.number * epoch.steps, {"epoch": epoch.number, **losses, "val_roc_auc": auc})
            bar.update()
            bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)

        yield tell
        bar.total = bar.n  # full, though it stopped early
