"""What came in and was not taken, counted by reason and logged without a word of its content."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from common.logs import Logger, worth_saying

Reason = Literal["malformed", "for another", "false sender", "stranger", "mismatch", "oversized"]


class Refusals:
    """Of each reason those that are worth saying (common/logs.py) are logged."""

    def __init__(self, log: Logger, what: str) -> None:
        self._log = log
        self._what = what
        self._counts: Counter[Reason] = Counter()

    @property
    def total(self) -> int:
        return self._counts.total()

    def note(self, reason: Reason, **facts: object) -> None:
        """`facts`: nothing that the sender has written freely."""
        self._counts[reason] += 1
        count = self._counts[reason]
        if worth_saying(count):
            self._log.warning(f"{self._what} refused", reason=reason, so_far=count, **facts)
