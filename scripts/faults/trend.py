"""The slope of a series with its upper bound: does a process' memory grow? Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

BLOCKS = 20
T_95 = 1.734
"""One-sided 95 % quantile of Student's t with BLOCKS − 2 degrees of freedom."""


@dataclass(frozen=True)
class Trend:
    """Units an hour: the least-squares slope, and the upper bound of its one-sided 95 % interval."""

    slope: float
    upper: float


def trend(series: Sequence[tuple[float, float]]) -> Trend | None:
    """Of (seconds, value), ascending. Neighbouring samples of a process' memory are not independent, so the line is drawn through the means
    of BLOCKS stretches, whose residuals give the bound (Draper & Smith, Applied Regression Analysis, 3rd ed., section 1.4). None with too
    few samples."""
    if len(series) < 2 * BLOCKS:
        return None
    points = []
    for number in range(BLOCKS):
        block = series[number * len(series) // BLOCKS : (number + 1) * len(series) // BLOCKS]
        points.append((statistics.fmean(at for at, _ in block) / 3600, statistics.fmean(value for _, value in block)))
    x0, y0 = (statistics.fmean(column) for column in zip(*points, strict=True))
    spread = sum((x - x0) ** 2 for x, _ in points)
    if spread == 0:
        return None
    slope = sum((x - x0) * (y - y0) for x, y in points) / spread
    residual = sum((y - y0 - slope * (x - x0)) ** 2 for x, y in points)
    return Trend(slope, slope + T_95 * (residual / (BLOCKS - 2) / spread) ** 0.5)
