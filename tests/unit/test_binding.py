"""Late binding: who wants how much of the queue, and where an offer goes."""

from __future__ import annotations

import random
from collections import Counter

from services.engine.binding import colocated_wants, less_loaded, prefill_wants, stays
from services.engine.plan import PoolCounts, Snapshot


def state(*, in_flight: int = 0, unplanned: int = 0, running: int = 0, free: int = 5, cached: int = 0) -> Snapshot:
    return Snapshot(0, in_flight, 0, unplanned, running, 0, 0, PoolCounts(10, free, cached, 10 - free - cached, 0))


def test_an_idle_prefill_wants_a_launch_full() -> None:
    assert prefill_wants(state(), 0, 512) == 512
    assert prefill_wants(state(cached=1, free=0), 0, 512) == 512


def test_a_busy_one_leaves_new_jobs_to_others_unless_it_has_a_launch_to_fill() -> None:
    assert prefill_wants(state(in_flight=1), 0, 512) == 0
    assert prefill_wants(state(in_flight=1, unplanned=100), 0, 512) == 412
    assert [prefill_wants(state(in_flight=flying), 0, 512, stages=3) for flying in (2, 3)] == [512, 0]
    assert prefill_wants(state(), 1, 512) == 0
    assert prefill_wants(state(free=0), 0, 512) == 0


def test_a_colocated_worker_wants_more_while_it_has_places_and_pages() -> None:
    assert colocated_wants(state(in_flight=1, running=7), 0, 512, 8) == 512
    assert colocated_wants(state(running=8), 0, 512, 8) == 0
    assert colocated_wants(state(free=0), 0, 512, 8) == 0
    assert colocated_wants(state(), 1, 512, 8) == 0
    assert colocated_wants(state(unplanned=600), 0, 512, 8) < 0


def test_a_prefill_keeps_short_answers_to_which_there_is_one_choice() -> None:
    assert stays(4, 1, 4) and not stays(5, 1, 4)
    assert not stays(2, 2, 4)
    assert not stays(1, 1, 0)


def test_of_two_at_random_the_less_loaded() -> None:
    rng = random.Random(1)
    load = {"a": (3, 0), "b": (1, 0), "c": (2, 0)}
    chosen = Counter(less_loaded(sorted(load), load.__getitem__, rng) for _ in range(3000))
    assert chosen["a"] == 0
    assert 1800 < chosen["b"] < 2200
    assert less_loaded(["a"], load.__getitem__, rng) == "a"
