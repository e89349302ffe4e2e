"""What this gateway's clients have asked lately, in lengths and times: what the planner plans from."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

MOST = 5_000
"""Requests remembered at most."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One whole answer. `at_s`: when it was asked, on the gateway's monotonic clock."""

    at_s: float
    input_tokens: int
    output_tokens: int


class Demand:
    """Whole answers by the moment of their end; those cut short tell no length, and further choices read no prompt."""

    def __init__(self) -> None:
        self._asked: deque[Asked] = deque(maxlen=MOST)

    def note(self, asked: Asked) -> None:
        self._asked.append(asked)

    def body(self, now: float) -> dict[str, Any]:
        """Oldest first, with their ages: clocks of several gateways need not agree."""
        ordered = sorted(self._asked, key=lambda one: one.at_s)
        return {
            "requests": [
                {"age_s": round(now - one.at_s, 4), "input_tokens": one.input_tokens, "output_tokens": one.output_tokens} for one in ordered
            ]
        }
