"""What one key may use: never more than said, and the time to come back is true."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import BadRequest
from gateway.limits import MINUTE_S, Allowance, Limited, Meter, Meters

pauses = st.lists(st.floats(0, 40) | st.sampled_from([0.0, MINUTE_S, MINUTE_S / 3]), max_size=60)


@given(pauses, st.integers(1, 5))
def test_no_minute_holds_more_than_said_and_the_wait_is_exact(pauses: list[float], most: int) -> None:
    meter, now, taken = Meter(most_a_minute=most), 1000.0, list[float]()
    for pause in pauses:
        now += pause
        within = [at for at in taken if at + MINUTE_S > now]
        try:
            meter.take(now)
        except Limited as limited:
            assert len(within) == most
            assert now + limited.retry_after_s == pytest.approx(within[0] + MINUTE_S)
            with pytest.raises(Limited):
                meter.take(now + limited.retry_after_s - 1e-3)
            assert limited.retry_after_s > 0
        else:
            assert len(within) < most
            taken.append(now)
            meter.give_back(0.1)
    if taken:
        meter.take(now + MINUTE_S)


def test_who_waits_as_told_is_served() -> None:
    meter = Meter(most_a_minute=3)
    for at in (0.0, 1.0, 2.0):
        meter.take(at)
    with pytest.raises(Limited, match="3 requests within a minute") as limited:
        meter.take(10.0)
    assert limited.value.retry_after_s == 50.0
    meter.take(10.0 + limited.value.retry_after_s)


def test_requests_at_once() -> None:
    meter = Meter(most_running=2, most_a_minute=100)
    meter.take(0.0)
    meter.take(0.0)
    with pytest.raises(Limited, match="2 requests at once") as limited:
        meter.take(0.0)
    assert (limited.value.status, limited.value.code, limited.value.type) == (429, "rate_limit_exceeded", "rate_limit_error")
    meter.give_back(8.0)
    meter.take(0.0)
    with pytest.raises(Limited) as limited:
        meter.take(0.0)
    assert limited.value.retry_after_s == 4.0, "one of two that take 8 s ends after 4 s on average"
    assert meter.running == 2


def test_what_was_refused_is_not_counted() -> None:
    meter = Meter(most_running=1, most_a_minute=2)
    meter.take(0.0)
    for _ in range(10):
        with pytest.raises(Limited):
            meter.take(0.0)
    meter.give_back(1.0)
    meter.take(0.0)
    meter.give_back(1.0)
    with pytest.raises(Limited, match="within a minute"):
        meter.take(0.0)
    assert meter.running == 0


def test_giving_back_twice_is_noticed() -> None:
    meter = Meter(most_running=1)
    meter.take(0.0)
    meter.give_back(1.0)
    with pytest.raises(AssertionError):
        meter.give_back(1.0)


def test_without_limits_nothing_is_kept() -> None:
    meter = Meter()
    for at in range(1000):
        meter.take(float(at))
    assert meter.running == 1000 and meter._taken is None


def test_each_name_has_its_own() -> None:
    meters = Meters(["a", "b"], most_running=1)
    meters["a"].take(0.0)
    meters["b"].take(0.0)
    with pytest.raises(Limited):
        meters["a"].take(0.0)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 100), st.integers(0, 100)), max_size=60), st.integers(1, 200))
def test_no_minute_holds_more_tokens_than_said_and_who_waits_as_told_is_served(asked: list[tuple[float, int, int]], most: int) -> None:
    meter, now, used = Meter(most_tokens=most), 1000.0, list[tuple[float, int]]()
    for pause, tokens, unused in asked:
        now += pause
        within = sum(count for at, count in used if at + MINUTE_S > now)
        try:
            meter.take_tokens(tokens, now)
        except BadRequest:
            assert tokens > most
            continue
        except Limited as limited:
            assert 0 < limited.retry_after_s <= MINUTE_S + 1
            now += limited.retry_after_s
            meter.take_tokens(tokens, now)
        else:
            assert within + tokens <= most
        meter.return_tokens(min(unused, tokens), now, now)
        used.append((now, tokens - min(unused, tokens)))
        assert len(meter._seconds) <= MINUTE_S + 2 and meter._tokens == sum(taken for _, taken in meter._seconds) >= 0


def test_tokens_that_a_minute_never_has_are_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="this API key may have 10 within a minute"):
        Meter(most_tokens=10).take_tokens(11, 0.0)


def test_what_stands_beside_a_key_counts_before_what_holds_for_all() -> None:
    meters = Meters(["a", "b"], most_running=1, own={"a": Allowance(running=2, priority=True)})
    meters["a"].take(0.0)
    meters["a"].take(0.0)
    meters["b"].take(0.0)
    with pytest.raises(Limited):
        meters["b"].take(0.0)
    assert meters["a"].priority and not meters["b"].priority
