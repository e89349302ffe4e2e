"""Late binding: how much of the queue a worker wants now, what a prefill keeps, and which decode an offer goes to. Pure; workers and
simulator ask alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import TypeVar

from services.engine.plan import Snapshot

T = TypeVar("T")


def prefill_wants(snapshot: Snapshot, unbegun: int, budget_tokens: int, stages: int = 1) -> int:
    """Prompt tokens that a prefill would take from the queue; 0 or less: none. `unbegun`: claimed and in no launch yet.

    While a launch is under way (one for each stage of the model) and nothing is left to plan behind it, an idle prefill elsewhere is the
    better place for a new job.
    """
    if unbegun or snapshot.pool.free + snapshot.pool.cached == 0:
        return 0
    if snapshot.in_flight >= stages and not snapshot.unplanned_tokens:
        return 0
    return budget_tokens - snapshot.unplanned_tokens


def colocated_wants(snapshot: Snapshot, unbegun: int, budget_tokens: int, max_batch: int) -> int:
    """The same for a worker of both phases: room in the next launch, while there are pages and places in the batch."""
    full = snapshot.pool.free + snapshot.pool.cached == 0 or snapshot.running >= max_batch
    if unbegun or full:
        return 0
    return budget_tokens - snapshot.unplanned_tokens


def stays(left_tokens: int, choices: int, short_tokens: int) -> bool:
    """Whether a prefill writes the answer itself. A handoff lengthens one gap between tokens, and an answer of few tokens has no others to
    make up for it. Answers with further choices go: those share the prompt's pages on the decode."""
    return choices == 1 and left_tokens <= short_tokens


def less_loaded(candidates: Many[T], load: Callable[[T], tuple[int, int]], rng: random.Random) -> T:
    """The less loaded of two picked at random: the power of two choices (Mitzenmacher, 2001)."""
    return min(rng.sample(candidates, min(2, len(candidates))), key=load)
