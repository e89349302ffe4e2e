"""The rate at which attainment falls below a share, from trials at several rates, with its interval. Pure.

Attainment falls with the rate, trials scatter: the non-increasing curve with the least squared distance to them (pool adjacent violators,
Ayer et al., 1955) is read where it crosses the share, by interpolation in the logarithm of the rate.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Asked:
    """A trial: `hits` of `asked` requests attained at so many requests/s."""

    rate: float
    hits: float
    asked: int


@dataclass(frozen=True, slots=True)
class Crossing:
    """`rate`: requests/s, with a 95 % interval. 0: below the lowest rate that was tried; `open`: it may lie above the highest."""

    rate: float
    low: float
    high: float
    open: bool


def crossing(trials: Sequence[Asked], share: float, seed: int = 1) -> Crossing:
    """The interval: percentiles over attainments drawn from each trial's posterior (Jeffreys'). Raises ValueError without trials."""
    rng = random.Random(seed)
    drawn = sorted(
        crossed(
            [Asked(one.rate, one.asked * rng.betavariate(one.hits + 0.5, one.asked - one.hits + 0.5), one.asked) for one in trials], share
        )
        for _ in range(DRAWS)
    )
    low, high = drawn[int(0.025 * DRAWS)], drawn[int(0.975 * DRAWS)]
    return Crossing(crossed(trials, share), low, high, high >= max(one.rate for one in trials))


def crossed(trials: Sequence[Asked], share: float) -> float:
    """The highest rate at which the falling curve through the trials is not below the share; 0 if it is nowhere."""
    points = falling(trials)
    if points[0][1] < share:
        return 0.0
    for (rate, above), (further, below) in pairwise(points):
        if below < share:
            part = (above - share) / (above - below)
            return math.exp(math.log(rate) + part * math.log(further / rate))
    return points[-1][0]


def falling(trials: Sequence[Asked]) -> list[tuple[float, float]]:
    """(rate, attainment) for each rate, ascending; trials at the same rate are one."""
    if not trials:
        raise ValueError("no trials")
    blocks: list[tuple[float, int, list[float]]] = []  # hits, asked, rates
    for rate in sorted({one.rate for one in trials}):
        same = [one for one in trials if one.rate == rate]
        blocks.append((sum(one.hits for one in same), sum(one.asked for one in same), [rate]))
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] < blocks[-1][0] * blocks[-2][1]:
            hits, asked, rates = blocks.pop()
            before = blocks.pop()
            blocks.append((before[0] + hits, before[1] + asked, before[2] + rates))
    return [(rate, hits / asked) for hits, asked, rates in blocks for rate in rates]
