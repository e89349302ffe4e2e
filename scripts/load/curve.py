"""Attainment over rate, and the goodput read off it: pure.

Goodput at a share (90 %, 99 %) is the highest measured rate that reached the share with no lower rate missing it. The search is a ladder
(times `LADDER`) until the share is bracketed, then bisection in the logarithm of the rate until the bracket is narrower than `resolution`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

LADDER = 1.6
MISSES = 3
"""A share is resolved by a trial in which at least this many requests may miss: 30 requests for 90 %, 300 for 99 %."""
Z = 1.96


def wilson(hits: int, asked: int) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson, 1927); (0, 1) without requests."""
    if not asked:
        return 0.0, 1.0
    p, spread = hits / asked, Z * Z / asked
    centre, width = p + spread / 2, Z * math.sqrt(p * (1 - p) / asked + spread / (4 * asked))
    return max(0.0, (centre - width) / (1 + spread)), min(1.0, (centre + width) / (1 + spread))


def needed(share: float) -> int:
    """Requests that a trial needs to tell a share from less."""
    return math.ceil(round(MISSES / (1 - share), 6))


@dataclass(frozen=True)
class Goodput:
    """`rate`: requests/s, 0 if even the lowest one missed. `below`: the lowest rate that missed, None if none did."""

    share: float
    rate: float
    below: float | None
    resolved: bool
    why: str = ""


@dataclass
class Curve:
    """Trials of one target; those at the same rate are pooled."""

    start: float
    floor: float
    ceiling: float
    resolution: float
    hits: dict[float, int] = field(default_factory=lambda: defaultdict(int))
    asked: dict[float, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, rate: float, hits: int, asked: int) -> None:
        self.hits[rate] += hits
        self.asked[rate] += asked

    def attainment(self, rate: float) -> float:
        return self.hits[rate] / self.asked[rate]

    def bracket(self, share: float) -> tuple[float | None, float | None]:
        """(highest rate that reached the share below the lowest that missed it, that lowest)."""
        missed = min((rate for rate in self.asked if self.attainment(rate) < share), default=None)
        reached = [rate for rate in self.asked if self.attainment(rate) >= share and (missed is None or rate < missed)]
        return max(reached, default=None), missed

    def next_rate(self, share: float) -> float | None:
        """Where to measure next; None when the bracket is narrow enough or the range is at its end."""
        reached, missed = self.bracket(share)
        if reached is None and missed is None:
            return self.start
        if missed is None:
            assert reached is not None
            return min(reached * LADDER, self.ceiling) if reached < self.ceiling else None
        if reached is None:
            return max(missed / LADDER, self.floor) if missed > self.floor else None
        return math.sqrt(reached * missed) if missed / reached > self.resolution else None

    def goodput(self, share: float) -> Goodput:
        reached, missed = self.bracket(share)
        if reached is None:
            low = f"not even {missed:.3g}/s" if missed is not None else "nothing was measured"
            return Goodput(share, 0.0, missed, False, low)
        if self.asked[reached] < needed(share):
            return Goodput(share, reached, missed, False, f"{self.asked[reached]} requests, {needed(share)} are needed")
        if missed is None:
            return Goodput(share, reached, None, False, "the highest rate tried still reached it")
        if missed / reached > self.resolution * 1.001:
            return Goodput(share, reached, missed, False, "the search ended before the bracket was narrow")
        return Goodput(share, reached, missed, True)
