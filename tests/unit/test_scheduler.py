"""The scheduler's rules, one by one: who is planned, who gets pages, who loses them, and what the worker hears."""

from __future__ import annotations

from typing import Any

import pytest

from common.messages import Key, Logprob, Sampling, Token
from services.engine.pages import PagePool
from services.engine.plan import Began, Computed, Draw, Drawn, Failed, Granted, Outcome, Plan, Preempted, StepOutput
from services.engine.policies import Limits, PolicyName
from services.engine.scheduler import Scheduler
from services.engine.sequence import Sequence

PAGE = 4
STOP = 0


def key(name: str, execution: str = "x", attempt: int = 0) -> Key:
    return Key(name, 0, attempt, execution)


def sequence(name: str, tokens: int, *, most: int = 8, order: float = 0.0, **facts: Any) -> Sequence:
    return Sequence(key(name), list(range(1, tokens + 1)), tokens, Sampling(), most, frozenset({STOP}), order, **facts)


class Rig:
    """A scheduler and a device that draws 9 until told otherwise."""

    def __init__(
        self,
        pages: int,
        policy: PolicyName = "chunked",
        *,
        budget: int = 64,
        chunk: int = 64,
        batch: int = 8,
        growth: int = 1,
        depth: int = 1,
        stages: int = 1,
        reuse: str | None = None,
    ) -> None:
        self.pool = PagePool(pages, PAGE, keep_cached=reuse is not None)
        limits = Limits(budget, chunk, batch, growth)
        self.scheduler = Scheduler(self.pool, policy, limits, depth=depth, stages=stages, reuse=reuse)
        self.submit = self.scheduler.submit

    def step(self, **draws: int) -> list[Outcome]:
        """Plan, launch, collect; what the worker hears of it. `draws`: tokens by request, 9 for the others."""
        plan = self.scheduler.next()
        if plan is not None:
            self.commit(plan, **draws)
        self.pool.check()
        return self.scheduler.take_outcomes()

    def commit(self, plan: Plan, **draws: int) -> None:
        ids = [draws.get(chunk.sequence.key.request_id, 9) for chunk in plan.chunks]
        output = StepOutput(tuple(Draw(i) if chunk.draws else None for i, chunk in zip(ids, plan.chunks, strict=True)))
        self.scheduler.commit(plan, output)

    def plan(self) -> Plan:
        plan = self.scheduler.next()
        assert plan is not None
        return plan

    @property
    def free(self) -> int:
        return self.pool.counts.free


def shape(plan: Plan) -> list[tuple[str, int, int]]:
    return [(chunk.sequence.key.request_id, chunk.start, chunk.tokens) for chunk in plan.chunks]


def names(outcomes: list[Outcome], kind: type) -> list[str]:
    return [outcome.key.request_id for outcome in outcomes if isinstance(outcome, kind) and not isinstance(outcome, Granted)]


# --------------------------------------------------------------------------------------------------- a sequence's life


def test_a_prompt_begins_is_computed_draws_and_ends() -> None:
    rig = Rig(8)
    one = sequence("a", 6, most=3)
    rig.submit(one)
    assert rig.step() == [Began(one.key, (0, 1), 0), Computed(one.key, 6, (0, 1)), Drawn(one.key, Token(0, 9), None)]
    assert rig.step() == [Drawn(one.key, Token(1, 9), None)]
    assert rig.step() == [Drawn(one.key, Token(2, 9), "length")]
    assert one.ids[6:] == [9, 9, 9] and one.computed == one.most_tokens == 8
    assert rig.free == 8 and rig.scheduler.keys() == () and rig.scheduler.next() is None


def test_a_stop_id_ends_it_and_its_pages_are_free_at_once() -> None:
    rig = Rig(8)
    rig.submit(sequence("a", 6))
    rig.step()
    assert rig.step(a=STOP) == [Drawn(key("a"), Token(1, STOP), "stop")]
    assert rig.free == 8


