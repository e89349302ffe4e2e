"""What is accepted, by prediction: true to the figures of the workers, and a wait after which the same request is accepted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Overloaded
from common.messages import Sampling, WorkerBeat
from common.names import CLASSES
from gateway.ask import Ask
from gateway.forecast import MOST_WAIT_S, TURNOVER_S, Bounds, Forecast, Load

PAGE = 16
IDLE = Load({}, 0, 0)


def prefill(rate: float = 1000.0, backlog: int = 0, elsewhere: list[int] | None = None, **more: bool) -> WorkerBeat:
    said = {"prefill_rate": rate, "backlog_tokens": backlog, "elsewhere_tokens": elsewhere or [], **more}
    return WorkerBeat("prefill", 1, 1, False, 9.0, 100, 100, 0, 0, **said)  # type: ignore[arg-type]


def decode(free: int = 100, running: int = 0, step_s: float = 0.01, each_s: float = 0.001) -> WorkerBeat:
    return WorkerBeat("decode", 1, 1, False, 9.0, free, 100, running, 0, step_s=step_s, each_s=each_s)


def ask(tokens: int = 100, job_class: str = "interactive", **more: float) -> Ask:
    return Ask([1] * tokens, Sampling(), 10, job_class=job_class, **more)  # type: ignore[arg-type]


def waiting(**tokens: int) -> Load:
    return Load(tokens, sum(tokens.values()), len(tokens))


def test_the_first_token_comes_after_all_tokens_ahead() -> None:
    load = waiting(resume=100, priority=200, interactive=300, batch=400)
    workers = [prefill(600.0, 50, [1, 2, 3, 4]), prefill(400.0, 150, [1, 2, 3, 4]), decode()]
    by_class = {name: Forecast.ttft_s(name, 500, load, workers) for name in CLASSES}
    assert by_class["resume"] == pytest.approx((0.301, 0.5))
    assert by_class["priority"] == pytest.approx((0.503, 0.5))
    assert by_class["interactive"] == pytest.approx((0.806, 0.5))
    assert by_class["batch"] == pytest.approx((1.210, 0.5))
    assert Forecast.ttft_s("batch", 500, load, [decode()]) == (0.0, 0.0), "nobody has measured"
    assert Forecast.ttft_s("batch", 500, IDLE, [prefill(), prefill(draining=True)]) == (0.0, 0.5)


def test_who_would_come_too_late_is_told_when_it_would_not() -> None:
    forecast = Forecast(Bounds(2.0, None))
    with pytest.raises(Overloaded, match=r"first token is predicted in 3\.10 s, 2 s are allowed") as refused:
        forecast.check(ask(), waiting(interactive=3000), [prefill(), decode(1000)], 0.0, PAGE)
    assert refused.value.retry_after_s == pytest.approx(1.1)
    forecast.check(ask(), waiting(interactive=1900), [prefill(), decode(1000)], 0.0, PAGE)
    forecast.check(ask(job_class="priority"), waiting(interactive=3000), [prefill(), decode(1000)], 0.0, PAGE)
    with pytest.raises(Overloaded, match=r"1\.10 s, 0\.5 s are allowed"):
        forecast.check(ask(deadline_s=0.5), waiting(interactive=1000), [prefill(), decode(1000)], 0.0, PAGE)


def test_one_long_prompt_being_read_is_not_called_many_waiting() -> None:
    with pytest.raises(Overloaded) as refused:
        Forecast(Bounds(2.0, None)).check(ask(), IDLE, [prefill(backlog=5000), decode()], 0.0, PAGE)
    assert refused.value.message == "the first token is predicted in 5.10 s, 2 s are allowed: try again after Retry-After seconds"
    assert (refused.value.status, refused.value.code) == (429, "overloaded")


def test_a_request_that_nothing_waits_before_is_accepted_however_long_it_is() -> None:
    Forecast(Bounds(0.5, None)).check(ask(1500), IDLE, [prefill(), decode()], 0.0, PAGE)


@given(st.integers(0, 20_000), st.integers(1, 4000), st.floats(50, 5000), st.floats(0.1, 20))
def test_after_the_wait_the_same_request_is_accepted(ahead: int, own: int, rate: float, most_s: float) -> None:
    forecast, workers = Forecast(Bounds(most_s, None)), [prefill(rate), decode(10**6)]
    try:
        forecast.check(ask(own), waiting(interactive=ahead), workers, 0.0, PAGE)
    except Overloaded as refused:
        if refused.retry_after_s < MOST_WAIT_S:
            left = max(0, int(ahead - refused.retry_after_s * rate))
            forecast.check(ask(own), waiting(interactive=left), workers, 0.0, PAGE)


def test_room_is_waited_for_as_long_as_answers_take_to_give_it_back() -> None:
    forecast = Forecast(Bounds(2.0, None))
    full = Load({}, 160 * PAGE, 20)
    with pytest.raises(Overloaded, match=r"free pages for it are predicted in 36\.60 s, 2 s are allowed") as refused:
        forecast.check(ask(16), full, [prefill(), decode(100)], 100.0, PAGE)
    assert refused.value.retry_after_s == pytest.approx(61 / (100 / TURNOVER_S) - 2.0)
    for second in range(100, 130):
        forecast.ended(50, float(second))
    forecast.check(ask(16), full, [prefill(), decode(100)], 130.0, PAGE)
    with pytest.raises(Overloaded):
        forecast.check(ask(16), full, [prefill(), decode(100)], 190.0, PAGE)


@pytest.mark.parametrize(
    ("running", "accepted"),
    [([3, 4], True), ([10, 30], False), ([18, 20], True), ([20, 20], False)],
)
def test_no_more_answers_than_the_pace_allows(running: list[int], accepted: bool) -> None:
    """0.01 + 0.001 b: 20 answers on each decode for a step of 30 ms."""
    forecast, workers = Forecast(Bounds(30.0, 0.030)), [prefill(), *(decode(running=b) for b in running)]
    if accepted:
        forecast.check(ask(), IDLE, workers, 0.0, PAGE)
    else:
        with pytest.raises(Overloaded, match=r"more slowly than the 0\.03 s") as refused:
            forecast.check(ask(), IDLE, workers, 0.0, PAGE)
        assert refused.value.retry_after_s == MOST_WAIT_S, "nothing has ended yet"
        for second in range(10):
            forecast.ended(1, float(second))
        with pytest.raises(Overloaded) as refused:
            forecast.check(ask(), IDLE, workers, 9.0, PAGE)
        assert refused.value.retry_after_s == pytest.approx(1.0, rel=0.2), "one a second ends"


def test_a_fleet_too_slow_for_the_pace_still_serves_one_at_a_time() -> None:
    forecast = Forecast(Bounds(30.0, 0.005))
    forecast.check(ask(), IDLE, [prefill(), decode()], 0.0, PAGE)
    forecast.check(ask(), IDLE, [prefill(), decode(each_s=0.0)], 0.0, PAGE)
    for each_s in (0.0, 0.001):
        with pytest.raises(Overloaded):
            forecast.check(ask(), IDLE, [prefill(), decode(running=1, each_s=each_s)], 0.0, PAGE)
