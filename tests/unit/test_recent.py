"""The last minutes' answers, judged."""

from __future__ import annotations

import time

from common.slo import Objectives, Served
from gateway.ask import Timeline
from gateway.metrics import Metrics
from gateway.recent import MOST, Recent

TIGHT = Objectives(0.2, 0.02)


def test_joint_attainment_within_the_window() -> None:
    recent = Recent()
    recent.note(Served(0.1, 0.01, 9), 0.0)
    recent.note(Served(0.1, 0.01, 9), 50.0)
    recent.note(Served(0.1, 0.03, 9), 60.0)
    recent.note(Served(0.3, 0.01, 9), 70.0)
    recent.note(Served(0.0, 0.0, 0, ok=False), 80.0)
    found = recent.review(TIGHT, 60.0, 100.0)
    assert (found.requests, found.failed, found.attained, found.attainment) == (4, 1, 1, 0.25)
    assert found.goodput_rps == 1 / 60 and found.ttft_s == (0.1, 0.3) and found.tpot_s == (0.01, 0.03)


def test_nothing_yet() -> None:
    found = Recent().review(TIGHT, 60.0, 0.0)
    assert (found.requests, found.attainment, found.ttft_s, found.tpot_s, found.goodput_rps) == (0, None, None, None, 0.0)


def test_it_is_bounded() -> None:
    recent = Recent()
    for number in range(MOST + 10):
        recent.note(Served(0.1, 0.01, 2), float(number))
    assert recent.review(TIGHT, 1e9, 0.0).requests == MOST


def test_shed_and_failed_count_against_us_cancelled_and_bad_requests_do_not() -> None:
    metrics = Metrics()
    metrics.refused("overloaded")
    metrics.refused("model_not_found")
    metrics.ended("cancelled", Timeline(), 3, 1)
    metrics.ended("server_error", Timeline(), 3, 1)
    metrics.ended("stop", Timeline(ttft_s=0.1, total_s=0.2), 3, 11)
    found = metrics.recent.review(TIGHT, 60.0, time.monotonic())
    assert (found.requests, found.failed, found.attained) == (3, 2, 1)


def test_what_counts_as_good_is_the_operators_word() -> None:
    for objectives, good in ((Objectives(0.5, 0.05), 1.0), (Objectives(0.5, 0.005), 0.0)):
        metrics = Metrics(objectives)
        metrics.ended("stop", Timeline(ttft_s=0.1, total_s=0.2), 3, 11)
        text = metrics.text().decode()
        assert f"baton_good_requests_total {good}" in text and f"TPOT up to {objectives.tpot_s:g} s" in text
