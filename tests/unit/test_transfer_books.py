"""What is expected and what is pushed, as pure state: every grant and every push ends once, in the right word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.transfer.inbound import Inbound
from services.transfer.outbound import Outbound
from services.transfer.protocol import Arrived, Landed, PushFailed, Sent

# ------------------------------------------------------------------------------------------------------------- inbound


def test_a_grant_arrives_when_its_last_page_has() -> None:
    book = Inbound()
    assert book.expect("p", 1, 2) == []
    assert book.completed(1, {3: 33}, whole=True) == []
    assert book.completed(1, {0: 10}, whole=True) == [Arrived(1, ((10, 33),))]
    assert book.of("p") == []


def test_a_grant_of_nothing_arrives_at_once() -> None:
    assert Inbound().expect("p", 1, 0) == [Arrived(1, ((),))]


def test_an_abandoned_grant_lands_when_its_last_receive_ended_and_never_arrives() -> None:
    book = Inbound()
    book.expect("p", 1, 2)
    assert book.completed(1, {0: 5}, whole=True) == []
    assert book.abandon(1, told=True) == []
    assert not book.wanted(1)
    assert book.completed(1, {}, whole=True) == [Landed(1)]


def test_what_the_sender_never_heard_of_lands_at_once() -> None:
    book = Inbound()
    book.expect("p", 1, 2)
    assert book.abandon(1, told=False) == [Landed(1)]
    assert book.completed(1, {}, whole=False) == []


def test_unknown_and_arrived_grants_land_at_once() -> None:
    book = Inbound()
    assert book.abandon(9, told=True) == [Landed(9)]
    book.expect("p", 1, 1)
    book.completed(1, {}, whole=True)
    assert book.abandon(1, told=True) == [Landed(1)]


def test_a_failed_page_never_arrives_but_lands() -> None:
    book = Inbound()
    book.expect("p", 1, 2)
    assert book.completed(1, {}, whole=False) == []
    assert book.completed(1, {1: 7}, whole=True) == []
    assert book.abandon(1, told=True) == [Landed(1)]


def test_closing_a_peer_abandons_its_grants_only() -> None:
    book = Inbound()
    book.expect("p", 1, 1)
    book.expect("q", 2, 1)
    assert book.close("p") == []
    assert book.completed(1, {}, whole=False) == [Landed(1)]
    assert book.completed(2, {0: 4}, whole=True) == [Arrived(2, ((4,),))]


def test_a_grant_in_transit_cannot_be_expected_again() -> None:
    book = Inbound()
    book.expect("p", 1, 1)
    with pytest.raises(ValueError, match="already in transit"):
        book.expect("p", 1, 1)


@given(st.lists(st.sampled_from(["page", "bad", "abandon", "close"]), max_size=12), st.integers(1, 4))
def test_a_grant_ends_exactly_once_and_only_with_no_receive_open(story: list[str], pages: int) -> None:
    book, index, abandoned, bad = Inbound(), 0, False, False
    events = book.expect("p", 1, pages)
    for what in story:
        if events:
            break
        if what in ("page", "bad") and index < pages:
            events += book.completed(1, {index: index}, whole=what == "page")
            index, bad = index + 1, bad or what == "bad"
        elif what == "abandon":
            events += book.abandon(1, told=True)
            abandoned = True
        elif what == "close":
            events += book.close("p")
            abandoned = True
    over = index == pages and (abandoned or not bad)
    assert bool(events) == over
    if over:
        assert events == ([Landed(1)] if abandoned else [Arrived(1, (tuple(range(pages)),))])
        assert book.of("p") == []


# ------------------------------------------------------------------------------------------------------------ outbound


def _with_pages(book: Outbound, pages: int, now: float = 0.0) -> None:
    push = book.push("d", 1, 7, now)
    for index in range(pages):
        push.under_way += 1
        push.sums[0, index] = 100 + index


def test_sent_comes_after_the_last_page_and_after_finish() -> None:
    book = Outbound()
    _with_pages(book, 2)
    push = book.push("d", 1, 7, 0.0)
    assert book.left(push, 1.0) == []
    assert book.left(push, 1.0) == []
    assert book.finish(1, 7, 2.0) == [Sent(1, 7, ((100, 101),))]
    assert len(book) == 0


def test_finish_first_and_sent_with_the_last_page() -> None:
    book = Outbound()
    _with_pages(book, 1)
    assert book.finish(1, 7, 0.0) == []
    assert book.left(book.push("d", 1, 7, 0.0), 0.0) == [Sent(1, 7, ((100,),))]


def test_a_push_of_nothing_is_sent_at_once() -> None:
    assert Outbound().finish(1, 7, 0.0) == [Sent(1, 7, ())]


def test_a_push_fails_once_and_what_follows_goes_nowhere() -> None:
    book = Outbound()
    _with_pages(book, 2)
    push = book.push("d", 1, 7, 0.0)
    assert book.fail(push, "why") == [PushFailed(1, 7, "why")]
    assert book.fail(push, "again") == []
    assert book.push("d", 1, 7, 1.0).over
    assert book.left(push, 1.0) == []
    assert book.finish(1, 7, 1.0) == []
    assert book.close("d") == []
    assert book.failures == 1


def test_a_withdrawn_push_says_nothing_and_names_what_was_held_back() -> None:
    book = Outbound()
    _with_pages(book, 2)
    push = book.push("d", 1, 7, 0.0)
    push.held |= {(0, 1), (1, 0)}
    assert book.withdraw(1, 7, 0) == {1}
    assert book.left(push, 1.0) == []
    assert book.withdraw(1, 7, 1) == {0}
    assert book.withdraw(1, 7, 1) == set()
    assert len(book) == 0


def test_closing_a_peer_fails_what_is_not_sent_to_it() -> None:
    book = Outbound()
    _with_pages(book, 1)
    book.push("other", 2, 7, 0.0)
    assert book.close("d") == [PushFailed(1, 7, "the peer was closed")]
    assert len(book) == 1


def test_only_a_push_that_stands_still_is_late() -> None:
    book = Outbound(push_s=5.0)
    _with_pages(book, 2)
    push = book.push("d", 1, 7, 0.0)
    book.left(push, 4.0)
    assert book.late(8.0) == []
    assert book.late(9.5) == [PushFailed(1, 7, "nothing has moved for 5 s")]
    assert book.late(20.0) == []


def test_a_push_that_waits_for_the_next_chunk_is_not_late() -> None:
    book = Outbound(push_s=5.0)
    _with_pages(book, 1)
    book.left(book.push("d", 1, 7, 0.0), 0.0)
    assert book.late(100.0) == []
