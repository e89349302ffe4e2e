"""PagePool: every page in one state, references counted, hashes found only while they are true."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.engine.pages import PagePool, chain_hashes


def test_a_chain_covers_the_fingerprint_every_earlier_token_and_full_pages_only() -> None:
    ids = list(range(40))
    chain = chain_hashes("model", ids, 16)
    assert [len(digest) for digest in chain] == [16, 16]
    assert chain_hashes("model", ids[:32], 16) == chain
    assert chain_hashes("model", ids[:31], 16) == chain[:1]
    assert chain_hashes("model", [*ids[:39], 7], 16) == chain
    other = chain_hashes("model", [99, *ids[1:]], 16)
    assert not set(other) & set(chain)
    assert not set(chain_hashes("other", ids, 16)) & set(chain)
    assert chain_hashes("model", [], 16) == []


def test_hashes_depend_on_order_and_are_not_confused_by_page_boundaries() -> None:
    assert chain_hashes("m", [1, 2], 2) != chain_hashes("m", [2, 1], 2)
    assert chain_hashes("m", [1, 256], 2) != chain_hashes("m", [1 + (256 << 32), 0], 2)
    assert chain_hashes("m", [1, 2, 3, 4], 2)[-1] != chain_hashes("m", [1, 2, 3, 4], 4)[-1]


def test_a_fresh_pool_gives_neighbours() -> None:
    assert PagePool(8, 16).allocate(4) == (0, 1, 2, 3)


def test_all_or_nothing() -> None:
    pool = PagePool(4, 16)
    assert pool.allocate(3) is not None
    assert pool.allocate(2) is None
    assert pool.reserve(2) is None
    assert pool.counts.free == 1
    pool.check()


def test_a_page_is_free_with_its_last_user() -> None:
    pool = PagePool(2, 16)
    pages = pool.allocate(2)
    assert pages is not None
    pool.retain(pages)
    pool.release(pages)
    assert pool.counts.held == 2
    pool.release(pages)
    assert pool.counts.free == 2


@pytest.mark.parametrize("verb", ["release", "retain", "arrived", "landed", "seal"])
def test_what_is_not_held_or_not_in_transit_is_refused(verb: str) -> None:
    pool = PagePool(2, 16)
    with pytest.raises(AssertionError):
        pool.seal(0, b"") if verb == "seal" else getattr(pool, verb)((0,))
    pool.check()


def test_pages_in_transit_belong_to_nobody_until_they_arrive_or_land() -> None:
    pool = PagePool(4, 16)
    pages = pool.reserve(3)
    assert pages is not None and pool.counts.in_transit == 3
    with pytest.raises(AssertionError):
        pool.release(pages)
    pool.arrived(pages[:1])
    pool.landed(pages[1:])
    assert (pool.counts.held, pool.counts.free, pool.counts.in_transit) == (1, 3, 0)
    pool.check()


def test_sealed_pages_are_found_as_a_prefix_and_gain_a_user() -> None:
    pool = PagePool(4, 2)
    chain = chain_hashes("m", range(6), 2)
    pages = pool.allocate(3)
    assert pages is not None
    pool.seal(pages[0], chain[0])
    pool.seal(pages[2], chain[2])
    assert pool.known(chain) == pages[:1] and pool.users(pages[0]) == 1
    pool.share(pages[:1])
    assert pool.users(pages[0]) == 2 and pool.users(pages[2]) == 1


def test_without_caching_a_hash_goes_with_its_last_user() -> None:
    pool = PagePool(4, 2)
    page = pool.allocate(1)
    assert page is not None
    pool.seal(page[0], b"hash")
    pool.release(page)
    assert pool.known([b"hash"]) == () and pool.counts.free == 4


def test_with_caching_the_end_of_the_least_recently_used_prefix_goes_first() -> None:
    pool = PagePool(4, 2, keep_cached=True)
    old, new = pool.allocate(2), pool.allocate(2)
    assert old is not None and new is not None
    for pages, name in ((old, b"old"), (new, b"new")):
        for page, at in zip(pages, (b"0", b"1"), strict=True):
            pool.seal(page, name + at)
    pool.release(old)
    pool.release(new)
    assert pool.counts.cached == 4 and pool.available == 4
    assert pool.allocate(1) == (old[1],)
    assert pool.known([b"old0", b"old1"]) == (old[0],) and pool.idle(old[:1] + new) == 3
    pool.share(old[:1])
    assert pool.counts.cached == 2 and pool.idle(old[:1] + new) == 2
    with pytest.raises(AssertionError):
        pool.share(old[1:])
    pool.check()


class PoolMachine(RuleBasedStateMachine):
    """The pool against a model that only counts users and remembers which hash was sealed first."""

    @initialize(total=st.integers(1, 12), keep_cached=st.booleans())
    def start(self, total: int, keep_cached: bool) -> None:
        self.pool = PagePool(total, 4, keep_cached=keep_cached)
        self.keep_cached = keep_cached
        self.users: Counter[int] = Counter()
        self.transit: set[int] = set()
        self.sealed: dict[int, bytes] = {}

    def taken(self, pages: tuple[int, ...] | None, count: int, before: int) -> tuple[int, ...]:
        assert (pages is None) == (count > before)
        pages = pages or ()
        assert len(set(pages)) == len(pages) and not set(pages) & (self.transit | set(+self.users))
        for page in pages:
            self.sealed.pop(page, None)
        return pages

    @rule(count=st.integers(0, 6))
    def allocate(self, count: int) -> None:
        before = self.pool.available
        self.users.update(self.taken(self.pool.allocate(count), count, before))

    @rule(count=st.integers(0, 6))
    def reserve(self, count: int) -> None:
        before = self.pool.available
        self.transit |= set(self.taken(self.pool.reserve(count), count, before))

    @precondition(lambda self: +self.users)
    @rule(data=st.data(), more=st.booleans())
    def retain_or_release(self, data: st.DataObject, more: bool) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(+self.users)), unique=True))
        if more:
            self.pool.retain(pages)
            self.users.update(pages)
            return
        self.pool.release(pages)
        self.users.subtract(pages)
        for page in pages:
            if not self.users[page] and not self.keep_cached:
                self.sealed.pop(page, None)

    @precondition(lambda self: self.transit)
    @rule(data=st.data(), arrived=st.booleans())
    def end_transit(self, data: st.DataObject, arrived: bool) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(self.transit)), unique=True))
        if arrived:
            self.pool.arrived(pages)
            self.users.update(pages)
        else:
            self.pool.landed(pages)
        self.transit -= set(pages)

    @precondition(lambda self: +self.users)
    @rule(data=st.data(), digest=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def seal(self, data: st.DataObject, digest: bytes) -> None:
        page = data.draw(st.sampled_from(sorted(+self.users)))
        self.pool.seal(page, digest)
        if digest not in self.sealed.values():
            self.sealed.setdefault(page, digest)

    @rule(digests=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), unique=True))
    def share(self, digests: list[bytes]) -> None:
        pages = self.pool.known(digests)
        where = {digest: page for page, digest in self.sealed.items()}
        known = [where.get(digest) for digest in [*digests, b"unknown"]]
        assert list(pages) == known[: known.index(None)]
        assert self.pool.idle(pages) == sum(not self.users[page] for page in pages)
        self.pool.share(pages)
        self.users.update(pages)

    @invariant()
    def adds_up(self) -> None:
        self.pool.check()
        counts = self.pool.counts
        assert counts.free + counts.cached + counts.held + counts.in_transit == counts.total
        assert (counts.held, counts.in_transit) == (len(+self.users), len(self.transit))
        assert all(self.pool.users(page) == self.users[page] for page in range(counts.total))
        assert counts.cached == sum(not self.users[page] for page in self.sealed)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
