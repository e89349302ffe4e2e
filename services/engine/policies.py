"""How a launch is composed: which prompts advance by how many tokens, and how many running sequences take part. Pure.

`prefill_first`: prompts come first, and running sequences wait while there are any (vLLM's original policy; the best TTFT, and the
interference that this project is about). `chunked`: every running sequence gets its token, prompts fill the rest of the budget
(Sarathi-Serve, OSDI 2024). `decode_first`: running sequences go on until none is left, prompts wait; for a prefill, where only answers
of a few tokens run. On a worker with one phase only, all do the same.

A policy sees numbers: the tokens that each ready prompt lacks, first come first served, and how many sequences could draw one more.
Whether there are pages is the scheduler's business: it shows only prompts that have theirs or could have them now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

PolicyName = Literal["prefill_first", "chunked", "decode_first"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a launch may contain, measured at start or set. Raises ValueError if that is nothing."""

    budget_tokens: int
    """Tokens at which a launch saturates the device: prompts are packed up to here."""
    chunk_tokens: int
    """The most tokens of one prompt in a launch: it bounds how long a launch takes."""
    max_batch: int = 256
    """The most running sequences in a launch; no prompt starts while there are as many."""
    growth_pages: int = 2
    """Pages a granted handoff reserves beyond those that are sent."""

    def __post_init__(self) -> None:
        if min(self.budget_tokens, self.chunk_tokens, self.max_batch) < 1 or self.growth_pages < 0:
            raise ValueError(f"a launch that can hold nothing: {self}")


LEAST_TOKENS = 16
"""Of prompts in a mixed launch: with as many running sequences as the budget has tokens, none would ever begin."""


@dataclass(frozen=True, slots=True)
class Share:
    """A launch: the first `decodes` running sequences draw a token, the i-th ready prompt computes `prefill[i]` tokens (at least one)."""

    decodes: int
    prefill: tuple[int, ...]


Policy: TypeAlias = Callable[[Sequence[int], int, Limits], Share]
"""(tokens each ready prompt lacks, running sequences, limits) → share. It is empty only if there is nothing to do."""


def prefill_first(lacking: Sequence[int], running: int, limits: Limits) -> Share:
    """The oldest prompt gets a whole chunk, even beyond the budget; others join until the device is saturated.

    A prompt that would be cut anyway takes what is left of the budget. A short one that does not fit whole waits: cut, it would end no
    sooner, and delay those before it.
    """
    if not lacking:
        return Share(min(running, limits.max_batch), ())
    prefill = [min(lacking[0], limits.chunk_tokens)]
    left = limits.budget_tokens - prefill[0]
    for tokens in lacking[1:]:
        chunk = min(tokens, limits.chunk_tokens)
        if tokens > limits.chunk_tokens:
            chunk = min(chunk, left)
        if not 0 < chunk <= left:
            break
        prefill.append(chunk)
        left -= chunk
    return Share(0, tuple(prefill))


def chunked(lacking: Sequence[int], running: int, limits: Limits) -> Share:
    """One token for every running sequence, the rest of the budget for prompts, cut to fill it; something of a prompt in any case."""
    decodes = min(running, limits.max_batch)
    left = limits.budget_tokens - decodes
    if left <= 0:
        left = min(LEAST_TOKENS, limits.budget_tokens)
    prefill: list[int] = []
    for tokens in lacking:
        if left <= 0:
            break
        prefill.append(min(tokens, limits.chunk_tokens, left))
        left -= prefill[-1]
    return Share(decodes, tuple(prefill))


def decode_first(lacking: Sequence[int], running: int, limits: Limits) -> Share:
    """No prompt stalls a running sequence; each waits until all have ended."""
    return Share(min(running, limits.max_batch), ()) if running else prefill_first(lacking, running, limits)


POLICIES: dict[PolicyName, Policy] = {"prefill_first": prefill_first, "chunked": chunked, "decode_first": decode_first}
