"""A run's figures and report, from its embeddings and classifier: report/{metrics.json, index.html, …}.

python: evaluate(load(Path("configs/demo.yaml")))
shell:  moleprint evaluate configs/demo.yaml
"""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from configs.errors import UserError
from configs.schema import Experiment
from eval import report
from eval.compare import group_name, interval
from eval.judge import judge
from eval.metrics import Floats, decide
from shards.describe import check_made_by
from shards.files import replacing, write_json
from shards.shardset import SPLITS, ShardSet
from train import result
from train.classifier import Classifier, load
from train.embeddings import Embeddings, embeddings_path, read_embeddings

AVERAGES = {
    "macro average": ("macro_precision", "balanced_accuracy", "macro_f1"),
    "weighted average": ("weighted_precision", "accuracy", "weighted_f1"),
}
"""Rows of the classification report below those of the classes."""


class Figures(Protocol):
    """Where the report's figures go besides the run folder; `train.tracking.Tracker` is one."""

    def figures(self, values: dict[str, float], pictures: dict[str, Path]) -> None:
        """Record final values and pictures."""


def evaluate(
    experiment: Experiment,
    *,
    tracker: Figures | None = None,
    progress: bool = True,
    notice: str = "",
) -> dict[str, Any]:
    """Evaluate the run on train, val and test, and write its report/ folder in one go.

    Args:
        experiment: what to evaluate; `experiment.run.folder` holds the embeddings and the classifier.
        tracker: told the figures and pictures when the report is in place.
        progress: show a bar.
        notice: a sentence about the data that readers must not miss, such as that they are drawn.

    Returns:
        What report/metrics.json holds.

    Raises:
        UserError: if something is missing or stale, a group lies in two splits, or it cannot be written.
    """
    run, settings = experiment.run.folder, experiment.evaluate
    classifier = load(run)
    data = {split: read_embeddings(run, split) for split in SPLITS}
    _check(data, classifier, run)
    check_settings(experiment, classifier)
    results = _about(experiment, classifier, notice)
    total = sum(len(d.keys) for d in data.values())
    with tqdm(total=total, unit="image", desc="evaluate", disable=not progress) as bar:
        for split in SPLITS:
            results[split] = judge(
                data[split], classifier, settings, results["group"], learned_from=split == "train"
            )
            bar.update(len(data[split].keys))
    test = data["test"]
    probabilities = classifier.probabilities(test.vectors, test.metadata)
    with replacing(run / "report") as folder:
        write_json(folder / "metrics.json", results)
        _write_predictions(folder / "predictions_test.csv", test, probabilities, classifier)
        pictures = report.write(folder, experiment, results, data, classifier, probabilities)
    if tracker:
        values = {name: value for split in SPLITS for name, value in _flat(split, results[split])}
        tracker.figures(values, {name: run / "report" / path.name for name, path in pictures.items()})
    return results


