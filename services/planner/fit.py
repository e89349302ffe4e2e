"""Least squares for the latency model: non-negative coefficients, relative errors. Pure, three unknowns, no libraries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from services.planner.latency import Coefficients

Row = tuple[float, float, float]
"""(x, y, seconds)."""
LEAST = 4
"""Points on either side of a knee."""
ENOUGH = 0.005
"""A relative error that needs no knee."""
GAIN = 0.7
"""A knee is kept if it lowers the squared error to this share or less."""


class FitError(ValueError):
    """The points do not determine the model; one line that says what is missing."""


@dataclass(frozen=True, slots=True)
class Fit:
    """`worst` and `mean`: relative errors over the points that were fitted (0.02 is 2 %)."""

    small: Coefficients
    large: Coefficients | None
    knee: int
    worst: float
    mean: float


def fit(rows: Sequence[Row]) -> Coefficients:
    """a + b·x + c·y with none below 0, least sum of squared relative errors. Raises FitError without points of positive time."""
    if not rows or min(seconds for _, _, seconds in rows) <= 0:
        raise FitError("points with a time above 0 are needed")
    columns = [[1.0] * len(rows), [row[0] for row in rows], [row[1] for row in rows]]
    best: tuple[float, list[float]] | None = None
    # Of so few coefficients every subset can be tried; the best feasible one is the non-negative optimum.
    for size in (1, 2, 3):
        for chosen in combinations(range(3), size):
            found = _solve([columns[i] for i in chosen], [row[2] for row in rows])
            if found is None or min(found) < 0:
                continue
            values = [0.0, 0.0, 0.0]
            for i, value in zip(chosen, found, strict=True):
                values[i] = value
            error = _squared(Coefficients(*values), rows)
            if best is None or error < best[0] * (1 - 1e-9):
                best = (error, values)
    assert best is not None, "a constant alone is always feasible"
    return Coefficients(*best[1])


def fit_one(rows: Sequence[Row]) -> Fit:
    """One set of coefficients over all points."""
    found = fit(rows)
    return Fit(found, None, 0, *_errors((found, row) for row in rows))


def fit_decode(rows: Sequence[Row]) -> Fit:
    """Points (Σcontext, B, seconds), with a knee between two batch sizes if that explains them much better."""
    whole = fit(rows)
    best, error = Fit(whole, None, 0, *_errors((whole, row) for row in rows)), _squared(whole, rows)
    if best.worst <= ENOUGH:
        return best
    for knee in sorted({int(row[1]) for row in rows})[1:]:
        below, above = [row for row in rows if row[1] < knee], [row for row in rows if row[1] >= knee]
        if min(len(below), len(above)) < LEAST:
            continue
        small, large = fit(below), fit(above)
        split = _squared(small, below) + _squared(large, above)
        if split <= GAIN * error:
            error = split
            best = Fit(small, large, knee, *_errors([*((small, row) for row in below), *((large, row) for row in above)]))
    return best


def _squared(model: Coefficients, rows: Iterable[Row]) -> float:
    return sum((model.seconds(x, y) / seconds - 1) ** 2 for x, y, seconds in rows)


def _errors(pairs: Iterable[tuple[Coefficients, Row]]) -> tuple[float, float]:
    errors = [abs(model.seconds(x, y) / seconds - 1) for model, (x, y, seconds) in pairs]
    return max(errors), sum(errors) / len(errors)


def _solve(columns: list[list[float]], seconds: list[float]) -> list[float] | None:
    """Normal equations of the relative residuals by elimination; None if the columns do not determine them."""
    scales = [max(map(abs, column)) or 1.0 for column in columns]
    scaled = [[value / scale / s for value, s in zip(column, seconds, strict=True)] for column, scale in zip(columns, scales, strict=True)]
    size = len(scaled)
    matrix = [[sum(p * q for p, q in zip(one, two, strict=True)) for two in scaled] + [sum(one)] for one in scaled]
    for i in range(size):
        pivot = max(range(i, size), key=lambda k: abs(matrix[k][i]))
        if abs(matrix[pivot][i]) < 1e-9 * max(matrix[k][k] for k in range(size)) or matrix[pivot][i] == 0:
            return None
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        for k in range(size):
            if k != i:
                factor = matrix[k][i] / matrix[i][i]
                matrix[k] = [a - factor * b for a, b in zip(matrix[k], matrix[i], strict=True)]
    return [matrix[i][size] / matrix[i][i] / scales[i] for i in range(size)]
