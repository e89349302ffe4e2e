"""When requests are due: pure, from a seed. Times are seconds since the start of a trial, ascending.

The generator is open-loop: a request is due at its time whether or not earlier ones have been answered.
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def gamma(count: int, rate: float, cv: float, seed: int) -> list[float]:
    """Renewal arrivals, `rate` a second in the mean, with gaps of this coefficient of variation.

    Gaps are gamma distributed with shape 1/cv² and mean 1/rate: cv 1 is Poisson, 0 a metronome, more is burstier.
    """
    if rate <= 0 or cv < 0:
        raise ValueError(f"rate {rate} and cv {cv}: a positive rate and no negative cv are needed")
    if cv == 0:
        return [number / rate for number in range(count)]
    draw = random.Random(seed)
    shape = 1 / cv**2
    at, times = 0.0, []
    for _ in range(count):
        times.append(at)
        at += draw.gammavariate(shape, 1 / (rate * shape))
    return times


def replay(times: Sequence[float], count: int, rate: float, seed: int) -> list[float]:
    """The first `count` arrivals of a trace, its clock scaled so that they come `rate` a second in the mean.

    Traces with coarse clocks give many requests one time: these are spread evenly at random up to the next time.
    """
    own = sorted(times)[: count + 1]
    if len(own) < 2:
        raise ValueError("a trace needs two arrivals at least")
    draw = random.Random(seed)
    steps = sorted(set(own))
    later = dict(zip(steps, [*steps[1:], steps[-1]], strict=True))
    tied = {at: own.count(at) > 1 for at in steps}
    spread = sorted(draw.uniform(at, later[at]) if tied[at] else at for at in own)[:count]
    first, last = spread[0], spread[-1]
    scale = (len(spread) - 1) / rate / (last - first) if last > first else 0.0
    return [(at - first) * scale for at in spread]
