"""Typed schemas (pydantic) of values that come from files: parsed once, where they are read, with one line per fault.

A file's schema stands beside what reads and writes that file; here is what they share. Values are taken strictly (a
number in quotes is no number, true is no 1), unknown fields are left alone: newer files have more of them.
"""

import functools
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lance_quant.errors import InputError
from lance_quant.storage.atomic import read_json

T = TypeVar("T")
MOST = 10**9  # that a size or number may be: Lance's largest is rope_theta, 1e6

Count = Annotated[int, Field(ge=0, lt=2**63)]
Size = Annotated[int, Field(gt=0, lt=MOST)]
Positive = Annotated[float, Field(gt=0, lt=MOST)]
Shape = Annotated[list[Size], Field(min_length=2, max_length=2)]
"""[out, in] of a linear."""


class Schema(BaseModel):
    """A JSON object with known fields."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


def parse(kind: type[T], value: Any, what: str, advice: str = "") -> T:
    """`value` as a Schema, or as any type that pydantic knows (`dict[str, int]`).

    Args:
        what: names the value's origin in the error, e.g. "model configuration /models/lance/llm_config.json".
        advice: closes the error's line: what to do next.

    Raises:
        InputError: names the first fields that are missing or wrong, what they are and what they should be.
    """
    try:
        parsed: T = _adapter(cast(Hashable, kind)).validate_python(value)
        return parsed
    except ValidationError as error:
        raise InputError(f"{what} {_faults(error)}{advice and f'; {advice}'}") from None


def read(kind: type[T], path: Path, what: str, advice: str = "") -> T:
    """The content of a JSON file as a Schema, see `parse`; `what` names the kind of file."""
    return parse(kind, read_json(path, what), f"{what} {path}", advice)


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _faults(error: ValidationError) -> str:
    """A field that says another format, else all fields that are missing, else the first one that is wrong."""
    found = sorted(error.errors(include_url=False), key=lambda one: one["type"] != "literal_error")
    lacking = [_place(one["loc"]) for one in found if one["type"] == "missing"]
    if lacking and found[0]["type"] != "literal_error":
        return f"lacks {lacking[:5]}" + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
    first, place = found[0], _place(found[0]["loc"])
    said = "must be a JSON object" if first["type"] == "model_type" else _message(first["msg"])
    shown = "an object" if isinstance(first["input"], dict) else repr(first["input"])[:80]
    return f"{'holds' if not place else f'has {place}'} {shown}: {said}" \
        + (f" ({len(found) - 1} more)" if len(found) > 1 else "")


def _place(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part)[:80] for part in loc)


def _message(text: str) -> str:
    """pydantic's sentence, as the end of ours."""
    text = text.removeprefix("Value error, ")
    return text.replace("Input should be", "must be", 1) if text.startswith("Input should be") else text
