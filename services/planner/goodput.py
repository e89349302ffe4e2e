"""The goodput of a placement: the highest rate whose joint attainment reaches the share, by search over trials. With an interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev
from typing import TypeAlias

from common.slo import Objectives
from services.planner.costs import Costs
from services.planner.placement import Disaggregated, PrefillOnly, Simulated
from services.planner.requests import Ask
from services.planner.trial import Verdict, Window, run

Source: TypeAlias = Callable[[int, int], Sequence[Ask]]
"""(requests, seed) → asks at one request a second. More requests of the same seed begin with the same ones."""
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for a two-sided 95 % interval of the mean of so many figures."""
LEAST, MOST = 300, 2000
"""Requests that a trial judges."""
COARSE, FINE = 1.5, 2.0
"""Times `settle_s` over which a trial judges."""
FIRST_STEP = 1.3
FLOOR = 1 / 300
"""Of the first rate: below it the goodput counts as 0."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a placement is judged by. `share` of the requests must meet both objectives."""

    source: Source
    objectives: Objectives
    share: float
    mean_input_tokens: float
    mean_output_tokens: float

    @property
    def settle_s(self) -> float:
        """How long a request stays at most, in the mean, if it attains: the time in which a system fills.

        Overload shows late: with half of this, a decode of the 13B model seems half as fast again as it is.
        """
        return self.objectives.ttft_s + self.mean_output_tokens * self.objectives.tpot_s


@dataclass(frozen=True, slots=True)
class Rated:
    """Requests/s of the whole placement: the mean over `seeds`, and a 95 % interval of it (t-distribution over the seeds' figures).

    With one seed the interval is the last bracket of the search, and says nothing about chance.
    """

    where: Simulated
    goodput: float
    low: float
    high: float
    seeds: tuple[float, ...]

    @property
    def per_device(self) -> float:
        return self.goodput / self.where.devices


def differ(one: Rated, two: Rated) -> bool:
    """Whether the goodput per device of two placements differs by more than chance: a paired t-test at 95 % over their common seeds."""
    gaps = [a / one.where.devices - b / two.where.devices for a, b in zip(one.seeds, two.seeds, strict=True)]
    if len(gaps) < 2:
        return False
    return abs(fmean(gaps)) > T95.get(len(gaps), 2.0) * stdev(gaps) / math.sqrt(len(gaps))


def window(where: Simulated, wanted: Wanted, rate: float, span: float) -> Window:
    """Enough requests to fill the system first, and to judge it over `span` times as long."""
    filling = math.ceil(rate * wanted.objectives.ttft_s * 4 if isinstance(where, PrefillOnly) else rate * wanted.settle_s)
    return Window(min(MOST // 2, max(30, filling)), min(MOST, max(LEAST, math.ceil(span * filling))))


def rated(
    costs: Costs,
    where: Simulated,
    wanted: Wanted,
    start: float,
    *,
    seeds: Sequence[int] = (1,),
    resolution: float = 1.04,
    span: float = FINE,
    ceiling: float = math.inf,
) -> Rated:
    """Search from `start` requests/s until a missed and a reached rate are within the factor `resolution`, for each seed.

    What reaches `ceiling` requests/s is not searched beyond.
    """
    units = where.units if isinstance(where, Disaggregated) else 1
    figures, low, high = [], 0.0, 0.0
    rate, most = min(start, ceiling) / units, ceiling / units
    for number, seed in enumerate(seeds):
        reached = partial(_reached, costs, where, wanted, seed, span)
        low, high = bracket(reached, rate, FIRST_STEP if number == 0 else resolution**2, resolution, most)
        figures.append(low * units)
        rate = low or rate
    mean = fmean(figures)
    if len(figures) == 1:
        return Rated(where, mean, low * units, high * units, tuple(figures))
    spread = T95.get(len(figures), 2.0) * stdev(figures) / math.sqrt(len(figures))
    # A figure is known only to within the bracket: that is part of what is not known.
    return Rated(where, mean, max(0.0, mean - spread), (mean + spread) * resolution, tuple(figures))


def reaches(costs: Costs, where: Simulated, wanted: Wanted, rate: float, seed: int = 1) -> bool:
    """One trial: whether the placement reaches the share at so many requests/s."""
    return _reached(costs, where, wanted, seed, COARSE, rate / (where.units if isinstance(where, Disaggregated) else 1))


def curve(costs: Costs, where: Simulated, wanted: Wanted, rates: Sequence[float], seed: int = 1) -> list[Verdict]:
    """Whole trials at these rates (requests/s of the whole placement), for a plot."""
    units = where.units if isinstance(where, Disaggregated) else 1
    return [_trial(costs, where, wanted, rate / units, seed, FINE, whole=True) for rate in rates]


def bracket(
    reached: Callable[[float], bool], start: float, ladder: float, resolution: float, most: float = math.inf
) -> tuple[float, float]:
    """(highest rate that reached, lowest that missed) with high / low ≤ `resolution`; (0, that) if none down to `FLOOR` times `start`.

    At `most` the search ends: (most, most) if it reached.
    """
    low, high, rate = 0.0, math.inf, start
    while not low or high / low > resolution:
        if reached(rate):
            low = rate
        else:
            high = rate
        if not low and high < start * FLOOR:
            break
        if math.isinf(high):
            if low >= most:
                return low, low
            rate = min(low * ladder, most)
        elif not low:
            rate = high / ladder
        else:
            rate = math.sqrt(low * high)
        ladder *= 1.2  # a start that was far off is left behind faster and faster
    return low, high


def _reached(costs: Costs, where: Simulated, wanted: Wanted, seed: int, span: float, rate: float) -> bool:
    return _trial(costs, where, wanted, rate, seed, span).reached


def _trial(costs: Costs, where: Simulated, wanted: Wanted, rate: float, seed: int, span: float, *, whole: bool = False) -> Verdict:
    judged = window(where, wanted, rate, span)
    asks = wanted.source(2 * judged.skip + judged.count, seed)
    # A trace may have fewer requests than are wanted: what there is, with the same parts.
    if len(asks) < 2 * judged.skip + judged.count:
        judged = Window(len(asks) // 10, len(asks) * 8 // 10)
    return run(costs, where, asks, judged, rate, wanted.objectives, wanted.share, seed=seed, whole=whole)
