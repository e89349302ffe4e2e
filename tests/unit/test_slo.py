"""Attainment, as DistServe defines it: joint, per request."""

from __future__ import annotations

import math

import pytest

from common.slo import CHATBOT, NAMED, Objectives, Served, attainment, attains, tpot_s

GOAL = Objectives(ttft_s=0.5, tpot_s=0.05)


@pytest.mark.parametrize(
    ("served", "expected"),
    [
        (Served(0.5, 0.05, 100), True),
        (Served(0.51, 0.01, 100), False),
        (Served(0.1, 0.051, 100), False),
        (Served(0.51, 0.051, 100), False),
        (Served(0.1, 0.01, 100, ok=False), False),
        (Served(0.1, 9.0, 1), True),
        (Served(0.6, 0.0, 1), False),
        (Served(0.0, 0.0, 0), False),
        (Served(math.nan, 0.01, 10), False),
        (Served(0.1, math.nan, 10), False),
    ],
)
def test_a_request_attains_both_or_nothing(served: Served, expected: bool) -> None:
    assert attains(served, GOAL) is expected


def test_attainment_counts_requests_and_not_objectives() -> None:
    good, late, slow, failed = Served(0.1, 0.01, 9), Served(0.9, 0.01, 9), Served(0.1, 0.9, 9), Served(0.1, 0.01, 9, ok=False)
    assert attainment([good, late, slow, failed], GOAL) == 0.25
    assert attainment(iter([good]), GOAL) == 1.0
    assert math.isnan(attainment([], GOAL))


def test_tpot_is_the_mean_after_the_first_token() -> None:
    assert tpot_s(1.0, 2.0, 11) == pytest.approx(0.1)
    assert tpot_s(1.0, 1.0, 1) == 0.0


def test_the_published_objectives_are_there_by_name() -> None:
    assert NAMED["chatbot"] == CHATBOT == Objectives(0.5, 0.05)
    assert NAMED["opt-66b-longbench"] == Objectives(15.0, 0.15)
    assert len(NAMED) == 9
