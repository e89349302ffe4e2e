"""Injected faults of messages, for tests and chaos runs: what happens to the n-th message that a socket sends."""

from __future__ import annotations

import re
from dataclasses import dataclass

from common.errors import SettingError

_SPELLING = re.compile(r"drop:([1-9]\d{0,8})|delay:([1-9]\d{0,8})x(\d{1,3}(?:\.\d{1,3})?)")


@dataclass(frozen=True, slots=True)
class MessageFault:
    """Every message whose number is a multiple (counted from 1, on each socket); 0: never. What follows a delayed message on its socket
    waits behind it: ZeroMQ keeps the order, and so does this."""

    drop_every: int = 0
    delay_every: int = 0
    delay_s: float = 0.0

    def drops(self, number: int) -> bool:
        return bool(self.drop_every) and number % self.drop_every == 0

    def delays(self, number: int) -> bool:
        return bool(self.delay_every) and number % self.delay_every == 0


NONE = MessageFault()


def parse(text: str) -> MessageFault:
    """ "drop:50" loses every fiftieth message, "delay:40x0.3" holds every fortieth back for 0.3 s, "drop:50,delay:40x0.3" does both; ""
    nothing. Raises SettingError."""
    found: dict[str, float] = {}
    for word in text.split(",") if text else []:
        match = _SPELLING.fullmatch(word)
        if match is None:
            raise SettingError(f"message_fault is {text!r}; it must be like drop:50, delay:40x0.3 or both with a comma between")
        if match[1]:
            found["drop_every"] = int(match[1])
        else:
            found.update(delay_every=int(match[2]), delay_s=float(match[3]))
    return MessageFault(int(found.get("drop_every", 0)), int(found.get("delay_every", 0)), found.get("delay_s", 0.0))
