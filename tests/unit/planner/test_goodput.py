"""The search over the rate: brackets, ceilings, intervals; and that more workers and looser objectives never hurt."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.slo import Objectives
from services.planner.costs import Parallel
from services.planner.goodput import Wanted, bracket, curve, rated, reaches, window
from services.planner.placement import Colocated, DecodeOnly, Disaggregated, Group, PrefillOnly
from services.planner.requests import Ask
from tests.unit.planner.machines import machine

ONE = Parallel(1, 1)


def source(count: int, seed: int) -> Sequence[Ask]:
    draw = random.Random(seed)
    at, asks = 0.0, []
    for _ in range(count):
        asks.append(Ask(at, 200, 20))
        at += draw.expovariate(1.0)
    return asks


def wanted(ttft_s: float = 0.2, tpot_s: float = 0.03) -> Wanted:
    return Wanted(source, Objectives(ttft_s, tpot_s), 0.9, 200, 20)


@given(st.floats(0.01, 1000), st.floats(0.1, 100), st.floats(1.01, 1.5), st.floats(1.05, 3))
def test_a_bracket_holds_the_threshold(threshold: float, start: float, resolution: float, ladder: float) -> None:
    tried: list[float] = []

    def reached(rate: float) -> bool:
        tried.append(rate)
        return rate <= threshold

    low, high = bracket(reached, start, ladder, resolution)
    if low:
        assert low <= threshold < high <= low * resolution * (1 + 1e-9)
    else:
        assert threshold < high < start / 300
    assert len(tried) < 60


def test_a_search_ends_at_its_ceiling() -> None:
    assert bracket(lambda rate: True, 1.0, 1.5, 1.04, 7.0) == (7.0, 7.0)
    low, high = bracket(lambda rate: rate < 5, 1.0, 1.5, 1.04, 7.0)
    assert low < 5 <= high


def test_the_goodput_of_a_placement_reaches_and_a_little_more_misses() -> None:
    where = Colocated(Group(ONE, 1))
    one = rated(machine(), where, wanted(), 5.0, resolution=1.05)
    assert one.low == one.goodput > 1
    assert one.high <= one.low * 1.05 * (1 + 1e-9)
    curves = curve(machine(), where, wanted(), [one.low, one.low * 2])
    assert curves[0].hits / curves[0].asked >= 0.9 > curves[1].hits / curves[1].asked


def test_several_seeds_give_an_interval_around_their_mean() -> None:
    one = rated(machine(), Colocated(Group(ONE, 1)), wanted(), 10.0, seeds=(1, 2, 3))
    assert len(one.seeds) == 3
    assert one.goodput == pytest.approx(sum(one.seeds) / 3)
    assert one.low <= one.goodput < one.high
    half = 4.303 * math.sqrt(sum((figure - one.goodput) ** 2 for figure in one.seeds) / 2) / math.sqrt(3)
    assert one.low == pytest.approx(max(0.0, one.goodput - half))


def test_more_workers_and_looser_objectives_serve_more() -> None:
    def goodput(replicas: int, want: Wanted) -> float:
        return rated(machine(), Disaggregated(Group(ONE, replicas), Group(ONE, replicas)), want, 10.0 * replicas).goodput

    assert goodput(2, wanted()) > 1.8 * goodput(1, wanted())
    assert goodput(1, wanted(0.4, 0.06)) > 1.1 * goodput(1, wanted())


def test_units_are_counted() -> None:
    unit = Disaggregated(Group(ONE, 1), Group(ONE, 1))
    twice = Disaggregated(Group(ONE, 1), Group(ONE, 1), units=2)
    one, two = rated(machine(), unit, wanted(), 10.0), rated(machine(), twice, wanted(), 20.0)
    assert two.goodput == pytest.approx(2 * one.goodput)
    assert two.per_device == pytest.approx(one.per_device)
    assert reaches(machine(), twice, wanted(), two.goodput) == reaches(machine(), unit, wanted(), one.goodput)


def test_what_meets_the_objectives_at_no_rate_has_no_goodput() -> None:
    assert rated(machine(), Colocated(Group(ONE, 1)), wanted(ttft_s=0.01), 10.0).goodput == 0


def test_a_trial_is_long_enough_for_its_system_to_fill() -> None:
    want = Wanted(source, Objectives(0.5, 0.1), 0.9, 200, 300)
    judged = window(DecodeOnly(Group(ONE, 1)), want, 10.0, 2.0)
    assert judged.skip == pytest.approx(10 * 30.5, abs=1)
    assert judged.count == pytest.approx(2 * judged.skip, abs=1)
    assert window(PrefillOnly(Group(ONE, 1)), want, 10.0, 2.0).skip < 100
