"""Prefix reuse: full pages of a pool that are found by their tokens, so that a beginning which was computed once is shared. Pure."""

from __future__ import annotations

from services.engine.pages import PagePool, chain_hashes
from services.engine.sequence import Sequence


class Prefixes:
    """What a pool remembers. `fingerprint`: of what is computed; equal tokens under another one are not equal pages."""

    def __init__(self, pool: PagePool, fingerprint: str) -> None:
        self._pool = pool
        self._fingerprint = fingerprint

    def known(self, sequence: Sequence, tokens: int) -> tuple[int, ...]:
        """Pages of its longest known beginning, of at most so many tokens. The caller shares them."""
        pages = tokens // self._pool.page_tokens
        if len(sequence.hashes) < pages:
            self._hash(sequence)
        return self._pool.known(sequence.hashes[:pages])

    def remember(self, sequence: Sequence, since: int) -> None:
        """Pages that are full since a launch that began at token `since` and has been collected, or whose pages were verified: they can
        be found from now on."""
        size = self._pool.page_tokens
        full = sequence.computed // size
        if len(sequence.hashes) < full:
            self._hash(sequence)
        for at in range(since // size, full):
            self._pool.seal(sequence.pages[at], sequence.hashes[at])

    def _hash(self, sequence: Sequence) -> None:
        sequence.hashes = chain_hashes(self._fingerprint, sequence.ids, self._pool.page_tokens, sequence.hashes)
