"""How JSON bodies are read: what every body has in common, and errors that name the value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator
from pydantic import ValidationError as PydanticError
from pydantic_core import ErrorDetails, from_json

from holdfast.protocol.errors import InvalidMessageError

_MAX_SHOWN = 3


class Body(BaseModel):
    """A JSON object: null means absent, unknown keys are ignored, nothing is coerced from text."""

    model_config = ConfigDict(
        extra="ignore",
        strict=True,
        frozen=True,
        protected_namespaces=(),
        defer_build=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        if isinstance(value, Mapping):
            return {key: item for key, item in value.items() if item is not None}
        return value

    def to_json(self) -> dict[str, Any]:
        """The body to send: absent fields left out, defaults spelled out."""
        return self.model_dump(mode="json", exclude_none=True)


def _as_texts(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    return {
        key: item if isinstance(item, str) else json.dumps(item, sort_keys=True)
        for key, item in value.items()
    }


Text = Annotated[str, Field(min_length=1)]
Id = Annotated[str, Field(min_length=1, max_length=512)]
SeqId = Annotated[int, Field(ge=1, le=2**63 - 1)]
"""A number among a model's operations; they begin at 1."""
Counter = Annotated[int, Field(ge=0, le=2**63 - 1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Time = Annotated[datetime, Strict(False)]
TtlSeconds = Annotated[int, Field(ge=1, le=315_360_000)]
"""Seconds until a checkpoint expires, up to ten years."""
Metadata = Annotated[dict[str, str], BeforeValidator(_as_texts)]
"""Text by name. Clients may send other values; they are kept as their JSON text."""

B = TypeVar("B", bound=BaseModel)


def read_json(data: bytes | str) -> Any:
    """Parse JSON; NaN and Infinity are numbers. Raises InvalidMessageError."""
    try:
        return from_json(data, allow_inf_nan=True)
    except ValueError as error:
        raise InvalidMessageError(f"the body is not JSON: {error}") from None


def read_body(model: type[B], data: bytes | str) -> B:
    """Read a body of this form. Raises InvalidMessageError, which names each wrong value."""
    return check_body(model, read_json(data))


def check_body(model: type[B], value: object) -> B:
    """As read_body, for JSON that is parsed already."""
    try:
        return model.model_validate(value)
    except PydanticError as error:
        raise InvalidMessageError(describe(error.errors(include_url=False))) from None


def describe(errors: list[ErrorDetails]) -> str:
    """Validation errors as one line: where, what was given, what would be right."""
    lines: list[str] = []
    for error in errors[:_MAX_SHOWN]:
        where = ".".join(str(part) for part in error["loc"]) or "the body"
        if error["type"] == "missing":
            lines.append(f"{where} is missing")
            continue
        message = error["msg"].removeprefix("Value error, ")
        message = message[:1].lower() + message[1:]
        # Objects and lists are not repeated: they may hold a key, or be very long.
        given = error["input"]
        shown = "" if isinstance(given, dict | list) else f"; given: {_shown(given)}"
        lines.append(f"{where}: {message}{shown}")
    if len(errors) > _MAX_SHOWN:
        lines.append(f"and {len(errors) - _MAX_SHOWN} more")
    return "; ".join(lines)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
