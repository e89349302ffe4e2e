"""Injected transfer faults, for tests and chaos runs: what happens to the n-th page that this worker pushes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, cast

from common.errors import SettingError

Kind = Literal["fail", "stall", "corrupt"]
"""The push fails; the page is held back for ever, with those that travel with it; one bit of it arrives changed."""

_SPELLING = re.compile(r"(fail|stall|corrupt):([1-9]\d*)(?:x([1-9]\d*))?")


@dataclass(frozen=True, slots=True)
class Fault:
    """`every`: each page whose number is a multiple of it (counted from 1); 0: never. `times`: no more often than this; 0: no limit."""

    kind: Kind = "fail"
    every: int = 0
    times: int = 0

    def strikes(self, number: int) -> Kind | None:
        """What happens to the page with this number, if anything."""
        if not self.every or number % self.every:
            return None
        return self.kind if not self.times or number // self.every <= self.times else None


def parse(text: str) -> Fault:
    """ "corrupt:100" spoils every hundredth page, "fail:100x1" only the first of those; "" none. Raises SettingError."""
    if not text:
        return Fault()
    match = _SPELLING.fullmatch(text)
    if match is None:
        raise SettingError(f"fault is {text!r}; it must be like fail:100, stall:100x1 or corrupt:100")
    return Fault(cast(Kind, match[1]), int(match[2]), int(match[3] or 0))
