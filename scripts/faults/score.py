"""What clients got, counted; and the verdict. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

Manner = Literal["plain", "slow", "stalled", "leaving", "poison"]
"""How a client reads: at once; a little at a time; not at all for a while; not to the end. A poison request kills who launches it."""

REENQUEUE_S = 3.0
"""Wanted: from the last word of a lost worker to the new attempt in the queue."""


@dataclass
class Answer:
    """What one client got. `refusals`: statuses of those that did not take it before it was accepted."""

    manner: Manner
    wanted: list[str]
    """The text of each choice."""
    tokens: int
    """Of each choice."""
    texts: list[str] = field(default_factory=list)
    got_tokens: int = 0
    error: str | None = None
    code: str = ""
    """The error's, if the server named one."""
    finished: bool = False
    refusals: list[str] = field(default_factory=list)
    orphaned: bool = False
    """Its gateway was killed under it."""
    attempts: int = 1
    worst_pause_s: float = 0.0


@dataclass
class Score:
    requests: int = 0
    complete: int = 0
    lost: int = 0
    duplicated: int = 0
    wrong: int = 0
    recovered: int = 0
    left: int = 0
    """Clients that went away by themselves."""
    orphaned: int = 0
    poisoned: int = 0
    """Poison requests that ended with the error that they should."""
    worst_pause_s: float = 0.0
    manners: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    """Processes that ended although nothing had struck them."""

    def enter(self, answer: Answer) -> str | None:
        """Count one answer; words if something is wrong with it."""
        self.requests += 1
        self.manners[answer.manner] += 1
        self.refusals.update(answer.refusals)
        if answer.manner == "poison":
            return self._poison(answer)
        if answer.orphaned:
            self.orphaned += 1
            return self._text(answer)
        if answer.error is not None:
            self.lost += 1
            self.errors[answer.code or answer.error[:60]] += 1
            return f"LOST: {answer.error}"
        self.recovered += answer.attempts > 1
        if answer.manner == "plain":
            self.worst_pause_s = max(self.worst_pause_s, answer.worst_pause_s)
        if answer.manner == "leaving":
            self.left += 1
            return self._text(answer)
        if not answer.finished:
            self.lost += 1
            self.errors["cut"] += 1
            return "LOST: the stream ended without an end"
        if answer.got_tokens > answer.tokens * len(answer.wanted):
            self.duplicated += 1
            return f"DUPLICATED: {answer.got_tokens} tokens instead of {answer.tokens * len(answer.wanted)}"
        self.complete += 1
        return self._text(answer)

    def _text(self, answer: Answer) -> str | None:
        """What was shown must be right, also where it was not shown to the end."""
        for text, wanted in zip(answer.texts, answer.wanted, strict=True):
            if text != wanted if answer.finished else not wanted.startswith(text):
                self.wrong += 1
                return f"WRONG: {text!r} instead of {wanted!r}"
        return None

    def _poison(self, answer: Answer) -> str | None:
        if answer.code == "poison" or answer.orphaned:
            self.poisoned += 1
            return None
        self.errors["poison survived"] += 1
        return f"POISON: not ended as one, but by {answer.error or 'an answer'}"

    def failures(self) -> list[str]:
        """What must not have happened, in words."""
        found = []
        for name in ("lost", "duplicated", "wrong"):
            if getattr(self, name):
                found.append(f"{getattr(self, name)} {name}")
        if self.errors["poison survived"]:
            found.append("poison that was not recognised")
        if self.crashes:
            found.append(f"ended by themselves: {', '.join(self.crashes)}")
        if not self.complete:
            found.append("no complete answer")
        return found

    def body(self) -> dict[str, Any]:
        """For the last line."""
        return {
            "requests": self.requests,
            "complete": self.complete,
            "lost": self.lost,
            "duplicated": self.duplicated,
            "wrong": self.wrong,
            "recovered": self.recovered,
            "left": self.left,
            "orphaned_by_killed_gateways": self.orphaned,
            "poison_ended": self.poisoned,
            "worst_pause_s": round(self.worst_pause_s, 2),
            "clients": dict(self.manners),
            "errors": dict(self.errors),
            "refusals": dict(self.refusals),
            "faults": dict(self.faults),
            "crashes": self.crashes,
        }
