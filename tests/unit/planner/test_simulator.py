"""The simulator against arithmetic: what an idle system takes, who waits for whom, and that nothing is lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.slo import Objectives
from services.planner.costs import Parallel
from services.planner.placement import Colocated, DecodeOnly, Disaggregated, Group, PrefillOnly, Simulated
from services.planner.requests import Ask
from services.planner.trial import Window, run
from tests.unit.planner.machines import assert_idle, machine, played

ONE = Parallel(1, 1)
PAIR = Disaggregated(Group(ONE, 1), Group(ONE, 1), short_tokens=0)


def test_one_request_colocated_takes_what_its_launches_take() -> None:
    _, (request,) = played(machine(), Colocated(Group(ONE, 1)), [Ask(0, 100, 11)])
    assert request.first_s == pytest.approx(0.020)
    assert request.done_s == pytest.approx(0.020 + 10 * 0.011)


def test_one_request_apart_pays_for_its_pages_after_the_first_token() -> None:
    """100 tokens are 7 pages of 1 ms, sent when the prompt is computed, then 5 ms until the decode runs it."""
    system, (request,) = played(machine(transfer_s=0.005), PAIR, [Ask(0, 100, 11)])
    assert request.first_s == pytest.approx(0.020)
    assert request.done_s == pytest.approx(0.020 + 0.007 + 0.005 + 10 * 0.011)
    assert_idle(system)


def test_a_short_answer_stays_and_the_next_prompt_waits_for_its_end() -> None:
    """Three more tokens after the first one, on the prefill; the other prompt comes while the first is read."""
    system, (short, other) = played(machine(), replace(PAIR, short_tokens=4), [Ask(0, 100, 4), Ask(0.01, 100, 5)])
    assert short.done_s == pytest.approx(0.020 + 3 * 0.011)
    assert other.first_s == pytest.approx(0.020 + 3 * 0.011 + 0.020)
    assert_idle(system)


def test_pages_of_earlier_chunks_leave_while_later_ones_compute() -> None:
    """A prompt of 8,000 tokens runs in two chunks: only the pages of the last one remain to be sent at its end."""
    costs = machine(tokens=16384)
    budget, chunk = costs.limits(1)
    assert budget <= chunk < 8000 < 2 * chunk
    _, (request,) = played(costs, PAIR, [Ask(0, 8000, 2)])
    first = 2 * 0.010 + 8000 * 1e-4
    assert request.first_s == pytest.approx(first)
    assert request.done_s == pytest.approx(first + (500 - chunk // 16) * 0.001 + 0.011)


def test_across_nodes_pages_take_the_network() -> None:
    near = played(machine(), PAIR, [Ask(0, 100, 2)])[1][0].done_s
    far = played(machine(), replace(PAIR, across_nodes=True), [Ask(0, 100, 2)])[1][0].done_s
    assert near is not None and far is not None
    assert far - near == pytest.approx(0.007 * 99)


def test_a_prompt_stalls_colocated_streams_and_not_disaggregated_ones() -> None:
    asks = [Ask(0, 16, 40), *(Ask(0.1 + n / 100, 1000, 2) for n in range(5))]
    stalled = played(machine(16384), Colocated(Group(ONE, 1)), asks)[1][0].served().tpot_s
    apart = played(machine(16384), PAIR, asks)[1][0].served().tpot_s
    assert stalled > apart + 5 * 0.110 / 39 * 0.9


def test_prompts_go_to_whoever_can_start_them() -> None:
    """Two prefills and two prompts at once: neither waits; with one prefill the second one does."""
    asks = [Ask(0, 1000, 1), Ask(0.001, 1000, 1)]
    two = played(machine(), PrefillOnly(Group(ONE, 2)), asks)[1]
    one = played(machine(), PrefillOnly(Group(ONE, 1)), asks)[1]
    assert [request.served().ttft_s for request in two] == pytest.approx([0.110, 0.110])
    assert [request.served().ttft_s for request in one] == pytest.approx([0.110, 0.219])


def test_two_pipeline_stages_take_twice_the_prompts_and_no_less_time_for_one() -> None:
    asks = [Ask(n * 0.060, 1000, 1) for n in range(40)]
    piped = played(machine(), PrefillOnly(Group(Parallel(1, 2), 1)), asks)[1]
    assert max(request.served().ttft_s for request in piped) == pytest.approx(0.110)
    alone = played(machine(), PrefillOnly(Group(ONE, 1)), asks)[1]
    assert max(request.served().ttft_s for request in alone) > 1.0


def test_a_full_decode_makes_requests_wait_and_prefill_memory_is_the_queue() -> None:
    """Room for one sequence at a time: the second one's grant comes when the first has ended."""
    costs = machine(tokens=256)
    system, (first, second) = played(costs, PAIR, [Ask(0, 200, 20), Ask(0, 40, 200)])
    assert first.done_s is not None and second.first_s is not None and second.done_s is not None
    assert second.first_s < first.done_s < second.done_s - 100 * 0.011
    assert_idle(system)