def test_accepted_ids_are_prefilled_and_drawing_goes_on_behind_them() -> None:
    rig = Rig(8)
    resumed = sequence("a", 7, most=4)
    resumed.prompt_tokens = 5
    rig.submit(resumed)
    plan = rig.plan()
    assert shape(plan) == [("a", 0, 7)] and plan.chunks[0].index == 2
    rig.commit(plan)
    assert Drawn(resumed.key, Token(2, 9), None) in rig.scheduler.take_outcomes()
    assert rig.step() == [Drawn(resumed.key, Token(3, 9), "length")]


def test_logprobs_pass_through() -> None:
    rig = Rig(8)
    rig.submit(sequence("a", 2))
    plan = rig.plan()
    rig.scheduler.commit(plan, StepOutput((Draw(5, Logprob(-0.5)),)))
    assert rig.scheduler.take_outcomes()[-1] == Drawn(key("a"), Token(0, 5, Logprob(-0.5)), None)


def test_a_long_prompt_is_computed_in_chunks_and_only_the_last_one_draws() -> None:
    rig = Rig(8, chunk=8)
    rig.submit(sequence("a", 20))
    plans = []
    for _ in range(3):
        plans.append(rig.plan())
        rig.commit(plans[-1])
    assert [shape(plan)[0][1:] for plan in plans] == [(0, 8), (8, 8), (16, 4)]
    assert [plan.chunks[0].draws for plan in plans] == [False, False, True]
    computed = [outcome.tokens for outcome in rig.scheduler.take_outcomes() if isinstance(outcome, Computed)]
    assert computed == [8, 16, 20]


def test_parking_keeps_the_pages_until_release_and_is_never_planned_again() -> None:
    rig = Rig(8)
    rig.submit(sequence("a", 6, parks=True))
    assert names(rig.step(), Drawn) == ["a"]
    assert rig.scheduler.next() is None
    assert (rig.free, rig.scheduler.snapshot().parked) == (6, 1)
    rig.scheduler.release(key("a"))
    assert (rig.free, rig.scheduler.snapshot().parked) == (8, 0)
    rig.scheduler.release(key("a"))


def test_a_parking_sequence_that_its_first_token_ends_does_not_park() -> None:
    rig = Rig(8)
    rig.submit(sequence("a", 6, parks=True))
    rig.step(a=STOP)
    assert rig.free == 8 and rig.scheduler.keys() == ()


def test_a_parking_sequence_never_needs_more_than_its_prompt_even_reserved_in_full() -> None:
    rig = Rig(2)
    rig.submit(sequence("a", 8, most=100, parks=True, reserve_all=True))
    assert names(rig.step(), Began) == ["a"]


# ---------------------------------------------------------------------------------------------------------- who starts


def test_prompts_start_in_order_of_acceptance_not_of_arrival() -> None:
    rig = Rig(32, "prefill_first", budget=8)
    rig.submit(sequence("late", 6, order=2.0))
    rig.submit(sequence("early", 6, order=1.0))
    assert shape(rig.plan()) == [("early", 0, 6)]


def test_equal_orders_start_as_they_came() -> None:
    rig = Rig(32, "prefill_first", budget=8)
    rig.submit(sequence("z", 6))
    rig.submit(sequence("a", 6))
    assert shape(rig.plan()) == [("z", 0, 6)]


def test_a_prompt_starts_only_with_all_its_pages_and_nobody_overtakes_it() -> None:
    rig = Rig(6)
    rig.submit(sequence("big", 16, order=1.0, parks=True))
    rig.submit(sequence("bigger", 12, order=2.0, parks=True))
    rig.submit(sequence("small", 4, order=3.0, parks=True))
    assert names(rig.step(), Began) == ["big"]
    assert rig.step() == [] and rig.free == 2
    rig.scheduler.release(key("big"))
    assert names(rig.step(), Began) == ["bigger", "small"]


def test_prefill_first_lets_running_sequences_wait_and_chunked_does_not() -> None:
    for policy, expected in (("prefill_first", ["b"]), ("chunked", ["a", "b"])):
        rig = Rig(32, policy)  # type: ignore[arg-type]
        rig.submit(sequence("a", 6))
        rig.step()
        rig.submit(sequence("b", 6))
        assert [name for name, _, _ in shape(rig.plan())] == expected


