"""The report: one page that needs nothing else, its pictures as PNG and SVG beside it."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from configs.load import dump
from configs.schema import Experiment
from eval import card, gallery, lineage, plots, projection
from eval.compare import interval
from eval.metrics import Bootstrap, Floats, Ints, Ranking, decide
from shards.files import read_json, write_text
from shards.shardset import SPLITS, ShardSet
from train import lines
from train.classifier import Classifier
from train.embeddings import Embeddings

PAGE = "index.html"
TEMPLATES = Path(__file__).parent / "templates"
RULES = {
    "youden": "the largest sum of sensitivity and specificity",
    "sensitivity": "the fewest calls that reach the sensitivity asked for",
    "specificity": "the most calls that keep the specificity asked for",
    "cost": "the least cost of missed and falsely called images",
    "half": "fixed at 0.5",
}
TITLES = {
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
    "partial_auc": "partial AUC above 80 % sensitivity (at most 0.2)",
    "ppv": "PPV",
    "npv": "NPV",
    "map_at_r": "MAP@R",
    "macro_precision": "precision, mean over classes",
    "macro_f1": "F1, mean over classes",
    "weighted_precision": "precision, mean over images by their class",
    "weighted_f1": "F1, mean over images by their class",
    "flagged_per_found": "flagged for each one found",
    "brier": "Brier score (lower is better)",
    "calibration_error": "expected calibration error (lower is better)",
}
COLOURS = {  # of the pictures -> the page's, which follow light and dark
    plots.INK: "ink",
    plots.GREY: "quiet",
    plots.GRID: "line",
    "#000000": "ink",
    plots.BLUE: "blue",
    plots.VERMILLION: "red",
    "#009E73": "green",
    "#CC79A7": "pink",
    "#E69F00": "orange",
    "#56B4E9": "sky",
    "#F0E442": "yellow",
}
MAP, MARGIN = 480, 14  # side of a map and its rim, in its own units
CONTENTS = (
    ("ranking", "Ranking"),
    ("figures", "Figures"),
    ("models", "Simpler models"),
    ("probabilities", "Probabilities"),
    ("subgroups", "Subgroups"),
    ("map", "Embeddings"),
    ("mistakes", "Mistakes"),
    ("training", "Training"),
    ("speed", "Speed"),
    ("data", "Data"),
    ("card", "Model card"),
    ("config", "Configuration"),
)


def write(
    folder: Path,
    experiment: Experiment,
    results: Mapping[str, Any],
    data: Mapping[str, Embeddings],
    classifier: Classifier,
    probabilities: Floats,
) -> dict[str, Path]:
    """Write the page and its pictures.

    Args:
        folder: where to.
        results: what metrics.json holds.
        data: embeddings by split.
        probabilities: (n, C) of the test split.

    Returns:
        name -> PNG, of the pictures that the data allow.
    """
    seed = experiment.evaluate.seed
    test, classes, positive = data["test"], classifier.classes, classifier.positive
    called = decide(probabilities, positive, classifier.threshold)
    rows = projection.chosen(test.labels == positive, called != test.labels, seed=seed)
    planes = projection.planes(data["train"].vectors, test.vectors[rows], seed=seed)
    pictures = _draw(folder, experiment, data, probabilities, classifier, results)
    for plane in planes:
        name = f"embeddings_{re.sub('[^a-z]', '', plane.name.lower())}"
        pictures[name] = folder / f"{name}.png"
        plots.projection(pictures[name], plane, test.labels[rows], classes, positive)
    shards = gallery.shard_set(experiment, classifier.made_from["shards_sha256"])
    with closing(gallery.Pictures(shards)) as thumbnails:
        judged = (probabilities, called, classes, positive, thumbnails)
        mistakes = gallery.mistakes(data["train"], test, *judged)
        lesions = [gallery.lesion(test, int(row), *judged, gallery.THUMBNAIL) for row in rows]
    wrong = (called != test.labels)[rows]
    context = {
        **results,
        "results": results,
        "rule": RULES[results["threshold_rule"]],
        "titles": _titles(results["test"]),
        "patients": _patients(results["test"], results["group"], results["positive"]),
        "retrieval": _retrieval(results["test"]),
        "pictures": {name: _inline(path, name) for name, path in pictures.items()},
        "maps": [_map(plane, test.labels[rows], wrong, classes, positive) for plane in planes],
        "colours": [_css(colour) for colour in plots.colours(classes, positive)],
        "lesions": lesions,
        "lesions_json": _script_json([asdict(one) for one in lesions]),
        "mistakes": mistakes,
        "with_pictures": shards is not None,
        **_background(experiment, shards, data, results),
    }
    write_text(folder / PAGE, _page(context))
    return pictures


def _background(
    experiment: Experiment,
    shards: ShardSet | None,
    data: Mapping[str, Embeddings],
    results: Mapping[str, Any],
) -> dict[str, Any]:
    """What the page tells beside figures."""
    run = experiment.run.folder
    path = run / "encoder.json"
    about = read_json(path, "moleprint train CONFIG") if path.exists() else {}
    encoder = lineage.encoder_facts(experiment, about)
    return {
        "leaks": lineage.leak_facts(shards, data, results["group"]),
        "lineage": lineage.data_facts(shards) if shards else [],
        "encoder": encoder,
        "speed": lineage.speed_facts(run),
        "machine": lineage.machine_facts(run),
        "card_rows": card.rows(results, data, encoder, lineage.data_facts(shards) if shards else []),
        "config": dump(experiment),
    }


def _draw(
    folder: Path,
    experiment: Experiment,
    data: Mapping[str, Embeddings],
    probabilities: Floats,
    classifier: Classifier,
    results: Mapping[str, Any],
) -> dict[str, Path]:
    """Draw every picture of figures that the data allow; name -> PNG."""
    settings, test, of = experiment.evaluate, data["test"], results["test"]
    bootstrap = Bootstrap(settings.bootstrap, settings.confidence, settings.seed)
    classes, positive, threshold = classifier.classes, classifier.positive, classifier.threshold
    scores, positives, groups = probabilities[:, positive], test.labels == positive, test.group_codes()
    ranking = Ranking(scores, positives, groups)
    drawn: dict[str, Path] = {}

    def path(name: str) -> Path:
        drawn[name] = folder / f"{name}.png"
        return drawn[name]

    plots.confusion(path("confusion"), of["confusion_matrix"], classes)
    plots.calibration(path("reliability"), scores, positives, groups, bootstrap)
    plots.score_histogram(path("scores"), scores, test.labels, classes, positive, threshold)
    plots.decision(path("decision"), of["decision_curve"], classes[positive])
    if "roc_auc" in of:
        band = None if of["roc_auc"]["low"] is None else bootstrap
        plots.roc(path("roc"), ranking, groups, threshold, band)
        plots.precision_recall(path("precision_recall"), ranking, groups, threshold, band)
    if of["subgroups"]:
        overall = {**of, "positive": int(positives.sum())}
        plots.forest(path("subgroups"), of["subgroups"], overall, "roc_auc")
    log = experiment.run.folder / lines.FILE
    for name, draw in (("training", plots.training_curves), ("curves", plots.further_curves)):
        if draw(folder / f"{name}.png", log):
            path(name)
    return drawn


def _titles(test: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, title) of the figures of a whole split, class by class left out."""
    names = [
        name
        for name, of in test.items()
        if isinstance(of, dict) and "value" in of and "." not in name.replace("_0.", "_")
    ]
    return [(name, TITLES.get(name) or _plain(name)) for name in [*names, *_undefined(test, names)]]


