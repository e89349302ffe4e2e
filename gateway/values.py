"""Single values of a request's JSON: of the right type and within their range, or a BadRequest that names the field."""

from __future__ import annotations

import math
from typing import Any

from common.errors import BadRequest


def given(found: dict[str, Any]) -> dict[str, Any]:
    """Null is the same as absent."""
    return {name: value for name, value in found.items() if value is not None}


def flag(fields: dict[str, Any], name: str, *, within: str = "") -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise BadRequest(f"{within}{name} must be true or false", param=within + name)
    return value


def integer(fields: dict[str, Any], name: str, low: int, high: int, default: int) -> int:
    value = fields.get(name, default)
    if type(value) is not int:
        raise BadRequest(f"{name} must be a whole number", param=name)
    if name in fields and not low <= value <= high:
        raise BadRequest(f"{name} must be from {low} to {high}", param=name)
    return value


def number(fields: dict[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = fields.get(name, default)
    if type(value) not in (int, float):
        raise BadRequest(f"{name} must be a number", param=name)
    if not low <= value <= high or not math.isfinite(value):
        raise BadRequest(f"{name} must be from {low:g} to {high:g}", param=name)
    return float(value)
