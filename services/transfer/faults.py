"""Injected transfer faults, for tests and chaos runs: what happens to the n-th page that this worker pushes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from common.errors import SettingError

Kind = Literal["fail", "stall", "corrupt"]


@dataclass(frozen=True, slots=True)
class Fault:
    """`every`: each page whose number is a multiple of it (counted from 1); 0: never."""

    kind: Kind = "fail"
    every: int = 0

    def strikes(self, number: int) -> Kind | None:
        return self.kind if self.every and number % self.every == 0 else None


def parse(text: str) -> Fault:
    """ "corrupt:100" corrupts every hundredth page; "" none. Raises SettingError."""
    if not text:
        return Fault()
    kind, _, every = text.partition(":")
    if kind not in ("fail", "stall", "corrupt") or not every.isdigit() or int(every) < 1:
        raise SettingError(f"fault is {text!r}; it must be like fail:100, stall:100 or corrupt:100")
    return Fault(cast(Kind, kind), int(every))
