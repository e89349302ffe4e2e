"""What is known of an execution on its way from this prefill to a decode. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.messages import Granted, Incarnation, Job, Key, Offer, Pushed, Token


@dataclass(eq=False)
class Handoff:
    """One offer to one decode."""

    number: int
    peer: Incarnation
    offer: Offer
    offered_at: float
    asked_at: float
    in_line: bool = False
    """The decode has said that it waits there."""
    counted: bool = False
    """And has beaten since: its beats count it as waiting."""
    granted: Granted | None = None
    pushed: int = 0
    """Pages given to `Push`, from the first on."""
    finished: bool = False
    """All pages are given to `Push`. `Sent` or `PushFailed` follows: how long a busy link may take, only the transfer can judge."""
    word: Pushed | None = None
    """Said once all pages have left; repeated until judged."""
    word_at: float = 0.0
    flushed: bool = False


@dataclass(eq=False)
class Going:
    """An execution on its way to a decode."""

    key: Key
    job: Job
    length: int
    hashes: list[bytes]
    began_at: float
    pages: tuple[int, ...] = ()
    final_pages: int = 0
    """Pages whose KV no chunk will touch again."""
    first: Token | None = None
    first_at: float = 0.0
    handoff: Handoff | None = None
    avoid: set[Incarnation] = field(default_factory=set)
    failures: int = 0
    """See FAILURES (services/prefill/handoffs.py). Deaths and refusals do not count."""