def test_prefill_first_decodes_while_no_waiting_prompt_can_have_its_pages() -> None:
    rig = Rig(4, "prefill_first")
    rig.submit(sequence("a", 6, order=1.0))
    rig.step()
    rig.submit(sequence("b", 12, most=5, order=2.0))
    assert shape(rig.plan()) == [("a", 6, 1)]


def test_an_older_prompt_goes_before_a_half_prefilled_one() -> None:
    rig = Rig(32, chunk=4, budget=4)
    rig.submit(sequence("young", 8, order=2.0))
    rig.step()
    rig.submit(sequence("old", 4, order=1.0))
    assert shape(rig.plan()) == [("old", 0, 4)]


def test_no_more_sequences_start_than_a_batch_holds() -> None:
    rig = Rig(32, batch=2)
    for name in "abc":
        rig.submit(sequence(name, 2))
    assert names(rig.step(), Began) == ["a", "b"]
    rig.step(a=STOP)
    assert names(rig.step(), Began) == ["c"]


def test_what_can_never_fit_is_refused() -> None:
    rig = Rig(4)
    rig.submit(sequence("fits", 10, most=7))
    with pytest.raises(ValueError, match="5 pages"):
        rig.submit(sequence("a", 10, most=8))
    with pytest.raises(ValueError, match="5 pages"):
        rig.scheduler.reserve(("p", 1), sequence("a", 10, most=8))


def test_a_key_is_here_once() -> None:
    rig = Rig(4)
    rig.submit(sequence("a", 2, most=4))
    with pytest.raises(ValueError, match="already"):
        rig.submit(sequence("a", 2, most=4))


# --------------------------------------------------------------------------------------------------------------- alone


def test_alone_waits_for_everybody_and_everybody_waits_for_it() -> None:
    rig = Rig(32)
    rig.submit(sequence("a", 4, order=1.0))
    rig.step()
    rig.submit(sequence("suspect", 4, order=2.0, alone=True))
    rig.submit(sequence("b", 4, order=3.0))
    assert names(rig.step(), Began) == []
    rig.step(a=STOP)
    assert names(rig.step(), Began) == ["suspect"]
    assert names(rig.step(), Began) == []
    rig.step(suspect=STOP)
    assert names(rig.step(), Began) == ["b"]


def test_alone_does_not_start_beside_older_prompts_of_the_same_launch() -> None:
    rig = Rig(32)
    rig.submit(sequence("a", 4, order=1.0))
    rig.submit(sequence("suspect", 4, order=2.0, alone=True))
    assert names(rig.step(), Began) == ["a"]


def test_an_offer_to_run_alone_waits_for_an_empty_engine_and_keeps_it_so() -> None:
    rig = Rig(32)
    rig.submit(sequence("a", 4))
    rig.step()
    rig.scheduler.reserve(("p", 1), sequence("suspect", 4, alone=True))
    rig.scheduler.reserve(("p", 2), sequence("c", 4))
    rig.submit(sequence("b", 4))
    assert names(rig.step(a=STOP), Began) == []
    assert [outcome.handoff for outcome in rig.step() if isinstance(outcome, Granted)] == [("p", 1)]
    assert rig.step() == []
    rig.scheduler.admit(("p", 1), Token(0, 9))
    assert names(rig.step(suspect=STOP), Began) == ["suspect"]
    outcomes = rig.step()
    assert names(outcomes, Began) == ["b"] and Granted(("p", 2), (0, 1)) in outcomes


def test_a_prompt_that_runs_alone_is_not_starved_by_offers() -> None:
    rig = Rig(32)
    rig.scheduler.reserve(("p", 1), sequence("a", 4))
    rig.step()
    rig.submit(sequence("suspect", 4, alone=True))
    rig.scheduler.reserve(("p", 2), sequence("b", 4))
    assert rig.step() == []
    rig.scheduler.lapse(("p", 1))
    assert names(rig.step(), Began) == ["suspect"]