def _flat(place: str, found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Figures below a place as (PLACE/NAME, value), with the ends of their intervals as NAME_low, NAME_high.

    Those of subgroups, some hundreds, are left to metrics.json and the forest plot.
    """
    if isinstance(found.get("value"), float):
        yield place, found["value"]
        yield from ((f"{place}_{end}", found[end]) for end in ("low", "high") if found[end] is not None)
        return
    for name, below in found.items():
        if isinstance(below, dict) and name != "subgroups":
            yield from _flat(f"{place}/{name}", below)


def headline(results: dict[str, Any]) -> str:
    """The test figures as a few aligned lines for the console."""
    test, positive, classes = results["test"], results["positive"], results["classes"]
    share, group = test["class_counts"][positive] / test["images"], results["group"]
    size = f"{test['images']:,} images of {test['groups']:,} {group}s, {share:.1%} {positive}"
    lines = [f"test: {size}; [{results['bootstrap']['confidence']:.0%} interval over {group}s]"]
    chosen = f"at threshold {results['threshold']:.3f}, chosen on validation"
    asked = results["bootstrap"]["prevalence"]
    at = f"at {share if asked is None else asked:.1%} {positive}"
    for title, name, remark in (
        ("ROC-AUC", "roc_auc", ""),
        ("PR-AUC", "pr_auc", f"chance {share:.3f}"),
        ("partial AUC", "partial_auc", "above 80 % sensitivity; at most 0.2"),
        ("accuracy", "accuracy", ""),
        ("sensitivity", "sensitivity", chosen),
        ("specificity", "specificity", chosen),
        ("PPV", "ppv", at),
        ("flagged", "flagged_per_found", f"for each {positive} found, {at}"),
        ("calibration", "calibration_error", "expected error of a probability"),
    ):
        lines.append(f"  {title:<12} {interval(test, name):<21}  {remark}".rstrip())
    patients, duckling = test["patients"], test["ugly_duckling"]
    if patients["groups"] < test["images"]:
        lines.append(f"  of {group}s, by the worst image:")
        lines.append(
            f"  {'ROC-AUC':<12} {interval(patients, 'roc_auc'):<21}  {patients['positive']:,} with {positive}"
        )
        if "top_1" in duckling:
            chance = f"{duckling['top_1_by_chance']['value']:.3f}"
            remark = f"a {positive} ranks first of its {group}'s images; chance {chance}"
            lines.append(f"  {'first':<12} {interval(duckling, 'top_1'):<21}  {remark}")

    width = max(12, *(len(name) + 2 for name in classes))
    head = max(len(name) for name in (*classes, "true / called", *AVERAGES)) + 2
    lines += ["", f"  {'true / called':<{head}}" + "".join(f"{name:>{width}}" for name in classes)]
    for name, row in zip(classes, test["confusion_matrix"], strict=True):
        lines.append(f"  {name:<{head}}" + "".join(f"{count:>{width},}" for count in row))

    columns = ("precision", "recall", "f1")
    lines += ["", f"  {'':<{head}}" + "".join(f"{column:>12}" for column in (*columns, "images"))]
    rows = {name: tuple(f"{column}.{name}" for column in columns) for name in classes}
    counts = {**test["class_counts"], **dict.fromkeys(AVERAGES, test["images"])}
    for name, figures in (rows | AVERAGES).items():
        values = (test.get(figure, {}).get("value") for figure in figures)
        cells = "".join(f"{'-' if value is None else format(value, '.3f'):>12}" for value in values)
        lines.append(f"  {name:<{head}}{cells}{counts[name]:>12,}")
    return "\n".join([*lines, "", *_beside(results)])


def _beside(results: dict[str, Any]) -> list[str]:
    """The models beside the verdict's, and how far they are apart."""
    test, name = results["test"], results["model"]
    areas = {other: interval(its, "roc_auc") for other, its in {name: test, **test["models"]}.items()}
    width = max(23, *(len(area) + 2 for area in areas.values()))
    lines = [f"  {'ROC-AUC':<22}{'':<{width}}{name} less this model; DeLong takes images for independent"]
    lines.append(f"  {name:<22}{areas[name]:<{width}}gives the verdict")
    for other, its in test["models"].items():
        apart = interval(its["difference"], "roc_auc")
        p = its["difference"].get("delong", {}).get("p")
        remark = "" if p is None else f"  DeLong p {p:.2g}"
        lines.append(f"  {other:<22}{areas[other]:<{width}}{apart}{remark}")
    seeds = test["seeds"].get("roc_auc")
    if seeds and seeds["sd"] is not None:
        title = f"mlp, {len(seeds['values'])} seeds"
        lines.append(f"  {title:<22}{seeds['mean']:.3f} ± {seeds['sd']:.3f} (sd)")
    return lines


def _about(experiment: Experiment, classifier: Classifier, notice: str) -> dict[str, Any]:
    """What the figures of all splits have in common."""
    return {
        "classes": classifier.classes,
        "positive": classifier.classes[classifier.positive],
        "threshold": classifier.threshold,
        "model": classifier.name,
        "threshold_rule": classifier.made_from["settings"]["threshold"],
        "temperature": classifier.temperature,
        "group": group_name(experiment),
        "bootstrap": experiment.evaluate.model_dump(mode="json"),
        "classifier_sha256": classifier.sha256,
        "encoder_sha256": classifier.made_from["encoder_sha256"],
        "shards_sha256": classifier.made_from["shards_sha256"],
        "notice": notice,
    }


def check_settings(experiment: Experiment, classifier: Classifier) -> None:
    """Make sure that the settings, which the report tells, are those that all of the run was made with.

    Raises:
        UserError: naming what differs; of the shard set only where it is at hand.
    """
    made = classifier.made_from
    result.check_settings(experiment, {"embed": made["embed"] or {}, "classifier": made["settings"]})
    try:
        shards = ShardSet.of(experiment)
    except UserError:
        return
    if shards.sha256 == made["shards_sha256"]:
        check_made_by(shards.manifest, experiment.pack, shards.folder)


def _check(data: dict[str, Embeddings], classifier: Classifier, run: Path) -> None:
    """Everything belongs together, and no group lies in two splits."""
    for split, embeddings in data.items():
        for key, thing in (
            ("encoder_sha256", "encoder"),
            ("shards_sha256", "shard set"),
            ("embed", "way of embedding"),
        ):
            if embeddings.meta.get(key) != classifier.made_from[key]:
                raise UserError(
                    f"{embeddings_path(run, split)}: made from another {thing} than the classifier; "
                    "run `moleprint embed CONFIG`, then `moleprint classify CONFIG`"
                )
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = sorted(set(data[one].groups) & set(data[other].groups))
        if shared:
            raise UserError(
                f"{run / 'embeddings'}: {len(shared)} groups lie both in {one} and in {other}, such as "
                f"'{shared[0]}', so the figures would flatter; pack again with `moleprint pack CONFIG`"
            )


def _write_predictions(path: Path, test: Embeddings, probabilities: Floats, classifier: Classifier) -> None:
    classes, positive = classifier.classes, classifier.positive
    called = decide(probabilities, positive, classifier.threshold)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["key", "group", "label", "probability", "decision"])
        for i, (key, group) in enumerate(zip(test.keys, test.groups, strict=True)):
            row = [
                key,
                group,
                classes[test.labels[i]],
                f"{probabilities[i, positive]:.6f}",
                classes[called[i]],
            ]
            writer.writerow(row)
