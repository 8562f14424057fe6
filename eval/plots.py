"""The report's pictures: PNGs and SVGs drawn through matplotlib's object interface, in colours that
colour-blind readers tell apart (Okabe & Ito 2008). No display needed."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs.training import Loss
from eval.metrics import Bools, Bootstrap, Floats, Ints, Ranking, precision_band, reliability, roc_band
from eval.projection import Plane
from train import lines

INK, GREY, GRID = "#222222", "#767676", "#e6e6e6"
BLUE, VERMILLION = "#0072B2", "#D55E00"
OTHERS = (BLUE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
LINES = ("-", "--", ":")
LOGIT_TICKS = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
TITLES = {"roc_auc": "ROC-AUC", "sensitivity": "sensitivity", "specificity": "specificity"}
SIZE = (4.8, 4.2)  # inches
Place = Literal["best", "upper left", "upper right", "lower right"]
Series = dict[str, list[tuple[float, float]]]
Panel = tuple[str, str, Series]


def roc(path: Path, ranking: Ranking, groups: Ints, threshold: float, bootstrap: Bootstrap | None) -> None:
    """ROC curve with the operating point and, given a bootstrap, its pointwise interval."""
    caught, alarms = (c[0] / c[0, -1] for c in ranking.counts(np.ones((1, int(groups.max()) + 1))))
    figure, axes = _canvas("1 - specificity", "sensitivity")
    if bootstrap:
        grid, low, high = roc_band(ranking, groups, bootstrap)
        label = f"{bootstrap.confidence:.0%} interval"
        axes.fill_between(grid, low, high, color=BLUE, alpha=0.18, linewidth=0, label=label)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 4)), label="chance")
    axes.plot(np.append(0, alarms), np.append(0, caught), color=BLUE, linewidth=1.8, label="test")
    _operating_point(axes, ranking, threshold, alarms, caught)
    _finish(figure, axes, path, "lower right", unit_square=True)


def precision_recall(
    path: Path, ranking: Ranking, groups: Ints, threshold: float, bootstrap: Bootstrap | None
) -> None:
    """Precision against recall, with the prevalence that a coin would reach, and its pointwise interval."""
    caught, alarms = (c[0] for c in ranking.counts(np.ones((1, int(groups.max()) + 1))))
    recall, precision = caught / caught[-1], caught / (caught + alarms)
    prevalence = precision[-1]
    figure, axes = _canvas("recall (sensitivity)", "precision")
    if bootstrap:
        grid, low, high = precision_band(ranking, groups, bootstrap)
        label = f"{bootstrap.confidence:.0%} interval"
        axes.fill_between(grid, low, high, color=BLUE, alpha=0.18, linewidth=0, label=label)
    axes.axhline(
        prevalence, color=GREY, linewidth=1, linestyle=(0, (4, 4)), label=f"prevalence {prevalence:.3f}"
    )
    axes.step(
        np.append(0, recall),
        np.append(precision[0], precision),
        where="pre",
        color=BLUE,
        linewidth=1.8,
        label="test",
    )
    _operating_point(axes, ranking, threshold, recall, precision)
    _finish(figure, axes, path, "best", unit_square=True)


def confusion(path: Path, matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> None:
    """Counts, shaded by the share of their true class."""
    counts = np.array(matrix)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(4.2, 1.1 * len(classes) + 1.6)
    figure, axes = _canvas("called", "true", (side + 0.4, side))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [_plain(name) for name in classes]
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names, rotation=90, va="center")
    axes.tick_params(length=0)
    axes.grid(False)
    for (row, column), share in np.ndenumerate(shares):
        colour = "white" if share > 0.55 else INK
        text = f"{counts[row, column]:,}\n{share:.1%}"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=12, linespacing=1.5)
    _finish(figure, axes, path)


def calibration(path: Path, scores: Floats, positives: Bools, groups: Ints, bootstrap: Bootstrap) -> None:
    """Share of positives against mean probability, in bins of as many samples."""
    mean, share, low, high = reliability(scores, positives, groups, bootstrap)
    top = 1.05 * min(1.0, float(np.nanmax([mean, share, high])))
    figure, axes = _canvas("mean probability in the bin", "share that is of the class")
    axes.plot([0, top], [0, top], color=GREY, linewidth=1, linestyle=(0, (4, 4)), label="perfect")
    error = [np.maximum(share - low, 0), np.maximum(high - share, 0)]
    label = "test, tenths of the images"
    if np.isfinite(low).any():
        label += f"\nwith {bootstrap.confidence:.0%} interval"
    axes.errorbar(mean, share, error, color=BLUE, fmt="o", markersize=4, linewidth=1, capsize=2, label=label)
    axes.set_xlim(-0.02 * top, top)
    axes.set_ylim(-0.02 * top, top)
    _finish(figure, axes, path, "upper left")


def score_histogram(
    path: Path, scores: Floats, labels: Ints, classes: Sequence[str], positive: int, threshold: float
) -> None:
    """Each class's own distribution of the positive probability, and the threshold.

    Evenly spaced in log-odds, since the probabilities of a rare class crowd near zero.
    """
    figure, axes = _canvas(f"probability of {_plain(classes[positive])}", "share of the class")
    extremes = np.clip([scores.min(), scores.max(), threshold], 1e-4, 1 - 1e-4)
    odds = np.log(extremes / (1 - extremes))
    edges = 1 / (1 + np.exp(-np.linspace(odds.min() - 0.5, odds.max() + 0.5, 43)))
    axes.set_xscale("logit")
    axes.set_xticks(LOGIT_TICKS, [f"{tick:g}" for tick in LOGIT_TICKS])
    axes.set_xticks([], minor=True)
    for index, (name, colour) in enumerate(zip(classes, colours(classes, positive), strict=True)):
        own = np.clip(scores[labels == index], edges[0], edges[-1])
        heights = np.histogram(own, edges)[0] / max(len(own), 1)
        axes.stairs(
            heights, edges, fill=True, color=colour, alpha=0.5, label=f"{_plain(name)} ({len(own):,})"
        )
    axes.axvline(threshold, 0, 1 / 1.3, color=INK, linewidth=1.2, label=f"threshold {threshold:.3f}")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the legend
    _finish(figure, axes, path, "upper right")


def projection(path: Path, plane: Plane, labels: Ints, classes: Sequence[str], positive: int) -> None:
    """Images with labels (n,) on a plane."""
    figure, axes = _canvas(plane.x, plane.y)
    if not plane.x:  # the axes mean nothing
        axes.set_xticks([])
        axes.set_yticks([])
    x, y = plane.points.T
    for index, colour in sorted(enumerate(colours(classes, positive)), key=lambda pair: pair[0] == positive):
        own = labels == index  # the positive class last, on top
        axes.scatter(x[own], y[own], s=9, color=colour, alpha=0.6, linewidths=0, label=_plain(classes[index]))
    _finish(figure, axes, path, "best")


def decision(path: Path, rows: Sequence[Mapping[str, Any]], positive: str) -> None:
    """Net benefit of acting by the model, on all, and on none (`eval.curves.decision_curve`)."""
    figure, axes = _canvas(f"probability of {_plain(positive)} at which one would act", "net benefit")
    for name, colour, label in (("all", GREY, "act on all"), ("model", BLUE, "act by the model")):
        known = [(row["probability"], row[name]) for row in rows if row[name] is not None]
        if not known:
            continue
        x, y = [p for p, _ in known], [of["value"] for _, of in known]
        if name == "model" and all(of["low"] is not None for _, of in known):
            low, high = [of["low"] for _, of in known], [of["high"] for _, of in known]
            axes.fill_between(x, low, high, color=BLUE, alpha=0.18, linewidth=0)
        axes.plot(x, y, color=colour, linewidth=1.8 if name == "model" else 1.2, label=label)
    axes.axhline(0, color=INK, linewidth=1, linestyle=(0, (4, 4)), label="act on none")
    best = max([0.0, *(row["model"]["high"] or row["model"]["value"] for row in rows if row["model"])])
    axes.set_ylim(-0.25 * (best or 0.1), 1.15 * (best or 0.1))
    _finish(figure, axes, path, "upper right")


def forest(path: Path, parts: Mapping[str, Mapping[str, Any]], overall: Mapping[str, Any], name: str) -> None:
    """A figure with its interval in every subgroup; dashed is everyone's, hollow are the small ones."""
    rows = [(f"{column}: {value}", of) for column, values in parts.items() for value, of in values.items()]
    rows = [("all", {**overall, "small": False}), *rows]
    figure = Figure(figsize=(7.2, 0.9 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, TITLES.get(name, name), "")
    for y, (_, of) in enumerate(rows):
        estimate = of.get(name)
        if estimate is None:
            axes.text(0.5, y, "undefined", color=GREY, fontsize=8, ha="center", va="center")
            continue
        colour, face = (GREY, "none") if of["small"] else (BLUE, BLUE)
        if estimate["low"] is not None:
            axes.plot([estimate["low"], estimate["high"]], [y, y], color=colour, linewidth=1.4)
        axes.plot([estimate["value"]], [y], "o", color=colour, markerfacecolor=face, markersize=5)
    if name in overall:
        axes.axvline(overall[name]["value"], color=GREY, linewidth=1, linestyle=(0, (4, 4)))
    counts = [f"{_plain(label)}  ({of['images']:,} / {of['positive']:,})" for label, of in rows]
    axes.set_yticks(range(len(rows)), counts)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.01)
    save(figure, path)