def _undefined(test: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [name for name in test["undefined"] if name not in names and "." not in name.replace("_0.", "_")]


def _plain(name: str) -> str:
    """`sensitivity_at_specificity_0.9` -> `sensitivity at specificity 0.9`."""
    return name.replace("_", " ")


def _patients(test: Mapping[str, Any], group: str, positive: str) -> list[tuple[str, str]]:
    """Figures of patients; none where each has one image."""
    of, duckling = test["patients"], test["ugly_duckling"]
    if of["groups"] == test["images"]:
        return []
    rows = [(f"{group}s", f"{of['groups']:,}, {of['positive']:,} with {positive}")]
    rows += [(TITLES.get(n, n), interval(of, n)) for n in ("roc_auc", "sensitivity", "specificity")]
    if not duckling["groups"]:
        return [*rows, ("ugly duckling", f"no {group} has images both of {positive} and not")]
    first = f"{interval(duckling, 'top_1')}: a {positive} ranks first of its {group}'s images; chance"
    chance = duckling["top_1_by_chance"]["value"]
    rows.append(("ugly duckling", f"{first} {chance:.3f} ({duckling['groups']:,} {group}s with both kinds)"))
    return [*rows, (f"ROC-AUC within a {group}", interval(duckling, "within_auc"))]


def _retrieval(test: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Figures of the embedding itself."""
    of = test["embedding"]
    names = [n for n in [*of, *of["undefined"]] if "." not in n and n not in ("undefined_draws", "undefined")]
    return [
        (TITLES.get(n) or _plain(n), interval(of, n))
        for n in names
        if n in of["undefined"] or isinstance(of.get(n), dict)
    ]


def _map(
    plane: projection.Plane, labels: Ints, wrong: Any, classes: Sequence[str], positive: int
) -> dict[str, Any]:
    """A plane in the units of its drawing: (x, y, colour, whether called wrongly) of each dot."""
    low, high = plane.points.min(axis=0), plane.points.max(axis=0)
    placed = MARGIN + (plane.points - low) / np.maximum(high - low, 1e-12) * (MAP - 2 * MARGIN)
    colours = [_css(colour) for colour in plots.colours(classes, positive)]
    dots = [
        (f"{x:.1f}", f"{MAP - y:.1f}", colours[label], bool(bad))
        for (x, y), label, bad in zip(placed, labels, wrong, strict=True)
    ]
    return {"name": plane.name, "x": plane.x, "y": plane.y, "dots": dots}


def _css(colour: str) -> str:
    return f"var(--{COLOURS[colour]})"


def _inline(png: Path, name: str) -> Markup:
    """The SVG beside a PNG as a part of the page: in the page's colours, its names its own."""
    text = png.with_suffix(".svg").read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for colour, variable in COLOURS.items():
        text = re.sub(colour, f"var(--{variable})", text, flags=re.IGNORECASE)
    # Text that names no colour is black on any ground.
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{name}" fill="var(--ink)"', 1))


def _script_json(value: Any) -> Markup:
    """JSON inside a script element: no text in it can end the element."""
    return Markup(json.dumps(value).replace("<", r"\u003c"))


def _page(context: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["zip"] = zip
    page = environment.get_template(PAGE).render(context, splits=SPLITS, contents=[])
    present = [(anchor, title) for anchor, title in CONTENTS if f'<h2 id="{anchor}"' in page]
    return environment.get_template(PAGE).render(context, splits=SPLITS, contents=present)
