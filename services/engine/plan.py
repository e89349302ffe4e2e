"""What the scheduler, the runner and the worker tell each other. Small frozen structs; no torch, no clock. Several are made for each
sequence in each step: msgspec makes one in a tenth of a frozen dataclass's time. None can be part of a cycle, so the garbage collector
need not look at them (`gc=False`).

A step is `plan = scheduler.next(); ticket = runner.launch(plan); …; scheduler.commit(plan, runner.collect(ticket))`.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from common.messages import FinishReason, Key, Logprob, Token
from services.engine.sequence import Sequence

Handoff: TypeAlias = tuple[str, int]
"""A handoff seen from the decode: (prefill's incarnation, its number)."""


class Chunk(Struct, frozen=True, gc=False):
    """Compute KV for `ids[start : start + tokens]` of a sequence into its pages. A decode step is a chunk of one token."""

    sequence: Sequence
    start: int
    tokens: int
    draws: bool
    """The chunk ends the known ids: draw the next token from its last position."""
    index: int
    """Absolute index of the token it draws (meaningless unless `draws`)."""
    pending: bool = False
    """The chunk's input id is the one being drawn by the ticket still in flight: the runner takes it from there."""


class Plan(Struct, frozen=True, gc=False):
    """One launch: chunks of distinct sequences, in the order in which the runner packs them."""

    number: int
    chunks: tuple[Chunk, ...]
    announced: tuple[Key, ...] = ()
    """Suspects whose prompts begin in it: their gateways must know of that before it is launched."""


class Draw(Struct, frozen=True, gc=False):
    """A drawn token."""

    id: int
    logprob: Logprob | None = None


class StepOutput(Struct, frozen=True, gc=False):
    """`draws[i]` belongs to `plan.chunks[i]`; None where the chunk draws nothing."""

    draws: tuple[Draw | None, ...]


# ------------------------------------------------------------------------------- outcomes: what the worker has to know


class Began(Struct, frozen=True, gc=False):
    """A sequence is in a plan for the first time on this worker; `pages` are the ones it has now, in order.

    `reused`: tokens whose KV was in the pool already. `hashes`: of its full pages, if the engine has computed them (prefix reuse).
    """

    key: Key
    pages: tuple[int, ...]
    reused: int = 0
    hashes: tuple[bytes, ...] = ()


class Computed(Struct, frozen=True, gc=False):
    """A prefill chunk was collected: KV of the first `tokens` tokens is in place, so `tokens // page_tokens` pages are final."""

    key: Key
    tokens: int
    pages: tuple[int, ...]


class Drawn(Struct, frozen=True, gc=False):
    """A new output token. With `finish` the sequence has ended and its pages are free; a parking one otherwise keeps them."""

    key: Key
    token: Token
    finish: FinishReason | None


class Granted(Struct, frozen=True, gc=False):
    """Pages for an inbound handoff have been reserved: the first `shared` of them hold what is wanted already, the others are in transit
    from now on."""

    handoff: Handoff
    pages: tuple[int, ...]
    shared: int = 0


class Preempted(Struct, frozen=True, gc=False):
    """The sequence lost its pages to older ones; it is gone from this engine."""

    key: Key


class Failed(Struct, frozen=True, gc=False):
    """A launch raised; every sequence in it is gone from this engine."""

    key: Key
    error: str


Outcome: TypeAlias = Began | Computed | Drawn | Granted | Preempted | Failed


class PoolCounts(Struct, frozen=True, gc=False):
    """Pages by state; `free + cached + held + in_transit == total` always."""

    total: int
    free: int
    cached: int
    held: int
    in_transit: int


class Snapshot(Struct, frozen=True, gc=False):
    """The engine's state after a step, for beats, claims and metrics."""

    step: int
    """Launches collected so far."""
    in_flight: int
    """Launches not yet collected."""
    waiting: int
    """Sequences submitted and not begun."""
    unplanned_tokens: int
    """Prompt tokens of waiting and of half-prefilled sequences that no launch contains yet."""
    running: int
    parked: int
    inbound: int
    """Handoffs in line or in transit."""
    pool: PoolCounts
    looked_up: int = 0
    """Prompt tokens that were looked up in the pool so far (prefix reuse), those of offers included."""
    reused: int = 0
    """Those of them that were found, and so not computed or not sent again."""