def training_curves(path: Path, log: Path) -> bool:
    """Losses and validation AUC of encoder and classifier from metrics.jsonl; False where it has none."""
    panels = [panel for panel in _panels(log) if panel[1] in ("loss", "AUC")]
    return _curves(path, panels, columns=2, size=(4.8, 3.1))


def further_curves(path: Path, log: Path) -> bool:
    """All other figures of metrics.jsonl, a panel for each or for those that compare; False without any."""
    panels = [panel for panel in _panels(log) if panel[1] not in ("loss", "AUC")]
    return _curves(path, panels, columns=3, size=(3.6, 2.7))


def _panels(log: Path) -> list[Panel]:
    """Every figure of a metrics.jsonl, those that compare together: (stage, panel, name -> points)."""
    panels: list[Panel] = []
    for stage, curves in read_curves(log).items():
        mine: dict[str, Series] = {"loss": {}, "AUC": {}}
        for name, points in curves.items():
            if name not in ("time", "seconds_left"):
                mine.setdefault(_panel(name), {})[name] = points
        panels += [(stage, panel, series) for panel, series in mine.items() if series]
    return panels


def _panel(name: str) -> str:
    """The panel of a figure: validation's beside training's."""
    if name == "val_triplet_loss":
        return name  # a hinge over all triplets, which training's may not be
    bare = name.removeprefix("val_")
    if "loss" in bare or bare in Loss.model_fields:  # a loss is logged under the name of its weight
        return "loss"
    if "auc" in bare:
        return "AUC"
    if bare.startswith(("recall", "map")):
        return "retrieval"
    return re.sub(r"_p\d+$", "", bare)  # quantiles beside the mean


