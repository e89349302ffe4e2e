"""One choice of one request inside the engine: its ids, how far its KV is computed, and the pages that hold it. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.messages import FinishReason, Key, Sampling


@dataclass(eq=False)
class Sequence:
    """`ids` are prompt ids followed by output ids, the accepted ones of earlier attempts included."""

    key: Key
    ids: list[int]
    prompt_tokens: int
    """Length of the prompt proper: `ids[prompt_tokens:]` are output tokens, the next one has index `len(ids) - prompt_tokens`."""
    sampling: Sampling
    max_tokens: int
    """Output tokens in all, accepted ones included."""
    stop_ids: frozenset[int] = frozenset()
    order: float = 0.0
    """Moment of acceptance at the gateway on this host's clock. First come, first served; preemption takes the largest."""
    parks: bool = False
    """On a prefill: after its first token the sequence stops, and keeps its pages until `release`."""
    reserve_all: bool = False
    """Reserve pages for everything it may ever need before it starts; such a sequence is never preempted."""
    suspect: bool = False
    """Workers died with it: the first launch of its prompt waits until its gateway knows of it."""
    alone: bool = False
    """Starts only when nothing else runs, and nothing else starts beside it."""
    computed: int = 0
    """Tokens whose KV has been computed and collected."""
    planned: int = 0
    """Tokens whose KV is computed or being computed by a launch under way."""
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    """Chain hashes of its first full pages, as far as anybody asked for them."""
    reused: int = 0
    """Tokens whose KV was in the pool already when it began."""
    began: bool = False
    forks: tuple[Sequence, ...] = ()
    """Further choices of the request: they start on the prompt's pages as soon as all of these are computed here."""

    @property
    def index(self) -> int:
        """Absolute index of the next output token."""
        return len(self.ids) - self.prompt_tokens

    @property
    def most_tokens(self) -> int:
        """Tokens of KV it can need at most: the last output token's KV is never computed."""
        return self.prompt_tokens + self.max_tokens - 1

    def ends_with(self, token: int) -> FinishReason | None:
        """Why the sequence ends once `token` has been appended, or None."""
        if token in self.stop_ids:
            return "stop"
        return "length" if len(self.ids) - self.prompt_tokens >= self.max_tokens else None
