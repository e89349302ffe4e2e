"""A prompt that begins like an earlier one shares its pages; what is shared is never written, and gives way when room is needed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import Key, Sampling, Token
from services.engine.pages import chain_hashes
from services.engine.plan import Began, Computed, Drawn, Granted, Handoff
from services.engine.sequence import Sequence
from tests.unit.test_scheduler import PAGE, Rig, names, sequence, shape

THREE = 3 * PAGE


def run(rig: Rig) -> None:
    while rig.scheduler.keys():
        rig.step()


def asked(name: str, ids: list[int], *, most: int = 2, order: float = 0.0, **facts: bool) -> Sequence:
    return Sequence(Key(name, 0, 0, "x"), ids, len(ids), Sampling(), most, order=order, **facts)  # type: ignore[arg-type]


def test_a_known_beginning_is_shared_and_only_the_rest_computed() -> None:
    rig = Rig(20, reuse="model")
    rig.submit(sequence("a", THREE + 1, most=2))
    run(rig)
    assert rig.pool.counts.cached == 3 and rig.pool.available == 20
    rig.submit(sequence("b", THREE + 2, most=2))
    plan = rig.plan()
    assert shape(plan) == [("b", THREE, 2)]
    rig.commit(plan)
    began, known, computed, drawn = rig.scheduler.take_outcomes()[-4:]
    assert isinstance(began, Began) and isinstance(drawn, Drawn)
    assert began.reused == THREE and began.hashes == tuple(chain_hashes("model", range(1, THREE + 3), PAGE))
    assert isinstance(known, Computed) and known.tokens == THREE and known.pages == began.pages
    assert isinstance(computed, Computed) and computed.tokens == THREE + 2
    snapshot = rig.scheduler.snapshot()
    assert (snapshot.looked_up, snapshot.reused, snapshot.unplanned_tokens) == (2 * THREE + 3, THREE, 0)


def test_at_least_the_last_token_is_computed() -> None:
    rig = Rig(20, reuse="model")
    rig.submit(sequence("a", THREE, most=2))
    run(rig)
    rig.submit(sequence("b", THREE, most=2))
    assert shape(rig.plan()) == [("b", 2 * PAGE, PAGE)]


def test_an_answer_is_found_by_the_next_turn() -> None:
    rig = Rig(20, reuse="model")
    first = sequence("a", PAGE, most=PAGE + 2)
    rig.submit(first)
    run(rig)
    rig.submit(asked("b", [*first.ids, 1, 2]))
    assert shape(rig.plan()) == [("b", 2 * PAGE, 4)]


def test_what_is_being_computed_is_shared_before_it_ends() -> None:
    rig = Rig(20, reuse="model")
    rig.submit(sequence("a", THREE + 1, most=8))
    rig.step()
    rig.submit(sequence("b", THREE + 1, most=8))
    assert sorted(shape(rig.plan())) == [("a", THREE + 1, 1), ("b", THREE, 1)]
    assert rig.pool.counts.held == 3 + 1 + 1


def test_parked_pages_are_found_too() -> None:
    rig = Rig(20, reuse="model")
    rig.submit(sequence("a", THREE + 1, parks=True))
    rig.step()
    rig.submit(sequence("b", THREE + 1, parks=True))
    assert shape(rig.plan()) == [("b", THREE, 1)]


def test_another_model_or_other_tokens_share_nothing() -> None:
    rig = Rig(20, reuse="model")
    rig.submit(sequence("a", THREE, most=2))
    run(rig)
    rig.submit(asked("b", [99, *range(2, THREE + 1)]))
    assert shape(rig.plan()) == [("b", 0, THREE)]


def test_without_reuse_nothing_is_kept() -> None:
    rig = Rig(20)
    rig.submit(sequence("a", THREE, most=2))
    run(rig)
    assert rig.free == 20
    rig.submit(sequence("b", THREE, most=2))
    assert shape(rig.plan()) == [("b", 0, THREE)]


def test_cached_pages_give_way_to_a_prompt_that_needs_the_room() -> None:
    rig = Rig(4, reuse="model")
    rig.submit(sequence("a", THREE, most=2))
    run(rig)
    rig.submit(asked("b", [50 + n for n in range(4 * PAGE - 1)]))
    assert shape(rig.plan()) == [("b", 0, 4 * PAGE - 1)]


def test_a_failed_launch_leaves_nothing_to_be_found() -> None:
    rig = Rig(20, reuse="model")
    rig.submit(sequence("a", THREE, most=2))
    rig.scheduler.abort(rig.plan(), "broken")
    rig.submit(sequence("b", THREE, most=2))
    assert shape(rig.plan()) == [("b", 0, THREE)]


def test_a_prompt_enters_beside_the_one_whose_pages_it_shares_although_two_copies_would_not_fit() -> None:
    rig = Rig(6, reuse="model")
    rig.submit(sequence("a", THREE + 1, most=4))
    rig.step()
    rig.submit(sequence("b", THREE + 2, most=3))
    assert ("b", THREE, 2) in shape(rig.plan()) and rig.pool.counts.held == 5


# ------------------------------------------------------------------------------------------------------------ handoffs

HANDOFF, AGAIN = ("prefill", 1), ("prefill", 2)


def granted(rig: Rig, handoff: Handoff, offered: Sequence) -> Granted:
    rig.scheduler.reserve(handoff, offered)
    plan = rig.scheduler.next()
    (grant,) = [outcome for outcome in rig.scheduler.take_outcomes() if isinstance(outcome, Granted)]
    assert grant.handoff == handoff
    rig.pool.check()
    if plan is not None:
        rig.commit(plan)
    return grant


def hand(rig: Rig, handoff: Handoff, offered: Sequence) -> Granted:
    """Offered, granted and verified: it runs."""
    grant = granted(rig, handoff, offered)
    rig.scheduler.admit(handoff, Token(offered.index, 9))
    return grant


def test_a_grant_shares_what_was_handed_over_before_and_asks_for_the_rest() -> None:
    rig = Rig(20, reuse="model")
    first = hand(rig, HANDOFF, asked("a", list(range(1, THREE + 2)), most=3))
    assert (len(first.pages), first.shared) == (4, 0)
    second = granted(rig, AGAIN, asked("b", [*range(1, THREE + 1), 50, 51], most=9))
    assert second.shared == 3 and second.pages[:3] == first.pages[:3]
    assert [rig.pool.users(page) for page in second.pages[:3]] == [2, 2, 2]
    assert rig.pool.counts.in_transit == len(second.pages) - 3 == 2
    snapshot = rig.scheduler.snapshot()
    assert (snapshot.looked_up, snapshot.reused) == (2 * THREE + 3, THREE)


def test_a_whole_prompt_that_is_held_already_asks_for_nothing_but_room_to_grow() -> None:
    rig = Rig(20, reuse="model")
    hand(rig, HANDOFF, asked("a", list(range(1, THREE + 1)), most=2))
    run(rig)
    again = hand(rig, AGAIN, asked("b", list(range(1, THREE + 1)), most=3))
    assert again.shared == 3 and len(again.pages) == 4
    run(rig)
    assert rig.pool.available == 20


def test_pages_that_a_decode_fills_itself_are_found_by_the_next_turn() -> None:
    rig = Rig(20, reuse="model")
    first = asked("a", list(range(1, PAGE + 2)), most=2 * PAGE + 1)
    hand(rig, HANDOFF, first)
    run(rig)
    assert granted(rig, AGAIN, asked("b", [*first.ids, 60, 61])).shared == 3


def test_pages_in_transit_are_not_found() -> None:
    rig = Rig(20, reuse="model")
    granted(rig, HANDOFF, asked("a", list(range(1, THREE + 2))))
    assert granted(rig, AGAIN, asked("b", list(range(1, THREE + 2)))).shared == 0


def test_what_a_lapsed_grant_shares_is_kept_until_it_has_landed() -> None:
    """It may be taken up again, and what it was granted then is not told anew."""
    rig = Rig(8, reuse="model")
    hand(rig, HANDOFF, asked("a", list(range(1, THREE + 2)), most=2))
    run(rig)
    offered = asked("b", list(range(1, THREE + 2)), most=2)
    grant = granted(rig, AGAIN, offered)
    rig.scheduler.lapse(AGAIN)
    rig.submit(asked("c", list(range(50, 50 + 4 * PAGE)), most=2))
    rig.step()
    rig.scheduler.reserve(AGAIN, offered)
    rig.scheduler.admit(AGAIN, Token(0, 9))
    assert grant.shared == 3 and tuple(offered.pages) == grant.pages
    run(rig)
    rig.pool.check()
    assert rig.pool.available == 8


def test_a_grant_that_lands_gives_its_shared_pages_back() -> None:
    rig = Rig(20, reuse="model")
    hand(rig, HANDOFF, asked("a", list(range(1, THREE + 2)), most=2))
    run(rig)
    granted(rig, AGAIN, asked("b", list(range(1, THREE + 2))))
    rig.scheduler.lapse(AGAIN)
    rig.scheduler.landed(AGAIN)
    rig.pool.check()
    assert rig.pool.available == 20 and rig.pool.counts.cached == 3


def test_an_offer_waits_for_the_pages_that_it_lacks_and_for_no_others() -> None:
    rig = Rig(6, reuse="model", growth=0)
    first = asked("a", list(range(1, THREE + 2)), most=2 * PAGE)
    hand(rig, HANDOFF, first)
    shared = granted(rig, AGAIN, asked("b", [*range(1, THREE + 1), 50], most=4))
    assert shared.shared == 3 and rig.pool.counts.held + rig.pool.counts.in_transit == 5
    rig.scheduler.reserve(("prefill", 3), asked("c", list(range(70, 70 + 2 * PAGE)), most=2))
    rig.step()
    assert rig.scheduler.snapshot().inbound == 2 and rig.pool.counts.in_transit == 1, "two pages are not there"


def test_hashes_that_came_with_an_offer_are_not_computed_again() -> None:
    rig = Rig(20, reuse="model")
    ids = list(range(1, THREE + 2))
    offered = asked("a", ids)
    offered.hashes = chain_hashes("model", ids, PAGE)
    told = offered.hashes
    hand(rig, HANDOFF, offered)
    assert offered.hashes is told
    assert granted(rig, AGAIN, asked("b", ids)).shared == 3


def test_choices_share_with_their_leader_what_the_pool_held_already() -> None:
    rig = Rig(20, reuse="model")
    ids = list(range(1, THREE + 2))
    hand(rig, HANDOFF, asked("a", ids, most=2))
    run(rig)
    forks = tuple(Sequence(Key("b", choice, 0, "x"), list(ids), len(ids), Sampling(), 3) for choice in (1, 2))
    leader = asked("b", ids, most=3)
    leader.forks = forks
    grant = hand(rig, AGAIN, leader)
    assert grant.shared == 3 and [rig.pool.users(page) for page in grant.pages[:3]] == [3, 3, 3]
    run(rig)
    rig.pool.check()
    assert rig.pool.available == 20


@pytest.mark.parametrize("depth", [1, 2])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_mixture_ends_with_every_page_available_and_every_token_accounted_for(depth: int, data: st.DataObject) -> None:
    """Prompts cut from three texts, small pools, small chunks: no page is written while another sequence holds it."""
    rig = Rig(data.draw(st.integers(6, 14)), budget=10, chunk=6, batch=4, depth=depth, reuse="model")
    count = data.draw(st.integers(1, 8))
    flying = []
    submitted = 0
    for _ in range(400):
        if submitted < count and data.draw(st.booleans()):
            text, length = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 4 * PAGE))
            rig.submit(asked(str(submitted), [text * 100 + n for n in range(length)], most=data.draw(st.integers(1, 6)), order=submitted))
            submitted += 1
        plan = rig.scheduler.next()
        if plan is not None:
            flying.append(plan)
            for chunk in plan.chunks:
                written = range(chunk.start // PAGE, (chunk.start + chunk.tokens - 1) // PAGE + 1)
                assert all(rig.pool.users(chunk.sequence.pages[at]) == 1 for at in written)
        elif flying:
            rig.commit(flying.pop(0))
        elif submitted == count:
            break
        rig.pool.check()
        rig.scheduler.take_outcomes()
    assert not rig.scheduler.keys() and rig.pool.available == rig.pool.total
    assert rig.scheduler.snapshot().unplanned_tokens == 0 and names(rig.scheduler.take_outcomes(), Began) == []