def test_of_a_suspect_only_the_launch_of_its_prompt_is_announced() -> None:
    """On a decode the wait would lengthen everybody's gap and tell the gateway nothing."""
    rig = Rig(32)
    rig.submit(sequence("a", 4, suspect=True))
    first = rig.scheduler.next()
    assert first is not None and first.announced
    rig.scheduler.abort(first, "over")
    rig.scheduler.reserve(("p", 1), sequence("b", 4, suspect=True))
    rig.step()
    rig.scheduler.admit(("p", 1), Token(0, 9))
    later = rig.scheduler.next()
    assert later is not None and len(later.chunks) == 1 and not later.announced


# ------------------------------------------------------------------------------------------------- growth, preemption


def test_running_sequences_grow_page_by_page() -> None:
    rig = Rig(3)
    one = sequence("a", 4, most=9)
    rig.submit(one)
    held = []
    for _ in range(9):
        rig.step()
        held.append(rig.pool.counts.held)
    assert held == [1, 2, 2, 2, 2, 3, 3, 3, 0]


def test_growth_comes_before_starting_prompts() -> None:
    rig = Rig(3)
    rig.submit(sequence("a", 8, most=5, order=2.0))
    rig.step()
    rig.submit(sequence("older", 4, most=2, order=1.0))
    rig.step()
    assert rig.pool.counts.held == 3 and names(rig.step(), Began) == []


def test_growth_comes_before_grants() -> None:
    rig = Rig(3)
    rig.submit(sequence("a", 8, most=5))
    rig.step()
    rig.scheduler.reserve(("p", 1), sequence("b", 4, most=1))
    outcomes = rig.step()
    assert not any(isinstance(outcome, Granted) for outcome in outcomes)


def test_the_youngest_is_preempted_and_gone() -> None:
    rig = Rig(4)
    rig.submit(sequence("old", 8, most=8, order=1.0))
    rig.submit(sequence("young", 7, most=8, order=2.0))
    rig.step()
    assert rig.free == 0
    outcomes = rig.step()
    assert names(outcomes, Preempted) == ["young"] and names(outcomes, Drawn) == ["old"]
    assert rig.scheduler.find(key("young")) is None and rig.scheduler.find(key("old")) is not None


def test_the_needy_one_itself_may_be_the_youngest() -> None:
    rig = Rig(4)
    rig.submit(sequence("old", 5, most=8, order=1.0))
    rig.submit(sequence("young", 8, most=8, order=2.0))
    rig.step()
    outcomes = rig.step()
    assert names(outcomes, Preempted) == ["young"] and names(outcomes, Drawn) == ["old"]


def test_a_prefilling_sequence_may_be_the_victim_and_its_tokens_are_no_longer_waited_for() -> None:
    rig = Rig(4, budget=5, chunk=4)
    rig.submit(sequence("old", 7, most=8, order=1.0))
    rig.step()
    rig.step()
    rig.submit(sequence("young", 8, order=2.0, parks=True))
    rig.step()
    assert rig.free == 0 and rig.scheduler.snapshot().unplanned_tokens == 4
    assert names(rig.step(), Preempted) == ["young"]
    assert rig.scheduler.snapshot().unplanned_tokens == 0


def test_reserved_in_full_it_is_never_the_victim_and_has_every_page_from_the_start() -> None:
    rig = Rig(6)
    rig.submit(sequence("old", 8, most=8, order=1.0))
    rig.submit(sequence("young", 7, most=8, order=2.0, reserve_all=True))
    assert Began(key("young"), (2, 3, 4, 5)) in rig.step()
    assert names(rig.step(), Preempted) == ["old"]


def test_what_a_preemption_leaves_over_is_for_growth_and_nobody_starts_on_it() -> None:
    rig = Rig(4)
    rig.submit(sequence("old", 8, most=8, order=1.0))
    rig.submit(sequence("young", 7, most=8, order=2.0))
    rig.step()
    rig.submit(sequence("youngest", 2, most=2, order=3.0))
    rig.scheduler.reserve(("p", 1), sequence("offered", 2, most=1))
    assert [type(outcome) for outcome in rig.step()] == [Preempted, Drawn]
    later = rig.step()
    assert Granted(("p", 1), (3,)) in later and names(later, Began) == []
    rig.scheduler.landed(("p", 1))
    assert names(rig.step(), Began) == ["youngest"]


