"""Frozen dataclasses from plain records (YAML, JSON, command line): every key known, every value of its type."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import UserError, unknown

T = TypeVar("T")

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


def from_record(cls: type[T], record: Mapping[str, Any], owner: str) -> T:
    """The dataclass `cls` of a record's values. Raises UserError naming `owner` for an unknown key or a wrong type."""
    kinds = typing.get_type_hints(cls)
    names = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values = {}
    for key, value in record.items():
        if key not in names:
            raise unknown(f"key of {owner}", str(key), names)
        values[key] = typed(owner, key, value, kinds[key])
    return cls(**values)


def typed(owner: str, key: str, value: Any, kind: Any) -> Any:
    """`value` if it is of the annotated type (a whole number serves as a float). Raises UserError otherwise."""
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            if isinstance(value, str) and value in typing.get_args(option):
                return value
        elif option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        elif option is float and isinstance(value, float) and not math.isfinite(value):
            continue  # .inf and .nan are numbers of YAML, but of no setting
        elif isinstance(value, typing.get_origin(option) or option) and (option is bool or not isinstance(value, bool)):
            return value
    allowed = [
        name
        for option in options
        for name in (
            typing.get_args(option)
            if typing.get_origin(option) is typing.Literal
            else [_WORDS.get(typing.get_origin(option) or option, str(option))]
        )
    ]
    raise UserError(f"{owner}: {key} is {value!r}; allowed: {', '.join(allowed)}")


_COUNT = re.compile(r"(\d[\d,_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([kKmMbBgG]?)")
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def parameter_count(key: str, given: int | float | str) -> int:
    """A number of parameters from 100000000, "100M", "1.2e8" or "100,000,000". Raises UserError for anything else."""
    match = _COUNT.fullmatch(str(given).strip())
    count = float(match[1].replace(",", "").replace("_", "")) * _FACTORS[match[2].lower()] if match else 0
    if not 1 <= count < 1e15:
        raise UserError(f"{key}={given!r} is no number of parameters; allowed: such as 100M or 1.2e8")
    return round(count)
