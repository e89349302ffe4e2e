"""FreePages: every page once, neighbours together, and long runs left after many requests."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.pages import PagePool
from services.engine.spans import FreePages, runs


def test_runs_of_pages() -> None:
    assert list(runs([])) == []
    assert list(runs([3])) == [(3, 4)]
    assert list(runs([0, 1, 2, 5, 7, 8])) == [(0, 3), (5, 6), (7, 9)]


def test_the_shortest_run_that_is_long_enough_is_cut() -> None:
    free = FreePages(20)
    free.take(20)
    free.add([0, 1, 2, 3, 10, 11, 12, 15])
    assert free.take(3) == (10, 11, 12)
    assert free.take(1) == (15,)
    assert free.take(3) == (0, 1, 2)


def test_no_run_is_long_enough_the_longest_go_first() -> None:
    free = FreePages(20)
    free.take(20)
    free.add([0, 1, 2, 10, 11, 15])
    assert free.take(5) == (0, 1, 2, 10, 11)


def test_freed_pages_join_their_neighbours() -> None:
    free = FreePages(6)
    pages = free.take(6)
    for page in (pages[0], pages[4], pages[2], pages[3], pages[1]):
        free.add([page])
    assert free.take(5) == pages[:5]


def test_more_than_there_are_and_twice_the_same_are_refused() -> None:
    free = FreePages(2)
    with pytest.raises(AssertionError):
        free.take(3)
    with pytest.raises(AssertionError):
        free.add([0])
    assert len(free) == 2
    assert len(FreePages(0)) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60), st.randoms(use_true_random=False))
def test_every_page_is_free_or_taken_and_runs_are_as_long_as_can_be(steps: list[tuple[bool, int]], rng: random.Random) -> None:
    free, taken = FreePages(40), set[int]()
    for adding, count in steps:
        if adding:
            back = rng.sample(sorted(taken), min(count, len(taken)))
            free.add(back)
            taken.difference_update(back)
        else:
            pages = free.take(min(count, len(free)))
            assert not taken.intersection(pages)
            taken.update(pages)
        assert len(free) == 40 - len(taken)
        assert set(free) == set(range(40)) - taken
    longest = max((end - first for first, end in runs(sorted(free))), default=0)
    assert len(list(runs(free.take(longest)))) <= 1


def test_prompts_find_neighbours_after_thousands_of_requests() -> None:
    """At 85 % use, with sequences that grow page by page: with a stack it is 1.0 page in a run."""
    rng, free, live = random.Random(1), FreePages(4000), list[list[int]]()
    pages = messages = 0
    for step in range(3000):
        while 4000 - len(free) + 260 < 3400:
            prompt = free.take(rng.randint(16, 256))
            live.append(list(prompt))
            if step > 1000:
                pages, messages = pages + len(prompt), messages + sum(1 for _ in runs(prompt))
        for sequence in list(live):
            if rng.random() < 0.3:
                sequence += free.take(1)
                if rng.random() < 0.05:
                    free.add(sequence)
                    live.remove(sequence)
    assert pages / messages > 16


def test_prompts_find_neighbours_in_a_pool_full_of_cached_pages() -> None:
    """Nothing is free but what is evicted: of just as many pages as are lacking, 1.2 would be in a run."""
    rng, pool, live = random.Random(1), PagePool(4000, 16, keep_cached=True), list[list[int]]()
    pages, messages, sealed = 0, 0, itertools.count()

    def take(count: int) -> tuple[int, ...]:
        taken = pool.allocate(count)
        assert taken is not None
        for page in taken:
            pool.seal(page, next(sealed).to_bytes(16))
        return taken

    for step in range(2000):
        while pool.counts.held + 260 < 3400:
            prompt = take(rng.randint(16, 256))
            live.append(list(prompt))
            if step > 700:
                pages, messages = pages + len(prompt), messages + sum(1 for _ in runs(prompt))
        for sequence in list(live):
            if rng.random() < 0.3:
                sequence += take(1)
                if rng.random() < 0.05:
                    pool.release(sequence)
                    live.remove(sequence)
    pool.check()
    assert pages / messages > 4


def test_a_page_inside_a_free_run_is_not_freed_again() -> None:
    free = FreePages(10)
    with pytest.raises(AssertionError, match="free twice"):
        free.add([5])
    assert len(free) == 10