def test_when_the_last_running_sequence_is_preempted_the_next_prompt_starts_in_the_same_launch() -> None:
    rig = Rig(4)
    rig.submit(sequence("parked", 8, parks=True))
    rig.submit(sequence("running", 8, most=4))
    rig.step()
    rig.submit(sequence("waiting", 8, most=1))
    outcomes = rig.step()
    assert names(outcomes, Preempted) == ["running"] and names(outcomes, Began) == ["waiting"]


def test_parked_pages_are_never_taken() -> None:
    rig = Rig(4)
    rig.submit(sequence("old", 8, most=8, order=1.0))
    rig.submit(sequence("parked", 7, order=2.0, parks=True))
    rig.step()
    assert names(rig.step(), Preempted) == ["old"]
    assert rig.scheduler.keys() == (key("parked"),)


# -------------------------------------------------------------------------------------------------------------- cancel


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_cancel_frees_in_every_stage(steps: int) -> None:
    rig = Rig(8, chunk=4, budget=4)
    rig.submit(sequence("a", 8))
    for _ in range(steps):
        rig.step()
    rig.scheduler.cancel(key("a"))
    snapshot = rig.scheduler.snapshot()
    assert (rig.free, snapshot.waiting, snapshot.running, snapshot.unplanned_tokens) == (8, 0, 0, 0)
    assert rig.scheduler.next() is None


def test_cancel_of_an_attempt_covers_any_execution_of_it_and_no_other() -> None:
    rig = Rig(8)
    for execution, attempt in (("x", 0), ("y", 0), ("z", 1)):
        other = sequence("a", 2, most=4)
        other.key = key("a", execution, attempt)
        rig.submit(other)
    rig.scheduler.cancel(key("a", "w"))
    assert len(rig.scheduler.keys()) == 3
    rig.scheduler.cancel(key("a", ""))
    assert rig.scheduler.keys() == (key("a", "z", 1),)


def test_cancel_reaches_the_line_and_leaves_granted_pages_in_transit() -> None:
    rig = Rig(4, growth=0)
    rig.scheduler.reserve(("p", 1), sequence("a", 8, most=2))
    rig.scheduler.reserve(("p", 2), sequence("b", 12, most=2))
    rig.step()
    rig.scheduler.cancel(key("a"))
    rig.scheduler.cancel(key("b"))
    assert rig.scheduler.snapshot().inbound == 1 and rig.pool.counts.in_transit == 2
    rig.scheduler.landed(("p", 1))
    assert rig.free == 4 and rig.scheduler.snapshot().inbound == 0


# ------------------------------------------------------------------------------------------------------------- inbound


def test_a_grant_reserves_the_known_pages_and_room_to_grow_or_everything() -> None:
    rig = Rig(16, growth=2)
    rig.scheduler.reserve(("p", 1), sequence("a", 7, most=20))
    rig.scheduler.reserve(("p", 2), sequence("never needs more", 7, most=3))
    rig.scheduler.reserve(("p", 3), sequence("reserves all", 7, most=14, reserve_all=True))
    granted = [len(outcome.pages) for outcome in rig.step() if isinstance(outcome, Granted)]
    assert granted == [4, 3, 5]


def test_offers_are_granted_strictly_in_turn() -> None:
    rig = Rig(6, growth=0)
    for number, tokens in ((1, 16), (2, 12), (3, 4)):
        rig.scheduler.reserve(("p", number), sequence(str(number), tokens, most=1))
    assert [outcome.handoff[1] for outcome in rig.step() if isinstance(outcome, Granted)] == [1]
    rig.scheduler.lapse(("p", 2))
    assert [outcome.handoff[1] for outcome in rig.step() if isinstance(outcome, Granted)] == [3]


def test_an_admitted_sequence_runs_on_from_the_token_prefill_drew() -> None:
    rig = Rig(8)
    inbound = sequence("a", 6, most=3)
    rig.scheduler.reserve(("p", 1), inbound)
    assert rig.step() == [Granted(("p", 1), (0, 1))]
    rig.scheduler.admit(("p", 1), Token(0, 5))
    assert (rig.pool.counts.in_transit, rig.pool.counts.held) == (0, 2)
    plan = rig.plan()
    assert shape(plan) == [("a", 6, 1)] and plan.chunks[0].index == 1 and inbound.ids[-1] == 5
    rig.commit(plan)
    assert rig.scheduler.take_outcomes() == [Began(key("a"), (0, 1)), Drawn(key("a"), Token(1, 9), None)]
    assert rig.step() == [Drawn(key("a"), Token(2, 9), "length")]
    assert rig.free == 8


