"""Types that the sections of a configuration are made of."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrAuto = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Range = tuple[Positive, Positive]
RGB = tuple[float, float, float]
Dtype = Literal["float32", "float16", "bfloat16"]
Place = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
_WHOLE = re.compile(r"([-+]?\d+)\.0*")


def canonical(value: object) -> str:
    """A label as it is compared: ` mel ` is `mel`; 1, `1` and `1.0` are one value."""
    text = str(value).strip()
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


class Section(BaseModel):
    """What all sections share: frozen, typed, no unknown key, docstrings as help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
