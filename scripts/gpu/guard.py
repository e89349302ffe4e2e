"""What fails is a result like any other, and loses none of those that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def attempt(name: str, run: Callable[[], Any]) -> tuple[str, Any]:
    """The result under its name, or why there is none."""
    try:
        return name, run()
    except Exception as error:
        return name, failed(error)


def guarded(name: str, results: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The results up to a failure, and then why there are no more."""
    try:
        yield from results
    except Exception as error:
        yield f"{name}, failed", failed(error)


def failed(error: Exception) -> dict[str, Any]:
    return {"ok": False, "failure": f"{type(error).__name__}: {error}"[:500]}