def test_an_admitted_sequence_that_is_over_already_frees_its_pages_and_says_so() -> None:
    rig = Rig(8)
    rig.scheduler.reserve(("p", 1), sequence("a", 6))
    rig.step()
    rig.scheduler.admit(("p", 1), Token(0, STOP))
    assert rig.step() == [Drawn(key("a"), Token(0, STOP), "stop")]
    assert rig.free == 8


def test_an_execution_admitted_through_two_handoffs_runs_once() -> None:
    rig = Rig(8)
    for number in (1, 2):
        rig.scheduler.reserve(("p", number), sequence("a", 6, most=8))
    rig.step()
    rig.scheduler.admit(("p", 1), Token(0, 5))
    rig.scheduler.admit(("p", 2), Token(0, 5))
    plan = rig.plan()
    assert len(plan.chunks) == 1 and rig.pool.counts.held == 3 and rig.pool.counts.in_transit == 0
    rig.commit(plan, a=STOP)
    rig.submit(sequence("suspect", 4, alone=True))
    assert rig.free == 8 and "suspect" in names(rig.step(), Began)


def test_pages_of_a_lapsed_grant_stay_in_transit_until_they_land() -> None:
    rig = Rig(2, growth=0)
    rig.scheduler.reserve(("p", 1), sequence("a", 8, most=1))
    rig.scheduler.reserve(("p", 2), sequence("b", 8, most=1))
    rig.step()
    rig.scheduler.lapse(("p", 1))
    assert rig.step() == []
    with pytest.raises(ValueError, match="no live grant"):
        rig.scheduler.admit(("p", 1), Token(0, 5))
    rig.scheduler.landed(("p", 1))
    assert rig.step() == [Granted(("p", 2), (0, 1))]


def test_repeats_and_late_commands_change_nothing() -> None:
    rig = Rig(8, growth=0)
    for _ in range(2):
        rig.scheduler.reserve(("p", 1), sequence("a", 8, most=1))
    assert len(rig.step()) == 1
    rig.scheduler.reserve(("p", 1), sequence("a", 8, most=1))
    assert rig.step() == []
    for _ in range(2):
        rig.scheduler.lapse(("p", 1))
        rig.scheduler.landed(("p", 1))
    assert rig.free == 8 and rig.scheduler.snapshot().inbound == 0


def test_an_offer_repeated_after_a_lapse_takes_up_the_grant_that_crossed_it() -> None:
    rig = Rig(8, growth=0)
    rig.scheduler.reserve(("p", 1), sequence("a", 8, most=2))
    granted = rig.step()
    rig.scheduler.lapse(("p", 1))
    rig.scheduler.reserve(("p", 1), sequence("a", 8, most=2))
    assert granted == [Granted(("p", 1), (0, 1))] and rig.step() == []
    rig.scheduler.admit(("p", 1), Token(0, 5))
    assert names(rig.step(), Drawn) == ["a"] and rig.free == 8


def test_a_token_out_of_place_is_refused() -> None:
    rig = Rig(8)
    rig.scheduler.reserve(("p", 1), sequence("a", 6))
    rig.step()
    with pytest.raises(ValueError, match="token 3"):
        rig.scheduler.admit(("p", 1), Token(3, 5))


# ----------------------------------------------------------------------------------------------- launches ahead, order


def test_without_lookahead_one_launch_is_in_flight() -> None:
    rig = Rig(8)
    rig.submit(sequence("a", 6))
    rig.plan()
    assert rig.scheduler.next() is None and rig.scheduler.snapshot().in_flight == 1


