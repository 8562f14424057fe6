"""The model card (Mitchell et al. 2019, "Model Cards for Model Reporting"): what a run is for, and is not."""

from collections.abc import Mapping, Sequence
from typing import Any

from eval.compare import interval
from shards.shardset import SPLITS
from train.embeddings import Embeddings
from train.metadata import read

Row = tuple[str, str]


def rows(
    results: Mapping[str, Any],
    data: Mapping[str, Embeddings],
    encoder: Sequence[Row],
    lineage: Sequence[Row],
) -> list[Row]:
    """Title and text of each part."""
    test, positive, group = results["test"], results["positive"], results["group"]
    counts = ", ".join(
        f"{split} {results[split]['images']:,} images of {results[split]['groups']:,} {group}s"
        for split in SPLITS
    )
    sources = "; ".join(text for name, text in lineage if name.startswith("source"))
    return [
        ("what it is", _what(encoder, results)),
        (
            "intended use",
            (
                f"research on dermoscopic photographs of single lesions: ranking by likeness to {positive}, "
                "retrieving similar ones, comparing methods"
            ),
        ),
        (
            "not for",
            (
                "diagnosis, triage or screening of people; photographs taken without a dermatoscope; "
                f"lesions of kinds that are none of {', '.join(results['classes'])}"
            ),
        ),
        ("data", f"{counts}{'; ' + sources if sources else ''}"),
        (
            "figures",
            (
                f"test ROC-AUC {interval(test, 'roc_auc')}; at {results['threshold']:.3f} sensitivity "
                f"{interval(test, 'sensitivity')}, specificity {interval(test, 'specificity')}"
            ),
        ),
        ("limits", "; ".join(_limits(results, data))),
        (
            "who is in the data",
            "; ".join(_people(data["test"])) or "not recorded: neither age, sex nor site is known",
        ),
        ("notice", results["notice"] or "none came with the data"),
    ]


def _what(encoder: Sequence[Row], results: Mapping[str, Any]) -> str:
    about = dict(encoder).get("encoder", "an encoder")
    return f"{about}; on its frozen embeddings {results['model'].replace('_', ' ')}, calibrated on validation"


def _limits(results: Mapping[str, Any], data: Mapping[str, Embeddings]) -> list[str]:
    test, positive, group = results["test"], results["positive"], results["group"]
    found = test["class_counts"][positive]
    limits = [
        f"{found:,} images of {positive} were tested on",
        f"{found / test['images']:.1%} of the test images are {positive}: elsewhere predictive values differ",
        "another clinic, camera or population may give other figures than the intervals say",
        "skin tone is not recorded, so its effect is not measured",
        "nor are rulers, ink, hair, gel and dark corners, which a network may go by instead of the lesion",
    ]
    small = [
        f"{column}: {value}"
        for column, parts in test.get("subgroups", {}).items()
        for value, of in parts.items()
        if of["small"]
    ]
    if small:
        limits.append(f"too few {group}s to judge {', '.join(small)}")
    return limits


def _people(test: Embeddings) -> list[str]:
    """Age, sex and site of the test split, as far as they are known."""
    said = []
    ages = [age for age in read(test.metadata, "age") or [] if age is not None]
    if ages:
        ages.sort()
        said.append(f"age {ages[len(ages) // 20]:g} to {ages[-1 - len(ages) // 20]:g} (nine tenths)")
    for role in ("sex", "site"):
        values = read(test.metadata, role) or []
        known = [value for value in values if value is not None]
        names = sorted(set(known), key=lambda name: -known.count(name))[:6]
        shares = [f"{name} {known.count(name) / len(values):.0%}" for name in names]
        if shares:
            said.append(f"{role}: {', '.join(shares)}")
    return said
