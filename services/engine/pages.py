"""Accounting of a pool's pages: who may use which, never what is in them. Pure.

Every page is in exactly one state: free, cached (kept for its hash, used by nobody), held (by one or more sequences) or in transit
(granted to a handoff, written by the transfer). `free + cached + held + in_transit == total`, always.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from services.engine.plan import PoolCounts
from services.engine.spans import FreePages

HASH_BYTES = 16
SPARE = 32
"""A share of the pool, one of so many: as many pages more than are lacking are evicted at a time, so that there are runs to choose from."""


def chain_hashes(fingerprint: str, ids: Sequence[int], page_tokens: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """For each full page of `ids` a 16-byte blake2b over the fingerprint and all tokens up to its end: equal hash, equal KV.

    `known`: those of the first pages, if they have been computed before; the others are returned behind them.
    """
    hashes = list(known)
    chain = hashes[-1] if hashes else hashlib.blake2b(fingerprint.encode(), digest_size=HASH_BYTES).digest()
    for start in range(len(hashes) * page_tokens, len(ids) - page_tokens + 1, page_tokens):
        tokens = array("q", ids[start : start + page_tokens]).tobytes()
        chain = hashlib.blake2b(chain + tokens, digest_size=HASH_BYTES).digest()
        hashes.append(chain)
    return hashes


class PagePool:
    """`keep_cached`: pages with a hash stay findable after their last user, until the room is needed (least recently used first).

    What breaks an invariant raises AssertionError. Nothing costs O(total) but `check`.
    """

    def __init__(self, total: int, page_tokens: int, *, keep_cached: bool = False) -> None:
        self.total = total
        self.page_tokens = page_tokens
        self._keep_cached = keep_cached
        self._free = FreePages(total)
        self._users = [0] * total
        self._in_transit: set[int] = set()
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_tokens)

    @property
    def available(self) -> int:
        """Pages that could be allocated now."""
        return len(self._free) + len(self._cached)

    @property
    def counts(self) -> PoolCounts:
        free, cached, transit = len(self._free), len(self._cached), len(self._in_transit)
        return PoolCounts(self.total, free, cached, self.total - free - cached - transit, transit)

    # ------------------------------------------------------------------------------------------------------ held pages

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """`count` pages with one user each, or None: all or nothing."""
        pages = self._take(count)
        for page in pages or ():
            self._users[page] = 1
        return pages

    def users(self, page: int) -> int:
        """How many hold the page."""
        return self._users[page]

    def retain(self, pages: Iterable[int]) -> None:
        """One more user for each of these held pages."""
        for page in pages:
            if self._users[page] < 1:
                raise AssertionError(f"page {page} is held by nobody")
            self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One user less; the last one frees the page, or leaves it cached under its hash."""
        # Backwards: the end of a prefix is to be evicted before its beginning, without which it cannot be found.
        freed = []
        for page in reversed(pages):
            if self._users[page] < 1:
                raise AssertionError(f"page {page} is released more often than held")
            self._users[page] -= 1
            if self._users[page] == 0 and not self._stays_cached(page):
                freed.append(page)
        self._free.add(freed)

    # ------------------------------------------------------------------------------------------------ pages in transit

    def reserve(self, count: int) -> tuple[int, ...] | None:
        """`count` pages for a transfer to write, or None: all or nothing."""
        pages = self._take(count)
        self._in_transit.update(pages or ())
        return pages

    def arrived(self, pages: Sequence[int]) -> None:
        """Verified: from in transit to held by one user."""
        self._end_transit(pages)
        for page in pages:
            self._users[page] = 1

    def landed(self, pages: Sequence[int]) -> None:
        """Nothing can write into these any more, and nobody wants them."""
        self._end_transit(pages)
        self._free.add(pages)

    # ---------------------------------------------------------------------------------------------------------- hashes

    def seal(self, page: int, digest: bytes) -> None:
        """A full and verified page of a sequence: it can be found by its hash from now on. The first of equals is kept."""
        if self._users[page] < 1:
            raise AssertionError(f"page {page} is sealed while nobody holds it")
        if digest not in self._page_of and page not in self._hash_of:
            self._page_of[digest] = page
            self._hash_of[page] = digest

    def known(self, digests: Iterable[bytes]) -> tuple[int, ...]:
        """Pages of the longest known prefix. Nobody uses them for that: `share` them before anything else is allocated."""
        found = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            found.append(page)
        return tuple(found)

    def idle(self, pages: Iterable[int]) -> int:
        """How many of these known pages are cached: sharing them takes as many of the available ones."""
        return sum(page in self._cached for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """One more user for each of these known pages: release them some time."""
        for page in pages:
            if page not in self._hash_of:
                raise AssertionError(f"page {page} is not known by a hash")
            self._cached.pop(page, None)
            self._users[page] += 1

    # ---------------------------------------------------------------------------------------------------------- inside

    def _end_transit(self, pages: Sequence[int]) -> None:
        if len(set(pages)) != len(pages) or not self._in_transit.issuperset(pages):
            raise AssertionError(f"not all of {pages} are in transit")
        self._in_transit.difference_update(pages)

    def _take(self, count: int) -> tuple[int, ...] | None:
        """Pages of no state: the caller gives them one at once. Cached ones go for want of free ones, the least recently used first."""
        if count > self.available:
            return None
        lacking = count - len(self._free)
        if lacking > 0:
            self._evict(min(lacking + self.total // SPARE, len(self._cached)))
        return self._free.take(count)

    def _evict(self, count: int) -> None:
        pages = [self._cached.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._unseal(page)
        self._free.add(pages)

    def _stays_cached(self, page: int) -> bool:
        """Of a page without users: whether it can still be found by its hash."""
        if self._keep_cached and page in self._hash_of:
            self._cached[page] = None
            return True
        self._unseal(page)
        return False

    def _unseal(self, page: int) -> None:
        digest = self._hash_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]

    def check(self) -> None:
        """Raises AssertionError if a page is lost, doubled or in two states."""
        free, cached = set(self._free), set(self._cached)
        held = {page for page, users in enumerate(self._users) if users}
        states = [free, cached, held, self._in_transit]
        if len(free) != len(self._free):
            raise AssertionError("a page is free twice")
        if min(self._users) < 0:
            raise AssertionError("a page has less than no users")
        if sum(map(len, states)) != self.total or set().union(*states) != set(range(self.total)):
            raise AssertionError(f"pages do not add up: {self.counts}")
        if not cached <= set(self._hash_of) <= cached | held or {page: h for h, page in self._page_of.items()} != self._hash_of:
            raise AssertionError("a hash names a page that nobody holds or caches, or a cached page has none")
