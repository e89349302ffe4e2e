"""A prompt that begins like an earlier one shares its pages; what is shared is never written, and gives way when room is needed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import Key, Sampling
from services.engine.plan import Began, Computed, Drawn
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
    assert began.reused == THREE
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
