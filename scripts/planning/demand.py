"""A workload as the planner wants it: lengths and arrival times at one request a second, from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import fmean

from common.slo import Objectives
from scripts.load.arrivals import gamma, replay
from scripts.load.workloads import Shape, Workload, WorkloadError
from services.planner.goodput import Source, Wanted
from services.planner.requests import Ask

CHARACTERS = 3
"""Of a token, where a workload has text instead of lengths: no tokenizer is loaded here."""
WINDOWS = 8
"""A trace is cut into so many places to begin at, one for each seed."""

Draw = Callable[[int], list[Shape]]


def wanted(workload: Workload, objectives: Objectives, share: float, cv: float) -> Wanted:
    """Raises WorkloadError if there are too few requests to tell anything."""
    shapes = [measured(shape) for shape in workload.shapes]
    if len(shapes) < 30:
        raise WorkloadError(f"{workload.name}: {len(shapes)} requests are too few to plan with")
    return of(shapes, traced(shapes) if workload.timed else drawn(shapes, cv), objectives, share)


def of(shapes: Sequence[Shape], source: Source, objectives: Objectives, share: float) -> Wanted:
    inputs, outputs = fmean(shape.input_tokens for shape in shapes), fmean(shape.output_tokens for shape in shapes)
    return Wanted(source, objectives, share, inputs, outputs)


def measured(shape: Shape) -> Shape:
    """With a prompt length, estimated if only its text is known."""
    if shape.input_tokens or shape.text is None:
        return shape
    return Shape(max(1, len(shape.text) // CHARACTERS), max(2, shape.output_tokens), shape.at_s)


def drawn(shapes: Sequence[Shape], cv: float) -> Source:
    """Requests drawn at random, with gamma-distributed gaps."""

    @lru_cache(maxsize=8)
    def all_of(count: int, seed: int) -> tuple[Ask, ...]:
        draw = random.Random(f"lengths {seed}")
        picked = [shapes[draw.randrange(len(shapes))] for _ in range(count)]
        times = gamma(count, 1.0, cv, seed)
        return tuple(Ask(at, shape.input_tokens, shape.output_tokens) for at, shape in zip(times, picked, strict=True))

    # Rounded up, so that trials at neighbouring rates share one list.
    return lambda count, seed: all_of(-(-count // 1000) * 1000, seed)[:count]


def traced(shapes: Sequence[Shape]) -> Source:
    """Requests in the order and at the times of a trace, its clock scaled; each seed begins at another place of it. Behind its end it
    begins again: a trial may want more requests than it has."""
    ordered = sorted(shapes, key=lambda shape: shape.at_s or 0.0)
    first, last = ordered[0].at_s or 0.0, ordered[-1].at_s or 0.0
    lap_s = (last - first) * len(ordered) / (len(ordered) - 1)

    def at(number: int) -> float:
        return (ordered[number % len(ordered)].at_s or 0.0) + number // len(ordered) * lap_s

    @lru_cache(maxsize=64)
    def source(count: int, seed: int) -> tuple[Ask, ...]:
        begin = min((seed - 1) % WINDOWS * len(ordered) // WINDOWS, max(0, len(ordered) - count - 1))
        numbers = range(begin, begin + count + 1)
        part = [ordered[number % len(ordered)] for number in numbers]
        times = replay([at(number) for number in numbers], count, 1.0, seed)
        return tuple(Ask(at, shape.input_tokens, shape.output_tokens) for at, shape in zip(times, part, strict=False))

    return source