def test_with_lookahead_the_next_launch_takes_its_input_from_the_one_in_flight() -> None:
    rig = Rig(8, depth=2)
    rig.submit(sequence("a", 6, most=3))
    first, second = rig.plan(), rig.plan()
    assert rig.scheduler.next() is None
    assert (first.chunks[0].pending, first.chunks[0].index) == (False, 0)
    chunk = second.chunks[0]
    assert (chunk.pending, chunk.start, chunk.tokens, chunk.index) == (True, 6, 1, 1)
    rig.commit(first)
    third = rig.plan()
    assert (third.chunks[0].start, third.chunks[0].index, third.chunks[0].pending) == (7, 2, True)
    rig.commit(second)
    assert rig.scheduler.next() is None  # the last token is being drawn: nothing can follow it
    rig.commit(third)
    assert [outcome.token.index for outcome in rig.scheduler.take_outcomes() if isinstance(outcome, Drawn)] == [0, 1, 2]
    assert rig.free == 8


def test_a_draw_behind_the_end_is_discarded_and_the_pages_wait_for_it() -> None:
    rig = Rig(4, depth=2)
    rig.submit(sequence("a", 6, most=8))
    first, second = rig.plan(), rig.plan()
    rig.commit(first, a=STOP)
    assert rig.scheduler.keys() == () and rig.free == 2
    rig.commit(second)
    assert rig.free == 4
    drawn = [outcome for outcome in rig.scheduler.take_outcomes() if isinstance(outcome, Drawn)]
    assert drawn == [Drawn(key("a"), Token(0, STOP), "stop")]


def test_pages_named_by_a_launch_in_flight_are_not_granted_again() -> None:
    rig = Rig(2, growth=0, depth=2)
    rig.submit(sequence("a", 6, most=2))
    plan = rig.plan()
    rig.scheduler.cancel(key("a"))
    rig.submit(sequence("b", 8, most=1))
    rig.scheduler.reserve(("p", 1), sequence("c", 8, most=1))
    assert rig.scheduler.next() is None and rig.pool.counts.held == 2
    rig.commit(plan)
    assert rig.step() == [Began(key("a"), (0, 1)), Granted(("p", 1), (0, 1))]


def test_growth_waits_for_pages_that_are_about_to_be_free_instead_of_preempting() -> None:
    rig = Rig(4, depth=2)
    rig.submit(sequence("old", 7, most=8, order=1.0))
    rig.submit(sequence("young", 7, most=8, order=2.0))
    first = rig.plan()
    rig.scheduler.cancel(key("young"))
    second = rig.plan()
    assert shape(second) == [("old", 7, 1)]
    rig.commit(first)
    rig.commit(second)
    assert names(rig.scheduler.take_outcomes(), Preempted) == []
    assert shape(rig.plan()) == [("old", 8, 1)]


def test_a_victim_in_flight_gives_its_pages_when_it_has_landed() -> None:
    rig = Rig(4, depth=2)
    rig.submit(sequence("old", 8, most=8, order=1.0))
    rig.submit(sequence("young", 7, most=8, order=2.0))
    first = rig.plan()
    rig.submit(sequence("waiting", 4, most=1, order=3.0))
    assert rig.scheduler.next() is None
    assert names(rig.scheduler.take_outcomes(), Preempted) == ["young"]
    rig.commit(first)
    assert names(rig.scheduler.take_outcomes(), Drawn) == ["old"]
    second = rig.plan()
    assert shape(second) == [("old", 8, 1), ("waiting", 0, 4)]
    rig.commit(second)
    rig.submit(sequence("again", 4, most=8, order=4.0))
    rig.step()
    assert names(rig.step(), Preempted) == ["again"]


def test_a_parking_sequence_is_not_planned_beyond_its_draw() -> None:
    rig = Rig(8, depth=2)
    rig.submit(sequence("a", 6, parks=True))
    rig.plan()
    assert rig.scheduler.next() is None


def test_chunks_of_one_prompt_follow_each_other_in_flight() -> None:
    rig = Rig(8, depth=2, chunk=4, budget=4)
    rig.submit(sequence("a", 8))
    assert [shape(rig.plan()), shape(rig.plan())] == [[("a", 0, 4)], [("a", 4, 4)]]
    assert rig.scheduler.find(key("a")).computed == 0  # type: ignore[union-attr]


