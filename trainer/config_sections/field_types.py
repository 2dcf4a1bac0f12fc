"""Types that the sections of the configuration share."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pydantic
from pydantic import Field
from tyro.constructors import PrimitiveConstructorSpec

STRICT = pydantic.ConfigDict(extra="forbid", strict=True)

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _read_object(arguments: list[str]) -> dict[str, Any]:
    value = json.loads(arguments[0])
    if not isinstance(value, dict):
        raise ValueError(f"{arguments[0]} is no JSON object")
    return value


JsonObject = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=_read_object,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]
