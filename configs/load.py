"""YAML file + `section.key=value` -> one frozen Experiment; every mistake reported at once.

python: load(Path("configs/demo.yaml"), ["train.epochs=3"])
shell:  moleprint train configs/demo.yaml train.epochs=3
"""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from configs.errors import UserError
from configs.schema import Experiment


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as people write it: `3e-4` is a float, `20:25` no number, a key given twice a problem."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            line = node.start_mark.line + 1
            self.problems.append(
                f"key given twice in the mapping at line {line}: {', '.join(twice)}; keep one"
            )
        return {str(key): value for key, value in super().construct_mapping(node, deep=deep).items()}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
for _first in "-+0123456789":  # before the number in base 60 that YAML 1.1 sees there: 1225
    _Loader.yaml_implicit_resolvers[_first].insert(0, ("tag:yaml.org,2002:str", re.compile(r"^[-+]?\d+:")))


def load(path: Path, overrides: Sequence[str] = (), *, of_run: bool = False) -> Experiment:
    """The experiment of a YAML file with overrides applied.

    Args:
        path: the YAML file.
        overrides: `section.key=value`, the value in YAML; `section=null` leaves an optional section out.
        of_run: it is a run folder's `config.yaml`, maybe of another release: unknown keys are left out.

    Raises:
        UserError: naming every unknown key (with the nearest valid one), wrong type and bad value.
    """
    raw, problems = _parse(_read(path), str(path))
    raw = {} if raw is None else raw  # an empty file: all defaults
    if not isinstance(raw, dict):
        raise UserError(f"{path}: sections such as `train:` were expected, found {type(raw).__name__}")
    raw = {key: {} if section is None else section for key, section in raw.items()}  # a bare `train:`
    source: dict[str, str] = {}
    for override in overrides:
        try:
            problems += _override(raw, override, source)
        except UserError as error:
            problems.append(str(error))
    try:
        experiment = _checked(_known(raw) if of_run else raw)
    except ValidationError as error:
        problems += [_explain(detail, path, source) for detail in error.errors()]
    if problems:
        raise UserError("\n".join(problems))
    return experiment


def _checked(raw: dict[str, Any]) -> Experiment:
    return Experiment.model_validate_json(json.dumps(raw, default=str), strict=True)


def _known(raw: dict[str, Any]) -> dict[str, Any]:
    """The same without unknown keys."""
    try:
        _checked(raw)
    except ValidationError as error:
        for *sections, key in (d["loc"] for d in error.errors() if d["type"] == "extra_forbidden"):
            target = raw
            for section in sections:
                target = target[str(section)]
            del target[str(key)]
    return raw


def dump(experiment: BaseModel) -> str:
    """The resolved experiment as YAML; `load` reads it back equal."""
    given = {key: value for key, value in experiment.model_dump(mode="json").items() if value is not None}
    return yaml.safe_dump(given, sort_keys=False)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        files = sorted(Path(__file__).parent.glob("*.yaml"))
        presets = ", ".join(f"configs/{p.name}" for p in files if p.name != "sweep.yaml")
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: cannot read this configuration ({reason}); presets: {presets}") from None


def _parse(text: str, where: str) -> tuple[Any, list[str]]:
    """The value of a YAML text, None if it is empty, and what is wrong in it though it can be read."""
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None
    return value, [f"{where}: {problem}" for problem in loader.problems]


def _override(raw: dict[str, Any], override: str, source: dict[str, str]) -> list[str]:
    """Put one `section.key=value` into the raw mapping and note in `source` where the key came from."""
    key, equals, text = override.partition("=")
    *sections, last = key.split(".")
    value, problems = _parse(text, f"'{override}'")
    if not equals or not all((*sections, last)) or (not sections and value is not None):
        raise UserError(f"'{override}': expected section.key=value, such as train.epochs=30")
    target = raw
    for section in sections:
        if not isinstance(target.get(section), dict):
            if target.get(section) is not None:
                raise UserError(f"'{override}': '{section}' holds a value, not keys")
            target[section] = {}
        target = target[section]
    target[last] = value
    source[key] = "command line"
    return problems


def _explain(detail: ErrorDetails, path: Path, source: dict[str, str]) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    where = next((source[k] for k in source if key == k or key.startswith(f"{k}.")), str(path))
    if detail["type"] == "extra_forbidden":
        near = _nearest(key, location[-1])
        return f"{where}: unknown key {key}" + (f"; did you mean {near}?" if near else "")
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{where}: {key}: {message}"
    found = json.dumps(detail["input"], default=str)
    return f"{where}: {key}: {message[0].lower() + message[1:]}, found {found}"


def _nearest(key: str, last: str) -> str | None:
    section = key.partition(".")[0]
    valid = sorted((k for k, _ in fields(Experiment)), key=lambda k: k.partition(".")[0] != section)
    similar = difflib.get_close_matches(last, [k.split(".")[-1] for k in valid], n=1, cutoff=0.75)
    candidates = [
        *(k for k in valid if k.split(".")[-1] == last),
        *(k for k in valid if similar and k.split(".")[-1] == similar[0]),
        *difflib.get_close_matches(key, valid, n=1, cutoff=0.75),
    ]
    return candidates[0] if candidates else None


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every section and key under a model, sections before their keys."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        inner = section_of(field.annotation)
        if inner is not None:
            yield from fields(inner, f"{prefix}{name}.")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section model that a field holds, if it holds one; a mapping of names to sections is no section."""
    inner = () if get_origin(annotation) is dict else getattr(annotation, "__args__", ())
    for candidate in (annotation, *inner):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