def test_launches_are_committed_in_order() -> None:
    rig = Rig(8, depth=2)
    rig.submit(sequence("a", 6))
    first, second = rig.plan(), rig.plan()
    with pytest.raises(ValueError, match="not the oldest"):
        rig.commit(second)
    rig.commit(first)
    with pytest.raises(ValueError, match="not the oldest"):
        rig.commit(first)


def test_a_missing_draw_is_refused() -> None:
    rig = Rig(8)
    rig.submit(sequence("a", 6))
    with pytest.raises(ValueError, match="drew no token"):
        rig.scheduler.commit(rig.plan(), StepOutput((None,)))


def test_a_failed_launch_takes_its_sequences_and_no_others() -> None:
    rig = Rig(8, "prefill_first")
    rig.submit(sequence("a", 6, most=8))
    rig.step()
    rig.submit(sequence("b", 6, most=8))
    plan = rig.plan()
    rig.scheduler.take_outcomes()
    rig.scheduler.abort(plan, "out of memory")
    assert rig.scheduler.take_outcomes() == [Failed(key("b"), "out of memory")]
    assert rig.scheduler.keys() == (key("a"),) and rig.pool.counts.held == 2
    with pytest.raises(ValueError, match="not in flight"):
        rig.scheduler.abort(plan, "again")


@pytest.mark.parametrize("later", [False, True])
def test_a_failure_with_another_launch_in_flight_frees_pages_only_after_both(later: bool) -> None:
    rig = Rig(8, depth=2)
    rig.submit(sequence("a", 6, most=8))
    first, second = rig.plan(), rig.plan()
    rig.scheduler.abort(second if later else first, "broken")
    assert rig.free == 6
    rig.commit(first if later else second)
    assert rig.free == 8
    assert names(rig.scheduler.take_outcomes(), Failed) == ["a"]


# ------------------------------------------------------------------------------------------------------------ snapshot


def test_the_snapshot_counts_what_is_where() -> None:
    rig = Rig(32, "prefill_first", budget=8, chunk=8)
    rig.submit(sequence("running", 4, order=1.0))
    rig.submit(sequence("parked", 4, order=2.0, parks=True))
    rig.step()
    rig.submit(sequence("half", 12, order=3.0))
    rig.submit(sequence("waiting", 5, order=4.0))
    rig.scheduler.reserve(("p", 1), sequence("inbound", 4))
    plan = rig.plan()
    snapshot = rig.scheduler.snapshot()
    assert (snapshot.step, snapshot.in_flight, snapshot.waiting, snapshot.unplanned_tokens) == (1, 1, 1, 4 + 5)
    assert (snapshot.running, snapshot.parked, snapshot.inbound) == (2, 1, 1)
    rig.commit(plan)
    assert (rig.scheduler.snapshot().step, rig.scheduler.snapshot().in_flight) == (2, 0)


# ------------------------------------------------------------------------------------------------------------- stages


def test_with_stages_each_launch_takes_its_share_and_nobody_twice() -> None:
    rig = Rig(20, depth=2, stages=2)
    for name in "abc":
        rig.submit(sequence(name, 3))
    first = rig.plan()
    assert rig.scheduler.next() is None, "all three are under way, and their tokens unknown"
    rig.commit(first)
    both = [rig.plan(), rig.plan()]
    assert [[chunk.sequence.key.request_id for chunk in plan.chunks] for plan in both] == [["a", "b"], ["c"]]
    assert not any(chunk.pending for plan in both for chunk in plan.chunks)
    assert rig.scheduler.next() is None
    rig.commit(both[0])
    assert [chunk.sequence.key.request_id for chunk in rig.plan().chunks] == ["a", "b"]


def test_with_stages_the_chunks_of_a_prompt_follow_each_other() -> None:
    rig = Rig(20, chunk=4, budget=4, depth=2, stages=2)
    rig.submit(sequence("a", 10))
    first, second = rig.plan(), rig.plan()
    assert [(plan.chunks[0].start, plan.chunks[0].tokens) for plan in (first, second)] == [(0, 4), (4, 4)]
    rig.commit(first)
    third = rig.plan()
    assert (third.chunks[0].start, third.chunks[0].draws) == (8, True)