def _curves(path: Path, panels: Sequence[Panel], *, columns: int, size: tuple[float, float]) -> bool:
    if not panels:
        return False
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    for place, (stage, word, series) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        _dress(axes, "epoch", word.replace("_", " "))
        axes.set_title(stage, loc="left", fontsize=10, color=INK)
        for number, (name, points) in enumerate(sorted(series.items())):
            colour, line = OTHERS[number % len(OTHERS)], LINES[number // len(OTHERS) % len(LINES)]
            axes.plot(*np.array(points).T, color=colour, linestyle=line, linewidth=1.4, label=_plain(name))
        if set(series) != {word}:
            axes.legend(frameon=False, fontsize=8)
    save(figure, path)
    return True


def read_curves(log: Path) -> dict[str, Series]:
    """stage -> name -> [(epoch, value)] of a metrics.jsonl; what a resumed run did again counts once."""
    curves: dict[str, Series] = defaultdict(lambda: defaultdict(list))
    for row in lines.read(log):
        stage, at = row["stage"], float(row["epoch"] if "epoch" in row else row["step"])
        for name, value in row.items():
            if name in ("stage", "step", "epoch") or not isinstance(value, int | float):
                continue
            points = curves[stage][name]
            while points and points[-1][0] >= at:
                points.pop()
            points.append((at, value))
    return curves


def save(figure: Figure, path: Path) -> None:
    """PNG under `path`, and SVG beside it: text as text, no ground of its own, the same bytes each time."""
    figure.savefig(path, dpi=150)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path.with_suffix(".svg"), transparent=True, metadata={"Date": None})


def _canvas(x: str, y: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, x, y)
    return figure, axes


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(color=GREY, labelcolor=INK, labelsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _operating_point(axes: Axes, ranking: Ranking, threshold: float, x: Floats, y: Floats) -> None:
    at = int((ranking.thresholds >= threshold).sum()) - 1
    if at >= 0:
        label = f"threshold {threshold:.3f}"
        axes.plot(x[at], y[at], "o", color=VERMILLION, markersize=7, linestyle="none", label=label)


def _finish(
    figure: Figure, axes: Axes, path: Path, legend: Place | None = None, unit_square: bool = False
) -> None:
    if unit_square:
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.02)
    if legend:
        axes.legend(loc=legend, frameon=False, fontsize=9, labelcolor=INK)
    save(figure, path)


def colours(classes: Sequence[str], positive: int) -> list[str]:
    others = iter(OTHERS * len(classes))
    return [VERMILLION if index == positive else next(others) for index in range(len(classes))]


def _plain(name: str) -> str:
    """A name with no mathematics in it."""
    return name.replace("$", r"\$")
