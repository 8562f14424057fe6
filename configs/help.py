"""`moleprint VERB --help`: every field of the sections a stage reads, from the models themselves."""

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from configs.load import fields, section_of
from configs.schema import Experiment

WIDTH = 100


def describe(sections: Sequence[str]) -> str:
    """Key, default, type and meaning of every field of some sections, as text."""
    return "\n".join(line for section in sections for line in _section(section))


def _section(section: str) -> Iterator[str]:
    model = section_of(Experiment.model_fields[section].annotation)
    assert model is not None
    yield f"{section}: {(model.__doc__ or '').strip()}"
    for key, field in fields(model, f"{section}."):
        inner = section_of(field.annotation)
        meaning = " ".join((field.description or (inner.__doc__ if inner else None) or "").split())
        if inner:
            yield f"  {key}: {meaning}"
        else:
            yield f"  {key} = {_default(field)}  ({_kind(field)})"
            yield textwrap.fill(meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    yield ""


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "none"
    return json.dumps(default, default=str, ensure_ascii=False) if default != "" else "''"


def _kind(field: FieldInfo) -> str:
    limits = [limit for part in field.metadata for limit in _limits(part)]
    return ", ".join([_type(field.annotation), *limits])


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_type(arguments[0])}"
        return f"list of {len(arguments)} × {_type(arguments[0])}"
    if hasattr(annotation, "__metadata__"):  # Annotated[type, limits]
        inner = [limit for part in annotation.__metadata__ for limit in _limits(part)]
        return f"{_type(arguments[0])} {' and '.join(inner)}".rstrip()
    if arguments:  # a union
        return " or ".join(_type(a) for a in arguments if a is not type(None))
    names = {int: "integer", float: "number", str: "text", bool: "true | false"}
    return names.get(annotation, re.sub(r"^_+", "", annotation.__name__).lower())


def _limits(part: Any) -> Iterator[str]:
    if hasattr(part, "metadata"):  # a FieldInfo inside Annotated
        for inner in part.metadata:
            yield from _limits(inner)
    for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
        limit = getattr(part, name, None)
        if limit is not None and limit != 2**63:
            yield f"{sign} {limit}"