def test_who_loses_its_pages_comes_back_behind_the_tokens_it_has() -> None:
    system, requests = played(machine(tokens=256), DecodeOnly(Group(ONE, 1)), [Ask(0, 64, 150), Ask(0, 64, 150)])
    assert system.preempted > 0
    assert [request.drawn for request in requests] == [150, 150]
    system, requests = played(machine(tokens=256), PAIR, [Ask(0, 64, 150), Ask(0, 64, 150)])
    assert system.preempted > 0
    assert all(request.served().ok for request in requests)
    assert_idle(system)


def test_what_can_never_fit_is_refused_and_misses() -> None:
    for where in (Colocated(Group(ONE, 1)), PAIR, DecodeOnly(Group(ONE, 1))):
        system, (large, small) = played(machine(tokens=256), where, [Ask(0, 200, 100), Ask(0, 20, 20)])
        assert not large.served().ok
        assert small.served().ok
        assert_idle(system)


PLACEMENTS: list[Simulated] = [
    Colocated(Group(ONE, 1)),
    Colocated(Group(Parallel(1, 2), 2)),
    Colocated(Group(ONE, 2), "chunked", 64),
    PAIR,
    Disaggregated(Group(ONE, 2), Group(Parallel(1, 2), 2)),
    Disaggregated(Group(Parallel(1, 2), 1), Group(ONE, 3)),
    DecodeOnly(Group(ONE, 2)),
]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(PLACEMENTS),
    st.lists(st.builds(Ask, st.floats(0, 2), st.integers(1, 120), st.integers(1, 60)), min_size=1, max_size=40),
    st.integers(0, 3),
)
def test_everybody_is_served_and_every_page_comes_back(where: Simulated, asks: list[Ask], seed: int) -> None:
    system, requests = played(machine(tokens=512), where, asks, seed)
    for request in requests:
        served = request.served()
        assert served.ok
        assert request.drawn == request.output_tokens
        assert served.ttft_s >= 0 and served.tpot_s >= 0
    assert_idle(system)


# ------------------------------------------------------------------------------------------------------------------ trials

STEADY = [Ask(float(n), 100, 11) for n in range(300)]


def test_a_trial_judges_the_window_and_both_objectives() -> None:
    costs, where = machine(), Colocated(Group(ONE, 1))
    loose = run(costs, where, STEADY, Window(50, 200), 1.0, Objectives(0.021, 0.012), 0.9, whole=True)
    assert (loose.hits, loose.asked, loose.reached, len(loose.served)) == (200, 200, True, 200)
    for strict in (Objectives(0.019, 0.012), Objectives(0.021, 0.0109)):
        assert run(costs, where, STEADY, Window(50, 200), 1.0, strict, 0.9, whole=True).hits == 0


@pytest.mark.parametrize("rate", [1.0, 8.0, 30.0, 60.0, 200.0])
@pytest.mark.parametrize("where", [Colocated(Group(ONE, 1)), PAIR], ids=str)
def test_a_trial_cut_short_says_the_same(rate: float, where: Simulated) -> None:
    objectives = Objectives(0.06, 0.016)
    short = run(machine(), where, STEADY, Window(50, 200), rate, objectives, 0.9)
    whole = run(machine(), where, STEADY, Window(50, 200), rate, objectives, 0.9, whole=True)
    assert short.reached == whole.reached == (whole.hits >= 180)
    assert len(short.served) <= len(whole.served) == 200


def test_a_trial_repeats_exactly() -> None:
    trials = [
        run(machine(), PLACEMENTS[4], STEADY, Window(50, 200), 40.0, Objectives(0.06, 0.016), 0.9, seed=3, whole=True) for _ in range(2)
    ]
    assert trials[0] == trials[1]
