"""From measured prefill rates to a launch's token limits: what `calibrate` measures and the planner predicts. Pure."""

from __future__ import annotations

from collections.abc import Mapping

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
NEAR_BEST = 0.9
"""A length saturates the device if its rate is this close to the best seen."""


def saturating(rates: Mapping[int, float]) -> int:
    """The shortest length, in tokens, whose rate (tokens/s) is near the best of all. `rates` ascend by length."""
    best = max(rates.values())
    return next(length for length, rate in rates.items() if rate >= NEAR_BEST * best)


def chunk_within(chunk_s: float, best: float, page_tokens: int) -> int:
    """Whole pages' worth of tokens that take about `chunk_s` at the rate `best`, with some slack; at least one page."""
    return max(page_tokens, int(best * chunk_s * NEAR_BEST) // page_tokens * page_tokens)
