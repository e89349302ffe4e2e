"""When a push is late: by what moves on the ways it was given to, not by its own pages."""

from __future__ import annotations

from services.transfer.outbound import Outbound, Push, Way
from services.transfer.protocol import PushFailed

LATE = "nothing has moved for 5 s"


def given(book: Outbound, handoff: int, pages: int, *ways: Way, peer: str = "d") -> Push:
    """A push with pages under way on each of these ways, at 0."""
    push = book.push(peer, handoff, 7, 0.0)
    push.under_way += pages * len(ways)
    push.ways |= set(ways)
    return push


def test_a_push_behind_another_is_not_late_while_that_one_moves() -> None:
    book, way = Outbound(push_s=5.0), Way(since=0.0)
    first, _ = given(book, 1, 20, way), given(book, 2, 1, way)
    for second in range(1, 20):
        book.left(first, float(second))
        way.since = float(second)
        assert book.late(second + 0.9) == []
    assert book.late(24.1) == [PushFailed(1, 7, LATE), PushFailed(2, 7, LATE)]


def test_a_stuck_way_is_late_whatever_moves_on_another() -> None:
    """Of one push to two ranks, and of others to the rank that still reads."""
    book, stuck, free = Outbound(push_s=5.0), Way(since=0.0), Way(since=0.0)
    both, other = given(book, 1, 9, stuck, free), given(book, 2, 9, free)
    for second in range(1, 6):
        book.left(both, float(second))
        book.left(other, float(second))
        free.since = float(second)
        assert book.late(float(second)) == []
    assert book.late(5.1) == [PushFailed(1, 7, LATE)]


def test_a_way_that_is_used_again_counts_anew() -> None:
    book, way = Outbound(push_s=5.0), Way()
    given(book, 1, 0, way)
    assert book.late(100.0) == []
    given(book, 1, 1, way)
    way.since = 100.0
    assert book.late(104.9) == []
    assert book.late(105.1) == [PushFailed(1, 7, LATE)]


def test_a_push_that_waits_for_the_next_chunk_is_late_on_a_way_that_is_stuck() -> None:
    """By a flush alone, behind a page of a push that was withdrawn: nobody else would notice."""
    book, way = Outbound(push_s=5.0), Way(since=3.0)
    given(book, 1, 0, way)
    assert book.late(7.9) == []
    assert book.late(8.1) == [PushFailed(1, 7, LATE)]


def test_a_page_held_back_is_late_although_the_way_moves() -> None:
    book, way = Outbound(push_s=5.0), Way(since=0.0)
    push = given(book, 1, 1, way)
    push.held.add((0, 0))
    way.since = 4.0
    assert book.late(4.9) == []
    assert book.late(5.1) == [PushFailed(1, 7, LATE)]


def test_a_page_held_back_is_late_on_a_way_that_rests() -> None:
    book, way = Outbound(push_s=5.0), Way()
    given(book, 1, 1, way).held.add((0, 0))
    assert book.late(5.1) == [PushFailed(1, 7, LATE)]
