"""Token budgets from a measurement at start: how long a prompt saturates this device, and how long a chunk may be."""

from __future__ import annotations

import time
from dataclasses import dataclass

from common.messages import Key, Sampling
from services.engine.budgets import LENGTHS, chunk_within, saturating
from services.engine.engine import Runner
from services.engine.plan import Chunk, Plan
from services.engine.sequence import Sequence

BUDGET_S = 2.0
"""The measurement stops growing once it has taken this long."""
LONGEST_STEP_S = 15.0
"""A launch that takes longer counts as hung (and never less than many chunks' time: machines stutter)."""
SLACK = 20


@dataclass(frozen=True, slots=True)
class Budgets:
    """`rate` is in prompt tokens per second."""

    budget_tokens: int
    chunk_tokens: int
    longest_step_s: float
    rate: float


def measure(runner: Runner, page_tokens: int, most_tokens: int, chunk_s: float, *, every_twice: bool = False) -> Budgets:
    """Time prompts of growing length, `most_tokens` at most, on an idle engine. Uses the pool's first pages, before anybody else does.

    The first one runs before it is timed, and `every_twice` each: on a GPU the first run of a length compiles kernels and takes memory.
    """
    rates: dict[int, float] = {}
    spent = 0.0
    for length in [length for length in LENGTHS if length <= most_tokens] or [most_tokens]:
        if rates and (spent > BUDGET_S or spent + 2 * length / max(rates.values()) > 2 * BUDGET_S):
            break
        if every_twice or not rates:
            _time(runner, length, page_tokens)
        taken = _time(runner, length, page_tokens)
        spent += taken
        rates[length] = length / taken
    best = max(rates.values())
    return Budgets(saturating(rates), chunk_within(chunk_s, best, page_tokens), max(LONGEST_STEP_S, SLACK * chunk_s), best)


def _time(runner: Runner, length: int, page_tokens: int) -> float:
    sequence = Sequence(Key("calibration", 0, 0, ""), [0] * length, length, Sampling(temperature=0), 1)
    sequence.pages = list(range(-(-length // page_tokens)))
    before = time.perf_counter()
    runner.collect(runner.launch(Plan(0, (Chunk(sequence, 0, length, draws=True, index=0),))))
    return time.perf_counter() - before
